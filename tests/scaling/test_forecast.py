"""scaling/forecast.py equals the delta method, and its forecasts are those of the true curves."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from scaling import fits, forecast
from scaling.resampling import LossDraws
from scaling.results import Ladder

BASELINE, VARIANT = 'ffn_type=standard', 'ffn_type=swiglu'
TRUE = fits.Curves(np.array([1.5, 1.5]), np.log([90.0, 86.0]), np.array([0.15, 0.152]))
NOISE = 1e-4  # small, so that fits are nearly linear in it
DRAWS = 1500

pytestmark = pytest.mark.filterwarnings('error')


def costs_of(rungs, extra=1):
    """[variants, rungs]: the baseline has extra rungs; the variant costs 3 % more."""
    costs = np.array([[1.0], [1.03]]) * 1e12 * 4.0 ** np.arange(rungs + extra)
    costs[1, rungs:] = np.nan
    return costs


def ladder_of(costs, losses):
    """A ladder with one seed in each cell."""
    losses = np.where(np.isnan(costs), np.nan, losses)
    names = (BASELINE, VARIANT)
    return Ladder(
        baseline=BASELINE,
        costs={n: [None if np.isnan(c) else c for c in row] for n, row in zip(names, costs)},
        losses={n: [{} if np.isnan(x) else {1: x} for x in row] for n, row in zip(names, losses)},
    )


def noisy(losses, noise=NOISE, draws=DRAWS, seed=1):
    """Draws with independent noise."""
    normal = np.random.default_rng(seed).standard_normal((draws, *losses.shape))
    return LossDraws(losses, losses + noise * normal)


def exact(rungs=5, extra=1, noise=NOISE, **others):
    costs = costs_of(rungs, extra)
    losses = TRUE.loss(costs)
    return ladder_of(costs, losses), noisy(losses, noise, **others)


def derivatives(function, point):
    """Of function(parameters) [results], by central differences: [results, parameters]."""
    columns = []
    for i, value in enumerate(point):
        step = 1e-5 * max(1.0, abs(value)) * np.eye(len(point))[i]
        columns.append(
            (function(point + step) - function(point - step)) / 2e-5 / max(1, abs(value))
        )
    return np.stack(columns, axis=-1)


def delta_errors(costs, results, noise=NOISE):
    """Standard errors of results(curves) [results] of a least-squares fit with a shared E.

    From the covariance of its parameters, noise² · (JᵀJ)⁻¹.
    """

    def curves(p):
        return fits.Curves(p[[0, 0]], p[1:3], p[3:5])

    point = np.array([1.5, *TRUE.log_scale, *TRUE.exponent])
    used = np.isfinite(costs)
    jacobian = derivatives(lambda p: curves(p).loss(costs)[used], point)
    covariance = noise**2 * np.linalg.inv(jacobian.T @ jacobian)
    of_results = derivatives(lambda p: results(curves(p)), point)
    return np.sqrt(np.diag(of_results @ covariance @ of_results.T))


def forecast_of(ladder, losses):
    return forecast.forecast(*(forecast.fit_ladder(ladder, losses, s) for s in (True, False)))


def half_widths(estimates):
    return [(each.high - each.low) / 2 for each in estimates]


def true_log_gain(cost, curves=TRUE):
    """From the baseline's curve by root finding."""
    target = curves.loss(np.full((2, 1), cost))[1, 0]

    def excess(log_cost):
        return curves.loss(np.full((2, 1), math.exp(log_cost)))[0, 0] - target

    return brentq(excess, math.log(cost) - 20, math.log(cost) + 20, xtol=1e-13) - math.log(cost)


def test_intervals_of_parameters_equal_the_delta_method():
    ladder, losses = exact()
    fit = forecast.curve_fit(forecast.fit_ladder(ladder, losses))
    errors = delta_errors(
        costs_of(5), lambda c: np.array([c.irreducible[0], *c.scale, *c.exponent])
    )
    estimates = [fit.irreducible[BASELINE], *fit.scale.values(), *fit.exponent.values()]
    values = [1.5, *TRUE.scale, *TRUE.exponent]
    np.testing.assert_allclose([each.value for each in estimates], values, rtol=1e-5)
    np.testing.assert_allclose(half_widths(estimates), 1.96 * errors, rtol=0.08)
    assert fit.irreducible[BASELINE] == fit.irreducible[VARIANT]
    assert fit.shared


