"""Checkpoints: failed saves leave complete checkpoints only, and invalid files are refused.

Invalid files are given to the same code as a resume: it finds the checkpoint, loads settings,
weights and optimizer, continues the record, and trains one iteration.
"""

import builtins
import copy
import errno
import hashlib
import io
import json
import math
import os
import pickle
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.fuzzing import CASES, fuzzed
from helpers.project import TINY_RUN

from common.errors import UserError
from common.files import file_sha256
from configurator import read_command_line
from data.dataset import load_dataset
from model_builder import Transformer, parameter_groups
from optim.step import GuardedOptimizer
from parallel import sharded_state
from parallel.process_group import MultiProcessGroup, SingleProcessGroup
from parallel.strategies import SingleProcess
from records.record import read_record
from training import checkpoint as checkpoint_module
from training import resume as resume_module
from training.checkpoint import (
    BrokenCheckpoint,
    Checkpoint,
    PendingCheckpoint,
    index_sha256,
    list_checkpoints,
    load_latest,
    load_state,
    prune,
    read_index,
)
from training.resume import TrainingProgress, checkpoint_index, find_resume_source
from training_config import load_settings, schema
from training_logger import TrainingLogger

CPU = torch.device('cpu')
PARTS = ('progress', 'config', 'chosen', 'commanded', 'architecture', 'surroundings')
INDEX = {'config_files': [], 'data': None, 'seen': {}, **{part: {} for part in PARTS}}


def save_checkpoint(folder: Path, state: dict, index: dict) -> Checkpoint:
    """Write and publish a checkpoint in one process."""
    pending = PendingCheckpoint(folder, index, SingleProcessGroup())
    pending.write(state)
    return pending.publish()


def save(folder: Path, iter: int, val_loss: float | None = None, value: float | None = None):
    """A checkpoint whose tensors are all `value`, or `iter`."""
    state = {'model': {'weight': torch.full((7, 3), float(iter if value is None else value))}}
    return save_checkpoint(folder, state, {**INDEX, 'iter': iter, 'val_loss': val_loss})


def value_of(state: list[dict]) -> float:
    """The value of all weights in a checkpoint made by `save`."""
    (rank_state,) = state
    (value,) = set(rank_state['model']['weight'].flatten().tolist())
    return value


def forge(path: Path, **changed) -> None:
    """Change a checkpoint's index, and recompute all checksums."""
    index = {**json.loads((path / 'index.json').read_text()), **changed}
    if 'files' not in changed:
        state = path / 'state.pt'
        facts = {'bytes': state.stat().st_size, 'sha256': file_sha256(state)}
        index['files'] = {'state.pt': facts}
    index['sha256'] = index_sha256(index)
    (path / 'index.json').write_text(json.dumps(index))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# --- Saving ---------------------------------------------------------------------------------------


def test_load_returns_what_was_saved(tmp_path):
    state = {
        'model': {
            'float32': torch.randn(3, 5),
            'bfloat16': torch.randn(4).bfloat16(),
            'nothing': torch.empty(0, 2),
        },
        'optimizer': {'float32': {'step': torch.tensor(7.0)}},
        'offsets': {'model': {'float32': 2**40}},
        'scaler': {'scale': 65536.0, '_growth_tracker': 3},
    }
    index = {
        **INDEX,
        'iter': 123_456_789,
        'val_loss': 0.1 + 0.2,
        'config_files': ['config/naïve.py'],
        'progress': {'recent_losses': [1e-300, 2.5]},
        'config': {'n': 2**60, 'none': None},
    }
    published = save_checkpoint(tmp_path / 'new' / 'checkpoints', state, index)
    checkpoint, (loaded,) = load_latest(published.path.parent, pytest.fail)
    assert checkpoint == published and checkpoint.path.name == 'iter_123456789'
    assert {key: checkpoint.index[key] for key in index} == index
    tensors = loaded['model']
    assert {name: t.dtype for name, t in tensors.items()} == {
        name: t.dtype for name, t in state['model'].items()
    }
    assert all(torch.equal(tensors[name], t) for name, t in state['model'].items())
    for key in ('optimizer', 'offsets', 'scaler'):
        assert loaded[key] == state[key]


