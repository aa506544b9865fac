"""Rank runs by validation loss: what each reached, what it cost, what differs, what is unfair.

python compare_architectures.py                      every run below the working folder
python compare_architectures.py --latest 3           the newest three by start time
python compare_architectures.py out-gpt2 out-llama/run_20260101_120000
python compare_architectures.py --baseline gpt2      differences to the run that this names

Three steps, each handing plain data to the next: `load` turns records into `Run` rows, `compare`
ranks and aligns them, `render` makes text of that. Only records are read: no torch, no numpy.
"""

import argparse
import statistics
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from errors import ArgumentParser, UserError, nearest, run_script
from training_logger import find_records, read_record

WIDTH = 100  # columns that the text aims at
TABLE_RUNS = 6  # more runs than this and options are grouped by value instead of tabulated
LISTED = 8  # as many names or values as one line lists

# What must agree for losses, and what for time and memory, to speak of the architecture alone.
# Some belong to both: block size changes what a token can see and what it costs.
LOSS_CONDITIONS = (
    *('dataset', 'train_sha256', 'val_sha256', 'tokenizer', 'vocab_size', 'model_vocab_size'),
    *('block_size', 'tokens_seen', 'tokens_per_iter', 'data_seed', 'eval_windows', 'max_iters'),
    *('learning_rate', 'min_lr', 'warmup_iters', 'lr_decay_iters', 'decay_lr', 'dtype'),
)
SPEED_CONDITIONS = (
    *('device', 'device_name', 'threads', 'strategy', 'world_size', 'compile', 'dtype'),
    *('block_size', 'batch_size', 'tokens_per_iter', 'model_vocab_size', 'concurrent_runs'),
)
SEEDS = ('seed', 'data_seed')
# Where a run is kept and how it reports; nothing that its figures depend on.
IMMATERIAL = frozenset(
    {'out_dir', 'log_style', 'log_interval', 'always_save_checkpoint', 'async_save'}
)


@dataclass(frozen=True, eq=False)
class Run:
    """One record's figures. None is 'unknown'; conditions hold what must agree between runs."""

    name: str
    folder: Path
    start: datetime
    status: str
    iters_done: int
    max_iters: int | None
    architecture: str
    architecture_hash: str
    choices: dict[str, Any]
    config: dict[str, Any]
    conditions: dict[str, Any]
    params: int | None
    flops_per_token: float | None
    val_loss: float | None  # nats a token, the best after at least one update
    bits_per_byte: float | None  # of the same evaluation
    mfu_percent: float | None
    time_ms: float | None  # an iteration
    tokens_per_sec: float | None
    wall_seconds: float | None
    peak_memory_gb: float | None


@dataclass(frozen=True)
class Replicates:
    """Runs of one architecture, trained alike, that differ in their seeds alone."""

    ranks: list[int]
    seeds: int
    mean: float
    deviation: float | None  # sample standard deviation; None for one seed


# Values as text, each with the ranks (1-based) of the runs that have it.
Values = dict[str, list[int]]


@dataclass(frozen=True)
class Comparison:
    """Everything that a rendering needs. `runs` and `labels` are in rank order, best loss first."""

    runs: list[Run]
    labels: list[str]
    baseline: Run
    baseline_reason: str
    options: dict[str, Values]
    loss_warnings: dict[str, Values]
    speed_warnings: dict[str, Values]
    replicates: list[Replicates]
    skipped: list[str]


# --- records to rows -----------------------------------------------------------------------------


