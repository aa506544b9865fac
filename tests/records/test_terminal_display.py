"""A run on a terminal: the block is redrawn in place, everything else scrolls above it."""

import random
import re
import signal
import sys

import pytest
from helpers.loggers import make_logger
from helpers.project import PROJECT, TINY_RUN
from helpers.pseudo_terminal import run_on_terminal
from helpers.sample_run import HEADER, MAX_ITERS, checkpoint, evaluation, iteration

from common import live_region
from common.console_output import write_error, write_progress
from records.console import Console, iteration_block

BLOCK_ROWS = 7


@pytest.fixture(autouse=True)
def no_rate_limit(monkeypatch):
    monkeypatch.setattr(live_region, 'REDRAW_SECONDS', 0.0)


def shown_block(i):
    return iteration_block(iteration(i), None, None).split('\n')


def without_eta(lines):
    return [line.partition(' │ ETA')[0] for line in lines]


def test_block_is_redrawn_above_progress_bar(terminal):
    screen = terminal(80, 24)
    console = Console(stream=screen, max_iters=MAX_ITERS)
    for i in range(50):
        console.iteration(iteration(i))
    *block, bar = screen.text.split('\n')
    assert without_eta(block) == without_eta(shown_block(49))
    assert re.fullmatch('━+─+  50 %  50/100 iterations  0:00:.. elapsed  0:..:.. left', bar)
    console.evaluation(evaluation(50), None)
    console.show('anything')
    lines = screen.text.split('\n')
    assert lines[5] == 'anything' and without_eta(lines[6:-1]) == without_eta(shown_block(49))


@pytest.mark.parametrize('seed', range(20))
def test_history_has_each_event_once_and_last_block_alone(seed, terminal):
    choose = random.Random(seed)
    screen = terminal(choose.randint(45, 120), choose.randint(24, 50), standard=True)
    console, messages = Console(max_iters=MAX_ITERS), []
    for i in range(40):
        console.iteration(iteration(i))
        action = choose.choice(['evaluation', 'checkpoint', 'warning', 'other', 'resize', ''])
        if action == 'evaluation':
            console.evaluation(evaluation(i + 1, 4 + i / 100), None)
            messages.append(f'EVALUATION after {i + 1} iteration')
        elif action == 'checkpoint':
            console.show(f'checkpoint {i}.')
            messages.append(f'checkpoint {i}.')
        elif action in ('warning', 'other'):
            (write_error if action == 'warning' else write_progress)(f'message {i}.')
            messages.append(f'message {i}.')
        elif action == 'resize':
            screen.resize(choose.randint(60, 120), choose.randint(24, 50))
    console.close()
    console.show('TRAINING FINISHED')
    text = screen.text
    positions = [text.find(message) for message in messages]
    assert -1 not in positions and positions == sorted(positions)
    assert [text.count(message) for message in messages] == [1] * len(messages)
    assert text.count('📍 Iter') == text.count('📊 Gradients') == 1
    assert '━' not in text and text.endswith('\nTRAINING FINISHED')


def test_low_terminal_gets_lines(terminal):
    screen = terminal(120, 24)
    console = Console(stream=screen, max_iters=MAX_ITERS)
    console.iteration(iteration(0))
    screen.rows = 9
    console.iteration(iteration(1))
    console.evaluation(evaluation(2), None)
    assert screen.text.count('📍') == 1
    assert screen.text.split('\n')[-2].startswith('iter 1: loss 3.2145')
    assert screen.text.split('\n')[-1].startswith('step 2: train loss 4.1000')
    screen.rows = 24
    console.iteration(iteration(3))
    assert screen.text.count('📍') == 2 and '4/100 iterations' in screen.text


def test_narrow_terminal_cuts_block_and_rules(terminal):
    screen = terminal(40, 24)
    console = Console(stream=screen, max_iters=MAX_ITERS)
    console.evaluation(evaluation(0), None)
    console.iteration(iteration(0))
    lines = screen.text.split('\n')
    assert lines.count('=' * 40) == 2
    assert lines[-8:-6] == ['─' * 39 + '…', '📍 Iter      0 │ Loss: 3.2145 │ Time: 2…']
    assert lines[-1].startswith('━') or lines[-1].startswith('─')


