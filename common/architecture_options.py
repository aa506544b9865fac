"""The options of an architecture, without those of its components; the registries of components.

The registries are filled by `model_components`; this module imports no torch.
"""

from functools import lru_cache
from typing import Any

from common.architecture_presets import PRESETS
from common.conditions import Naming
from common.dict_option import DictOption
from common.joined_registry import JoinedRegistry
from common.layer_pattern import MOST_LAYERS, SYNTAX, is_kind, is_layer_pattern
from common.option_merge import active_keys, with_component_options
from common.published_designs import LIKE_OPTION
from common.registry import (
    AnyBut,
    FrozenConfig,
    Option,
    Registry,
    above,
    at_least,
    fraction,
    tag_of,
)

_HOME = 'model_components'
MIXER_REGISTRY = JoinedRegistry('mixer', 'Mixer', _HOME)
MIXER_BACKEND_REGISTRY = Registry('mixer_backend', 'Mixer backend', _HOME)
ATTENTION_REGISTRY = Registry('attention_type', 'Attention', _HOME)
ATTENTION_BACKEND_REGISTRY = Registry('attention_backend', 'Attention backend', _HOME)
POSITION_ENCODING_REGISTRY = Registry('position_encoding', 'Position encoding', _HOME)
ROPE_SCALING_REGISTRY = Registry('rope_scaling', 'RoPE scaling', _HOME)
NORM_REGISTRY = Registry('normalization', 'Normalization', _HOME)
FFN_REGISTRY = Registry('ffn_type', 'Feed-forward network', _HOME)
ACTIVATION_REGISTRY = Registry('activation', 'Activation', _HOME)
NORM_POSITION_REGISTRY = Registry('norm_position', 'Norm position', _HOME)
RESIDUAL_REGISTRY = Registry('residual', 'Residual stream', _HOME)
INITIALIZATION_REGISTRY = Registry('initialization', 'Initialization', _HOME)

# In the order of their tags in an architecture's name.
REGISTRIES = (
    MIXER_REGISTRY,
    MIXER_BACKEND_REGISTRY,
    ATTENTION_REGISTRY,
    ATTENTION_BACKEND_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    ROPE_SCALING_REGISTRY,
    NORM_REGISTRY,
    FFN_REGISTRY,
    ACTIVATION_REGISTRY,
    NORM_POSITION_REGISTRY,
    RESIDUAL_REGISTRY,
    INITIALIZATION_REGISTRY,
)


WITH_ATTENTION = ('mixer', Naming('attention'))

PRESET_OPTION = Option(
    str, 'legacy', 'Preset architecture; single options override it', choices=tuple(PRESETS)
)

# What single options override.
START_OPTIONS = {'arch_preset': PRESET_OPTION, 'like': LIKE_OPTION}

CORE_OPTIONS = {
    'n_layer': Option(
        int, 12, 'Number of blocks (layers)', check=at_least(1, at_most=MOST_LAYERS), scope='model'
    ),
    'n_head': Option(int, 12, 'Number of (query) heads', check=at_least(1, at_most=10_000)),
    'n_embd': Option(
        int, 768, 'Width of the hidden states (residual stream)', check=at_least(1), scope='model'
    ),
    'block_size': Option(int, 1024, 'Context length in tokens', check=at_least(1), scope='model'),
    'vocab_size': Option(
        int | None,
        None,
        'Vocabulary size; None: from the dataset',
        check=at_least(1),
        scope='model',
    ),
    'mixer': Option(
        str,
        'attention',
        "Mixer of information across tokens, or several in parallel, such as 'attention+mamba2'",
        choices=MIXER_REGISTRY,
    ),
    'attention_type': Option(
        str,
        'standard',
        'Type of attention',
        choices=ATTENTION_REGISTRY,
        requires=WITH_ATTENTION,
    ),
    'attention_backend': Option(
        str | None,
        None,
        'Implementation of attention; None: depends on the device and the architecture',
        choices=ATTENTION_BACKEND_REGISTRY,
        requires=WITH_ATTENTION,
        scope='model',
    ),
    'position_encoding': Option(
        str,
        'learned_absolute',
        'Position encoding',
        choices=POSITION_ENCODING_REGISTRY,
        requires=WITH_ATTENTION,
    ),
    'normalization': Option(str, 'layernorm', 'Norm of blocks and output', choices=NORM_REGISTRY),
    'ffn_type': Option(str, 'standard', 'Feed-forward network', choices=FFN_REGISTRY),
    'd_ff': Option(
        int | None,
        None,
        'Hidden width of the FFN; None: depends on ffn_type',
        check=at_least(1),
        requires=('ffn_type', AnyBut('none')),
    ),
    'norm_position': Option(
        str,
        'pre',
        'Position of the norms in a block (block layout)',
        choices=NORM_POSITION_REGISTRY,
    ),
    'residual': Option(
        str,
        'addition',
        'How the outputs of sublayers join the residual stream',
        choices=RESIDUAL_REGISTRY,
    ),
    'initialization': Option(
        str, 'gpt2', 'Weight initialization', choices=INITIALIZATION_REGISTRY, scope='model'
    ),
    'bias': Option(bool, True, 'Use biases in linear layers (norms: see normalization)'),
    'weight_tying': Option(
        bool, True, 'Share the weights of token embedding and output head', scope='model'
    ),
    'head_bias': Option(bool, False, 'Use a bias in the output head', scope='model'),
    'embedding_norm': Option(
        str,
        'none',
        'Norm of the token embeddings, before positions are added',
        choices=NORM_REGISTRY,
        scope='model',
    ),
    'scale_embeddings': Option(bool, False, 'Multiply token embeddings by √n_embd', scope='model'),
    'embedding_multiplier': Option(
        float,
        1.0,
        'Factor of token embeddings, besides that of scale_embeddings (Granite: 12)',
        check=above(0),
        scope='model',
    ),
    'logit_multiplier': Option(
        float,
        1.0,
        'Factor of the logits, but not of head_bias, before their soft cap (Granite: 1/8)',
        check=above(0),
        scope='model',
    ),
    'logit_softcap': Option(
        float | None,
        None,
        'Soft cap c of the logits: c · tanh(logits / c); None: off',
        check=above(0),
        scope='model',
    ),
    'z_loss': Option(
        float,
        0.0,
        'Weight of the z-loss, log² Z, in training (PaLM: 1e-4)',
        check=at_least(0),
        scope='model',
    ),
    'dropout': Option(
        float,
        0.0,
        'Dropout of embeddings; default of attention_dropout and residual_dropout',
        check=fraction(),
    ),
    'attention_dropout': Option(
        float | None,
        None,
        'Dropout of attention weights; None: dropout',
        check=fraction(),
        requires=WITH_ATTENTION,
    ),
    'residual_dropout': Option(
        float | None, None, 'Dropout of mixer and FFN outputs; None: dropout', check=fraction()
    ),
    'layer_pattern': Option(
        str | None,
        None,
        "Kind of each layer, a letter each, such as 'LLLG' or 'D M*'; None: all layers are alike",
        check=(is_layer_pattern, SYNTAX),
        scope='model',
    ),
    'layer_kinds': DictOption(
        dict,
        {},
        "Options of each kind of layers that differ from the model's: letter -> {option: value}",
        requires=('layer_pattern', AnyBut(None)),
        scope='model',
        names=(is_kind, 'a single letter'),
        placeholder='LETTER',
        example={'L': {'sliding_window': 512}, 'G': {'position_encoding': 'none'}},
        entry_options=lambda: layer_options(),
        refusal=lambda key, value: refused_in_kind(key, value),
    ),
}


