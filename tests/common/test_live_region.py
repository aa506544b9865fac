"""Lines that are redrawn in place; everything else scrolls above them, exactly once."""

import contextlib
import io
import logging
import os
import random
import sys
import warnings

import pytest
from helpers.terminal import Terminal

from common import live_region
from common.console_output import bold, write_error, write_progress
from common.live_region import LiveRegion, closed_at_end, write_in_signal_handler


@pytest.fixture(autouse=True)
def no_rate_limit(monkeypatch):
    monkeypatch.setattr(live_region, 'REDRAW_SECONDS', 0.0)


@pytest.fixture
def open_screen(terminal):
    """Makes a terminal that is standard output and standard error; the test has to call it."""
    return lambda: terminal(40, 12, standard=True)


def test_region_is_redrawn_in_place(open_screen):
    screen = open_screen()
    region = LiveRegion()
    for n in range(30):
        region.update([f'line {n}', f'bar {n}'])
    assert screen.text == 'line 29\nbar 29'
    region.update(['one'])
    assert screen.text == 'one'
    region.close(keep=True)
    write_progress('after')
    assert screen.text == 'one\nafter'
    assert LiveRegion().available


def test_closed_region_leaves_no_trace(open_screen):
    screen = open_screen()
    write_progress('before')
    region = LiveRegion()
    region.update(['a', 'b', 'c'])
    region.close()
    write_progress('after')
    assert screen.text == 'before\nafter'


def test_other_output_scrolls_above(open_screen):
    screen = open_screen()
    logger = logging.Logger('of a library')
    logger.addHandler(logging.StreamHandler())
    region = LiveRegion()
    region.update(['block', 'bar'])
    write_progress('progress')
    write_error('error')
    print('print', 1)
    sys.stderr.write(warnings.formatwarning('careful', UserWarning, 'model.py', 7))
    logger.warning('logged')
    above = screen.text.split('\n')
    assert above[:3] == ['progress', 'error', 'print 1']
    assert above[3] == 'model.py:7: UserWarning: careful'
    assert above[-3:] == ['logged', 'block', 'bar']
    region.close()


def test_region_waits_for_end_of_line(open_screen):
    screen = open_screen()
    region = LiveRegion()
    region.update(['bar'])
    write_progress('download ... ', end='')
    assert screen.text == 'download ...'
    write_progress('done')
    assert screen.text == 'download ... done\nbar'
    write_progress('download ... ', end='')
    region.update(['next'])
    assert screen.text == 'download ... done\ndownload ...\nnext'


@pytest.mark.parametrize('seed', range(40))
def test_any_sequence_leaves_each_line_once(seed, terminal):
    """All other output, then the last state of the region, whatever the order of the calls."""
    choose = random.Random(seed)
    # A row of 90 columns takes two of 45, and five lines of it fit on the screen.
    screen = terminal(choose.randint(45, 90), choose.randint(16, 40), standard=True)
    region, above, lines = LiveRegion(), [], []
    for n in range(60):
        action = choose.choice(['update', 'update', 'print', 'error', 'resize', 'reopen'])
        if action == 'update':
            words = ('日本 ', '📍 ', 'x', 'long line ' * 12)
            lines = [f'{n}{choose.choice(words)}{i}' for i in range(choose.randint(1, 5))]
            region.update(lines)
        elif action in ('print', 'error'):
            write = write_progress if action == 'print' else write_error
            texts = [f'message {n} {i}' for i in range(choose.randint(1, 30))]
            above += texts
            write('\n'.join(texts))
        elif action == 'resize':
            screen.resize(choose.randint(45, 90), choose.randint(16, 40))
        else:
            region.close()
            lines, region = [], LiveRegion()
    region.update(lines)
    shown = screen.text.split('\n')
    assert shown[: len(above)] == above
    region_rows = shown[len(above) :]
    assert len(region_rows) == len(lines)
    for row, line in zip(region_rows, lines):
        assert row == line.rstrip() or (row[-1] == '…' and line.startswith(row[:-1]))