def run_of(record: dict[str, Any], path: Path) -> Run:
    """The row of one record. Raises KeyError, TypeError or ValueError where it is incomplete."""
    config, metadata, startup = record['config'], record['metadata'], record['startup_info']
    architecture, summary = record['architecture'], record['summary']
    data, hardware, optimizer, model, flops = (
        startup.get(part) or {} for part in ('data', 'hardware', 'optimizer', 'model', 'flops')
    )
    # What was resolved for this machine and this dataset stands above what was asked for.
    known = {**config, **metadata, **optimizer, **hardware, **data}
    known['device'] = (hardware.get('device') or '').split(':')[0] or None  # cuda:0 is like cuda:1
    known['eval_windows'] = (data.get('eval_windows') or {}).get('val')
    known['tokens_seen'] = summary.get('total_tokens')
    known.setdefault('concurrent_runs', 1)  # before there were studies

    # An evaluation before the first update judges the initialisation, not the training.
    measured = [e for e in record['eval_steps'] if e['iter'] > 0 and e['val_loss'] is not None]
    best = min(measured, key=lambda e: e['val_loss'], default={})
    time_ms, tokens_per_iter = summary.get('avg_time_ms'), data.get('tokens_per_iter')
    return Run(
        name=record['run_name'],
        folder=folder_of(path),
        start=datetime.fromisoformat(record['start_time']).astimezone(),
        status=record['status'],
        iters_done=summary['final_iter'],
        max_iters=config.get('max_iters'),
        architecture=architecture['name'],
        architecture_hash=architecture['hash'],
        choices=architecture.get('choices') or {},
        config=config,
        conditions={key: known.get(key) for key in (*LOSS_CONDITIONS, *SPEED_CONDITIONS)},
        params=model.get('total_params'),
        flops_per_token=flops.get('per_token'),
        val_loss=best.get('val_loss'),
        bits_per_byte=best.get('val_bits_per_byte'),
        mfu_percent=summary.get('avg_mfu'),
        time_ms=time_ms,
        tokens_per_sec=1000 * tokens_per_iter / time_ms if time_ms and tokens_per_iter else None,
        wall_seconds=summary.get('wall_seconds'),
        peak_memory_gb=summary.get('peak_memory_gb'),
    )


def folder_of(path: Path) -> Path:
    """The run folder that a path stands for; a record under another name stands for itself."""
    return path.parent if path.name in ('record.json', 'journal.jsonl') else path


def load(paths: Sequence[Path], latest: int | None = None) -> tuple[list[Run], list[str]]:
    """Rows of all runs at or below `paths`, newest first, and one line for each that is skipped.

    Raises UserError for a path that does not exist and where no run can be read.
    """
    missing = [f'{path}: no such file or folder' for path in paths if not path.exists()]
    if missing:
        raise UserError(*missing)

    found = [] if paths else find_records(Path('.'))
    for path in paths:
        # A folder with no run is left to the reader, which takes more than a search does.
        found += ([] if path.is_file() else find_records(path)) or [path]
    # A run that two paths lead to counts once.
    distinct = {folder_of(path).resolve(): path for path in reversed(found)}

    runs, skipped = [], []
    for path in distinct.values():
        try:
            runs.append(run_of(read_record(path), path))
        except UserError as error:
            reason = ' '.join(str(error).split())
            skipped.append(reason if str(path) in reason else f'{path}: {reason}')
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            skipped.append(f'{path}: not a complete record ({type(error).__name__}: {error})')
    if not runs:
        raise UserError(
            f'no run to compare at or below {", ".join(map(str, paths)) or Path.cwd()}. '
            'Make one with: python train.py config/arch_llama.py --max_iters=100, '
            'or say where runs are: python compare_architectures.py OUT_DIR',
            *(f'skipped {line}' for line in skipped),
        )
    runs.sort(key=lambda run: run.start, reverse=True)
    return runs[:latest], skipped


# --- rows to a comparison ------------------------------------------------------------------------


def compare(runs: Iterable[Run], baseline: str | None = None, skipped=()) -> Comparison:
    """Rank the runs and say what differs. Raises UserError where `baseline` names no single run."""
    best_first = sorted(runs, key=lambda r: (r.val_loss is None, r.val_loss or 0.0, r.start))
    labels = labels_of(best_first)
    options = dict.fromkeys(key for run in best_first for key in run.config)
    chosen, reason = baseline_of(best_first, labels, baseline)
    return Comparison(
        runs=best_first,
        labels=labels,
        baseline=chosen,
        baseline_reason=reason,
        options=differing(
            [run.config for run in best_first], [key for key in options if key not in IMMATERIAL]
        ),
        loss_warnings=differing([r.conditions for r in best_first], LOSS_CONDITIONS, 'unknown'),
        speed_warnings=differing([r.conditions for r in best_first], SPEED_CONDITIONS, 'unknown'),
        replicates=replicates_of(best_first),
        skipped=list(skipped),
    )