def test_forecast_equals_true_curves_and_the_delta_method():
    ladder, losses = exact()
    result = forecast_of(ladder, losses)
    top = 1e12 * 4.0**4 * math.sqrt(1.03)  # of both variants; not of the baseline's extra rung
    np.testing.assert_allclose(result.costs, [2 * top, 3 * top, 5 * top, 10 * top])
    costs = np.array(result.costs)

    def gains(curves):
        return np.exp([true_log_gain(cost, curves) for cost in costs])

    for v, name in enumerate((BASELINE, VARIANT)):
        estimates = result.losses[name]
        values = TRUE.loss(costs)[v]
        np.testing.assert_allclose([each.value for each in estimates], values, rtol=1e-6)
        errors = delta_errors(costs_of(5), lambda c, v=v: c.loss(costs)[v])
        np.testing.assert_allclose(half_widths(estimates), 1.96 * errors, rtol=0.08)
    assert [*result.gains] == [VARIANT]
    estimates = result.gains[VARIANT]
    np.testing.assert_allclose([each.value for each in estimates], gains(TRUE), rtol=1e-5)
    errors = delta_errors(costs_of(5), gains)
    np.testing.assert_allclose(half_widths(estimates), 1.96 * errors, rtol=0.08)


def test_gains_of_own_irreducible_losses():
    """Equal to roots of the true curves, and without end where the baseline never gets there."""
    costs = costs_of(5)
    for e, is_reached in ((1.51, True), (1.0, False)):
        true = fits.Curves(np.array([1.5, e]), TRUE.log_scale, TRUE.exponent)
        measured = true.loss(costs)
        ladder, losses = ladder_of(costs, measured), noisy(measured, 1e-6, draws=50)
        result = forecast_of(ladder, losses)
        for cost, estimate in zip(result.costs, result.own_gains[VARIANT]):
            if is_reached:
                gain = math.exp(true_log_gain(cost, true))
                assert estimate.value == pytest.approx(gain, rel=1e-4)
                assert estimate.low < gain < estimate.high
            elif true.loss(np.full((2, 1), cost))[1, 0] < 1.49:
                assert [*estimate] == [math.inf] * 3
        assert math.isinf(result.own_gains[VARIANT][-1].value) != is_reached


def test_top_rung_is_predicted_from_the_rungs_below():
    ladder, losses = exact()
    measured = losses.measured.copy()
    measured[:, 4] += [0.01, 0.0]  # what is measured there has no influence
    moved = LossDraws(measured, losses.drawn + measured - losses.measured)
    result = forecast.top_predictions(ladder, moved)
    below, top = costs_of(5)[:, :4], costs_of(5)[:, 4:5]
    errors = delta_errors(below, lambda c: c.loss(top)[:, 0])
    for v, name in enumerate((BASELINE, VARIANT)):
        prediction = result[name]
        assert prediction.rung == 4
        assert prediction.measured == measured[v, 4]
        assert prediction.predicted.value == pytest.approx(TRUE.loss(top)[v, 0], rel=1e-6)
        # The measured mean has noise of its own.
        width = 1.96 * math.hypot(errors[v], NOISE)
        assert half_widths([prediction.predicted])[0] == pytest.approx(width, rel=0.08)
        line = np.polyfit(np.log(below[v]), np.log(TRUE.loss(below)[v]), 1)
        assert math.log(prediction.log_linear) == pytest.approx(np.polyval(line, np.log(top[v]))[0])
        # A straight line in logarithms ignores E: it predicts too low a loss.
        assert prediction.log_linear < prediction.predicted.value
    assert [result[name].hit for name in (BASELINE, VARIANT)] == [False, True]


def test_fewer_than_four_rungs_have_neither_fit_nor_forecast():
    for rungs, extra in ((3, 0), (3, 1)):
        ladder, losses = exact(rungs, extra, draws=10)
        assert forecast.fit_ladder(ladder, losses) is None
        assert forecast.top_predictions(ladder, losses) == {}
    ladder, losses = exact(4, 0, draws=10)
    assert forecast.fit_ladder(ladder, losses) is not None
    assert [*forecast.top_predictions(ladder, losses)] == [BASELINE, VARIANT]


def test_variant_with_too_few_rungs_is_left_out():
    """A third variant has failed at two of five rungs; the others have the fits without it."""
    ladder, losses = exact(draws=10)
    lost = 'ffn_type=none'
    third = Ladder(
        BASELINE,
        ladder.costs | {lost: [1e12, None, 1.6e13, None, 2.56e14, None]},
        ladder.losses | {lost: [{1: 3.0}, {}, {1: 2.5}, {}, {1: 2.2}, {}]},
    )
    row = np.array([[3.0, np.nan, 2.5, np.nan, 2.2, np.nan]])
    wider = LossDraws(
        np.concatenate([losses.measured, row]),
        np.concatenate([losses.drawn, np.broadcast_to(row, (10, 1, 6))], axis=1),
    )
    for shared in (True, False):
        with_third, without = (
            forecast.curve_fit(forecast.fit_ladder(*each, shared))
            for each in ((third, wider), (ladder, losses))
        )
        assert with_third._replace(misfit=0) == without._replace(misfit=0)
        assert with_third.misfit == pytest.approx(without.misfit)
    assert forecast.top_predictions(third, wider) == forecast.top_predictions(ladder, losses)
    assert [*forecast_of(third, wider).losses] == [BASELINE, VARIANT]


