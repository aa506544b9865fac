"""Statistics of a few seeds: intervals, moderated t-tests, equivalence, detectable differences.

Plain Python, since a comparison imports neither numpy nor torch; checked against scipy in the
tests. All tests assume that the losses of seeds follow a normal distribution, which holds roughly
for repeated runs and cannot be checked with five of them.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common.student import rising_root, student_quantile, student_tail

CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
POWER = 0.8  # probability that a detectable difference is found


@dataclass(frozen=True)
class MeanEstimate:
    """A mean with its confidence interval, which a single value does not have."""

    mean: float
    count: int
    deviation: float | None  # sample standard deviation
    low: float | None
    high: float | None


class Interval(NamedTuple):
    """A confidence interval and its level."""

    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Difference:
    """A difference of two means whose standardized value follows Student's distribution."""

    mean: float
    error: float  # standard error of the mean difference, above zero
    freedom: float  # degrees of freedom of that error
    noise: float  # standard deviation of the difference within one pair of runs
    paired: bool  # every run has a partner with its seed
    counts: tuple[int, int]  # runs of the group, and of the baseline

    @functools.cached_property
    def p_value(self) -> float:
        """The two-sided p-value of the hypothesis of no difference."""
        return 2 * student_tail(abs(self.mean) / self.error, self.freedom)

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        half = student_quantile(0.5 + confidence / 2, self.freedom) * self.error
        return Interval(self.mean - half, self.mean + half, confidence)

    def equivalence_p_value(self, margin: float) -> float:
        """The p-value of the hypothesis that the difference is at least `margin` either way.

        Two one-sided tests (Schuirmann 1987): the larger of their p-values.
        """
        distance = (margin - abs(self.mean)) / self.error
        tail = student_tail(abs(distance), self.freedom)
        return tail if distance >= 0 else 1 - tail

    def detectable(self, comparisons: int = 1) -> float:
        """The smallest true difference that such a test finds with probability POWER.

        The standard error is taken as the true one. comparisons: number of tests to correct for,
        whatever the results of the others.
        """
        return self.error * detectable_ratio(self.freedom, comparisons)


def estimate_mean(values: Sequence[float]) -> MeanEstimate:
    """Mean, standard deviation and Student's interval of independent values."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return MeanEstimate(mean, count, None, None, None)
    deviation = statistics.stdev(values)
    half = student_quantile(0.5 + CONFIDENCE / 2, count - 1) * deviation / math.sqrt(count)
    return MeanEstimate(mean, count, deviation, mean - half, mean + half)


def paired_difference(pairs: Sequence[tuple[float, float]]) -> Difference | None:
    """Student's paired t-test of (value, baseline) pairs that share a seed.

    None for fewer than two pairs, and if all pairs have the same difference.
    """
    if len(pairs) < 2:
        return None
    differences = [value - baseline for value, baseline in pairs]
    noise = statistics.stdev(differences)
    if not noise > 0:
        return None
    return Difference(
        mean=statistics.fmean(differences),
        error=noise / math.sqrt(len(pairs)),
        freedom=len(pairs) - 1,
        noise=noise,
        paired=True,
        counts=(len(pairs), len(pairs)),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, in the given order (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def holm_confidences(p_values: Sequence[float]) -> list[float]:
    """The confidence level at which Holm's procedure tested each hypothesis, in the given order.

    The r-th smallest p-value of k is tested at ALPHA / (k - r + 1). The procedure stops at the
    first that is not significant, and all later ones share its level. So an interval of this level
    contains zero if and only if the corrected p-value is not significant.
    """
    confidences, level, ended = [0.0] * len(p_values), ALPHA, False
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if not ended:
            level = ALPHA / (len(p_values) - rank)
            ended = p_values[index] >= level
        confidences[index] = 1 - level
    return confidences


# --- Power ---------------------------------------------------------------------------------------


@functools.cache
def detectable_ratio(freedom: float, comparisons: int = 1) -> float:
    """The true difference, in standard errors, that the test finds with probability POWER.

    At the level of Holm's first test, ALPHA / comparisons, the strictest.
    """
    critical = student_quantile(1 - ALPHA / 2 / comparisons, freedom)
    return rising_root(lambda ratio: power(ratio, freedom, critical) - POWER)


def power(ratio: float, freedom: float, critical: float) -> float:
    """P(|T| > critical) for Student's t with a true difference of `ratio` standard errors.

    The noncentral distribution as an integral over the estimated deviation s (σ = 1), whose
    square times ν is χ² distributed: Simpson's rule over all s with non-negligible weight.
    """
    log_scale = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    normal = statistics.NormalDist().cdf

    def integrand(s: float) -> float:
        density = math.exp(log_scale + (freedom - 1) * math.log(s) - freedom * s * s / 2)
        return density * (normal(ratio - critical * s) + normal(-ratio - critical * s))

    upper, steps = 1 + 8 / math.sqrt(freedom), 400
    width = upper / steps
    # The density at s = 0 is 0, except with one degree of freedom: take its limit.
    total = integrand(1e-12) + integrand(upper)
    total += sum((4 if i % 2 else 2) * integrand(i * width) for i in range(1, steps))
    return total * width / 3
