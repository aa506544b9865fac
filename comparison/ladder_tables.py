"""The comparison of a ladder as sections: rungs, gains, differences, trends, warnings, commands."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from common.dict_option import short_name
from common.formatting import counted, join_names, nats, or_dash, si, wrapped
from comparison.analysis import NOT_TESTED
from comparison.cost_tables import (
    COST_TO_BASELINE,
    cost_to_baseline_cells,
    cost_to_baseline_header,
    cost_to_baseline_keys,
    cost_to_baseline_notes,
)
from comparison.costs_to_loss import cost_to_baseline
from comparison.groups import Group
from comparison.ladder import LadderComparison, LadderRung
from comparison.ladder_fit_tables import (
    fit_section,
    forecast_section,
    noise_section,
    own_fit_section,
    prediction_section,
    residuals_section,
    seeds_section,
)
from comparison.ladder_headline import (
    CHANCE,
    LEVEL,
    SIGNIFICANT,
    bound_text,
    factor_interval,
    factor_text,
    flops_text,
    gain_interval,
    ladder_headline,
    misfit_text,
    reversal_text,
    trend_word,
)
from comparison.loss_tables import (
    equivalence_note,
    tuned_cells,
    tuning_notes,
    verdict_cells,
    verdict_header,
)
from comparison.runs import FINISHED
from comparison.section import Section
from comparison.warning_lines import options_with_ranks, warning_lines
from scaling.forecast import MIN_RUNGS
from scaling.results import Gain


def ladder_sections(comparison: LadderComparison) -> list[Section]:
    """All sections; the answer comes first and again at the end."""
    answer = ladder_headline(comparison)
    return [
        Section(wrapped(answer)),
        *ladder_tables(comparison),
        Section(wrapped(f'ANSWER: {answer}')),
    ]


def ladder_tables(comparison: LadderComparison) -> list[Section]:
    parts: tuple[Callable[[LadderComparison], Section | None], ...] = (
        rungs_section,
        gains_section,
        differences_section,
        cost_to_baseline_section,
        trend_section,
        fit_section,
        own_fit_section,
        residuals_section,
        prediction_section,
        forecast_section,
        noise_section,
        seeds_section,
        tuning_section,
        between_rungs_section,
    )
    return [
        *[section for part in parts if (section := part(comparison))],
        *rung_warnings(comparison),
        commands_section(comparison),
    ]


# --- Rungs, gains and differences ----------------------------------------------------------------


def rungs_section(comparison: LadderComparison) -> Section:
    """The sizes, with how many of their runs have finished."""
    ladder = comparison.analysis.ladder
    rows = []
    for index, rung in enumerate(comparison.rungs):
        totals = [rung.outcomes(label) for label in comparison.variants]
        finished, runs = sum(t[FINISHED] for t in totals), sum(t.total() for t in totals)
        note = ' (baseline only)' * rung.extra
        rows.append(
            [
                str(rung.number),
                si(rung.params),
                or_dash(rung.tokens, si),
                or_dash(ladder.costs[comparison.baseline][index], flops_text),
                str(runs) if finished == runs else f'{finished}/{runs}',
                f'{rung.label}{note}',
            ]
        )
    notes = [
        f'Baseline: {comparison.baseline}, {comparison.baseline_reason}.',
        "params: of the study's reference, without token table, output head and position tables. "
        'FLOPs: of one run of the baseline, with attention over the causal half. runs: finished, '
        'of all in the study.',
    ]
    if comparison.score == 'best':
        notes.append(
            'Losses are the best of several evaluations, which are biased low. Costs are those of '
            'the whole run.'
        )
    header = ['rung', 'params', 'tokens', 'FLOPs', 'runs', 'size']
    return Section('RUNGS', notes, header, rows, '>>>>><')


def gains_section(comparison: LadderComparison) -> Section | None:
    times = comparison.time_gains or {}
    with_time = any(times.values())
    rows = []
    for index, rung in enumerate(comparison.rungs):
        for label in comparison.others:
            if label not in rung.groups and not rung.planned[label]:
                continue
            gain = _gain_at(comparison.analysis.gains, label, index)
            verdict = comparison.verdict(rung, label)
            rows.append(
                [
                    str(rung.number),
                    or_dash(comparison.analysis.ladder.costs[label][index], flops_text),
                    *_losses(comparison, rung, label),
                    or_dash(verdict, lambda v: v.text),
                    or_dash(gain, lambda g: bound_text(g.value)),
                    or_dash(gain and gain_interval(gain), str),
                    *[or_dash(_gain_at(times, label, index), lambda g: bound_text(g.value))]
                    * with_time,
                    _seeds(rung, label),
                    label,
                ]
            )
    if not rows:
        return None
    header = ['rung', 'FLOPs', 'loss', 'baseline', 'difference', 'verdict', 'gain', LEVEL]
    header += [*['in time'] * with_time, 'seeds', 'architecture']
    align = '>>>>><>>' + '>' * with_time + '><'
    title = f'COMPUTE GAIN over {comparison.baseline}'
    return Section(title, _gain_notes(comparison, with_time), header, rows, align)


def _gain_notes(comparison: LadderComparison, with_time: bool) -> list[str]:
    notes = [
        'gain: the training FLOPs that the baseline needs for this loss, interpolated between its '
        'rungs, over those spent. Above 1, less compute is needed. "> x" and "< x": beyond the '
        "baseline's rungs.",
    ]
    if comparison.analysis.draws:
        notes.append(
            'verdict: the corrected test of the losses at this rung alone (table LOSS DIFFERENCE). '
            'Intervals of gains pool the noise of seeds over variants and rungs, so they may '
            'exclude 1 where that test is not significant.'
        )
    if with_time:
        notes.append('in time: the same gain in seconds of training.')
    elif comparison.concurrent > 1:
        notes.append(
            f'{comparison.concurrent} runs trained at the same time, so there are no gains in time.'
        )
    return notes


def _gain_at(gains: dict[str, list[Gain]], label: str, index: int) -> Gain | None:
    return next((gain for gain in gains.get(label, []) if gain.rung == index), None)


def _losses(comparison: LadderComparison, rung: LadderRung, label: str) -> list[str]:
    """The mean losses of the variant and of the baseline, and their difference."""
    means = [_loss(rung.groups.get(each)) for each in (label, comparison.baseline)]
    loss, baseline = means
    difference = None if loss is None or baseline is None else loss - baseline
    return [*(or_dash(mean, nats) for mean in means), or_dash(difference, '{:+.4f}'.format)]


def _loss(group: Group | None) -> float | None:
    """The mean of the finished runs."""
    return group.loss if group is not None and group.losses else None


def _seeds(rung: LadderRung, label: str) -> str:
    outcomes = rung.outcomes(label)
    finished, total = outcomes[FINISHED], outcomes.total()
    return str(total) if finished == total else f'{finished}/{total}'


def differences_section(comparison: LadderComparison) -> Section | None:
    """The test of each variant at each rung."""
    if not comparison.analysis.draws:
        return None
    margin = comparison.margin is not None
    rows, reasons = [], []
    for rung in comparison.rungs:
        for label in comparison.others:
            verdict = comparison.verdict(rung, label)
            if verdict is None:
                continue
            if verdict.test is not None:
                rows.append([str(rung.number), *verdict_cells(verdict, margin), label])
            if verdict.reasons:
                line = f'Rung {rung.number}, {label}: {verdict.text}: {"; ".join(verdict.reasons)}.'
                reasons.append(wrapped(line, '   '))
    if not rows:
        return Section('LOSS DIFFERENCE', lines=reasons) if reasons else None
    notes = [
        "Student's t-test of the losses at each rung, corrected for the comparisons at that rung "
        '(Holm). noise: standard deviation of the difference within one pair of runs. detectable: '
        'the smallest true difference that such a test finds with 80% probability.'
    ]
    if comparison.margin is not None:
        notes.append(equivalence_note(comparison.margin))
    header = ['rung', *verdict_header(margin), 'architecture']
    align = '><' + '>' * (len(header) - 3) + '<'
    return Section('LOSS DIFFERENCE', notes, header, rows, align, reasons)


def cost_to_baseline_section(comparison: LadderComparison) -> Section | None:
    """What each variant needs at a rung to reach the baseline's final loss there."""
    by_rung = [
        (rung, group, label)
        for rung in comparison.rungs
        if rung.comparison and rung.comparison.baseline is rung.groups.get(comparison.baseline)
        for group in cost_to_baseline(rung.comparison)
        for label, of_variant in rung.groups.items()
        if of_variant is group.group and label != comparison.baseline
    ]
    if not by_rung:
        return None
    costs = [group for _, group, _ in by_rung]
    keys = cost_to_baseline_keys(costs)
    rows = [
        [str(rung.number), *cost_to_baseline_cells(group, keys), label]
        for rung, group, label in by_rung
    ]
    header = ['rung', *cost_to_baseline_header(keys), 'architecture']
    align = '>' * (len(header) - 1) + '<'
    notes = cost_to_baseline_notes(costs, comparison.score)
    return Section(COST_TO_BASELINE, notes, header, rows, align)


