"""Main effects of the options in a study's grid on the loss, and interactions between them."""

import statistics
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

from common.layer_pattern import letters_of
from common.layer_table import used_values
from comparison.groups import Group
from comparison.significance import Difference, paired_difference

GridPoint = dict[str, Any]  # option -> value: the position of a group in the grid
Grid = Sequence[tuple[GridPoint, Group]]
Losses = dict[tuple, float]  # by the seeds of a run
Pairs = dict[tuple, tuple[float, float]]  # (loss, reference loss), by the seeds


class Effect(NamedTuple):
    """The effect of an option's value against its first value, averaged over the grid."""

    option: str
    value: Any
    against: Any
    difference: Difference | None  # over seeds; None: too few seeds
    mean: float | None
    pairs: int  # number of pairs of runs that differ only in this option


class Interaction(NamedTuple):
    """How much the effect of one option depends on the value of another."""

    options: tuple[str, str]
    values: tuple[Any, Any]
    against: tuple[Any, Any]
    difference: Difference | None
    mean: float


def main_effects(grid: Grid) -> list[Effect]:
    """Each value against the first of its option, over all pairs that differ only in it.

    A seed sets the initial weights and the data of every cell of the grid, so pairs with the same
    seed are not independent: their mean over the cells is one observation.
    """
    effects = []
    for option, (first, *others) in _varied_options(grid).items():
        for value in others:
            cells = [
                {
                    seeds: (loss, reference.losses[seeds])
                    for seeds, loss in group.losses.items()
                    if seeds in reference.losses
                }
                for point, group in grid
                for other, reference in grid
                if option in point and option in other
                if (point[option], other[option]) == (value, first)
                and _differ_only_in(option, point, other)
            ]
            effects.append(Effect(option, value, first, *_mean_over_cells(cells)))
    return effects


def _differ_only_in(option: str, point: GridPoint, other: GridPoint) -> bool:
    """Whether changing the option turns one point into the other.

    A layer pattern may lack kinds of layers; a point with it has no options of those.
    """
    return any(
        _with_value(start, option, end[option]) == end
        for start, end in ((point, other), (other, point))
    )


def _with_value(point: GridPoint, option: str, value: Any) -> GridPoint:
    changed = {**point, option: value}
    if option != 'layer_pattern':
        return changed
    return used_values(changed, letters_of(str(value or '')))


def interactions(grid: Grid) -> list[Interaction]:
    """For every two options: (A and B changed) − (only A) − (only B) + (neither), by seed."""
    values = _varied_options(grid)
    results = []
    for one, other in combinations(values, 2):
        first = (values[one][0], values[other][0])
        for changed in product(values[one][1:], values[other][1:]):
            cells = [
                _interaction_pairs(grid, point, group, (one, other), changed, first)
                for point, group in grid
                if (point.get(one), point.get(other)) == changed
            ]
            test, mean, _ = _mean_over_cells(cells)
            if mean is not None:
                results.append(Interaction((one, other), changed, first, test, mean))
    return results


def _interaction_pairs(
    grid: Grid,
    point: GridPoint,
    group: Group,
    options: tuple[str, str],
    changed: tuple[Any, Any],
    first: tuple[Any, Any],
) -> Pairs:
    """The effect of A with B changed and with B unchanged, by seed, for a cell with both."""
    only_a, only_b, neither = (
        _losses_at(grid, {**point, **dict(zip(options, values))})
        for values in ((changed[0], first[1]), (first[0], changed[1]), first)
    )
    return {
        seeds: (loss - only_a[seeds], only_b[seeds] - neither[seeds])
        for seeds, loss in group.losses.items()
        if seeds in only_a and seeds in only_b and seeds in neither
    }


def _mean_over_cells(cells: Sequence[Pairs]) -> tuple[Difference | None, float | None, int]:
    """The paired test of each seed's mean over the cells, the mean, and the number of pairs.

    Only seeds that every cell has are used, so that all seeds average the same cells. Without any,
    there is a mean but no test.
    """
    cells = [cell for cell in cells if cell]
    shared = [seeds for seeds in (cells[0] if cells else {}) if all(seeds in c for c in cells)]
    if not shared:
        pairs = [pair for cell in cells for pair in cell.values()]
        mean = statistics.fmean(a - b for a, b in pairs) if pairs else None
        return None, mean, len(pairs)
    means = []
    for seeds in shared:
        losses, references = zip(*(cell[seeds] for cell in cells))
        means.append((statistics.fmean(losses), statistics.fmean(references)))
    mean = statistics.fmean(a - b for a, b in means)
    return paired_difference(means), mean, len(cells) * len(shared)


def _varied_options(grid: Grid) -> dict[str, list]:
    """The values of each option that varies, in grid order."""
    values: dict[str, list] = {}
    for point, _ in grid:
        for option, value in point.items():
            if value not in values.setdefault(option, []):
                values[option].append(value)
    return {option: listed for option, listed in values.items() if len(listed) > 1}


def _losses_at(grid: Grid, point: GridPoint) -> Losses:
    return next((group.losses for other, group in grid if other == point), {})