def differing(
    settings: Sequence[dict[str, Any]], keys: Iterable[str], unknown: str = 'None'
) -> dict[str, Values]:
    """Of `keys`, those whose values are not all the same; '-' stands for a key that is missing."""
    result = {}
    for key in keys:
        values: Values = {}
        for rank, setting in enumerate(settings, 1):
            text = value_text(key, setting[key], unknown) if key in setting else '-'
            values.setdefault(text, []).append(rank)
        if len(values) > 1:
            result[key] = values
    return result


def value_text(key: str, value: Any, unknown: str) -> str:
    if value is None:
        return unknown
    if key in ('tokens_seen', 'tokens_per_iter'):
        return f'{value:,}'
    return str(value)[:12] if key.endswith('_sha256') else str(value)


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Architecture names, with what tells two apart: differing choices, or else the run's name."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(run.architecture, []).append(run)
    keys = {}
    for name, group in alike.items():
        choices = dict.fromkeys(key for run in group for key in run.choices)
        keys[name] = differing([run.choices for run in group], choices)

    labels = []
    for run in runs:
        parts = [f'{key}={run.choices.get(key, "-")}' for key in keys[run.architecture]]
        labels.append(run.architecture + (f' [{", ".join(parts)}]' if parts else ''))
    counts = Counter(labels)
    return [
        f'{label} {run.name}' if counts[label] > 1 else label for label, run in zip(labels, runs)
    ]


def baseline_of(runs: Sequence[Run], labels: Sequence[str], wanted: str | None) -> tuple[Run, str]:
    """The run that differences are to, and why it.

    By default the oldest finished run that has a loss: an experiment starts from what it is to be
    judged by, and that choice does not depend on how the others came out. A name stands for all
    runs of one architecture, and then for the oldest of them.
    """

    def oldest(candidates: Iterable[Run]) -> Run:
        return min(candidates, key=lambda r: (r.val_loss is None, r.status != 'finished', r.start))

    if wanted is None:
        chosen = oldest(runs)
        finished = 'finished ' if chosen.status == 'finished' else ''
        return chosen, f'the oldest {finished}run; --baseline NAME chooses another'

    wanted = wanted.rstrip('/')
    names = [
        (run.architecture, label, run.name, str(run.folder), str(run.folder.parent))
        for run, label in zip(runs, labels)
    ]
    matches = [run for run, known in zip(runs, names) if wanted in known]
    if not matches:
        part = wanted.casefold()
        matches = [
            run for run, known in zip(runs, names) if any(part in name.casefold() for name in known)
        ]
    if not matches:
        known = [name for names_of_run in names for name in names_of_run]
        raise UserError(
            f'--baseline {wanted}: no run compared here has this in its architecture, name or '
            f'folder.{nearest(wanted, known)} '
            f'Architectures here: {listing(list(dict.fromkeys(run.architecture for run in runs)))}'
        )
    if len({run.architecture_hash for run in matches}) > 1:
        found = [f'{label} ({run.folder})' for run, label in zip(runs, labels) if run in matches]
        raise UserError(
            f'--baseline {wanted}: matches {len(matches)} runs of different architectures: '
            f'{listing(found)}. Type more of the architecture, run or folder name'
        )
    among = '' if len(matches) == 1 else f', the oldest of {len(matches)} that match'
    return oldest(matches), f'--baseline {wanted}{among}'


