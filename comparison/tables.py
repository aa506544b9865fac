"""A comparison as sections of titled tables, in no particular format."""

from collections.abc import Callable

from common.formatting import WIDTH, or_dash, table, wrapped
from comparison.compare import Comparison
from comparison.cost_tables import cost_section, cost_to_baseline_section, equal_cost_section
from comparison.costs import mean_loss_by_position
from comparison.groups import Group
from comparison.headline import headline
from comparison.loss_tables import (
    effects_section,
    interactions_section,
    ranking_section,
    tuning_section,
    verdicts_section,
)
from comparison.runs import DIVERGED
from comparison.section import Section
from comparison.warning_lines import options_with_ranks, warning_lines

TABLE_RUNS = 6  # with more groups, options are listed by value instead of in a table
GROWTH = 2.0  # of the gradient norm; larger growth is reported


def sections(comparison: Comparison) -> list[Section]:
    """All sections; the answer comes first, and with several seeds again at the end."""
    answer = [Section(wrapped(headline(comparison)))]
    last = [Section(wrapped(f'ANSWER: {headline(comparison)}'))] if comparison.repeated else []
    return [*answer, *tables(comparison), *last]


def tables(comparison: Comparison) -> list[Section]:
    parts: tuple[Callable[[Comparison], Section | None], ...] = (
        ranking_section,
        verdicts_section,
        tuning_section,
        cost_section,
        equal_cost_section,
        cost_to_baseline_section,
        effects_section,
        interactions_section,
        positions_section,
        samples_section,
        stability_section,
        options_section,
        warnings_section,
        single_seeds_section,
    )
    return [section for part in parts if (section := part(comparison))]


# --- Positions, samples, stability ---------------------------------------------------------------


def positions_section(comparison: Comparison) -> Section | None:
    losses = [mean_loss_by_position(group) for group in comparison.groups]
    spans = sorted({span for by_span in losses for span in by_span})
    if not spans:
        return None
    names = [f'{start}-{end - 1}' if end - start > 1 else f'{start}' for start, end in spans]
    rows = [
        [str(rank), *(or_dash(by_span.get(span), '{:.3f}'.format) for span in spans)]
        for rank, by_span in enumerate(losses, 1)
    ]
    notes = ['Mean validation loss at these positions of the context, counted from 0.']
    return Section('LOSS BY POSITION', notes, ['#', *names], rows, '>' * (1 + len(spans)))


def samples_section(comparison: Comparison) -> Section | None:
    texts = []
    for rank, (group, label) in enumerate(zip(comparison.groups, comparison.labels), 1):
        sample = sample_of(group)
        if sample is not None:
            heading = f'#{rank} {label}, after {sample["iter"]:,} iterations'
            texts.append((heading, sample['prompt'] + sample['text']))
    if not texts:
        return None
    notes = [
        'Text generated at the last evaluation, one seed per architecture (see sample_interval).'
    ]
    return Section('SAMPLES', notes, texts=texts)


def sample_of(group: Group) -> dict | None:
    return next((run.sample for run in group.runs if run.sample), None)


def stability_section(comparison: Comparison) -> Section | None:
    rows = []
    for rank, group in enumerate(comparison.groups, 1):
        totals = [run.stability for run in group.runs]
        spikes, nonfinite, rollbacks = (sum(counts) for counts in list(zip(*totals))[:3])
        growth = group.mean(lambda run: run.stability.gradient_growth)
        diverged = group.outcomes[DIVERGED]
        if diverged or spikes or nonfinite or rollbacks or (growth or 0) > GROWTH:
            share = f'{diverged} of {len(group.runs)}'
            counts = [str(spikes), str(nonfinite), str(rollbacks)]
            rows.append([str(rank), share, *counts, or_dash(growth, '{:.2f}x'.format)])
    if not rows:
        return None
    notes = [
        'Totals over all seeds. gradient: mean norm in the last quarter of the log over that in '
        'the second quarter.'
    ]
    header = ['#', 'diverged', 'loss spikes', 'non-finite', 'rollbacks', 'gradient']
    return Section('STABILITY', notes, header, rows, '>>>>>>')


# --- Options and warnings ------------------------------------------------------------------------


def options_section(comparison: Comparison) -> Section | None:
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
        return Section('OPTIONS THAT DIFFER', lines=[options_with_ranks(values)])
    return Section('OPTIONS THAT DIFFER', [], header, rows, align)


def warnings_section(comparison: Comparison) -> Section | None:
    lines = warning_lines(comparison)
    return Section('WARNINGS', lines=lines) if lines else None


def single_seeds_section(comparison: Comparison) -> Section | None:
    """A note on the uncertainty of a ranking with one seed each."""
    if len(comparison.groups) < 2 or comparison.repeated:
        return None
    hashes = [group.runs[0].architecture_hash for group in comparison.groups]
    why = 'One seed per architecture'
    if len(set(hashes)) < len(hashes):
        why = 'No two runs differ only in their seeds'
    return Section(
        wrapped(
            f'{why}: the ranking has no error bar, and differences may be due to chance. Train '
            'again with --seed=2 --data_seed=2, and with 3, for a test of significance.'
        )
    )