# --- Trend ---------------------------------------------------------------------------------------


def trend_section(comparison: LadderComparison) -> Section | None:
    analysis = comparison.analysis
    rows, lines = [], []
    for label, trend in analysis.trends.items():
        if trend is not None:
            numbers = [comparison.rungs[index].number for index in trend.rungs]
            rows.append(
                [
                    trend_word(trend),
                    factor_text(trend.factor.value),
                    or_dash(factor_interval(trend.factor), str),
                    ' '.join(map(str, numbers)),
                    label,
                ]
            )
        lines += [
            wrapped(
                f'{reversal_text(comparison, label, each)} '
                f'({SIGNIFICANT if each.significant else CHANCE}).',
                '   ',
            )
            for each in analysis.reversals.get(label, [])
        ]
    if not rows and not lines:
        return None
    notes = [
        'Change of the gain with compute: its factor for each tenfold of the training FLOPs, by '
        'least squares over the rungs listed.'
    ]
    if analysis.shared_fit is not None and analysis.shared_fit.is_wrong:
        notes.append(
            f'{NOT_TESTED}: the {misfit_text(analysis.shared_fit)}. Gains between the rungs of the '
            'baseline are interpolated with this curve, and its errors look like a trend.'
        )
    elif analysis.draws and any(row[0] == NOT_TESTED for row in rows):
        notes.append(
            f'{NOT_TESTED}: with fewer than {MIN_RUNGS} rungs of the baseline, the curvature of '
            'its losses is unknown. Gains are then a little too large between its rungs and too '
            'small beyond them.'
        )
    header = ['trend', 'per tenfold', LEVEL, 'rungs', 'architecture']
    return Section('TREND of the gain', notes, header if rows else [], rows, '<>><<', lines)


