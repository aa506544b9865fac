"""The noise of seeds over the rungs of a ladder.

At each rung, losses form a table of variants by seeds, in which a loss is

    mean of the variant + effect of the seed + noise.

A seed sets the initial weights and the data order of every variant, so its effect cancels in the
difference of two variants. The model, with one rung per cost C:

    variance of a loss at a rung      scaled inverse χ² with PRIOR_FREEDOM degrees of freedom,
                                      around exp(intercept + slope · ln C)
    share of the effect of the seed   the same at all rungs

A rung with few seeds gives a poor estimate of its variance. So it is moderated by the log-linear
model, as in empirical Bayes methods for many small experiments (Smyth 2004). PRIOR_FREEDOM is the
weight of the model at a rung: the larger, the closer is each rung to it. The parameters have a
posterior on a grid, from which the bootstrap draws: their uncertainty is part of every interval.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from common.student import student_quantile
from scaling.results import CONFIDENCE, Ladder, NoiseModel

# Priors, chosen by simulation (benchmarks/ladder_coverage.py): intervals of gains cover the truth
# as often as they say with any share of the seed, and are not much wider than with known noise.
PRIOR_FREEDOM = 6.0
# Of the slope of the log variance: normal. Deviations fall slowly with size, if at all.
PRIOR_SLOPE = (-0.3, 0.5)
# Of ln(share / (1 - share)): uniform. At the ends, the effect of the seed is nothing or all.
PRIOR_LOGITS = (-7.0, 8.0)
# Points of the grid: of the log variance, its slope, and the share of the effect of the seed.
GRID = (40, 11, 31)
NO_SPREAD = 1e-12  # relative deviation below which losses are identical

Losses = Mapping[Hashable, float]  # of one variant at one rung, by seed


class Contrasts(NamedTuple):
    """Independent contrasts of the losses at a rung, whose means are zero.

    The variance of contrast j is σ² · (1 - share + share · factor_j), where σ² is the variance of
    a loss and `share` the part of it that is due to the seed. A factor of 0 is a difference between
    variants with the same seed.
    """

    squares: np.ndarray  # [contrasts]
    factors: np.ndarray  # [contrasts]


class NoiseDraws(NamedTuple):
    """Draws of the noise from its posterior distribution."""

    variances: np.ndarray  # [draws, rungs], of a loss
    shares: np.ndarray  # [draws], of the effect of the seed in these


def seeds_needed(deviation_of_difference: float, half_width: float) -> int:
    """The number of seeds for a wanted precision of the difference of two variants.

    It is the smallest for which the expected half-width of Student's interval of the paired
    difference is at most `half_width`.

    deviation_of_difference: of the losses of two runs with the same seed, in the unit of
    half_width.
    """
    if not (half_width > 0 and deviation_of_difference < math.inf):
        raise ValueError('the half-width must be above zero and the deviation finite')

    def is_enough(seeds: int) -> bool:
        return deviation_of_difference * _expected_half_width(seeds) <= half_width

    high = 2
    while not is_enough(high):
        high *= 2
    low = high // 2  # not enough, or less than two
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return max(high, 2)


def _expected_half_width(seeds: int) -> float:
    """Of an interval of a mean, in standard deviations; an estimated one is too small on average.

    E[s] = σ · √(2/ν) · Γ((ν+1)/2) / Γ(ν/2).
    """
    freedom = seeds - 1
    log_ratio = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    expected = math.sqrt(2 / freedom) * math.exp(log_ratio)
    return student_quantile(0.5 + CONFIDENCE / 2, freedom) * expected / math.sqrt(seeds)


def moderated_deviation(model: NoiseModel, cost: float, rung: int | None) -> float:
    """The deviation at a cost by the model, moderated by the runs of a rung of its ladder.

    The weights are the degrees of freedom: PRIOR_FREEDOM of the model, and those of the rung, which
    has none if `rung` is None.
    """
    line = model.deviation(cost)
    own = None if rung is None or rung >= len(model.deviations) else model.deviations[rung]
    if own is None or rung is None:
        return line
    freedom = model.freedom[rung]
    squares = PRIOR_FREEDOM * line**2 + freedom * own**2
    return math.sqrt(squares / (PRIOR_FREEDOM + freedom))


def contrasts(tables: Sequence[Losses]) -> Contrasts:
    """The contrasts of a table of variants by seeds; cells may be missing.

    All that the losses say about their noise, whatever the means of the variants: the restricted
    likelihood of the two-way layout (Patterson & Thompson 1971).
    """
    cells = [(v, seed, loss) for v, table in enumerate(tables) for seed, loss in table.items()]
    variants, seeds = sorted({v for v, _, _ in cells}), [*dict.fromkeys(s for _, s, _ in cells)]
    if len(cells) == len(variants):
        return Contrasts(np.zeros(0), np.zeros(0))
    of_variant = np.array([[v == variant for variant in variants] for v, _, _ in cells], float)
    of_seed = np.array([[s == seed for seed in seeds] for _, s, _ in cells], float)
    values = np.array([loss for _, _, loss in cells])
    # An orthonormal basis of all that is orthogonal to the means of variants ...
    basis = np.linalg.qr(of_variant, mode='complete')[0][:, len(variants) :]
    # ... turned so that the effects of seeds on its directions are independent of each other.
    factors, turn = np.linalg.eigh(basis.T @ of_seed @ of_seed.T @ basis)
    squares = ((basis @ turn).T @ (values - values.mean())) ** 2
    return Contrasts(squares, np.where(factors < 1e-9, 0.0, factors))


def rung_tables(ladder: Ladder) -> list[list[Losses]]:
    """By rung: the losses of the variants with runs there, by seed."""
    rungs = range(max(map(len, ladder.losses.values())))
    return [
        [rows[rung] for rows in ladder.losses.values() if rung < len(rows) and rows[rung]]
        for rung in rungs
    ]


def rung_costs(ladder: Ladder) -> np.ndarray:
    """By rung: the geometric mean of the costs of the variants with runs there; NaN without any."""
    logs: list[list[float]] = [[] for _ in rung_tables(ladder)]
    for name, costs in ladder.costs.items():
        for rung, (cost, losses) in enumerate(zip(costs, ladder.losses[name])):
            if cost and losses:
                logs[rung].append(math.log(cost))
    return np.array([math.exp(sum(each) / len(each)) if each else math.nan for each in logs])


class NoisePosterior:
    """The posterior distribution of the noise of a ladder, on a grid."""

    def __init__(self, costs: np.ndarray, rungs: Sequence[Contrasts]) -> None:
        """costs: by rung, NaN where unknown. Some rung must have contrasts with spread."""
        known = np.log(costs[~np.isnan(costs)])
        middle = known.mean() if len(known) else 0.0
        log_costs = np.where(np.isnan(costs), middle, np.log(costs))
        freedom = np.array([len(rung.squares) for rung in rungs])
        self.center = np.average(log_costs, weights=freedom)
        self.positions = log_costs - self.center
        self.rungs = rungs
        total = freedom.sum()
        pooled = sum(rung.squares.sum() for rung in rungs) / total
        # The wider, the less there is to estimate the level from: the posterior has long tails.
        self.levels = math.log(pooled) + np.linspace(-4 - 8 / total, 3 + 16 / total, GRID[0])
        self.slopes = PRIOR_SLOPE[0] + PRIOR_SLOPE[1] * np.linspace(-2.5, 2.5, GRID[1])
        self.logits = np.linspace(*PRIOR_LOGITS, GRID[2])
        log_density = self._log_density()
        density = np.exp(log_density - log_density.max())
        self.density = density / density.sum()  # [levels, slopes, logits]

    def _log_density(self) -> np.ndarray:
        """Up to a constant."""
        level, slope = self.levels[:, None, None], self.slopes[None, :, None]
        deviation = (self.slopes - PRIOR_SLOPE[0]) / PRIOR_SLOPE[1]
        shares = _share(self.logits)
        total = np.zeros((1, 1, 1)) - 0.5 * deviation[None, :, None] ** 2
        for position, rung in zip(self.positions, self.rungs):
            if not len(rung.squares):
                continue
            scales = _scales(shares, rung.factors)  # [logits, contrasts]
            squares = (rung.squares / scales).sum(-1)
            expected = PRIOR_FREEDOM * np.exp(level + slope * position)
            # The variance of the rung is integrated out.
            total = total + (
                PRIOR_FREEDOM / 2 * (level + slope * position)
                - (PRIOR_FREEDOM + len(rung.squares)) / 2 * np.log(expected + squares)
                - 0.5 * np.log(scales).sum(-1)
            )
        return total

    def draw(self, generator: np.random.Generator, draws: int) -> NoiseDraws:
        cells = np.searchsorted(
            np.cumsum(self.density.ravel())[:-1], generator.random(draws), side='right'
        )
        level, slope, logit = (
            axis[index] + (axis[1] - axis[0]) * (generator.random(draws) - 0.5)
            for axis, index in zip(
                (self.levels, self.slopes, self.logits), np.unravel_index(cells, self.density.shape)
            )
        )
        shares = _share(logit)
        variances = np.empty((draws, len(self.rungs)))
        for r, (position, rung) in enumerate(zip(self.positions, self.rungs)):
            squares = (rung.squares / _scales(shares, rung.factors)).sum(-1)
            freedom = PRIOR_FREEDOM + len(rung.squares)
            expected = PRIOR_FREEDOM * np.exp(level + slope * position)
            variances[:, r] = (expected + squares) / generator.chisquare(freedom, draws)
        return NoiseDraws(variances, shares)

    def line(self, paired: bool) -> tuple[float, float]:
        """Intercept and slope of the log deviation against log cost: means of the posterior.

        paired: of the difference of two losses with the same seed.
        """
        level = self.levels @ self.density.sum((1, 2))
        slope = self.slopes @ self.density.sum((0, 2))
        if paired:
            level += np.log(2 * (1 - _share(self.logits))) @ self.density.sum((0, 1))
        return float(level - slope * self.center) / 2, float(slope) / 2


def _share(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def _scales(shares: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Variances of contrasts, in variances of a loss. [shares, contrasts]"""
    return 1 - shares[:, None] + shares[:, None] * factors