class Killed(BaseException):
    """Simulates a killed process: no handler catches it, and no cleanup runs."""


class FailingOperations:
    """Context in which the `n`-th file operation of a save raises `error`."""

    def __init__(self, n: int, error: BaseException):
        self.left, self.error = n, error

    def __enter__(self) -> 'FailingOperations':
        self.patch = pytest.MonkeyPatch()
        for name in ('mkdir', 'fsync', 'rename', 'unlink', 'rmdir'):
            self.patch.setattr(os, name, self._failing(getattr(os, name)))
        self.patch.setattr(checkpoint_module, 'open', self._open, raising=False)
        return self

    def __exit__(self, *exception) -> None:
        self.patch.undo()

    def _failing(self, call):
        def operation(*args, **kwargs):
            self.left -= 1
            if self.left == 0 or (self.left < 0 and isinstance(self.error, Killed)):
                raise self.error  # a killed process does nothing more
            return call(*args, **kwargs)

        return operation

    def _open(self, path, mode='r', **kwargs):
        file = builtins.open(path, mode, **kwargs)  # noqa: SIM115 closed by the caller
        if 'w' in mode:
            file = _CountedFile(file, self._failing(file.write))
        return file


class _CountedFile:
    """A file whose writes count as operations."""

    def __init__(self, file, write):
        self.file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()


@pytest.mark.slow
@pytest.mark.parametrize('iter', [8, 12], ids=['again', 'new'])
@pytest.mark.parametrize(
    'error', [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), Killed()], ids=['disk full', 'kill']
)
def test_failed_save_harms_no_checkpoint(tmp_path, iter, error):
    """Each file operation fails in turn: in a second save at 8, or in a first save at 12."""
    for n in range(1, 1000):
        folder = tmp_path / str(n)
        before = [save(folder, 4), save(folder, 8)]
        previous = {checkpoint.path: contents(checkpoint.path) for checkpoint in before}
        failed = False
        with FailingOperations(n, error) as operations:
            try:
                save(folder, iter, value=99.0)
            except UserError as message:
                failed = True
                assert str(folder) in str(message) and os.strerror(errno.ENOSPC) in str(message)
            except Killed:
                failed = True

        warnings = []
        newest, state = load_latest(folder, warnings.append)
        assert warnings == []
        if value_of(state) == 99.0:
            assert newest.iter == iter  # published: only the cleanup can have failed
            previous.pop(before[-1].path if iter == 8 else None, None)
        else:
            assert failed and newest.iter == 8
        assert all(contents(path) == files for path, files in previous.items())
        if isinstance(error, OSError) and value_of(state) != 99.0:
            assert names(folder) == ['iter_00000004', 'iter_00000008']

        # The next save succeeds, is the newest, and removes leftovers.
        assert value_of(load_latest(folder, pytest.fail)[1]) in (8.0, 99.0)
        again = save(folder, iter, value=100.0)
        newest, state = load_latest(folder, pytest.fail)
        assert newest == again and value_of(state) == 100.0
        assert not [name for name in names(folder) if name.startswith('.')]
        assert [p for p in list_checkpoints(folder) if p.name.startswith('iter_0')] == (
            list_checkpoints(folder)
        )
        shutil.rmtree(folder)
        if operations.left > 0:
            break
    assert n > 10  # a save has more operations than that; with the last n no operation failed
    assert not failed


def test_leftovers_of_crashed_save_are_removed(tmp_path):
    save(tmp_path, 4)
    for name in ('.saving-iter_00000008-1234abcd', '.saving-removed-iter_00000002-1234abcd'):
        shutil.copytree(tmp_path / 'iter_00000004', tmp_path / name)
    (tmp_path / 'notes').mkdir()  # a folder of the user
    assert [path.name for path in list_checkpoints(tmp_path)] == ['iter_00000004']
    assert load_latest(tmp_path, pytest.fail)[0].iter == 4
    save(tmp_path, 6)
    assert names(tmp_path) == ['iter_00000004', 'iter_00000006', 'notes']


