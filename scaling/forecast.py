"""Fitted curves of a ladder with intervals, the prediction of its top rung, and the forecast.

Intervals are percentiles over fits to the drawn mean losses. These draws are the noise of seeds. A
curve may miss the means by more than that, since it is only a model. Then the noise is drawn larger
by the same factor, here but not for the gains at the rungs, which need no model. This helps against
a curve that is wrong within the rungs, not against one that is wrong only beyond them.
"""

from typing import NamedTuple

import numpy as np

from scaling.fits import MIN_EXPONENT, Curves, fit_curves, fit_lines
from scaling.noise import rung_costs
from scaling.resampling import LossDraws, cost_table
from scaling.results import CONFIDENCE, CurveFit, Estimate, Forecast, Ladder, TopPrediction

MIN_RUNGS = 4  # of a variant whose losses are fitted: a curve has three parameters
FACTORS = (2.0, 3.0, 5.0, 10.0)  # of the forecast's costs, times the cost of the top rung
MISFIT_DRAWS = 400  # from which the residuals that noise explains are estimated
UNKNOWN_GAIN = 1e3  # an interval from below the inverse of it to above it says nothing


class LadderFit(NamedTuple):
    """The curves of a ladder's variants, at the measured mean losses and at the drawn ones.

    The curves of variants with fewer than MIN_RUNGS rungs are nan.
    """

    ladder: Ladder
    residuals: np.ndarray  # measured mean minus curve, [variants, rungs]
    measured: Curves  # [variants]
    drawn: Curves  # [draws, variants]
    misfit: float | None  # None without draws
    shared: bool  # one E for all variants

    @property
    def variants(self) -> dict[str, int]:
        """The names of the variants with a curve, and their positions in the arrays."""
        names = enumerate(self.ladder.costs)
        return {name: v for v, name in names if np.isfinite(self.measured.exponent[v])}


def fit_ladder(ladder: Ladder, losses: LossDraws, shared: bool = True) -> LadderFit | None:
    """The curves of all variants; None if the ladder has fewer than four rungs."""
    costs = _fitted_costs(ladder)
    if np.isnan(costs).all():
        return None
    measured = fit_curves(costs, losses.measured, shared)
    misfit = _misfit(costs, losses, shared)
    drawn = fit_curves(costs, _widened(losses, misfit), shared)
    residuals = losses.measured - measured.loss(costs)
    return LadderFit(ladder, residuals, measured, drawn, misfit, shared)


def curve_fit(fit: LadderFit) -> CurveFit:
    """The parameters of the curves with intervals, and the residuals."""

    def estimates(parameter: str) -> dict[str, Estimate]:
        measured, drawn = (getattr(curves, parameter) for curves in (fit.measured, fit.drawn))
        return {name: _estimate(measured[v], drawn[:, v]) for name, v in fit.variants.items()}

    return CurveFit(
        irreducible=estimates('irreducible'),
        scale=estimates('scale'),
        exponent=estimates('exponent'),
        residuals={
            name: [None if np.isnan(each) else float(each) for each in fit.residuals[v]]
            for name, v in fit.variants.items()
        },
        shared=fit.shared,
        misfit=fit.misfit,
    )


def flat_variants(fit: CurveFit) -> list[str]:
    """The variants whose losses do not fall with compute: their exponent is at its lower bound."""
    return [name for name, each in fit.exponent.items() if each.value <= 2 * MIN_EXPONENT]


def says_something(beyond: Forecast, fit: CurveFit) -> bool:
    """Whether all losses fall, and the noise leaves no gain (with a shared E) unknown."""
    estimates = [each for gains in beyond.gains.values() for each in gains]
    unknown = (each.low < 1 / UNKNOWN_GAIN and each.high > UNKNOWN_GAIN for each in estimates)
    return not flat_variants(fit) and not any(unknown)


def forecast(shared: LadderFit, own: LadderFit) -> Forecast:
    """Losses and gains of the curves beyond the variants' top rung; of own E the gains alone.

    A loss is that of the curve, which is the mean over many seeds.
    """
    ladder = shared.ladder
    costs = rung_costs(ladder)[top_rung(ladder)] * np.array(FACTORS)
    losses, of_draws = (curves.loss(costs) for curves in (shared.measured, shared.drawn))
    return Forecast(
        costs=costs.tolist(),
        losses={name: _estimates(losses[v], of_draws[:, v]) for name, v in shared.variants.items()},
        gains=_gain_estimates(shared, costs),
        own_gains=_gain_estimates(own, costs),
    )


def top_predictions(ladder: Ladder, losses: LossDraws) -> dict[str, TopPrediction]:
    """The mean loss at the variants' top rung, predicted from the rungs below by a shared E.

    The interval is that of a measurement. It has the noise of the curve, drawn at the rungs below,
    and the noise of the measured mean, drawn at the top rung. Empty with fewer than four rungs.
    """
    top = top_rung(ladder)
    costs = _fitted_costs(ladder)[:, : top + 1]
    has_top = np.isfinite(costs[:, top]) & (np.isfinite(costs).sum(axis=1) >= MIN_RUNGS)
    below, at_top = np.where(has_top[:, None], costs[:, :top], np.nan), costs[:, top:]
    losses_below = LossDraws(losses.measured[:, :top], losses.drawn[..., :top])
    drawn = _widened(losses, _misfit(below, losses_below))
    predicted, of_draws = (
        fit_curves(below, each[..., :top]).loss(at_top)[..., 0] for each in (losses.measured, drawn)
    )
    of_draws = of_draws + drawn[..., top] - losses.measured[:, top]
    line = fit_lines(below, losses.measured[:, :top]).loss(at_top)[:, 0]
    return {
        name: TopPrediction(
            rung=top,
            predicted=_estimate(predicted[v], of_draws[:, v]),
            measured=float(losses.measured[v, top]),
            log_linear=float(line[v]),
        )
        for v, name in enumerate(ladder.costs)
        if has_top[v]
    }


