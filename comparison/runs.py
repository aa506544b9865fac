"""Records of runs as rows of a comparison, each value checked; and which runs are compared."""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import UserError
from comparison.analysis import DIVERGED, FINISHED, UNMEASURED
from comparison.conditions import conditions_of
from comparison.costs import CurvePoint, Span, Stability
from records.record import STATUSES, read_outline
from records.run_folders import find_records

SCORES = ('final', 'best')
ENDING = ('nonfinite', 'rollback', 'resume', 'failed')  # events that tell why a run ended


@dataclass(frozen=True, eq=False)
class Run:
    """One record's figures. None is 'unknown'; conditions hold what must agree between runs."""

    name: str
    folder: Path
    start: datetime
    outcome: str  # finished, diverged, without a validation loss, or the status of the record
    status: str
    iters_done: int
    max_iters: int | None
    architecture: str
    architecture_hash: str
    choices: dict[str, Any]
    config: dict[str, Any]
    conditions: dict[str, tuple]  # the values that each had in turn, if the run was resumed
    code: dict[str, str]  # the hash of each source file that training depends on
    params: int | None
    active_params: int | None  # those that one token uses
    flops_per_token: float | None
    causal_flops_per_token: float | None
    val_loss: float | None  # nats a token, of the evaluation that counts
    bits_per_byte: float | None  # of the same evaluation
    best_val_loss: float | None  # after at least one update
    untrained_loss: float | None  # before the first update
    evaluations: int  # after at least one update
    mfu_percent: float | None
    time_ms: float | None  # an iteration
    tokens_per_sec: float | None
    wall_seconds: float | None
    peak_memory_gb: float | None
    total_flops: float | None
    causal_flops: float | None
    train_seconds: float | None
    peak_tflops: float | None  # of all devices
    curve: list[CurvePoint]
    spans: list[Span]  # the loss by position
    sample: dict[str, Any] | None  # the last text that it wrote: prompt, text and iter
    stability: Stability
    command: str
    data_hashes: dict[int, str]  # iterations -> hash of the sequences that it trained on by then
    study: 'StudyPlan | None' = None
    variant: str | None = None  # the run's place in that study

    @property
    def blown_up(self) -> bool:
        """Whether it diverged, or ended above the loss before its first update."""
        if self.outcome == DIVERGED:
            return True
        known = bool(self.curve) and self.untrained_loss is not None
        return known and self.curve[-1].loss > self.untrained_loss


@dataclass(frozen=True, eq=False)
class StudyPlan:
    """What `study.py` wrote beside its runs."""

    question: str
    command: str
    budget: dict
    tuned: list[str]
    variants: dict[str, dict]  # label -> the options that it sets
    folders: dict[str, str]  # folder of a point -> label
    baseline: str | None  # the label of the variant that the others are compared with
    tuning: dict[str, dict]  # label -> its best value of each tuned option
    at_edge: dict[str, list[str]]  # label -> the options whose best value ends the list


# --- A record's values, checked ------------------------------------------------------------------


class Malformed(ValueError):
    """A record holds a value that no run writes."""


def _value(source: dict, key: str, kind: type | tuple, what: str, default: Any = None) -> Any:
    """The value of `key`, or the default where it is missing or null. Raises Malformed."""
    value = source.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Malformed(f'{key} is {_short(value)}, not {what}')
    if isinstance(value, float) and not math.isfinite(value):
        raise Malformed(f'{key} is {value}, which JSON cannot hold')
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f'{text[:37]}…'


def number(source: dict, key: str) -> float | None:
    """A finite number that fits in a float, or None."""
    value = _value(source, key, (int, float), 'a number')
    if value is not None and abs(value) > 1e300:
        raise Malformed(f'{key} is {_short(value)}, which is too large')
    return value


def count(source: dict, key: str) -> int | None:
    value = number(source, key)
    if value is not None and (value != int(value) or value < 0):
        raise Malformed(f'{key} is {value!r}, not a count')
    return None if value is None else int(value)