def test_missing_or_empty_folder_has_no_checkpoint(tmp_path):
    assert load_latest(tmp_path, pytest.fail) is None
    assert load_latest(tmp_path / 'none', pytest.fail) is None


# --- Retention ------------------------------------------------------------------------------------


@pytest.mark.parametrize('keep_last', [1, 2])
@pytest.mark.parametrize('keep_best', [False, True])
@pytest.mark.parametrize(
    ('losses', 'best'),
    [
        ([3.0, 1.0, 2.0, 2.5, 1.5], 2),  # a later, worse one does not replace the best
        ([1.0, None, None, None, None], 1),  # nor does one without an evaluation
        ([None] * 5, None),
        ([2.0, 1.0, 1.0, 3.0, 1.0], 5),  # the newest of equal ones
        ([5.0, 4.0, 3.0, 2.0, 1.0], 5),
        ([-1.0, 0.0, 1.0, 2.0, 3.0], 1),
    ],
)
def test_prune_keeps_newest_and_best(tmp_path, losses, best, keep_last, keep_best):
    for iter, loss in enumerate(losses, 1):
        prune(save(tmp_path, iter, loss), keep_last, keep_best)
    expected = {5, 4} if keep_last == 2 else {5}
    if keep_best and best:
        expected.add(best)
    iters = [read_index(path).iter for path in list_checkpoints(tmp_path)]
    assert iters == sorted(expected, reverse=True)


def test_prune_ignores_broken_newer_checkpoint(tmp_path):
    """After falling back from a broken checkpoint 8 to 4, the save at 6 counts as the newest."""
    save(tmp_path, 4, 1.0)
    (save(tmp_path, 8, 0.5).path / 'state.pt').write_bytes(b'')
    prune(save(tmp_path, 6, 2.0), keep_last=1, keep_best=True)
    assert names(tmp_path) == ['iter_00000004', 'iter_00000006', 'iter_00000008']
    warnings = []
    assert load_latest(tmp_path, warnings.append)[0].iter == 6
    prune(save(tmp_path, 8, 2.0), keep_last=1, keep_best=True)  # reached again
    assert [read_index(p).iter for p in list_checkpoints(tmp_path)] == [8, 4]
    assert load_latest(tmp_path, pytest.fail)[0].iter == 8


@pytest.mark.parametrize('loss', [math.nan, math.inf, -math.inf])
def test_nonfinite_loss_is_never_best(loss):
    progress = TrainingProgress(iter=4, best_val_loss=2.0)
    assert not progress.note_evaluation(loss)
    assert (progress.val_loss, progress.best_val_loss) == (None, 2.0)
    assert progress.note_evaluation(1.5) and progress.best_val_loss == 1.5


# --- Damage ---------------------------------------------------------------------------------------


def flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


