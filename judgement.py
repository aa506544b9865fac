"""What a set of runs says, and how far it can be believed: groups over seeds, verdicts, costs.

Plain data in, plain data out: rows that `compare_architectures` has read, no torch, no numpy.
"""

import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

from evidence import (
    CONFIDENCE,
    Difference,
    Estimate,
    estimate,
    holm,
    paired_difference,
    unpaired_difference,
)

SEEDS = ('seed', 'data_seed')
COSTS = {'tokens': 'tokens', 'flops': 'training FLOPs', 'seconds': 'seconds of training'}


# The costs that a loss is held against, by the letter of their Pareto front: a title, and a run's.
FRONTS: dict[str, tuple[str, Callable[[Any], float | None]]] = {
    'F': ('training FLOPs', lambda run: run.total_flops),
    'T': ('seconds of training', lambda run: run.curve[-1].seconds if run.curve else None),
    'M': ('peak memory, GB', lambda run: run.peak_memory_gb),
}
TIMES = ('seconds', 'T')  # of these two, what runs that trained beside one another cannot tell


class CurvePoint(NamedTuple):
    """A validation loss and what it had cost by then; None where the record does not tell."""

    iter: int
    tokens: float | None
    flops: float | None
    seconds: float | None
    loss: float


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one architecture, trained alike, that differ in their seeds alone."""

    members: list  # the runs, one for each pair of seeds
    finished: bool
    losses: dict[tuple, float]  # by (seed, data_seed); empty where none is known
    estimate: Estimate | None

    @property
    def loss(self) -> float | None:
        """The mean over the seeds."""
        return self.estimate and self.estimate.mean

    def mean(self, figure: Callable[[Any], float | None]) -> float | None:
        """The mean of a run's figure over the members that have it."""
        known = [value for value in map(figure, self.members) if value is not None]
        return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class Verdict:
    """How a group stands to the baseline's."""

    group: Group
    difference: Difference | None  # None: no test is possible
    p_value: float | None  # corrected for the number of comparisons (Holm)
    detectable: float | None  # the smallest true difference that would likely have been found
    text: str


def seeds_of(run) -> tuple:
    return tuple(run.config.get(name) for name in SEEDS)


def group_runs(runs: Iterable, key: Callable[[Any], Any]) -> list[Group]:
    """Finished runs that have a loss, by `key(run)`, and each other run by itself; best first."""
    by_key: dict[Any, dict[tuple, Any]] = {}
    for run in runs:
        seeds = seeds_of(run)
        whole = run.status == 'finished' and run.val_loss is not None
        # A run repeated with the same seeds is no further evidence: the first counts.
        by_key.setdefault(('whole', key(run)) if whole else run, {}).setdefault(seeds, run)
    groups = []
    for members in by_key.values():
        losses = {s: run.val_loss for s, run in members.items() if run.val_loss is not None}
        finished = all(run.status == 'finished' for run in members.values())
        found = estimate([*losses.values()]) if losses else None
        groups.append(Group([*members.values()], finished, losses, found))
    return sorted(groups, key=lambda g: (g.loss is None, g.loss or 0.0, g.members[0].start))


def judge(groups: Sequence[Group], baseline: Group) -> list[Verdict]:
    """Each group against the baseline, in the given order."""
    found = [
        difference(group, baseline) if group is not baseline and group.finished else None
        for group in groups
    ]
    comparisons = sum(test is not None for test in found)
    verdicts = []
    for group, test, p_value in zip(groups, found, corrected(found), strict=True):
        detectable = None if test is None else test.detectable(comparisons)
        if group is baseline:
            text = 'baseline'
        elif test is None:
            text = 'unknown'  # one seed, or not finished
        elif p_value >= 1 - CONFIDENCE:
            text = 'not told apart'
        else:
            text = 'better' if test.mean < 0 else 'worse'
        verdicts.append(Verdict(group, test, p_value, detectable, text))
    return verdicts


def corrected(tests: Sequence[Difference | None]) -> list[float | None]:
    """Holm's p-values of the tests that could be made."""
    p_values = iter(holm([test.p_value for test in tests if test is not None]))
    return [None if test is None else next(p_values) for test in tests]


def difference(group: Group, baseline: Group) -> Difference | None:
    """Paired where at least two pairs of seeds are shared, else of two groups; None: too few."""
    shared = [seeds for seeds in group.losses if seeds in baseline.losses]
    if len(shared) > 1:
        return paired_difference([(group.losses[s], baseline.losses[s]) for s in shared])
    if min(len(group.losses), len(baseline.losses)) > 1:
        return unpaired_difference([*group.losses.values()], [*baseline.losses.values()])
    return None


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
        curves = [[curve_over(run.curve, cost) for run in group.members] for group in groups]
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


