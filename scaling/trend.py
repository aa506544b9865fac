"""The trend of the gain with compute, and where the order of two architectures reverses."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from scaling.gain import LogGains, percentile
from scaling.results import CONFIDENCE, Bound, Estimate, Gain, Reversal, Trend

# A gain is in the trend if the cost at which the baseline reaches the loss is within its rungs or
# at most this share of the distance of two rungs outside. Else the baseline's curve would have to
# be extrapolated too far. Without a margin, chance would decide at the first rung: a variant like
# the baseline would be in the trend only where it is lucky.
MARGIN = 0.5


def trend(
    costs: Sequence[float],
    baseline_costs: Sequence[float],
    measured: LogGains,
    drawn: LogGains | None,
) -> Trend | None:
    """The least-squares slope of ln gain against ln cost; None with fewer than two gains.

    costs: of the variant by rung, NaN without runs. baseline_costs: of the baseline's runs.
    drawn: None if the gains are too biased for an interval, whose ends are then NaN.
    """
    log_costs = np.log(np.asarray(costs, float))
    known = np.sort(np.log(np.asarray(baseline_costs, float)))
    known = known[np.isfinite(known)]
    if len(known) < 2:
        return None
    reached = measured.values + log_costs
    first = known[0] - MARGIN * (known[1] - known[0])
    last = known[-1] + MARGIN * (known[-1] - known[-2])
    with np.errstate(invalid='ignore'):
        rungs = np.flatnonzero((reached >= first) & (reached <= last))
    deviations = log_costs[rungs] - log_costs[rungs].mean() if len(rungs) else np.zeros(0)
    if not (deviations**2).sum() > 1e-12:  # equal costs
        return None
    weights = deviations / (deviations**2).sum()
    slope = float(weights @ measured.values[rungs])
    ends = [math.nan, math.nan]
    if drawn is not None and len(drawn.values):
        with np.errstate(invalid='ignore'):
            slopes = drawn.values[:, rungs] @ weights
        ends = [percentile(slopes, (1 + side * CONFIDENCE) / 2) for side in (-1, 1)]
    with np.errstate(over='ignore'):
        factor, low, high = (float(10.0 ** np.float64(each)) for each in (slope, *ends))
    return Trend(Estimate(factor, low, high), tuple(int(rung) for rung in rungs))


def reversals(gains: Sequence[Gain]) -> list[Reversal]:
    """Where the gain passes 1 between two neighboring rungs.

    A rung is skipped if its gain is a bound that leaves open whether it is above 1.
    """
    known = [(gain, side) for gain in gains if (side := side_of(gain.value))]
    return [
        Reversal(
            rung=gain.rung,
            significant=_significant_side(gain) == side
            and _significant_side(following) == other_side,
        )
        for (gain, side), (following, other_side) in pairwise(known)
        if side != other_side
    ]


def side_of(bound: Bound) -> int:
    """1 if the number is surely above 1, -1 if below; 0 if it is 1 or unknown."""
    above = bound.value > 1 and bound.relation != '<'
    above |= bound.value == 1 and bound.relation == '>'
    below = bound.value < 1 and bound.relation != '>'
    below |= bound.value == 1 and bound.relation == '<'
    return above - below


def _significant_side(gain: Gain) -> int:
    """1 if the interval is above 1, -1 if below, else 0."""
    return (side_of(gain.low) > 0) - (side_of(gain.high) < 0)
