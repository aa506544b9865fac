"""Signals: a run handles one after its current iteration, and a second stop at once."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.project import PROJECT, TINY_RUN

from parallel.process_group import SingleProcessGroup
from records.record import read_record
from records.run_folders import latest_run
from training.checkpoint import list_checkpoints, load_state, read_index
from training.signals import SignalHandler

pytestmark = pytest.mark.slow

if not hasattr(signal, 'SIGUSR1'):
    pytest.skip('needs POSIX signals', allow_module_level=True)

# train.py with a preparation, such as a patch.
DRIVER = """
import os, pathlib, signal, sys, time
import train
from data import dataset as token_data
from training.checkpoint import list_checkpoints, load_state, read_index, torch
from common.errors import run_script

{preparation}
run_script(train.main)
"""

# The process gets a signal while it reads the first of the two micro-batches of iteration 2.
IN_ITERATION_2 = """
read = token_data.TokenDataset.batch

def batch(self, order, first_number, count):
    if first_number == 8:
        os.kill(os.getpid(), signal.{name})
    return read(self, order, first_number, count)

token_data.TokenDataset.batch = batch
"""

# The second save writes its state and then hangs.
SLOW_SAVE = """
save, saves = torch.save, []

def slow(state, file):
    save(state, file)
    saves.append(file)
    if len(saves) == 2:
        pathlib.Path('saving').touch()
        for _ in range(6000):  # short sleeps, so that a signal is handled soon
            time.sleep(0.1)

torch.save = slow
"""


@pytest.fixture
def start(tmp_path, tiny_dataset):
    """start(preparation, key=value, …) starts train.py with output in tmp_path/out: its process."""
    processes = []

    def run(preparation='', **options):
        values = {**TINY_RUN, 'dataset': tiny_dataset, 'eval_interval': 10**6, **options}
        arguments = [f'--{key}={value}' for key, value in values.items()]
        process = subprocess.Popen(
            [sys.executable, '-c', DRIVER.format(preparation=preparation), *arguments],
            cwd=tmp_path,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(PROJECT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(condition, process):
    """Wait until `condition()` holds; fail if the process ends first."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(process):
    """Wait for the process; returns its exit code and stderr."""
    _, stderr = process.communicate(timeout=120)
    assert 'Traceback' not in stderr, stderr
    return process.returncode, stderr


def record(tmp_path):
    return read_record(latest_run(tmp_path / 'out'))


def iterations(tmp_path):
    return [entry['iter'] for entry in record(tmp_path)['training_iterations']]


def checkpoints(tmp_path):
    """The iterations of the saved checkpoints, newest first; each must be readable."""
    paths = list_checkpoints(latest_run(tmp_path / 'out') / 'checkpoints')
    checkpoints = [read_index(path) for path in paths]
    assert all(load_state(checkpoint)[0]['model'] for checkpoint in checkpoints)
    return [checkpoint.iter for checkpoint in checkpoints]


def test_stopped_run_saves_and_resumes(start, tmp_path):
    process = start(max_iters=10**6)
    wait_for(lambda: latest_run(tmp_path / 'out') and len(iterations(tmp_path)) >= 3, process)
    process.send_signal(signal.SIGINT)
    code, stderr = finish(process)
    assert code == 130
    assert 'SIGINT: saving a checkpoint after this iteration' in stderr
    stopped = record(tmp_path)
    final_iter = stopped['summary']['final_iter']
    assert stopped['status'] == 'interrupted' and stopped['end_time']
    assert iterations(tmp_path) == list(range(final_iter))
    assert checkpoints(tmp_path) == [final_iter] == [c['iter'] for c in stopped['checkpoints']]

    resumed = start(init_from='resume', max_iters=final_iter + 2)
    assert finish(resumed)[0] == 0
    after = record(tmp_path)
    assert after['status'] == 'finished' and iterations(tmp_path) == list(range(final_iter + 2))
    assert after['training_iterations'][:final_iter] == stopped['training_iterations']