DAMAGE = {
    'truncated': lambda content: content[: len(content) // 2],
    'one byte short': lambda content: content[:-1],
    'a bit flipped': lambda content: flip(content, 4 * len(content)),
    'not a checkpoint': lambda content: b'PK\x03\x04 no checkpoint \xff\xfe',
    'empty': lambda content: b'',
    'missing': None,
}


@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('name', ['state.pt', 'index.json'])
def test_damaged_file_falls_back_to_previous_checkpoint(tmp_path, name, damage):
    save(tmp_path, 4)
    file = save(tmp_path, 8).path / name
    if DAMAGE[damage]:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    else:
        file.unlink()
    warnings = []
    checkpoint, state = load_latest(tmp_path, warnings.append)
    assert checkpoint.iter == 4 and value_of(state) == 4.0
    assert len(warnings) == 1 and str(file) in warnings[0] and str(checkpoint.path) in warnings[0]

    shutil.rmtree(checkpoint.path)
    with pytest.raises(BrokenCheckpoint) as error:
        load_latest(tmp_path, pytest.fail)
    assert str(file) in str(error.value)


class ThreadGroup(SingleProcessGroup):
    """The ranks of a job as threads, which exchange values at a barrier."""

    def __init__(self, rank, slots, barrier):
        self.rank, self.world_size, self.slots, self.barrier = rank, len(slots), slots, barrier
        self.signs_of_life = 0

    def all_gather_object(self, value):
        self.slots[self.rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def all_reduce_max(self, numbers):
        self.signs_of_life += 1
        return [max(column) for column in zip(*self.all_gather_object(numbers))]

    def broadcast_object(self, value):
        return self.all_gather_object(value)[0]

    broadcast_from_main = MultiProcessGroup.broadcast_from_main


def on_ranks(size, function) -> list:
    """`function(group)` in a thread of each rank; its results, or the problems it raised."""
    slots, barrier = [None] * size, threading.Barrier(size, timeout=20)

    def of_rank(rank):
        try:
            return function(ThreadGroup(rank, slots, barrier))
        except UserError as error:
            return error.problems

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(of_rank, range(size)))


def save_files(folder: Path, iter: int, ranks: int) -> Checkpoint:
    """A checkpoint of several ranks, with files of different size."""

    def saved(group):
        pending = PendingCheckpoint(folder, {**INDEX, 'iter': iter, 'val_loss': None}, group)
        pending.write({'weight': torch.full((1000 * (group.rank + 1),), float(iter))})
        return pending.publish()

    return on_ranks(ranks, saved)[0]


@pytest.fixture
def hashed(monkeypatch) -> dict[str, list[str]]:
    """The files that each thread has hashed, by the name of the thread."""
    files: dict[str, list[str]] = {}
    real = checkpoint_module.file_chunks

    def recorded(path):
        chunks = list(real(path))
        assert sum(map(len, chunks)) == path.stat().st_size
        files.setdefault(threading.current_thread().name, []).append(path.name)
        return iter(chunks)

    monkeypatch.setattr(checkpoint_module, 'file_chunks', recorded)
    return files


@pytest.mark.parametrize('ranks', [1, 2, 3, 7])
def test_each_rank_verifies_a_part_of_the_files(tmp_path, ranks, hashed):
    """Together all of them once; every rank then has the state of all."""
    checkpoint = save_files(tmp_path, 4, ranks=5)
    states = on_ranks(ranks, lambda group: load_state(checkpoint, group))
    assert all(equal(dict(enumerate(state)), dict(enumerate(states[0]))) for state in states)
    assert [len(state['weight']) for state in states[0]] == [1000, 2000, 3000, 4000, 5000]
    names = list(checkpoint.index['files'])
    parts = [names[rank::ranks] for rank in range(ranks)]
    assert sorted(hashed.values()) == sorted(part for part in parts if part)


@pytest.mark.parametrize('name', ['state.pt', 'state_3.pt', 'index.json'])
@pytest.mark.parametrize('damage', ['a bit flipped', 'missing'])
def test_damage_found_by_one_rank_is_known_to_all(tmp_path, name, damage, monkeypatch):
    monkeypatch.setattr(checkpoint_module, 'REPORT_SECONDS', 0)
    save_files(tmp_path, 4, ranks=5)
    file = save_files(tmp_path, 8, ranks=5).path / name
    if DAMAGE[damage]:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    else:
        file.unlink()

    def found(group):
        warnings = []
        checkpoint, state = load_latest(tmp_path, warnings.append, group)
        return checkpoint.iter, [s['weight'][0].item() for s in state], tuple(warnings)

    results = on_ranks(3, found)
    assert set(map(str, results)) == {str(results[0])}
    iter, values, (warning,) = results[0]
    assert (iter, values) == (4, [4.0] * 5) and str(file) in warning

    shutil.rmtree(tmp_path / 'iter_00000004')
    problems = on_ranks(3, found)
    assert len(set(problems)) == 1 and str(file) in problems[0][0]


def test_ranks_that_wait_for_others_hear_from_them(tmp_path, monkeypatch):
    """The first rank alone has a file: the others would count it as lost after some time."""
    monkeypatch.setattr(checkpoint_module, 'REPORT_SECONDS', 0)
    checkpoint = save(tmp_path, 4)
    chunks = [b'x'] * 5
    monkeypatch.setattr(checkpoint_module, 'file_chunks', lambda path: iter(chunks))
    checkpoint.index['files']['state.pt']['sha256'] = hashlib.sha256(b'xxxxx').hexdigest()

    def signs(group):
        load_state(checkpoint, group)
        return group.signs_of_life

    assert on_ranks(3, signs) == [6] * 3


@pytest.mark.parametrize('name', ['state.pt', 'index.json'])
def test_every_bit_flip_is_detected(tmp_path, name):
    checkpoint = save(tmp_path, 4, 2.5)
    file = checkpoint.path / name
    content = file.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(content)), 200):
        file.write_bytes(flip(content, bit))
        try:
            reread = read_index(checkpoint.path)
            load_state(reread)
        except BrokenCheckpoint:
            continue
        assert (
            name == 'index.json' and reread == checkpoint
        )  # only white space, or the case of an escape


