"""Numbers as people read them: the unit that suits their size, times, tables."""

import pytest

from common.formatting import (
    LISTED,
    SAMPLE_LINES,
    byte_count,
    clock,
    duration,
    first_lines,
    flop_count,
    join_names,
    milliseconds,
    si,
    table,
)


@pytest.mark.parametrize(
    'value, text',
    [
        (None, 'n/a'),
        (0, '0.0 F'),
        (854_654_976, '854.7 MF'),
        (35.1e9, '35.1 GF'),
        (999.96e9, '1.0 TF'),
        (312e12, '312.0 TF'),
        (3e24, '3,000.0 ZF'),
    ],
)
def test_flop_count(value, text):
    assert flop_count(value) == text


@pytest.mark.parametrize(
    'value, text',
    [(512, '512'), (1e3, '1.00K'), (999_996, '1.00M'), (2.5e9, '2.50G'), (4.2e16, '42000.00T')],
)
def test_si(value, text):
    assert si(value) == text


@pytest.mark.parametrize(
    'value, text',
    [(999, '1.00 kB'), (3.5e6, '3.50 MB'), (999_996, '1.00 MB'), (1e12, '1000.00 GB')],
)
def test_byte_count(value, text):
    assert byte_count(value) == text


@pytest.mark.parametrize(
    'seconds, text',
    [(0.04, '0.0s'), (59.4, '59.4s'), (59.96, '1m 00s'), (3599.7, '1h 00m'), (7384, '2h 03m')],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    'seconds, text', [(None, 'n/a'), (749.6, '0:12:30'), (183_845, '2 days, 3:04:05')]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    'value, text', [(None, 'n/a'), (2.345, '2.35ms'), (234.4, '234ms'), (12_340, '12.3s')]
)
def test_milliseconds(value, text):
    assert milliseconds(value) == text


def test_table_aligns_columns_and_ends_lines_without_spaces():
    assert table([['a', 'b', 'c'], ['long', '1', '']], '<><') == 'a     b  c\nlong  1'


def test_long_lists_are_cut():
    names = [f'n{i}' for i in range(LISTED + 2)]
    assert join_names(names[:2]) == 'n0, n1'
    assert join_names(names).endswith(f'n{LISTED - 1} and 2 more')


def test_first_lines_wraps_cuts_and_escapes():
    assert first_lines('a b\tc\n\x1b[2J', 3) == ['a b', 'c', '\\x1', 'b[2', 'J']
    assert first_lines('line\n' * 20, 80) == ['line'] * SAMPLE_LINES + ['…']
