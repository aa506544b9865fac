"""Entries that are recorded while the next iteration runs, as on CUDA: forced here on a CPU."""

import os
import signal
from contextlib import contextmanager

import pytest
import torch
from helpers.bit_equality import without_measurements
from helpers.device_waits import Operations
from helpers.in_process import Run, session_here, train_here

import model_builder
import train
from common import hardware
from optim.step import GuardedOptimizer
from records.record import read_record
from records.run_folders import latest_run
from training import start_checks
from training.pending_log import PendingLog
from training.session import Session
from training_logger import TrainingLogger

OPTIONS = {'n_layer': 1, 'n_embd': 16, 'block_size': 8, 'eval_iters': 1, 'max_iters': 8}


@pytest.fixture(autouse=True)
def quick_start(monkeypatch):
    """Without the checks and counts of the start that take most of its time."""
    monkeypatch.setattr(start_checks, 'check_model', lambda *_: [])
    monkeypatch.setattr(model_builder, 'elementwise_operations', lambda config: 1)


@contextmanager
def deferred(on: bool = True):
    """Record entries one iteration later, as on CUDA."""

    def init(self, device):
        self.deferred, self.waiting = on, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PendingLog, '__init__', init)
        yield


def result(folder) -> dict:
    """What a record has of a run, without times and memory."""
    record = read_record(folder)
    kept = {
        key: without_measurements(record[key])
        for key in ('training_iterations', 'eval_steps', 'checkpoints')
    }
    steps = [entry['steps'] for entry in record['training_iterations']]
    events = [
        {**event, 'message': event.get('message', '').replace(str(folder), '')}
        for event in without_measurements(record['events'])
    ]
    return {**kept, 'steps': steps, 'events': events, 'status': record['status']}


def assert_deferring_changes_nothing(dataset, folder, **options) -> Run:
    """Train twice; returns the run with deferred entries."""
    runs = []
    for on in (False, True):
        with deferred(on):
            runs.append(train_here(dataset, folder / str(on), **{**OPTIONS, **options}))
    at_once, later = runs
    assert later.code == at_once.code
    assert result(later.folder) == result(at_once.folder)
    if at_once.record['status'] != 'failed':  # otherwise one more iteration was queued
        for name, weight in at_once.weights().items():
            assert torch.equal(later.weights()[name], weight), name
    return later


@pytest.fixture
def bad_batches(monkeypatch):
    """bad_batches(numbers) makes the loss of these batches of the data order not finite."""
    bad: set[int] = set()
    last = []  # the last batch that training has read
    read, step = Session.training_batch, GuardedOptimizer.step

    def noted(self, number):
        last[:] = [number // self.settings.run.gradient_accumulation_steps]
        return read(self, number)

    def damaged(self, learning_rate, loss, measured):
        if last[0] in bad:
            loss.fill_(float('nan'))
        return step(self, learning_rate, loss, measured=measured)

    monkeypatch.setattr(Session, 'training_batch', noted)
    monkeypatch.setattr(GuardedOptimizer, 'step', damaged)
    return bad.update


@pytest.mark.slow
@pytest.mark.parametrize('log_interval', [1, 3])
def test_record_is_the_same(tiny_dataset, tmp_path, log_interval):
    options = {'arch_preset': 'mixtral', 'eval_interval': 4, 'diagnostics': True}
    run = assert_deferring_changes_nothing(
        tiny_dataset, tmp_path, **options, log_interval=log_interval, always_save_checkpoint=True
    )
    logged = [entry['iter'] for entry in run.record['training_iterations']]
    assert logged == sorted({*range(0, 8, log_interval), 7})
    assert run.record['training_iterations'][0]['readings']
    assert len(run.record['checkpoints']) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kind', 'log_interval'),
    [('skip', 1), ('skip', 3), ('rollback', 1), ('rollback', 3), ('stop', 1)],
)
def test_nonfinite_updates_are_handled_the_same(
    bad_batches, tiny_dataset, tmp_path, kind, log_interval
):
    # Iteration 6 is not the last one before an evaluation: when it is recorded, the next one is
    # queued already.
    bad_batches({'skip': [2, 3, 4, 6], 'rollback': [6, 8], 'stop': [6]}[kind])
    run = assert_deferring_changes_nothing(
        tiny_dataset,
        tmp_path,
        eval_interval=5,
        log_interval=log_interval,
        on_nonfinite=kind,
    )
    assert run.code == (2 if kind == 'stop' else 0)
    counted = [event['count'] for event in run.events('nonfinite') if 'count' in event]
    assert sum(counted) == {'skip': 4, 'rollback': 2, 'stop': 1}[kind]
    assert len(run.events('rollback')) == (2 if kind == 'rollback' else 0)


