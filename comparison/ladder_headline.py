"""The answer of a ladder in sentences: gains at the top rung, their trend, and what to doubt."""

import math
from collections import Counter

from common.formatting import LISTED, counted, join_names, nats, or_dash, p_text, si
from comparison.analysis import BETTER, BLOCKED, EQUIVALENT, NOT_TESTED, WORSE, Verdict
from comparison.headline import caveat, outcome_name, semicolons
from comparison.ladder import LadderComparison
from comparison.runs import DIVERGED, FINISHED
from scaling.forecast import MIN_RUNGS
from scaling.results import (
    CONFIDENCE,
    Bound,
    CurveFit,
    Estimate,
    Gain,
    LadderAnalysis,
    Reversal,
    Trend,
)
from scaling.trend import side_of

LEVEL = f'{CONFIDENCE:.0%} interval'
COVERAGE = (
    'Intervals cover the noise of seeds at the given hyper-parameters, not the choice of those or '
    'of the data.'
)
ONE_SEED = 'With one seed each, gains have no intervals, and differences may be chance.'
SIGNIFICANT, CHANCE = 'significant at both', 'which may be chance'  # of a reversal
EQUAL_SEEDS = 'All seeds gave the same loss, so gains have no intervals.'


def ladder_headline(comparison: LadderComparison) -> str:
    """The result of a ladder in sentences."""
    last = _last_gains(comparison)
    if not last:
        sentences = [_no_gains(comparison)]
    elif len(comparison.others) == 1:
        sentences = _one_variant(comparison, *last.popitem())
    else:
        sentences = _several_variants(comparison, last)
    sentences += _failures(comparison)
    if comparison.loss_warnings:
        names = join_names(list(comparison.loss_warnings))
        sentences.append(f'Rungs are not directly comparable ({names}; see WARNINGS).')
    if any(comparison.analysis.gains.values()):
        sentences.append(_coverage(comparison.analysis))
    return ' '.join(sentences)


def _last_gains(comparison: LadderComparison) -> dict[str, Gain]:
    """The gain of each variant at the top rung, or else at its highest rung below."""
    top = comparison.rungs.index(comparison.top)
    return {
        label: [gain for gain in gains if gain.rung <= top][-1]
        for label, gains in comparison.analysis.gains.items()
        if gains and gains[0].rung <= top
    }


def _coverage(analysis: LadderAnalysis) -> str:
    if analysis.draws:
        return COVERAGE
    seeds = max(len(losses) for rows in analysis.ladder.losses.values() for losses in rows)
    return ONE_SEED if seeds < 2 else EQUAL_SEEDS


# --- Numbers -------------------------------------------------------------------------------------


def factor_text(value: float) -> str:
    """A gain or another factor: `1.23`, `0.045`, `12.3`."""
    return f'{value:.3f}' if value < 0.1 else f'{value:.2f}' if value < 9.995 else f'{value:.3g}'


def bound_text(bound: Bound) -> str:
    return f'{bound.relation} {factor_text(bound.value)}'.lstrip()


def flops_text(flops: float) -> str:
    """`1.20e15`"""
    return f'{flops:.2e}'.replace('e+', 'e')


def gain_interval(gain: Gain) -> str | None:
    """`1.10 to 1.38`; None without draws."""
    if math.isnan(gain.low.value) or math.isnan(gain.high.value):
        return None
    low, high = bound_text(gain.low), bound_text(gain.high)
    return low if low == high and gain.low.relation else f'{low} to {high}'


def factor_interval(estimate: Estimate) -> str | None:
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return None
    return f'{factor_text(estimate.low)} to {factor_text(estimate.high)}'


# --- One variant ---------------------------------------------------------------------------------


def _no_gains(comparison: LadderComparison) -> str:
    if not comparison.others:
        return f'{comparison.baseline} is the only architecture of this ladder.'
    if not any(comparison.analysis.ladder.losses[comparison.baseline]):
        runs = f'of the baseline, {comparison.baseline},'
    else:
        runs = 'but those of the baseline'
    if comparison.without_cost:
        return f'No finished run {runs} has a validation loss and known training FLOPs.'
    return f'No finished run {runs} has a validation loss yet.'


def _one_variant(comparison: LadderComparison, label: str, gain: Gain) -> list[str]:
    """The answer of a ladder with one architecture besides the baseline."""
    gains, baseline = comparison.analysis.gains[label], comparison.baseline
    rung = comparison.rungs[gain.rung]
    interval, seeds = gain_interval(gain), counted(len(rung.groups[label].losses), 'seed')
    facts = f' ({LEVEL} {interval}, {seeds})' if interval else ''
    sentences = [
        f'{_where(comparison, label, gain)}, {label} has a compute gain {_amount(gain.value)} over '
        f'{baseline}{facts}{_meaning(gain.value, baseline)}.',
        _difference(
            comparison, comparison.verdict(rung, label) if comparison.analysis.draws else None
        ),
        _to_measure(comparison, {label: gain}),
        _trend(comparison, comparison.analysis.trends.get(label), len(gains)),
        _misfit(comparison.analysis),
        *_reversals(comparison, label),
    ]
    return [sentence for sentence in sentences if sentence]