def text(source: dict, key: str, default: str | None = None) -> str | None:
    return _value(source, key, str, 'a text', default)


def mapping(source: dict, key: str) -> dict:
    return _value(source, key, dict, 'an object', {})


def entries(source: dict, key: str) -> list[dict]:
    """A list of objects."""
    values = _value(source, key, list, 'a list', [])
    if not all(isinstance(value, dict) for value in values):
        raise Malformed(f'{key} holds something that is no object')
    return values


def _required(value: Any, key: str) -> Any:
    if value is None:
        raise Malformed(f'{key} is missing')
    return value


# --- Records to rows -----------------------------------------------------------------------------


def run_of(record: dict[str, Any], path: Path, score: str = 'final') -> Run:
    """The row of one record. Raises ValueError where it is incomplete or malformed."""
    config, metadata, startup = (
        mapping(record, part) for part in ('config', 'metadata', 'startup_info')
    )
    architecture, summary = mapping(record, 'architecture'), mapping(record, 'summary')
    data, model, flops = (mapping(startup, part) for part in ('data', 'model', 'flops'))
    for key in ('seed', 'data_seed'):
        count(config, key)
    status = text(record, 'status')
    if status not in STATUSES:
        raise Malformed(f'status is {status!r}, not one of {", ".join(STATUSES)}')
    evaluations = evaluations_of(record)
    measured = [entry for entry in evaluations if entry['val_loss'] is not None]
    best = min(measured, key=lambda entry: entry['val_loss'], default={})
    counted = best if score == 'best' else (measured or [{}])[-1]
    outcome = outcome_of(record, status, evaluations)
    time_ms, tokens_per_iter = number(summary, 'avg_time_ms'), count(data, 'tokens_per_iter')
    total_params = count(model, 'total_params')
    start = datetime.fromisoformat(_required(text(record, 'start_time'), 'start_time'))
    return Run(
        name=_required(text(record, 'run_name'), 'run_name'),
        folder=folder_of(path),
        start=start.astimezone(),
        outcome=outcome,
        status=status,
        iters_done=_required(count(summary, 'final_iter'), 'final_iter'),
        max_iters=count(config, 'max_iters'),
        architecture=_required(text(architecture, 'name'), 'name of the architecture'),
        architecture_hash=_required(text(architecture, 'hash'), 'hash of the architecture'),
        choices=mapping(architecture, 'choices'),
        config=config,
        conditions=conditions_of(record, len(measured)),
        code={str(file): str(digest) for file, digest in mapping(metadata, 'code').items()},
        params=total_params,
        active_params=count(model, 'active_params') or total_params,
        flops_per_token=number(flops, 'per_token'),
        causal_flops_per_token=number(flops, 'per_token_causal'),
        val_loss=None if outcome == DIVERGED else counted.get('val_loss'),
        bits_per_byte=None if outcome == DIVERGED else counted.get('val_bits_per_byte'),
        best_val_loss=best.get('val_loss'),
        untrained_loss=untrained_loss(record),
        evaluations=len(measured),
        mfu_percent=number(summary, 'avg_mfu'),
        time_ms=time_ms,
        tokens_per_sec=1000 * tokens_per_iter / time_ms if time_ms and tokens_per_iter else None,
        wall_seconds=number(summary, 'wall_seconds'),
        peak_memory_gb=number(summary, 'peak_memory_gb'),
        total_flops=number(summary, 'total_flops'),
        causal_flops=causal_flops(record),
        train_seconds=number(summary, 'train_seconds') or number(summary, 'wall_seconds'),
        peak_tflops=number(mapping(startup, 'hardware'), 'peak_tflops'),
        curve=curve_of(measured, tokens_per_iter, number(flops, 'per_token_causal')),
        spans=spans_of(record),
        sample=last_sample(record),
        stability=stability_of(record),
        command=text(metadata, 'command', ''),
        data_hashes={e['iter']: h for e in evaluations if (h := text(e, 'data_hash')) is not None},
        **place_in_study(folder_of(path)),
    )