def noise_posterior(ladder: Ladder) -> NoisePosterior | None:
    """The posterior of the noise; None if no rung has losses that differ between seeds."""
    tables = rung_tables(ladder)
    rungs = [contrasts(each) for each in tables]
    largest = max((abs(x) for each in tables for t in each for x in t.values()), default=0.0)
    spread = math.sqrt(sum(rung.squares.sum() for rung in rungs))
    if not spread > NO_SPREAD * largest:
        return None
    return NoisePosterior(rung_costs(ladder), rungs)


def noise_model(ladder: Ladder, paired: bool = False) -> NoiseModel | None:
    """The deviation of a loss over seeds, by rung and by cost.

    paired: of the difference of two variants with the same seed instead, in which the effect of
    the seed cancels. None if no rung has losses that differ between seeds.
    """
    posterior = noise_posterior(ladder)
    if posterior is None:
        return None
    deviations: list[float | None] = []
    freedoms = []
    for rung in posterior.rungs:
        if paired:
            squares, freedom = 2 * rung.squares[rung.factors == 0].sum(), sum(rung.factors == 0)
        else:
            squares, freedom = rung.squares.sum(), len(rung.squares)
        deviations.append(math.sqrt(squares / freedom) if freedom else None)
        freedoms.append(int(freedom))
    return NoiseModel(deviations, freedoms, *posterior.line(paired))
