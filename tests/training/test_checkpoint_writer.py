"""Asynchronous saves are as safe and complete as synchronous ones."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.in_process import train_here

import train
from common.errors import UserError
from data.dataset import TokenDataset
from model_builder import Transformer
from parallel import sharded_state
from training import checkpoint as checkpoint_module
from training import checkpoint_writer
from training.checkpoint import list_checkpoints, load_state, read_index

OPTIONS = {'n_layer': 1, 'eval_iters': 1, 'eval_interval': 2, 'async_save': True}
SEQUENCES = 4  # per iteration


def journal(run) -> list[tuple]:
    """Kind and iter of every line."""
    lines = map(json.loads, (run.folder / 'journal.jsonl').read_text().splitlines())
    return [(line['kind'], line.get('iter')) for line in lines]


def on_disk(run_folder) -> list[int]:
    """The iterations of the saved checkpoints, each read and verified."""
    checkpoints = map(read_index, list_checkpoints(run_folder / 'checkpoints'))
    return [checkpoint.iter for checkpoint in checkpoints if load_state(checkpoint)]


def test_save_waits_for_previous_save(delayed_saves, tiny_dataset, tmp_path):
    run = train_here(tiny_dataset, tmp_path, **OPTIONS, max_iters=6, keep_best=False)
    assert run.code == 0
    # Published when the next save begins, and at the end of training.
    lines = [line for line in journal(run) if line[0] in ('iteration', 'checkpoint', 'end')]
    assert lines == [
        *(('iteration', n) for n in (0, 1, 2, 3)),
        ('checkpoint', 2),
        *(('iteration', n) for n in (4, 5)),
        ('checkpoint', 4),
        ('checkpoint', 6),
        ('end', None),
    ]
    # After the first there is always one: a newer one is published before older ones are removed.
    assert delayed_saves == [[], [2], [4]]
    assert on_disk(run.folder) == [6]
    assert not [path for path in (run.folder / 'checkpoints').iterdir() if path.name[0] == '.']


def fail_at(monkeypatch, iteration: int) -> None:
    """Raise UserError when the data of this iteration is read."""
    read = TokenDataset.batch

    def batch(self, order, first_number, count):
        if first_number == iteration * SEQUENCES:
            raise UserError('the data is gone')
        return read(self, order, first_number, count)

    monkeypatch.setattr(TokenDataset, 'batch', batch)


def test_failed_run_publishes_checkpoint_in_progress(
    delayed_saves, monkeypatch, tiny_dataset, tmp_path, capsys
):
    fail_at(monkeypatch, iteration=3)
    run = train_here(tiny_dataset, tmp_path, **OPTIONS)
    assert (run.code, run.record['status']) == (2, 'failed')
    assert 'the data is gone' in capsys.readouterr().err
    assert on_disk(run.folder) == [2] == [entry['iter'] for entry in run.record['checkpoints']]


def test_failed_save_does_not_hide_first_error(
    delayed_saves, monkeypatch, tiny_dataset, tmp_path, capsys
):
    fail_at(monkeypatch, iteration=3)

    def save(*arguments):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', save)
    run = train_here(tiny_dataset, tmp_path, **OPTIONS)
    assert (run.code, run.record['status']) == (2, 'failed')
    error = capsys.readouterr().err
    assert 'the data is gone' in error and 'No space left' not in error
    assert list((run.folder / 'checkpoints').iterdir()) == []


@pytest.mark.parametrize('async_save', [False, True])
def test_times_of_saving_and_writing_are_recorded(async_save, monkeypatch, tiny_dataset, tmp_path):
    """The clock advances only in collecting (2 s), writing (5 s) and publishing (1 s)."""
    now, written = [0.0], []

    def taking(seconds, function):
        def slow(*arguments):
            now[0] += seconds
            return function(*arguments)

        return slow

    write, run_iteration = checkpoint_module._write_state, train.run_iteration

    def slow_write(*arguments):
        while async_save and not written:  # until training continues
            time.sleep(0.001)
        facts = taking(5, write)(*arguments)
        written.append(now[0])
        return facts

    def iteration_during_write(session, clock):
        run_iteration(session, clock)
        if async_save and session.progress.iter == 3:
            written.append('may be')
            while len(written) < 2:
                time.sleep(0.001)

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    for module in (checkpoint_writer, checkpoint_module, train):
        monkeypatch.setattr(module, 'time', clock)
    monkeypatch.setattr(sharded_state, 'collect', taking(2, sharded_state.collect))
    monkeypatch.setattr(checkpoint_module, '_write_state', slow_write)
    monkeypatch.setattr(checkpoint_module, '_publish', taking(1, checkpoint_module._publish))
    monkeypatch.setattr(train, 'run_iteration', iteration_during_write)
    options = {**OPTIONS, 'async_save': async_save}
    run = train_here(tiny_dataset, tmp_path, **options, max_iters=3)
    first, last = run.record['checkpoints']
    assert (first['iter'], last['iter']) == (2, 3)
    assert first['time_ms'] == (3000 if async_save else 8000)
    assert last['time_ms'] == 8000  # training has ended: the run waits for it
    assert first['write_ms'] == last['write_ms'] == 5000


@pytest.mark.slow
def test_unused_parameter_is_saved_and_resumed(tiny_dataset, tmp_path, monkeypatch):
    """Without a gradient it has no optimizer state, like an expert that receives no tokens."""
    build = Transformer.__init__

    def build_with_more(model, config):
        build(model, config)
        model.final_norm.unused = torch.nn.Parameter(torch.empty(3))
        values = model.final_norm.initial_values()
        values['unused'] = lambda tensor, generator: tensor.fill_(0.5)
        model.final_norm.initial_values = lambda: values

    monkeypatch.setattr(Transformer, '__init__', build_with_more)
    options = {**OPTIONS, 'dropout': 0.1, 'lr_decay_iters': 4}
    whole = train_here(tiny_dataset, tmp_path / 'whole', **options, max_iters=4)
    half = train_here(tiny_dataset, tmp_path / 'half', **options, max_iters=2)
    resumed = train_here(
        tiny_dataset, tmp_path / 'half', **options, max_iters=4, init_from='resume'
    )
    assert half.folder == resumed.folder and resumed.code == 0
    weights, expected = resumed.weights(), whole.weights()
    assert torch.equal(weights['final_norm.unused'], torch.full((3,), 0.5))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_saving_benchmark_measures_both_modes(run_script):
    tiny = '--n_layer=1', '--n_embd=8', '--n_head=1', '--block_size=16'
    done = run_script('benchmarks/saving.py', 'single', '--turns=1', *tiny, timeout=300)
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith('single')]
    assert [row[1] for row in rows] == ['at', 'beside'] and '0 s left' in done.stderr


def test_host_staging_is_independent_of_originals():
    copies = sharded_state.HostStaging(torch.device('cpu'), pytest.fail)
    flat = torch.arange(6.0)
    tensors = [flat[:4], torch.tensor(7.0), torch.empty(0), torch.ones(3, 5).bfloat16()]
    staged = list(copies(tensors))
    expected = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.add_(1)
    assert all(map(torch.equal, staged, expected))
    # Only the slice is written, not the whole storage.
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in staged)
    # The next copies reuse the memory.
    again = copies(tensors)
    assert all(map(torch.equal, again, tensors))
    assert all(new.data_ptr() == old.data_ptr() for new, old in zip(again, staged))
    # Unless there are other tensors, such as the state of an expert that had no tokens before.
    more = copies([*tensors, torch.ones(2)])
    assert torch.equal(more[-1], torch.ones(2)) and all(map(torch.equal, more, tensors))


class PretendedCuda:
    """`torch.cuda.cudart()`, which pins nothing and keeps account."""

    def __init__(self, error=0):
        self.error, self.pinned, self.freed = error, {}, []

    def cudaHostRegister(self, address, size, flags):
        if self.error == 0:
            self.pinned[address] = size
        return self.error

    def cudaHostUnregister(self, address):
        self.freed.append(address)


@pytest.mark.parametrize('error', [0, 2])
def test_host_memory_is_pinned_once_and_exactly(error, monkeypatch):
    """Not rounded up to powers of two, as torch's own pinned allocations are."""
    cuda, launched, notes = PretendedCuda(error), [], []
    monkeypatch.setattr(torch.cuda, 'cudart', lambda: cuda)

    def zeros(*shape, device):  # reports the error that pinning left
        launched.append(device)
        raise RuntimeError('CUDA error: out of memory')

    monkeypatch.setattr(torch, 'zeros', zeros)
    copies = sharded_state.HostStaging(torch.device('cuda:1'), notes.append)
    tensors = [torch.rand(n) for n in (1000, 1, 0, 2**20 + 1)] + [torch.tensor(3.0)]
    for _ in range(3):
        staged = copies(tensors)
        assert all(map(torch.equal, staged, tensors))
    assert all(t.data_ptr() % copies.alignment == 0 for t in staged if t.numel())
    if error:
        assert launched == [torch.device('cuda:1')] and not cuda.freed
        assert len(notes) == 1 and 'could not be pinned (CUDA error 2)' in notes[0]
        return
    assert not notes and not launched
    needed = sum(tensor.nbytes for tensor in tensors)
    ((address, size),) = cuda.pinned.items()
    assert needed <= size < needed + copies.alignment * len(tensors)
    assert all(address <= t.data_ptr() < address + size for t in staged if t.numel())
    # It stays pinned as long as it is used.
    assert not cuda.freed
    del copies, staged
    assert cuda.freed == [address]
