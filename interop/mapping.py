"""Mapping of transformers' config fields to our options, both ways; and the class `Family`.

How a family is declared whose layers differ in their mixers or FFNs: `interop.layer_kinds`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any, NamedTuple

import torch

from interop.fields import Fields, same_value, short_repr
from interop.layers import PerLayer, options_with, with_layer_pattern
from interop.tensors import TensorMap
from model_config import ModelArchitectureConfig, architecture_options

MAX_LAYERS = 5_000  # bounds the work and memory per untrusted config


class FieldMap(NamedTuple):
    """Fields of transformers' config, and our options of the same meaning.

    read: fields -> options; for each unsupported value a sentence is added to the fields' problems.
    write: our config -> fields. `write` omits an option that transformers cannot express;
    `interop.export` reads the result back and detects it. An option that differs between layers
    is read as a `PerLayer`, and written from the layers of our config.
    """

    read: Callable[[Fields], dict]
    write: Callable[[ModelArchitectureConfig], dict]


REQUIRED = object()  # the default of a field without one


def field(option: str, name: str, default: Any = REQUIRED, values: dict | None = None) -> FieldMap:
    """The field `name` corresponds to `option`. default: the value of a missing field.

    values: the field's value -> the option's, if they differ; if several match, the first is
    written.
    """
    field_values = {value: key for key, value in reversed((values or {}).items())}

    def read(fields: Fields) -> dict:
        if name not in fields and default is REQUIRED:
            fields.problems.append(f'{fields.full_name(name)} is missing.')
            return {}
        if values is None:
            declared = fields.options[option]
            value = fields.take(name, declared.base_type, default, declared.optional)
            return {} if value is REQUIRED else {option: value}
        value = fields.value(name, default)
        for key, option_value in values.items():
            if same_value(value, key):
                return {option: option_value}
        known = ', '.join(map(repr, values))
        fields.problems.append(f'{name}={short_repr(value)} is not supported; supported: {known}.')
        return {}

    def write(config: ModelArchitectureConfig) -> dict:
        options = options_with(config, option)
        if option not in options:
            return {}
        value = options[option]
        if values is None:
            return {name: value}
        return {name: field_values[value]} if value in field_values else {}

    return FieldMap(read, write)


def size_fields(block_size: int) -> tuple[FieldMap, ...]:
    """The sizes of most families. block_size: the value of a missing field."""
    return (
        field('n_layer', 'num_hidden_layers'),
        field('n_head', 'num_attention_heads'),
        field('n_embd', 'hidden_size'),
        field('block_size', 'max_position_embeddings', block_size),
        field('vocab_size', 'vocab_size'),
    )


def constant_option(**options) -> FieldMap:
    """Options that are the same for all models of a family and have no field."""
    return FieldMap(lambda fields: options, lambda config: {})


def required_field(**constants) -> FieldMap:
    """Fields with a single supported value, which is also their default."""

    def read(fields: Fields) -> dict:
        for name, value in constants.items():
            fields.require(name, value)
        return {}

    return FieldMap(read, lambda config: constants)


def export_only(**fields: str) -> FieldMap:
    """Fields that are written from our options and not read, since they change no logits."""

    def read(config_fields: Fields) -> dict:
        config_fields.unread.difference_update(fields)
        return {}

    def write(config: ModelArchitectureConfig) -> dict:
        options = {key: options_with(config, key) for key in fields.values()}
        return {name: options[key][key] for name, key in fields.items() if key in options[key]}

    return FieldMap(read, write)


def head_size_field(default: int | None = None) -> FieldMap:
    """A field `head_dim` that only parts of a family read; it must equal the computed size.

    default: the value of a missing field, if the family needs it.
    """

    def read(fields: Fields) -> dict:
        width = fields.take('hidden_size', int)
        heads = fields.take('num_attention_heads', int)
        given = fields.take('head_dim', int, default, optional=True)
        if given is not None and width and heads and given * heads != width:
            fields.refuse('head_dim', f'contradicts {heads} heads in a width of {width}')
        return {}

    def write(config: ModelArchitectureConfig) -> dict:
        return {} if default is None else {'head_dim': config.n_embd // config.layers[0].n_head}

    return FieldMap(read, write)


def kv_head_options(heads: int, kv_heads: int) -> dict:
    """Our options for so many heads of queries, and of keys and values."""
    return {'use_gqa': False} if kv_heads == heads else {'use_gqa': True, 'num_kv_heads': kv_heads}


def kv_heads_field(default: int | None = None) -> FieldMap:
    """Grouped-query attention. default: the value of a missing field; None: n_head."""

    def read(fields: Fields) -> dict:
        heads = fields.take('num_attention_heads', int)
        shared = fields.take('num_key_value_heads', int, default, optional=True)
        return kv_head_options(heads, heads if shared is None else shared)

    def write(config: ModelArchitectureConfig) -> dict:
        options = options_with(config, 'num_kv_heads')
        return {'num_key_value_heads': options.get('num_kv_heads', options['n_head'])}

    return FieldMap(read, write)


def shared_experts_field(
    name: str, default: int, expert: str = 'moe_intermediate_size', each: int | None = None
) -> FieldMap:
    """The number of shared experts, from the width of the network that has them all.

    name, default: the field with that width. expert: the field with that of an expert. each: the
    default of that one; None: the same.
    """
    default_each = default if each is None else each

    def read(fields: Fields) -> dict:
        width, each = fields.take(name, int, default), fields.take(expert, int, default_each)
        if width > 0 and each > 0 and width % each == 0:
            return {'shared_experts': width // each}
        fields.refuse(name, f'must be a multiple of {expert}={each}')
        return {}

    def write(config: ModelArchitectureConfig) -> dict:
        options = options_with(config, 'shared_experts')
        if 'shared_experts' not in options:
            return {}
        return {name: options['shared_experts'] * options['expert_d_ff']}

    return FieldMap(read, write)


WINDOW, FULL, LINEAR = 'sliding_attention', 'full_attention', 'linear_attention'


def read_layer_types(fields: Fields, has_window: Callable[[int, Fields], bool]) -> list[str]:
    """WINDOW or FULL for each layer.

    has_window: whether a layer has a window, if `layer_types` is missing.
    """
    layers = fields.take('num_hidden_layers', int, 0)
    types = fields.take('layer_types', list, optional=True)
    if types is None:
        numbers = range(min(layers, MAX_LAYERS))
        return [WINDOW if has_window(layer, fields) else FULL for layer in numbers]
    check_layer_types(fields, types, layers, (WINDOW, FULL))
    return [kind if kind == WINDOW else FULL for kind in types]


def check_layer_types(fields: Fields, types: list, layers: int, kinds: tuple[str, ...]) -> None:
    """Refuse `layer_types` of another length, or with other kinds of layers than these."""
    fields.require_length('layer_types', types, layers)
    for kind in dict.fromkeys(map(str, types)):
        if kind not in kinds:
            fields.problems.append(f'layer_types: {short_repr(kind)} is not supported.')


def layer_types(config: ModelArchitectureConfig) -> list[str]:
    """WINDOW or FULL for each layer."""
    return [FULL if layer.get('sliding_window') is None else WINDOW for layer in config.layers]


def all_but_every_nth(name: str, default: int) -> Callable[[int, Fields], bool]:
    """Whether a layer is not the last of its group. name: the field with the size of a group."""

    def is_chosen(layer: int, fields: Fields) -> bool:
        size = fields.take(name, int, default)
        if size < 1:
            fields.refuse(name, 'must be at least 1')
        return (layer + 1) % max(size, 1) != 0

    return is_chosen


def windows_field(
    default: int | None, has_window: Callable[[int, Fields], bool], switch: str | None = None
) -> FieldMap:
    """A sliding window in some of the layers.

    default: its size if the field is missing. has_window: whether a layer has it, if `layer_types`
    is missing. switch: a field that enables it.
    """

    def read(fields: Fields) -> dict:
        window = fields.take('sliding_window', int, default, optional=True)
        if switch and not fields.take(switch, bool, False):
            window = None
        types = read_layer_types(fields, has_window)
        return {'sliding_window': PerLayer(window if kind == WINDOW else None for kind in types)}

    def write(config: ModelArchitectureConfig) -> dict:
        windows = (layer.get('sliding_window') for layer in config.layers)
        window = next(filter(None, windows), None)
        return {
            # Without a switch, transformers builds the mask even if no layer uses it.
            'sliding_window': default if window is None and not switch else window,
            **({switch: window is not None} if switch else {}),
            'layer_types': layer_types(config),
        }

    return FieldMap(read, write)


RowFactors = Callable[[Fields, str, ModelArchitectureConfig], 'torch.Tensor | float']


@dataclass(frozen=True)
class Family:
    """One architecture of transformers, or of nanoGPT.

    name: transformers' model_type. architecture: its class. prefix: prefix of tensor names, which
    checkpoints of the base model lack. ignored_tensors: pattern of tensors that are not weights.
    aliases: other names of fields in transformers. irrelevant_fields: fields that change no logits
    in this family. ties_always: the output head is always the token embedding. check_loadable:
    returns the reason why its config class refuses the written fields, or None. renamed_tensors:
    pattern of names in some checkpoints -> the name in `weights`. row_factors: for the fields, the
    name of a parameter, and the config of its layer, the factors by which its rows are multiplied
    after they are read, or one of all of them; an export has fields by which they are all 1.
    zero_tensors: pattern of tensors that are zero if the files lack them.
    alias_of: a family with the same model; only fields and their defaults differ. An option without
    a field map has its default in the family.
    """

    name: str
    architecture: str
    prefix: str
    field_maps: tuple[FieldMap, ...]
    weights: dict[str, TensorMap]
    ignored_tensors: str = r'$^'
    aliases: dict[str, str] = dataclass_field(default_factory=dict)
    irrelevant_fields: frozenset[str] = frozenset()
    ties_always: bool = False
    check_loadable: Callable[[dict], str | None] = lambda fields: None
    renamed_tensors: dict[str, str] = dataclass_field(default_factory=dict)
    row_factors: RowFactors = lambda fields, name, layer: 1.0
    zero_tensors: str = r'$^'
    alias_of: str | None = None

    def fields(self, values: dict, problems: list[str]) -> Fields:
        """The fields of a config.json; a sentence for each unsupported value joins `problems`."""
        return Fields(values, problems, architecture_options(), self.aliases)

    def read(self, fields: dict, problems: list[str]) -> dict:
        """Our options for their fields; a sentence for each unsupported value joins `problems`."""
        config_fields = self.fields(fields, problems)
        options = {
            key: value
            for field_map in self.field_maps
            for key, value in field_map.read(config_fields).items()
        }
        options = with_layer_pattern(options)
        config_fields.refuse_unread(self.irrelevant_fields)
        if options.get('n_layer', 0) > MAX_LAYERS:
            problems.append(f'n_layer={options["n_layer"]} exceeds the maximum of {MAX_LAYERS:,}.')
        problems[:] = dict.fromkeys(problems)  # without duplicates of a field that is read twice
        return options

    def write(self, config: ModelArchitectureConfig) -> dict:
        """Their fields for our options."""
        return {
            key: value
            for field_map in self.field_maps
            for key, value in field_map.write(config).items()
        }


def check_heads_divide_width(fields: dict) -> str | None:
    """The check of some families' config classes, which ignores `head_dim`."""
    width, heads = fields['hidden_size'], fields['num_attention_heads']
    return (
        f'n_embd={width} must be a multiple of n_head={heads} in transformers, whatever head_dim is'
        if width % heads
        else None
    )


# Names in transformers.activations.ACT2FN; if several match, the first is written.
ACTIVATIONS = {
    'gelu': 'gelu',
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_fast': 'gelu_tanh',
    'silu': 'silu',
    'swish': 'silu',
    'relu': 'relu',
    'relu2': 'relu2',
}