# --- Tuning, warnings, commands ------------------------------------------------------------------


def tuning_section(comparison: LadderComparison) -> Section | None:
    """The tuned options of each variant at each rung."""
    tuned = comparison.study.tuned
    if not tuned:
        return None
    rows, edges = [], []
    for rung in comparison.rungs:
        for label, group in rung.groups.items():
            plan = group.runs[0].study
            if plan is None:
                continue
            rows.append([str(rung.number), *tuned_cells(plan, group.runs[0]), label])
            if at_edge := plan.at_edge.get(label):
                edges.append(f'{label} at rung {rung.number} {join_names(at_edge)}')
    header = ['rung', *map(short_name, tuned), 'architecture']
    align = '>' * (1 + len(tuned)) + '<'
    return Section('TUNING', tuning_notes(edges), header, rows, align)


def between_rungs_section(comparison: LadderComparison) -> Section | None:
    """What differs between rungs besides the size, and what holds for all of them."""
    lines = []
    if comparison.without_cost:
        runs = counted(comparison.without_cost, 'run')
        lines.append(f'Not in gains and fits, since the training FLOPs are unknown: {runs}.')
    if comparison.loss_warnings:
        lines += ['Losses of these rungs (# is the rung) are not directly comparable:']
        lines += [options_with_ranks(comparison.loss_warnings)]
    if comparison.speed_warnings:
        lines += ['Times of these rungs (# is the rung) are not directly comparable:']
        lines += [options_with_ranks(comparison.speed_warnings)]
    if comparison.code_warning:
        lines.append(wrapped(comparison.code_warning, '  '))
    lines += [f'Skipped {line}' for line in comparison.skipped]
    return Section('WARNINGS', lines=lines) if lines else None


def rung_warnings(comparison: LadderComparison) -> list[Section]:
    """The warnings of each rung, with the architectures that their ranks stand for."""
    sections = []
    for rung in comparison.rungs:
        if rung.comparison is None:
            sections.append(Section(f'WARNINGS at rung {rung.number}', lines=['No runs.']))
            continue
        lines = warning_lines(replace(rung.comparison, code_warning=None))
        if lines:
            ranks = enumerate(rung.comparison.labels, 1)
            names = [f'#{rank} {label}' for rank, label in ranks]
            title = f'WARNINGS at rung {rung.number}: {join_names(names)}'
            sections.append(Section(title, lines=lines))
    return sections


def commands_section(comparison: LadderComparison) -> Section:
    """The command that shows each rung in full."""
    lines = [
        f'{rung.number}: {rung_command(comparison, rung)}'
        for rung in comparison.rungs
        if rung.comparison is not None
    ]
    return Section('RUNGS IN FULL', lines=lines)


def rung_command(comparison: LadderComparison, rung: LadderRung) -> str:
    plan = comparison.plan.plans[rung.number - 1]
    trial = next(trial for trial in plan.folders if plan.at(trial) is plan)
    folder = comparison.plan.folder.joinpath(*Path(trial).parts[:2])
    here = Path.cwd()
    shown = folder.relative_to(here) if folder.is_relative_to(here) else folder
    return f'python compare_architectures.py {shlex.quote(str(shown))}'
