"""Options by layer: read into a layer pattern with its kinds, and written from a model's layers."""

import string
from collections.abc import Callable, Collection, Iterator

from common.architecture_identity import NEUTRAL, without_short_forms
from common.architecture_options import shared_options
from common.layer_pattern import shortest_pattern
from model_config import ModelArchitectureConfig

OUTPUT = 'output'  # the place of the norm before the output head
ABSENT = object()  # the value of an option that a layer does not use


class PerLayer(tuple):
    """In place of an option's value: its value in each layer."""


def _mixer_letter(kind: dict) -> str:
    """The initial of its mixer; without one, F for an FFN or E for experts."""
    mixer = kind.get('mixer', '')
    if mixer == 'none':
        return 'E' if kind.get('ffn_type') == 'moe' else 'F'
    return mixer[:1].upper()


# The natural letter of a kind of layers, if it differs from those of the other kinds.
_LETTERS: tuple[Callable[[dict], str], ...] = (
    _mixer_letter,
    lambda kind: 'G' if kind.get('sliding_window') is None else 'L',  # global, local
    lambda kind: 'N' if kind.get('position_encoding') == 'none' else 'R',  # none, rotary
)


def with_layer_pattern(options: dict) -> dict:
    """The options, with a layer pattern and its kinds in place of the values `PerLayer`.

    The most frequent kind has the model's own options. Windows alone have their short form.
    """
    each = {key: values for key, values in options.items() if isinstance(values, PerLayer)}
    common = {key: value for key, value in options.items() if key not in each}
    layers = list(zip(*each.values()))  # of each layer, the values
    kinds = {
        values: {key: value for key, value in zip(each, values) if value is not ABSENT}
        for values in dict.fromkeys(layers)
    }
    if len(kinds) < 2:
        return {**common, **next(iter(kinds.values()), {})}
    names = _letters(kinds)
    pattern = shortest_pattern(''.join(names[values] for values in layers))
    own = kinds[max(kinds, key=layers.count)]
    differing = [key for key, values in each.items() if len(set(values)) > 1]
    windows = set(each.get('sliding_window', ())) - {None}
    if differing == ['sliding_window'] and len(windows) == 1:
        (own['sliding_window'],) = windows
        return {**common, **own, 'attention_pattern': pattern}
    overrides = {
        names[values]: {key: value for key, value in kind.items() if own.get(key, ABSENT) != value}
        for values, kind in kinds.items()
        if kind is not own
    }
    return {**common, **own, 'layer_pattern': pattern, 'layer_kinds': overrides}


def _letters(kinds: dict[tuple, dict]) -> dict[tuple, str]:
    """A letter for each kind of layers: a natural one if those differ, else A, B, …"""
    for letter_of in _LETTERS:
        letters = [letter_of(kind) for kind in kinds.values()]
        if len(set(letters)) == len(kinds):
            return dict(zip(kinds, letters))
    return dict(zip(kinds, string.ascii_uppercase + string.ascii_lowercase))


def layer_values(config: ModelArchitectureConfig) -> dict:
    """The options of layers that are all alike, without those that only other layers would use."""
    options = config.to_dict()
    used = without_short_forms(options)  # nor neutral values, such as mixer='attention'
    neutral = NEUTRAL.keys() - {'layer_pattern'}
    return {key: value for key, value in options.items() if key in used or key in neutral}


def canonical_options(config: ModelArchitectureConfig) -> dict:
    """The options of layers that are all alike, in a canonical form: equal for equal functions."""
    options = layer_values(config)
    del options['bias']  # only the default of other options
    if 'attention_type' not in options:
        del options['n_head']  # that of attention
    if options.get('attention_output_bias') == options.get('attention_bias') is not None:
        options['attention_output_bias'] = None
    if 'use_gqa' in options:
        options |= {'use_gqa': True, 'num_kv_heads': num_kv_heads_of(config)}
    return options


def paired_kinds(
    config: ModelArchitectureConfig,
    other: ModelArchitectureConfig,
    options_of: Callable[[ModelArchitectureConfig], dict],
) -> Iterator[tuple[str, dict, dict]]:
    """For layers at the same places: the letter of `config`, its options, those of the other model.

    Then OUTPUT, with the options of the norm before the output head. options_of: the options of a
    kind of layers.
    """
    ours, theirs = (
        {letter: options_of(kind) for letter, kind in c.kinds.items()} for c in (config, other)
    )
    for letter, their_letter in dict.fromkeys(zip(config.layer_letters, other.layer_letters)):
        yield letter, ours[letter], theirs[their_letter]
    yield OUTPUT, _output_options(config), _output_options(other)


def in_layers(places: Collection[str], config: ModelArchitectureConfig) -> str:
    """Where something applies, such as 'in layers L, G'; '' if it applies to all layers.

    places: the letters of `config` that it applies to, or OUTPUT.
    """
    letters = [place for place in places if place != OUTPUT]
    if set(letters) == config.kinds.keys():
        return ''
    return f'in layers {", ".join(letters)}' if letters else 'outside the layers'


def _output_options(config: ModelArchitectureConfig) -> dict:
    """The model's own options of the norm before the output head."""
    shared = shared_options(config.to_dict())
    return {key: value for key, value in config.to_dict().items() if key in shared}


def options_with(config: ModelArchitectureConfig, option: str) -> dict:
    """The canonical options of the first layer that uses the option; else the model's own."""
    kinds = map(canonical_options, config.kinds.values())
    return next((options for options in kinds if option in options), config.to_dict())


def layer_config(config: ModelArchitectureConfig, parameter: str) -> ModelArchitectureConfig:
    """The options of the layer that a parameter belongs to; the model's own if it is in none."""
    block, _, rest = parameter.partition('.')
    if block != 'blocks':
        return config
    return config.kinds[config.layer_letters[int(rest.partition('.')[0])]]


def num_kv_heads_of(config: ModelArchitectureConfig) -> int:
    """The number of key/value heads of layers that are all alike."""
    return config.num_kv_heads if config.get('use_gqa') else config.n_head