def replicates_of(runs: Sequence[Run]) -> list[Replicates]:
    """Finished runs grouped over seeds: the same architecture, trained with the same options."""
    groups: dict[tuple, list[int]] = {}
    for rank, run in enumerate(runs, 1):
        if run.status != 'finished' or run.val_loss is None:
            continue
        apart = {*IMMATERIAL, *SEEDS, *run.choices, 'arch_preset', 'init_from'}
        training = sorted((key, str(run.config[key])) for key in run.config if key not in apart)
        groups.setdefault((run.architecture_hash, tuple(training)), []).append(rank)

    result = []
    for ranks in groups.values():
        # A run repeated with the same seeds is no further evidence.
        losses = {
            tuple(runs[rank - 1].config.get(key) for key in SEEDS): runs[rank - 1].val_loss
            for rank in ranks
        }
        deviation = statistics.stdev(losses.values()) if len(losses) > 1 else None
        result.append(Replicates(ranks, len(losses), statistics.fmean(losses.values()), deviation))
    return sorted(result, key=lambda group: group.mean)


# --- a comparison to text ------------------------------------------------------------------------


def render(comparison: Comparison) -> str:
    """The comparison as plain text of about a hundred columns."""
    parts = (ranking_text, cost_text, options_text, warnings_text, evidence_text)
    return '\n\n'.join(text for text in (part(comparison) for part in parts) if text) + '\n'


def ranking_text(comparison: Comparison) -> str:
    runs, baseline = comparison.runs, comparison.baseline
    number = runs.index(baseline) + 1
    unfinished = any(run.status != 'finished' for run in runs)
    # The name comes last: its length varies, and a terminal may cut it.
    status = ['status'] * unfinished
    rows = [['#', 'val loss', f'vs #{number}', 'bits/byte', *status, 'architecture']]
    for rank, (run, label) in enumerate(zip(runs, comparison.labels), 1):
        if run is baseline:
            difference = 'baseline'
        elif run.val_loss is None or baseline.val_loss is None:
            difference = '-'
        else:
            difference = f'{run.val_loss - baseline.val_loss:+.4f}'
        loss = shown(run.val_loss, '{:.4f}'.format, 'none')
        bits = shown(run.bits_per_byte, '{:.4f}'.format)
        rows.append([str(rank), loss, difference, bits, *[progress(run)] * unfinished, label])
    title = ['RANKING by best validation loss, in nats a token (lower is better)']
    if len(runs) > 1:
        label, reason = comparison.labels[number - 1], comparison.baseline_reason
        title.append(wrapped(f'Differences are to #{number} {label}: {reason}.'))
        if baseline.val_loss is None:
            title.append('The baseline has no validation loss.')
    if comparison.loss_warnings:
        title.append('These losses are not like with like: see WARNINGS.')
    return '\n'.join(title) + '\n' + table(rows, '>>>><<')


def cost_text(comparison: Comparison) -> str:
    header = ['params', 'FLOPs/token', 'MFU', 'tokens/s', 'ms/iter']
    rows = [['#', *header, 'wall', 'peak GB', 'run']]
    for rank, run in enumerate(comparison.runs, 1):
        rows.append(
            [
                str(rank),
                shown(run.params, si),
                shown(run.flops_per_token, si),
                shown(run.mfu_percent, '{:.2f}%'.format),
                shown(run.tokens_per_sec, '{:,.0f}'.format),
                shown(run.time_ms, '{:,.1f}'.format),
                shown(run.wall_seconds, duration),
                shown(run.peak_memory_gb, '{:.2f}'.format),
                str(run.folder),
            ]
        )
    return 'COST (training FLOPs; they and MFU count attention over the full square)\n' + table(
        rows, '>>>>>>>><'
    )


def options_text(comparison: Comparison) -> str:
    options, runs = comparison.options, comparison.runs
    if len(runs) < 2:
        return ''
    if not options:
        return 'OPTIONS THAT DIFFER: none'
    ranks = range(1, len(runs) + 1)
    rows = [['option', *(f'#{rank}' for rank in ranks)]]
    for key, values in options.items():
        text_of = {rank: text for text, having in values.items() for rank in having}
        rows.append([key, *(text_of[rank] for rank in ranks)])
    text = table(rows, '<' * len(rows[0]))
    if len(runs) > TABLE_RUNS or max(map(len, text.splitlines())) > WIDTH:
        text = grouped(options)
    return 'OPTIONS THAT DIFFER\n' + text


