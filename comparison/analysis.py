"""What a set of runs says, and how far it can be believed: groups over seeds, verdicts, effects.

Plain data in, plain data out: rows that `comparison.runs` has read, no torch, no numpy.
"""

import functools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

from comparison.noise import difference
from comparison.significance import (
    ALPHA,
    Difference,
    Estimate,
    Interval,
    estimate,
    holm,
    holm_confidences,
    paired_difference,
)

SEEDS = ('seed', 'data_seed')
FINISHED, DIVERGED, UNMEASURED = 'finished', 'diverged', 'without a validation loss'

# What a test finds. BASELINE and NOT_TESTED are no findings of a test.
BETTER, WORSE, EQUIVALENT, NOT_SIGNIFICANT = 'better', 'worse', 'equivalent', 'not significant'
BASELINE, NOT_TESTED = 'baseline', 'not tested'
# What becomes of a finding where the runs do not allow it.
BLOCKED, PROVISIONAL = 'blocked', 'provisional'


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one architecture, trained alike, that differ in their seeds alone."""

    members: list  # the runs, one for each pair of seeds, whatever became of them

    @functools.cached_property
    def losses(self) -> dict[tuple, float]:
        """The scores of the finished runs by (seed, data_seed)."""
        return {seeds_of(run): run.val_loss for run in self.members if run.outcome == FINISHED}

    @functools.cached_property
    def estimate(self) -> Estimate | None:
        return estimate([*self.losses.values()]) if self.losses else None

    @functools.cached_property
    def outcomes(self) -> Counter:
        """How many runs ended in each way, finished ones first."""
        counts = Counter(run.outcome for run in self.members)
        return Counter(dict(sorted(counts.items(), key=lambda item: item[0] != FINISHED)))

    @property
    def finished(self) -> bool:
        """Whether every run is."""
        return self.outcomes[FINISHED] == len(self.members)

    @functools.cached_property
    def evidence(self) -> list:
        """The finished runs; without any, all of them, as far as they came."""
        return [run for run in self.members if run.outcome == FINISHED] or self.members

    @property
    def loss(self) -> float | None:
        """The mean score of the finished runs; without any, that of the others so far."""
        return self.mean(lambda run: run.val_loss)

    def mean(
        self,
        figure: Callable[[Any], float | None],
        weight: Callable[[Any], float | None] = lambda run: 1.0,
    ) -> float | None:
        """The mean of a run's figure over the evidence that has it, and that has a weight."""
        pairs = [(figure(run), weight(run)) for run in self.evidence]
        known = [(value, factor) for value, factor in pairs if value is not None and factor]
        if not known:
            return None
        values, factors = zip(*known)
        return statistics.fmean(values, factors)

    def figures(self, figure: Callable[[Any], float | None]) -> list[float]:
        """A run's figure, of the evidence that has it."""
        return [value for value in map(figure, self.evidence) if value is not None]


@dataclass(frozen=True)
class Verdict:
    """How a group stands to the baseline's."""

    group: Group
    finding: str
    difference: Difference | None = None  # None: no test is possible
    p_value: float | None = None  # corrected for the number of comparisons (Holm)
    interval: Interval | None = None  # of the same procedure
    equivalence_p_value: float | None = None  # corrected too; None without a margin
    comparisons: int = 0  # how many groups were tested
    blocked: tuple[str, ...] = ()  # reasons why the finding is not to be believed
    reservations: tuple[str, ...] = ()  # reasons why it may change, or why there is none

    @functools.cached_property
    def detectable(self) -> float | None:
        """The smallest true difference that would likely have been found, see `Difference`."""
        return self.difference and self.difference.detectable(self.comparisons)

    @property
    def text(self) -> str:
        """The finding, or `blocked` or `provisional` in its place."""
        if self.finding in (BASELINE, NOT_TESTED):
            return self.finding
        if self.blocked:
            return BLOCKED
        return PROVISIONAL if self.reservations else self.finding

    @property
    def reasons(self) -> tuple[str, ...]:
        return (*self.blocked, *self.reservations)


def seeds_of(run) -> tuple:
    return tuple(run.config.get(name) for name in SEEDS)