# Options that every saved architecture has.
SIZES = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')


# Options that the model uses outside its layers, such as the norm before the output head and the
# dropout of embeddings. Those of the norms' components follow.
SHARED_OPTIONS = ('normalization', 'embedding_norm', 'dropout')


def layer_options() -> dict[str, Option]:
    """The options in which layers may differ."""
    return dict(_layer_options(_registered()))


def _registered() -> tuple:
    """The components, on which the options depend."""
    return tuple(tuple(registry.registered()) for registry in REGISTRIES)


@lru_cache(maxsize=4)
def _layer_options(registered: tuple) -> dict[str, Option]:
    core = {key: option for key, option in CORE_OPTIONS.items() if option.scope == 'layer'}
    options = with_component_options(core)
    return {key: option for key, option in options.items() if option.scope == 'layer'}


def short_forms() -> dict[str, Option]:
    """The short forms of `layer_pattern`."""
    return {k: option for k, option in architecture_options().items() if option.scope == 'pattern'}


def shared_options(values: dict) -> set[str]:
    """The options of layers that the model with these values uses outside its layers too."""
    return set(active_keys({key: CORE_OPTIONS[key] for key in SHARED_OPTIONS}, values))


def refused_in_kind(key: str, value: Any) -> str | None:
    """The reason why a kind of layers may not have an option, or this value of it, or None."""
    options = {**START_OPTIONS, **architecture_options()}
    if key not in options or key in layer_options():
        if key == 'position_encoding' and value in POSITION_ENCODING_REGISTRY:
            return POSITION_ENCODING_REGISTRY[value].refused_in_kind(value)
        return None
    if options[key].scope == 'pattern':
        return f'{key} is a short form of layer_pattern. Write its layers into the pattern.'
    return (
        f'{key} is an option of the whole model, not of some layers. Set {key} outside layer_kinds.'
    )


def architecture_options() -> dict[str, Option]:
    """The core options, each followed by the options of the components it chooses from."""
    return dict(_architecture_options(_registered()))


@lru_cache(maxsize=4)
def _architecture_options(registered: tuple) -> dict[str, Option]:
    return with_component_options(CORE_OPTIONS)


def component_tags(config: FrozenConfig, chosen: list[tuple[str, Any]]) -> list[str]:
    """The parts of an architecture's name that are those of its components.

    chosen: the option and the class of each component.
    """
    tags = [
        tag_of(component, config)
        for registry in REGISTRIES
        if registry.option in CORE_OPTIONS
        for option, component in chosen
        if option == registry.option
    ]
    if config.get('embedding_norm') not in (None, 'none'):
        tags.append(f'Emb{tag_of(NORM_REGISTRY[config.embedding_norm], config)}')
    tags += ['HeadBias'] if config.get('head_bias') else []
    for key, tag in (('embedding_multiplier', 'EmbMul'), ('logit_multiplier', 'LogitMul')):
        tags += [f'{tag}{config.get(key):g}'] if config.get(key) != 1 else []
    return [part for tag in tags if tag for part in tag.split('-')]
