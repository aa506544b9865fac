"""A comparison as sections of titled tables, whatever their format."""

from dataclasses import dataclass, field

from common.formatting import (
    WIDTH,
    duration,
    join_names,
    nats,
    or_dash,
    p_text,
    si,
    table,
    wrapped,
)
from comparison.analysis import BASELINE, DIVERGED, FINISHED, Corrected, Group
from comparison.compare import Comparison
from comparison.costs import COSTS, mean_by_position
from comparison.headline import headline, outcomes_text, verdict_text
from comparison.noise import PRIOR_FREEDOM
from comparison.significance import ALPHA, CONFIDENCE
from comparison.warning_lines import grouped, warning_lines

TABLE_RUNS = 6  # more rows than this and options are grouped by value instead of tabulated
GROWTH = 2.0  # of the gradient norm, from which on it is shown
INTERVAL = f'{CONFIDENCE:.0%} interval'


@dataclass(frozen=True)
class Section:
    """A title, what it means, and a table, lines or texts."""

    title: str
    notes: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    align: str = ''  # '<' or '>' for each column
    lines: list[str] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)  # headings and what is below them


def sections(comparison: Comparison) -> list[Section]:
    """All that there is to say; the answer comes first, and once more at the end."""
    answer = [Section(wrapped(headline(comparison)))]
    last = [Section(wrapped(f'ANSWER: {headline(comparison)}'))] if comparison.repeated else []
    return [*answer, *tables(comparison), *last]


def tables(comparison: Comparison) -> list[Section]:
    parts = (
        ranking,
        verdicts,
        tuning,
        cost,
        equal_cost,
        effects,
        dependences,
        by_position,
        samples,
        trouble,
        options,
        warnings,
        single_seeds,
    )
    return [section for part in parts if (section := part(comparison))]


# --- Losses --------------------------------------------------------------------------------------


def ranking(comparison: Comparison) -> Section:
    groups, baseline = comparison.groups, comparison.baseline
    repeated, judged_by_best = comparison.repeated, comparison.score == 'best'
    unfinished = any(not group.finished for group in groups)
    other = _other_score(comparison)
    rows = []
    for rank, (group, label) in enumerate(zip(groups, comparison.labels), 1):
        row = [str(rank), or_dash(group.loss, nats, 'none')]
        if repeated:
            row += [interval_half(group), _seeds(group)]
        row.append(_against_baseline(group, baseline))
        row += [or_dash(group.mean(other), nats)] if other else []
        row.append(or_dash(group.mean(lambda run: run.bits_per_byte), nats))
        row += [status(group)] if unfinished else []
        rows.append([*row, label])
    # The name comes last: its length varies, and a terminal may cut it.
    spread = ['+/-', 'seeds'] if repeated else []
    others = ['final' if judged_by_best else 'best'] if other else []
    header = ['#', 'val loss', *spread, f'vs #{comparison.baseline_rank}', *others, 'bits/byte']
    header += [*(['status'] if unfinished else []), 'architecture']
    kind = 'best' if judged_by_best else 'final'
    title = f'RANKING by {kind} validation loss, in nats a token (lower is better)'
    if repeated:
        title = f'RANKING by {kind} validation loss, nats a token: mean over seeds, {INTERVAL}'
    align = '>>' + '>>' * repeated + '>' + '>' * bool(other) + '>' + '<' * unfinished + '<'
    return Section(title, _ranking_notes(comparison), header, rows, align)


def _ranking_notes(comparison: Comparison) -> list[str]:
    notes = []
    if len(comparison.groups) > 1:
        notes.append(
            f'Differences are to #{comparison.baseline_rank} {comparison.baseline_label}: '
            f'{comparison.baseline_reason}.'
        )
        if comparison.baseline.loss is None:
            notes.append('The baseline has no validation loss.')
    if comparison.score == 'best':
        notes.append(
            'The best of several evaluations is lower than a new one of that model would be, and '
            'the more evaluations there are, the lower.'
        )
    notes += comparison.notes
    if comparison.loss_warnings:
        notes.append('These losses are not directly comparable: see WARNINGS.')
    return notes


def _other_score(comparison: Comparison):
    """The final loss beside the best, or the best beside the final, where they differ."""
    runs = [run for group in comparison.groups for run in group.evidence]
    if all(not run.curve or run.curve[-1].loss == run.best_val_loss for run in runs):
        return None
    if comparison.score == 'best':
        return lambda run: run.curve[-1].loss if run.curve else None
    return lambda run: run.best_val_loss