# --- Invalid and malicious files ------------------------------------------------------------------


class Exploit:
    """Creates the file `marker` when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


def zip_of(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def legacy_file_of(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def pickle_of(state) -> bytes:
    return pickle.dumps(state, protocol=2)


@pytest.mark.parametrize('write', [zip_of, legacy_file_of, pickle_of])
def test_pickle_in_state_is_not_executed(tmp_path, write):
    marker, path = tmp_path / 'executed', save(tmp_path / 'checkpoints', 4).path
    state = path / 'state.pt'
    state.write_bytes(write({'model': {'weight': torch.ones(2)}, 'more': Exploit(marker)}))
    forge(path)
    with pytest.raises(BrokenCheckpoint, match=r'state\.pt'):
        load_latest(path.parent, pytest.fail)
    assert not marker.exists()

    if write is pickle_of:
        pickle.loads(state.read_bytes())
    else:
        torch.load(state, weights_only=False)
    assert marker.exists()  # plain unpickling executes it


@pytest.mark.parametrize('content', [[1, 2], 'text', 7, None, torch.ones(3)])
def test_state_must_be_a_dict(tmp_path, content):
    path = save(tmp_path, 4).path
    (path / 'state.pt').write_bytes(zip_of(content))
    forge(path)
    with pytest.raises(BrokenCheckpoint, match=r'state\.pt'):
        load_latest(tmp_path, pytest.fail)


class Run:
    """A run of one iteration with a model of one block, and its resume."""

    def __init__(self, out_dir: Path, dataset: Path):
        tiny = {**TINY_RUN, 'n_layer': 1, 'n_embd': 8, 'block_size': 8, 'log_style': 'line'}
        tiny |= {'dataset': dataset, 'out_dir': out_dir}
        self.argv = [f'--{key}={value}' for key, value in tiny.items()]
        self.folder, self.dataset = out_dir / 'run_20260101_000000', load_dataset(str(dataset), 8)
        self.folder.mkdir(parents=True)
        settings = self.settings(read_command_line(self.argv, schema))
        parallel, model, optimizer = self.build(settings)
        self.update(model, optimizer)
        flops, hardware = (
            {'per_token': 1},
            {'peak_tflops': 0.01, 'dtype': 'float32', 'world_size': 1},
        )
        self.header = {
            'config': settings.to_dict(),
            'metadata': {'command': 'python train.py'},
            'startup_info': {'flops': flops, 'hardware': hardware, 'parallel': {}},
        }
        journal = {'kind': 'start', 'time': 0.0, 'run_name': 'r', 'start_time': '', **self.header}
        self.journal = json.dumps({**journal, 'architecture': {}})
        progress = TrainingProgress(1, 1, 5.5, 5.5, [5.6])
        index = checkpoint_index(settings, progress, {'threads': 1}, self.dataset)
        state = sharded_state.collect(parallel, model, optimizer)
        self.checkpoint = save_checkpoint(self.folder / 'checkpoints', state, index).path
        self.state = copy.deepcopy(state)

    def settings(self, command_line):
        return load_settings(command_line).resolve(CPU, 'float32', self.dataset)

    def build(self, settings) -> tuple[SingleProcess, Transformer, GuardedOptimizer]:
        parallel = SingleProcess(settings.run, CPU)
        model, _ = parallel.build(settings.architecture, recomputed=[], compiled=False)
        inner = parallel.build_optimizer(parameter_groups(model), settings.run)
        return parallel, model, GuardedOptimizer(inner, settings.run, CPU, parallel)

    def update(self, model, optimizer, number: int = 0) -> None:
        batch = self.dataset.batch(self.dataset.order('random', 0), number, 2)
        loss, count, _ = model(*map(torch.from_numpy, batch))
        optimizer.backward(loss / count)
        optimizer.step(1e-3, loss.detach(), measured=True)

    def resume(self) -> dict:
        """Resume, train one iteration, and return the state as loaded."""
        (self.folder / 'journal.jsonl').write_text(self.journal)
        command_line = read_command_line([*self.argv, '--init_from=resume'], schema)
        resumed = find_resume_source(command_line)
        settings = self.settings(command_line)
        resumed.check(settings)
        parallel, model, optimizer = self.build(settings)
        progress = resumed.restore(parallel, model, optimizer)
        loaded = copy.deepcopy(sharded_state.collect(parallel, model, optimizer))
        logger = TrainingLogger(self.folder, style='line', max_iters=1, stream=io.StringIO())
        resumed.report(logger, self.header, {'threads': 1})
        logger.finish('interrupted')
        read_record(self.folder)
        self.update(model, optimizer, progress.data_shift)
        return loaded


@pytest.fixture
def run(tmp_path, tiny_dataset) -> Run:
    return Run(tmp_path / 'out', tiny_dataset)


def equal(left, right) -> bool:
    """Whether two states are the same, tensors by type and bits."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return left == right


