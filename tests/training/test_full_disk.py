"""Full disk: one error message, and earlier checkpoints and records remain intact."""

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

limit = int(sys.argv.pop(1))  # bytes per file; a write beyond it is an error in Python
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
run_script(train.main)
"""


@pytest.fixture
def out_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'out'


@pytest.fixture
def start(out_dir, tiny_dataset):
    """start(command, key=value, …) trains a tiny model in a process and returns its result.

    command: the start of the command line, before the options.
    """

    def run(command, **options):
        values = {**TINY_RUN, 'dataset': tiny_dataset, 'out_dir': out_dir, 'keep_last': 9}
        values |= options
        return subprocess.run(
            [*command, *(f'--{key}={value}' for key, value in values.items())],
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(PROJECT)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def train(out_dir, tiny_dataset):
    """train(key=value, …) trains in this process without a limit and returns the run folder."""

    def run(**options):
        assert train_here(tiny_dataset, out_dir, keep_last=9, **options).code == 0
        return latest_run(out_dir)

    return run


def with_file_limit(size):
    return [sys.executable, '-c', LIMITED, str(size)]


def contents(folder):
    """All files and folders below `folder`, with the bytes of the files."""
    return {
        str(path.relative_to(folder)): path.is_file() and path.read_bytes()
        for path in folder.rglob('*')
    }


def iterations(run):
    return [entry['iter'] for entry in read_record(run)['training_iterations']]


def assert_disk_error(done, *words):
    assert done.returncode == 2, done.stderr
    assert 'Traceback' not in done.stderr
    for word in (*words, 'intact', 'Free space', '--init_from=resume'):
        assert word in done.stderr, done.stderr


def assert_resumes(train, run, iterations_total):
    """With space again, the run resumes, and no iteration is lost or repeated."""
    before = read_record(run)['training_iterations']
    assert train(init_from='resume', max_iters=iterations_total, eval_interval=10**6) == run
    after = read_record(run)
    assert after['status'] == 'finished' and iterations(run) == list(range(iterations_total))
    resumed_from = min(event['iter'] for event in after['events'] if event['event'] == 'resume')
    assert after['training_iterations'][:resumed_from] == before[:resumed_from]
    assert load_latest(run / 'checkpoints', pytest.fail)[0].iter == iterations_total


def test_disk_full_during_checkpoint(start, train):
    run = train(max_iters=2)
    saved = contents(run / 'checkpoints')
    size = len(saved['iter_00000002/state.pt'])

    # Half the size of a checkpoint is enough for the journal and the record.
    done = start(with_file_limit(size // 2), init_from='resume', max_iters=8, eval_interval=4)
    assert_disk_error(done, 'iter_00000004', 'File too large')
    assert contents(run / 'checkpoints') == saved
    record = json.loads((run / RECORD).read_text())
    assert record == read_record(run) and record['status'] == 'failed'
    assert iterations(run) == list(range(4))
    assert [entry['iter'] for entry in record['eval_steps']] == [0, 2, 4]
    assert_resumes(train, run, 6)


def test_disk_full_during_async_checkpoint(start, train):
    run = train(max_iters=2)
    saved = contents(run / 'checkpoints')
    size = len(saved['iter_00000002/state.pt'])
    options = {'init_from': 'resume', 'max_iters': 8, 'eval_interval': 4, 'async_save': True}
    assert_disk_error(
        start(with_file_limit(size // 2), **options), 'iter_00000004', 'File too large'
    )
    assert contents(run / 'checkpoints') == saved
    done = iterations(run)
    assert read_record(run)['status'] == 'failed'
    assert done == list(range(len(done))) and len(done) >= 4  # detected after some iteration
    assert_resumes(train, run, 6)


def test_disk_full_during_journal_write(start, train, out_dir):
    options = {'max_iters': 20, 'eval_interval': 100}
    measured = train(**options)
    lines = (measured / 'journal.jsonl').read_bytes().splitlines(True)
    number = [i for i, line in enumerate(lines) if b'"iteration"' in line][15]
    limit = sum(map(len, lines[:number])) + len(lines[number]) // 2

    assert_disk_error(start(with_file_limit(limit), **options), 'journal.jsonl', 'File too large')
    run = latest_run(out_dir)
    assert run != measured
    journal = (run / 'journal.jsonl').read_bytes()
    assert journal.endswith(b'\n') and all(map(json.loads, journal.splitlines()))
    done = iterations(run)
    assert done == list(range(len(done))) and 0 < len(done) < 20
    # record.json is older than the journal, but complete.
    copy = json.loads((run / RECORD).read_text())
    assert copy['run_name'] == run.name and copy['status'] == 'running'
    assert not list(run.glob('*.tmp'))


def test_full_file_system_keeps_last_checkpoint(start, train, out_dir, tmp_path):
    """A tmpfs of 640 KB in a mount namespace of the process; a checkpoint has 400 KB."""
    inside = ['unshare', '--map-root-user', '--mount', 'sh', '-c']
    mount = 'mkdir out && mount -t tmpfs -o size=640k none out'
    if not shutil.which('unshare') or subprocess.run([*inside, mount], cwd=tmp_path).returncode:
        pytest.skip('mounting a file system is not permitted')
    # The namespace ends with the process, so the files are copied out first.
    script = 'mount -t tmpfs -o size=640k none out && "$@"; code=$?; cp -r out saved; exit $code'
    trained = [sys.executable, str(PROJECT / 'train.py')]
    done = start([*inside, script, 'sh', *trained], max_iters=8, eval_interval=2)
    assert_disk_error(done, 'iter_00000004', 'No space left on device')
    out_dir.rmdir()
    (tmp_path / 'saved').rename(out_dir)
    run = latest_run(out_dir)
    assert [path.name for path in (run / 'checkpoints').iterdir()] == ['iter_00000002']
    assert load_latest(run / 'checkpoints', pytest.fail)[0].iter == 2
    assert read_record(run)['status'] == 'failed' and iterations(run) == list(range(4))
    assert_resumes(train, run, 6)