def _seeds(group: Group) -> str:
    finished, count = group.outcomes[FINISHED], len(group.members)
    return str(count) if finished == count else f'{finished}/{count}'


def _against_baseline(group: Group, baseline: Group) -> str:
    if group is baseline:
        return 'baseline'
    if group.loss is None or baseline.loss is None:
        return '-'
    return f'{group.loss - baseline.loss:+.4f}'


def interval_half(group: Group) -> str:
    estimate = group.estimate
    if estimate is None or estimate.low is None:
        return '-'
    return nats((estimate.high - estimate.low) / 2)


def status(group: Group) -> str:
    """`finished`, what became of the others, or how far a single run came."""
    if len(group.members) == 1:
        run = group.members[0]
        return f'{outcomes_text(group)} {run.iters_done}/{or_dash(run.max_iters, str)}'
    _, _, others = outcomes_text(group).partition(', ')
    return others or FINISHED


def verdicts(comparison: Comparison) -> Section | None:
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
        test, interval = verdict.difference, verdict.interval
        rows.append(
            [
                str(rank),
                verdict_text(verdict),
                or_dash(test, lambda t: f'{t.mean:+.4f}'),
                or_dash(interval, lambda i: f'{i.low:+.4f} {i.high:+.4f}'),
                or_dash(interval, lambda i: f'{i.confidence:.1%}'),
                or_dash(verdict.p_value, p_text),
                *[or_dash(verdict.equivalence_p_value, p_text)] * margin,
                or_dash(test, lambda t: nats(t.noise)),
                or_dash(verdict.detectable, nats),
                or_dash(test, lambda t: _counts(t.counts, t.paired)),
            ]
        )
    header = ['#', 'verdict', 'difference', 'interval', 'level', 'p', *['p equal'] * margin]
    header += ['noise', 'detectable', 'seeds']
    title = f'VERDICT against #{comparison.baseline_rank}'
    notes = _verdict_notes(comparison)
    return Section(title, notes, header, rows, '><>>>>' + '>' * margin + '>>>', reasons)


def _counts(counts: tuple[int, int], paired: bool) -> str:
    if paired:
        return f'{counts[0]} pairs'
    return f'{counts[0]} each' if counts[0] == counts[1] else f'{counts[0]} and {counts[1]}'


def _verdict_notes(comparison: Comparison) -> list[str]:
    tests = [v.difference for v in comparison.verdicts if v.difference is not None]
    if not tests:
        return []
    pairs = 'the pairs that share seeds' if all(t.paired for t in tests) else 'all runs'
    others = ''
    if len(comparison.groups) > 2:
        others = (
            f', with the noise of the other architectures as up to {PRIOR_FREEDOM} degrees of '
            'freedom more'
        )
    several = f'corrected for {len(tests)} comparisons (Holm)'
    correction = f' p is {several}; each interval has the level of its test.' * (len(tests) > 1)
    notes = [
        f"Student's t-test of {pairs}{others}.{correction} noise: standard deviation of the "
        'difference of one pair of runs. detectable: the smallest true difference that this many '
        'seeds and comparisons find four times in five, if the noise is as estimated here.'
    ]
    if comparison.margin is not None:
        notes.append(
            f'p equal: of the hypothesis that the true difference is {comparison.margin:g} nats or '
            'more (two one-sided tests).'
        )
    return notes


def tuning(comparison: Comparison) -> Section | None:
    """What each variant of a study chose for itself."""
    plan = comparison.study
    if plan is None or not plan.tuned:
        return None
    rows, edges = [], []
    for rank, (group, label) in enumerate(zip(comparison.groups, comparison.labels), 1):
        run = group.members[0]
        chosen = {key: run.config.get(key) for key in plan.tuned}
        chosen |= plan.tuning.get(run.variant, {})
        rows.append([str(rank), *(or_dash(chosen[key], str) for key in plan.tuned), label])
        if at_edge := plan.at_edge.get(run.variant):
            edges.append(f'#{rank} {join_names(at_edge)}')
    notes = ['Each architecture trained with its own best of the values that the study tried.']
    if edges:
        notes.append(
            f'At the end of its list, so that a value beyond it may be better: {"; ".join(edges)}.'
        )
    header = ['#', *plan.tuned, 'architecture']
    return Section('TUNING', notes, header, rows, '>' * (1 + len(plan.tuned)) + '<')


# --- Costs ---------------------------------------------------------------------------------------


