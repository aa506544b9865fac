"""The keys of a study file: their defaults, and the values that they take."""

import reprlib
from collections.abc import Callable

from studies.ladder_keys import LADDER_KEYS, is_amount

BUDGETS = ('iterations', 'tokens', 'flops', 'seconds')
MATCHES = ('params', 'flops')

_brief = reprlib.Repr()  # short for any value, and never raises
_brief.maxstring = _brief.maxother = 60
brief = _brief.repr

_GRID = "a dict of lists, such as {'ffn_type': ['standard', 'swiglu']}"
_POINT = "a dict of options, such as {'ffn_type': 'standard'}"
_BUDGET = f"a dict of one of {', '.join(BUDGETS)} and a finite amount, such as {{'tokens': 1e7}}"


def _is_point(value) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_grid(value) -> bool:
    return _is_point(value) and all(isinstance(values, list | tuple) for values in value.values())


def _is_budget(value) -> bool:
    return isinstance(value, dict) and len(value) <= 1 and all(map(_is_amount, value.items()))


def _is_amount(item: tuple) -> bool:
    kind, amount = item
    return kind in BUDGETS and is_amount(amount)


def _is_whole(least: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and value >= least


def _is_text(value) -> bool:
    return isinstance(value, str)


# key -> (default, predicate for valid values, description of valid values)
STUDY_KEYS: dict[str, tuple] = {
    'question': ('', _is_text, 'a text'),
    'sweep': ({}, _is_grid, _GRID),
    'ablate': ({}, _is_grid, _GRID),
    'exclude': (
        [],
        lambda value: isinstance(value, list | tuple) and all(map(_is_point, value)),
        f'a list of combinations, each {_POINT}',
    ),
    'tune': ({}, _is_grid, "a dict of lists, such as {'learning_rate': [3e-4, 1e-3, 3e-3]}"),
    'tune_seed': (0, _is_whole(0), 'a whole number of at least 0'),
    'match': (
        'none',
        lambda value: _is_text(value) and value in (*MATCHES, 'none'),
        f'one of {[*MATCHES, "none"]}',
    ),
    'match_by': ('d_ff', _is_text, 'the name of an option that sets a size'),
    'match_step': (8, _is_whole(1), 'a whole number of at least 1'),
    'reference': ({}, _is_point, _POINT),
    'baseline': ({}, _is_point, _POINT),
    'budget': ({}, _is_budget, _BUDGET),
    **LADDER_KEYS,
}
GRIDS = ('sweep', 'ablate', 'tune')