def predict_from_residuals(
    costs: np.ndarray,
    losses: np.ndarray,
    cost: float,
    generator: np.random.Generator,
    irreducible: float | None = None,
    draws: int = 4000,
) -> list[Estimate]:
    """A loss at another cost, by variant, where the only noise known is that of the residuals.

    For losses without seeds: a bootstrap of normal residuals, whose variance has its own
    uncertainty (scaled inverse χ²). Of a straight line, this is Student's prediction interval.

    costs and losses [variants, points]; irreducible: a fixed E, instead of one that all share.
    """
    curves = fit_curves(costs, losses, irreducible=irreducible)
    parameters = 2 * len(costs) + (irreducible is None)
    freedom = np.isfinite(losses).sum() - parameters
    if freedom < 1:
        raise ValueError(f'{parameters} parameters need more points than {np.size(losses)}')
    squares = np.nansum((losses - curves.loss(costs)) ** 2)
    deviation = np.sqrt(squares / generator.chisquare(freedom, draws))[:, None, None]
    drawn = losses + deviation * generator.standard_normal((draws, *np.shape(losses)))
    at = np.full((len(costs), 1), cost)
    of_draws = fit_curves(costs, drawn, irreducible=irreducible).loss(at)
    of_draws = of_draws + deviation * generator.standard_normal(of_draws.shape)
    return _estimates(curves.loss(at)[:, 0], of_draws[..., 0])


def top_rung(ladder: Ladder) -> int:
    """The highest rung with runs of a variant other than the baseline, if there is any."""
    costs = cost_table(ladder)
    others = [v for v, name in enumerate(ladder.costs) if name != ladder.baseline]
    ran = np.isfinite(costs[others or slice(None)]).any(axis=0)
    return int(np.flatnonzero(ran)[-1])


def _fitted_costs(ladder: Ladder) -> np.ndarray:
    """Costs [variants, rungs], nan for variants with too few rungs.

    All are nan if the baseline, or every other variant, has too few.
    """
    costs, names = cost_table(ladder), [*ladder.costs]
    enough = np.isfinite(costs).sum(axis=1) >= MIN_RUNGS
    others = [enough[v] for v, name in enumerate(names) if name != ladder.baseline]
    if not enough[names.index(ladder.baseline)] or (others and not any(others)):
        enough[:] = False
    return np.where(enough[:, None], costs, np.nan)


def _misfit(costs: np.ndarray, losses: LossDraws, shared: bool = True) -> float | None:
    """The root mean square residual, relative to that which the noise of seeds explains.

    A fit takes up a part of the noise. What is left of it is the change of the residuals from the
    measured losses to drawn ones.
    """
    drawn = losses.drawn[:MISFIT_DRAWS]
    if not len(drawn):
        return None
    measured, of_draws = (
        each - fit_curves(costs, each, shared).loss(costs) for each in (losses.measured, drawn)
    )
    explained = np.nansum((of_draws - measured) ** 2) / len(drawn)
    rounding = 1e-20 * np.nansum(losses.measured**2)  # as many parameters as losses
    return float(np.sqrt(np.nansum(measured**2) / explained)) if explained > rounding else 0.0


def _widened(losses: LossDraws, misfit: float | None) -> np.ndarray:
    """The drawn losses, with noise that is as large as the residuals of the fit."""
    return losses.measured + max(1.0, misfit or 0.0) * (losses.drawn - losses.measured)


def _gain_estimates(fit: LadderFit, costs: np.ndarray) -> dict[str, list[Estimate]]:
    """The gains at these costs, of each variant but the baseline."""
    base = [*fit.ladder.costs].index(fit.ladder.baseline)
    return {
        name: _estimates(*(_gains(curves, v, base, costs) for curves in (fit.measured, fit.drawn)))
        for name, v in fit.variants.items()
        if v != base
    }


def _gains(curves: Curves, variant: int, baseline: int, costs: np.ndarray) -> np.ndarray:
    """The cost at which the baseline's curve reaches the variant's loss, over the variant's cost.

    The curves are at equal loss if A_b · C_b^-α_b = E_v - E_b + A_v · C_v^-α_v. If that is below 0,
    the baseline never gets there. The result has the shape [..., costs].
    """
    e, log_scale, exponent = (each[..., None] for each in vars(curves).values())
    log_power = log_scale[..., variant, :] - exponent[..., variant, :] * np.log(costs)
    reducible = e[..., variant, :] - e[..., baseline, :] + np.exp(log_power)
    with np.errstate(divide='ignore', over='ignore'):
        log_reducible = np.log(np.maximum(reducible, 0.0))
        log_cost = (log_scale[..., baseline, :] - log_reducible) / exponent[..., baseline, :]
        return np.exp(log_cost - np.log(costs))


def _estimates(values: np.ndarray, drawn: np.ndarray) -> list[Estimate]:
    """One for each value; values [points], drawn [draws, points]."""
    return [_estimate(value, of_value) for value, of_value in zip(values, drawn.T)]


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    """The percentiles of the draws, which may be infinite; nan without draws."""
    if not len(drawn):
        return Estimate(float(value), np.nan, np.nan)
    levels = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    # One of the draws: there is nothing between a number and infinity.
    low, high = np.quantile(drawn, levels, method='closest_observation')
    return Estimate(float(value), float(low), float(high))
