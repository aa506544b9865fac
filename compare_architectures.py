"""Rank runs by validation loss: what each reached, what it cost, what differs, what is unfair.

python compare_architectures.py                      every run below the working folder
python compare_architectures.py --latest 3           the newest three by start time
python compare_architectures.py out-gpt2 out-llama/run_20260101_120000
python compare_architectures.py --baseline gpt2      differences to the run that this names

Three steps, each handing plain data to the next: `load` turns records into `Run` rows, `compare`
groups, ranks and judges them, `comparison_text.render` makes text of that. Only records are read:
no torch, no numpy.
"""

import argparse
import functools
import importlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import sinks
from comparison_text import FORMATS, listing
from console_output import write_text
from errors import ArgumentParser, UserError, nearest, run_script
from judgement import (
    COSTS,
    FRONTS,
    SEEDS,
    TIMES,
    AtEqualCost,
    CurvePoint,
    Effect,
    Group,
    Interaction,
    Span,
    Stability,
    Verdict,
    at_equal_cost,
    corrected,
    curve_of,
    group_runs,
    interactions,
    judge,
    main_effects,
    pareto_front,
    seeds_of,
    spans_of,
    stability,
)
from training_logger import find_records, read_outline

SAME_BUDGET = 0.01  # budgets that differ by less are equal

# What must agree for losses, and what for time and memory, to speak of the architecture alone.
# Some belong to both: block size changes what a token can see and what it costs.
LOSS_CONDITIONS = (
    *('dataset', 'train_sha256', 'val_sha256', 'tokenizer', 'vocab_size', 'model_vocab_size'),
    *('block_size', 'tokens_seen', 'tokens_per_iter', 'data_seed', 'sampling', 'eval_windows'),
    *('max_iters', 'optimizer', 'lr_schedule', 'learning_rate', 'min_lr', 'warmup_iters'),
    *('lr_decay_iters', 'decay_lr', 'weight_decay', 'grad_clip', 'dtype', 'weights_from'),
)
SPEED_CONDITIONS = (
    *('device', 'device_name', 'threads', 'strategy', 'world_size', 'compile', 'dtype'),
    *('block_size', 'batch_size', 'tokens_per_iter', 'model_vocab_size', 'concurrent_runs'),
)
# What a budget in FLOPs or seconds, or tuning, sets for each architecture by itself.
BUDGETED = ('tokens_seen', 'max_iters', 'warmup_iters', 'lr_decay_iters')
# Where a run is kept, how it reports, what ran beside it; nothing that its losses depend on.
REPORTING = frozenset(
    {
        *('out_dir', 'log_style', 'log_interval', 'concurrent_runs', *sinks.OPTIONS),
        *('sample_interval', 'sample_prompt', 'sample_tokens'),
    }
)
IMMATERIAL = REPORTING | {'always_save_checkpoint', 'async_save'}


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
    active_params: int | None  # those that one token uses
    flops_per_token: float | None
    val_loss: float | None  # nats a token, the best after at least one update
    bits_per_byte: float | None  # of the same evaluation
    mfu_percent: float | None
    time_ms: float | None  # an iteration
    tokens_per_sec: float | None
    wall_seconds: float | None
    peak_memory_gb: float | None
    total_flops: float | None
    curve: list[CurvePoint]
    spans: list[Span]  # the loss by position
    sample: dict[str, Any] | None  # the last text that it wrote: prompt, text and iter
    stability: Stability
    command: str
    data_hash: str | None  # of the sequences that it trained on
    study: 'StudyPlan | None' = None
    variant: str | None = None  # the run's place in that study


@dataclass(frozen=True, eq=False)
class StudyPlan:
    """What `study.py` wrote beside its runs."""

    question: str
    command: str
    budget: dict
    tuned: list[str]
    variants: dict[str, dict]  # label -> the options that it sets
    folders: dict[str, str]  # folder of a point -> label


# Values as text, each with the ranks (1-based) of the runs that have it.
Values = dict[str, list[int]]


@dataclass(frozen=True)
class Comparison:
    """Everything that a rendering needs. `groups` and `labels` are in rank order, best loss first.

    A group is a run, or, where any are `repeated` with several seeds, all that differ in seed only.
    """

    groups: list[Group]
    labels: list[str]
    repeated: bool
    baseline: Group
    baseline_reason: str
    study: StudyPlan | None  # that all runs are of
    verdicts: list[Verdict]
    concurrent: int  # the most runs at a time on one machine; of more than one, no times
    costs: dict[str, str]  # COSTS that may be compared
    front_costs: dict[str, tuple]  # FRONTS that may be compared
    fronts: list[str]  # on which Pareto fronts a group lies: letters of FTM
    equal_cost: list[AtEqualCost]
    effects: list[tuple[Effect, float | None]]  # with p-values corrected for their number
    interactions: list[tuple[Interaction, float | None]]
    options: dict[str, Values]
    notes: list[str]
    loss_warnings: dict[str, Values]
    speed_warnings: dict[str, Values]
    skipped: list[str]