def evaluations_of(record: dict) -> list[dict]:
    """The evaluations after at least one update, in order, their figures checked.

    One before the first update judges the initialization, not the training.
    """
    after = []
    for entry in entries(record, 'eval_steps'):
        if _required(count(entry, 'iter'), 'iter of an evaluation') > 0:
            for key in ('val_loss', 'val_bits_per_byte', 'train_seconds'):
                number(entry, key)
            after.append({'val_loss': None, **entry})
    return sorted(after, key=lambda entry: entry['iter'])


def untrained_loss(record: dict) -> float | None:
    before = [entry for entry in entries(record, 'eval_steps') if entry['iter'] == 0]
    return number(before[0], 'val_loss') if before else None


def outcome_of(record: dict, status: str, evaluations: list[dict]) -> str:
    """What became of a run.

    It diverged if it ended over a loss or gradient that was not finite, or if its last validation
    loss was not.
    """
    if evaluations and evaluations[-1]['val_loss'] is None:
        return DIVERGED
    if stopped_by_nonfinite(record):
        return DIVERGED
    return UNMEASURED if status == FINISHED and not evaluations else status


def stopped_by_nonfinite(record: dict) -> bool:
    """Whether a run failed because of an update that was not finite, and not merely after one."""
    if record['status'] != 'failed' or mapping(record, 'config').get('on_nonfinite') == 'skip':
        return False
    kinds = [event.get('event') for event in entries(record, 'events')]
    if 'nonfinite' in kinds:
        return [kind for kind in kinds if kind in ENDING][-2:] == ['nonfinite', 'failed']
    return bool(count(mapping(record, 'summary'), 'nonfinite_updates'))


def causal_flops(record: dict) -> float | None:
    """What a run computed, with attention over its causal half: fair to windows.

    A record's own total counts the full square.
    """
    flops = mapping(mapping(record, 'startup_info'), 'flops')
    total, full, causal = (
        number(mapping(record, 'summary'), 'total_flops'),
        number(flops, 'per_token'),
        number(flops, 'per_token_causal'),
    )
    return total * causal / full if total is not None and full and causal else None


def curve_of(
    measured: list[dict], tokens_per_iter: int | None, per_token: float | None
) -> list[CurvePoint]:
    """The validation losses after at least one update, with what they had cost."""
    points = []
    for entry in measured:
        tokens = count(entry, 'tokens_seen')
        if tokens is None:  # an older record
            tokens = tokens_per_iter and entry['iter'] * tokens_per_iter
        points.append(
            CurvePoint(
                iter=entry['iter'],
                tokens=tokens,
                flops=tokens and per_token and tokens * per_token,
                seconds=entry.get('train_seconds'),
                loss=entry['val_loss'],
            )
        )
    return points


def spans_of(record: dict) -> list[Span]:
    """The loss by position at the last evaluation after an update; empty where not recorded."""
    for entry in reversed(entries(record, 'eval_steps')):
        if entry['iter'] > 0 and (diagnostics := mapping(entry, 'diagnostics')):
            return [
                Span(count(span, 'from'), count(span, 'to'), number(span, 'loss'))
                for span in entries(diagnostics, 'val_loss_by_position')
                if None not in (span.get('from'), span.get('to'), span.get('loss'))
            ]
    return []


def last_sample(record: dict[str, Any]) -> dict[str, Any] | None:
    """What the run wrote at the last evaluation that has text."""
    for entry in reversed(entries(record, 'eval_steps')):
        sample = mapping(entry, 'sample')
        if text(sample, 'text') is not None:
            return {**sample, 'prompt': text(sample, 'prompt', ''), 'iter': entry['iter']}
    return None


