"""Nothing that was recorded is lost: by a crash, a second process or a full disk."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from helpers.loggers import kill, new_output, resumed_logger, started_logger
from helpers.project import PROJECT
from helpers.record_schema import VALIDATOR
from helpers.sample_run import evaluation, iteration

import training_logger
from common import files
from common.errors import UserError
from records.record import read_record
from records.run_folders import new_run_folder


def test_nonfinite_values_become_null_with_events(run_folder):
    logger = started_logger(run_folder)
    entry = iteration(3, loss=float('nan'))
    entry['gradients']['norm'] = float('inf')
    logger.iteration(entry)
    logger.evaluation(evaluation(4, val_loss=float('-inf')))
    assert 'loss nan' in new_output(logger).lower().replace(':', '')
    logger.finish('failed')

    def refuse(constant):
        raise AssertionError(f'{constant} is no JSON')

    for line in (run_folder / 'journal.jsonl').read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    document = json.loads((run_folder / 'record.json').read_text(), parse_constant=refuse)
    VALIDATOR.validate(document)
    assert document['training_iterations'][0]['loss'] is None
    assert document['training_iterations'][0]['gradients']['norm'] is None
    assert document['summary']['best_val_loss'] is None
    events = [(event['event'], event['iter'], event['message']) for event in document['events']]
    assert events == [('nonfinite', 3, 'loss is nan'), ('nonfinite', 4, 'val_loss is -inf')]


def test_start_refuses_existing_journal(run_folder):
    started_logger(run_folder)
    before = (run_folder / 'journal.jsonl').read_bytes()
    with pytest.raises(UserError, match=r'journal\.jsonl'):
        started_logger(run_folder)
    assert (run_folder / 'journal.jsonl').read_bytes() == before


def test_torn_last_line_is_ignored_and_repaired(tmp_path):
    logger = started_logger(new_run_folder(tmp_path))
    logger.event('before', 0)
    path = logger.run_folder / 'journal.jsonl'
    content = path.read_bytes()
    logger.event('torn', 0)
    whole = path.read_bytes()
    folder = new_run_folder(tmp_path)
    torn = folder / 'journal.jsonl'
    for end in range(len(content), len(whole) + 1):
        torn.write_bytes(whole[:end])
        survivors = ['before', 'torn'] if end >= len(whole) - 1 else ['before']
        assert [event['event'] for event in read_record(folder)['events']] == survivors
        logger = resumed_logger(folder, 2)
        logger.event('after', 2)
        assert [event['event'] for event in read_record(folder)['events']] == [
            *survivors,
            'resume',
            'after',
        ]
        kill(logger)


def test_journal_is_locked_against_second_process(run_folder):
    logger = started_logger(run_folder)
    before = (run_folder / 'journal.jsonl').read_bytes()
    code = RESUME.format(
        tests=str(PROJECT / 'tests'), root=str(PROJECT), run_folder=str(run_folder)
    )
    command = [sys.executable, '-c', code]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert f'UserError: {run_folder}: another process is training this run' in refused.stderr
    assert (run_folder / 'journal.jsonl').read_bytes() == before
    assert read_record(run_folder)['status'] == 'running'  # readers are let in

    logger.finish('interrupted')
    allowed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert allowed.returncode == 0, allowed.stderr
    assert [event['event'] for event in read_record(run_folder)['events']] == ['resume']
    resumed_logger(run_folder, 0)  # what is dead holds nothing


RESUME = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from helpers.loggers import *
logger = resumed_logger({run_folder!r}, 0)
"""


@pytest.mark.parametrize('absence', ['no fcntl', 'no locks'])
def test_training_without_file_locks(run_folder, monkeypatch, absence):
    if absence == 'no fcntl':
        monkeypatch.setattr(files, 'fcntl', None)
    else:

        def unsupported(*args):
            raise OSError(95, 'Operation not supported')

        monkeypatch.setattr(files.fcntl, 'flock', unsupported)
    assert started_logger(run_folder).finish()['final_iter'] == 0


ENDLESS = """
import itertools, sys
sys.path[:0] = [{tests!r}, {root!r}]
from helpers.loggers import *
logger = TrainingLogger({run_folder!r}, style='line', max_iters=10**9)
logger.start(CONFIG, ARCHITECTURE, METADATA, STARTUP_INFO)
for i in itertools.count():
    logger.iteration(iteration(i))
    if i % 10 == 9:
        logger.evaluation(evaluation(i))
"""


