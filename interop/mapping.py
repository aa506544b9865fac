"""Their fields and our options: entries that say the same in both, and what a family is made of."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from interop.fields import Fields, alike, brief
from interop.tensors import Weight
from model_config import ModelArchitectureConfig, architecture_options

MOST_LAYERS = 5_000  # what is made for each layer stays small


class Entry(NamedTuple):
    """Fields of theirs and the options of ours that say the same.

    read: their fields -> our options; what cannot be expressed here is added to the fields'
    problems, a sentence each. write: our config -> their fields. An option that they cannot
    express is left out by `write`: `interop.export` reads back what was written and finds it.
    """

    read: Callable[[Fields], dict]
    write: Callable[[ModelArchitectureConfig], dict]


REQUIRED = object()


def same(ours: str, theirs: str, default=REQUIRED, values: dict | None = None) -> Entry:
    """One field is one option. default: what the field is where it is missing.

    values: theirs -> ours where they are called otherwise; of several, the first is written.
    """
    back = {mine: name for name, mine in reversed((values or {}).items())}

    def read(fields: Fields) -> dict:
        if theirs not in fields and default is REQUIRED:
            fields.problems.append(f'{fields.called(theirs)} is missing.')
            return {}
        if values is None:
            option = fields.options[ours]
            value = fields.take(theirs, option.base_type, default, option.optional)
            return {} if value is REQUIRED else {ours: value}
        value = fields.value(theirs, default)
        for name, mine in values.items():
            if alike(value, name):
                return {ours: mine}
        known = ', '.join(repr(name) for name in values)
        fields.problems.append(f'{theirs}={brief(value)} cannot be expressed here; {known} can.')
        return {}

    def write(config: ModelArchitectureConfig) -> dict:
        value = config.to_dict().get(ours)
        if values is None:
            return {theirs: value}
        return {theirs: back[value]} if value in back else {}

    return Entry(read, write)


def ours_is(**options) -> Entry:
    """What all of that family have in our terms, and no field of theirs says."""
    return Entry(lambda fields: options, lambda config: {})


def theirs_is(**constants) -> Entry:
    """Fields that may only be this here, which is also what they are where they are missing."""

    def read(fields: Fields) -> dict:
        for name, value in constants.items():
            fields.require(name, value)
        return {}

    return Entry(read, lambda config: constants)


def written_only(**fields: str) -> Entry:
    """Their field = our option, for what does not change the function: it is a run's own."""

    def read(theirs: Fields) -> dict:
        theirs.unread -= fields.keys()
        return {}

    return Entry(
        read, lambda config: {name: config.to_dict()[option] for name, option in fields.items()}
    )


def heads_split_the_width() -> Entry:
    """A head's size that only some of a family's parts read must be what the others compute."""

    def read(fields: Fields) -> dict:
        width = fields.take('hidden_size', int)
        heads = fields.take('num_attention_heads', int)
        given = fields.take('head_dim', int, optional=True)
        if given is not None and width and heads and given * heads != width:
            fields.refuse('head_dim', f'{heads} heads of a width of {width} have another size')
        return {}

    return Entry(read, lambda config: {})


def kv_heads(default: int | None = None) -> Entry:
    """Grouped-query attention. default: their number where the field is missing; None: n_head."""

    def read(fields: Fields) -> dict:
        heads = fields.take('num_attention_heads', int)
        shared = fields.take('num_key_value_heads', int, default, optional=True)
        shared = heads if shared is None else shared
        return {'use_gqa': True, 'num_kv_heads': shared} if shared != heads else {'use_gqa': False}

    return Entry(read, lambda config: {'num_key_value_heads': kv_heads_of(config)})


def kv_heads_of(config: ModelArchitectureConfig) -> int:
    options = config.to_dict()
    return config.num_kv_heads if options.get('use_gqa') else config.n_head


_WINDOW, _FULL = 'sliding_attention', 'full_attention'


def windows(
    default: int, has_window: Callable[[int, Fields], bool], switch: str | None = None
) -> Entry:
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
            layers = range(min(layers, MOST_LAYERS))
            types = [_WINDOW if has_window(layer, fields) else _FULL for layer in layers]
        elif len(types) != layers:
            fields.refuse('layer_types', f'{len(types)} of them for {layers} layers')
        for kind in sorted(set(types) - {_WINDOW, _FULL}):
            fields.problems.append(f'layer_types has {brief(kind)}, unknown here.')
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
            'layer_types': [names[letter] for letter in layer_letters(config)],
        }

    return Entry(read, write)


def function_of(config: ModelArchitectureConfig) -> dict:
    """The options such that two ways of saying the same are the same."""
    options = config.to_dict()
    del options['bias']  # what the options of each part are where they are left open
    if 'attention_pattern' in options:
        options['attention_pattern'] = layer_letters(config)
    if 'use_gqa' in options:
        options |= {'use_gqa': True, 'num_kv_heads': kv_heads_of(config)}
    if options.get('dense_layers') == 0:
        del options['d_ff']  # a width that no layer has
    return options


def layer_letters(config: ModelArchitectureConfig) -> str:
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
    """One architecture of other people.

    name: transformers' model_type. architecture: its class. prefix: what their names begin with in
    a whole model, and lack in a checkpoint of its base. ignored: a pattern of tensors that hold no
    weights. aliases: other names that transformers has for fields. harmless: fields that change no
    logits in this family. ties_always: the output head is the token table, whatever the files
    hold. unloadable: what its config class refuses, of the fields that are
    written; None if nothing. What a family has no entry for in our options is at its default in it.
    """

    name: str
    architecture: str
    prefix: str
    entries: tuple[Entry, ...]
    weights: dict[str, Weight]
    ignored: str = r'$^'
    aliases: dict[str, str] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    ties_always: bool = False
    unloadable: Callable[[dict], str | None] = lambda fields: None

    def read(self, fields: dict, problems: list[str]) -> dict:
        """Our options for their fields; what cannot be expressed is added to `problems`."""
        theirs = Fields(fields, problems, architecture_options(), self.aliases)
        options = {
            key: value for entry in self.entries for key, value in entry.read(theirs).items()
        }
        theirs.refuse_unread(self.harmless)
        if options.get('n_layer', 0) > MOST_LAYERS:
            problems.append(f'{options["n_layer"]} layers are more than any model has.')
        problems[:] = dict.fromkeys(problems)  # two entries may read the same field
        return options

    def write(self, config: ModelArchitectureConfig) -> dict:
        """Their fields for our options."""
        return {key: v for entry in self.entries for key, v in entry.write(config).items()}


def heads_must_divide_the_width(fields: dict) -> str | None:
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
