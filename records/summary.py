"""The summary of a run's record, computed from the entries of its journal."""

from bisect import bisect_left
from collections.abc import Iterable
from typing import TypedDict

from records.record_types import (
    CheckpointEntry,
    EvaluationEntry,
    Event,
    IterationEntry,
    Record,
    Summary,
)


class Averages(TypedDict):
    """The keys of a summary that `averages` computes."""

    avg_mfu: float | None
    avg_time_ms: float | None
    train_seconds: float | None


def summarize(record: Record, wall_seconds: float) -> Summary:
    """The results of a run; None for unknown values. Counts are those after `final_iter`
    iterations, the last that an iteration, an evaluation or a checkpoint recorded."""
    iterations, evaluations = record['training_iterations'], record['eval_steps']
    final_iter, last_entries = _last_entries(record)
    best = best_evaluation(evaluations)
    tokens, epochs, unique_tokens = _data_seen(last_entries, record, final_iter)
    per_token = record['startup_info']['flops']['per_token']
    peaks = [peak for peak in map(memory_peak, iterations) if peak]
    events = record['events']
    return {
        'total_iterations': record['config'].get('max_iters'),
        'final_iter': final_iter,
        'final_train_loss': iterations[-1]['loss'] if iterations else None,
        'best_val_loss': best and best['val_loss'],
        'final_val_loss': evaluations[-1]['val_loss'] if evaluations else None,
        'val_bits_per_byte': best and best['val_bits_per_byte'],
        **averages(iterations, events),
        'total_tokens': tokens,
        'epochs': epochs,
        'unique_tokens': unique_tokens,
        'total_flops': None if tokens is None or per_token is None else tokens * per_token,
        'wall_seconds': round(wall_seconds, 3),
        'peak_memory_gb': max(peaks, default=None),
        # A logged loss that is not finite is an event of this kind too, without a count.
        'nonfinite_updates': sum(e.get('count', 0) for e in events if e['event'] == 'nonfinite'),
        'loss_spikes': sum(event['event'] == 'loss_spike' for event in events),
        'gradient_growth': _gradient_growth(iterations),
    }


def averages(iterations: list[IterationEntry], events: list[Event]) -> Averages:
    """Averages over the iterations, computed from totals: total time by iterations, and total FLOPs
    by the FLOPs possible at peak in that time. A mean of rates would underweight slow iterations.
    """
    # The first logged entry of a process contains its warm-up (compilation, caches): left out.
    starts = [0, *(event['iter'] or 0 for event in events if event['event'] == 'resume')]
    warm_up = {next((e['iter'] for e in iterations if e['iter'] >= k), None) for k in starts}
    steady = [entry for entry in iterations if entry['iter'] not in warm_up] or iterations
    timed = [(e, e['time_ms'] * e['steps']) for e in steady if e['time_ms'] is not None]
    updates, milliseconds = sum(e['steps'] for e, _ in timed), sum(ms for _, ms in timed)
    possible = achieved = 0.0  # TFLOP/s times ms
    for entry, ms in timed:
        mfu, peak = entry['mfu']['mfu_percent'], entry['mfu']['hardware_peak_tflops']
        if mfu is not None and peak is not None:
            possible += peak * ms
            achieved += peak * ms * mfu / 100
    trained = [e['time_ms'] * e['steps'] for e in iterations if e['time_ms'] is not None]
    return {
        'avg_mfu': 100 * achieved / possible if possible else None,
        'avg_time_ms': milliseconds / updates if updates else None,
        'train_seconds': round(sum(trained) / 1000, 6) if trained else None,
    }


def add_training_seconds(record: Record) -> None:
    """Set `train_seconds` of each evaluation: the time of the iterations before it, if logged.

    A log entry covers `steps` iterations, up to and including its own.
    """
    ends, totals = [0], [0.0]  # numbers of iterations, and the seconds that they took
    for entry in record['training_iterations']:
        begin = max(ends[-1], entry['iter'] + 1 - entry['steps'])
        for end, milliseconds in ((begin, 0.0), (entry['iter'] + 1, entry['time_ms'])):
            totals.append(totals[-1] + (end - ends[-1]) * (milliseconds or 0.0) / 1000)
            ends.append(end)
    for evaluation in record['eval_steps']:
        index = bisect_left(ends, evaluation['iter'])
        if index == len(ends):
            evaluation['train_seconds'] = None
            continue
        before = max(index - 1, 0)
        beyond, width = ends[index] - evaluation['iter'], ends[index] - ends[before]
        part = (totals[index] - totals[before]) * beyond / width if beyond else 0.0
        evaluation['train_seconds'] = round(totals[index] - part, 6)


def best_evaluation(evaluations: Iterable[EvaluationEntry]) -> EvaluationEntry | None:
    """The evaluation with the lowest validation loss."""
    measured = [(e['val_loss'], e) for e in evaluations if e['val_loss'] is not None]
    return min(measured, key=lambda pair: pair[0], default=(None, None))[1]


def memory_peak(entry: IterationEntry) -> float | None:
    """The peak of the memory in use in GB: the device's peak, else the best known approximation."""
    memory = entry['memory']
    sizes = (memory['peak_gb'], memory['reserved_gb'], memory['allocated_gb'], memory['rss_gb'])
    return next((size for size in sizes if size is not None), None)


def _last_entries(
    record: Record,
) -> tuple[int, list[IterationEntry | EvaluationEntry | CheckpointEntry]]:
    """The number of iterations known to be done, and the entries written right after the last."""
    entries: list[tuple[int, IterationEntry | EvaluationEntry | CheckpointEntry]] = []
    entries += [(entry['iter'] + 1, entry) for entry in record['training_iterations']]
    entries += [(entry['iter'], entry) for entry in record['eval_steps']]
    entries += [(entry['iter'], entry) for entry in record['checkpoints']]
    final_iter = max((done for done, _ in entries), default=0)
    return final_iter, [entry for done, entry in entries if done == final_iter]


def _data_seen(
    last_entries: list[IterationEntry | EvaluationEntry | CheckpointEntry],
    record: Record,
    final_iter: int,
) -> tuple[int | None, float | None, int | None]:
    """Tokens, epochs and unique tokens seen in `final_iter` iterations, from the last entries.

    Older records have the tokens in iterations only: those of later iterations are added.
    """
    tokens = epochs = unique_tokens = None
    for entry in reversed(last_entries):  # the first entry that has them decides
        tokens = entry.get('tokens_seen', tokens)
        epochs = entry.get('epochs', epochs)
        unique_tokens = entry.get('unique_tokens', unique_tokens)
    iterations = record['training_iterations']
    if tokens is None and iterations:
        last, per_iter = iterations[-1], record['startup_info']['data'].get('tokens_per_iter')
        tokens = last['tokens_seen']
        if per_iter is not None:
            tokens += (final_iter - last['iter'] - 1) * per_iter
    return tokens, epochs, unique_tokens


def _gradient_growth(iterations: list[IterationEntry]) -> float | None:
    """The ratio of the mean gradient norm in the last quarter of the log to that in the second.

    The first quarter contains the warm-up. None if the log is too short.
    """
    gradients = [entry.get('gradients') for entry in iterations]
    norms = [norm for block in gradients if block and (norm := block.get('norm')) is not None]
    quarter = len(norms) // 4
    if quarter < 2:
        return None
    early, late = sum(norms[quarter : 2 * quarter]), sum(norms[-quarter:])
    return late / early if early else None
