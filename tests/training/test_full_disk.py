"""A disk that takes no more: one message, and what was saved and recorded before is intact."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers.in_process import train_here
from helpers.project import PROJECT, TINY_RUN

from records.record import read_record
from records.run_folders import RECORD, latest_run
from training.checkpoint import load_latest

pytestmark = pytest.mark.slow

resource = pytest.importorskip('resource')

LIMITED = """
import resource, sys
import train
from common.errors import run_script

limit = int(sys.argv.pop(1))  # of bytes in a file; Python is told by an error, not killed
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
run_script(train.main)
"""


@pytest.fixture
def out_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'out'


@pytest.fixture
def start(out_dir, tiny_dataset):
    """start(before, key=value, …): a process that trains, tiny, into out_dir; what it ended as.

    before: what stands in front of the options on the command line.
    """

    def run(before, **options):
        values = {**TINY_RUN, 'dataset': tiny_dataset, 'out_dir': out_dir, 'keep_last': 9}
        values |= options
        return subprocess.run(
            [*before, *(f'--{key}={value}' for key, value in values.items())],
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(PROJECT)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def train(out_dir, tiny_dataset):
    """train(key=value, …): the same without limits, and to its end."""

    def run(**options):
        assert train_here(tiny_dataset, out_dir, keep_last=9, **options).code == 0
        return latest_run(out_dir)

    return run


def limited(size):
    return [sys.executable, '-c', LIMITED, str(size)]


def contents(folder):
    """Every file and folder, and the bytes of the files."""
    return {
        str(path.relative_to(folder)): path.is_file() and path.read_bytes()
        for path in folder.rglob('*')
    }


def iterations(run):
    return [entry['iter'] for entry in read_record(run)['training_iterations']]


def assert_told(done, *words):
    assert done.returncode == 2, done.stderr
    assert 'Traceback' not in done.stderr
    for word in (*words, 'intact', 'Make room', '--init_from=resume'):
        assert word in done.stderr, done.stderr


def assert_goes_on(train, run, updates):
    """With room again, the run goes on to `updates`, with nothing lost or doubled."""
    before = read_record(run)['training_iterations']
    assert train(init_from='resume', max_iters=updates, eval_interval=10**6) == run
    after = read_record(run)
    assert after['status'] == 'finished' and iterations(run) == list(range(updates))
    kept = min(event['iter'] for event in after['events'] if event['event'] == 'resume')
    assert after['training_iterations'][:kept] == before[:kept]
    assert load_latest(run / 'checkpoints', pytest.fail)[0].iter == updates


def test_disk_full_during_checkpoint(start, train):
    run = train(max_iters=2)
    saved = contents(run / 'checkpoints')
    size = len(saved['iter_00000002/state.pt'])

    # Half a checkpoint: room enough for journal and record.
    done = start(limited(size // 2), init_from='resume', max_iters=8, eval_interval=4)
    assert_told(done, 'iter_00000004', 'File too large')
    assert contents(run / 'checkpoints') == saved
    record = json.loads((run / RECORD).read_text())
    assert record == read_record(run) and record['status'] == 'failed'
    assert iterations(run) == list(range(4))
    assert [entry['iter'] for entry in record['eval_steps']] == [0, 2, 4]
    assert_goes_on(train, run, 6)


def test_disk_full_during_async_checkpoint(start, train):
    run = train(max_iters=2)
    saved = contents(run / 'checkpoints')
    size = len(saved['iter_00000002/state.pt'])
    options = {'init_from': 'resume', 'max_iters': 8, 'eval_interval': 4, 'async_save': True}
    assert_told(start(limited(size // 2), **options), 'iter_00000004', 'File too large')
    assert contents(run / 'checkpoints') == saved
    done = iterations(run)
    assert read_record(run)['status'] == 'failed'
    assert done == list(range(len(done))) and len(done) >= 4  # it is noticed at some boundary
    assert_goes_on(train, run, 6)


def test_disk_full_during_journal_write(start, train, out_dir):
    options = {'max_iters': 20, 'eval_interval': 100}
    measured = train(**options)
    lines = (measured / 'journal.jsonl').read_bytes().splitlines(True)
    number = [i for i, line in enumerate(lines) if b'"iteration"' in line][15]
    limit = sum(map(len, lines[:number])) + len(lines[number]) // 2

    assert_told(start(limited(limit), **options), 'journal.jsonl', 'File too large')
    run = latest_run(out_dir)
    assert run != measured
    journal = (run / 'journal.jsonl').read_bytes()
    assert journal.endswith(b'\n') and all(map(json.loads, journal.splitlines()))
    done = iterations(run)
    assert done == list(range(len(done))) and 0 < len(done) < 20
    # The copy is of an earlier moment, and whole.
    copy = json.loads((run / RECORD).read_text())
    assert copy['run_name'] == run.name and copy['status'] == 'running'
    assert not list(run.glob('*.tmp'))


def test_file_system_full(start, train, out_dir, tmp_path):
    """A real one, of 640 KB, mounted where only the process sees it; a checkpoint takes 400."""
    inside = ['unshare', '--map-root-user', '--mount', 'sh', '-c']
    mount = 'mkdir out && mount -t tmpfs -o size=640k none out'
    if not shutil.which('unshare') or subprocess.run([*inside, mount], cwd=tmp_path).returncode:
        pytest.skip('mounting a file system is not permitted')
    # What is left on the small one is brought to the folder beneath before it goes.
    script = 'mount -t tmpfs -o size=640k none out && "$@"; code=$?; cp -r out kept; exit $code'
    trained = [sys.executable, str(PROJECT / 'train.py')]
    done = start([*inside, script, 'sh', *trained], max_iters=8, eval_interval=2)
    assert_told(done, 'iter_00000004', 'No space left on device')
    out_dir.rmdir()
    (tmp_path / 'kept').rename(out_dir)
    run = latest_run(out_dir)
    assert [path.name for path in (run / 'checkpoints').iterdir()] == ['iter_00000002']
    assert load_latest(run / 'checkpoints', pytest.fail)[0].iter == 2
    assert read_record(run)['status'] == 'failed' and iterations(run) == list(range(4))
    assert_goes_on(train, run, 6)
