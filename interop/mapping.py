"""Fields of transformers' configs and options of ours, mapped both ways; and what a family is."""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any, NamedTuple

from interop.fields import Fields, same_value, short_repr
from interop.tensors import TensorMap
from model_config import ModelArchitectureConfig, architecture_options

MAX_LAYERS = 5_000  # what is made for each layer stays small


class FieldMap(NamedTuple):
    """Fields of transformers' config and the options of ours that say the same.

    read: fields -> options; what cannot be expressed here is added to the fields' problems, a
    sentence each. write: our config -> fields. An option that cannot be expressed there is left
    out by `write`: `interop.export` reads back what was written and finds it.
    """

    read: Callable[[Fields], dict]
    write: Callable[[ModelArchitectureConfig], dict]


REQUIRED = object()  # the default of a field without one


def field(option: str, name: str, default: Any = REQUIRED, values: dict | None = None) -> FieldMap:
    """The field `name` is the option `option`. default: what the field is where it is missing.

    values: the field's -> the option's where they are called otherwise; of several, the first is
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
        fields.problems.append(f'{name}={short_repr(value)} cannot be expressed here; {known} can.')
        return {}

    def write(config: ModelArchitectureConfig) -> dict:
        value = config.to_dict().get(option)
        if values is None:
            return {name: value}
        return {name: field_values[value]} if value in field_values else {}

    return FieldMap(read, write)


def constant_option(**options) -> FieldMap:
    """Options that all models of a family have alike and no field of theirs says."""
    return FieldMap(lambda fields: options, lambda config: {})


def required_field(**constants) -> FieldMap:
    """Fields that may only be this here, which is also what they are where they are missing."""

    def read(fields: Fields) -> dict:
        for name, value in constants.items():
            fields.require(name, value)
        return {}

    return FieldMap(read, lambda config: constants)


def export_only(**fields: str) -> FieldMap:
    """Their field = our option, for what does not change the function: it is a run's own."""

    def read(config_fields: Fields) -> dict:
        config_fields.unread -= fields.keys()
        return {}

    return FieldMap(
        read, lambda config: {name: config.to_dict()[option] for name, option in fields.items()}
    )


def head_size_field() -> FieldMap:
    """A head's size that only some of a family's parts read must be what the others compute."""

    def read(fields: Fields) -> dict:
        width = fields.take('hidden_size', int)
        heads = fields.take('num_attention_heads', int)
        given = fields.take('head_dim', int, optional=True)
        if given is not None and width and heads and given * heads != width:
            fields.refuse('head_dim', f'{heads} heads of a width of {width} have another size')
        return {}

    return FieldMap(read, lambda config: {})


def kv_heads_field(default: int | None = None) -> FieldMap:
    """Grouped-query attention. default: their number where the field is missing; None: n_head."""

    def read(fields: Fields) -> dict:
        heads = fields.take('num_attention_heads', int)
        shared = fields.take('num_key_value_heads', int, default, optional=True)
        shared = heads if shared is None else shared
        return {'use_gqa': True, 'num_kv_heads': shared} if shared != heads else {'use_gqa': False}

    return FieldMap(read, lambda config: {'num_key_value_heads': num_kv_heads_of(config)})


def num_kv_heads_of(config: ModelArchitectureConfig) -> int:
    options = config.to_dict()
    return config.num_kv_heads if options.get('use_gqa') else config.n_head


_WINDOW, _FULL = 'sliding_attention', 'full_attention'


