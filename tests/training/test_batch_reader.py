"""Batches that a thread reads ahead, as for a GPU."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.in_process import joined, train_here

from data.dataset import load_dataset
from training import session as session_module
from training.batch_reader import BatchReader, HostBatch

CPU, CUDA = torch.device('cpu'), torch.device('cuda:3')


@pytest.fixture
def devices(monkeypatch):
    """The devices that threads choose, with the name of the thread."""
    chosen = []
    monkeypatch.setattr(
        torch.cuda,
        'set_device',
        lambda device: chosen.append((device, threading.current_thread().name)),
    )
    return chosen


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith('reader')]


def test_next_batch_is_read_ahead_in_a_thread_of_the_device(devices):
    numbers, ahead = [], threading.Event()

    def read(number):
        numbers.append(number)
        if number == 4:
            ahead.set()
        return HostBatch([torch.tensor(number)], number)

    reader = BatchReader(read, step=2, device=CUDA)
    assert reader(2).digest == 2
    assert ahead.wait(10)  # while batch 2 is used
    assert devices == [(CUDA, 'reader_0')]
    assert [reader(number).digest for number in (4, 6)] == [4, 6]
    assert reader(20).digest == 20  # after a rollback
    assert reader(22).digest == 22
    reader.close()
    for thread in readers():
        thread.join(10)
    assert not readers()
    assert numbers[:3] == [2, 4, 6] and numbers.count(20) == numbers.count(22) == 1


def test_cpu_reads_in_the_calling_thread():
    threads = []
    reader = BatchReader(lambda number: threads.append(threading.current_thread()), 1, CPU)
    reader(0)
    reader.close()
    assert threads == [threading.main_thread()]


def test_error_is_raised_when_its_batch_is_used(devices):
    def read(number):
        if number == 1:
            raise OSError('a broken disk')
        return HostBatch([], number)

    reader = BatchReader(read, 1, CUDA)
    assert reader(0).digest == 0
    with pytest.raises(OSError, match='a broken disk'):
        reader(1)
    reader.close()


@pytest.mark.slow
def test_run_that_reads_ahead_is_the_same(devices, tiny_dataset, tmp_path, monkeypatch):
    """Also the hash of its data, and when it is resumed."""
    options = {'n_layer': 1, 'n_embd': 16, 'eval_interval': 2}
    plain = train_here(tiny_dataset, tmp_path / 'plain', **options)
    monkeypatch.setattr(
        session_module, 'BatchReader', lambda read, step, device: BatchReader(read, step, CUDA)
    )
    ahead = train_here(tiny_dataset, tmp_path / 'ahead', **options)
    for run in (plain, ahead):
        assert run.code == 0
    assert ahead.losses == plain.losses
    assert torch.equal(joined(ahead.trained_on), joined(plain.trained_on))
    hashes = [[entry['data_hash'] for entry in run.record['eval_steps']] for run in (plain, ahead)]
    assert hashes[0] == hashes[1]

    stopped = train_here(tiny_dataset, tmp_path / 'resumed', **options, max_iters=2)
    assert stopped.code == 0
    resumed = train_here(tiny_dataset, tmp_path / 'resumed', **options, init_from='resume')
    assert resumed.record['eval_steps'][-1]['data_hash'] == hashes[0][-1]
    for thread in readers():
        thread.join(10)
    assert not readers() and devices


def test_split_is_read_by_several_threads(tiny_dataset):
    """An evaluation reads windows of the training split while the thread reads ahead."""
    dataset = load_dataset(str(tiny_dataset), 64)
    split = dataset.splits['train']
    tokens = split.read(0, len(split))

    def is_right(seed: int) -> bool:
        starts = np.random.default_rng(seed).integers(len(tokens) - 64, size=400)
        expected = np.stack([tokens[start : start + 64] for start in starts])
        return np.array_equal(split.windows(starts, 64), expected)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(is_right, range(16)))