def pareto_front(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Of (cost, loss) points: those that none other is as good as in both and better in one."""

    def dominated(point: tuple[float, float]) -> bool:
        return any(
            other is not None and other != point and other[0] <= point[0] and other[1] <= point[1]
            for other in points
        )

    return [point is not None and not dominated(point) for point in points]


# --- Main effects of a grid ----------------------------------------------------------------------


class Effect(NamedTuple):
    """What a value of an option does, all else as in the grid, against the option's first value."""

    option: str
    value: Any
    against: Any
    difference: Difference | None  # paired over seeds and the rest of the grid; None: too few
    mean: float | None
    pairs: int


class Interaction(NamedTuple):
    """How much the effect of one option's value depends on another's."""

    options: tuple[str, str]
    values: tuple[Any, Any]
    against: tuple[Any, Any]
    difference: Difference | None
    mean: float


Axes = dict[str, Any]  # option -> value: where a group lies in the grid


def main_effects(placed: Sequence[tuple[Axes, Group]]) -> list[Effect]:
    """Each value against the first of its option, over all pairs that differ in nothing else."""
    values = _values(placed)
    effects = []
    for option, (first, *others) in values.items():
        for value in others:
            pairs = [
                (loss, losses[seeds])
                for axes, group in placed
                if axes.get(option) == value
                for losses in [_losses(placed, {**axes, option: first})]
                for seeds, loss in group.losses.items()
                if seeds in losses
            ]
            mean = statistics.fmean(a - b for a, b in pairs) if pairs else None
            test = paired_difference(pairs) if len(pairs) > 1 else None
            effects.append(Effect(option, value, first, test, mean, len(pairs)))
    return effects


def interactions(placed: Sequence[tuple[Axes, Group]]) -> list[Interaction]:
    """For every two options: (A and B changed) − (A alone) − (B alone) + (neither), by seed."""
    values = _values(placed)
    found = []
    for one, two in combinations(values, 2):
        for a in values[one][1:]:
            for b in values[two][1:]:
                corner = (values[one][0], values[two][0])
                sums = []
                for axes, group in placed:
                    if (axes.get(one), axes.get(two)) != (a, b):
                        continue
                    corners = [
                        _losses(placed, {**axes, one: x, two: y})
                        for x, y in ((a, corner[1]), (corner[0], b), corner)
                    ]
                    for seeds, loss in group.losses.items():
                        if all(seeds in losses for losses in corners):
                            only_a, only_b, neither = (losses[seeds] for losses in corners)
                            sums.append((loss - only_a, only_b - neither))
                if sums:
                    mean = statistics.fmean(x - y for x, y in sums)
                    test = paired_difference(sums) if len(sums) > 1 else None
                    found.append(Interaction((one, two), (a, b), corner, test, mean))
    return found


def _values(placed: Sequence[tuple[Axes, Group]]) -> dict[str, list]:
    """The values of each option that varies, in the order of the grid."""
    values: dict[str, list] = {}
    for axes, _ in placed:
        for option, value in axes.items():
            if value not in values.setdefault(option, []):
                values[option].append(value)
    return {option: found for option, found in values.items() if len(found) > 1}


def _losses(placed: Sequence[tuple[Axes, Group]], wanted: Axes) -> dict[tuple, float]:
    return next((group.losses for axes, group in placed if axes == wanted), {})


# --- By position ---------------------------------------------------------------------------------


class Span(NamedTuple):
    """Positions `start` … `end` - 1 of the context, and the mean validation loss there."""

    start: int
    end: int
    loss: float


def spans_of(record: dict) -> list[Span]:
    """The loss by position at the last evaluation after an update; empty where not recorded."""
    for entry in reversed(record['eval_steps']):
        if entry['iter'] > 0 and (found := entry.get('diagnostics')):
            spans = found.get('val_loss_by_position') or []
            return [Span(span['from'], span['to'], span['loss']) for span in spans]
    return []


def mean_by_position(group: Group) -> dict[tuple[int, int], float]:
    """The mean over the seeds for each stretch of positions that all of them have."""
    losses = [{(s.start, s.end): s.loss for s in run.spans} for run in group.members]
    return {
        place: statistics.fmean(found[place] for found in losses)
        for place in losses[0]
        if all(place in found for found in losses)
    }


# --- Stability -----------------------------------------------------------------------------------


class Stability(NamedTuple):
    """Trouble in a run's training."""

    spikes: int
    nonfinite: int
    rollbacks: int
    gradient_growth: float | None  # the norm late against early; None: too short a log


def stability(record: dict) -> Stability:
    """Of one record."""
    summary, events = record['summary'], record['events']
    return Stability(
        spikes=summary.get('loss_spikes') or 0,
        nonfinite=summary.get('nonfinite_updates') or 0,
        rollbacks=sum(event.get('event') == 'rollback' for event in events),
        gradient_growth=summary.get('gradient_growth'),
    )


def curve_of(record: dict) -> list[CurvePoint]:
    """The validation losses after at least one update, with what they had cost."""
    data, flops = (
        record['startup_info'].get('data') or {},
        record['startup_info'].get('flops') or {},
    )
    tokens_per_iter, per_token = data.get('tokens_per_iter'), flops.get('per_token')
    points = []
    for entry in record['eval_steps']:
        if entry['iter'] > 0 and entry['val_loss'] is not None:
            tokens = tokens_per_iter and entry['iter'] * tokens_per_iter
            points.append(
                CurvePoint(
                    iter=entry['iter'],
                    tokens=tokens,
                    flops=tokens and per_token and tokens * per_token,
                    seconds=entry.get('train_seconds'),
                    loss=entry['val_loss'],
                )
            )
    return sorted(points)