def warnings_text(comparison: Comparison) -> str:
    lines = []
    if comparison.loss_warnings:
        lines += ['Losses are not like with like. Besides the architecture, these differ:']
        lines += [grouped(comparison.loss_warnings)]
        if {'tokenizer', 'vocab_size'} & comparison.loss_warnings.keys():
            lines += [
                'Across vocabularies, compare bits/byte (of the same text), not loss a token.'
            ]
    unfinished = [
        f'  #{rank} {run.name}: {progress(run)}'
        for rank, run in enumerate(comparison.runs, 1)
        if run.status != 'finished'
    ]
    if unfinished:
        lines += [
            'Unfinished: the loss is not the one at the end of training, so the rank may change.'
        ]
        lines += unfinished
    untrained = [rank for rank, run in enumerate(comparison.runs, 1) if run.val_loss is None]
    if untrained:
        lines += [f'Not ranked, no validation loss after an update: {numbers(untrained)}']
    if comparison.speed_warnings:
        lines += ['Time and memory are not like with like. Besides the architecture, these differ:']
        lines += [grouped(comparison.speed_warnings)]
    lines += [f'Skipped {line}' for line in comparison.skipped]
    return '\n'.join(['WARNINGS', *lines]) if lines else ''


def evidence_text(comparison: Comparison) -> str:
    """How far the ranking can be believed."""
    if len(comparison.runs) < 2:
        return ''
    repeated = [group for group in comparison.replicates if group.seeds > 1]
    if not repeated:
        return wrapped(
            'One seed per architecture: the ranking has no error bar, and a difference may be '
            'chance. Several seeds of each give one: train again with --seed=2, then --seed=3.'
        )
    lines = ['SEEDS (mean and standard deviation of the best validation loss)']
    for group in repeated:
        name = comparison.runs[group.ranks[0] - 1].architecture
        lines.append(
            f'  {name}: {group.mean:.4f} +/- {group.deviation:.4f}, '
            f'{group.seeds} seeds ({numbers(group.ranks)})'
        )
    single = [rank for group in comparison.replicates if group.seeds == 1 for rank in group.ranks]
    if single:
        lines.append(f'  One seed, no error bar: {numbers(sorted(single))}')
    return '\n'.join(lines)


def table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns two spaces apart; `align` has '<' or '>' for each."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join(f'{cell:{side}{width}}' for cell, side, width in zip(row, align, widths)).rstrip()
        for row in rows
    )


def grouped(options: dict[str, Values]) -> str:
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


def progress(run: Run) -> str:
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


# --- the command line ----------------------------------------------------------------------------


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text} is not a whole number above zero')
    return int(text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog='compare_architectures.py',
        description='Rank runs by validation loss: what each reached, what it cost, what differs.',
    )
    parser.add_argument(
        'paths',
        nargs='*',
        type=Path,
        metavar='PATH',
        help='run folder, folder that holds runs, or record file (default: the working folder)',
    )
    parser.add_argument(
        '--latest', type=positive, metavar='N', help='compare only the newest N, by start time'
    )
    parser.add_argument(
        '--baseline',
        metavar='NAME',
        help='(part of) an architecture, run or folder name: differences are to this run '
        '(default: the oldest finished run compared)',
    )
    return parser.parse(argv)


def main(argv: Sequence[str]) -> None:
    settings = parse(argv)
    runs, skipped = load(settings.paths, settings.latest)
    text = render(compare(runs, settings.baseline, skipped))
    # A name or path may hold what this terminal cannot show.
    encoding = sys.stdout.encoding or 'utf-8'
    print(text.encode(encoding, 'backslashreplace').decode(encoding), end='')


if __name__ == '__main__':
    run_script(main)