def group_runs(runs: Iterable, key: Callable[[Any], Any]) -> list[Group]:
    """All runs, oldest first, by `key(run)`; best first."""
    attempts: dict[Any, dict[tuple, list]] = {}
    for run in runs:
        attempts.setdefault(key(run), {}).setdefault(seeds_of(run), []).append(run)
    groups = [Group([*map(evidence_of, by_seeds.values())]) for by_seeds in attempts.values()]
    return sorted(groups, key=lambda g: (g.loss is None, g.loss or 0.0, g.members[0].start))


def evidence_of(attempts: Sequence):
    """The one of several runs with equal seeds, oldest first, that counts.

    A repeated run is no further evidence. One that diverged is evidence that no repetition undoes;
    else the first that finished counts, else the last.
    """
    for outcome in (DIVERGED, FINISHED):
        for run in attempts:
            if run.outcome == outcome:
                return run
    return attempts[-1]


# --- Verdicts ------------------------------------------------------------------------------------


class Corrected(NamedTuple):
    """A test as one of several: its p-value by Holm, and the interval of that procedure."""

    difference: Difference
    p_value: float
    interval: Interval


def judge(
    groups: Sequence[Group],
    baseline: Group,
    margin: float | None = None,
    unlike: Callable[[Group], str | None] = lambda group: None,
) -> list[Verdict]:
    """Each group against the baseline, in the given order.

    margin: differences below it do not matter, in nats a token. With it, a group may be found
    equivalent: the two one-sided tests of all groups are corrected like those of differences.
    unlike(group): why the losses of a group and the baseline's are not directly comparable.
    """
    # What is left of a group that lost its worst runs has too little spread to tell the noise of
    # the others, and one with a run that blew up has far too much.
    whole = [group for group in groups if not any(run.blown_up for run in group.members)]
    tests = []
    for group in groups:
        others = [other.losses for other in whole if other is not group and other is not baseline]
        own = group is baseline
        tests.append(None if own else difference(group.losses, baseline.losses, others))
    corrections = corrected(tests)
    equivalence = [
        None if test is None or margin is None else test.equivalence_p_value(margin)
        for test in tests
    ]
    equivalence = _holm_of_known(equivalence)
    count = sum(test is not None for test in tests)
    verdicts = []
    for group, correction, equivalence_p_value in zip(groups, corrections, equivalence):
        if group is baseline:
            verdict = Verdict(group, BASELINE)
        elif correction is None:
            reasons = (*_why_not_tested(group, baseline), *_reservations(group, baseline))
            verdict = Verdict(group, NOT_TESTED, reservations=reasons)
        else:
            verdict = Verdict(
                group,
                _finding(correction, equivalence_p_value),
                *correction,
                equivalence_p_value=equivalence_p_value,
                comparisons=count,
                reservations=_reservations(group, baseline),
            )
            verdict = replace(verdict, blocked=_blocked(verdict, baseline))
        if group is not baseline and (reason := unlike(group)):
            verdict = replace(verdict, reservations=(*verdict.reservations, reason))
        verdicts.append(verdict)
    return verdicts


def corrected(tests: Sequence[Difference | None]) -> list[Corrected | None]:
    """The tests that could be made, corrected for their number."""
    p_values = [test.p_value for test in tests if test is not None]
    corrections = iter(zip(holm(p_values), holm_confidences(p_values)))
    results: list[Corrected | None] = []
    for test in tests:
        if test is None:
            results.append(None)
        else:
            p_value, confidence = next(corrections)
            results.append(Corrected(test, p_value, test.interval(confidence)))
    return results


def _holm_of_known(p_values: Sequence[float | None]) -> list[float | None]:
    corrections = iter(holm([p_value for p_value in p_values if p_value is not None]))
    return [None if p_value is None else next(corrections) for p_value in p_values]


def _finding(correction: Corrected, equivalence_p_value: float | None) -> str:
    if equivalence_p_value is not None and equivalence_p_value < ALPHA:
        return EQUIVALENT  # whether or not there is a difference, it is below the margin
    if correction.p_value >= ALPHA:
        return NOT_SIGNIFICANT
    return BETTER if correction.difference.mean < 0 else WORSE


def _blocked(verdict: Verdict, baseline: Group) -> tuple[str, ...]:
    """Why a finding in favor of a group that lost its worst runs does not hold.

    The runs that finished are no fair sample of a group in which others diverged: their mean is
    too good. So such a group can lose, and cannot win or draw.
    """
    favored = {
        BETTER: [verdict.group],
        WORSE: [baseline],
        EQUIVALENT: [verdict.group, baseline],
    }.get(verdict.finding, [])
    return tuple(
        f'{_share(group, DIVERGED)} of {_whose(group, baseline)} diverged'
        for group in favored
        if group.outcomes[DIVERGED]
    )