@pytest.mark.parametrize('style', ['line', 'block'])
def test_other_styles_print_in_order_on_terminal(style, terminal):
    screen = terminal(100, 24)
    console = Console(style, screen, max_iters=MAX_ITERS)
    for i in range(3):
        console.iteration(iteration(i))
    assert '\x1b' not in screen.raw
    marks = {'line': 'iter ', 'block': '📍 Iter'}
    assert screen.text.count(marks[style]) == 3


def test_dumb_terminal_gets_blocks(terminal, monkeypatch):
    monkeypatch.setenv('TERM', 'dumb')
    screen = terminal(100, 24)
    console = Console(stream=screen, max_iters=MAX_ITERS)
    for i in range(3):
        console.iteration(iteration(i))
    assert '\x1b' not in screen.raw and screen.text.count('📍 Iter') == 3


@pytest.mark.parametrize('end', ['finished', 'failed'])
def test_logger_ends_display(end, run_folder, terminal):
    screen = terminal(80, 24, standard=True)
    logger = make_logger(run_folder, stream=screen)
    logger.start(**HEADER)
    logger.iteration(iteration(0))
    logger.checkpoint(checkpoint(1))
    assert '━' in screen.text or '─  ' in screen.text
    logger.finish(end)
    assert 'elapsed' not in screen.text
    assert (
        screen.text.index('💾 checkpoint')
        < screen.text.index('📍')
        < screen.text.index(end.upper())
    )
    assert 'write' not in vars(screen)


def test_lost_terminal_is_recorded_and_training_continues(terminal):
    reasons = []
    screen = terminal(80, 24)
    console = Console(stream=screen, max_iters=MAX_ITERS, on_lost=reasons.append)
    console.iteration(iteration(0))

    def gone(text):
        raise OSError(5, 'Input/output error')

    console.display._writers[id(screen)] = gone
    for i in range(1, 4):
        console.iteration(iteration(i))
        console.evaluation(evaluation(i), None)
    console.close()
    assert len(reasons) == 1 and 'Input/output error' in reasons[0]


# --- On a pseudo-terminal -------------------------------------------------------------------------


def train_on_terminal(dataset, out_dir, *arguments, **options):
    values = {**TINY_RUN, 'dataset': dataset, 'out_dir': out_dir}
    command = [sys.executable, 'train.py', *(f'--{key}={value}' for key, value in values.items())]
    return run_on_terminal([*command, *arguments], 80, 30, cwd=PROJECT, **options)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='pseudo-terminals of POSIX')
def test_training_on_pseudo_terminal(tiny_dataset, tmp_path):
    screen, code = train_on_terminal(
        tiny_dataset, tmp_path, '--max_iters=20', '--eval_interval=10', '--log_interval=1'
    )
    text = screen.text
    assert code == 0, text
    for once in ('TRAINING INITIALIZATION', 'EVALUATION after 10', 'EVALUATION after 20'):
        assert text.count(once) == 1
    assert text.count('📍 Iter') == 1 and '📍 Iter     19' in text
    assert '✅ TRAINING FINISHED after 20 of 20 iterations' in text and 'elapsed' not in text
    assert '\x1b[1m' in screen.raw and '20/20 iterations' in screen.raw


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='pseudo-terminals of POSIX')
def test_interrupt_on_pseudo_terminal(tiny_dataset, tmp_path):
    screen, code = train_on_terminal(
        tiny_dataset,
        tmp_path,
        *('--max_iters=100000', '--eval_interval=50000'),
        until=' elapsed',
        then=lambda process: process.send_signal(signal.SIGINT),
    )
    text = screen.text
    assert code == 130, text
    assert text.count('SIGINT: ') == 1 and '⛔ TRAINING INTERRUPTED' in text
    assert 'elapsed' not in text and '\x1b[?25l' not in screen.raw
