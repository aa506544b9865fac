"""scaling/gain.py: the compute gain, by plain Python and for given curves."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.fits import Curves
from scaling.gain import ABOVE, BELOW, WITHIN, BaselineCurve, gains, log_gains, percentile
from scaling.results import Bound, Ladder

COSTS = [1e15, 3e15, 9e15, 2.7e16]


def ladder(baseline, variant, costs=COSTS):
    """Losses of a single seed; the baseline may have more rungs."""
    losses = {'base': baseline, 'new': variant}
    return Ladder(
        'base',
        {name: list(costs[: len(each)]) for name, each in losses.items()},
        {name: [{1: x} if x else {} for x in each] for name, each in losses.items()},
    )


def table(*rows):
    width = max(map(len, rows))
    return np.array([[*row, *[math.nan] * (width - len(row))] for row in rows], float)


def measured_gains(baseline, variant):
    each = ladder(baseline, variant)
    losses = table(*([x or math.nan for x in row] for row in (baseline, variant)))
    point = log_gains(each, losses, None)
    drawn = log_gains(each, losses[None], None)
    return gains(each, point, drawn)['new']


def cheapest(losses, target):
    """The cost at which a line in ln cost reaches the target, in plain Python."""
    if losses[0] <= target:
        return COSTS[0], '<'
    for k in range(len(losses) - 1):
        if losses[k] > target >= losses[k + 1]:
            share = (losses[k] - target) / (losses[k] - losses[k + 1])
            return COSTS[k] * (COSTS[k + 1] / COSTS[k]) ** share, ''
    return COSTS[len(losses) - 1], '>'


LOSS = st.integers(20, 40).map(lambda x: x / 10)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(LOSS, min_size=4, max_size=4), st.lists(LOSS, min_size=3, max_size=3))
def test_gain_without_a_curve_equals_plain_python(baseline, variant):
    """Also where the baseline's loss rises with cost, or equals the variant's."""
    for gain, target in zip(measured_gains(baseline, variant), variant):
        cost, relation = cheapest(baseline, target)
        assert gain.value.relation == relation
        assert gain.value.value == pytest.approx(cost / COSTS[gain.rung])
        # The only draw is the measured loss.
        assert gain.low == gain.high == gain.value


def test_rungs_without_runs_have_no_gain():
    result = measured_gains([3.0, 2.8, None, 2.4], [2.9, None, 2.6])
    assert [gain.rung for gain in result] == [0, 2]
    # 2.6 lies in the middle between the second and the fourth rung.
    assert result[1].value.value == pytest.approx(math.sqrt(3e15 * 2.7e16) / 9e15)


def test_baseline_with_falling_costs_is_sorted():
    each = ladder([2.6, 3.0], [2.8], costs=[4e15, 1e15])
    point = log_gains(each, table([2.6, 3.0], [2.8]), None)['new']
    assert math.exp(point.values[0]) == pytest.approx(2e15 / 4e15)


@pytest.mark.parametrize('gain', [0.3, 0.8, 1.0, 1.9, 20.0])
def test_gain_of_curves_is_exact_also_outside_the_rungs(gain):
    """Every loss is on E + A · C^-α, and f is this curve: interpolation has no error."""
    fit = Curves(np.array(1.4), np.log(300.0), np.array(0.15))
    costs = np.array(COSTS)
    curve = BaselineCurve(costs, np.tile(fit.loss(costs), (4, 1)), fit)
    log_cost, place = curve.log_cost(fit.loss(gain * costs))
    assert np.exp(log_cost) == pytest.approx(gain * costs)
    for reached, each in zip(gain * costs, place):
        # At an end itself, rounding decides.
        assert each != WITHIN or 0.999 * COSTS[0] < reached < 1.001 * COSTS[-1]
        assert each != BELOW or reached < 1.001 * COSTS[0]
        assert each != ABOVE or reached > 0.999 * COSTS[-1]


def test_curve_with_noisy_means_is_the_first_root_on_a_fine_grid():
    draw = np.random.default_rng(3)
    fit = Curves(np.array(1.4), np.log(300.0), np.array(0.15))
    costs = np.array(COSTS)
    losses = fit.loss(costs) + 0.06 * draw.standard_normal((50, 4))
    targets = losses.min(1) + 0.6 * (losses[:, 0] - losses.min(1)) + 1e-9
    log_cost, place = BaselineCurve(costs, losses, fit).log_cost(targets)
    grid = np.linspace(math.log(COSTS[0]), math.log(COSTS[-1]), 30001)
    assert (place == WITHIN).sum() > 20
    for row in np.flatnonzero(place == WITHIN):
        residuals = np.interp(grid, np.log(costs), losses[row] - fit.loss(costs))
        first = grid[np.argmax(fit.loss(np.exp(grid)) + residuals <= targets[row])]
        assert log_cost[row] == pytest.approx(first, abs=2e-4)


def test_ends_outside_the_rungs_are_bounds():
    """Of 100 draws, 40 are below the rungs and 10 above: both ends of the interval are bounds."""
    each = ladder([3.0, 2.5], [2.7])
    drawn = np.tile(table([3.0, 2.5], [2.7, math.nan]), (100, 1, 1))
    drawn[:40, 1, 0], drawn[40:50, 1, 0] = 3.1, 2.4
    point = log_gains(each, drawn[-1], None)
    (gain,) = gains(each, point, log_gains(each, drawn, None))['new']
    assert gain.low == Bound(pytest.approx(1.0), '<')
    assert gain.high == Bound(pytest.approx(3.0), '>')
    assert gain.value.value == pytest.approx(3.0**0.6)


def test_percentiles_of_unknown_values_are_wide():
    values = np.array([*range(90), *[math.nan] * 10], float)
    assert percentile(values, 0.025) == -math.inf
    assert percentile(values, 0.975) == math.inf
    assert percentile(np.arange(1001.0), 0.975) == 975
