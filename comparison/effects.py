"""What each option of a study's grid does to the loss, and how much that depends on another."""

import statistics
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

from comparison.groups import Group
from comparison.significance import Difference, paired_difference

GridPoint = dict[str, Any]  # option -> value: where a group lies in the grid
Grid = Sequence[tuple[GridPoint, Group]]
Losses = dict[tuple, float]  # by the seeds of a run
Pairs = dict[tuple, tuple[float, float]]  # two losses whose difference counts, by the seeds


class Effect(NamedTuple):
    """What a value of an option does, all else as in the grid, against the option's first value."""

    option: str
    value: Any
    against: Any
    difference: Difference | None  # over seeds; None: too few
    mean: float | None
    pairs: int  # of runs that differ in this option alone


class Interaction(NamedTuple):
    """How much the effect of one option's value depends on another's."""

    options: tuple[str, str]
    values: tuple[Any, Any]
    against: tuple[Any, Any]
    difference: Difference | None
    mean: float


def main_effects(grid: Grid) -> list[Effect]:
    """Each value against the first of its option, over all pairs that differ in nothing else.

    A seed gives every cell of the grid its initial weights and its data, so its pairs share their
    luck: the mean over the cells is one observation for each seed.
    """
    effects = []
    for option, (first, *others) in _varied_options(grid).items():
        for value in others:
            cells = []
            for point, group in grid:
                if point.get(option) == value:
                    reference = _losses_at(grid, {**point, option: first})
                    cells.append(
                        {
                            seeds: (loss, reference[seeds])
                            for seeds, loss in group.losses.items()
                            if seeds in reference
                        }
                    )
            effects.append(Effect(option, value, first, *_mean_over_cells(cells)))
    return effects


def interactions(grid: Grid) -> list[Interaction]:
    """For every two options: (A and B changed) − (A alone) − (B alone) + (neither), by seed."""
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
    """What A adds where B is changed, and what it adds where B is not, for a cell with both."""
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
    """The paired test of the seeds' means over cells, the mean, and the number of pairs.

    It goes over the seeds that every cell has, so that all seeds average the same cells. Without
    such a seed there is a mean and no test.
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
    """The values of each option that varies, in the order of the grid."""
    values: dict[str, list] = {}
    for point, _ in grid:
        for option, value in point.items():
            if value not in values.setdefault(option, []):
                values[option].append(value)
    return {option: listed for option, listed in values.items() if len(listed) > 1}


def _losses_at(grid: Grid, point: GridPoint) -> Losses:
    return next((group.losses for other, group in grid if other == point), {})
