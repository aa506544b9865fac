"""The architecture as data: options, presets, derivation, checks, name and identity hash.

`ModelArchitectureConfig` is the one resolved description that the builder, the console, the
record and the checkpoint read:

    config = ModelArchitectureConfig(arch_preset='llama', n_layer=6, vocab_size=65)
    config.name                       # '6L-12H-768D-RoPE-RMS-SwiGLU-PreNorm'
    config.save('architecture.json'); ModelArchitectureConfig.load('architecture.json')

The registries are declared here and filled by `model_components`; nothing here knows a module.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from configurator import (
    Layer,
    Merged,
    accept_layer,
    chosen_components,
    merge,
    with_component_options,
)
from errors import UserError
from registry import FrozenConfig, Option, Registry, above, at_least, fraction

_HOME = 'model_components'
ATTENTION_REGISTRY = Registry('attention_type', 'Attention', _HOME)
ATTENTION_BACKEND_REGISTRY = Registry('attention_backend', 'Attention backend', _HOME)
POSITION_ENCODING_REGISTRY = Registry('position_encoding', 'Position encoding', _HOME)
ROPE_SCALING_REGISTRY = Registry('rope_scaling', 'RoPE scaling', _HOME)
NORM_REGISTRY = Registry('normalization', 'Normalization', _HOME)
FFN_REGISTRY = Registry('ffn_type', 'Feed-forward network', _HOME)
ACTIVATION_REGISTRY = Registry('activation', 'Activation', _HOME)
NORM_POSITION_REGISTRY = Registry('norm_position', 'Norm position', _HOME)
INITIALIZATION_REGISTRY = Registry('initialization', 'Initialisation', _HOME)

# In the order in which their tags stand in an architecture's name.
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


def _bias_follows_the_linear_layers(values: dict) -> str:
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
# A preset's value may be a function of the merged choices, so that it follows an override.
PRESETS = {
    # The design document's GPT-2, to the letter; OpenAI's own is `legacy`.
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
    # Touvron et al. 2023.
    'llama': _LLAMA,
    # The design document's "team" model: as it stands there, the same choices as `llama`.
    'team': _LLAMA,
    # GPT-2's parts with rotary positions and pre-norm.
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
    # The true GPT-2 and nanoGPT model (Radford et al. 2019): pre-norm, `bias` as set, also in the
    # norms as nanoGPT has it.
    'legacy': {
        'normalization': _bias_follows_the_linear_layers,
        'position_encoding': 'learned_absolute',
        'attention_backend': 'sdpa',
        'ffn_type': 'standard',
        'activation': 'gelu',
        'norm_position': 'pre',
        'bias': True,
        'weight_tying': True,
        'dropout': 0.0,
    },
    # Nothing chosen beyond the options' own defaults: a start for one's own mix.
    'custom': {},
}

PRESET_OPTION = Option(
    str, 'legacy', 'Fills the keys below; single keys override it', choices=tuple(PRESETS)
)

CORE_OPTIONS = {
    'n_layer': Option(int, 12, 'Number of blocks', check=at_least(1)),
    'n_head': Option(int, 12, 'Number of (query) heads', check=at_least(1)),
    'n_embd': Option(int, 768, 'Width of the residual stream', check=at_least(1)),
    'block_size': Option(int, 1024, 'Context length in tokens', check=at_least(1)),
    'vocab_size': Option(
        int | None, None, "Rows of the token table; None: the dataset's", check=at_least(1)
    ),
    'attention_type': Option(str, 'standard', 'Attention', choices=ATTENTION_REGISTRY),
    'attention_backend': Option(
        str, 'sdpa', 'How attention is computed', choices=ATTENTION_BACKEND_REGISTRY
    ),
    'position_encoding': Option(
        str, 'learned_absolute', 'How positions enter', choices=POSITION_ENCODING_REGISTRY
    ),
    'normalization': Option(str, 'layernorm', 'Norm of blocks and output', choices=NORM_REGISTRY),
    'ffn_type': Option(str, 'standard', 'Feed-forward network', choices=FFN_REGISTRY),
    'd_ff': Option(
        int | None, None, "Hidden width of the FFN; None: the FFN's own rule", check=at_least(1)
    ),
    'norm_position': Option(
        str, 'pre', 'Where the norms stand in a block', choices=NORM_POSITION_REGISTRY
    ),
    'initialization': Option(str, 'gpt2', 'How the weights begin', choices=INITIALIZATION_REGISTRY),
    'bias': Option(bool, True, 'Biases in linear layers (a norm says for itself)'),
    'weight_tying': Option(bool, True, 'The output head shares the token table'),
    'scale_embeddings': Option(bool, False, 'Token embeddings times the root of n_embd'),
    'logit_softcap': Option(
        float | None, None, 'Bound of the logits, kept by a tanh; None: none', check=above(0)
    ),
    'z_loss': Option(
        float, 0.0, 'Weight of log² Z in the training loss (PaLM: 1e-4)', check=at_least(0)
    ),
    'dropout': Option(float, 0.0, 'Dropout of embeddings, and of what follows', check=fraction()),
    'attention_dropout': Option(
        float | None, None, 'Dropout of attention weights; None: dropout', check=fraction()
    ),
    'residual_dropout': Option(
        float | None, None, 'Dropout of what blocks add; None: dropout', check=fraction()
    ),
}


def architecture_options() -> dict[str, Option]:
    """The core options, each followed by those of the components it chooses among."""
    return with_component_options(CORE_OPTIONS)


def schema() -> dict[str, dict[str, Option]]:
    """The architecture's part of the command line, by group."""
    return {'Architecture': {'arch_preset': PRESET_OPTION, **architecture_options()}}


