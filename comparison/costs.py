"""Loss against cost: curves, losses at equal cost, Pareto fronts; and trouble on the way."""

import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from comparison.analysis import Group

COSTS = {'tokens': 'tokens', 'flops': 'training FLOPs', 'seconds': 'seconds of training'}
# The costs that a loss is held against, by the letter of their Pareto front: a title, and a run's.
FRONTS: dict[str, tuple[str, Callable[[Any], float | None]]] = {
    'F': ('training FLOPs', lambda run: run.causal_flops),
    'T': ('seconds of training', lambda run: run.curve[-1].seconds if run.curve else None),
    'M': ('peak memory, GB', lambda run: run.peak_memory_gb),
}
TIMES = ('seconds', 'T')  # of these two, what runs that trained beside one another cannot tell
SAME_COST = 0.01  # amounts that differ by less are equal, whatever their noise


class CurvePoint(NamedTuple):
    """A validation loss and what it had cost by then; None where the record does not tell."""

    iter: int
    tokens: float | None
    flops: float | None
    seconds: float | None
    loss: float


# --- Loss against cost ---------------------------------------------------------------------------


class AtEqualCost(NamedTuple):
    """The losses of all groups where each has spent the same."""

    cost: str  # a key of COSTS
    amount: float  # the most that every run has spent
    losses: list[float | None]  # mean over the members, in the order of the groups


def at_equal_cost(groups: Sequence[Group], costs: Iterable[str] = COSTS) -> list[AtEqualCost]:
    """For each cost: the losses at the most that all runs have spent of it."""
    rows = []
    for cost in costs:
        curves = [[curve_over(run.curve, cost) for run in group.evidence] for group in groups]
        spent = [curve[-1][0] if curve else None for group in curves for curve in group]
        if not spent or None in spent:
            continue
        amount = min(spent)
        means = []
        for group in curves:
            losses = [loss_at(curve, amount) for curve in group]
            means.append(None if None in losses else statistics.fmean(losses))
        rows.append(AtEqualCost(cost, amount, means))
    return rows


def curve_over(curve: Iterable[CurvePoint], cost: str) -> list[tuple[float, float]]:
    """(cost, loss) where both are known, by rising cost."""
    return [
        (getattr(point, cost), point.loss) for point in curve if getattr(point, cost) is not None
    ]


def loss_at(curve: Sequence[tuple[float, float]], amount: float) -> float | None:
    """The loss at a cost, straight between the measured points; None outside of them."""
    costs = [cost for cost, _ in curve]
    place = bisect_left(costs, amount)
    if place == len(curve):
        return None
    cost, loss = curve[place]
    if cost == amount:
        return loss
    if place == 0:
        return None
    before, loss_before = curve[place - 1]
    return loss_before + (loss - loss_before) * (amount - before) / (cost - before)


# --- Pareto fronts -------------------------------------------------------------------------------

Amounts = list[float]  # what the runs of a group cost


def fronts_of(groups: Sequence[Group], costs: dict[str, tuple]) -> list[str]:
    """For each group the Pareto fronts that it lies on: of loss against each of the costs.

    Costs that are equal for all make no front. A group of which runs diverged lies on none: what
    is left of it is too good.
    """
    letters = [''] * len(groups)
    for letter, (_, figure) in costs.items():
        points = [
            (amounts, group.loss) if group.finished and (amounts := group.figures(figure)) else None
            for group in groups
        ]
        if all_same([amounts for amounts, _ in filter(None, points)]):
            continue
        for place, on_front in enumerate(pareto_front(points)):
            letters[place] += letter if on_front else ''
    return letters


def pareto_front(points: Sequence[tuple[Amounts, float] | None]) -> list[bool]:
    """Of (amounts, loss) points: those that none other beats.

    A point is beaten by a lower loss at a cost that is lower or the same, and by the same loss at
    a lower cost.
    """

    def beats(one: tuple[Amounts, float], other: tuple[Amounts, float]) -> bool:
        same = same_cost(one[0], other[0])
        cheaper = not same and statistics.fmean(one[0]) < statistics.fmean(other[0])
        return (one[1] < other[1] and (same or cheaper)) or (one[1] == other[1] and cheaper)

    return [
        point is not None and not any(other is not None and beats(other, point) for other in points)
        for point in points
    ]


def same_cost(one: Amounts, other: Amounts) -> bool:
    """Whether two groups cost the same, as far as their runs can tell.

    They do if their ranges overlap, and if their means differ by less than SAME_COST.
    """
    if max(one) >= min(other) and max(other) >= min(one):
        return True
    means = statistics.fmean(one), statistics.fmean(other)
    return abs(means[0] - means[1]) <= SAME_COST * max(means)


def all_same(amounts: Sequence[Amounts]) -> bool:
    """Whether the groups' costs do not differ, so that there is no trading them for loss."""
    return all(same_cost(amounts[0], others) for others in amounts[1:])


# --- By position ---------------------------------------------------------------------------------


class Span(NamedTuple):
    """Positions `start` … `end` - 1 of the context, and the mean validation loss there."""

    start: int
    end: int
    loss: float


def mean_by_position(group: Group) -> dict[tuple[int, int], float]:
    """The mean over the seeds for each stretch of positions that all of them have."""
    losses = [{(s.start, s.end): s.loss for s in run.spans} for run in group.evidence]
    return {
        place: statistics.fmean(by_place[place] for by_place in losses)
        for place in losses[0]
        if all(place in by_place for by_place in losses)
    }


class Stability(NamedTuple):
    """Trouble in a run's training."""

    spikes: int
    nonfinite: int
    rollbacks: int
    gradient_growth: float | None  # the norm late against early; None: too short a log
