"""The figures of a run's record, each recomputed in another way."""

import json
import os
import random
import signal
import statistics

import pytest
from helpers.in_process import train_here
from helpers.loggers import log_a_run, started_logger
from helpers.record_schema import VALIDATOR
from helpers.sample_run import (
    ARCHITECTURE,
    CONFIG,
    MAX_ITERS,
    METADATA,
    NO_PEAK,
    STARTUP_INFO,
    TOKENS_PER_ITER,
    checkpoint,
    evaluation,
    iteration,
)

from data.dataset import TokenDataset
from data.order import EpochOrder, RandomOrder
from records.record import assemble, read_outline, read_record
from records.summary import memory_peak
from training.resume import TrainingProgress

PER_TOKEN = STARTUP_INFO['flops']['per_token']
START = {
    'kind': 'start',
    'time': 0.0,
    'run_name': 'r',
    'start_time': '2026-01-01T00:00:00+00:00',
    'config': CONFIG,
    'architecture': ARCHITECTURE,
    'metadata': METADATA,
    'startup_info': STARTUP_INFO,
}


def logged_iteration(
    last: int, milliseconds: float, steps: int, peak: float | None = 312.0
) -> dict:
    """An iteration whose rates follow from its time, as train.py has it."""
    entry = iteration(last, time_ms=milliseconds, steps=steps)
    achieved = TOKENS_PER_ITER / milliseconds * 1e3 * PER_TOKEN / 1e12
    entry['tokens_per_sec'] = TOKENS_PER_ITER / milliseconds * 1e3
    entry['mfu'] |= {
        'achieved_tflops': achieved,
        'hardware_peak_tflops': peak,
        'mfu_percent': peak and 100 * achieved / peak,
    }
    return {'kind': 'iteration', 'time': 1.0, **entry}


