"""The logger keeps the journal, record.json and the console in step."""

import io
import itertools
import json
import re

import pytest
from helpers.loggers import (
    kill,
    make_logger,
    new_output,
    resumed_logger,
    started_logger,
)
from helpers.sample_run import (
    ARCHITECTURE,
    CONFIG,
    METADATA,
    STARTUP_INFO,
    checkpoint,
    evaluation,
    iteration,
)

import training_logger
from common.errors import UserError


def test_resume_without_journal_raises_user_error(run_folder):
    with pytest.raises(UserError, match=r'journal\.jsonl'):
        resumed_logger(run_folder, 10)
    assert not (run_folder / 'journal.jsonl').exists()


def test_record_updates_take_one_percent_of_time(run_folder, monkeypatch):
    now, written = [0.0], []

    def slow(path, document):
        now[0] += 2.0
        written.append((now[0], len(document['eval_steps'])))

    monkeypatch.setattr(training_logger.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(training_logger, 'write_record', slow)
    logger = started_logger(run_folder, style='line')
    for n in range(100):
        now[0] += 10.0
        logger.evaluation(evaluation(n))
    moments = [moment for moment, _ in written]
    assert len(moments) > 2
    assert all(200 <= b - a - 2.0 < 210 for a, b in itertools.pairwise(moments))
    logger.finish()
    assert written[-1][1] == 100


def test_evaluation_is_shown_with_best_of_run(run_folder):
    def standing(n, loss):
        logger.evaluation(evaluation(n, loss))
        return re.search('Best val loss so far: (.*)', new_output(logger))[1]

    logger = started_logger(run_folder)
    assert standing(0, float('nan')) == 'n/a'
    assert standing(10, 4.0) == 'this one'
    assert standing(20, 3.0) == 'this one'
    assert standing(30, 3.5) == '3.0000 at iter 20'
    logger.rollback(15, from_iter=31, checkpoint='checkpoints/15.pt', message='loss is nan')
    assert standing(20, 4.5) == '4.0000 at iter 10'
    kill(logger)
    logger = resumed_logger(run_folder, 20)
    assert standing(30, 4.25) == '4.0000 at iter 10'


def test_other_ranks_write_and_show_nothing(run_folder, capsys):
    before = sorted(run_folder.rglob('*'))
    logger = make_logger(run_folder, is_main=False, stream=None)
    logger.start(CONFIG, ARCHITECTURE, METADATA, STARTUP_INFO)
    logger.iteration(iteration(0))
    logger.evaluation(evaluation(0))
    logger.checkpoint(checkpoint(0))
    logger.event('signal', 0)
    resumed_logger(run_folder, 0, is_main=False, stream=None)
    make_logger(run_folder, is_main=False).event('signal', 0)
    assert logger.finish() is None
    assert sorted(run_folder.rglob('*')) == before
    assert capsys.readouterr().out == ''


def test_journal_line_is_written_before_console_output(run_folder):
    class Watching(io.StringIO):
        def write(self, text):
            for i in re.findall(r'^iter (\d+)', text, re.MULTILINE):
                last = (run_folder / 'journal.jsonl').read_text().splitlines()[-1]
                checked.append(json.loads(last)['iter'] == int(i))
            return super().write(text)

    checked = []
    logger = started_logger(run_folder, style='line', stream=Watching())
    for i in range(3):
        logger.iteration(iteration(i))
    assert checked == [True] * 3


def test_finish_before_start_does_nothing(run_folder):
    assert make_logger(run_folder).finish('failed') is None
    assert not (run_folder / 'journal.jsonl').exists()