class ModelArchitectureConfig(FrozenConfig):
    """One resolved architecture: the core options and those of the chosen components.

    Options that the chosen components do not have are not attributes. `dropped` says, a sentence
    each, which values an override left behind. Raises UserError listing every problem.
    """

    def __init__(self, **values):
        problems: list[str] = []
        layer = accept_layer(Layer('argument', values), schema(), problems)
        resolved = ModelArchitectureConfig.resolve([layer], problems)
        if problems:
            raise UserError(*problems)
        self.__dict__.update(resolved.__dict__)

    @classmethod
    def resolve(cls, layers: list[Layer], problems: list[str]) -> 'ModelArchitectureConfig':
        """Merge accepted values of rising precedence; derive; add what is wrong to `problems`.

        Keys that are not the architecture's are passed over. A preset lies beneath every layer,
        whichever of them names it.
        """
        config = cls.__new__(cls)
        preset, merged = _merge(layers, problems)
        FrozenConfig.__init__(config, *merged)
        config.__dict__.update(preset=preset, _layers=tuple(layers))
        problems.extend(_problems(config))
        return config

    def replace(self, **values) -> 'ModelArchitectureConfig':
        """The same architecture with other values, which are checked and derived anew."""
        problems: list[str] = []
        changed = accept_layer(Layer('argument', values), schema(), problems)
        config = ModelArchitectureConfig.resolve([*self._layers, changed], problems)
        if problems:
            raise UserError(*problems)
        return config

    def components(self) -> Iterator[tuple[str, type]]:
        """The option and the class of each chosen component."""
        yield from chosen_components(CORE_OPTIONS, self._values)

    @property
    def name(self) -> str:
        """For people: sizes, then the tag of each chosen component that has one."""
        chosen = dict(self.components())
        tags = [chosen[r.option].name_tag(self) for r in REGISTRIES if r.option in CORE_OPTIONS]
        sizes = [f'{self.n_layer}L', f'{self.n_head}H', f'{self.n_embd}D']
        return '-'.join(sizes + [tag for tag in tags if tag])

    @property
    def hash(self) -> str:
        """For programs: equal exactly when every resolved option is equal."""
        text = json.dumps(self._values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def save(self, path: str | Path) -> None:
        """Write the options as JSON."""
        Path(path).write_text(json.dumps(self._values, indent=2) + '\n', encoding='utf-8')

    @classmethod
    def load(cls, path: str | Path) -> 'ModelArchitectureConfig':
        """Read what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding='utf-8')))

    @classmethod
    def from_dict(cls, values: dict) -> 'ModelArchitectureConfig':
        """From `to_dict()`, whatever the presets and defaults of today are."""
        return cls(arch_preset='custom', **values)


def _merge(layers: list[Layer], problems: list[str]) -> tuple[str, Merged]:
    """The preset, and what is merged from it and the layers above."""
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
    """Fill what was left to be derived, from the merged values."""

    def fill(key: str, value, why: str) -> None:
        if values[key] is None:
            values[key], origins[key] = value, f'derived: {why}'

    fill('attention_dropout', values['dropout'], 'dropout')
    fill('residual_dropout', values['dropout'], 'dropout')
    for _, component in chosen_components(CORE_OPTIONS, values):
        for key, derived in component.derived_values(FrozenConfig(values, origins)).items():
            fill(key, *derived)


def _problems(config: ModelArchitectureConfig) -> list[str]:
    """Everything that is wrong with the architecture as a whole, a sentence each."""
    problems = []
    for _, component in config.components():
        problems += component.problems(config)
    return list(dict.fromkeys(problems))  # one component may be chosen for two places