def test_variant_that_lacks_the_top_rung_has_a_fit_but_no_prediction():
    costs = costs_of(5)
    costs[0, 4:] = np.nan  # of the baseline
    ladder, losses = ladder_of(costs, TRUE.loss(costs)), noisy(TRUE.loss(costs), draws=10)
    fit = forecast.curve_fit(forecast.fit_ladder(ladder, losses))
    assert fit.residuals[BASELINE][4] is None
    assert fit.exponent[BASELINE].value == pytest.approx(0.15, rel=1e-5)
    assert [*forecast.top_predictions(ladder, losses)] == [VARIANT]


def test_residuals_are_measured_minus_fitted():
    costs = costs_of(5)
    measured = TRUE.loss(costs) + 0.01 * np.random.default_rng(2).standard_normal(costs.shape)
    ladder, losses = ladder_of(costs, measured), noisy(measured, 0.01, draws=10)
    for shared in (True, False):
        fit = forecast.curve_fit(forecast.fit_ladder(ladder, losses, shared))
        for v, name in enumerate((BASELINE, VARIANT)):
            for rung, residual in enumerate(fit.residuals[name]):
                if np.isnan(costs[v, rung]):
                    assert residual is None
                    continue
                fitted = fit.irreducible[name].value + fit.scale[name].value * costs[v, rung] ** (
                    -fit.exponent[name].value
                )
                assert residual == pytest.approx(measured[v, rung] - fitted, abs=1e-9)


def test_residuals_beyond_the_noise_widen_the_intervals():
    costs = costs_of(6)
    ladder, losses = ladder_of(costs, TRUE.loss(costs)), noisy(TRUE.loss(costs))
    bend = NOISE * 5 * np.sin(2 * np.arange(7))
    bent = LossDraws(losses.measured + bend, losses.drawn + bend)
    straight_fit, bent_fit = (forecast.fit_ladder(ladder, each) for each in (losses, bent))
    assert straight_fit.misfit < 0.01
    # 13 losses, 5 parameters: the noise explains a sum of squares of 8 · noise².
    squares = np.nansum(bent_fit.residuals**2)
    assert bent_fit.misfit == pytest.approx(math.sqrt(squares / 8) / NOISE, rel=0.05)
    assert bent_fit.misfit > 2
    pairs = [[forecast.curve_fit(fit).exponent[VARIANT] for fit in (straight_fit, bent_fit)]]
    pairs += [[forecast_of(ladder, each).gains[VARIANT][-1] for each in (losses, bent)]]
    for straight_width, bent_width in map(half_widths, pairs):
        assert bent_width / straight_width == pytest.approx(bent_fit.misfit, rel=0.1)


def test_without_draws_there_are_no_intervals():
    ladder, losses = exact()
    bare = LossDraws(losses.measured, np.empty((0, 2, 6)))
    fit = forecast.fit_ladder(ladder, bare)
    assert fit.misfit is None
    estimates = [
        forecast.curve_fit(fit).exponent[VARIANT],
        forecast_of(ladder, bare).gains[VARIANT][0],
        forecast.top_predictions(ladder, bare)[VARIANT].predicted,
    ]
    with_draws = forecast.fit_ladder(ladder, losses)
    assert estimates[0].value == forecast.curve_fit(with_draws).exponent[VARIANT].value
    assert all(math.isfinite(each.value) for each in estimates)
    assert all(math.isnan(end) for each in estimates for end in (each.low, each.high))


@pytest.mark.parametrize(
    ('change', 'noise', 'flat'),
    [(0.0, 0.01, [BASELINE, VARIANT]), (0.1, 0.01, [BASELINE, VARIANT]), (-0.02, 0.1, [])],
    ids=['flat', 'rising', 'noise'],
)
def test_losses_that_do_not_fall_have_a_finite_forecast_that_says_nothing(change, noise, flat):
    costs = costs_of(4)
    measured = np.where(np.isnan(costs), np.nan, 2.0 + change * np.arange(5))
    ladder, losses = ladder_of(costs, measured), noisy(measured, noise, draws=50)
    with np.errstate(all='raise', under='ignore'):
        result = forecast_of(ladder, losses)
    assert all(math.isfinite(value) for each in result.losses[VARIANT] for value in each)
    # The gain may be any number, or none at all.
    for estimate in (*result.gains[VARIANT], *result.own_gains[VARIANT]):
        assert 0 <= estimate.low <= estimate.value <= estimate.high
    fit = forecast.curve_fit(forecast.fit_ladder(ladder, losses))
    assert forecast.flat_variants(fit) == flat
    assert not forecast.says_something(result, fit)
    # With less noise, falling losses have a forecast that says something.
    less = forecast_of(ladder, noisy(measured, 1e-4, draws=50))
    assert forecast.says_something(less, fit) == (not flat)