def _reservations(group: Group, baseline: Group) -> tuple[str, ...]:
    """What is still to come, or is missing for another reason than divergence."""
    return tuple(
        f'{_share(each, outcome)} of {_whose(each, baseline)}: {outcome}'
        for each in (group, baseline)
        for outcome in each.outcomes
        if outcome not in (FINISHED, DIVERGED)
    )


def _why_not_tested(group: Group, baseline: Group) -> tuple[str, ...]:
    few = [each for each in (group, baseline) if len(each.losses) < 2]
    if not few:
        return ('the seeds repeat one another, so there is no noise to compare with',)
    reasons = []
    for each in few:
        count = len(each.losses)
        reasons.append(
            f'{_whose(each, baseline)} has {count or "no"} finished seed{"s" * (count != 1)}, '
            'and a test needs two'
        )
        if each.outcomes[DIVERGED]:
            reasons.append(f'{_share(each, DIVERGED)} of {_whose(each, baseline)} diverged')
    return tuple(reasons)


def _share(group: Group, outcome: str) -> str:
    count = len(group.members)
    return f'{group.outcomes[outcome]} of {count} seed{"s" * (count > 1)}'


def _whose(group: Group, baseline: Group) -> str:
    return 'the baseline' if group is baseline else 'this architecture'


# --- Main effects of a grid ----------------------------------------------------------------------


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


Axes = dict[str, Any]  # option -> value: where a group lies in the grid


def main_effects(placed: Sequence[tuple[Axes, Group]]) -> list[Effect]:
    """Each value against the first of its option, over all pairs that differ in nothing else.

    A seed gives every cell of the grid its initial weights and its data, so its pairs share their
    luck: the mean over the cells is one observation for each seed.
    """
    effects = []
    for option, (first, *others) in _values(placed).items():
        for value in others:
            cells = [
                {s: (loss, reference[s]) for s, loss in group.losses.items() if s in reference}
                for axes, group in placed
                if axes.get(option) == value
                for reference in [_losses(placed, {**axes, option: first})]
            ]
            effects.append(Effect(option, value, first, *_by_seed(cells)))
    return effects


def interactions(placed: Sequence[tuple[Axes, Group]]) -> list[Interaction]:
    """For every two options: (A and B changed) − (A alone) − (B alone) + (neither), by seed."""
    values = _values(placed)
    results = []
    for one, two in combinations(values, 2):
        for a in values[one][1:]:
            for b in values[two][1:]:
                corner = (values[one][0], values[two][0])
                cells = []
                for axes, group in placed:
                    if (axes.get(one), axes.get(two)) != (a, b):
                        continue
                    only_a, only_b, neither = (
                        _losses(placed, {**axes, one: x, two: y})
                        for x, y in ((a, corner[1]), (corner[0], b), corner)
                    )
                    cells.append(
                        {
                            seeds: (loss - only_a[seeds], only_b[seeds] - neither[seeds])
                            for seeds, loss in group.losses.items()
                            if seeds in only_a and seeds in only_b and seeds in neither
                        }
                    )
                test, mean, _ = _by_seed(cells)
                if mean is not None:
                    results.append(Interaction((one, two), (a, b), corner, test, mean))
    return results


def _by_seed(
    cells: Sequence[dict[tuple, tuple[float, float]]],
) -> tuple[Difference | None, float | None, int]:
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
    means = [
        tuple(map(statistics.fmean, zip(*(cell[seeds] for cell in cells)))) for seeds in shared
    ]
    mean = statistics.fmean(a - b for a, b in means)
    return paired_difference(means), mean, len(cells) * len(shared)


def _values(placed: Sequence[tuple[Axes, Group]]) -> dict[str, list]:
    """The values of each option that varies, in the order of the grid."""
    values: dict[str, list] = {}
    for axes, _ in placed:
        for option, value in axes.items():
            if value not in values.setdefault(option, []):
                values[option].append(value)
    return {option: known for option, known in values.items() if len(known) > 1}


def _losses(placed: Sequence[tuple[Axes, Group]], place: Axes) -> dict[tuple, float]:
    return next((group.losses for axes, group in placed if axes == place), {})
