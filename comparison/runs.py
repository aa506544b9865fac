"""The values of one record that a comparison uses, each checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from common.architecture_identity import identity_of_record, with_neutral_values
from common.formatting import nats, or_dash
from comparison.conditions import run_conditions
from comparison.record_fields import (
    MalformedRecord,
    count,
    entries,
    mapping,
    number,
    required,
    text,
)
from comparison.study_plan import StudyPlan, study_membership
from records.record import STATUSES
from records.record_types import Record

FINISHED, DIVERGED, UNMEASURED = 'finished', 'diverged', 'without a validation loss'
OUTCOME_EVENTS = ('nonfinite', 'rollback', 'resume', 'failed')  # events that show why a run ended


class CurvePoint(NamedTuple):
    """A validation loss and its cost so far; None where the record has no value."""

    iter: int
    tokens: float | None
    flops: float | None
    seconds: float | None
    loss: float


class PositionLoss(NamedTuple):
    """The mean validation loss at positions `start` … `end` - 1 of the context."""

    start: int
    end: int
    loss: float


class Stability(NamedTuple):
    """Signs of instability in a run."""

    spikes: int
    nonfinite: int
    rollbacks: int
    gradient_growth: float | None  # norm late in training over norm early; None: log too short


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """The values of one record; None: unknown."""

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
    conditions: dict[str, tuple]  # several values if a resume changed them
    code: dict[str, str]  # source file -> hash
    params: int | None
    active_params: int | None  # used by one token
    flops_per_token: float | None
    causal_flops_per_token: float | None
    val_loss: float | None  # nats per token, of the final or best evaluation
    bits_per_byte: float | None  # of the same evaluation
    best_val_loss: float | None  # after at least one iteration
    untrained_loss: float | None  # before the first iteration
    evaluations: int  # after at least one iteration
    mfu_percent: float | None
    time_ms: float | None  # per iteration
    tokens_per_sec: float | None
    wall_seconds: float | None
    peak_memory_gb: float | None
    total_flops: float | None
    causal_flops: float | None
    train_seconds: float | None
    peak_tflops: float | None  # of all devices
    curve: list[CurvePoint]
    position_losses: list[PositionLoss]
    sample: dict[str, Any] | None  # the last generated text: prompt, text and iter
    stability: Stability
    command: str
    data_hashes: dict[int, str]  # iteration -> hash of the training sequences so far
    study: 'StudyPlan | None' = None
    variant: str | None = None  # label in that study

    def __repr__(self) -> str:
        progress = f'{self.iters_done}/{or_dash(self.max_iters, str)}'
        loss = or_dash(self.val_loss, nats, 'unknown')
        return (
            f'<Run {self.name}: {self.variant or self.architecture}, '
            f'seed {self.config.get("seed")}, {self.outcome} {progress}, val_loss {loss}>'
        )

    @property
    def blown_up(self) -> bool:
        """Whether it diverged or ended above its untrained loss."""
        if self.outcome == DIVERGED:
            return True
        if not self.curve or self.untrained_loss is None:
            return False
        return self.curve[-1].loss > self.untrained_loss


# Attributes of a run that the CSV and JSON outputs contain.
FIGURES = (
    *('val_loss', 'best_val_loss', 'evaluations', 'bits_per_byte', 'params'),
    *('flops_per_token', 'causal_flops_per_token', 'total_flops', 'causal_flops'),
    *('mfu_percent', 'tokens_per_sec', 'time_ms'),
    *('wall_seconds', 'active_params', 'peak_memory_gb', 'architecture'),
    *('iters_done', 'max_iters', 'train_seconds'),
)


def run_data(run: Run) -> dict[str, Any]:
    """A run as plain values: a row of the CSV and JSON outputs and of `RunList.rows`."""
    return {
        'run': run.name,
        'folder': str(run.folder),
        'status': run.status,
        'outcome': run.outcome,
        'seed': run.config.get('seed'),
        'data_seed': run.config.get('data_seed'),
        **{key: getattr(run, key) for key in FIGURES},
    }


# --- From record to run --------------------------------------------------------------------------


def _identity(architecture: Mapping) -> str:
    """The identity of the architecture, whichever version wrote the record."""
    stored = required(text(architecture, 'hash'), 'hash of the architecture')
    version = count(architecture, 'hash_version')
    if version is None:
        version = 1  # before there were versions
    try:
        return identity_of_record(stored, version, mapping(architecture, 'choices'))
    except ValueError as error:
        raise MalformedRecord(str(error)) from None


def run_from_record(record: Record, path: Path, score: str = 'final') -> Run:
    """The run of one record. Raises ValueError if it is incomplete or malformed."""
    config, metadata = mapping(record, 'config'), mapping(record, 'metadata')
    architecture, summary = mapping(record, 'architecture'), mapping(record, 'summary')
    for key in ('seed', 'data_seed'):
        count(config, key)
    status = text(record, 'status')
    if status not in STATUSES:
        raise MalformedRecord(f'status is {status!r}, not one of {", ".join(STATUSES)}')
    evaluations = trained_evaluations(record)
    start = datetime.fromisoformat(required(text(record, 'start_time'), 'start_time'))
    return Run(
        name=required(text(record, 'run_name'), 'run_name'),
        folder=run_folder(path),
        start=start.astimezone(),
        status=status,
        iters_done=required(count(summary, 'final_iter'), 'final_iter'),
        max_iters=count(config, 'max_iters'),
        architecture=required(text(architecture, 'name'), 'name of the architecture'),
        architecture_hash=_identity(architecture),
        choices=with_neutral_values(mapping(architecture, 'choices')),
        config=with_neutral_values(config),
        code={str(file): str(digest) for file, digest in mapping(metadata, 'code').items()},
        **_scores(record, status, evaluations, score),
        **_costs(record),
        position_losses=losses_by_position(record),
        sample=last_sample(record),
        stability=training_stability(record),
        command=text(metadata, 'command') or '',
        data_hashes={e['iter']: h for e in evaluations if (h := text(e, 'data_hash')) is not None},
        **study_membership(run_folder(path)),
    )


def _scores(record: Record, status: str, evaluations: list[dict], score: str) -> dict[str, Any]:
    """The outcome of the run and its validation losses."""
    startup = mapping(record, 'startup_info')
    measured = [entry for entry in evaluations if entry['val_loss'] is not None]
    best = min(measured, key=lambda entry: entry['val_loss'], default={})
    counted = best if score == 'best' else (measured or [{}])[-1]
    outcome = run_outcome(record, status, evaluations)
    tokens_per_iter = count(mapping(startup, 'data'), 'tokens_per_iter')
    flops_per_token = number(mapping(startup, 'flops'), 'per_token_causal')
    return {
        'outcome': outcome,
        'val_loss': None if outcome == DIVERGED else counted.get('val_loss'),
        'bits_per_byte': None if outcome == DIVERGED else counted.get('val_bits_per_byte'),
        'best_val_loss': best.get('val_loss'),
        'untrained_loss': untrained_loss(record),
        'evaluations': len(measured),
        'conditions': run_conditions(record, len(measured)),
        'curve': loss_curve(measured, tokens_per_iter, flops_per_token),
    }


def _costs(record: Record) -> dict[str, Any]:
    """The costs of the model and its training."""
    startup, summary = mapping(record, 'startup_info'), mapping(record, 'summary')
    data, model, flops = (mapping(startup, part) for part in ('data', 'model', 'flops'))
    time_ms, tokens_per_iter = number(summary, 'avg_time_ms'), count(data, 'tokens_per_iter')
    total_params = count(model, 'total_params')
    return {
        'params': total_params,
        'active_params': count(model, 'active_params') or total_params,
        'flops_per_token': number(flops, 'per_token'),
        'causal_flops_per_token': number(flops, 'per_token_causal'),
        'mfu_percent': number(summary, 'avg_mfu'),
        'time_ms': time_ms,
        'tokens_per_sec': 1000 * tokens_per_iter / time_ms if time_ms and tokens_per_iter else None,
        'wall_seconds': number(summary, 'wall_seconds'),
        'peak_memory_gb': number(summary, 'peak_memory_gb'),
        'total_flops': number(summary, 'total_flops'),
        'causal_flops': causal_flops(record),
        'train_seconds': number(summary, 'train_seconds') or number(summary, 'wall_seconds'),
        'peak_tflops': number(mapping(startup, 'hardware'), 'peak_tflops'),
    }


def run_folder(path: Path) -> Path:
    """The run folder of a record; the file itself if it has another name."""
    return path.parent if path.name in ('record.json', 'journal.jsonl') else path


def trained_evaluations(record: Record) -> list[dict]:
    """The evaluations after at least one iteration, in order and checked.

    An earlier one measures the initialization, not the training.
    """
    after = []
    for entry in entries(record, 'eval_steps'):
        if required(count(entry, 'iter'), 'iter of an evaluation') > 0:
            for key in ('val_loss', 'val_bits_per_byte', 'train_seconds'):
                number(entry, key)
            after.append({'val_loss': None, **entry})
    return sorted(after, key=lambda entry: entry['iter'])


def untrained_loss(record: Record) -> float | None:
    before = [entry for entry in entries(record, 'eval_steps') if entry['iter'] == 0]
    return number(before[0], 'val_loss') if before else None


def run_outcome(record: Record, status: str, evaluations: list[dict]) -> str:
    """How a run ended.

    It diverged if a non-finite loss or gradient stopped it, or if its last validation loss is not
    finite.
    """
    if evaluations and evaluations[-1]['val_loss'] is None:
        return DIVERGED
    if stopped_by_nonfinite(record):
        return DIVERGED
    return UNMEASURED if status == FINISHED and not evaluations else status


def stopped_by_nonfinite(record: Record) -> bool:
    """Whether a run failed because of a non-finite update, and not merely after one."""
    if record['status'] != 'failed' or mapping(record, 'config').get('on_nonfinite') == 'skip':
        return False
    kinds = [event.get('event') for event in entries(record, 'events')]
    if 'nonfinite' in kinds:
        return [kind for kind in kinds if kind in OUTCOME_EVENTS][-2:] == ['nonfinite', 'failed']
    return bool(count(mapping(record, 'summary'), 'nonfinite_updates'))


def causal_flops(record: Record) -> float | None:
    """The total training FLOPs, with attention over the causal half (fair to sliding windows).

    The total in the record counts the full square.
    """
    flops = mapping(mapping(record, 'startup_info'), 'flops')
    total, full, causal = (
        number(mapping(record, 'summary'), 'total_flops'),
        number(flops, 'per_token'),
        number(flops, 'per_token_causal'),
    )
    return total * causal / full if total is not None and full and causal else None


def loss_curve(
    measured: list[dict], tokens_per_iter: int | None, per_token: float | None
) -> list[CurvePoint]:
    """The validation losses after at least one iteration, with their costs."""
    points = []
    for entry in measured:
        tokens = tokens_seen(entry, tokens_per_iter)
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


def tokens_seen(entry: dict, tokens_per_iter: int | None) -> int | None:
    """The training tokens before an evaluation; from its iteration in an older record."""
    tokens = count(entry, 'tokens_seen')
    return tokens_per_iter and entry['iter'] * tokens_per_iter if tokens is None else tokens


def losses_by_position(record: Record) -> list[PositionLoss]:
    """The losses of the last evaluation of a trained model; empty if not recorded."""
    for entry in reversed(entries(record, 'eval_steps')):
        if entry['iter'] > 0 and (diagnostics := mapping(entry, 'diagnostics')):
            losses = []
            for span in entries(diagnostics, 'val_loss_by_position'):
                start, end, loss = count(span, 'from'), count(span, 'to'), number(span, 'loss')
                if start is not None and end is not None and loss is not None:
                    losses.append(PositionLoss(start, end, loss))
            return losses
    return []


def last_sample(record: Record) -> dict[str, Any] | None:
    """The text generated at the last evaluation that has one."""
    for entry in reversed(entries(record, 'eval_steps')):
        sample = mapping(entry, 'sample')
        if text(sample, 'text') is not None:
            return {**sample, 'prompt': text(sample, 'prompt') or '', 'iter': entry['iter']}
    return None


def training_stability(record: Record) -> Stability:
    summary = mapping(record, 'summary')
    return Stability(
        spikes=count(summary, 'loss_spikes') or 0,
        nonfinite=count(summary, 'nonfinite_updates') or 0,
        rollbacks=sum(event.get('event') == 'rollback' for event in entries(record, 'events')),
        gradient_growth=number(summary, 'gradient_growth'),
    )
