"""The answer in one or two sentences: each difference with its interval and significance."""

from collections.abc import Sequence

from common.formatting import LISTED, join_names, nats, or_dash, p_text
from comparison.analysis import (
    BASELINE,
    BETTER,
    BLOCKED,
    EQUIVALENT,
    NOT_SIGNIFICANT,
    NOT_TESTED,
    WORSE,
    CorrectedTest,
    Verdict,
)
from comparison.compare import Comparison, runs_above_best
from comparison.groups import Group
from comparison.runs import FINISHED
from comparison.significance import Interval

Tested = tuple[Verdict, CorrectedTest]


def headline(comparison: Comparison) -> str:
    """The result of the comparison in sentences."""
    ranked = [
        (group, label)
        for group, label in zip(comparison.groups, comparison.labels)
        if group.losses or (not comparison.repeated and group.loss is not None)
    ]
    if not ranked:
        return ' '.join(['No finished run has a validation loss yet.', *_incomplete(comparison)])
    if len(comparison.groups) == 1:
        (group, label), *_ = ranked
        text = f'{label} reaches a validation loss of {or_dash(group.loss, nats)} nats per token.'
        return ' '.join([text, *_incomplete(comparison)])
    if not comparison.repeated:
        return _single_seed_answer(comparison, ranked)
    tested = [(v, v.test) for v in comparison.verdicts if v.test is not None]
    if not tested:
        sentences = [_nothing_tested(comparison)]
    elif len(tested) == 1:
        sentences = [_single_difference(comparison, *tested[0])]
    else:
        sentences = _several_differences(comparison, tested)
    sentences += _incomplete(comparison)
    if comparison.loss_warnings and len(tested) != 1:
        sentences.append(_not_comparable(comparison))
    return ' '.join(sentences)


def _single_seed_answer(comparison: Comparison, ranked: Sequence[tuple[Group, str]]) -> str:
    best, label = ranked[0]
    sentences = [f'{label} reaches a validation loss of {or_dash(best.loss, nats)}.']
    if len(ranked) > 1:
        second, other = ranked[1]
        sentences = [
            f'{label} has the lowest validation loss, {or_dash(best.loss, nats)} against '
            f'{or_dash(second.loss, nats)} of {other}. With one seed each, this may be chance.'
        ]
    if comparison.loss_warnings:
        sentences.append(_not_comparable(comparison))
    return ' '.join([*sentences, *_incomplete(comparison)])


def _not_comparable(comparison: Comparison) -> str:
    names = join_names(list(comparison.loss_warnings))
    return f'The losses are not directly comparable ({names}; see WARNINGS).'


def _incomplete(comparison: Comparison) -> list[str]:
    """One sentence for each group with unfinished, diverged or worsening runs."""
    sentences = []
    for group, label in zip(comparison.groups, comparison.labels):
        if not group.finished:
            sentences.append(f'{label}: {outcomes_text(group)}.')
        elif runs_above_best(group):
            runs = len(runs_above_best(group))
            which = 'it ends' if len(group.runs) == 1 else f'{runs} of its runs end'
            sentences.append(f'{label}: {which} well above the best validation loss.')
    if len(sentences) > LISTED:
        sentences[LISTED:] = [f'{len(sentences) - LISTED} more are incomplete.']
    return sentences


def outcomes_text(group: Group) -> str:
    """`3 of 5 seeds finished, 2 diverged`, or the outcome of a single run."""
    count = len(group.runs)
    others = [(outcome, n) for outcome, n in group.outcomes.items() if outcome != FINISHED]
    if count == 1:
        return outcome_name(others[0][0]) if others else FINISHED
    parts = [f'{n} {outcome_name(outcome)}' for outcome, n in others]
    return ', '.join([f'{group.outcomes[FINISHED]} of {count} seeds finished', *parts])


def outcome_name(outcome: str) -> str:
    # A journal without an end line does not show whether the run is alive or was killed.
    return 'running or crashed' if outcome == 'running' else outcome


# --- Tested differences --------------------------------------------------------------------------