def cost(comparison: Comparison) -> Section:
    firsts = [group.members[0] for group in comparison.groups]
    columns = [('params', lambda run: run.params, si)]
    # Where a token goes through all of the model, its active parameters say nothing new.
    if any(run.active_params != run.params for run in firsts):
        columns.append(('active', lambda run: run.active_params, si))
    columns.append(('FLOPs/token', lambda run: run.causal_flops_per_token, si))
    notes = []
    if comparison.concurrent == 1:
        columns += [
            ('MFU', lambda run: run.mfu_percent, '{:.2f}%'.format, _peak_seconds),
            ('tokens/s', lambda run: run.tokens_per_sec, '{:,.0f}'.format, _seconds),
            ('ms/iter', lambda run: run.time_ms, '{:,.1f}'.format),
            ('wall', lambda run: run.wall_seconds, duration),
        ]
    else:
        notes.append(f'Trained {comparison.concurrent} at a time: times are not compared.')
    columns.append(('peak GB', lambda run: run.peak_memory_gb, '{:.2f}'.format))
    rows = [
        [
            str(rank),
            *(or_dash(group.mean(figure, *weight), form) for _, figure, form, *weight in columns),
        ]
        for rank, group in enumerate(comparison.groups, 1)
    ]
    header = ['#', *(name for name, *_ in columns)]
    if comparison.repeated and any(comparison.fronts):
        header.append('front')
        rows = [[*row, front or '-'] for row, front in zip(rows, comparison.fronts)]
        drawn = set(''.join(comparison.fronts))
        meanings = [
            f'{title.split(",")[0].removesuffix(" of training").removeprefix("peak ")} ({letter})'
            for letter, (title, _) in comparison.front_costs.items()
            if letter in drawn
        ]
        notes.append(f'front: no other has a lower loss for as little {", ".join(meanings)}.')
    header.append('architecture' if comparison.repeated else 'run')
    names = [run.architecture if comparison.repeated else str(run.folder) for run in firsts]
    rows = [[*row, name] for row, name in zip(rows, names)]
    title = 'COST (training FLOPs, with attention over its causal half; MFU counts the full square)'
    return Section(title, notes, header, rows, '>' * (len(header) - 1) + '<')


def _seconds(run) -> float | None:
    """What a rate of several runs is weighted by, so that their mean is a total over a total."""
    return run.train_seconds


def _peak_seconds(run) -> float | None:
    return run.train_seconds and run.train_seconds * (run.peak_tflops or 1.0)


def equal_cost(comparison: Comparison) -> Section | None:
    if not comparison.equal_cost:
        return None
    amounts = {'tokens': si, 'flops': si, 'seconds': duration}
    units = {**COSTS, 'seconds': 'of training'}
    header = [f'{amounts[c.cost](c.amount)} {units[c.cost]}' for c in comparison.equal_cost]
    rows = [
        [str(rank), *(or_dash(c.losses[rank - 1], nats) for c in comparison.equal_cost)]
        for rank in range(1, len(comparison.groups) + 1)
    ]
    notes = [
        'The losses at the most that all have spent, straight between evaluations. A run whose '
        'schedule goes on beyond that is not at its best there.'
    ]
    return Section('LOSS AT EQUAL COST', notes, ['#', *header], rows, '>' * (1 + len(header)))


# --- The grid of a study -------------------------------------------------------------------------


def effects(comparison: Comparison) -> Section | None:
    if not comparison.effects:
        return None
    rows = [
        [
            effect.option,
            str(effect.value),
            str(effect.against),
            *difference_cells(correction, effect.mean),
            str(effect.pairs),
        ]
        for effect, correction in comparison.effects
    ]
    notes = [
        'What each value does to the loss, over all pairs of runs that differ in it alone; the '
        'mean of a seed is one observation.'
    ]
    header = ['option', 'value', 'against', 'difference', 'interval', 'p', 'pairs']
    return Section('MAIN EFFECTS', notes, header, rows, '<<<>>>>')


def dependences(comparison: Comparison) -> Section | None:
    if not comparison.interactions:
        return None
    significant = [
        (interaction, correction)
        for interaction, correction in comparison.interactions
        if correction is not None and correction.p_value < ALPHA
    ]
    if not significant:
        line = 'No effect can be shown to depend on another option.'
        return Section('INTERACTIONS', lines=[line])
    rows = [
        [
            f'{interaction.options[0]}={interaction.values[0]}',
            f'{interaction.options[1]}={interaction.values[1]}',
            *difference_cells(correction, interaction.mean),
        ]
        for interaction, correction in significant
    ]
    notes = ['How much more (+) or less (-) loss the two together make than the sum of each alone.']
    header = ['with', 'and', 'difference', 'interval', 'p']
    return Section('INTERACTIONS', notes, header, rows, '<<>>>')


