"""Loss against cost: losses at equal cost, Pareto fronts, and losses by position."""

import statistics
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from comparison.groups import Group, Metric
from comparison.runs import CurvePoint

COSTS = {'tokens': 'tokens', 'flops': 'training FLOPs', 'seconds': 'seconds of training'}
# The costs of a Pareto front by letter: a title, and the metric of a run.
FRONTS: dict[str, tuple[str, Metric]] = {
    'F': ('training FLOPs', lambda run: run.causal_flops),
    'T': ('seconds of training', lambda run: run.curve[-1].seconds if run.curve else None),
    'M': ('peak memory, GB', lambda run: run.peak_memory_gb),
}
TIMES = ('seconds', 'T')  # keys of COSTS and FRONTS that concurrent runs make meaningless
SAME_COST = 0.01  # relative difference below which two costs are equal


# --- Loss against cost ---------------------------------------------------------------------------


class AtEqualCost(NamedTuple):
    """The losses of all groups at the same cost."""

    cost: str  # a key of COSTS
    amount: float  # the largest that every run has reached
    losses: list[float | None]  # mean over the runs, in the order of the groups


def at_equal_cost(groups: Sequence[Group], costs: Iterable[str] = COSTS) -> list[AtEqualCost]:
    """For each cost, the losses at the largest amount that all runs have reached."""
    rows = []
    for cost in costs:
        curves = [[curve_over(run.curve, cost) for run in group.scored_runs] for group in groups]
        if not all(curve for group in curves for curve in group):
            continue
        amount = min(curve[-1][0] for group in curves for curve in group)
        means: list[float | None] = []
        for group in curves:
            losses = [loss for curve in group if (loss := loss_at(curve, amount)) is not None]
            means.append(statistics.fmean(losses) if len(losses) == len(group) else None)
        rows.append(AtEqualCost(cost, amount, means))
    return rows


def curve_over(curve: Iterable[CurvePoint], cost: str) -> list[tuple[float, float]]:
    """(cost, loss) where both are known, by increasing cost."""
    return [
        (getattr(point, cost), point.loss) for point in curve if getattr(point, cost) is not None
    ]


def loss_at(curve: Sequence[tuple[float, float]], amount: float) -> float | None:
    """The loss at a cost, by linear interpolation; None outside the measured range."""
    costs = [cost for cost, _ in curve]
    index = bisect_left(costs, amount)
    if index == len(curve):
        return None
    cost, loss = curve[index]
    if cost == amount:
        return loss
    if index == 0:
        return None
    before, loss_before = curve[index - 1]
    return loss_before + (loss - loss_before) * (amount - before) / (cost - before)


# --- Pareto fronts -------------------------------------------------------------------------------

Amounts = list[float]  # the costs of a group's runs


def front_letters(groups: Sequence[Group], costs: dict[str, tuple[str, Metric]]) -> list[str]:
    """For each group, the letters of the Pareto fronts (loss against a cost) that it lies on.

    A cost that is equal for all groups has no front. A group with diverged runs lies on none: the
    mean of its other runs is too low.
    """
    letters = [''] * len(groups)
    for letter, (_, metric) in costs.items():
        points = [_front_point(group, metric) for group in groups]
        if all_same([amounts for amounts, _ in filter(None, points)]):
            continue
        for index, on_front in enumerate(on_pareto_front(points)):
            letters[index] += letter if on_front else ''
    return letters


def _front_point(group: Group, metric: Metric) -> tuple[Amounts, float] | None:
    amounts, loss = group.values(metric), group.loss
    return (amounts, loss) if group.finished and amounts and loss is not None else None


def on_pareto_front(points: Sequence[tuple[Amounts, float] | None]) -> list[bool]:
    """Whether each (amounts, loss) point is not dominated by another.

    A point is dominated by a lower loss at a lower or equal cost, and by an equal loss at a lower
    cost.
    """

    def dominates(one: tuple[Amounts, float], other: tuple[Amounts, float]) -> bool:
        same = same_cost(one[0], other[0])
        cheaper = not same and statistics.fmean(one[0]) < statistics.fmean(other[0])
        return (one[1] < other[1] and (same or cheaper)) or (one[1] == other[1] and cheaper)

    return [
        point is not None
        and not any(other is not None and dominates(other, point) for other in points)
        for point in points
    ]


def same_cost(one: Amounts, other: Amounts) -> bool:
    """Whether the costs of two groups are equal within noise.

    They are if their ranges overlap, or if their means differ by less than SAME_COST.
    """
    if max(one) >= min(other) and max(other) >= min(one):
        return True
    means = statistics.fmean(one), statistics.fmean(other)
    return abs(means[0] - means[1]) <= SAME_COST * max(means)


def all_same(amounts: Sequence[Amounts]) -> bool:
    """Whether all groups have equal costs, so that there is no trade-off with loss."""
    return all(same_cost(amounts[0], others) for others in amounts[1:])


# --- By position ---------------------------------------------------------------------------------


def mean_loss_by_position(group: Group) -> dict[tuple[int, int], float]:
    """The mean loss over seeds, for each range of positions that all of them have."""
    losses = [{(s.start, s.end): s.loss for s in run.position_losses} for run in group.scored_runs]
    return {
        positions: statistics.fmean(by_positions[positions] for by_positions in losses)
        for positions in losses[0]
        if all(positions in by_positions for by_positions in losses)
    }