# --- records to rows -----------------------------------------------------------------------------


def run_of(record: dict[str, Any], path: Path) -> Run:
    """The row of one record. Raises KeyError, TypeError or ValueError where it is incomplete."""
    config, metadata, startup = record['config'], record['metadata'], record['startup_info']
    architecture, summary = record['architecture'], record['summary']
    data, hardware, model, flops = (
        startup.get(part) or {} for part in ('data', 'hardware', 'model', 'flops')
    )
    # What was resolved for this machine and this dataset stands above what was asked for.
    known = {**config, **metadata, **hardware, **data}
    known['device'] = (hardware.get('device') or '').split(':')[0] or None  # cuda:0 is like cuda:1
    known['eval_windows'] = (data.get('eval_windows') or {}).get('val')
    known['tokens_seen'] = summary.get('total_tokens')
    known['weights_from'] = (metadata.get('weights_from') or {}).get('source', 'the seed')
    known.setdefault('concurrent_runs', 1)  # before there were studies
    known.setdefault('sampling', 'random')  # before there was a choice

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
        active_params=model.get('active_params', model.get('total_params')),
        flops_per_token=flops.get('per_token'),
        val_loss=best.get('val_loss'),
        bits_per_byte=best.get('val_bits_per_byte'),
        mfu_percent=summary.get('avg_mfu'),
        time_ms=time_ms,
        tokens_per_sec=1000 * tokens_per_iter / time_ms if time_ms and tokens_per_iter else None,
        wall_seconds=summary.get('wall_seconds'),
        peak_memory_gb=summary.get('peak_memory_gb'),
        total_flops=summary.get('total_flops'),
        curve=curve_of(record),
        spans=spans_of(record),
        sample=last_sample(record),
        stability=stability(record),
        command=metadata.get('command') or '',
        data_hash=(record['eval_steps'] or [{}])[-1].get('data_hash'),
        **place_in_study(folder_of(path)),
    )


def last_sample(record: dict[str, Any]) -> dict[str, Any] | None:
    """What the run wrote at the last evaluation that has text."""
    samples = [{**e['sample'], 'iter': e['iter']} for e in record['eval_steps'] if e.get('sample')]
    return next((sample for sample in reversed(samples) if sample['text'] is not None), None)


def place_in_study(folder: Path) -> dict[str, Any]:
    """The study that a run folder lies in, and which variant of it the run is."""
    for parent in folder.absolute().parents[:5]:
        if plan := read_plan(parent):
            point = folder.absolute().parent.relative_to(parent).as_posix()
            return {'study': plan, 'variant': plan.folders.get(point)}
    return {}