def difference_cells(correction: Corrected | None, mean: float | None) -> list[str]:
    """The difference, its interval and its p-value."""
    if correction is None:
        return [or_dash(mean, '{:+.4f}'.format), '-', '-']
    interval = correction.interval
    bounds = f'{interval.low:+.4f} {interval.high:+.4f}'
    return [f'{correction.difference.mean:+.4f}', bounds, p_text(correction.p_value)]


# --- What else the records hold ------------------------------------------------------------------


def by_position(comparison: Comparison) -> Section | None:
    losses = [mean_by_position(group) for group in comparison.groups]
    places = sorted({place for by_place in losses for place in by_place})
    if not places:
        return None
    spans = [f'{a}-{b - 1}' if b - a > 1 else f'{a}' for a, b in places]
    rows = [
        [str(rank), *(or_dash(by_place.get(place), '{:.3f}'.format) for place in places)]
        for rank, by_place in enumerate(losses, 1)
    ]
    notes = ['Mean validation loss at these positions of the context, the first being 0.']
    return Section('LOSS BY POSITION', notes, ['#', *spans], rows, '>' * (1 + len(spans)))


def samples(comparison: Comparison) -> Section | None:
    texts = []
    for rank, (group, label) in enumerate(zip(comparison.groups, comparison.labels), 1):
        sample = sample_of(group)
        if sample is not None:
            heading = f'#{rank} {label}, after {sample["iter"]:,} iterations'
            texts.append((heading, sample['prompt'] + sample['text']))
    if not texts:
        return None
    notes = ['What each wrote at its last evaluation, one seed of each; see sample_interval.']
    return Section('SAMPLES', notes, texts=texts)


def sample_of(group: Group) -> dict | None:
    return next((run.sample for run in group.members if run.sample), None)


def trouble(comparison: Comparison) -> Section | None:
    rows = []
    for rank, group in enumerate(comparison.groups, 1):
        runs = [run.stability for run in group.members]
        spikes, nonfinite, rollbacks = (sum(counts) for counts in list(zip(*runs))[:3])
        growth = group.mean(lambda run: run.stability.gradient_growth)
        diverged = group.outcomes[DIVERGED]
        if diverged or spikes or nonfinite or rollbacks or (growth or 0) > GROWTH:
            share = f'{diverged} of {len(group.members)}'
            counts = [str(spikes), str(nonfinite), str(rollbacks)]
            rows.append([str(rank), share, *counts, or_dash(growth, '{:.2f}x'.format)])
    if not rows:
        return None
    notes = [
        'Over all seeds. gradient: its norm in the last quarter of the log against the second.'
    ]
    header = ['#', 'diverged', 'loss spikes', 'non-finite updates', 'rollbacks', 'gradient']
    return Section('STABILITY', notes, header, rows, '>>>>>>')


# --- What differs --------------------------------------------------------------------------------


def options(comparison: Comparison) -> Section | None:
    values, count = comparison.options, len(comparison.groups)
    if count < 2:
        return None
    if not values:
        return Section('OPTIONS THAT DIFFER: none')
    header, rows = ['option', *(f'#{rank}' for rank in range(1, count + 1))], []
    for key, by_text in values.items():
        texts: dict[int, list[str]] = {}
        for text, ranks in by_text.items():
            for rank in ranks:
                texts.setdefault(rank, []).append(text)
        rows.append([key, *(' or '.join(texts[rank]) for rank in range(1, count + 1))])
    align = '<' * len(header)
    if count > TABLE_RUNS or max(map(len, table([header, *rows], align).splitlines())) > WIDTH:
        return Section('OPTIONS THAT DIFFER', lines=[grouped(values)])
    return Section('OPTIONS THAT DIFFER', [], header, rows, align)


def warnings(comparison: Comparison) -> Section | None:
    lines = warning_lines(comparison)
    return Section('WARNINGS', lines=lines) if lines else None


def single_seeds(comparison: Comparison) -> Section | None:
    """How far a ranking without repetition can be believed."""
    if len(comparison.groups) < 2 or comparison.repeated:
        return None
    hashes = [group.members[0].architecture_hash for group in comparison.groups]
    what = 'One seed per architecture'
    if len(set(hashes)) < len(hashes):
        what = 'No two runs differ in their seeds alone'
    return Section(
        wrapped(
            f'{what}: the ranking has no error bar, and a difference may be chance. Several seeds '
            'of each give one: train again with --seed=2, then --seed=3.'
        )
    )
