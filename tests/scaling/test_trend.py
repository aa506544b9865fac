"""scaling/trend.py: the trend of gains, and reversals."""

import math

import numpy as np
import pytest
from scipy import stats

from scaling.gain import WITHIN, LogGains
from scaling.results import Bound, Gain
from scaling.trend import reversals, trend

COSTS = [1e15, 2e15, 8e15, 1.6e16]


def log_gains(values):
    values = np.array(values, float)
    return LogGains(values, np.full(values.shape, WITHIN), np.zeros((2, values.shape[-1])))


def test_trend_is_the_regression_of_log_gain_on_log_cost():
    measured = np.log([1.3, 1.25, 1.1, 1.0])
    draws = measured + 0.02 * np.random.default_rng(0).standard_normal((4000, 4))
    result = trend(COSTS, [*COSTS, 5e16], log_gains(measured), log_gains(draws))
    line = stats.linregress(np.log10(COSTS), measured)
    assert result.factor.value == pytest.approx(math.exp(line.slope))
    error = 0.02 / math.sqrt(np.var(np.log10(COSTS)) * 4)
    assert math.log(result.factor.low) == pytest.approx(line.slope - 1.96 * error, rel=0.05)
    assert math.log(result.factor.high) == pytest.approx(line.slope + 1.96 * error, rel=0.05)
    assert result.rungs == (0, 1, 2, 3)


def test_trend_leaves_out_gains_far_outside_the_baselines_rungs():
    # The baseline's rungs end at 1.6e16: the top rung's gain of 2 is too far, that of 1.2 is not.
    near, far = (np.log([1.0, 1.0, 1.0, top]) for top in (1.2, 2.0))
    assert trend(COSTS, COSTS, log_gains(near), log_gains(near[None])).rungs == (0, 1, 2, 3)
    assert trend(COSTS, COSTS, log_gains(far), log_gains(far[None])).rungs == (0, 1, 2)


def test_draws_that_never_reach_the_loss_open_the_interval():
    measured = np.log([1.0, 1.1, 1.2, 1.3])
    draws = np.tile(measured, (100, 1))
    draws[:10, 3] = math.inf
    result = trend(COSTS, [*COSTS, 5e16], log_gains(measured), log_gains(draws))
    assert result.factor.low == pytest.approx(result.factor.value)
    assert result.factor.high == math.inf


@pytest.mark.parametrize('values', [[0.1, math.nan, math.nan, math.nan], [math.nan] * 4])
def test_no_trend_with_fewer_than_two_gains(values):
    assert trend(COSTS, COSTS, log_gains(values), log_gains([values])) is None
    assert trend(COSTS, COSTS[:1], log_gains([0.0] * 4), log_gains([[0.0] * 4])) is None


def gain(rung, value, low, high, relation=''):
    return Gain(rung, COSTS[rung], Bound(value, relation), Bound(low), Bound(high))


def test_reversals():
    below, above = (0.8, 0.7, 0.9), (1.3, 1.2, 1.4)
    uncertain = (1.1, 0.9, 1.2)
    assert reversals([gain(0, *below), gain(1, *above)]) == [(0, True)]
    assert reversals([gain(0, *below), gain(1, *uncertain)]) == [(0, False)]
    assert reversals([gain(0, *above), gain(1, *above), gain(2, *below)]) == [(1, True)]
    assert reversals([gain(0, *above), gain(1, *uncertain)]) == []
    # A gain above 0.9 may be above 1 or not: the next rung decides.
    unknown = gain(1, 0.9, 0.9, 0.9, '>')
    assert reversals([gain(0, *below), unknown, gain(2, *above)]) == [(0, True)]
    assert reversals([gain(0, *below), gain(1, 1.0, 0.9, 1.0, '>')]) == [(0, False)]


def test_interval_with_an_open_end_is_not_significant():
    open_low = Gain(1, COSTS[1], Bound(1.2), Bound(1.1, '<'), Bound(1.4))
    open_high = Gain(1, COSTS[1], Bound(1.2), Bound(1.1), Bound(1.2, '>'))
    assert reversals([gain(0, 0.8, 0.7, 0.9), open_low]) == [(0, False)]
    assert reversals([gain(0, 0.8, 0.7, 0.9), open_high]) == [(0, True)]
