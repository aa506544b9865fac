"""The losses of a ladder and the results of its analysis, as plain data."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

CONFIDENCE = 0.95  # of every interval of a ladder
# Of a fit: above it the curve is wrong. With a correct one, about 1 ladder in 100 exceeds it.
LARGE_MISFIT = 2.0


class LadderRun(NamedTuple):
    """A finished run of a ladder."""

    variant: str
    rung: int  # from 0
    seed: Hashable
    loss: float
    cost: float  # in FLOPs or seconds


@dataclass(frozen=True)
class Ladder:
    """The final losses of several variants at several sizes, from the smallest.

    A variant has an entry for each rung. The baseline may have runs at more rungs than the others.
    """

    baseline: str
    # variant -> by rung: mean cost of a run, in FLOPs or seconds; None where there is no finished
    # run
    costs: dict[str, list[float | None]]
    losses: dict[str, list[dict[Hashable, float]]]  # variant -> by rung: losses by seed

    @classmethod
    def of_runs(
        cls, baseline: str, variants: Iterable[str], rungs: int, runs: Iterable[LadderRun]
    ) -> 'Ladder':
        """The ladder of finished runs. rungs: their number; all variants have as many entries."""
        cells: dict[str, list[list[LadderRun]]] = {v: [[] for _ in range(rungs)] for v in variants}
        for run in runs:
            cells[run.variant][run.rung].append(run)
        return cls(
            baseline,
            costs={
                v: [fmean(run.cost for run in cell) if cell else None for cell in row]
                for v, row in cells.items()
            },
            losses={
                v: [{run.seed: run.loss for run in cell} for cell in row]
                for v, row in cells.items()
            },
        )


class Estimate(NamedTuple):
    """An estimate with its interval of the level CONFIDENCE."""

    value: float
    low: float
    high: float


class Bound(NamedTuple):
    """A number, or a bound of one that lies outside the range of the baseline's runs."""

    value: float
    relation: str = ''  # '' for the number itself, '>' or '<' for a bound


class Gain(NamedTuple):
    """The compute gain of a variant at a rung: above 1, it needs less compute than the baseline."""

    rung: int
    cost: float  # mean of the variant's runs
    value: Bound
    low: Bound
    high: Bound


class Trend(NamedTuple):
    """The change of the gain with compute: a factor for each tenfold increase of the cost."""

    factor: Estimate
    rungs: tuple[int, ...]  # whose gains are in the trend


class Reversal(NamedTuple):
    """Two neighboring rungs between which the order of a variant and the baseline reverses."""

    rung: int  # the smaller; the order differs at the next one with runs of both
    significant: bool  # the intervals of both gains exclude 1


class CurveFit(NamedTuple):
    """Fits of L(C) = E + A · C^-α by least squares."""

    irreducible: dict[str, Estimate]  # E by variant; all equal if it is shared
    scale: dict[str, Estimate]  # A
    exponent: dict[str, Estimate]  # α
    residuals: dict[str, list[float | None]]  # variant -> by rung: mean loss minus fit
    shared: bool
    # Root mean square residual, relative to that which the noise of seeds explains; None without
    # draws. Above 1 it widens the intervals of the fit, and of the forecast.
    misfit: float | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether the residuals are too large to be chance."""
        return self.misfit is not None and self.misfit > LARGE_MISFIT


class TopPrediction(NamedTuple):
    """The mean loss of a variant at its top rung, predicted from the rungs below."""

    rung: int
    predicted: Estimate  # the interval includes the noise of the measured mean
    measured: float
    log_linear: float  # extrapolation of log L against log C, for comparison

    @property
    def hit(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high


class Forecast(NamedTuple):
    """Losses and gains beyond the top rung.

    By the fit with a shared E, whose intervals assume that it is shared; and gains by the fit with
    own E, which are infinite where the baseline's E is above the variant's loss.
    """

    costs: list[float]  # up to 10 times the variants' top rung
    losses: dict[str, list[Estimate]]
    gains: dict[str, list[Estimate]]  # of each variant but the baseline
    own_gains: dict[str, list[Estimate]]  # by the fit with own E


class NoiseModel(NamedTuple):
    """Standard deviation of a loss over seeds: log-linear in the cost of the run."""

    deviations: list[float | None]  # by rung: pooled over variants
    freedom: list[int]  # by rung: degrees of freedom of those
    intercept: float  # ln σ = intercept + slope · ln cost
    slope: float

    def deviation(self, cost: float) -> float:
        """The standard deviation expected of runs of this cost."""
        return float(cost**self.slope * 2.718281828459045**self.intercept)


@dataclass(frozen=True)
class LadderAnalysis:
    """The answer of a ladder. Variants are in the order of `Ladder.costs`."""

    ladder: Ladder
    gains: dict[str, list[Gain]]  # of each variant but the baseline, at rungs with runs of it
    # None with fewer than two gains within the range; without interval if the shared fit is wrong
    trends: dict[str, Trend | None]
    reversals: dict[str, list[Reversal]]
    shared_fit: CurveFit | None  # None with fewer than four rungs
    own_fit: CurveFit | None  # the same with an E for each variant
    predictions: dict[str, TopPrediction]  # empty with fewer than four rungs
    forecast: Forecast | None  # None with fewer than four rungs, or if it would say nothing
    noise: NoiseModel | None  # None if no rung has several seeds
    draws: int  # of the parametric bootstrap; 0: one seed each, without intervals
