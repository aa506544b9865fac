"""The progress bar on a terminal and in a log file."""

import io

import pytest

from common import live_region, progress_bar
from common.console_output import write_progress
from common.progress_bar import ProgressBar, bar_line
from common.text_width import display_width


@pytest.fixture
def now(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_bar.time, 'monotonic', lambda: now[0])
    return now


def test_bar_is_redrawn_and_removed(terminal, now):
    screen = terminal(100, 24, standard=True)
    with ProgressBar('Encoding', 3e9, unit='B', done=1e9) as bar:
        assert screen.text == 'Encoding ━━━━━━──────────────  33 %  1.0/3.0 GB'
        for _ in range(5):
            now[0] += 10
            bar.advance(1e8, note='12 documents')
        write_progress('left out: a file')
        assert screen.text == (
            'left out: a file\n'
            'Encoding ━━━━━━───────  50 %  1.5/3.0 GB  10.0 MB/s  0:02:30 left  12 documents'
        )
    assert screen.text == 'left out: a file'


def test_log_gets_sparse_lines(now):
    log = io.StringIO()
    bar = ProgressBar('Studying', 100_000, unit='iterations', stream=log)
    for done in range(100_001):
        now[0] += 1
        bar.update(done)
    bar.close()
    lines = log.getvalue().splitlines()
    assert lines[0] == (
        'Studying: 0 %, 9/100,000 iterations, 0.9 iterations/s, 1 day, 6:51:41 left'
    )
    assert len(lines) < 170


def test_unknown_total_has_no_bar(terminal, now):
    screen = terminal(80, 24)
    bar = ProgressBar('Reading', unit='documents', stream=screen)
    bar.update(10)
    now[0] += 2
    bar.update(1234)
    assert screen.text == 'Reading 1,234 documents  617.0 documents/s'


def test_given_time_left_replaces_estimate(terminal, now):
    bar = ProgressBar('Study', 12, unit='runs', stream=terminal())
    now[0] += 5
    bar.update(1, seconds_left=90)
    assert bar._region.stream.text.endswith('  0:01:30 left')


def test_bar_fits_80_columns():
    for total in (1, 20, 5_000, 600_000, 10_000_000):
        for done in (0, total // 3, total, total + 5):
            texts = [f'{done:,}/{total:,} iterations', '1:02:03 elapsed', '1:02:03 left']
            line = bar_line('', done, total, texts)
            assert display_width(line) <= 80
            assert f'{min(100 * done // total, 100):3d} %' in line


def test_nested_bar_writes_lines(terminal, now):
    screen = terminal(80, 24)
    with ProgressBar('Outer', 2, stream=screen) as outer:
        inner = ProgressBar('Inner', 4, stream=screen)
        now[0] += 20
        inner.update(1)
        assert screen.text.startswith('Inner: 25 %, 1/4, ')
        outer.update(1)
        inner.close()
    assert live_region._current is None
