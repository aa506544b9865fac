"""Which options each kind of layers has, merged from the layers of options.

"Layer" means a layer of the model here, and `Layer` a layer of options (config file, command line).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from common.dict_option import leaves
from common.errors import did_you_mean
from common.formatting import commented, counted, join_names
from common.layer_pattern import compact_pattern, letters_of
from common.option_merge import Layer, Merge, resolved_aliases
from common.registry import Option


@dataclass
class Override:
    """A kind's value of an option, with the number and the origin of the `Layer` that set it."""

    value: object
    level: int
    origin: str


@dataclass
class Kind:
    """The overrides of one kind of layers.

    level, origin: of the highest `Layer` that names the kind.
    """

    level: int = 0
    origin: str = ''
    overrides: dict[str, Override] = field(default_factory=dict)

    def layers(self, name: str) -> list[Layer]:
        """The overrides for `merge_layers`, above the model's own options."""
        ordered = sorted(self.overrides.items(), key=lambda entry: entry[1].level)
        return [
            Layer(override.origin, {key: override.value}, override.level, f'layer_kinds.{name}')
            for key, override in ordered
        ]


def merged_kinds(
    stack: list[Layer], options: dict[str, Option], problems: list[str]
) -> dict[str, Kind]:
    """The kinds that the layers of options declare, the highest precedence last.

    options: those of a kind. None in place of a kind, or for an option that does not take it,
    removes what the layers below declare.
    """
    kinds: dict[str, Kind] = {}
    for level, layer in enumerate(stack, start=1):
        for name, entry in (layer.values.get('layer_kinds') or {}).items():
            if entry is None:
                if kinds.pop(name, None) is None:
                    problems.append(
                        f'layer_kinds.{name}=None ({layer.origin}) removes nothing: no kind {name} '
                        f'is set before.{did_you_mean(name, kinds)} Remove it.'
                    )
                continue
            kind = kinds.setdefault(name, Kind())
            kind.level, kind.origin = level, layer.origin
            declared = Layer(layer.origin, entry, entry=f'layer_kinds.{name}')
            for key, value, origin in resolved_aliases(declared, options, problems):
                if value is None and not options[key].optional:
                    kind.overrides.pop(key, None)
                else:
                    kind.overrides[key] = Override(value, level, origin)
    return kinds


def used_kinds(
    kinds: dict[str, Kind], base: Merge, problems: list[str], notes: list[str]
) -> dict[str, Kind]:
    """The kinds of the pattern's letters; one undeclared letter has no overrides.

    A kind that the pattern lacks is left out with a note if the pattern comes from a higher layer,
    else it adds to `problems`.
    """
    pattern = base.values['layer_pattern']
    letters = letters_of(pattern)
    unused = 0
    for name, kind in kinds.items():
        if name in letters:
            continue
        text = f'layer_kinds.{name} ({kind.origin}): layer_pattern={pattern!r} has no letter {name}'
        if kind.level < base.levels['layer_pattern']:
            notes.append(f'dropped: {text}')
        else:
            unused += 1
            hint = did_you_mean(name, letters) or f' Its letters: {join_names(letters)}.'
            problems.append(f'{text}.{hint} Remove the kind or use it.')
    undeclared = [letter for letter in letters if letter not in kinds]
    # Each unused kind is probably that of a letter without one.
    if len(undeclared) - unused > 1:
        problems.append(
            f'{base.described["layer_pattern"]}: {join_names(undeclared)} have no entry in '
            f"layer_kinds, and only one letter may stand for the model's own "
            f'options. Set options of the others, such as '
            f'--layer_kinds.{undeclared[0]}.sliding_window=64.'
        )
    return {letter: kinds.get(letter, Kind()) for letter in letters}


def ignored_by_layers(
    base: Merge, kinds: dict[str, Kind], merges: dict[str, Merge], model_keys: set[str]
) -> tuple[list[str], list[str]]:
    """Problems and notes on values of the model that kinds override at a lower level.

    A value that no layer would follow is a problem. kinds: those that have layers. merges: the
    options of each kind. model_keys: options that the model itself follows too.
    """
    problems, notes = [], []
    for key, text in base.described.items():
        below = {
            name: kind.overrides[key]
            for name, kind in kinds.items()
            if key in kind.overrides and kind.overrides[key].level < base.levels[key]
        }
        if not below:
            continue
        setters = ', '.join(
            f'layer_kinds.{name}.{key} ({each.origin})' for name, each in below.items()
        )
        is_followed = key in model_keys or any(
            key in merges[name].values and key not in kind.overrides for name, kind in kinds.items()
        )
        if is_followed:
            notes.append(f'{text} does not apply to all layers: there is {setters}')
        else:
            flag, _, _ = text.rpartition(' (')
            problems.append(
                f'{text} has no effect: every layer that could use it has its own {key}, from '
                f'{setters}. Set --layer_kinds.{next(iter(below))}.{flag} instead.'
            )
    return problems, notes


