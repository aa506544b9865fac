"""Points of a study: options with their values, as single options, labels and arguments.

A point may name a value of a dict option: `layer_kinds.L.sliding_window`, as on a command line, or
`layer_kinds.L` for the whole entry.
"""

from collections.abc import Callable, Iterable

from common.dict_option import DictOption, leaves, short_name
from common.errors import UserError, did_you_mean
from common.registry import Option


def merged_values(*points: dict) -> dict:
    """The values of the options, those of later points over earlier ones.

    Values with dotted names are merged into the dict of their option.
    """
    values: dict = {}
    for name, value in (item for point in points for item in point.items()):
        key, *parts = name.split('.', 2)
        for part in reversed(parts):
            value = {part: value}
        is_merged = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = DictOption.combined(values[key], value) if is_merged else value
    return values


def check_name(name: str, options: dict[str, Option], also: Iterable[str] = ()) -> None:
    """Raises UserError if no option, or no value of a dict option, has the name.

    also: further names to suggest.
    """
    key, *parts = name.split('.', 2)
    if key not in options:
        raise UserError(f'unknown option {key!r}.{did_you_mean(key, [*also, *options])}')
    option = options[key]
    if parts and not isinstance(option, DictOption):
        raise UserError(f'{name}: {key} has no entries; it takes {option.allowed()}.')
    if len(parts) == 2 and isinstance(option, DictOption):
        option.accept(key, {parts[0]: {}})
        option.entry_option(f'{key}.{parts[0]}', parts[1])


def overlap(one: dict[str, list], other: dict[str, list]) -> list[str]:
    """The names of single values that both grids set."""
    names, others = (
        {leaf for key, values in grid.items() for value in values for leaf in leaves({key: value})}
        for grid in (one, other)
    )
    return sorted(
        name
        for name in names
        if any(f'{name}.'.startswith(f'{o}.') or f'{o}.'.startswith(f'{name}.') for o in others)
    )


def contains(point: dict, part: dict) -> bool:
    """Whether the point has every value of the part, which may name them in another way."""
    values = leaves(point)
    return all(name in values and values[name] == value for name, value in leaves(part).items())


def point_label(point: dict, show: Callable[[object], str] = str) -> str:
    """`ffn_type=swiglu L.sliding_window=64`, or `base`."""
    parts = (f'{short_name(name)}={show(value)}' for name, value in leaves(point).items())
    return ' '.join(parts) or 'base'


def point_labels(points: Iterable[dict]) -> list[str]:
    """A label for each point. Of two equal ones, as for None and 'None', the later is quoted."""
    labels: dict[str, None] = {}
    for point in points:
        label = point_label(point)
        labels[point_label(point, repr) if label in labels else label] = None
    return list(labels)


def arguments(point: dict, options: dict[str, Option]) -> list[str] | None:
    """The `--key=value` that train.py parses to the values of a point; None if there are none."""
    texts = [
        _argument(name, value, options)
        for name, value in leaves(merged_values(point)).items()
        if value != {} or '.' in name  # an empty dict changes nothing
    ]
    return None if None in texts else [text for text in texts if text is not None]


def _argument(name: str, value: object, options: dict[str, Option]) -> str | None:
    key, _, rest = name.partition('.')
    option = options[key]
    for text in (str(value), f"'{value}'"):
        try:
            text.encode()
            if rest and isinstance(option, DictOption):
                parsed = option.parse_path(name, text)
            else:
                parsed = option.parse(key, text)
            if '\0' not in text and parsed == merged_values({name: value})[key]:
                return f'--{name}={text}'
        except (UserError, ValueError):
            continue
    return None