def test_sigkill_loses_nothing_that_was_shown(run_folder):
    code = ENDLESS.format(
        tests=str(PROJECT / 'tests'), root=str(PROJECT), run_folder=str(run_folder)
    )
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    seen = []
    for line in process.stdout:
        if match := re.match(r'iter (\d+):', line):
            seen.append(int(match[1]))
        if len(seen) == 40:
            process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    document = read_record(run_folder)
    iters = [entry['iter'] for entry in document['training_iterations']]
    assert iters == list(range(len(iters)))
    assert len(seen) <= len(iters) <= len(seen) + 1
    assert document['status'] == 'running'
    VALIDATOR.validate(json.loads((run_folder / 'record.json').read_text()))


FULL_DISK = """
import resource, sys
sys.path[:0] = [{tests!r}, {root!r}]
import training_logger
from common.errors import UserError
from helpers.loggers import *
training_logger.RECORD_SHARE = float('inf')  # write record.json at each evaluation
logger = TrainingLogger({run_folder!r}, style='line', max_iters=10**9)
logger.start(CONFIG, ARCHITECTURE, METADATA, STARTUP_INFO)
logger.iteration(iteration(0))
logger.evaluation(evaluation(1))
room = {room}
resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
try:
    for i in range(1, 100):
        logger.iteration(iteration(i))
        {each}
except UserError as error:
    assert logger.finish('failed') is None
    print('CAUGHT', error)
"""


@pytest.mark.parametrize(
    'full, room, each',
    [
        ('journal.jsonl', '(logger.run_folder / "journal.jsonl").stat().st_size + 1000', ''),
        # The document is larger than the journal, so the limit meets it first.
        (
            'record.json',
            '(logger.run_folder / "record.json").stat().st_size + 300',
            'logger.evaluation(evaluation(i + 1))',
        ),
    ],
)
def test_full_disk_keeps_written_files(run_folder, full, room, each):
    code = FULL_DISK.format(
        tests=str(PROJECT / 'tests'),
        root=str(PROJECT),
        run_folder=str(run_folder),
        room=room,
        each=each,
    )
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=True
    )
    again, message = result.stdout.splitlines()[-2:]
    assert message.startswith('CAUGHT') and 'File too large' in message
    assert 'File too large' in again  # shown by `finish`, which spares the error that comes first
    assert str(run_folder / full) in message and '--init_from=resume' in message
    document = json.loads((run_folder / 'record.json').read_text())
    VALIDATOR.validate(document)
    assert (run_folder / 'journal.jsonl').read_bytes().endswith(b'}\n')
    assert [entry['iter'] for entry in document['eval_steps']] == [1]
    assert len(read_record(run_folder)['training_iterations']) >= 2
    assert sorted(os.listdir(run_folder)) == ['checkpoints', 'journal.jsonl', 'record.json']


@pytest.mark.parametrize('status', ['finished', 'interrupted', 'failed'])
def test_full_disk_at_finish(run_folder, monkeypatch, status):
    logger = started_logger(run_folder)
    before = (run_folder / 'journal.jsonl').read_bytes()
    new_output(logger)

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'write', full)
    if status == 'failed':  # another error is on its way
        assert logger.finish(status) is None
        assert 'No space left' in new_output(logger)
    else:
        with pytest.raises(UserError, match='No space left'):
            logger.finish(status)
    monkeypatch.undo()
    assert (run_folder / 'journal.jsonl').read_bytes() == before
    resumed_logger(run_folder, 0).finish(status)  # the lock is free again
    assert read_record(run_folder)['status'] == status


def test_folder_in_place_of_record_raises_user_error(tmp_path):
    folder = new_run_folder(tmp_path)
    logger = started_logger(folder)
    (folder / 'record.json').unlink()
    (folder / 'record.json').mkdir()
    with pytest.raises(UserError, match=r'record\.json.*The record up to this point is intact'):
        logger.finish()
    assert read_record(folder)['status'] == 'finished'


def test_open_reader_sees_whole_record_during_replacement(run_folder, monkeypatch):
    monkeypatch.setattr(training_logger, 'RECORD_SHARE', float('inf'))
    logger = started_logger(run_folder)
    with open(run_folder / 'record.json') as reader:
        logger.evaluation(evaluation(0))
        assert json.load(reader)['eval_steps'] == []
    entry = {**evaluation(0), 'train_seconds': 0.0}
    assert read_record(run_folder / 'record.json')['eval_steps'] == [entry]
