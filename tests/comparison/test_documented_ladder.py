"""The tables in docs/ladders.md are those of the example that the page describes."""

import re

import pytest
from helpers.documents import fences
from helpers.ladder_records import STANDARD, Curve, write_ladder
from helpers.project import PROJECT
from helpers.run_records import rows

from comparison.answer import compare_runs
from comparison.formats import render_text
from comparison.load import read_runs

PAGE = PROJECT / 'docs/ladders.md'
GAIN, FIRST_GAIN, EXPONENT = 1.3, 1.25, 0.079  # of the gain that shrinks with compute
FIRST_COST = 1.2e12  # of a run at the smallest rung
DRAW = 1


def shrinking() -> Curve:
    """A curve with the gain FIRST_GAIN · (C / FIRST_COST)^-EXPONENT over STANDARD."""
    exponent = STANDARD.exponent * (1 - EXPONENT)
    reducible = STANDARD.scale * (FIRST_GAIN * FIRST_COST) ** -STANDARD.exponent
    return Curve(STANDARD.irreducible, reducible * FIRST_COST**exponent, exponent)


CURVES = {
    'variant=standard': STANDARD,
    'variant=constant': STANDARD._replace(scale=STANDARD.scale / GAIN**STANDARD.exponent),
    'variant=shrinking': shrinking(),
}


@pytest.fixture(scope='module')
def output(tmp_path_factory):
    folder = write_ladder(tmp_path_factory.mktemp('ladder'), CURVES, draw=DRAW)
    return render_text(compare_runs(read_runs([folder])[0]))


def test_tables_of_the_page_are_those_of_the_example(output):
    """The same words; numbers may differ by the accuracy of the draws."""
    text = PAGE.read_text(encoding='utf-8').partition('## The answer')[2].partition('\n## ')[0]
    captures = [fence for fence in fences(PAGE, '') if fence.text in text]
    blocks = {block.split('\n')[0]: block for block in output.split('\n\n')}
    assert len(captures) == 11
    for fence in captures:
        written, current = fence.text.split(), blocks[fence.text.split('\n')[0]].split()
        assert len(written) == len(current), f'{fence}: the page should have\n{current}'
        for old, new in zip(written, current):
            numbers = [re.findall(r'\d+\.?\d*(?:e\d+)?', word) for word in (old, new)]
            assert re.sub(r'\d+', '', old) == re.sub(r'\d+', '', new), f'{fence}: {old}, now {new}'
            expected = [pytest.approx(float(number), rel=0.05, abs=0.01) for number in numbers[0]]
            assert [float(number) for number in numbers[1]] == expected, (
                f'{fence}: {old}, now {new}'
            )


def test_intervals_of_the_example_contain_the_truth(output):
    def contains(interval, truth):
        low, high = map(float, interval.split(' to '))
        return low <= truth <= high

    def gain(cost, variant):
        shrinks = variant == 'variant=shrinking'
        return FIRST_GAIN * (cost / FIRST_COST) ** -EXPONENT if shrinks else GAIN

    level, variant = '95% interval', 'architecture'
    gains = rows(output, 'COMPUTE GAIN')
    assert len(gains) == 8
    for row in gains:
        assert contains(row[level], gain(float(row['FLOPs']), row[variant]))
    first, second = rows(output, 'TREND')
    assert contains(first[level], 1) and contains(second[level], 10**-EXPONENT)
    for row in rows(output, 'TOP RUNG'):
        assert row['hit'] == 'hit'
    assert all(f'{truth}' in PAGE.read_text(encoding='utf-8') for truth in (1.25, 1.12, 0.834))
