"""The configuration of an architecture: options, presets, derived values, checks, name and hash.

`ModelArchitectureConfig` is the resolved description that the builder, the console, the record and
the checkpoint use:

    config = ModelArchitectureConfig(arch_preset='llama', n_layer=6, vocab_size=65)
    config.name                       # '6L-12H-768D-RoPE-RMS-SwiGLU-PreNorm'
    config.save('architecture.json'); ModelArchitectureConfig.load('architecture.json')

The registries are declared here and filled by `model_components`; this module imports no torch.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from common.errors import UserError
from common.registry import (
    FrozenConfig,
    Option,
    Registry,
    above,
    at_least,
    derived_values_of,
    fraction,
    sentences_of,
    show_value,
    tag_of,
)
from common.text_files import parse_json
from configurator import (
    Layer,
    MergedOptions,
    Schema,
    chosen_components,
    merge,
    validate_layer,
    with_component_options,
)

_HOME = 'model_components'
ATTENTION_REGISTRY = Registry('attention_type', 'Attention', _HOME)
ATTENTION_BACKEND_REGISTRY = Registry('attention_backend', 'Attention backend', _HOME)
POSITION_ENCODING_REGISTRY = Registry('position_encoding', 'Position encoding', _HOME)
ROPE_SCALING_REGISTRY = Registry('rope_scaling', 'RoPE scaling', _HOME)
NORM_REGISTRY = Registry('normalization', 'Normalization', _HOME)
FFN_REGISTRY = Registry('ffn_type', 'Feed-forward network', _HOME)
ACTIVATION_REGISTRY = Registry('activation', 'Activation', _HOME)
NORM_POSITION_REGISTRY = Registry('norm_position', 'Norm position', _HOME)
INITIALIZATION_REGISTRY = Registry('initialization', 'Initialization', _HOME)

# In the order of their tags in an architecture's name.
REGISTRIES = (
    ATTENTION_REGISTRY,
    ATTENTION_BACKEND_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    ROPE_SCALING_REGISTRY,
    NORM_REGISTRY,
    FFN_REGISTRY,
    ACTIVATION_REGISTRY,
    NORM_POSITION_REGISTRY,
    INITIALIZATION_REGISTRY,
)


def _layernorm_with_bias_of_linear_layers(values: dict) -> str:
    return 'layernorm' if values['bias'] else 'layernorm_nobias'


_LLAMA = {
    'normalization': 'rmsnorm',
    'position_encoding': 'rope',
    'attention_backend': 'sdpa',
    'ffn_type': 'swiglu',
    'norm_position': 'pre',
    'bias': False,
    'weight_tying': False,
    'dropout': 0.0,
}


def kv_heads_in_groups_of(group: int, values: dict) -> int:
    """Number of key/value heads if `group` query heads, or the next lower divisor, share one."""
    heads = values['n_head']
    return next(heads // n for n in range(group, 0, -1) if heads % n == 0)


_GROUPS_OF_FOUR = {
    'use_gqa': True,
    'num_kv_heads': partial(kv_heads_in_groups_of, 4),
    'd_ff': lambda values: 7 * values['n_embd'] // 2,
}
# A value may be a function of the merged values, so that it follows overrides.
PRESETS = {
    'gpt2': {
        'normalization': 'layernorm_nobias',
        'position_encoding': 'learned_absolute',
        'attention_backend': 'sdpa',
        'ffn_type': 'standard',
        'activation': 'gelu',
        'norm_position': 'post',
        'bias': False,
        'weight_tying': True,
        'dropout': 0.0,
    },
    'llama': _LLAMA,
    'team': _LLAMA,
    'hybrid': {
        'normalization': 'layernorm_nobias',
        'position_encoding': 'rope',
        'attention_backend': 'sdpa',
        'ffn_type': 'standard',
        'activation': 'gelu',
        'norm_position': 'pre',
        'bias': False,
        'weight_tying': True,
        'dropout': 0.0,
    },
    'legacy': {
        'normalization': _layernorm_with_bias_of_linear_layers,
        'position_encoding': 'learned_absolute',
        'attention_backend': 'sdpa',
        'ffn_type': 'standard',
        'activation': 'gelu',
        'norm_position': 'pre',
        'bias': True,
        'weight_tying': True,
        'dropout': 0.0,
    },
    'llama3': {**_LLAMA, 'rope_theta': 5e5, **_GROUPS_OF_FOUR},
    'qwen3': {
        **_LLAMA,
        'rope_theta': 1e6,
        'norm_eps': 1e-6,
        'head_dim': 128,
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 2),
        'qk_norm': 'rmsnorm',
        'qk_norm_scope': 'head',
        'd_ff': lambda values: 3 * values['n_embd'],
        'weight_tying': True,
    },
    'gemma2': {
        **_LLAMA,
        'norm_eps': 1e-6,
        'norm_position': 'sandwich',
        'attention_backend': 'manual',
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 2),
        'sliding_window': lambda values: max(1, values['block_size'] // 2),
        'attention_pattern': 'LG',
        'attention_softcap': 50.0,
        'logit_softcap': 30.0,
        'ffn_type': 'geglu',
        'geglu_tanh': True,
        'd_ff': lambda values: 4 * values['n_embd'],
        'scale_embeddings': True,
        'weight_tying': True,
    },
    'olmo2': {
        **_LLAMA,
        'rope_theta': 5e5,
        'norm_eps': 1e-6,
        'norm_position': 'reordered',
        'qk_norm': 'rmsnorm',
        'qk_norm_scope': 'projection',
        'z_loss': 1e-5,
    },
    'mistral': {
        **_LLAMA,
        **_GROUPS_OF_FOUR,
        'sliding_window': lambda values: max(1, values['block_size'] // 2),
    },
    'pythia': {
        'normalization': 'layernorm',
        'position_encoding': 'rope',
        'rope_fraction': 0.25,
        'attention_backend': 'sdpa',
        'ffn_type': 'standard',
        'activation': 'gelu',
        'norm_position': 'parallel',
        'bias': True,
        'weight_tying': False,
        'dropout': 0.0,
    },
    'mixtral': {
        **_LLAMA,
        'rope_theta': 1e6,
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 4),
        'ffn_type': 'moe',
        'expert_ffn': 'swiglu',
        'num_experts': 8,
        'experts_per_token': 2,
        'expert_d_ff': lambda values: 8 * max(1, round(7 * values['n_embd'] / 32)),
    },
    'deepseek': {
        **_LLAMA,
        'norm_eps': 1e-6,
        'attention_type': 'mla',
        'kv_lora_rank': lambda values: max(1, values['n_embd'] // 4),
        'ffn_type': 'moe',
        'expert_ffn': 'swiglu',
        'num_experts': 32,
        'experts_per_token': 6,
        'shared_experts': 2,
        'expert_d_ff': lambda values: 8 * max(1, round(values['n_embd'] / 24)),
        'dense_layers': 1,
        'router_normalize': False,
        'load_balance_weight': 0.001,
    },
    'speedrun': {
        'normalization': 'rmsnorm',
        'position_encoding': 'rope',
        'attention_backend': 'sdpa',
        'qk_norm': 'rmsnorm',
        'qk_norm_scope': 'head',
        'ffn_type': 'standard',
        'activation': 'relu2',
        'norm_position': 'pre',
        'logit_softcap': 15.0,
        'bias': False,
        'weight_tying': False,
        'dropout': 0.0,
    },
    'custom': {},
}

PRESET_DESCRIPTIONS = {
    'gpt2': (
        "GPT-2's components with post-norm and LayerNorm without bias; not OpenAI's GPT-2, "
        'which is pre-norm: that is `legacy`'
    ),
    'llama': 'LLaMA (Touvron et al. 2023)',
    'team': 'The same architecture as `llama`, under a second name',
    'hybrid': "GPT-2's feed-forward network and LayerNorm with rotary positions and pre-norm",
    'legacy': (
        "OpenAI's GPT-2 (Radford et al. 2019) as in nanoGPT: pre-norm; `bias` is also that of "
        'the norms'
    ),
    'llama3': (
        "Llama 3 (Grattafiori et al. 2024) with the 8B model's ratios: 4 query heads share "
        'keys and values, FFN 3.5 · n_embd wide. For the long context of Llama 3.1: '
        'rope_scaling=llama3'
    ),
    'qwen3': (
        "Qwen3 (Yang et al. 2025) with the 0.6B model's ratios: heads of 128 dimensions, 2 "
        'query heads share keys and values, QK norm per head, FFN 3 · n_embd wide'
    ),
    'gemma2': (
        "Gemma 2 (Gemma Team 2024) with the 2B model's ratios: norms before and after each "
        'sublayer, in every other layer a window of half the context (4096 of 8192 in the '
        'original), soft caps of scores (on a GPU use attention_backend=flex) and logits'
    ),
    'olmo2': (
        "OLMo 2 (OLMo et al. 2024), the 7B model's components: norms after the sublayers, QK "
        'norm over all heads at once, z-loss'
    ),
    'mistral': (
        "Mistral (Jiang et al. 2023) with the 7B model's ratios: heads and FFN as in "
        '`llama3`, a window of half the context in every layer (4096 of 8192 in the original)'
    ),
    'pythia': (
        'Pythia 160M (Biderman et al. 2023; GPT-NeoX: Black et al. 2022): attention and FFN '
        'in parallel, RoPE on a quarter of each head, biases'
    ),
    'mixtral': (
        'Mixtral (Jiang et al. 2024): `mistral` without the window, with 2 of 8 experts per '
        'token, each half as wide as its FFN'
    ),
    'deepseek': (
        "DeepSeek-V2 (DeepSeek-AI 2024) with the Lite model's ratios: latent attention; after "
        'a dense first layer, 6 of 32 small experts (64 in the original) and 2 shared ones '
        'per token'
    ),
    'speedrun': (
        'In the style of modded-nanogpt (Jordan et al. 2024): squared ReLU, QK norm, capped logits'
    ),
    'custom': "All options at their defaults, to start a mix of one's own",
}

PRESET_OPTION = Option(
    str, 'legacy', 'Preset architecture; single options override it', choices=tuple(PRESETS)
)

CORE_OPTIONS = {
    'n_layer': Option(int, 12, 'Number of blocks (layers)', check=at_least(1, at_most=10_000)),
    'n_head': Option(int, 12, 'Number of (query) heads', check=at_least(1, at_most=10_000)),
    'n_embd': Option(int, 768, 'Width of the hidden states (residual stream)', check=at_least(1)),
    'block_size': Option(int, 1024, 'Context length in tokens', check=at_least(1)),
    'vocab_size': Option(
        int | None, None, 'Vocabulary size; None: from the dataset', check=at_least(1)
    ),
    'attention_type': Option(str, 'standard', 'Type of attention', choices=ATTENTION_REGISTRY),
    'attention_backend': Option(
        str, 'sdpa', 'Implementation of attention', choices=ATTENTION_BACKEND_REGISTRY
    ),
    'position_encoding': Option(
        str, 'learned_absolute', 'Position encoding', choices=POSITION_ENCODING_REGISTRY
    ),
    'normalization': Option(str, 'layernorm', 'Norm of blocks and output', choices=NORM_REGISTRY),
    'ffn_type': Option(str, 'standard', 'Feed-forward network', choices=FFN_REGISTRY),
    'd_ff': Option(
        int | None, None, 'Hidden width of the FFN; None: depends on ffn_type', check=at_least(1)
    ),
    'norm_position': Option(
        str,
        'pre',
        'Position of the norms in a block (block layout)',
        choices=NORM_POSITION_REGISTRY,
    ),
    'initialization': Option(str, 'gpt2', 'Weight initialization', choices=INITIALIZATION_REGISTRY),
    'bias': Option(bool, True, 'Use biases in linear layers (norms: see normalization)'),
    'weight_tying': Option(bool, True, 'Share the weights of token embedding and output head'),
    'scale_embeddings': Option(bool, False, 'Multiply token embeddings by √n_embd'),
    'logit_softcap': Option(
        float | None,
        None,
        'Soft cap c of the logits: c · tanh(logits / c); None: off',
        check=above(0),
    ),
    'z_loss': Option(
        float, 0.0, 'Weight of the z-loss, log² Z, in training (PaLM: 1e-4)', check=at_least(0)
    ),
    'dropout': Option(
        float,
        0.0,
        'Dropout of embeddings; default of attention_dropout and residual_dropout',
        check=fraction(),
    ),
    'attention_dropout': Option(
        float | None, None, 'Dropout of attention weights; None: dropout', check=fraction()
    ),
    'residual_dropout': Option(
        float | None, None, 'Dropout of attention and FFN outputs; None: dropout', check=fraction()
    ),
}


# Options that every saved architecture has.
SIZES = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')


def architecture_options() -> dict[str, Option]:
    """The core options, each followed by the options of the components it chooses from."""
    return with_component_options(CORE_OPTIONS)


def schema() -> dict[str, dict[str, Option]]:
    """The options of the architecture, by group of the command line."""
    return {'Architecture': {'arch_preset': PRESET_OPTION, **architecture_options()}}


class ModelArchitectureConfig(FrozenConfig):
    """One resolved architecture: the core options and those of the chosen components.

    Options that no chosen component uses are not attributes. Raises UserError, which lists every
    problem.
    """

    def __init__(self, **values):
        problems: list[str] = []
        layer = validate_layer(Layer('ModelArchitectureConfig()', values), schema(), problems)
        resolved = ModelArchitectureConfig.resolve([layer], problems)
        if problems:
            raise UserError(*problems)
        self.__dict__.update(resolved.__dict__)

    @classmethod
    def resolve(cls, layers: list[Layer], problems: list[str]) -> 'ModelArchitectureConfig':
        """Merge validated layers, the highest precedence last; derive; add to `problems`.

        Keys that are not options of the architecture are ignored. Every layer overrides the preset,
        whichever layer names it.
        """
        config = cls.__new__(cls)
        preset, merged = _merge(layers, problems)
        FrozenConfig.__init__(config, *merged)
        config.__dict__.update(preset=preset, _layers=tuple(layers))
        problems.extend(_problems(config))
        return config

    def replace(self, **values) -> 'ModelArchitectureConfig':
        """The same architecture with other values, checked and with derived values updated."""
        problems: list[str] = []
        changed = validate_layer(Layer('replace()', values), schema(), problems)
        config = ModelArchitectureConfig.resolve([*self._layers, changed], problems)
        if problems:
            raise UserError(*problems)
        return config

    def components(self) -> Iterator[tuple[str, type]]:
        """The option and the class of each chosen component."""
        yield from chosen_components(CORE_OPTIONS, self._values)

    @property
    def name(self) -> str:
        """A readable name: sizes, then the tag of each chosen component that has one."""
        chosen = dict(self.components())
        tags = [tag_of(chosen[r.option], self) for r in REGISTRIES if r.option in CORE_OPTIONS]
        sizes = [f'{self.n_layer}L', f'{self.n_head}H', f'{self.n_embd}D']
        return '-'.join(sizes + [tag for tag in tags if tag])

    @property
    def hash(self) -> str:
        """A hash, equal exactly if all resolved options are equal."""
        text = json.dumps(self._values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def save(self, path: str | Path) -> None:
        """Write the options as JSON."""
        Path(path).write_text(json.dumps(self._values, indent=2) + '\n', encoding='utf-8')

    @classmethod
    def load(cls, path: str | Path) -> 'ModelArchitectureConfig':
        """Read what `save` wrote."""
        return cls.from_dict(parse_json(Path(path).read_bytes()))

    @classmethod
    def from_dict(cls, values: dict) -> 'ModelArchitectureConfig':
        """The architecture whose `to_dict()` is `values`, independent of presets.

        Options that are missing, because an older version saved the values, have their defaults;
        the sizes must be there. Raises UserError, which lists every problem.
        """
        problems: list[str] = []
        layer = layer_of_dict(values, 'from_dict()', schema(), problems)
        missing = [key for key in SIZES if key not in values]
        if missing:
            problems.append(
                f'from_dict(): {", ".join(missing)} missing. It takes all values of to_dict(); to '
                f'set some options only, call ModelArchitectureConfig(n_layer=2).'
            )
        config = cls.resolve([Layer('from_dict()', {'arch_preset': 'custom'}), layer], problems)
        if problems:
            raise UserError(*problems)
        return config


def layer_of_dict(values: object, origin: str, options: Schema, problems: list[str]) -> Layer:
    """The valid values of a dict such as `to_dict()` returns; others add to `problems`.

    Raises UserError if it is no dict of options.
    """
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(
            f'{origin} takes a dict, option -> value, such as to_dict() returns, and got '
            f'{show_value(values)}.'
        )
    values = {key: value for key, value in values.items() if key != 'arch_preset'}
    return validate_layer(Layer(origin, values), options, problems)


def _merge(layers: list[Layer], problems: list[str]) -> tuple[str, MergedOptions]:
    """The preset, and the merged options of its layer and the layers above."""
    preset = PRESET_OPTION.default
    for layer in layers:
        preset = layer.values.get('arch_preset', preset)
    stack = [Layer(f'preset {preset}', PRESETS[preset]), *layers]
    options = {'arch_preset': PRESET_OPTION, **CORE_OPTIONS}
    merged = merge(options, stack, problems, preset='arch_preset')
    del merged.values['arch_preset']
    _derive(merged.values, merged.origins)
    return preset, merged


def _derive(values: dict, origins: dict[str, str]) -> None:
    """Derive the values that are None from the merged values."""

    def fill(key: str, value, why: str) -> None:
        if values[key] is None:
            values[key], origins[key] = value, f'derived: {why}'

    fill('attention_dropout', values['dropout'], 'dropout')
    fill('residual_dropout', values['dropout'], 'dropout')
    for _, component in chosen_components(CORE_OPTIONS, values):
        for key, derived in derived_values_of(component, FrozenConfig(values, origins)).items():
            fill(key, *derived)


def _problems(config: ModelArchitectureConfig) -> list[str]:
    """The problems of the architecture as a whole, a sentence each."""
    problems = []
    for _, component in config.components():
        problems += sentences_of(component, 'problems', config)
    return list(dict.fromkeys(problems))  # one component may be chosen by two options