def make_log(seed: int, peaks=(312.0,)) -> tuple[list[dict], list[tuple[int, float, float]]]:
    """A journal's lines, and (updates, seconds, peak) of each entry after the first."""
    draw = random.Random(seed)
    lines, steady, last = [START, logged_iteration(0, 90_000.0, 1)], [], 0
    for number in range(20):
        steps, milliseconds = draw.randint(1, 9), 10 ** draw.uniform(1, 4)
        last += steps
        peak = peaks[number * len(peaks) // 20]
        lines.append(logged_iteration(last, milliseconds, steps, peak))
        steady.append((steps, steps * milliseconds / 1e3, peak))
    return lines, steady


@pytest.mark.parametrize('peaks', [(312.0,), (312.0, 989.0)], ids=['one peak', 'two machines'])
@pytest.mark.parametrize('seed', range(5))
def test_averages_are_totals_over_totals(seed, peaks):
    lines, steady = make_log(seed, peaks)
    summary = assemble(lines)['summary']
    updates, seconds = sum(n for n, _, _ in steady), sum(s for _, s, _ in steady)
    assert summary['avg_time_ms'] == pytest.approx(1e3 * seconds / updates)
    possible = sum(s * peak * 1e12 for _, s, peak in steady)
    flops = updates * TOKENS_PER_ITER * PER_TOKEN
    assert summary['avg_mfu'] == pytest.approx(100 * flops / possible)
    assert summary['train_seconds'] == pytest.approx(seconds + 90.0)
    if len(peaks) == 1:  # then each average follows from the other
        rate = TOKENS_PER_ITER / summary['avg_time_ms'] * 1e3
        assert summary['avg_mfu'] == pytest.approx(100 * rate * PER_TOKEN / (312.0 * 1e12))


def test_average_mfu_ignores_updates_without_peak():
    lines, _ = make_log(0, (312.0, None))
    with_peak = [line for line in lines if line.get('mfu', {}).get('mfu_percent') is not None]
    assert len(with_peak) == 11
    expected = assemble([START, *with_peak])['summary']['avg_mfu']
    assert assemble(lines)['summary']['avg_mfu'] == pytest.approx(expected)


def test_averages_of_older_records_are_recomputed(tmp_path):
    lines, _ = make_log(1)
    end = {'kind': 'end', 'time': 2.0, 'status': 'finished', 'end_time': START['start_time']}
    document = assemble([*lines, end])
    expected = dict(document['summary'])
    del document['summary']['train_seconds']
    document['summary']['avg_mfu'] = 99.0
    alone, folder = tmp_path / 'alone', tmp_path / 'run'
    for place in (alone, folder):
        place.mkdir()
        (place / 'record.json').write_text(json.dumps(document))
    (folder / 'journal.jsonl').write_text('\n'.join(map(json.dumps, [*lines, end])) + '\n')
    assert read_outline(folder)['summary'] == expected
    assert read_record(alone)['summary'] == expected
    assert read_record(alone / 'record.json')['summary'] == expected


def test_summary_of_resumed_run(run_folder):
    summary = log_a_run(run_folder).finish()
    # Updates 1-10 and 21-99 count; 0 and the first five after the resume warm up.
    times = [200.0] * 10 + [300.0] * 10 + [100.0] * 69
    mfu = (30.0 * 10 * 200 + 60.0 * 69 * 100) / (10 * 200 + 69 * 100)
    lines = [json.loads(line) for line in (run_folder / 'journal.jsonl').read_text().splitlines()]
    resume = next(i for i, line in enumerate(lines) if line['kind'] == 'resume')
    first, second = (
        part[-1]['time'] - part[0]['time'] for part in (lines[:resume], lines[resume:])
    )
    assert summary == {
        'total_iterations': 100,
        'final_iter': 100,
        'final_train_loss': 2.5,
        'best_val_loss': 3.5,
        'final_val_loss': 3.75,
        'val_bits_per_byte': 1.5,
        'avg_mfu': pytest.approx(mfu),
        'avg_time_ms': pytest.approx(statistics.fmean(times)),
        'train_seconds': pytest.approx(90.0 + 5 * 50.0 + sum(times) / 1e3),
        'total_tokens': 100 * TOKENS_PER_ITER,
        **{'epochs': None, 'unique_tokens': None},  # older runs do not say
        # 6 x parameters that multiply, and attention over the full square
        'total_flops': 409_600 * (6 * 123_568_128 + 12 * 12 * 12 * 64 * 1024),
        'wall_seconds': pytest.approx(first + second, abs=0.002),
        'peak_memory_gb': 30.0,
        'nonfinite_updates': 0,
        'loss_spikes': 1,
        'gradient_growth': None,  # too short a log
    }


def test_wall_seconds_exclude_time_between_processes():
    shared = {'config': CONFIG, 'metadata': METADATA, 'startup_info': STARTUP_INFO}
    start = {'run_name': 'r', 'start_time': 't', 'architecture': ARCHITECTURE, **shared}
    lines = [
        {'kind': 'start', 'time': 100.0, **start},
        {'kind': 'iteration', 'time': 130.0, **iteration(0)},
        {'kind': 'resume', 'time': 9000.0, 'iter': 0, 'changed': {}, **shared},
        {'kind': 'iteration', 'time': 9007.0, **iteration(0)},
    ]
    assert assemble(lines)['summary']['wall_seconds'] == 37.0
    document = assemble(lines)
    assert assemble(lines) == document, 'assembling must leave the lines as they are'


@pytest.mark.parametrize('interval', [1, 4, 7])
def test_train_seconds_of_evaluations(interval):
    draw = random.Random(interval)
    durations = [draw.uniform(50, 150) for _ in range(30)]
    shared = {'config': CONFIG, 'metadata': METADATA, 'startup_info': STARTUP_INFO}
    start = {'run_name': 'r', 'start_time': 't', 'architecture': ARCHITECTURE, **shared}
    lines = [{'kind': 'start', 'time': 0.0, **start}]
    for last in range(interval - 1, 30, interval):
        mean = statistics.fmean(durations[last + 1 - interval : last + 1])
        entry = {**iteration(last), 'time_ms': mean, 'steps': interval}
        entry['gradients'] = {'norm': 1.0 if last < 15 else 3.0, 'mean': 0.0, 'std': 0.0}
        lines.append({'kind': 'iteration', 'time': 1.0, **entry})
        # Within what one log entry stands for, every update took the same.
        durations[last + 1 - interval : last + 1] = [mean] * interval
    logged = 30 // interval * interval
    lines += [{'kind': 'evaluation', 'time': 2.0, **evaluation(i)} for i in (0, 5, 16, logged, 30)]
    document = assemble(lines)
    for entry in document['eval_steps']:
        known = entry['iter'] <= logged
        expected = pytest.approx(sum(durations[: entry['iter']]) / 1000) if known else None
        assert entry['train_seconds'] == expected
    norms = [e['gradients']['norm'] for e in document['training_iterations']]
    if interval == 1:
        late, early = statistics.fmean(norms[-7:]), statistics.fmean(norms[7:14])
        assert document['summary']['gradient_growth'] == pytest.approx(late / early)


def test_unknown_summary_values_are_null(run_folder):
    started_logger(run_folder, NO_PEAK)
    summary = read_record(run_folder)['summary']
    assert [summary.pop(key) for key in ('final_iter', 'nonfinite_updates', 'loss_spikes')] == [
        0
    ] * 3
    assert summary.pop('total_iterations') == MAX_ITERS
    assert summary.pop('wall_seconds') == 0
    assert set(summary.values()) == {None}
    VALIDATOR.validate(read_record(run_folder))


def test_single_logged_iteration_counts_as_steady(run_folder):
    logger = started_logger(run_folder)
    logger.iteration(iteration(0, time_ms=7.0))
    summary = logger.finish('interrupted')
    assert (summary['avg_time_ms'], summary['final_iter']) == (7.0, 1)


def test_peak_memory_falls_back_to_process(run_folder):
    logger, entry = started_logger(run_folder), iteration(0)
    memory = {'allocated_gb': 1.0, 'peak_gb': 4.0, 'reserved_gb': 2.0, 'rss_gb': 3.0}
    for key, expected in (('peak_gb', 4.0), ('reserved_gb', 2.0), ('allocated_gb', 1.0)):
        entry['memory'] = dict(memory)
        assert memory_peak(entry) == expected
        memory[key] = None
    logger.iteration({**entry, 'memory': memory})
    assert memory_peak({'memory': memory}) == logger.finish()['peak_memory_gb'] == 3.0
    assert memory_peak({'memory': dict.fromkeys(memory)}) is None


def test_summary_counts_spikes_and_skipped_updates(run_folder):
    logger = started_logger(run_folder)
    logger.event('nonfinite', 4, '2 skipped', count=2)
    logger.iteration(iteration(5, loss=float('nan')))  # an event of its own, which counts nothing
    logger.event('loss_spike', 6)
    logger.event('nonfinite', 7, '3 skipped', count=3)
    logger.event('loss_spike', 8)
    logger.event('signal', 9, count=50)
    summary = logger.finish()
    assert (summary['nonfinite_updates'], summary['loss_spikes']) == (5, 2)
    assert len(read_record(run_folder)['events']) == 6
    VALIDATOR.validate(read_record(run_folder))


# --- One moment -----------------------------------------------------------------------------------


@pytest.mark.parametrize('sampling', ['random', 'epoch'])
def test_interrupted_run_counts_data_up_to_last_update(
    tiny_dataset, tmp_path, monkeypatch, sampling
):
    """Logged after updates 1 and 5, evaluated after 0 and 4, stopped and saved after 7."""
    order = {'random': RandomOrder, 'epoch': EpochOrder}[sampling](1337, 30_000, 32)
    read = TokenDataset.batch

    def stopping(dataset, order, first_number, count):
        if first_number == 6 * 4 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(dataset, order, first_number, count)

    monkeypatch.setattr(TokenDataset, 'batch', stopping)
    options = {'sampling': sampling, 'max_iters': 100, 'log_interval': 4, 'eval_interval': 4}
    stopped = train_here(tiny_dataset, tmp_path, **options)
    assert stopped.code == 143
    record = stopped.record
    assert [entry['iter'] for entry in record['training_iterations']] == [0, 4]
    assert [entry['iter'] for entry in record['eval_steps']] == [0, 4]
    tokens, summary = 7 * 4 * 32, record['summary']
    assert tokens == sum(batch.numel() for batch, _ in stopped.trained_on)
    seen = {key: summary[key] for key in ('final_iter', 'total_tokens', 'epochs', 'unique_tokens')}
    assert seen == {
        'final_iter': 7,
        'total_tokens': tokens,
        'epochs': tokens / order.tokens_per_epoch,
        'unique_tokens': order.unique_tokens(7 * 4),
    }
    assert summary['total_flops'] == tokens * record['startup_info']['flops']['per_token']


def test_entries_count_data_up_to_their_update(tiny_dataset, tmp_path):
    record = train_here(tiny_dataset, tmp_path, max_iters=6, eval_interval=2).record
    order = RandomOrder(1337, 30_000, 32)
    entries = [(entry['iter'] + 1, entry) for entry in record['training_iterations']]
    entries += [(entry['iter'], entry) for entry in record['eval_steps'] + record['checkpoints']]
    assert len(entries) == 6 + 4 + 3
    for updates, entry in entries:
        assert entry['tokens_seen'] == updates * 4 * 32
        assert entry['epochs'] == updates * 4 * 32 / 30_000
        assert entry['unique_tokens'] == order.unique_tokens(updates * 4)


def test_tokens_seen_with_changed_batch_size(tiny_dataset, tmp_path):
    """After a resume with three times the batch, earlier tokens keep their count."""
    first = train_here(tiny_dataset, tmp_path, max_iters=2)
    options = {'max_iters': 4, 'batch_size': 6, 'init_from': 'resume'}
    second = train_here(tiny_dataset, tmp_path, **options)
    read = [sum(tokens.numel() for tokens, _ in run.trained_on) for run in (first, second)]
    assert read == [2 * 4 * 32, 2 * 12 * 32]
    entries = second.record['training_iterations']
    assert [entry['tokens_seen'] for entry in entries] == [128, 256, 256 + 384, 256 + 768]
    summary = second.record['summary']
    assert summary['total_tokens'] == sum(read)
    assert summary['epochs'] is None and summary['unique_tokens'] is None  # another order


def test_tokens_of_older_records_up_to_last_update():
    older = [
        START,
        {'kind': 'evaluation', 'time': 0.5, **evaluation(0), 'epochs': 0.0, 'unique_tokens': 0},
        {'kind': 'iteration', 'time': 1.0, **iteration(10)},
        {'kind': 'checkpoint', 'time': 2.0, **checkpoint(15)},
    ]
    summary = assemble(older)['summary']
    assert (summary['final_iter'], summary['total_tokens']) == (15, 15 * TOKENS_PER_ITER)
    # What they counted at an earlier moment only is not known of this one.
    assert summary['epochs'] is None and summary['unique_tokens'] is None


def test_tokens_of_older_checkpoints():
    config = {'batch_size': 2, 'gradient_accumulation_steps': 3, 'block_size': 8}
    progress = TrainingProgress.of({'iter': 5, 'progress': {'iter': 5}, 'config': config})
    assert progress.tokens == 5 * 2 * 3 * 8