def test_redraws_are_limited(open_screen, monkeypatch):
    screen = open_screen()
    now = [0.0]
    monkeypatch.setattr(live_region, 'REDRAW_SECONDS', 0.1)
    monkeypatch.setattr(live_region.time, 'monotonic', lambda: now[0])
    region = LiveRegion()
    for n in range(1000):
        region.update([f'state {n}'])
        now[0] += 0.001
    assert 10 <= screen.writes <= 11
    write_progress('message')
    assert screen.text == 'message\nstate 999'
    region.update(['last'])
    region.close(keep=True)
    assert screen.text == 'message\nlast'


def test_tall_region_does_not_fit(terminal):
    region = LiveRegion(terminal(40, 12))
    assert region.fits(10) and not region.fits(11)


def test_only_one_region_is_shown(open_screen):
    screen = open_screen()
    region, other = LiveRegion(), LiveRegion()
    assert region.available and other.available
    region.update(['bar'])
    assert region.available and not other.available
    other.close()
    assert screen.text == 'bar'
    region.close()
    assert other.available


@pytest.mark.parametrize('name', ['dumb', None])
def test_dumb_terminal_has_no_region(name, terminal, monkeypatch):
    if name:
        monkeypatch.setenv('TERM', name)
    else:
        monkeypatch.delenv('TERM')
    assert LiveRegion(terminal()).available == (os.name != 'posix' and not name)


def test_stream_that_is_no_terminal_has_no_region():
    assert not LiveRegion(io.StringIO()).available


def test_lost_stream_closes_region_and_is_reported_once(terminal, monkeypatch):
    class Closing(Terminal):
        def write(self, text):
            if self.writes >= 2:
                raise OSError(5, 'Input/output error')
            return super().write(text)

    errors = io.StringIO()
    screen = Closing(40, 12)
    monkeypatch.setattr(sys, 'stdout', screen)
    monkeypatch.setattr(sys, 'stderr', errors)
    terminal()
    region = LiveRegion()
    assert region.update(['1']) is None and region.update(['2']) is None
    assert 'Input/output error' in region.update(['3'])
    assert errors.getvalue().count('\n') == 1
    write_progress('to the null device')
    assert LiveRegion(terminal()).available


def test_exception_leaves_usable_terminal(open_screen):
    screen = open_screen()
    with contextlib.suppress(KeyboardInterrupt), closed_at_end():
        LiveRegion().update(['block'])
        raise KeyboardInterrupt
    write_progress('after')
    assert screen.text == 'block\nafter'
    assert '\x1b[?25l' not in screen.raw
    assert 'write' not in vars(screen)


def test_signal_handler_writes_below(open_screen, monkeypatch):
    screen = open_screen()

    def write(descriptor, data):
        Terminal.write(screen, data.decode())

    monkeypatch.setattr(live_region.os, 'write', write)
    region = LiveRegion()
    region.update(['block', 'bar'])
    write_in_signal_handler('SIGINT\n')
    assert screen.text == 'SIGINT'
    region.update(['next block', 'bar'])
    assert screen.text == 'SIGINT\nnext block\nbar'


@pytest.mark.parametrize('moment', ['draw', 'above'])
def test_signal_during_write_loses_nothing(moment, open_screen, monkeypatch):
    screen = open_screen()

    def write(text):
        region._writers[id(screen)] = original  # the signal comes once
        write_in_signal_handler('SIGINT\n')
        original(text)

    monkeypatch.setattr(live_region.os, 'write', lambda _, data: original(data.decode()))
    original = screen.write
    region = LiveRegion()
    region.update(['a', 'b'])
    region._writers[id(screen)] = write
    if moment == 'draw':
        region.update(['c', 'd'])
    else:
        write_progress('message')
    region.update(['e', 'f'])
    expected = ['SIGINT', 'e', 'f'] if moment == 'draw' else ['message', 'SIGINT', 'e', 'f']
    assert screen.text.split('\n') == expected


def test_color_of_region_costs_no_columns(open_screen):
    screen = open_screen()
    LiveRegion().update([bold('x' * 40), bold('x' * 50)])
    assert screen.screen[:2] == ['x' * 40, 'x' * 39 + '…']
    assert screen.raw.count('\x1b[1m') == screen.raw.count('\x1b[0m') == 2