def _to_measure(comparison: LadderComparison, last: dict[str, Gain]) -> str:
    """What to do if the baseline does not reach a variant's loss at any of its rungs."""
    baseline = comparison.baseline
    all_trained = all(
        cost is not None or not rung.planned[baseline]
        for cost, rung in zip(comparison.analysis.ladder.costs[baseline], comparison.rungs)
    )
    better = [label for label, gain in last.items() if gain.value.relation == '>']
    if not better or not all_trained:
        return ''
    whose = f'gains of {join_names(better)}' if len(better) > 1 else f'the gain of {better[0]}'
    further = f'train {baseline} further (baseline_extra in the study file), or '
    best = min(
        better, key=lambda label: comparison.rungs[last[label].rung].groups[label].loss or 0.0
    )
    return (
        f'To measure {whose}, {further * (baseline == comparison.study.baseline)}choose {best} as '
        '--baseline.'
    )


def _reversals(comparison: LadderComparison, label: str) -> list[str]:
    """A sentence for each significant reversal, and one for all that may be chance."""
    reversals = comparison.analysis.reversals.get(label, [])
    texts = [reversal_text(comparison, label, each) for each in reversals if each.significant]
    sentences = [f'The order reverses: {text} ({SIGNIFICANT}).' for text in texts[:LISTED]]
    chance = [reversal_text(comparison, label, each) for each in reversals if not each.significant]
    if len(chance) == 1:
        sentences.append(f'The measured order reverses: {chance[0]} ({CHANCE}).')
    elif chance:
        sentences.append(f'The measured order reverses ({CHANCE}): {semicolons(chance)}.')
    return sentences


def _where(comparison: LadderComparison, label: str, gain: Gain) -> str:
    rung = comparison.rungs[gain.rung]
    size = f'{si(rung.params)} parameters, {flops_text(gain.cost)} FLOPs'
    if rung is comparison.top:
        return f'At the top rung ({size})'
    top = comparison.top.number
    if set(comparison.top.outcomes(label)) == {DIVERGED}:
        return f'All runs of {label} at rung {top} diverged. At rung {rung.number} ({size})'
    return f'Provisionally, at rung {rung.number} ({size}), since rung {top} has not finished'


def _amount(bound: Bound) -> str:
    return {'': 'of', '>': 'above', '<': 'below'}[bound.relation] + f' {factor_text(bound.value)}'


def _meaning(bound: Bound, baseline: str) -> str:
    if bound.relation:
        if bound.relation == '>':
            return f': {baseline} does not reach its loss at any rung'
        return f': {baseline} has a lower loss already at its smallest rung'
    only = 'only ' if bound.value < 1 else ''
    return (
        f': {baseline} needs {only}{factor_text(bound.value)} times the training FLOPs for the '
        f'same loss'
    )


def _difference(comparison: LadderComparison, verdict: Verdict | None) -> str:
    """Whether the difference in loss at the highest rung is significant."""
    if verdict is None:
        return ''
    test, why = verdict.test, caveat(verdict)
    if test is None:
        reasons = f': {"; ".join(verdict.reasons)}' if verdict.reasons else ''
        return f'The difference in loss there is not tested{reasons}.'
    facts = f'p {p_text(test.p_value)}'
    if verdict.finding in (BETTER, WORSE):
        verb = 'would be' if verdict.text == BLOCKED else 'is'
        amount = nats(abs(test.difference.mean))
        return (
            f'Its loss there {verb} {verdict.finding} by {amount} nats per token, which is '
            f'significant ({facts}){why}.'
        )
    mean = f'{test.difference.mean:+.4f} nats per token'
    if verdict.finding == EQUIVALENT:
        verb = 'would differ' if verdict.text == BLOCKED else 'differs'
        return (
            f'Its loss there {verb} by less than the margin of {comparison.margin:g} ({mean}){why}.'
        )
    return (
        f'The difference in loss there, {mean}, is not significant in the test of that rung alone '
        f'({facts}){why}.'
    )


def trend_word(trend: Trend) -> str:
    """`grows`, `shrinks`, or `not significant`; without an interval the direction only."""
    _, low, high = trend.factor
    if math.isnan(low) or math.isnan(high):
        return NOT_TESTED
    return 'grows' if low > 1 else 'shrinks' if high < 1 else 'not significant'