@pytest.mark.parametrize(
    ('name', 'code', 'status', 'saved', 'final_iter'),
    [
        ('SIGTERM', 143, 'interrupted', [3], 3),
        ('SIGHUP', 129, 'interrupted', [3], 3),
        ('SIGUSR1', 0, 'finished', [3, 5], 5),
    ],
)
def test_signal_is_handled_between_iterations(
    name, code, status, saved, final_iter, start, tmp_path
):
    process = start(IN_ITERATION_2.format(name=name), max_iters=5, keep_last=9)
    assert finish(process)[0] == code
    run_record = record(tmp_path)
    assert run_record['status'] == status
    assert [entry['iter'] for entry in run_record['checkpoints']] == saved
    assert checkpoints(tmp_path) == saved[::-1]
    assert iterations(tmp_path) == list(range(final_iter))


def test_second_signal_aborts_save(start, tmp_path):
    process = start(SLOW_SAVE, max_iters=10**6, eval_interval=2, keep_last=9)
    wait_for((tmp_path / 'saving').exists, process)
    process.send_signal(signal.SIGINT)
    # Wait for the message: two signals before it would count as one.
    assert process.stderr.readline() == '\n' and 'SIGINT' in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143
    folder = latest_run(tmp_path / 'out') / 'checkpoints'
    assert len(list(folder.glob('.saving-*'))) == 1, 'the save was in progress'
    assert checkpoints(tmp_path) == [2]
    assert record(tmp_path)['status'] == 'running' and iterations(tmp_path) == list(range(4))

    resumed = start(init_from='resume', max_iters=5, keep_last=9)
    assert finish(resumed)[0] == 0
    assert checkpoints(tmp_path) == [5, 2] and not list(folder.glob('.saving-*'))
    assert record(tmp_path)['status'] == 'finished' and iterations(tmp_path) == list(range(5))


def test_repeated_signal_is_one_request(monkeypatch):
    """Slurm and torchrun both signal a process; only a later signal is a second request."""
    ended, now = [], [100.0]
    monkeypatch.setattr('training.signals.os._exit', ended.append)
    monkeypatch.setattr('training.signals.time.monotonic', lambda: now[0])
    with SignalHandler(verbose=False):
        for moment in (100.0, 100.9, 101.0):
            now[0] = moment
            signal.raise_signal(signal.SIGTERM)
            assert not ended
        now[0] = 102.5
        signal.raise_signal(signal.SIGTERM)
        assert ended == [143]


@pytest.mark.parametrize('names', [('SIGTERM', 'SIGHUP'), ('SIGHUP', 'SIGTERM')])
def test_hangup_with_terminate_is_one_request(names, monkeypatch):
    """systemd sends SIGTERM and SIGHUP together."""
    ended = []
    monkeypatch.setattr('training.signals.os._exit', ended.append)
    monkeypatch.setattr('training.signals.time.monotonic', lambda: 100.0)
    with SignalHandler(verbose=False) as signals:
        for name in names:
            signal.raise_signal(getattr(signal, name))
        signals.sync(SingleProcessGroup())
        assert not ended and signals.exit_code == 128 + getattr(signal, names[0])
        signal.raise_signal(signal.SIGINT)
        assert bool(ended) == (names[0] == 'SIGTERM')


def test_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalHandler() as signals:
            signal.raise_signal(signal.SIGHUP)
            signals.sync(SingleProcessGroup())
            assert not signals.pending
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_is_handled_without_stderr(monkeypatch):
    def gone(descriptor, data):
        raise OSError(5, 'Input/output error')

    monkeypatch.setattr('training.signals.os.write', gone)
    with SignalHandler() as signals:
        signal.raise_signal(signal.SIGHUP)
        signals.sync(SingleProcessGroup())
        assert signals.exit_code == 129


def test_only_main_rank_reports_signal(capfd):
    for verbose in (True, False):
        with SignalHandler(verbose):
            signal.raise_signal(signal.SIGTERM)
        assert ('SIGTERM' in capfd.readouterr().err) == verbose


def test_previous_handlers_are_restored():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with SignalHandler() as signals:
        assert not set(before) & {signal.getsignal(number) for number in numbers}
        assert not signals.pending and signals.exit_code == 0
    assert [signal.getsignal(number) for number in numbers] == before
