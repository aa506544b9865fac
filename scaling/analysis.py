"""The analysis of a ladder: compute gain, trend, reversals, fits and forecast with intervals."""

import math

import numpy as np

from scaling.fits import Curves, fit_curves
from scaling.forecast import (
    MIN_RUNGS,
    curve_fit,
    fit_ladder,
    forecast,
    says_something,
    top_predictions,
)
from scaling.gain import gains, log_gains
from scaling.noise import noise_model
from scaling.resampling import LossDraws, cost_table, draw_losses
from scaling.results import CurveFit, Estimate, Gain, Ladder, LadderAnalysis, Trend
from scaling.trend import reversals, trend

DRAWS = 4000


# Drawn curves may have any shape: what overflows in them is infinite, and counts as such.
@np.errstate(all='ignore')
def analyze(ladder: Ladder, draws: int = DRAWS, seed: int = 0) -> LadderAnalysis:
    """All that the losses say about the variants across sizes.

    draws: of the parametric bootstrap, from which all intervals come. seed: of its random numbers.
    With one seed per variant there are no intervals: their ends are NaN.
    """
    losses = draw_losses(ladder, draws, np.random.default_rng(seed))
    gain, trends = gains_and_trends(ladder, losses)
    shared, own = (fit_ladder(ladder, losses, shared) for shared in (True, False))
    shared_fit = curve_fit(shared) if shared else None
    beyond = forecast(shared, own) if shared and own else None
    return LadderAnalysis(
        ladder=ladder,
        gains=gain,
        trends=_tested_trends(trends, shared_fit),
        reversals={name: reversals(each) for name, each in gain.items()},
        shared_fit=shared_fit,
        own_fit=curve_fit(own) if own else None,
        predictions=top_predictions(ladder, losses) if shared else {},
        forecast=beyond if beyond and shared_fit and says_something(beyond, shared_fit) else None,
        noise=noise_model(ladder),
        draws=len(losses.drawn),
    )


@np.errstate(all='ignore')
def analyze_gains(ladder: Ladder, draws: int = DRAWS, seed: int = 0) -> dict[str, list[Gain]]:
    """The gains alone, as `analyze` has them."""
    losses = draw_losses(ladder, draws, np.random.default_rng(seed))
    return gains_and_trends(ladder, losses)[0]


def gains_and_trends(
    ladder: Ladder, losses: LossDraws
) -> tuple[dict[str, list[Gain]], dict[str, Trend | None]]:
    """The gains and trends of the variants but the baseline. Costs may be FLOPs or seconds."""
    fit, fits = (_baseline_fit(ladder, each) for each in (losses.measured, losses.drawn))
    measured = log_gains(ladder, losses.measured, fit)
    drawn = log_gains(ladder, losses.drawn, fits)
    costs = dict(zip(ladder.costs, cost_table(ladder)))
    return gains(ladder, measured, drawn), {
        # Without the curvature, gains are too large between the baseline's rungs and too small
        # beyond them, so that a constant gain would have a trend.
        name: trend(costs[name], costs[ladder.baseline], point, drawn[name] if fit else None)
        for name, point in measured.items()
    }


def _tested_trends(
    trends: dict[str, Trend | None], fit: CurveFit | None
) -> dict[str, Trend | None]:
    """The trends; without intervals if the curve is wrong that gains are interpolated with.

    The error of the interpolation differs between rungs, which looks like a trend.
    """
    if fit is None or not fit.is_wrong:
        return trends
    return {
        name: each and each._replace(factor=Estimate(each.factor.value, math.nan, math.nan))
        for name, each in trends.items()
    }


def _baseline_fit(ladder: Ladder, losses: np.ndarray) -> Curves | None:
    """The baseline's curve at mean losses [..., variants, rungs], with an E that all share.

    None with too few rungs of the baseline, which then has no curvature.
    """
    costs, base = cost_table(ladder), [*ladder.costs].index(ladder.baseline)
    if len(np.unique(costs[base][np.isfinite(costs[base])])) < MIN_RUNGS:
        return None
    fit = fit_curves(costs, losses)
    return Curves(fit.irreducible[..., base], fit.log_scale[..., base], fit.exponent[..., base])