@functools.cache
def read_plan(folder: Path) -> StudyPlan | None:
    """The plan in a folder; None where there is none that can be read."""
    try:
        plan = json.loads((folder / 'study.json').read_text(encoding='utf-8'))
        return StudyPlan(
            question=plan['question'],
            command=plan['command'],
            budget=plan['budget'],
            tuned=plan['tuned'],
            variants={variant['label']: variant['asked'] for variant in plan['variants']},
            folders={point['folder']: point['variant'] for point in plan['points']},
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
            runs.append(run_of(read_outline(path), path))
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
    return evidence_among(runs)[:latest], skipped


def evidence_among(newest_first: Sequence[Run]) -> list[Run]:
    """The runs, of each point of a study only the newest, and none that it made to tune or to time.

    A point whose run was killed before it had saved anything is begun anew. What chose an option
    is no evidence for it; such runs are compared where no point of their study is among them.
    """
    with_points = {run.study for run in newest_first if run.variant is not None}
    places: dict[Path, Run] = {}
    for run in newest_first:
        if run.variant is not None:
            places.setdefault(run.folder.parent, run)
        elif run.study is None or run.study not in with_points:
            places.setdefault(run.folder, run)
    return list(places.values())


# --- rows to a comparison ------------------------------------------------------------------------


def compare(runs: Iterable[Run], baseline: str | None = None, skipped=()) -> Comparison:
    """Rank and judge the runs, and say what differs.

    Raises UserError where `baseline` names no single architecture.
    """
    oldest_first = sorted(runs, key=lambda run: run.start)
    groups = group_runs(oldest_first, training_of)
    repeated = any(len(group.losses) > 1 for group in groups)
    if not repeated:
        groups = group_runs(oldest_first, lambda run: run.folder)
    labels = labels_of(groups)
    chosen, reason = baseline_of(groups, labels, baseline)
    firsts = [group.members[0] for group in groups]
    ignored = {*IMMATERIAL, *SEEDS} if repeated else IMMATERIAL
    keys = [key for key in dict.fromkeys(k for r in firsts for k in r.config) if key not in ignored]
    loss_warnings = differing([run.conditions for run in firsts], LOSS_CONDITIONS, 'unknown')
    if repeated and len({frozenset(g.losses) for g in groups if g.finished}) == 1:
        loss_warnings.pop('data_seed', None)  # each has them all
    if 'tokens_seen' not in loss_warnings:
        loss_warnings |= differing(hashes_of_shared_data(groups), ['data_hash'], 'unknown')
    loss_warnings, notes = without_fair_differences(groups, loss_warnings)
    concurrent = max(run.conditions['concurrent_runs'] for run in oldest_first)
    costs, front_costs = (
        {key: what for key, what in known.items() if concurrent == 1 or key not in TIMES}
        for known in (COSTS, FRONTS)
    )
    curves = all(len(run.curve) > 1 for run in firsts)
    placed = axes_of(groups)
    effects, dependences = main_effects(placed), interactions(placed)
    return Comparison(
        groups=groups,
        labels=labels,
        repeated=repeated,
        baseline=chosen,
        baseline_reason=reason,
        study=study_of(groups),
        verdicts=judge(groups, chosen),
        concurrent=concurrent,
        costs=costs,
        front_costs=front_costs,
        fronts=fronts_of(groups, front_costs),
        equal_cost=at_equal_cost(groups, costs) if curves else [],
        effects=list(zip(effects, corrected([effect.difference for effect in effects]))),
        interactions=list(zip(dependences, corrected([found.difference for found in dependences]))),
        options=differing([run.config for run in firsts], keys),
        notes=notes,
        loss_warnings=loss_warnings,
        speed_warnings=differing([r.conditions for r in firsts], SPEED_CONDITIONS, 'unknown'),
        skipped=list(skipped),
    )


def hashes_of_shared_data(groups: Sequence[Group]) -> list[dict]:
    """What each group was trained on, over the seeds that all have; {} if they share none."""
    by_seed = [{seeds_of(run): run.data_hash for run in group.members} for group in groups]
    shared = sorted(set.intersection(*map(set, by_seed)), key=str)
    hashes = [[found[seeds] for seeds in shared] for found in by_seed]
    return [
        {'data_hash': None if None in each else ' '.join(each)} if shared else {} for each in hashes
    ]


def training_of(run: Run) -> tuple:
    """What two runs share that differ in their seeds alone."""
    apart = {*IMMATERIAL, *SEEDS, *run.choices, 'arch_preset', 'init_from'}
    training = sorted((key, str(run.config[key])) for key in run.config if key not in apart)
    return run.architecture_hash, run.conditions['weights_from'], tuple(training)


def without_fair_differences(
    groups: Sequence[Group], warnings: dict[str, Values]
) -> tuple[dict[str, Values], list[str]]:
    """The warnings, but for what a study, an equal budget or tuning explains; and notes on that."""
    notes: list[str] = []
    plan = study_of(groups)
    fair: set[str] = set()
    if 'tokens_seen' in warnings:
        flops = [run.total_flops for group in groups if group.finished for run in group.members]
        if flops and all(flops) and max(flops) / min(flops) - 1 < SAME_BUDGET:
            spread = max(flops) / min(flops) - 1
            notes.append(f'Each trained with the same FLOPs (within {spread:.2%}), not tokens.')
            fair |= {*BUDGETED}
        elif plan and 'seconds' in plan.budget:
            seconds = plan.budget['seconds']
            notes.append(f'Each trained for as many updates as {seconds:g} s were to buy it.')
            fair |= {*BUDGETED}
    if plan:
        # What a study varies is its question; and the lowest rate follows from the highest.
        own = {*plan.tuned, *(key for asked in plan.variants.values() for key in asked)}
        fair |= {*own, *(['min_lr'] if 'learning_rate' in own else [])}
        if plan.tuned:
            notes.append(f'Tuned for each by itself: {", ".join(plan.tuned)}.')
    return {key: values for key, values in warnings.items() if key not in fair}, notes


def axes_of(groups: Sequence[Group]) -> list[tuple[dict, Group]]:
    """Where each group lies in the grid of its study; nothing unless all are of one study."""
    finished = [group for group in groups if group.finished]
    plan = study_of(finished)
    by_variant = {group.members[0].variant: group for group in finished}
    variants = plan.variants if plan else {}
    return [(axes, by_variant[label]) for label, axes in variants.items() if label in by_variant]


def study_of(groups: Sequence[Group]) -> StudyPlan | None:
    """The study that all runs are of."""
    plans = {run.study for group in groups for run in group.members}
    return plans.pop() if len(plans) == 1 else None


def fronts_of(groups: Sequence[Group], costs: dict[str, tuple]) -> list[str]:
    """For each group the Pareto fronts that it lies on: of loss against each of the costs."""
    letters = [''] * len(groups)
    for letter, (_, figure) in costs.items():
        amounts = [group.mean(figure) for group in groups]
        points = [
            None
            if amount is None or group.loss is None or not group.finished
            else (amount, group.loss)
            for amount, group in zip(amounts, groups)
        ]
        for place, on_front in enumerate(pareto_front(points)):
            letters[place] += letter if on_front else ''
    return letters


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


def labels_of(groups: Sequence[Group]) -> list[str]:
    """A study's names of its variants; else architecture names, with what tells two apart:
    differing choices, or else the run's name."""
    runs = [group.members[0] for group in groups]
    variants = [run.variant for run in runs]
    if None not in variants and len({run.study for run in runs}) == 1:
        counts = Counter(variants)
        return [v if counts[v] == 1 else f'{v} {run.name}' for v, run in zip(variants, runs)]
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


def baseline_of(
    groups: Sequence[Group], labels: Sequence[str], wanted: str | None
) -> tuple[Group, str]:
    """The group that differences are to, and why it.

    By default a study's first variant, or that of the oldest finished run that has a loss: an
    experiment starts from what it is to be judged by, and that choice does not depend on how the
    others came out. A name stands for all runs of one architecture, and then for the oldest.
    """

    def oldest(candidates: Iterable[Group]) -> Group:
        return min(candidates, key=lambda g: (g.loss is None, not g.finished, g.members[0].start))

    if wanted is None:
        if placed := axes_of(groups):
            return placed[0][1], 'the first of the study; --baseline NAME chooses another'
        chosen = oldest(groups)
        finished = 'finished ' if chosen.finished else ''
        return chosen, f'the oldest {finished}run; --baseline NAME chooses another'

    wanted = wanted.rstrip('/')
    names = [
        {
            label,
            *(
                name
                for run in group.members
                for name in (run.architecture, run.name, str(run.folder), str(run.folder.parent))
            ),
        }
        for group, label in zip(groups, labels)
    ]
    matches = [group for group, known in zip(groups, names) if wanted in known]
    if not matches:
        part = wanted.casefold()
        matches = [
            group
            for group, known in zip(groups, names)
            if any(part in name.casefold() for name in known)
        ]
    architectures = list(dict.fromkeys(group.members[0].architecture for group in groups))
    if not matches:
        known = [name for names_of_group in names for name in names_of_group]
        raise UserError(
            f'--baseline {wanted}: no run compared here has this in its architecture, name or '
            f'folder.{nearest(wanted, known)} Architectures here: {listing(architectures)}'
        )
    if len({group.members[0].architecture_hash for group in matches}) > 1:
        found = [
            f'{label} ({group.members[0].folder})'
            for group, label in zip(groups, labels)
            if group in matches
        ]
        raise UserError(
            f'--baseline {wanted}: matches {len(matches)} runs of different architectures: '
            f'{listing(found)}. Type more of the architecture, run or folder name'
        )
    among = '' if len(matches) == 1 else f', the oldest of {len(matches)} that match'
    return oldest(matches), f'--baseline {wanted}{among}'


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
        "(default: a study's first variant, else the oldest finished run)",
    )
    parser.add_argument(
        '--format', choices=FORMATS, default='text', help='of what is printed (default text)'
    )
    parser.add_argument(
        '--plot', type=Path, metavar='FILE', help='draw curves and fronts: .png, .svg or .pdf'
    )
    parser.add_argument(
        '--report', type=Path, metavar='FILE', help='write all of it as one page: report.html'
    )
    return parser.parse(argv)


def main(argv: Sequence[str]) -> None:
    settings = parse(argv)
    runs, skipped = load(settings.paths, settings.latest)
    comparison = compare(runs, settings.baseline, skipped)
    for path, draw in ((settings.plot, 'plot'), (settings.report, 'report')):
        if path is not None:
            getattr(importlib.import_module('report'), draw)(comparison, path)
    write_text(FORMATS[settings.format](comparison), end='')


if __name__ == '__main__':
    run_script(main)
