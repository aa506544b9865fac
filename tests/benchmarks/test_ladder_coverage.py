"""benchmarks/ladder_coverage.py at small size: intervals of gains hold what they promise."""

import pytest

from benchmarks import ladder_coverage
from benchmarks.ladder_coverage import Case


@pytest.mark.parametrize('case', [Case(''), Case('', gain='none', share=0.8)])
def test_intervals_of_gains_contain_the_truth_and_are_not_wide(case):
    """The percentile bootstrap of three seeds would cover about 75 %."""
    shares = ladder_coverage.row(case, trials=25, draws=200, base=1)
    assert shares['gain'] >= 90
    assert shares['trend'] >= 85
    assert 0.95 < shares['width'] < 1.5


def test_a_planted_crossing_is_found():
    shares = ladder_coverage.row(Case('', seeds=5, crossing=1.5), trials=5, draws=100, base=0)
    assert shares['reversals'] == 100
