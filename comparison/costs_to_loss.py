"""The cost at which each run first reaches the final loss of the baseline.

With `--score=best` it is the best loss. A run that ends above the baseline's loss needs more than
its whole cost, if it would get there at all. A diverged run never gets there.
"""

import statistics
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from comparison.compare import Comparison
from comparison.costs import curve_over
from comparison.groups import Group, run_seeds
from comparison.runs import DIVERGED, CurvePoint, Run

MORE, LESS = '>', '<'


class Ratio(NamedTuple):
    """A cost over the total cost of the baseline."""

    value: float
    # MORE: the cost is larger, by an unknown amount; LESS: smaller; DIVERGED: there is no cost
    relation: str = ''


class RunCost(NamedTuple):
    """The cost at which one run first reaches a loss.

    The relation is that of all costs: MORE if the run does not reach the loss, LESS if its first
    evaluation has reached it already, and DIVERGED if the run has no loss in the end.
    """

    run: Run
    loss: float  # to be reached
    paired: bool  # loss and total are of the baseline's run with equal seeds, not of its mean
    relation: str
    amounts: dict[str, float | None]  # by key of COSTS; of the whole run if it is not reached
    ratios: dict[str, float | None]  # amounts over the total of the baseline; None: unknown


class Spread(NamedTuple):
    """The median and the range over a group's runs.

    Those that do not reach the loss are last, and diverged ones after these.
    """

    median: Ratio
    low: Ratio
    high: Ratio


class GroupCost(NamedTuple):
    """The costs of a group's runs, finished or not."""

    group: Group
    runs: list[RunCost]

    @property
    def reached(self) -> int:
        """The number of runs that reach the loss."""
        return sum(run.relation not in (MORE, DIVERGED) for run in self.runs)

    @property
    def diverged(self) -> int:
        return sum(run.relation == DIVERGED for run in self.runs)

    def spread(self, cost: str) -> Spread | None:
        """The ratios of all runs; None if that of any run is unknown."""
        ratios = [(run.relation, run.ratios.get(cost)) for run in self.runs]
        known = [Ratio(value, relation) for relation, value in ratios if value is not None]
        if len(known) < len(ratios):
            return None
        last = ('', MORE, DIVERGED)  # from the smallest cost
        ordered = sorted(known, key=lambda r: (last.index(r.relation.strip(LESS)), r.value))
        # A run that stopped early without reaching the loss needs more than those that reach it.
        values = accumulate((ratio.value for ratio in ordered), max)
        ordered = [ratio._replace(value=value) for ratio, value in zip(ordered, values)]
        return Spread(_median(ordered), ordered[0], ordered[-1])


def _median(ordered: Sequence[Ratio]) -> Ratio:
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    relations = {ratio.relation for ratio in middle}
    if DIVERGED in relations:
        return middle[-1]
    if MORE in relations:
        # A bound from below: what is smaller than a number may be 0.
        values = [0.0 if ratio.relation == LESS else ratio.value for ratio in middle]
        return Ratio(statistics.fmean(values), MORE)
    value = statistics.fmean(ratio.value for ratio in middle)
    return Ratio(value, LESS if LESS in relations else '')


def cost_to_baseline(comparison: Comparison) -> list[GroupCost]:
    """The costs to the baseline's loss, of every group in rank order.

    Each run is compared with the baseline's run of equal seeds, and if that has not finished, with
    the mean of the baseline's finished runs. Empty if the baseline has no finished run, or if there
    are no curves: runs with several evaluations, of the baseline and of another group.
    """
    baseline = {
        run_seeds(run): run
        for run in comparison.baseline.runs
        if run_seeds(run) in comparison.baseline.losses
    }
    others = [
        run for group in comparison.groups if group is not comparison.baseline for run in group.runs
    ]
    curves = all(len(run.curve) > 1 for run in baseline.values())
    if not baseline or not curves or all(len(run.curve) < 2 for run in others):
        return []
    return [
        GroupCost(group, [_run_cost(run, baseline, [*comparison.costs]) for run in group.runs])
        for group in comparison.groups
    ]


def _run_cost(run: Run, baseline: dict[tuple, Run], costs: Sequence[str]) -> RunCost:
    paired = run_seeds(run) in baseline
    counterparts = [baseline[run_seeds(run)]] if paired else [*baseline.values()]
    loss = statistics.fmean(each.val_loss for each in counterparts if each.val_loss is not None)
    index = None if run.outcome == DIVERGED else _first_at_or_below(loss, run.curve)
    relation = MORE if index is None else '' if index else LESS
    amounts = {cost: _amount(run.curve, index, cost, loss) for cost in costs}
    totals = {cost: [getattr(each.curve[-1], cost) for each in counterparts] for cost in costs}
    return RunCost(
        run,
        loss,
        paired,
        relation=DIVERGED if run.outcome == DIVERGED else relation,
        amounts=amounts,
        ratios={cost: _ratio(amounts[cost], totals[cost]) for cost in costs},
    )


def _first_at_or_below(loss: float, curve: Sequence[CurvePoint]) -> int | None:
    return next((index for index, point in enumerate(curve) if point.loss <= loss), None)


def _amount(
    points: Sequence[CurvePoint], index: int | None, cost: str, loss: float
) -> float | None:
    """The cost at which a curve crosses the loss before the point of this index.

    That of the whole curve without an index, and that of its first point with the index 0.
    """
    curve = curve_over(points, cost)
    if len(curve) < len(points):
        return None  # unknown at some point
    if index is None:
        return curve[-1][0] if curve else 0.0
    after, loss_after = curve[index]
    if index == 0:
        return after
    before, loss_before = curve[index - 1]
    return after - (after - before) * (loss - loss_after) / (loss_before - loss_after)


def _ratio(amount: float | None, totals: Sequence[float | None]) -> float | None:
    known = [total for total in totals if total]
    if amount is None or len(known) < len(totals):
        return None
    return amount / statistics.fmean(known)
