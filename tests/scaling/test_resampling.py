"""scaling/resampling.py: draws of mean losses have the distributions that scipy gives."""

import numpy as np
import pytest
from scipy import stats

from scaling.resampling import draw_losses
from scaling.results import Ladder

LEVELS = (0.025, 0.25, 0.75, 0.975)


def draws(losses, costs=(1e15,), count=20000):
    """losses: variant -> by rung: losses by seed. Draws [draws, variants, rungs]."""
    ladder = Ladder(next(iter(losses)), {name: [*costs] for name in losses}, losses)
    return draw_losses(ladder, count, np.random.default_rng(0))


def test_mean_of_one_variant_has_students_distribution():
    values = [2.51, 2.53, 2.5, 2.55]
    result = draws({'a': [dict(enumerate(values))]})
    t = stats.t(3, np.mean(values), stats.sem(values))
    assert result.measured[0, 0] == pytest.approx(np.mean(values))
    for level in LEVELS:
        drawn = np.quantile(result.drawn[:, 0, 0], level)
        assert (drawn - t.mean()) / t.std() == pytest.approx(
            (t.ppf(level) - t.mean()) / t.std(), rel=0.05
        )


def test_difference_without_shared_seeds_is_that_of_the_pooled_t_test():
    a, b = [2.51, 2.53, 2.5, 2.55], [2.61, 2.6, 2.66]
    result = draws({'a': [dict(enumerate(a))], 'b': [dict(enumerate(b, 10))]})
    difference = result.drawn[:, 0, 0] - result.drawn[:, 1, 0]
    low, high = stats.ttest_ind(a, b).confidence_interval()
    assert np.quantile(difference, 0.025) == pytest.approx(low, rel=0.03)
    assert np.quantile(difference, 0.975) == pytest.approx(high, rel=0.06)


def test_effect_of_seeds_cancels_in_differences_at_a_rung_and_not_between_rungs():
    draw = np.random.default_rng(1)
    rungs, seeds = 4, 5
    luck = 0.02 * draw.standard_normal((1, rungs, seeds))
    table = 2.5 + luck + 0.001 * draw.standard_normal((2, rungs, seeds))
    losses = {n: [dict(enumerate(row)) for row in each.tolist()] for n, each in zip('ab', table)}
    drawn = draws(losses, [1e15, 3e15, 9e15, 2.7e16], 4000).drawn
    assert np.std(drawn[:, 0] - drawn[:, 1], axis=0) == pytest.approx(0.0007, rel=0.7)
    assert np.corrcoef(drawn[:, 0, 1], drawn[:, 1, 1])[0, 1] > 0.98
    assert abs(np.corrcoef(drawn[:, 0, 1], drawn[:, 0, 2])[0, 1]) < 0.06


@pytest.mark.parametrize('value', [2.5, 2.6])
def test_one_seed_or_no_spread_has_no_draws(value):
    one = draws({'a': [{1: 2.5}], 'b': [{1: value}]})
    equal = draws({'a': [{1: 2.5, 2: 2.5}], 'b': [{1: value, 2: value}]})
    assert len(one.drawn) == len(equal.drawn) == 0


def test_absent_runs_stay_absent():
    result = draws({'a': [{1: 2.5, 2: 2.6}, {}], 'b': [{}, {1: 2.4}]}, [1e15, 2e15], 50)
    assert np.isnan(result.measured).tolist() == [[False, True], [True, False]]
    assert np.isnan(result.drawn).tolist() == [[[False, True], [True, False]]] * 50