@pytest.mark.parametrize('damaged', [False, True])
@pytest.mark.parametrize('other_options', [False, True])
def test_ranks_of_a_job_read_the_state_after_they_are_connected(
    run, damaged, other_options, hashed, monkeypatch
):
    monkeypatch.setattr(resume_module, 'world_size', lambda: 2)
    older = json.loads((run.checkpoint / 'index.json').read_text())
    newer = run.checkpoint.with_name('iter_00000002')
    shutil.copytree(run.checkpoint, newer)
    progress = {**older['progress'], 'iter': 2}
    changed = {'chosen': {**older['chosen'], 'max_iters': 9}} if other_options else {}
    forge(newer, iter=2, progress=progress, **changed)
    if damaged:
        file = newer / 'state.pt'
        file.write_bytes(flip(file.read_bytes(), 999))

    (run.folder / 'journal.jsonl').write_text(run.journal)
    command_line = read_command_line([*run.argv, '--init_from=resume'], schema)
    source = find_resume_source(command_line)
    assert source.checkpoint.path == newer and source.state is None and not hashed
    parallel, model, optimizer = run.build(run.settings(command_line))
    if damaged and other_options:
        with pytest.raises(UserError, match='saved with other options than'):
            source.restore(parallel, model, optimizer)
        return
    assert source.restore(parallel, model, optimizer).iter == (1 if damaged else 2)
    assert len(source.warnings) == damaged and sum(map(len, hashed.values())) == 1 + damaged
    assert equal(sharded_state.collect(parallel, model, optimizer), run.state)


def test_unmodified_run_resumes(run):
    assert equal(run.resume(), run.state)


NESTED: list = []
for _ in range(500):
    NESTED = [NESTED]