@pytest.mark.slow
def test_interrupted_run_has_all_entries(tiny_dataset, tmp_path, monkeypatch):
    read = Session.training_batch

    def interrupting(self, number):
        if number == 2 * 4:  # the first of two micro-batches of iteration 4
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Session, 'training_batch', interrupting)
        run = assert_deferring_changes_nothing(tiny_dataset, tmp_path)
    assert run.code == 130 and run.record['summary']['final_iter'] == 5
    with deferred():
        resumed = train_here(tiny_dataset, tmp_path / 'True', **OPTIONS, init_from='resume')
    logged = [entry['iter'] for entry in resumed.record['training_iterations']]
    assert logged == list(range(OPTIONS['max_iters']))


def test_failed_run_has_all_entries(tiny_dataset, tmp_path, monkeypatch):
    step, calls = GuardedOptimizer.step, []

    def failing(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError('on purpose')
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(GuardedOptimizer, 'step', failing)
    with deferred(), pytest.raises(RuntimeError, match='on purpose'):
        train_here(tiny_dataset, tmp_path, **OPTIONS)
    record = read_record(latest_run(tmp_path))
    assert record['status'] == 'failed'
    assert [entry['iter'] for entry in record['training_iterations']] == [0, 1, 2]


@pytest.mark.parametrize('answer', [False, RuntimeError('unspecified launch failure')])
def test_failed_run_does_not_wait_for_a_lost_device(tiny_dataset, tmp_path, monkeypatch, answer):
    """The copy never ends, as if another rank was lost, or the device reports a failure."""

    def is_done(self):
        if isinstance(answer, Exception):
            raise answer
        return answer

    step, calls = GuardedOptimizer.step, []

    def failing(self, *arguments, **keywords):
        calls.append(1)
        assert len(calls) < 3, 'on purpose'
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(GuardedOptimizer, 'step', failing)
    monkeypatch.setattr(hardware.HostCopy, 'is_done', property(is_done))
    monkeypatch.setattr('training.iteration_log.LAST_ENTRY_SECONDS', 0.05)
    with deferred(), pytest.raises(AssertionError, match='on purpose'):
        train_here(tiny_dataset, tmp_path, **OPTIONS)
    record = read_record(latest_run(tmp_path))
    assert record['status'] == 'failed'
    assert [entry['iter'] for entry in record['training_iterations']] == [0]


# --- What overlaps --------------------------------------------------------------------------------


def test_entry_is_recorded_after_the_next_iteration_is_queued(tiny_dataset, tmp_path, monkeypatch):
    """But its memory is read, and the peak reset, before that: the peak is its own."""
    order = []

    def note(owner, name, word):
        original = getattr(owner, name)

        def noted(*arguments, **keywords):
            order.append(word)
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, noted)

    note(GuardedOptimizer, 'step', 'update')
    note(hardware, 'memory_usage', 'memory')
    note(hardware, 'reset_peak_memory', 'reset')
    note(TrainingLogger, 'iteration', 'entry')
    note(train, 'evaluate', 'evaluation')
    with deferred():
        train_here(tiny_dataset, tmp_path, **{**OPTIONS, 'max_iters': 3, 'log_interval': 2})
    assert order == [
        *('reset', 'evaluation'),
        *('update', 'memory', 'reset'),
        *('update', 'entry'),
        *('update', 'memory', 'reset'),
        *('entry', 'evaluation'),
    ]


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_deferred_iterations_do_not_wait(tiny_dataset, tmp_path, dtype):
    """Logged iterations read only the copies in host memory."""
    with deferred():
        session = session_here(tiny_dataset, tmp_path, arch_preset='mixtral', dtype=dtype)
    clock = hardware.StepClock(session.device)
    train.run_iteration(session, clock)  # creates the optimizer state
    with Operations() as operations:
        for _ in range(3):
            train.run_iteration(session, clock)
    assert operations.waits == {'torch.Tensor.tolist': 3}  # of HostCopy, see below
    session.logger.finish()
    entries = read_record(session.logger.run_folder)['training_iterations']
    assert [entry['iter'] for entry in entries] == [0, 1, 2]
    assert all((entry['loss_scale'] == 2.0**16) == (dtype == 'float16') for entry in entries)


