"""A comparison as sections of titled tables, and these as plain text, Markdown, CSV or JSON."""

import csv
import io
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from console import first_lines
from evidence import CONFIDENCE, Difference
from judgement import COSTS, Group, mean_by_position

if TYPE_CHECKING:
    from compare_architectures import Comparison, Values

WIDTH = 100  # columns that the text aims at
TABLE_RUNS = 6  # more rows than this and options are grouped by value instead of tabulated
LISTED = 8  # as many names or values as one line lists
GROWTH = 2.0  # of the gradient norm, from which on it is told
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


def sections(comparison: 'Comparison') -> list[Section]:
    """All that there is to say, the most important first."""
    return [*summary(comparison), *tables(comparison)]


def summary(comparison: 'Comparison') -> list[Section]:
    """The answer in a sentence, where there are seeds to give one."""
    return [Section(wrapped(headline(comparison)))] if comparison.repeated else []


def tables(comparison: 'Comparison') -> list[Section]:
    parts = (
        ranking,
        verdicts,
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
    return [section for section in (part(comparison) for part in parts) if section]


def headline(comparison: 'Comparison') -> str:
    """What the runs say, in a sentence or two."""
    groups, labels, baseline = comparison.groups, comparison.labels, comparison.baseline
    name = labels[groups.index(baseline)]
    ranked = [
        (group, label, verdict)
        for group, label, verdict in zip(groups, labels, comparison.verdicts)
        if group.finished and group.loss is not None
    ]
    if not ranked:
        return 'No finished run has a validation loss yet.'
    best, best_label, _ = ranked[0]
    if len(ranked) == 1:
        return f'{best_label} reaches a validation loss of {best.loss:.4f} nats a token.'
    if not comparison.repeated:
        second = ranked[1]
        return (
            f'{best_label} has the lowest validation loss, {best.loss:.4f} against '
            f'{second[0].loss:.4f} of {second[1]}. With one seed each, this may be chance.'
        )
    better = [entry for entry in ranked if entry[2].text == 'better']
    worse = [label for _, label, verdict in ranked if verdict.text == 'worse']
    alike = [entry for entry in ranked if entry[2].text == 'not told apart']
    parts = []
    for _, label, verdict in better[:1]:
        test = verdict.difference
        parts.append(
            f'{label} is better than {name} by {-test.mean:.4f} nats a token ({INTERVAL} '
            f'{-test.high:.4f} to {-test.low:.4f}, p {p_text(verdict.p_value)}, {test.count} '
            f'{"pairs of " * test.paired}seeds).'
        )
    if len(better) > 1:
        verb = 'is' if len(better) == 2 else 'are'
        parts.append(f'So {verb} {listing([label for _, label, _ in better[1:]])}.')
    if worse:
        parts.append(f'Worse than {name}: {listing(worse)}.')
    if alike:
        missed = sorted({f'{verdict.detectable:.4f}' for _, _, verdict in alike}, key=float)
        names = listing([label for _, label, _ in alike])
        parts.append(
            f'Not told apart from {name}: {names}; true differences below '
            f'{" to ".join(dict.fromkeys([missed[0], missed[-1]]))} nats may well be missed with '
            f'so few seeds.'
        )
    return ' '.join(parts) or f'Nothing can be tested against {name} yet.'


def ranking(comparison: 'Comparison') -> Section:
    groups, baseline = comparison.groups, comparison.baseline
    number = groups.index(baseline) + 1
    unfinished = any(not group.finished for group in groups)
    repeated = comparison.repeated
    rows = []
    for rank, (group, label) in enumerate(zip(groups, comparison.labels), 1):
        loss = group.loss
        if group is baseline:
            difference = 'baseline'
        elif loss is None or baseline.loss is None:
            difference = '-'
        else:
            difference = f'{loss - baseline.loss:+.4f}'
        row = [str(rank), shown(loss, '{:.4f}'.format, 'none')]
        if repeated:
            row += [interval_half(group), str(len(group.losses))]
        row += [difference, shown(group.mean(lambda run: run.bits_per_byte), '{:.4f}'.format)]
        rows.append([*row, *[progress(group.members[0])] * unfinished, label])
    # The name comes last: its length varies, and a terminal may cut it.
    spread = ['+/-', 'seeds'] if repeated else []
    status = ['status'] * unfinished
    header = ['#', 'val loss', *spread, f'vs #{number}', 'bits/byte', *status, 'architecture']
    notes = []
    if len(groups) > 1:
        label, reason = comparison.labels[number - 1], comparison.baseline_reason
        notes.append(f'Differences are to #{number} {label}: {reason}.')
        if baseline.loss is None:
            notes.append('The baseline has no validation loss.')
    notes += comparison.notes
    if comparison.loss_warnings:
        notes.append('These losses are not like with like: see WARNINGS.')
    title = 'RANKING by best validation loss, in nats a token (lower is better)'
    if repeated:
        title = f'RANKING by best validation loss, nats a token: mean over seeds, {INTERVAL}'
    align = '>>' + '>>' * repeated + '>>' + '<' * unfinished + '<'
    return Section(title, notes, header, rows, align)


def verdicts(comparison: 'Comparison') -> Section | None:
    if not comparison.repeated:
        return None
    rows, tested = [], 0
    for rank, verdict in enumerate(comparison.verdicts, 1):
        test = verdict.difference
        tested += test is not None
        if verdict.group is comparison.baseline:
            continue
        rows.append(
            [
                str(rank),
                verdict.text,
                *difference_cells(test),
                shown(verdict.p_value, p_text),
                shown(test, lambda t: f'{t.noise:.4f}'),
                shown(verdict.detectable, '{:.4f}'.format),
                shown(test, lambda t: f'{t.count} {"pairs" if t.paired else "each"}'),
            ]
        )
    number = comparison.groups.index(comparison.baseline) + 1
    notes = [
        f"Student's t-test{' of the pairs that share seeds' * any_paired(comparison)}; p is "
        f'corrected for {tested} comparison{"s" * (tested != 1)} (Holm). noise: standard deviation '
        f'of one difference, from seed to seed. detectable: the smallest true difference that this '
        f'many seeds and comparisons find four times in five; a smaller one may well be missed.'
    ]
    header = ['#', 'verdict', 'difference', INTERVAL, 'p', 'noise', 'detectable', 'seeds']
    return Section(f'VERDICT against #{number}', notes, header, rows, '><>>>>>>')


def any_paired(comparison: 'Comparison') -> bool:
    return any(v.difference is not None and v.difference.paired for v in comparison.verdicts)


def cost(comparison: 'Comparison') -> Section:
    firsts = [group.members[0] for group in comparison.groups]
    columns = [('params', lambda run: run.params, si)]
    # Where a token goes through all of the model, its active parameters say nothing new.
    if any(run.active_params != run.params for run in firsts):
        columns.append(('active', lambda run: run.active_params, si))
    columns.append(('FLOPs/token', lambda run: run.flops_per_token, si))
    notes = []
    if comparison.concurrent == 1:
        columns += [
            ('MFU', lambda run: run.mfu_percent, '{:.2f}%'.format),
            ('tokens/s', lambda run: run.tokens_per_sec, '{:,.0f}'.format),
            ('ms/iter', lambda run: run.time_ms, '{:,.1f}'.format),
            ('wall', lambda run: run.wall_seconds, duration),
        ]
    else:
        notes.append(f'Trained {comparison.concurrent} at a time: times are not compared.')
    columns.append(('peak GB', lambda run: run.peak_memory_gb, '{:.2f}'.format))
    rows = [
        [str(rank), *(shown(group.mean(figure), form) for _, figure, form in columns)]
        for rank, group in enumerate(comparison.groups, 1)
    ]
    header = ['#', *(name for name, _, _ in columns)]
    if comparison.repeated:
        header.append('front')
        rows = [[*row, front or '-'] for row, front in zip(rows, comparison.fronts)]
        meanings = [
            f'{title.split(",")[0].removesuffix(" of training").removeprefix("peak ")} ({letter})'
            for letter, (title, _) in comparison.front_costs.items()
        ]
        notes.append(f'front: no other has a lower loss for as little {", ".join(meanings)}.')
    header.append('architecture' if comparison.repeated else 'run')
    names = [run.architecture if comparison.repeated else str(run.folder) for run in firsts]
    rows = [[*row, name] for row, name in zip(rows, names)]
    title = 'COST (training FLOPs; they and MFU count attention over the full square)'
    return Section(title, notes, header, rows, '>' * (len(header) - 1) + '<')


def equal_cost(comparison: 'Comparison') -> Section | None:
    if not comparison.equal_cost:
        return None
    amounts = {'tokens': si, 'flops': si, 'seconds': duration}
    units = {**COSTS, 'seconds': 'of training'}
    header = [f'{amounts[c.cost](c.amount)} {units[c.cost]}' for c in comparison.equal_cost]
    rows = [
        [str(rank), *(shown(c.losses[rank - 1], '{:.4f}'.format) for c in comparison.equal_cost)]
        for rank in range(1, len(comparison.groups) + 1)
    ]
    notes = [
        'The losses at the most that all have spent, straight between evaluations. A run whose '
        'schedule goes on beyond that is not at its best there.'
    ]
    return Section('LOSS AT EQUAL COST', notes, ['#', *header], rows, '>' * (1 + len(header)))


def effects(comparison: 'Comparison') -> Section | None:
    if not comparison.effects:
        return None
    rows = [
        [
            effect.option,
            str(effect.value),
            str(effect.against),
            *difference_cells(effect.difference, effect.mean),
            shown(p_value, p_text),
            str(effect.pairs),
        ]
        for effect, p_value in comparison.effects
    ]
    notes = ['What each value does to the loss, over all pairs of runs that differ in it alone.']
    header = ['option', 'value', 'against', 'difference', INTERVAL, 'p', 'pairs']
    return Section('MAIN EFFECTS', notes, header, rows, '<<<>>>>')


def dependences(comparison: 'Comparison') -> Section | None:
    told = [
        (found, p_value)
        for found, p_value in comparison.interactions
        if p_value is not None and p_value < 1 - CONFIDENCE
    ]
    if not comparison.interactions:
        return None
    if not told:
        line = 'None of the effects can be shown to depend on another option.'
        return Section('WHERE EFFECTS DEPEND ON ONE ANOTHER', lines=[line])
    rows = [
        [
            f'{found.options[0]}={found.values[0]}',
            f'{found.options[1]}={found.values[1]}',
            *difference_cells(found.difference, found.mean),
            shown(p_value, p_text),
        ]
        for found, p_value in told
    ]
    notes = ['How much more (+) or less (-) loss the two together make than the sum of each alone.']
    header = ['with', 'and', 'difference', INTERVAL, 'p']
    return Section('WHERE EFFECTS DEPEND ON ONE ANOTHER', notes, header, rows, '<<>>>')


def by_position(comparison: 'Comparison') -> Section | None:
    losses = [mean_by_position(group) for group in comparison.groups]
    places = sorted({place for found in losses for place in found})
    if not places:
        return None
    spans = [f'{a}-{b - 1}' if b - a > 1 else f'{a}' for a, b in places]
    rows = [
        [str(rank), *(shown(found.get(place), '{:.3f}'.format) for place in places)]
        for rank, found in enumerate(losses, 1)
    ]
    notes = ['Mean validation loss at these positions of the context, the first being 0.']
    return Section('LOSS BY POSITION', notes, ['#', *spans], rows, '>' * (1 + len(spans)))


def samples(comparison: 'Comparison') -> Section | None:
    texts = []
    for rank, (group, label) in enumerate(zip(comparison.groups, comparison.labels), 1):
        sample = sample_of(group)
        if sample is not None:
            told = f'#{rank} {label}, after {sample["iter"]:,} updates'
            texts.append((told, sample['prompt'] + sample['text']))
    if not texts:
        return None
    notes = ['What each wrote at its last evaluation, one seed of each; see sample_interval.']
    return Section('SAMPLES', notes, texts=texts)


def sample_of(group: Group) -> dict | None:
    return next((run.sample for run in group.members if run.sample), None)


def trouble(comparison: 'Comparison') -> Section | None:
    rows = []
    for rank, group in enumerate(comparison.groups, 1):
        found = [run.stability for run in group.members]
        spikes, nonfinite, rollbacks = (sum(counts) for counts in list(zip(*found))[:3])
        growth = group.mean(lambda run: run.stability.gradient_growth)
        if spikes or nonfinite or rollbacks or (growth or 0) > GROWTH:
            counts = [str(spikes), str(nonfinite), str(rollbacks)]
            rows.append([str(rank), *counts, shown(growth, '{:.2f}x'.format)])
    if not rows:
        return None
    notes = [
        'Over all seeds. gradient: its norm in the last quarter of the log against the second.'
    ]
    header = ['#', 'loss spikes', 'non-finite updates', 'rollbacks', 'gradient']
    return Section('STABILITY', notes, header, rows, '>>>>>')


def options(comparison: 'Comparison') -> Section | None:
    values, count = comparison.options, len(comparison.groups)
    if count < 2:
        return None
    if not values:
        return Section('OPTIONS THAT DIFFER: none')
    header, rows = ['option', *(f'#{rank}' for rank in range(1, count + 1))], []
    for key, by_text in values.items():
        text_of = {rank: text for text, having in by_text.items() for rank in having}
        rows.append([key, *(text_of[rank] for rank in range(1, count + 1))])
    align = '<' * len(header)
    if count > TABLE_RUNS or max(map(len, table([header, *rows], align).splitlines())) > WIDTH:
        return Section('OPTIONS THAT DIFFER', lines=[grouped(values)])
    return Section('OPTIONS THAT DIFFER', [], header, rows, align)


def warnings(comparison: 'Comparison') -> Section | None:
    lines = []
    if comparison.loss_warnings:
        lines += ['Losses are not like with like. Besides the architecture, these differ:']
        lines += [grouped(comparison.loss_warnings)]
        if {'tokenizer', 'vocab_size'} & comparison.loss_warnings.keys():
            lines += [
                'Across vocabularies, compare bits/byte (of the same text), not loss a token.'
            ]
    unfinished = [
        f'  #{rank} {group.members[0].name}: {progress(group.members[0])}'
        for rank, group in enumerate(comparison.groups, 1)
        if not group.finished
    ]
    if unfinished:
        lines += [
            'Unfinished: the loss is not the one at the end of training, so the rank may change.'
        ]
        lines += unfinished
    untrained = [rank for rank, group in enumerate(comparison.groups, 1) if group.loss is None]
    if untrained:
        lines += [f'Not ranked, no validation loss after an update: {numbers(untrained)}']
    if comparison.speed_warnings:
        lines += ['Time and memory are not like with like. Besides the architecture, these differ:']
        lines += [grouped(comparison.speed_warnings)]
    lines += [f'Skipped {line}' for line in comparison.skipped]
    return Section('WARNINGS', lines=lines) if lines else None


def single_seeds(comparison: 'Comparison') -> Section | None:
    """How far a ranking without repetition can be believed."""
    if len(comparison.groups) < 2 or comparison.repeated:
        return None
    return Section(
        wrapped(
            'One seed per architecture: the ranking has no error bar, and a difference may be '
            'chance. Several seeds of each give one: train again with --seed=2, then --seed=3.'
        )
    )


def difference_cells(test: Difference | None, mean: float | None = None) -> list[str]:
    """The difference and its interval."""
    if test is None:
        return [shown(mean, '{:+.4f}'.format), '-']
    return [f'{test.mean:+.4f}', f'{test.low:+.4f} {test.high:+.4f}']


def interval_half(group: Group) -> str:
    estimate = group.estimate
    if estimate is None or estimate.low is None:
        return '-'
    return f'{(estimate.high - estimate.low) / 2:.4f}'


def p_text(p_value: float) -> str:
    return '<0.0001' if p_value < 1e-4 else f'{p_value:.4f}'


# --- Formats -------------------------------------------------------------------------------------


def render(comparison: 'Comparison') -> str:
    """Plain text of about a hundred columns."""
    return '\n\n'.join(map(plain, sections(comparison))) + '\n'


def plain(section: Section) -> str:
    parts = [section.title, *map(wrapped, section.notes), *section.lines]
    if section.rows:
        parts.append(table([section.header, *section.rows], section.align))
    return '\n'.join([*parts, *shortened(section.texts)])


def shortened(texts: Sequence[tuple[str, str]]) -> list[str]:
    """The first of the texts, below their headings, as lines."""
    lines = []
    for heading, text in texts[:LISTED]:
        lines += [heading, *(f'    {line}'.rstrip() for line in first_lines(text, WIDTH - 4))]
    return lines + [f'and {len(texts) - LISTED} more'] * (len(texts) > LISTED)


def markdown(comparison: 'Comparison') -> str:
    """The same with tables that GitHub shows as such."""
    texts = []
    for section in sections(comparison):
        lines = [*section.lines, *shortened(section.texts)]
        parts = [f'### {section.title}' if section.rows or lines else section.title]
        parts += section.notes
        if lines:
            parts.append('```\n' + '\n'.join(lines) + '\n```')
        if section.rows:
            rules = ['---:' if side == '>' else ':---' for side in section.align]
            cells = [
                section.header,
                rules,
                *([c.replace('|', '\\|') for c in r] for r in section.rows),
            ]
            parts.append('\n'.join(f'| {" | ".join(row)} |' for row in cells))
        texts.append('\n\n'.join(parts))
    return '\n\n'.join(texts) + '\n'


def as_csv(comparison: 'Comparison') -> str:
    """A line for each run, with plain numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    facts = list(as_data(comparison)['runs'])
    writer.writerow(facts[0] if facts else [])
    for run in facts:
        writer.writerow('' if value is None else value for value in run.values())
    return out.getvalue()


def as_json(comparison: 'Comparison') -> str:
    return json.dumps(as_data(comparison), indent=1, allow_nan=False, default=str) + '\n'


def as_data(comparison: 'Comparison') -> dict[str, Any]:
    """Everything as plain values: groups with their verdicts, effects, and every run."""

    def test(difference: Difference | None) -> dict | None:
        return difference and vars(difference)

    groups = []
    for rank, (group, verdict) in enumerate(zip(comparison.groups, comparison.verdicts), 1):
        first = group.members[0]
        groups.append(
            {
                'rank': rank,
                'label': comparison.labels[rank - 1],
                'architecture': first.architecture,
                'val_loss': group.loss,
                'interval': group.estimate and [group.estimate.low, group.estimate.high],
                'deviation': group.estimate and group.estimate.deviation,
                'seeds': len(group.losses),
                'finished': group.finished,
                'verdict': verdict.text,
                'difference': test(verdict.difference),
                'p_value': verdict.p_value,
                'front': comparison.fronts[rank - 1],
                'loss_by_position': [
                    {'from': start, 'to': end, 'loss': loss}
                    for (start, end), loss in mean_by_position(group).items()
                ],
                'sample': sample_of(group),
                'runs': [str(run.folder) for run in group.members],
            }
        )
    runs = [
        {
            'rank': rank,
            'label': label,
            'run': run.name,
            'folder': str(run.folder),
            'status': run.status,
            'seed': run.config.get('seed'),
            'data_seed': run.config.get('data_seed'),
            **{
                key: getattr(run, key)
                for key in (
                    *('val_loss', 'bits_per_byte', 'params', 'flops_per_token', 'total_flops'),
                    *('mfu_percent', 'tokens_per_sec', 'time_ms', 'wall_seconds'),
                    *('active_params', 'peak_memory_gb'),
                )
            },
        }
        for rank, (group, label) in enumerate(zip(comparison.groups, comparison.labels), 1)
        for run in group.members
    ]
    return {
        'baseline': comparison.labels[comparison.groups.index(comparison.baseline)],
        'groups': groups,
        'equal_cost': [row._asdict() for row in comparison.equal_cost],
        'effects': [
            {**e._asdict(), 'difference': test(e.difference), 'p_value': p}
            for e, p in comparison.effects
        ],
        'interactions': [
            {**e._asdict(), 'difference': test(e.difference), 'p_value': p}
            for e, p in comparison.interactions
        ],
        'options_that_differ': comparison.options,
        'notes': comparison.notes,
        'loss_warnings': comparison.loss_warnings,
        'speed_warnings': comparison.speed_warnings,
        'skipped': comparison.skipped,
        'runs': runs,
    }


FORMATS: dict[str, Callable[['Comparison'], str]] = {
    'text': render,
    'markdown': markdown,
    'csv': as_csv,
    'json': as_json,
}


# --- Pieces --------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns two spaces apart; `align` has '<' or '>' for each."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join(f'{cell:{side}{width}}' for cell, side, width in zip(row, align, widths)).rstrip()
        for row in rows
    )


def grouped(options: 'dict[str, Values]') -> str:
    """One paragraph a key: each value with the runs that have it."""
    width = max(map(len, options))
    paragraphs = []
    for key, values in options.items():
        texts = [f'{text} ({numbers(ranks)})' for text, ranks in values.items()]
        paragraphs.append(wrapped(f'  {key:{width}}  {listing(texts)}', ' ' * (width + 4)))
    return '\n'.join(paragraphs)


def wrapped(text: str, indent: str = '') -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def listing(texts: Sequence[str]) -> str:
    more = len(texts) - LISTED
    return ', '.join(texts[:LISTED]) + (f' and {more} more' if more > 0 else '')


def numbers(ranks: Sequence[int]) -> str:
    """Ascending ranks as `#1-3 #7`, in few enough spans for a line."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [f'#{first}' if first == last else f'#{first}-{last}' for first, last in spans]
    more = sum(last - first + 1 for first, last in spans[LISTED:])
    return ' '.join(texts[:LISTED]) + (f' and {more} more' if more else '')


def progress(run) -> str:
    # A journal without an end looks the same whether the run lives or was killed.
    status = 'running or crashed' if run.status == 'running' else run.status
    return f'{status} {run.iters_done}/{shown(run.max_iters, str)}'


def shown(value: Any, form: Callable[[Any], str], unknown: str = '-') -> str:
    return unknown if value is None else form(value)


def si(value: float) -> str:
    """`162.15M`, with the largest of K, M, G, T that leaves a whole part."""
    for size, unit in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'K')):
        if value >= size:
            return f'{value / size:.2f}{unit}'
    return f'{value:.0f}'


def duration(seconds: float) -> str:
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours:
        return f'{hours}h {minutes % 60:02d}m'
    return f'{minutes}m {round(seconds) % 60:02d}s' if minutes else f'{seconds:.1f}s'
