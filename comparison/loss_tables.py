"""The tables RANKING, VERDICT, TUNING, MAIN EFFECTS and INTERACTIONS."""

from common.dict_option import short_name, text_of
from common.formatting import join_names, nats, or_dash, p_text, wrapped
from comparison.analysis import BASELINE, CorrectedTest, Verdict
from comparison.compare import Comparison
from comparison.groups import Group, Metric
from comparison.headline import outcomes_text, verdict_text
from comparison.noise import PRIOR_FREEDOM
from comparison.runs import FINISHED, Run
from comparison.section import Section
from comparison.significance import ALPHA, CONFIDENCE, Difference
from comparison.study_plan import StudyPlan

INTERVAL = f'{CONFIDENCE:.0%} interval'


def ranking_section(comparison: Comparison) -> Section:
    groups, baseline = comparison.groups, comparison.baseline
    repeated, judged_by_best = comparison.repeated, comparison.score == 'best'
    unfinished = any(not group.finished for group in groups)
    other = _other_score(comparison)
    rows = []
    for rank, (group, label) in enumerate(zip(groups, comparison.labels), 1):
        row = [str(rank), or_dash(group.loss, nats, 'none')]
        if repeated:
            row += [half_interval_text(group), _seed_count(group)]
        row.append(_difference_text(group, baseline))
        row += [or_dash(group.mean(other), nats)] if other else []
        row.append(or_dash(group.mean(lambda run: run.bits_per_byte), nats))
        row += [status_text(group)] if unfinished else []
        rows.append([*row, label])
    # The name is the last column: it may be long, and terminals wrap it.
    spread = ['+/-', 'seeds'] if repeated else []
    others = ['final' if judged_by_best else 'best'] if other else []
    header = ['#', 'val loss', *spread, f'vs #{comparison.baseline_rank}', *others, 'bits/byte']
    header += [*(['status'] if unfinished else []), 'architecture']
    kind = 'best' if judged_by_best else 'final'
    title = f'RANKING by {kind} validation loss, in nats per token (lower is better)'
    if repeated:
        title = f'RANKING by {kind} validation loss, nats per token: mean over seeds, {INTERVAL}'
    align = '>>' + '>>' * repeated + '>' + '>' * bool(other) + '>' + '<' * unfinished + '<'
    return Section(title, _ranking_notes(comparison), header, rows, align)


def _ranking_notes(comparison: Comparison) -> list[str]:
    notes = []
    if len(comparison.groups) > 1:
        notes.append(
            f'Baseline: #{comparison.baseline_rank} {comparison.baseline_label}, '
            f'{comparison.baseline_reason}.'
        )
        if comparison.baseline.loss is None:
            notes.append('The baseline has no validation loss.')
    if comparison.score == 'best':
        notes.append(
            'The best of several evaluations is biased low, and more so the more evaluations '
            'there are.'
        )
    notes += comparison.notes
    if comparison.loss_warnings:
        notes.append('These losses are not directly comparable: see WARNINGS.')
    return notes


def _other_score(comparison: Comparison) -> Metric | None:
    """The best loss next to the final one, or the reverse; None if they are equal."""
    runs = [run for group in comparison.groups for run in group.scored_runs]
    if all(not run.curve or run.curve[-1].loss == run.best_val_loss for run in runs):
        return None
    if comparison.score == 'best':
        return lambda run: run.curve[-1].loss if run.curve else None
    return lambda run: run.best_val_loss


def _seed_count(group: Group) -> str:
    finished, count = group.outcomes[FINISHED], len(group.runs)
    return str(count) if finished == count else f'{finished}/{count}'


def _difference_text(group: Group, baseline: Group) -> str:
    if group is baseline:
        return 'baseline'
    if group.loss is None or baseline.loss is None:
        return '-'
    return f'{group.loss - baseline.loss:+.4f}'


def half_interval_text(group: Group) -> str:
    estimate = group.estimate
    if estimate is None or estimate.low is None or estimate.high is None:
        return '-'
    return nats((estimate.high - estimate.low) / 2)


def status_text(group: Group) -> str:
    """`finished`, the outcomes of the other runs, or the progress of a single run."""
    if len(group.runs) == 1:
        run = group.runs[0]
        return f'{outcomes_text(group)} {run.iters_done}/{or_dash(run.max_iters, str)}'
    _, _, others = outcomes_text(group).partition(', ')
    return others or FINISHED


def verdicts_section(comparison: Comparison) -> Section | None:
    if not comparison.repeated or len(comparison.groups) < 2:
        return None
    margin = comparison.margin is not None
    rows, reasons = [], []
    for rank, verdict in enumerate(comparison.verdicts, 1):
        if verdict.text == BASELINE:
            continue
        if verdict.reasons:
            line = f'#{rank} {verdict.text}: {"; ".join(verdict.reasons)}.'
            reasons.append(wrapped(line, '   '))
        rows.append([str(rank), *verdict_cells(verdict, margin)])
    header = ['#', *verdict_header(margin)]
    title = f'VERDICT against #{comparison.baseline_rank}'
    notes = _verdict_notes(comparison)
    return Section(title, notes, header, rows, '><' + '>' * (len(header) - 2), reasons)


def verdict_header(margin: bool) -> list[str]:
    header = ['verdict', 'difference', 'interval', 'level', 'p', *['p equal'] * margin]
    return [*header, 'noise', 'detectable', 'seeds']