def unused_values(
    base: Merge, kinds: dict[str, Kind], merges: dict[str, Merge], model_keys: set[str]
) -> tuple[list[str], list[str]]:
    """Problems and notes on values that no layer uses, of kinds and of the model.

    merges: the options of each kind. model_keys: options that the model itself follows too.
    """
    problems, notes = [], []
    for name, merged in merges.items():
        own = kinds[name].overrides
        problems += [text for key, text in merged.useless.items() if key in own]
        notes += [text for key, text in merged.dropped.items() if key in own]
    # A value of the model is useless if neither the model nor any kind has a use for it.
    used = {key for kind in kinds.values() for key in kind.overrides}
    used |= {key for merged in merges.values() for key in merged.values}
    used |= model_keys
    useless, dropped = dict(base.useless), dict(base.dropped)
    for merged in merges.values():
        useless |= merged.useless
        dropped |= merged.dropped
    # A value that a later choice deprived of its effect in some layers is no mistake in the others.
    problems += [text for key, text in useless.items() if key not in used | dropped.keys()]
    notes += [text for key, text in dropped.items() if key not in used]
    return problems, notes


def replaced_short_forms(
    base: Merge, short_forms: dict[str, Option]
) -> tuple[list[str], list[str]]:
    """Problems and notes on short forms of a layer pattern that are set beside one.

    Those below the pattern are replaced by it.
    """
    problems, notes = [], []
    pattern = base.described['layer_pattern']
    for key, option in short_forms.items():
        value, level = base.values.get(key), base.levels[key]
        if level == 0 or value is None or value == option.default:
            continue
        text = base.described[key]
        if level < base.levels['layer_pattern']:
            notes.append(f'dropped: {text}: replaced by {pattern}')
        else:
            problems.append(
                f'{text} is a short form of layer_pattern, and {pattern} is set too. Remove '
                f'{key}, or set --layer_pattern=None.'
            )
    return problems, notes


def without_pattern(kinds: dict[str, Kind]) -> str:
    """The problem of kinds if there is no pattern that gives them to layers."""
    shown = ', '.join(f'layer_kinds.{name} ({kind.origin})' for name, kind in kinds.items())
    return (
        f'{shown or "layer_kinds"} has no effect without layer_pattern, the kind of each layer. '
        f'Set it, for example --layer_pattern={"".join(kinds) or "L"}.'
    )


def differing_values(kind: dict, base: dict, keys: Collection[str]) -> dict:
    """The values of a kind that differ from the model's own, of options in which layers may."""
    missing = object()
    return {k: v for k, v in kind.items() if k in keys and base.get(k, missing) != v}


# Of a kind: option -> (value, origin); None if it is removed from a lower layer of options.
KindEntries = dict[str, tuple[object, str]] | None


def config_lines(
    pattern: str, origin: str, letters: Sequence[str], kinds: dict[str, KindEntries]
) -> dict[str, list[str]]:
    """The lines of `layer_pattern` and `layer_kinds` in a config file.

    origin: that of the pattern. letters: that of each layer. kinds: those declared.
    """
    counts = {letter: counted(letters.count(letter), 'layer') for letter in letters_of(pattern)}
    layers = [commented(f'layer_pattern = {pattern!r}', origin)]
    layers.append(f'# layers: {compact_pattern("".join(letters))}')
    lines = ['layer_kinds = {']
    for name, entries in kinds.items():
        if entries is None:
            lines.append(commented(f'    {name!r}: None,', 'removed'))
            continue
        lines.append(f'    {name!r}: {{  # {counts[name]}')
        lines += [
            commented(f'        {key!r}: {value!r},', why) for key, (value, why) in entries.items()
        ]
        lines.append('    },')
    lines.append('}')
    lines += [
        f"# {name}: {count} with the model's own options"
        for name, count in counts.items()
        if kinds.get(name) is None
    ]
    return {'layer_pattern': layers, 'layer_kinds': lines}


def kind_and_option(name: str) -> tuple[str | None, str]:
    """The kind of layers and the option of `layer_kinds.L.d_ff`; None and the name of others."""
    key, _, rest = name.partition('.')
    kind, _, option = rest.partition('.')
    return (kind, option) if key == 'layer_kinds' and rest else (None, name)


def used_values(options: dict, letters: Collection[str]) -> dict:
    """Options, with dotted names for those of kinds of layers, without other kinds than those."""
    used: dict = {}
    for name, value in options.items():
        all_values = leaves({name: value})
        left = {
            leaf: v
            for leaf, v in all_values.items()
            if kind_and_option(leaf)[0] in (None, *letters)
        }
        used |= {name: value} if left == all_values else left
    return used