def _single_difference(comparison: Comparison, verdict: Verdict, test: CorrectedTest) -> str:
    """The answer of a comparison with one difference."""
    label = comparison.labels[comparison.groups.index(verdict.group)]
    name, interval, mean = comparison.baseline_label, test.interval, test.difference.mean
    level, p_value = f'{interval.confidence:.0%} interval', p_text(test.p_value)
    group, baseline = test.difference.counts
    seeds = f'{group} seeds each' if group == baseline else f'{group} against {baseline} seeds'
    if verdict.finding in (BETTER, WORSE):
        low, high = _amounts(interval)
        facts = f'{level} {low} to {high}, p {p_value}, {seeds}'
        verb = 'would be' if verdict.text == BLOCKED else 'is'
        text = f'{label} {verb} {verdict.finding} than {name} by {nats(abs(mean))} nats per token'
        return f'{text} ({facts}){caveat(verdict)}.'
    facts = f'{mean:+.4f} nats per token, {level} {interval.low:+.4f} to {interval.high:+.4f}'
    if verdict.finding == EQUIVALENT:
        verb = 'would differ' if verdict.text == BLOCKED else 'differs'
        margin = f'by less than the margin of {comparison.margin:g}'
        return f'{label} {verb} from {name} {margin} ({facts}, {seeds}){caveat(verdict)}.'
    return (
        f'No significant difference between {label} and {name} ({facts}, p {p_value}, {seeds})'
        f'{caveat(verdict)}. {_undetected([test])}'
    )


def caveat(verdict: Verdict) -> str:
    if verdict.text == BLOCKED:
        return f', but this verdict is blocked: {"; ".join(verdict.blocked)}'
    if verdict.reservations:
        return f', provisionally: {"; ".join(verdict.reservations)}'
    return ''


def _several_differences(comparison: Comparison, tested: Sequence[Tested]) -> list[str]:
    """The differences by finding, each with its interval."""
    name = comparison.baseline_label
    label_of = dict(zip(map(id, comparison.groups), comparison.labels))

    def items(subset: Sequence[Tested]) -> str:
        return semicolons([f'{label_of[id(v.group)]} {_difference(v, test)}' for v, test in subset])

    def having(finding: str, blocked: bool = False) -> list[Tested]:
        return [
            (verdict, test)
            for verdict, test in tested
            if verdict.finding == finding and (verdict.text == BLOCKED) == blocked
        ]

    sentences = []
    for finding, title in (
        (BETTER, f'Better than {name}'),
        (WORSE, f'Worse than {name}'),
        (EQUIVALENT, f'Within the margin of {comparison.margin} of {name}'),
        (NOT_SIGNIFICANT, f'No significant difference from {name}'),
    ):
        if subset := having(finding):
            sentences.append(f'{title}: {items(subset)}.')
            if finding == NOT_SIGNIFICANT:
                sentences.append(_undetected([test for _, test in subset]))
    for finding in (BETTER, WORSE, EQUIVALENT):
        if subset := having(finding, blocked=True):
            sentences.append(
                f'Blocked, because seeds diverged ({finding} by the seeds that finished): '
                f'{items(subset)}.'
            )
    if tested:
        sentences.append(f'(Nats per token; intervals corrected for {len(tested)} comparisons.)')
    return sentences


def _difference(verdict: Verdict, test: CorrectedTest) -> str:
    interval, mean = test.interval, test.difference.mean
    provisional = ', provisional' if verdict.reservations else ''
    if verdict.finding in (BETTER, WORSE):
        low, high = _amounts(interval)
        return f'by {nats(abs(mean))} ({low} to {high}{provisional})'
    return f'{mean:+.4f} ({interval.low:+.4f} to {interval.high:+.4f}{provisional})'


def _amounts(interval: Interval) -> tuple[str, str]:
    """The bounds of a significant difference as amounts, the smaller first."""
    low, high = sorted((abs(interval.low), abs(interval.high)))
    return nats(low), nats(high)


def semicolons(texts: Sequence[str]) -> str:
    more = len(texts) - LISTED
    return '; '.join(texts[:LISTED]) + (f'; and {more} more' if more > 0 else '')


def _undetected(tests: Sequence[CorrectedTest]) -> str:
    """The differences that the test would probably have missed."""
    amounts = sorted(test.detectable for test in tests)
    span = ' to '.join(dict.fromkeys([nats(amounts[0]), nats(amounts[-1])]))
    return f'With this many seeds, differences below {span} nats would probably go undetected.'


def _nothing_tested(comparison: Comparison) -> str:
    name = comparison.baseline_label
    reasons = dict.fromkeys(
        reason
        for verdict in comparison.verdicts
        if verdict.text == NOT_TESTED
        for reason in verdict.reasons
    )
    why = f': {"; ".join([*reasons][:3])}' if reasons else ''
    return f'No test against {name} is possible yet{why}.'


def verdict_text(verdict: Verdict) -> str:
    """The verdict in a table."""
    if verdict.text in (BASELINE, NOT_TESTED) or verdict.text == verdict.finding:
        return verdict.text
    return f'{verdict.text} ({verdict.finding})'
