"""The keys of a ladder in a study file, and their checks before any size is known."""

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.formatting import counted, join_names
from studies.points import overlap

if TYPE_CHECKING:
    from studies.grid import Study

SOLVED_SIZES = ('n_layer', 'n_embd', 'n_head')  # options that `params` sets
SHAPES = ('aspect_ratio', 'head_size')  # of models that `params` solves, not options themselves
HORIZONS = ('tokens_per_param', 'tokens', 'flops')
TRANSFERS = ('none', 'mup')
TRANSFERRED = ('initialization', 'mup_base_width')  # options that a transfer sets
MOST_RUNGS = 20
MOST_EXTRA_RUNGS = 3


def is_amount(value: object) -> bool:
    """Whether the value is a positive finite number."""
    try:
        return type(value) in (int, float) and 0 < float(value) < math.inf  # type: ignore[arg-type]
    except OverflowError:
        return False


def _is_ladder(value) -> bool:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return False
    lists = [entries for key, entries in value.items() if key not in SHAPES]
    return (
        all(isinstance(entries, list | tuple) for entries in lists)
        and all(map(is_amount, value.get('params', ())))
        and all(is_amount(value[key]) for key in SHAPES if key in value)
    )


def _is_horizon(value) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= 1
        and all(key in HORIZONS and _is_by_rung(amount) for key, amount in value.items())
    )


def _is_by_rung(value) -> bool:
    """Whether the value is an amount, or a list of one for each rung."""
    is_list = isinstance(value, list | tuple) and bool(value)
    return is_amount(value) or (is_list and all(map(is_amount, value)))


def _is_extra(value) -> bool:
    if type(value) is int:
        return 0 <= value <= MOST_EXTRA_RUNGS
    return isinstance(value, dict) and bool(value) and all(isinstance(k, str) for k in value)


# key -> (default, predicate for valid values, description of valid values)
LADDER_KEYS: dict[str, tuple] = {
    'ladder': (
        {},
        _is_ladder,
        "a dict such as {'params': [2e5, 4e5, 8e5, 1.6e6]} or {'n_layer': [2, 3], 'n_embd': "
        "[64, 96], 'n_head': [2, 3]}",
    ),
    'horizon': (
        {},
        _is_horizon,
        f'a dict of one of {", ".join(HORIZONS)}, with a positive number or one for each rung, '
        "such as {'tokens_per_param': 20}",
    ),
    'baseline_extra': (
        1,
        _is_extra,
        f'a number of rungs from 0 to {MOST_EXTRA_RUNGS}, or the options of one such as '
        "{'n_layer': 8, 'n_embd': 256, 'n_head': 8}",
    ),
    'transfer': (
        'none',
        lambda value: isinstance(value, str) and value in TRANSFERS,
        f'one of {list(TRANSFERS)}',
    ),
}


def ladder_lists(study: 'Study') -> dict[str, list]:
    """The lists of the ladder, with a value for each rung."""
    return {key: [*values] for key, values in study.ladder.items() if key not in SHAPES}


def number_of_rungs(study: 'Study') -> int:
    """The number of rungs that all variants train."""
    return max(map(len, ladder_lists(study).values()), default=0)


def ladder_values(study: 'Study') -> dict[str, list]:
    """The options that the lists of the ladder set by name, with a value for each rung."""
    return {key: values for key, values in ladder_lists(study).items() if key != 'params'}


def smallest_point(study: 'Study') -> dict:
    """The options of the first rung that the file has: without them, the base may not be legal."""
    return {key: values[0] for key, values in ladder_values(study).items() if values}


def ladder_problems(study: 'Study') -> Iterator[str]:
    """Contradictions between the keys of a ladder, and with other keys."""
    path = study.path
    if not study.ladder:
        for key in ('horizon', 'transfer', 'baseline_extra'):
            if getattr(study, key) != LADDER_KEYS[key][0]:
                yield f'{path}: {key} needs a ladder. Set ladder, or remove {key}.'
        return
    lengths = {key: len(values) for key, values in ladder_lists(study).items()}
    if len(set(lengths.values())) > 1:
        counts = join_names([f'{key} {length}' for key, length in lengths.items()])
        yield f'{path}: the lists of ladder have different lengths ({counts}). Make them equal.'
    elif not 2 <= number_of_rungs(study) <= MOST_RUNGS:
        yield (
            f'{path}: ladder has {counted(number_of_rungs(study), "rung")}. Give each list between '
            f'2 and {MOST_RUNGS} values, from the smallest size to the largest.'
        )
    yield from _size_problems(study)
    yield from _horizon_problems(study)
    options = ladder_options(study)
    for name in ('sweep', 'ablate', 'tune'):
        for key in overlap(getattr(study, name), options):
            yield f'{path}: {key!r} is both in ladder and in {name}. Remove it from one of them.'
    yield from _transfer_problems(study)
    extra = study.baseline_extra
    if isinstance(extra, dict) and extra.keys() != options.keys():
        names = join_names([*options])
        yield f'{path}: baseline_extra={extra!r}: give a value for each of {names}.'


def _transfer_problems(study: 'Study') -> Iterator[str]:
    if study.transfer == 'none':
        return
    set_keys = {key for layer in study.command_line.layers for key in layer.values}
    grids = (study.sweep, study.ablate, study.tune, study.ladder)
    set_keys |= {key for options in grids for key in options}
    for key in TRANSFERRED:
        if key in set_keys:
            yield f'{study.path}: transfer={study.transfer!r} sets {key}. Remove {key}.'


def ladder_options(study: 'Study') -> dict[str, list]:
    """The options that the ladder sets, with their values as far as the file has them."""
    solved: dict[str, list] = {key: [None] for key in SOLVED_SIZES if 'params' in study.ladder}
    return {**solved, **ladder_values(study)}


def _size_problems(study: 'Study') -> Iterator[str]:
    path, ladder = study.path, study.ladder
    if 'params' not in ladder:
        for key in SHAPES:
            if key in ladder:
                yield f'{path}: ladder has {key!r}, which only applies to params. Remove it.'
        return
    both = [key for key in SOLVED_SIZES if key in ladder]
    if both:
        yield (
            f'{path}: ladder has params and {join_names(both)}, but params determines '
            f'{join_names([*SOLVED_SIZES])}. Remove params or the others.'
        )
    params = [*ladder['params']]
    if any(after <= before for before, after in itertools.pairwise(params)):
        yield f'{path}: the params of ladder are not in increasing order. Sort them.'


def _horizon_problems(study: 'Study') -> Iterator[str]:
    path, rungs = study.path, number_of_rungs(study)
    if not study.horizon:
        yield (
            f"{path}: a ladder needs a horizon, such as horizon = {{'tokens_per_param': 20}}, "
            f'which says how long each rung trains.'
        )
    for kind, amounts in study.horizon.items():
        if is_amount(amounts):
            continue
        extra = study.baseline_extra if isinstance(study.baseline_extra, int) else 1
        if len(amounts) not in (rungs, rungs + extra):
            yield (
                f'{path}: horizon has {len(amounts)} values of {kind} for {rungs} rungs. Give one '
                f'number, or one for each rung.'
            )
    if study.budget:
        yield f'{path}: horizon and budget both set the length of a run. Remove budget.'
    layers = study.command_line.layers
    if 'max_iters' in study.ladder or any('max_iters' in layer.values for layer in layers):
        yield f'{path}: max_iters is set, which horizon determines. Remove max_iters.'
    for key in ladder_options(study):
        if key in layers[-1].values:
            yield f'--{key}: the ladder of {path} sets {key}. Remove --{key}.'
