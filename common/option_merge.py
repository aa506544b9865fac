"""Merging of options, defaults < preset < config file < command line, with origins of values.

The options that have an effect depend on the chosen components; values for others are mistakes, or
leftovers of a lower layer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from common.dict_option import DictOption
from common.errors import UserError
from common.registry import Option, Registry, conditions_text, owners

COMMAND_LINE = 'command line'  # the origin of its values


@dataclass(frozen=True)
class Layer:
    """Values from one place: a preset, a config file, the command line. Later layers win.

    level: the number of the layer for `merge`; None: its place among the layers, from 1. entry: the
    entry of a dict option that holds the values, such as `layer_kinds.L`. refused: keys whose value
    was refused with a message, so that what follows from its absence is not reported too.
    """

    origin: str
    values: dict
    level: int | None = None
    entry: str = ''
    refused: frozenset[str] = frozenset()


class MergedOptions(NamedTuple):
    """Values and origins of the active options; notes on the values that were dropped."""

    values: dict
    origins: dict[str, str]
    dropped: list[str]


class Merge(NamedTuple):
    """A merge with what it left out.

    dropped: key -> note on a value that a higher layer's choice made useless. useless: key -> the
    problem of any other value that no chosen component uses. levels: key -> the number of the layer
    that set it, from 1; 0: the default. described: key -> each value that a layer set, in use or
    not, with its origin.
    """

    values: dict
    origins: dict[str, str]
    dropped: dict[str, str]
    useless: dict[str, str]
    levels: dict[str, int]
    described: dict[str, str]


def merge(
    core: dict[str, Option], layers: list[Layer], problems: list[str], preset: str | None = None
) -> MergedOptions:
    """`merge_layers`, with the problems of useless values added to `problems`."""
    merged = merge_layers(core, layers, problems, preset)
    problems.extend(merged.useless.values())
    return MergedOptions(merged.values, merged.origins, list(merged.dropped.values()))


def merge_layers(
    core: dict[str, Option], layers: list[Layer], problems: list[str], preset: str | None = None
) -> Merge:
    """Merge validated layers, the highest precedence last; keys not in the schema are ignored.

    core: the options themselves, without those of the components that they choose between. preset:
    the option that names the first layer. Choices that this layer or a default makes count as made
    where the preset was named.

    A value may be a function of the merged values. An option is active if the chosen components
    use it. A value for an inactive option is dropped with a note if a layer above it made the
    choice; otherwise it is `useless`.
    """
    options = with_component_options(core)
    # 1. Take each option from the highest layer that sets it, or its default.
    merged = _overlay(options, layers, problems)
    # 2. Compute the values that are functions of the others.
    for key, value in list(merged.values.items()):
        if callable(value):
            merged.values[key] = value(merged.values)
    # 3. Find the active options.
    active = dict.fromkeys(active_keys(core, merged.values))  # an ordered set
    # 4. Go through the values that were set for inactive options. If a higher layer made the
    #    deciding choice, the value is a leftover and is dropped; otherwise it is a mistake, unless
    #    the deciding choice is one.
    dropped, useless = {}, {}
    refused = {key for layer in layers for key in layer.refused}
    for key in options:
        if key in active or merged.level[key] == 0:
            continue
        deciding = list(dict.fromkeys(_deciding_choices(key, options, active)))
        if refused & {*deciding}:
            continue
        if merged.level[key] < merged.level_chosen_at(deciding, preset):
            chosen = ', '.join(map(merged.describe, deciding))
            dropped[key] = f'dropped: {merged.describe(key)}: no effect with {chosen}'
        else:
            useless[key] = _no_effect_problem(key, options, merged, deciding)
    # 5. Keep the active options only.
    return Merge(
        {key: merged.values[key] for key in active},
        {key: merged.origins[key] for key in active},
        dropped,
        useless,
        merged.level,
        {key: merged.describe(key) for key, level in merged.level.items() if level > 0},
    )


def _no_effect_problem(
    key: str, options: dict[str, Option], merged: '_Overlay', deciding: list[str]
) -> str:
    """The message for a value that no chosen component uses, and the two ways to fix it."""
    needed = owners(key, options)
    if {choice for choice, _ in needed} == {*deciding} and len(deciding) == 1:
        (choice,) = deciding  # just named, so that its value suffices
        chosen = f'{merged.setter(choice)} {merged.values[choice]!r}'
    else:
        chosen = ' and '.join(
            f'{merged.setter(choice)} {choice}={merged.values[choice]!r}' for choice in deciding
        )
    # A kind of layers may choose for itself.
    place = merged.place(key).removesuffix(key)
    return (
        f'{merged.describe(key)} has no effect: it needs {conditions_text(needed)}, but {chosen}. '
        f'Remove {place}{key} or change {" or ".join(place + choice for choice in deciding)}.'
    )


class _Overlay(NamedTuple):
    """By key: the value, the number of the layer that set it (0: the default), its origin, and the
    entry of a dict option that holds it."""

    values: dict
    level: dict[str, int]
    origins: dict[str, str]
    entries: dict[str, str]

    def place(self, key: str) -> str:
        """The dotted name of the option, such as `layer_kinds.L.n_head`."""
        return '.'.join(filter(None, (self.entries[key], key)))

    def describe(self, key: str) -> str:
        value = self.values[key]
        # A preset's dict may have functions.
        shown = '' if isinstance(value, dict) else f'={value!r}'
        return f'{self.place(key)}{shown} ({self.origins[key]})'

    def setter(self, key: str) -> str:
        """The beginning of a clause: `c.py sets`, `the default is`."""
        origin = self.origins[key]
        if origin == 'default':
            return 'the default is'
        setter = self.entries[key] or origin
        return f'the {setter} sets' if setter == COMMAND_LINE else f'{setter} sets'

    def level_chosen_at(self, choices: Iterable[str], preset: str | None) -> int:
        """The highest level of the choices.

        Choices of the defaults and of the preset's layer, the first, count at the level that names
        the preset.
        """
        named_at, preset_level = (self.level[preset], 1) if preset else (0, 0)
        return max(
            self.level[key] if self.level[key] > preset_level else named_at for key in choices
        )


def _overlay(options: dict[str, Option], layers: list[Layer], problems: list[str]) -> _Overlay:
    """The defaults, overridden by each layer in turn."""
    merged = _Overlay(
        {key: option.default for key, option in options.items()},
        dict.fromkeys(options, 0),
        dict.fromkeys(options, 'default'),
        dict.fromkeys(options, ''),
    )
    for number, layer in enumerate(layers, start=1):
        level = number if layer.level is None else layer.level
        for key, value, origin in resolved_aliases(layer, options, problems):
            option = options[key]
            if isinstance(option, DictOption):
                value = option.combined(merged.values[key], value)
            merged.values[key], merged.level[key], merged.origins[key] = value, level, origin
            merged.entries[key] = layer.entry
    return merged


def resolved_aliases(
    layer: Layer, options: dict[str, Option], problems: list[str]
) -> Iterator[tuple[str, Any, str]]:
    """Key, value and origin of the layer's options, with aliases replaced by what they set."""
    for key, value in layer.values.items():
        if key not in options:
            continue
        if not options[key].aliases or value not in options[key].aliases:
            yield key, value, layer.origin
            continue
        meant_key, meant = options[key].aliases[value]
        if layer.values.get(meant_key, meant) != meant:
            place = f'{layer.entry}.' if layer.entry else ''
            problems.append(
                f'{place}{key}={value!r} ({layer.origin}) means {meant_key}={meant!r}, which '
                f'contradicts {place}{meant_key}={layer.values[meant_key]!r}. Remove one of them.'
            )
        yield meant_key, meant, f'{layer.origin}: {key}={value!r}'