def _trend(comparison: LadderComparison, trend: Trend | None, gains: int) -> str:
    if trend is None:
        within = "fewer than two gains lie within the baseline's rungs" if gains > 1 else 'one gain'
        return f'Its trend with compute is unknown ({within}).'
    factor, interval = factor_text(trend.factor.value), factor_interval(trend.factor)
    for_each = f'a factor of {factor} for each tenfold of compute'
    if interval is None:
        fit = comparison.analysis.shared_fit
        misfits = fit is not None and fit.is_wrong  # as the next sentence says
        why = ''
        if comparison.analysis.draws and not misfits:
            why = f', since {comparison.baseline} has fewer than {MIN_RUNGS} rungs'
        return f'The trend of the gain, {for_each}, is not tested{why}.'
    word = trend_word(trend)
    if word == 'not significant':
        return f'The gain has no significant trend with compute ({for_each}, {interval}).'
    return f'The gain {word} with compute, by {for_each} ({interval}).'


def _misfit(analysis: LadderAnalysis) -> str:
    fit = analysis.shared_fit
    if fit is None or not fit.is_wrong:
        return ''
    return f'The {misfit_text(fit)}, so no trend is tested.'


def misfit_text(fit: CurveFit) -> str:
    """`fitted curve misfits the losses (…)`, of a fit that is wrong."""
    return (
        f'fitted curve misfits the losses (its residuals are {fit.misfit:.2f} times as large as '
        f'the noise of seeds explains)'
    )


def reversal_text(comparison: LadderComparison, label: str, reversal: Reversal) -> str:
    """`LABEL is ahead at rung 2 and behind at rung 3`."""
    sides = [
        (gain.rung, side)
        for gain in comparison.analysis.gains[label]
        if gain.rung >= reversal.rung and (side := side_of(gain.value))
    ]
    before = sides[0][1]
    after = next(rung for rung, side in sides if side != before)
    words = ('ahead', 'behind') if before > 0 else ('behind', 'ahead')
    return (
        f'{label} is {words[0]} at rung {comparison.rungs[reversal.rung].number} and {words[1]} '
        f'at rung {comparison.rungs[after].number}'
    )


# --- Several variants ----------------------------------------------------------------------------


def _several_variants(comparison: LadderComparison, last: dict[str, Gain]) -> list[str]:
    """The gain of each variant with its verdict and trend, largest first."""
    top = comparison.rungs.index(comparison.top)
    ranked = sorted(last, key=lambda label: (-last[label].rung, -last[label].value.value))
    at_top = [label for label in ranked if last[label].rung == top]
    below = [label for label in ranked if last[label].rung != top]
    sentences = []
    if at_top:
        items = semicolons([_item(comparison, label, last[label]) for label in at_top])
        sentences.append(
            f'{_where(comparison, at_top[0], last[at_top[0]])}, compute gains over '
            f'{comparison.baseline} are: {items}.'
        )
    if below:
        items = semicolons(
            [
                f'{_item(comparison, label, last[label])} at rung '
                f'{comparison.rungs[last[label].rung].number}'
                for label in below
            ]
        )
        sentences.append(f'Provisionally, without a finished run at the top rung: {items}.')
    sentences.append(_misfit(comparison.analysis))
    reversals = [
        reversal_text(comparison, label, each)
        for label in ranked
        for each in comparison.analysis.reversals.get(label, [])
        if each.significant
    ]
    if reversals:
        sentences.append(f'The order reverses ({SIGNIFICANT}): {semicolons(reversals)}.')
    sentences.append(_to_measure(comparison, last))
    sentences.append('(A gain above 1: less compute than the baseline for the same loss.)')
    return [sentence for sentence in sentences if sentence]


def _item(comparison: LadderComparison, label: str, gain: Gain) -> str:
    """`LABEL 1.23 (1.10 to 1.38; loss better; shrinks with compute)`."""
    verdict = comparison.verdict(comparison.rungs[gain.rung], label)
    trend = comparison.analysis.trends.get(label)
    word = trend_word(trend) if trend else ''
    facts = [
        gain_interval(gain),
        or_dash(verdict, lambda v: f'loss {v.text}', ''),
        f'{word} with compute' if word in ('grows', 'shrinks') else '',
    ]
    listed = '; '.join(fact for fact in facts if fact)
    return f'{label} {bound_text(gain.value)}' + (f' ({listed})' if listed else '')


# --- Failures ------------------------------------------------------------------------------------


def _failures(comparison: LadderComparison) -> list[str]:
    """One sentence for each variant with runs that did not finish."""
    sentences = []
    for label in comparison.variants:
        outcomes: Counter = Counter()
        for rung in comparison.rungs:
            outcomes.update(rung.outcomes(label))
        total, finished = outcomes.total(), outcomes.pop(FINISHED, 0)
        if outcomes:
            others = ', '.join(f'{count} {outcome_name(name)}' for name, count in outcomes.items())
            sentences.append(f'{label}: {finished} of {total} runs finished, {others}.')
    if len(sentences) > LISTED:
        sentences[LISTED:] = [f'{len(sentences) - LISTED} more are incomplete.']
    return sentences
