"""The figures of a run's record, each recomputed in another way."""

import json
import os
import random
import signal

import pytest
from helpers.in_process import train_here
from helpers.sample_run import (
    ARCHITECTURE,
    CONFIG,
    METADATA,
    STARTUP_INFO,
    TOKENS_PER_ITER,
    checkpoint,
    evaluation,
    iteration,
)

from data.dataset import TokenDataset
from data.order import EpochOrder, RandomOrder
from records.record import assemble, read_outline, read_record
from training.resumption import Progress

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


def logged(last: int, milliseconds: float, steps: int, peak: float | None = 312.0) -> dict:
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


def a_log(seed: int, peaks=(312.0,)) -> tuple[list[dict], list[tuple[int, float, float]]]:
    """A journal's lines, and (updates, seconds, peak) of each entry after the first."""
    draw = random.Random(seed)
    lines, steady, last = [START, logged(0, 90_000.0, 1)], [], 0
    for number in range(20):
        steps, milliseconds = draw.randint(1, 9), 10 ** draw.uniform(1, 4)
        last += steps
        peak = peaks[number * len(peaks) // 20]
        lines.append(logged(last, milliseconds, steps, peak))
        steady.append((steps, steps * milliseconds / 1e3, peak))
    return lines, steady


@pytest.mark.parametrize('peaks', [(312.0,), (312.0, 989.0)], ids=['one peak', 'two machines'])
@pytest.mark.parametrize('seed', range(5))
def test_averages_are_totals_over_totals(seed, peaks):
    lines, steady = a_log(seed, peaks)
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


def test_updates_without_a_peak_have_no_part_in_the_average_of_mfu():
    lines, _ = a_log(0, (312.0, None))
    with_peak = [line for line in lines if line.get('mfu', {}).get('mfu_percent') is not None]
    assert len(with_peak) == 11
    expected = assemble([START, *with_peak])['summary']['avg_mfu']
    assert assemble(lines)['summary']['avg_mfu'] == pytest.approx(expected)


def test_means_of_rates_in_older_records_are_not_believed(tmp_path):
    lines, _ = a_log(1)
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


# --- One moment -----------------------------------------------------------------------------------


@pytest.mark.parametrize('sampling', ['random', 'epoch'])
def test_an_interrupted_run_counts_its_data_up_to_its_last_update(
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


def test_every_entry_counts_the_data_up_to_its_own_update(tiny_dataset, tmp_path):
    record = train_here(tiny_dataset, tmp_path, max_iters=6, eval_interval=2).record
    order = RandomOrder(1337, 30_000, 32)
    entries = [(entry['iter'] + 1, entry) for entry in record['training_iterations']]
    entries += [(entry['iter'], entry) for entry in record['eval_steps'] + record['checkpoints']]
    assert len(entries) == 6 + 4 + 3
    for updates, entry in entries:
        assert entry['tokens_seen'] == updates * 4 * 32
        assert entry['epochs'] == updates * 4 * 32 / 30_000
        assert entry['unique_tokens'] == order.unique_tokens(updates * 4)


def test_tokens_are_those_of_the_batches_that_there_were(tiny_dataset, tmp_path):
    """Resumed with three times the batch: what came before it is not counted anew."""
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


def test_older_records_count_tokens_up_to_their_last_update_too():
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


def test_older_checkpoints_count_tokens_by_their_batch():
    config = {'batch_size': 2, 'gradient_accumulation_steps': 3, 'block_size': 8}
    progress = Progress.of({'iter': 5, 'progress': {'iter': 5}, 'config': config})
    assert progress.tokens == 5 * 2 * 3 * 8
