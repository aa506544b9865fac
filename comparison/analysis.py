"""A verdict for each group: the result of its test, and whether the runs allow that conclusion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from comparison.groups import Group
from comparison.noise import moderated_difference
from comparison.runs import DIVERGED, FINISHED
from comparison.significance import ALPHA, Difference, Interval, holm, holm_confidences

# Findings of a test; BASELINE and NOT_TESTED stand in for one.
BETTER, WORSE, EQUIVALENT, NOT_SIGNIFICANT = 'better', 'worse', 'equivalent', 'not significant'
BASELINE, NOT_TESTED = 'baseline', 'not tested'
# Replace the finding where the runs do not allow the conclusion.
BLOCKED, PROVISIONAL = 'blocked', 'provisional'


class CorrectedTest(NamedTuple):
    """One test of several: its p-value and interval, corrected by Holm's procedure."""

    difference: Difference
    p_value: float
    interval: Interval
    comparisons: int  # number of tests

    @property
    def detectable(self) -> float:
        """The smallest true difference that would likely be significant; see `Difference`."""
        return self.difference.detectable(self.comparisons)


@dataclass(frozen=True)
class Verdict:
    """A group compared with the baseline."""

    group: Group
    finding: str
    test: CorrectedTest | None = None  # corrected for the number of comparisons; None: not tested
    equivalence_p_value: float | None = None  # corrected too; None without a margin
    blocked: tuple[str, ...] = ()  # reasons why the finding is not valid
    reservations: tuple[str, ...] = ()  # reasons why it may change, or why there is no test

    @property
    def text(self) -> str:
        """The verdict: the finding, or `blocked` or `provisional` instead."""
        if self.finding in (BASELINE, NOT_TESTED):
            return self.finding
        if self.blocked:
            return BLOCKED
        return PROVISIONAL if self.reservations else self.finding

    @property
    def reasons(self) -> tuple[str, ...]:
        return (*self.blocked, *self.reservations)


def test_against_baseline(
    groups: Sequence[Group],
    baseline: Group,
    margin: float | None = None,
    incomparable: Callable[[Group], str | None] = lambda group: None,
) -> list[Verdict]:
    """A verdict for each group against the baseline, in the given order.

    margin: differences below it are irrelevant, in nats per token. With it, a group can be
    equivalent: two one-sided tests per group, corrected in the same way as the differences.
    incomparable(group): why the losses of a group and the baseline are not directly comparable.
    """
    tests = _tests(groups, baseline)
    equivalence_p_values = _holm_where_known(
        [
            None if test is None or margin is None else test.equivalence_p_value(margin)
            for test in tests
        ]
    )
    verdicts = []
    for group, test, p_value in zip(groups, holm_corrected(tests), equivalence_p_values):
        if group is baseline:
            verdict = Verdict(group, BASELINE)
        elif test is None:
            reasons = (*_why_not_tested(group, baseline), *_reservations(group, baseline))
            verdict = Verdict(group, NOT_TESTED, reservations=reasons)
        else:
            verdict = Verdict(
                group,
                _finding(test, p_value),
                test,
                equivalence_p_value=p_value,
                reservations=_reservations(group, baseline),
            )
            verdict = replace(verdict, blocked=_blocked(verdict, baseline))
        if group is not baseline and (reason := incomparable(group)):
            verdict = replace(verdict, reservations=(*verdict.reservations, reason))
        verdicts.append(verdict)
    return verdicts


def _tests(groups: Sequence[Group], baseline: Group) -> list[Difference | None]:
    """The test of each group; None for the baseline, and where no test is possible."""
    # Other groups contribute to the noise estimate only if no run of theirs blew up: without its
    # worst runs a group has too little spread, and with a blown-up run far too much.
    whole = [group for group in groups if not any(run.blown_up for run in group.runs)]
    tests: list[Difference | None] = []
    for group in groups:
        if group is baseline:
            tests.append(None)
            continue
        others = [other.losses for other in whole if other is not group and other is not baseline]
        tests.append(moderated_difference(group.losses, baseline.losses, others))
    return tests


def holm_corrected(tests: Sequence[Difference | None]) -> list[CorrectedTest | None]:
    """The tests corrected for their number; None stays None."""
    p_values = [test.p_value for test in tests if test is not None]
    corrections = iter(zip(holm(p_values), holm_confidences(p_values)))
    results: list[CorrectedTest | None] = []
    for test in tests:
        if test is None:
            results.append(None)
        else:
            p_value, confidence = next(corrections)
            interval = test.interval(confidence)
            results.append(CorrectedTest(test, p_value, interval, len(p_values)))
    return results


def _holm_where_known(p_values: Sequence[float | None]) -> list[float | None]:
    corrections = iter(holm([p_value for p_value in p_values if p_value is not None]))
    return [None if p_value is None else next(corrections) for p_value in p_values]


def _finding(test: CorrectedTest, equivalence_p_value: float | None) -> str:
    if equivalence_p_value is not None and equivalence_p_value < ALPHA:
        return EQUIVALENT  # any difference is below the margin
    if test.p_value >= ALPHA:
        return NOT_SIGNIFICANT
    return BETTER if test.difference.mean < 0 else WORSE


def _blocked(verdict: Verdict, baseline: Group) -> tuple[str, ...]:
    """Reasons why a finding in favor of a group with diverged runs is not valid.

    The runs that finished are a biased sample of such a group: their mean is too low. So the group
    can be found worse, but neither better nor equivalent.
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
    """Runs of either group that are unfinished, or missing for another reason than divergence."""
    return tuple(
        f'{_share(each, outcome)} of {_whose(each, baseline)}: {outcome}'
        for each in (group, baseline)
        for outcome in each.outcomes
        if outcome not in (FINISHED, DIVERGED)
    )


def _why_not_tested(group: Group, baseline: Group) -> tuple[str, ...]:
    short = [each for each in (group, baseline) if len(each.losses) < 2]
    if not short:
        return ('all seeds gave the same loss, so the noise cannot be estimated',)
    reasons = []
    for each in short:
        count = len(each.losses)
        reasons.append(
            f'{_whose(each, baseline)} has {count or "no"} finished seed{"s" * (count != 1)}, '
            'and a test needs two'
        )
        if each.outcomes[DIVERGED]:
            reasons.append(f'{_share(each, DIVERGED)} of {_whose(each, baseline)} diverged')
    return tuple(reasons)


def _share(group: Group, outcome: str) -> str:
    count = len(group.runs)
    return f'{group.outcomes[outcome]} of {count} seed{"s" * (count > 1)}'


def _whose(group: Group, baseline: Group) -> str:
    return 'the baseline' if group is baseline else 'this architecture'