def verdict_cells(verdict: Verdict, margin: bool) -> list[str]:
    """A verdict and its corrected test. margin: whether there is a margin of equivalence."""
    test = verdict.test
    return [
        verdict_text(verdict),
        or_dash(test, lambda t: f'{t.difference.mean:+.4f}'),
        or_dash(test, lambda t: f'{t.interval.low:+.4f} {t.interval.high:+.4f}'),
        or_dash(test, lambda t: f'{t.interval.confidence:.1%}'),
        or_dash(test, lambda t: p_text(t.p_value)),
        *[or_dash(verdict.equivalence_p_value, p_text)] * margin,
        or_dash(test, lambda t: nats(t.difference.noise)),
        or_dash(test, lambda t: nats(t.detectable)),
        or_dash(test, lambda t: _counts_text(t.difference)),
    ]


def _counts_text(difference: Difference) -> str:
    group, baseline = difference.counts
    if difference.paired:
        return f'{group} pairs'
    return f'{group} each' if group == baseline else f'{group} and {baseline}'


def equivalence_note(margin: float) -> str:
    """The meaning of the column `p equal`. margin: in nats per token."""
    return (
        f'p equal: p-value of the hypothesis that the true difference is at least {margin:g} nats '
        f'(two one-sided tests).'
    )


FEW_SEEDS = 3  # fewer are pointed out


def _verdict_notes(comparison: Comparison) -> list[str]:
    tests = [v.test.difference for v in comparison.verdicts if v.test is not None]
    if not tests:
        return []
    pairs = 'the pairs that share seeds' if all(t.paired for t in tests) else 'all runs'
    others = ''
    if len(comparison.groups) > 2:
        others = (
            f'; the noise of the other architectures adds at most {PRIOR_FREEDOM} degrees of '
            'freedom'
        )
    several = f'corrected for {len(tests)} comparisons (Holm)'
    correction = f' p is {several}; each interval has the confidence level of its test.' * (
        len(tests) > 1
    )
    notes = [
        f"Student's t-test of {pairs}{others}.{correction} noise: standard deviation of the "
        'difference within one pair of runs. detectable: the smallest true difference that such a '
        'test finds with 80% probability, if the noise is as estimated.'
    ]
    if min(min(t.counts) for t in tests) < FEW_SEEDS:
        notes.append(
            'Two seeds are a poor estimate of the noise: add seeds before you rely on a difference.'
        )
    if comparison.margin is not None:
        notes.append(equivalence_note(comparison.margin))
    return notes


def tuning_section(comparison: Comparison) -> Section | None:
    """The tuned options of each variant of a study."""
    plan = comparison.study
    if plan is None or not plan.tuned:
        return None
    rows, edges = [], []
    for rank, (group, label) in enumerate(zip(comparison.groups, comparison.labels), 1):
        rows.append([str(rank), *tuned_cells(plan, group.runs[0]), label])
        if at_edge := plan.at_edge.get(group.runs[0].variant or ''):
            edges.append(f'#{rank} {join_names(at_edge)}')
    notes = tuning_notes(edges)
    header = ['#', *map(short_name, plan.tuned), 'architecture']
    return Section('TUNING', notes, header, rows, '>' * (1 + len(plan.tuned)) + '<')


def tuned_cells(plan: StudyPlan, run: Run) -> list[str]:
    """The value of each tuned option that the variant of a run chose."""
    tuned_values = {key: run.config.get(key) for key in plan.tuned}
    tuned_values |= plan.tuning.get(run.variant or '', {})
    return [or_dash(tuned_values[key], str) for key in plan.tuned]


def tuning_notes(at_edge: list[str]) -> list[str]:
    """at_edge: who chose a value at the end of its list, with the names of those options."""
    notes = [
        'Each architecture was trained with the best of the values that the study tried for it.'
    ]
    if at_edge:
        notes.append(
            f'At the end of the list, so a value beyond it may be better: {"; ".join(at_edge)}.'
        )
    return notes


def effects_section(comparison: Comparison) -> Section | None:
    if not comparison.effects:
        return None
    rows = [
        [
            short_name(effect.option),
            text_of(effect.value),
            text_of(effect.against),
            *difference_cells(correction, effect.mean),
            str(effect.pairs),
        ]
        for effect, correction in comparison.effects
    ]
    notes = [
        'Effect of each value on the loss, over all pairs of runs that differ only in it. The mean '
        'over all pairs of one seed is one observation.'
    ]
    header = ['option', 'value', 'against', 'difference', 'interval', 'p', 'pairs']
    return Section('MAIN EFFECTS', notes, header, rows, '<<<>>>>')


def interactions_section(comparison: Comparison) -> Section | None:
    if not comparison.interactions:
        return None
    significant = [
        (interaction, correction)
        for interaction, correction in comparison.interactions
        if correction is not None and correction.p_value < ALPHA
    ]
    if not significant:
        line = 'No significant interaction between two options.'
        return Section('INTERACTIONS', lines=[line])
    rows = [
        [
            *(
                f'{short_name(option)}={text_of(value)}'
                for option, value in zip(interaction.options, interaction.values)
            ),
            *difference_cells(correction, interaction.mean),
        ]
        for interaction, correction in significant
    ]
    notes = ['Loss of both values together minus the sum of their separate effects.']
    header = ['with', 'and', 'difference', 'interval', 'p']
    return Section('INTERACTIONS', notes, header, rows, '<<>>>')


def difference_cells(correction: CorrectedTest | None, mean: float | None) -> list[str]:
    """The difference, its interval and its p-value."""
    if correction is None:
        return [or_dash(mean, '{:+.4f}'.format), '-', '-']
    interval = correction.interval
    bounds = f'{interval.low:+.4f} {interval.high:+.4f}'
    return [f'{correction.difference.mean:+.4f}', bounds, p_text(correction.p_value)]
