"""The fits of a ladder on points that others have published.

They have one run each, so that intervals come from the residuals.
"""

import numpy as np
import pytest
from scipy import stats

from scaling.fits import fit_curves, fit_lines
from scaling.forecast import predict_from_residuals

# Optima of IsoFLOP curves of a mixture of experts; Paloma macro loss, nats per token.
# github.com/marin-community/marin, experiments/grug/moe/README.md, version 16
MARIN_FLOPS = np.array([[1e18, 3e18, 1e19, 3e19, 1e20, 3e20]])
MARIN_LOSSES = np.array([[3.5273, 3.3398, 3.1494, 3.0066, 2.8509, 2.7222]])
MARIN_E, MARIN_A, MARIN_ALPHA = 1.6, 95.18, 0.0941  # their fit, with a fixed E
MARIN_LARGEST, MARIN_FORECAST, MARIN_MEASURED = 1e21, 2.606, 2.599

# Optima of IsoFLOP curves; parameters and tokens.
# github.com/karpathy/nanochat, dev/LOG.md, 2026-01-27
NANOCHAT_FLOPS = np.array([[1e18, 2e18, 5e18, 1e19]])
NANOCHAT_PARAMS = np.array([[111e6, 168e6, 251e6, 382e6]])
NANOCHAT_TOKENS = np.array([[1.24e9, 1.79e9, 2.64e9, 3.81e9]])

# Bits per byte without and with learned scales of the embedding in each layer.
# github.com/karpathy/nanochat, dev/LOG.md, 2026-01-11
X0_DEPTHS = np.array([8.0, 12.0, 16.0, 20.0])
X0_WITHOUT = np.array([1.0885, 0.9770, 0.9059, 0.8565])
X0_WITH = np.array([1.0782, 0.9693, 0.9002, 0.8526])


def test_fit_of_marin():
    curves = fit_curves(MARIN_FLOPS, MARIN_LOSSES, irreducible=MARIN_E)
    assert curves.scale[0] == pytest.approx(MARIN_A, rel=0.02)
    assert curves.exponent[0] == pytest.approx(MARIN_ALPHA, rel=0.02)


def test_forecast_of_marin():
    """Three times beyond the largest of six points."""
    (forecast,) = predict_from_residuals(
        MARIN_FLOPS, MARIN_LOSSES, MARIN_LARGEST, np.random.default_rng(0), irreducible=MARIN_E
    )
    assert forecast.value == pytest.approx(MARIN_FORECAST, abs=0.0005)
    assert forecast.low < MARIN_MEASURED < forecast.high
    assert forecast.low == pytest.approx(2.592, abs=0.003)
    assert forecast.high == pytest.approx(2.618, abs=0.005)


def test_irreducible_loss_of_marin_is_poorly_known():
    """With a free E the forecast is wider, and contains the measured loss, too."""
    fixed, free = (
        predict_from_residuals(
            MARIN_FLOPS, MARIN_LOSSES, MARIN_LARGEST, np.random.default_rng(0), irreducible=e
        )[0]
        for e in (MARIN_E, None)
    )
    assert free.low < MARIN_MEASURED < free.high
    assert free.high - free.low > 1.3 * (fixed.high - fixed.low)
    errors = []
    for e in (0.75, 1.6, 1.8, 2.5):
        curves = fit_curves(MARIN_FLOPS, MARIN_LOSSES, irreducible=e)
        errors.append(((curves.loss(MARIN_FLOPS) - MARIN_LOSSES) ** 2).sum())
    assert max(errors[:3]) < 4 * min(errors[:3]) < 0.1 * errors[3]


def test_exponents_of_nanochat():
    for values, exponent in ((NANOCHAT_PARAMS, 0.52), (NANOCHAT_TOKENS, 0.48)):
        line = fit_lines(NANOCHAT_FLOPS, values)
        assert -line.exponent[0] == pytest.approx(exponent, abs=0.01)
        expected = stats.linregress(np.log(NANOCHAT_FLOPS[0]), np.log(values[0])).slope
        assert -line.exponent[0] == pytest.approx(expected)


def test_gain_of_x0_in_nanochat_shrinks_with_depth():
    """The difference falls as a power of depth, and the fitted curves approach each other."""
    depths = X0_DEPTHS[None]
    differences = (X0_WITHOUT - X0_WITH)[None]
    line = stats.linregress(np.log(X0_DEPTHS), np.log(differences[0]))
    exponent = fit_lines(depths, differences).exponent[0]
    assert exponent == pytest.approx(-line.slope)
    assert exponent - stats.t.ppf(0.975, 2) * line.stderr > 0
    # The factor in depth that reaches the same loss without them.
    curves = fit_curves(np.tile(X0_DEPTHS, (2, 1)), np.stack([X0_WITHOUT, X0_WITH]))
    log_gains = (
        curves.log_scale[0] - curves.log_scale[1] + curves.exponent[1] * np.log(X0_DEPTHS)
    ) / curves.exponent[0] - np.log(X0_DEPTHS)
    assert (np.diff(log_gains) < 0).all()
    assert (log_gains > 0).all()


def test_interval_from_residuals_is_students_prediction_interval():
    """A curve with a small fall is nearly a straight line, of which the interval is known."""
    costs = np.geomspace(1e15, 1e18, 7)
    losses = 3 * costs**-0.01 + 1e-4 * np.random.default_rng(1).standard_normal(7)
    (forecast,) = predict_from_residuals(
        costs[None], losses[None], 1e19, np.random.default_rng(3), irreducible=0.0, draws=8000
    )
    x, y = np.log(costs), np.log(losses)
    slope, intercept = np.polyfit(x, y, 1)
    error = np.sqrt(((y - intercept - slope * x) ** 2).sum() / 5)
    distance = (np.log(1e19) - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    half = stats.t.ppf(0.975, 5) * error * np.sqrt(1 + 1 / 7 + distance)
    middle = intercept + slope * np.log(1e19)
    assert forecast.value == pytest.approx(np.exp(middle), rel=1e-5)
    assert forecast.high - forecast.low == pytest.approx(2 * half * np.exp(middle), rel=0.05)
