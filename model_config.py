"""The configuration of an architecture: options, presets, derived values, checks, name and hash.

`ModelArchitectureConfig` is the resolved description that the builder, the console, the record and
the checkpoint use:

    config = ModelArchitectureConfig(arch_preset='llama', n_layer=6, vocab_size=65)
    config.name                       # '6L-12H-768D-RoPE-RMS-SwiGLU-PreNorm'
    config.save('architecture.json'); ModelArchitectureConfig.load('architecture.json')

The registries are declared here and filled by `model_components`; this module imports no torch.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.architecture_presets import PRESETS
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
        str | None,
        None,
        'Implementation of attention; None: depends on the device and the architecture',
        choices=ATTENTION_BACKEND_REGISTRY,
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


class Device(NamedTuple):
    """What the choice of an attention backend depends on."""

    kind: str  # 'cpu', 'cuda' or 'mps'
    compiles: bool = True  # whether torch.compile works


CPU = Device('cpu')


class ModelArchitectureConfig(FrozenConfig):
    """One resolved architecture: the core options and those of the chosen components.

    Options that no chosen component uses are not attributes. The attention backend, if it is not
    set, is that of a CPU; `for_device` chooses that of another device. Raises UserError, which
    lists every problem.
    """

    device = CPU

    def __init__(self, **values):
        problems: list[str] = []
        layer = validate_layer(Layer('ModelArchitectureConfig()', values), schema(), problems)
        resolved = ModelArchitectureConfig.resolve([layer], problems)
        if problems:
            raise UserError(*problems)
        self.__dict__.update(resolved.__dict__)

    @classmethod
    def resolve(
        cls, layers: list[Layer], problems: list[str], device: Device = CPU
    ) -> 'ModelArchitectureConfig':
        """Merge validated layers, the highest precedence last; derive; add to `problems`.

        Keys that are not options of the architecture are ignored. Every layer overrides the preset,
        whichever layer names it.
        """
        config = cls.__new__(cls)
        preset, merged = _merge(layers, problems)
        FrozenConfig.__init__(config, *merged)
        config.__dict__.update(preset=preset, _layers=tuple(layers))
        config._derive_backend(device)
        problems.extend(_problems(config))
        return config

    def replace(self, **values) -> 'ModelArchitectureConfig':
        """The same architecture with other values, checked and with derived values updated."""
        problems: list[str] = []
        changed = validate_layer(Layer('replace()', values), schema(), problems)
        config = ModelArchitectureConfig.resolve([*self._layers, changed], problems, self.device)
        if problems:
            raise UserError(*problems)
        return config

    def for_device(self, kind: str, compiles: bool = True) -> 'ModelArchitectureConfig':
        """The same architecture with the attention backend of a device, unless one was set.

        kind: 'cpu', 'cuda' or 'mps'. compiles: whether torch.compile works there.
        """
        device = Device(kind, compiles)
        if device == self.device or not self.derives_backend:
            return self
        config = copy.copy(self)
        config.__dict__.update(_values=dict(self._values), origins=dict(self.origins))
        config._values['attention_backend'] = None
        config._derive_backend(device)
        return config

    @property
    def derives_backend(self) -> bool:
        """Whether the attention backend was not set but depends on the device."""
        return self.origins['attention_backend'].startswith('derived')

    def _derive_backend(self, device: Device) -> None:
        """Choose the attention backend that ranks first on the device, if it is None."""
        self.__dict__['device'] = device
        if self._values['attention_backend'] is None:
            names = list(ATTENTION_BACKEND_REGISTRY)
            ranks = [ATTENTION_BACKEND_REGISTRY[name].rank(self, device) for name in names]
            self._values['attention_backend'] = names[ranks.index(min(ranks))]
            self.origins['attention_backend'] = f'derived: for {device.kind}'

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
        """A hash, equal exactly if all resolved options are equal, on any device."""
        text = json.dumps(self.for_device('cpu')._values, sort_keys=True)
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
