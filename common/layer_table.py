"""Which options each layer has: the layer pattern and its kinds, merged from the layers of options.

"Layer" means a layer of the model here, and `Layer` a layer of options (config file, command line).
"""

from dataclasses import dataclass, field

from common.errors import did_you_mean
from common.formatting import join_names
from common.layer_pattern import letters_of
from common.option_merge import Layer, Merge
from common.registry import Option


@dataclass
class Override:
    """A kind's value of an option, with the number and the origin of the `Layer` that set it."""

    value: object
    level: int
    origin: str


@dataclass
class Kind:
    """The overrides of one kind of layers. level: the highest `Layer` that names the kind."""

    overrides: dict[str, Override] = field(default_factory=dict)
    level: int = 0

    def layers(self, name: str) -> list[Layer]:
        """The overrides for `merge_layers`, above the model's own options."""
        ordered = sorted(self.overrides.items(), key=lambda entry: entry[1].level)
        return [
            Layer(f'{override.origin}, layer_kinds.{name}', {key: override.value}, override.level)
            for key, override in ordered
        ]


def merged_kinds(stack: list[Layer], options: dict[str, Option]) -> dict[str, Kind]:
    """The kinds that the layers of options declare, the highest precedence last.

    options: those of a kind. None in place of a kind, or for an option that does not take it,
    removes what the layers below declare.
    """
    kinds: dict[str, Kind] = {}
    for level, layer in enumerate(stack, start=1):
        for name, entry in (layer.values.get('layer_kinds') or {}).items():
            if entry is None:
                kinds.pop(name, None)
                continue
            kind = kinds.setdefault(name, Kind())
            kind.level = level
            for key, value in entry.items():
                if value is None and not options[key].optional:
                    kind.overrides.pop(key, None)
                else:
                    kind.overrides[key] = Override(value, level, layer.origin)
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
    for name, kind in kinds.items():
        if name in letters:
            continue
        text = f'layer_kinds.{name} ({{}}): layer_pattern={pattern!r} has no letter {name}'
        if kind.level < base.levels['layer_pattern']:
            notes.append(f'dropped: {text.format(_origin(kind))}')
        else:
            hint = did_you_mean(name, letters) or f' Its letters: {join_names(letters)}.'
            problems.append(f'{text.format(_origin(kind))}.{hint} Remove the kind or use it.')
    undeclared = [letter for letter in letters if letter not in kinds]
    if len(undeclared) > 1:
        problems.append(
            f'layer_pattern={pattern!r}: {join_names(undeclared)} have no entry in layer_kinds, '
            f"and only one letter may stand for the model's own options. Set options for them: "
            f'--layer_kinds.{undeclared[0]}.OPTION=value.'
        )
    return {letter: kinds.get(letter, Kind()) for letter in letters}


def _origin(kind: Kind) -> str:
    origins = dict.fromkeys(override.origin for override in kind.overrides.values())
    return ', '.join(origins) or 'empty'


def ignored_by_layers(
    base: Merge, kinds: dict[str, Kind], model_keys: set[str]
) -> tuple[list[str], list[str]]:
    """Problems and notes on values of the model that kinds override at a lower level.

    A value that no layer would follow is a problem; model_keys: options that the model itself
    follows too.
    """
    problems, notes = [], []
    for key, value in base.values.items():
        level = base.levels[key]
        own = [name for name, kind in kinds.items() if key in kind.overrides]
        if not own or level <= max(kinds[name].overrides[key].level for name in own):
            continue
        setters = ', '.join(
            f'layer_kinds.{name} ({kinds[name].overrides[key].origin})' for name in own
        )
        text = f'{key}={value!r} ({base.origins[key]})'
        if len(own) == len(kinds) and key not in model_keys:
            problems.append(
                f'{text} has no effect: every kind of layers sets its own {key}, {setters}. Set '
                f'--layer_kinds.{own[0]}.{key}={value!r} instead.'
            )
        else:
            notes.append(f'{text} does not apply to layers of {setters}')
    return problems, notes