INVALID_INDEXES = {
    'iter is a string': {'iter': '1'},
    'iter is true': {'iter': True},
    'iter is negative': {'iter': -1},
    'iter differs from progress': {'iter': 2},
    'val_loss is a string': {'val_loss': '5.5'},
    'val_loss is NaN': {'val_loss': math.nan},
    'val_loss is huge': {'val_loss': 10**400},
    'no state.pt': {'files': {}},
    'no checksum': {'files': {'state.pt': {'bytes': 1}}},
    'only the file of the second rank': {'files': {'state_1.pt': {'bytes': 1, 'sha256': ''}}},
    'another file': {'files': {'../../../../etc/passwd': {'bytes': 1, 'sha256': ''}}},
    'files is a list': {'files': ['state.pt']},
    'checksum is a number': {'files': {'state.pt': {'bytes': 1, 'sha256': 5}}},
    'size is a string': {'files': {'state.pt': {'bytes': '1', 'sha256': 'ab'}}},
    'config_files contains a number': {'config_files': [1]},
    'another format': {'format': 'other'},
    'another version': {'version': 99},
    'progress is a list': {'progress': [1]},
    'progress is nested': {'progress': {'iter': NESTED}},
    'progress has an unknown key': {'progress': {'iter': 1, 'path': '../..'}},
    'progress goes back': {'progress': {'iter': 1, 'rollbacks': -1}},
    'progress is huge': {'progress': {'iter': 1, 'data_shift': 10**30}},
    'progress has strings for losses': {'progress': {'iter': 1, 'recent_losses': ['a']}},
    'progress has a number for losses': {'progress': {'iter': 1, 'recent_losses': 5}},
    'progress has a NaN loss': {'progress': {'iter': 1, 'best_val_loss': math.nan}},
    'an unknown option': {'chosen': {'rm': '-rf'}},
    'an option of another type': {'chosen': {'n_layer': [1]}},
    'an unknown option on the command line': {'commanded': {'rm': '-rf'}},
    'an option that is too large': {'chosen': {'learning_rate': 10**400}},
    'an option that is nested': {'chosen': {'dropout': NESTED}},
    'another architecture': {'architecture': {'n_layer': 10**9}},
    'architecture is a list': {'architecture': []},
}


@pytest.mark.parametrize('case', INVALID_INDEXES)
def test_invalid_index_values_are_refused(run, case):
    forge(run.checkpoint, **INVALID_INDEXES[case])
    with pytest.raises(UserError) as error:
        run.resume()
    assert run.folder.name in str(error.value)
    assert (run.folder / 'journal.jsonl').read_text() == run.journal


@pytest.mark.parametrize(
    'text', ['[' * 100_000, '{"iter": ' + '9' * 5000 + '}', '\ud800', '[]', '"x"', 'null', 'NaN']
)
def test_index_of_wrong_type_is_refused(run, text):
    (run.checkpoint / 'index.json').write_text(text, errors='surrogatepass')
    with pytest.raises(BrokenCheckpoint, match=r'index\.json'):
        run.resume()


def changed(state: dict, part: str, change) -> dict:
    """The state with `change` applied to each value of one part."""
    return {**state, part: {name: change(value) for name, value in state[part].items()}}


def with_moments(state: dict, **values) -> dict:
    """The state with other values in the optimizer state of the first parameter."""
    name, moments = next(iter(state['optimizer'].items()))
    return {**state, 'optimizer': {**state['optimizer'], name: {**moments, **values}}}


def offset(state: dict, part: str, value) -> dict:
    """The state with another offset for the first parameter."""
    name = next(iter(state[part]))
    offsets = {**state['offsets'], part: {**state['offsets'][part], name: value}}
    return {**state, 'offsets': offsets}


def first_weight(state: dict) -> torch.Tensor:
    return next(iter(state['model'].values()))