def with_component_options(core: dict[str, Option]) -> dict[str, Option]:
    """The options, each followed by those of the components that it chooses between.

    An option that several components share appears once and must have one definition.
    """
    options: dict[str, Option] = {}

    def add(key: str, option: Option, owner: str) -> None:
        if key in options:
            if options[key] != option:
                raise UserError(
                    f'{owner}: another definition of the option {key!r} exists already. '
                    f'Rename the option.'
                )
            return
        options[key] = option
        if isinstance(option.choices, Registry):
            for name in option.choices:
                for component_key, component_option in option.choices[name].options.items():
                    add(component_key, component_option, f'{option.choices.option}={name!r}')

    for key, option in core.items():
        add(key, option, 'the core options')
    return options


def chosen_components(core: dict[str, Option], values: dict) -> Iterator[tuple[str, Any]]:
    """The option and the class of each component that resolved values choose."""
    for key, option in with_component_options(core).items():
        if isinstance(option.choices, Registry) and values.get(key) is not None:
            yield from ((key, each) for each in option.choices.components(values[key]).values())


def active_keys(core: dict[str, Option], values: dict) -> Iterator[str]:
    """Keys that have an effect: the core options, and those of each chosen component."""
    queue = list(core.items())
    seen = set()
    while queue:
        key, option = queue.pop(0)
        if key in seen or not option.is_active(values):
            continue
        seen.add(key)
        yield key
        if isinstance(option.choices, Registry) and values[key] is not None:
            for component in option.choices.components(values[key]).values():
                queue[:0] = component.options.items()


def _deciding_choices(key: str, options: dict[str, Option], active: dict) -> Iterator[str]:
    """The active choices that make `key` inactive."""
    for choice, _ in owners(key, options):
        if choice in active:
            yield choice
        else:
            yield from _deciding_choices(choice, options, active)