def stability_of(record: dict) -> Stability:
    summary = mapping(record, 'summary')
    return Stability(
        spikes=count(summary, 'loss_spikes') or 0,
        nonfinite=count(summary, 'nonfinite_updates') or 0,
        rollbacks=sum(event.get('event') == 'rollback' for event in entries(record, 'events')),
        gradient_growth=number(summary, 'gradient_growth'),
    )


# --- Studies -------------------------------------------------------------------------------------


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
        variants = {_required(text(v, 'label'), 'label'): v for v in entries(plan, 'variants')}
        return StudyPlan(
            question=text(plan, 'question', ''),
            command=_required(text(plan, 'command'), 'command'),
            budget={key: number(plan['budget'], key) for key in mapping(plan, 'budget')},
            tuned=[str(key) for key in plan['tuned']],
            variants={label: mapping(variant, 'asked') for label, variant in variants.items()},
            folders={point['folder']: point['variant'] for point in entries(plan, 'points')},
            baseline=text(plan, 'baseline'),
            tuning={label: mapping(variant, 'tuned') for label, variant in variants.items()},
            at_edge={
                label: [str(key) for key in variant.get('tuned_at_edge') or []]
                for label, variant in variants.items()
            },
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


# --- Which runs ----------------------------------------------------------------------------------


def folder_of(path: Path) -> Path:
    """The run folder that a path stands for; a record under another name stands for itself."""
    return path.parent if path.name in ('record.json', 'journal.jsonl') else path


def load(
    paths: Sequence[Path], latest: int | None = None, score: str = 'final'
) -> tuple[list[Run], list[str]]:
    """Rows of all runs at or below `paths`, newest first, and one line for each that is skipped.

    score: whether a run is judged by its final evaluation or by its best. Raises UserError for a
    path that does not exist and where no run can be read.
    """
    missing = [f'{path}: no such file or folder' for path in paths if not path.exists()]
    if missing:
        raise UserError(*missing)

    records = [] if paths else find_records(Path('.'))
    for path in paths:
        # A folder with no run is left to the reader, which takes more than a search does.
        records += ([] if path.is_file() else find_records(path)) or [path]
    # A run that two paths lead to counts once.
    distinct = {folder_of(path).resolve(): path for path in reversed(records)}

    runs, skipped = [], []
    for path in distinct.values():
        try:
            runs.append(run_of(read_outline(path), path, score))
        except UserError as error:
            reason = ' '.join(str(error).split())
            skipped.append(reason if str(path) in reason else f'{path}: {reason}')
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            reason = f'{type(error).__name__}: {error}'
            if isinstance(error, Malformed):
                reason = str(error)
            skipped.append(f'{path}: not a complete record ({reason})')
    if not runs:
        raise UserError(
            f'no run to compare at or below {", ".join(map(str, paths)) or Path.cwd()}. '
            'Make one with: python train.py config/arch_llama.py --max_iters=100, '
            'or say where runs are: python compare_architectures.py OUT_DIR',
            *(f'skipped {line}' for line in skipped),
        )
    runs.sort(key=lambda run: run.start, reverse=True)
    return without_other_attempts(runs)[:latest], skipped


def without_other_attempts(newest_first: Sequence[Run]) -> list[Run]:
    """The runs, of each point of a study only the newest, and none made to tune or to time.

    A point whose run was killed before it had saved anything is begun anew; one that diverged
    stays, since that is evidence. What chose an option is no evidence for it; such runs are
    compared where no point of their study is.
    """
    with_points = {run.study for run in newest_first if run.variant is not None}
    compared, points = [], set()
    for run in newest_first:
        if run.variant is None:
            if run.study is None or run.study not in with_points:
                compared.append(run)
        elif run.folder.parent not in points or run.outcome == DIVERGED:
            points.add(run.folder.parent)
            compared.append(run)
    return compared