def windows_field(
    default: int, has_window: Callable[[int, Fields], bool], switch: str | None = None
) -> FieldMap:
    """A sliding window in some of the layers.

    default: its size where the field is missing. has_window: whether a layer has it, where
    `layer_types` is missing. switch: a field without which there is none.
    """

    def read(fields: Fields) -> dict:
        window = fields.take('sliding_window', int, default, optional=True)
        if switch and not fields.take(switch, bool, False):
            window = None
        layers = fields.take('num_hidden_layers', int, 0)
        types = fields.take('layer_types', list, optional=True)
        if types is None:
            layers = range(min(layers, MAX_LAYERS))
            types = [_WINDOW if has_window(layer, fields) else _FULL for layer in layers]
        elif len(types) != layers:
            fields.refuse('layer_types', f'{len(types)} of them for {layers} layers')
        for kind in sorted(set(types) - {_WINDOW, _FULL}):
            fields.problems.append(f'layer_types has {short_repr(kind)}, unknown here.')
        letters = ''.join('L' if kind == _WINDOW else 'G' for kind in types)
        if window is None or 'L' not in letters:
            return {'sliding_window': None}
        return {'sliding_window': window, 'attention_pattern': shortest_pattern(letters)}

    def write(config: ModelArchitectureConfig) -> dict:
        names = {'L': _WINDOW, 'G': _FULL}
        window = config.to_dict().get('sliding_window')
        return {
            # Without a switch a model of theirs makes the mask even if no layer has a use for it.
            'sliding_window': default if window is None and not switch else window,
            **({switch: window is not None} if switch else {}),
            'layer_types': [names[letter] for letter in expanded_pattern(config)],
        }

    return FieldMap(read, write)


def canonical_options(config: ModelArchitectureConfig) -> dict:
    """The options such that two ways of saying the same are the same."""
    options = config.to_dict()
    del options['bias']  # what the options of each part are where they are left open
    if 'attention_pattern' in options:
        options['attention_pattern'] = expanded_pattern(config)
    if 'use_gqa' in options:
        options |= {'use_gqa': True, 'num_kv_heads': num_kv_heads_of(config)}
    if options.get('dense_layers') == 0:
        del options['d_ff']  # a width that no layer has
    return options


def expanded_pattern(config: ModelArchitectureConfig) -> str:
    """For each layer L (its attention has a window) or G (it has none)."""
    pattern = config.to_dict().get('attention_pattern', 'G')
    return ''.join(pattern[layer % len(pattern)] for layer in range(config.n_layer))


def shortest_pattern(letters: str) -> str:
    """The least that, repeated, begins with those letters."""
    for length in range(1, len(letters)):
        repeated = letters[:length] * (len(letters) // length + 1)
        if repeated.startswith(letters):
            return letters[:length]
    return letters


@dataclass(frozen=True)
class Family:
    """One architecture of transformers, or of nanoGPT.

    name: transformers' model_type. architecture: its class. prefix: what their names begin with in
    a whole model, and lack in a checkpoint of its base. ignored_tensors: a pattern of those that
    hold no weights. aliases: other names that transformers has for fields. irrelevant_fields:
    those that change no logits in this family. ties_always: the output head is the token table,
    whatever the files hold. check_loadable: what its config class refuses, of the fields that are
    written; None if nothing. An option that no field map has is at its default in the family.
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

    def read(self, fields: dict, problems: list[str]) -> dict:
        """Our options for their fields; what cannot be expressed is added to `problems`."""
        config_fields = Fields(fields, problems, architecture_options(), self.aliases)
        options = {
            key: value
            for field_map in self.field_maps
            for key, value in field_map.read(config_fields).items()
        }
        config_fields.refuse_unread(self.irrelevant_fields)
        if options.get('n_layer', 0) > MAX_LAYERS:
            problems.append(f'{options["n_layer"]} layers are more than any model has.')
        problems[:] = dict.fromkeys(problems)  # two field maps may read the same field
        return options

    def write(self, config: ModelArchitectureConfig) -> dict:
        """Their fields for our options."""
        return {
            key: value
            for field_map in self.field_maps
            for key, value in field_map.write(config).items()
        }


def check_heads_divide_width(fields: dict) -> str | None:
    """transformers' config classes of some families refuse other widths, whatever `head_dim` is."""
    width, heads = fields['hidden_size'], fields['num_attention_heads']
    return (
        f'n_embd={width} must be a multiple of n_head={heads} there, whatever head_dim is'
        if width % heads
        else None
    )


# transformers.activations.ACT2FN; of several the first is written.
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