# --- The device's clock and copies ----------------------------------------------------------------


@pytest.fixture
def cuda_events(monkeypatch):
    """Pretended events of CUDA: a list of the device's time in ms, and of waits for an event."""
    device = {'ms': 0.0, 'waits': 0}

    class Event:
        def __init__(self, enable_timing=False):
            self.timed = enable_timing

        def record(self):
            self.at = device['ms']

        def synchronize(self):
            device['waits'] += 1

        def query(self):
            return True

        def elapsed_time(self, end):
            assert self.timed and end.timed
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    return device


def test_time_on_cuda_is_that_between_the_ends_of_iterations(cuda_events):
    clock = hardware.StepClock(torch.device('cuda'))
    taken = []
    for step in range(3):
        cuda_events['ms'] += 5.0
        clock.steps += 1
        if step == 1:
            with clock.paused():
                cuda_events['ms'] += 100.0
            cuda_events['ms'] += 2.0
        if step != 1:
            taken.append(clock.take())
    assert cuda_events['waits'] == 0
    first, second = taken
    assert (first.seconds_per_step, first.steps) == (5e-3, 1)
    assert (second.seconds_per_step, second.steps) == (6e-3, 2)
    assert cuda_events['waits'] > 0


def test_copy_from_cuda_is_pinned_and_waits_when_it_is_read(cuda_events, monkeypatch):
    class OnCuda(torch.Tensor):
        is_cuda = True

    empty, pinned = torch.empty, []

    def unpinned(*arguments, pin_memory, **keywords):
        pinned.append(pin_memory)
        return empty(*arguments, **keywords)

    monkeypatch.setattr(torch, 'empty', unpinned)
    values = torch.arange(3.0)
    copy = hardware.HostCopy(values.as_subclass(OnCuda))
    values.zero_()  # the copy was queued before
    assert pinned == [True] and cuda_events['waits'] == 0 and copy.is_done
    assert copy.tolist() == [0.0, 1.0, 2.0] and cuda_events['waits'] == 1


# --- Memory ---------------------------------------------------------------------------------------


def test_allocator_retries_are_recorded_and_reported_once(tiny_dataset, tmp_path, monkeypatch):
    usage, retries = hardware.memory_usage, iter([0, 2, 0, 3])

    def on_a_full_gpu(device):
        return {**usage(device), 'reserved_peak_gb': 79.5, 'allocator_retries': next(retries)}

    monkeypatch.setattr(hardware, 'memory_usage', on_a_full_gpu)
    run = train_here(tiny_dataset, tmp_path, **{**OPTIONS, 'max_iters': 4})
    memory = [entry['memory'] for entry in run.record['training_iterations']]
    assert [entry['allocator_retries'] for entry in memory] == [0, 2, 0, 3]
    assert {entry['reserved_peak_gb'] for entry in memory} == {79.5}
    (event,) = run.events('allocator_retries')
    assert event['iter'] == 1 and '2 time(s)' in event['message']
    assert '--batch_size' in event['message']
