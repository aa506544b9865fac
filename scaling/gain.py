"""Compute gain: how much compute a variant saves, compared with the baseline at equal loss.

The gain of a variant at a rung is C(L) / C_v. C_v is its cost there, L its loss, and C(L) the
cheapest cost at which the baseline reaches L. Between two rungs, the baseline's loss is a curve
through both measured means:

    L(C) = f(C) + residuals of the means, linear in ln C

f is the fitted curve E + A · C^-α, which only gives the curvature. Without f the loss is linear in
ln C. A convex f keeps each segment convex, so a segment that ends below a loss reaches it once.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from scaling.fits import Curves
from scaling.resampling import cost_table
from scaling.results import CONFIDENCE, Bound, Gain, Ladder

BELOW, WITHIN, ABOVE = -1, 0, 1  # place of a cost, relative to the baseline's rungs
NEWTON_STEPS = 30  # at most; the convergence is quadratic


class LogGains(NamedTuple):
    """Logarithms of gains. NaN at rungs without runs of the variant."""

    values: np.ndarray  # [..., rungs]; extrapolated outside the baseline's rungs, ±inf if need be
    places: np.ndarray  # [..., rungs]: BELOW, WITHIN or ABOVE
    limits: np.ndarray  # [2, rungs]: log gains with the baseline's first and last rung


class BaselineCurve:
    """The baseline's loss against cost, for many draws at once."""

    def __init__(self, costs: np.ndarray, losses: np.ndarray, fit: Curves | None) -> None:
        """costs [rungs] and losses [..., rungs], NaN without runs; fit: of the baseline, [...]."""
        order = np.argsort(costs)
        order = order[np.isfinite(costs[order])]
        self.log_costs = np.log(costs[order])  # [knots]
        self.losses = losses[..., order]  # [..., knots]
        self.fit = fit
        fitted = [np.broadcast_to(self._fitted(x), losses.shape[:-1]) for x in self.log_costs]
        self.residuals = self.losses - np.stack(fitted, -1)

    def _fitted(self, log_costs: np.ndarray) -> np.ndarray | float:
        """The fitted curve at log costs [...]; zero without one."""
        if self.fit is None:
            return 0.0
        reducible = np.exp(self.fit.log_scale - self.fit.exponent * log_costs)
        return self.fit.irreducible + reducible

    def log_cost(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln of the cheapest cost that reaches the losses `targets` [...], and its place."""
        reached = self.losses <= targets[..., None]
        knot = reached.argmax(-1)
        place = np.where(reached.any(-1), np.where(knot > 0, WITHIN, BELOW), ABOVE)
        result = np.where(
            place == WITHIN,
            self._between(targets, np.maximum(knot, 1)) if len(self.log_costs) > 1 else 0.0,
            np.where(place == BELOW, self._beyond(targets, 0), self._beyond(targets, -1)),
        )
        return result, place

    def _between(self, targets: np.ndarray, knot: np.ndarray) -> np.ndarray:
        """The cost on the segment that ends at `knot`, where it starts above the target."""
        start, width = self.log_costs[knot - 1], np.diff(self.log_costs)[knot - 1]
        first, last = (
            np.take_along_axis(self.residuals, index[..., None], -1)[..., 0]
            for index in (knot - 1, knot)
        )
        if self.fit is None:
            with np.errstate(divide='ignore', invalid='ignore'):
                return start + width * np.clip((first - targets) / (first - last), 0, 1)
        # Newton's method in the fraction of the segment. From the left of a convex curve that is
        # above the target, it approaches the first root from the left, and never leaves.
        fraction = np.zeros(targets.shape)
        for _ in range(NEWTON_STEPS):
            fitted = self._fitted(start + width * fraction)
            slope = last - first - width * self.fit.exponent * (fitted - self.fit.irreducible)
            excess = fitted + first + (last - first) * fraction - targets
            with np.errstate(divide='ignore', invalid='ignore'):
                step = np.where(slope < 0, -excess / slope, 0.0)
            before, fraction = fraction, np.clip(fraction + step, 0, 1)
            if not np.abs(fraction - before).max(initial=0.0) > 1e-12:
                break
        return start + width * fraction

    def _beyond(self, targets: np.ndarray, end: int) -> np.ndarray:
        """Extrapolated by the fitted curve through the end knot, or by the line of its segment."""
        with np.errstate(divide='ignore', invalid='ignore'):
            if self.fit is not None:
                reducible = targets - self.residuals[..., end] - self.fit.irreducible
                log_reducible = np.log(np.maximum(reducible, 0.0))
                return (self.fit.log_scale - log_reducible) / self.fit.exponent
            if len(self.log_costs) < 2:
                return np.full(targets.shape, math.inf if end else -math.inf)
            pair = slice(0, 2) if end == 0 else slice(-2, None)
            slope = np.diff(self.losses[..., pair])[..., 0] / np.diff(self.log_costs[pair])[0]
            distance = (targets - self.losses[..., end]) / slope
            far = math.inf if end else -math.inf  # a curve that does not fall never gets there
            return self.log_costs[end] + np.where(slope < 0, distance, far)


def log_gains(ladder: Ladder, losses: np.ndarray, fit: Curves | None) -> dict[str, LogGains]:
    """The log gains of each variant but the baseline, at mean losses [..., variants, rungs]."""
    costs, names = cost_table(ladder), [*ladder.costs]
    base = names.index(ladder.baseline)
    if np.isnan(costs[base]).all():
        return {}
    curve = BaselineCurve(costs[base], losses[..., base, :], fit)
    ends = curve.log_costs[[0, -1], None]
    result = {}
    for v, name in enumerate(names):
        if v == base:
            continue
        own = np.log(costs[v])
        values = np.full((*losses.shape[:-2], len(own)), np.nan)
        places = np.zeros(values.shape, int)
        for r in np.flatnonzero(np.isfinite(own)):
            log_cost, places[..., r] = curve.log_cost(losses[..., v, r])
            values[..., r] = log_cost - own[r]
        result[name] = LogGains(values, places, ends - own)
    return result


def gains(
    ladder: Ladder, measured: Mapping[str, LogGains], drawn: Mapping[str, LogGains]
) -> dict[str, list[Gain]]:
    """The gains of each variant at the rungs with runs of it. Without draws, the ends are NaN."""
    costs = dict(zip(ladder.costs, cost_table(ladder)))
    return {
        name: [
            Gain(
                rung=int(rung),
                cost=float(costs[name][rung]),
                value=_bound(point.values[rung], int(point.places[rung]), point.limits[:, rung]),
                low=_end(drawn[name], rung, (1 - CONFIDENCE) / 2),
                high=_end(drawn[name], rung, (1 + CONFIDENCE) / 2),
            )
            for rung in np.flatnonzero(np.isfinite(costs[name]))
        ]
        for name, point in measured.items()
    }


def _bound(log_gain: float, place: int, limits: np.ndarray) -> Bound:
    if place == WITHIN:
        return Bound(math.exp(log_gain))
    return Bound(math.exp(limits[0]), '<') if place == BELOW else Bound(math.exp(limits[1]), '>')


def _end(drawn: LogGains, rung: int, level: float) -> Bound:
    """A percentile of the drawn gains: of their places first, then of their values."""
    places, values = drawn.places[:, rung], drawn.values[:, rung]
    if not len(values):
        return Bound(math.nan)
    ordered = np.select([places == BELOW, places == ABOVE], [-math.inf, math.inf], values)
    value = percentile(ordered, level)
    place = WITHIN if math.isfinite(value) else int(math.copysign(1, value))
    return _bound(value, place, drawn.limits[:, rung])


def percentile(values: np.ndarray, level: float) -> float:
    """A percentile of values that may be infinite. NaN counts as far out, on either side."""
    values = np.where(np.isnan(values), math.copysign(math.inf, level - 0.5), values)
    # One of the values: there is nothing between a number and infinity.
    return float(np.quantile(values, level, method='closest_observation'))