PARTS_OF_A_STATE = ('model', 'optimizer', 'offsets', 'scaler')
INVALID_STATES = {
    **{
        f'no {part}': lambda state, part=part: {k: v for k, v in state.items() if k != part}
        for part in PARTS_OF_A_STATE
    },
    **{
        f'{part} is text': lambda state, part=part: {**state, part: 'x'}
        for part in ('model', 'optimizer', 'offsets')
    },
    'weights are a list': lambda state: {**state, 'model': [1]},
    'a missing weight': lambda state: {**state, 'model': dict(list(state['model'].items())[1:])},
    'an additional weight': lambda state: {
        **offset(state, 'model', 0),
        'model': {**state['model'], 'x': torch.ones(1)},
        'offsets': {**state['offsets'], 'model': {**state['offsets']['model'], 'x': 0}},
    },
    'a weight is text': lambda state: changed(state, 'model', lambda weight: 'x'),
    'a weight of another shape': lambda state: changed(state, 'model', lambda weight: weight[:1]),
    'an empty optimizer': lambda state: {**state, 'optimizer': {}},
    'only one moment': lambda state: changed(
        state, 'optimizer', lambda moments: {key: moments[key] for key in ('step', 'exp_avg')}
    ),
    'a third moment': lambda state: with_moments(state, max_exp_avg_sq=first_weight(state)),
    'moments too small': lambda state: with_moments(state, exp_avg=torch.zeros(1)),
    'moments are numbers': lambda state: with_moments(state, exp_avg_sq=torch.tensor(0.0)),
    'moments are text': lambda state: with_moments(state, exp_avg='x'),
    'many steps': lambda state: with_moments(state, step=torch.ones(9)),
    'as many steps as weights': lambda state: with_moments(state, step=first_weight(state)),
    'steps are text': lambda state: with_moments(state, step='1'),
    **{
        f'{part} at {value!r}': lambda state, part=part, value=value: offset(state, part, value)
        for part in ('model', 'optimizer')
        for value in (-1, 1, 10**30, 0.0, '0', None)
    },
}


@pytest.mark.slow
@pytest.mark.parametrize('case', INVALID_STATES)
def test_state_of_another_model_is_refused(run, case):
    (run.checkpoint / 'state.pt').write_bytes(zip_of(INVALID_STATES[case](run.state)))
    forge(run.checkpoint)
    with pytest.raises(UserError, match=run.checkpoint.name):
        run.resume()


def test_restored_optimizer_state_is_not_shared_with_file(run):
    """Expanded tensors and other dtypes are converted to what the optimizer needs."""
    states = changed(
        run.state,
        'optimizer',
        lambda moments: {
            'step': moments['step'].long(),
            'exp_avg': torch.zeros(1).expand(moments['exp_avg'].shape),
            'exp_avg_sq': moments['exp_avg_sq'].double(),
        },
    )
    (run.checkpoint / 'state.pt').write_bytes(zip_of(states))
    forge(run.checkpoint)
    zeros = {
        name: torch.zeros_like(moments['exp_avg'])
        for name, moments in run.state['optimizer'].items()
    }
    expected = {
        name: {**moments, 'exp_avg': zeros[name]}
        for name, moments in run.state['optimizer'].items()
    }
    assert equal(run.resume(), {**run.state, 'optimizer': expected})


def test_parameter_without_gradient_resumes_without_state(run):
    name = next(iter(run.state['optimizer']))
    state = {**run.state, 'optimizer': {**run.state['optimizer'], name: {}}}
    (run.checkpoint / 'state.pt').write_bytes(zip_of(state))
    forge(run.checkpoint)
    assert equal(run.resume(), state)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['state.pt', 'index.json'])
def test_fuzzed_checkpoint_resumes_or_is_refused(run, name):
    """All checksums are recomputed, so that the checks after them are reached."""
    rng, file = random.Random(name), run.checkpoint / name
    originals = contents(run.checkpoint)
    refused = 0
    for _ in range(CASES):
        for other, content in originals.items():
            (run.checkpoint / other).write_bytes(content)
        file.write_bytes(fuzzed(originals[name], rng))
        try:
            index = json.loads((run.checkpoint / 'index.json').read_text())
            files = index['files'] if name == 'index.json' else None
            forge(run.checkpoint, **({'files': files} if files else {}))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # no index any more: left unchanged
        try:
            run.resume()
        except UserError as error:
            refused += 1
            assert run.folder.name in str(error)
    assert refused > 0
