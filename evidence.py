"""Statistics of a few seeds: intervals, paired and unpaired tests, what could have been detected.

Plain Python, since a comparison starts neither numpy nor torch; tests hold it to scipy. All tests
are two-sided and take the losses of seeds as draws from a normal distribution, which is what is
known to hold roughly for losses of equal runs, and cannot be checked with five of them.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
POWER = 0.8  # a detectable effect is one that so many of such experiments would find


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval; of one value it has none."""

    mean: float
    count: int
    deviation: float | None  # sample standard deviation
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """How far one group's mean lies from another's, and what speaks for it."""

    mean: float
    low: float
    high: float
    p_value: float
    noise: float  # standard deviation of one such difference, from seed to seed
    error: float  # standard error of the mean difference
    freedom: float  # degrees of freedom
    paired: bool
    count: int  # pairs, or values of the smaller group

    def detectable(self, comparisons: int = 1) -> float:
        """The smallest true difference that such an experiment finds with probability POWER,
        as one of `comparisons`, whatever becomes of the others."""
        return self.error * detectable_ratio(self.freedom, comparisons) if self.error else 0.0


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, deviation and Student's interval of independent values."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Estimate(mean, count, None, None, None)
    deviation = statistics.stdev(values)
    half = student_quantile(0.5 + CONFIDENCE / 2, count - 1) * deviation / math.sqrt(count)
    return Estimate(mean, count, deviation, mean - half, mean + half)


def paired_difference(pairs: Sequence[tuple[float, float]]) -> Difference:
    """Of (value, baseline) pairs that share a seed: Student's t-test of their differences.

    Raises ValueError for fewer than two pairs.
    """
    if len(pairs) < 2:
        raise ValueError('a paired test needs two pairs')
    differences = [value - baseline for value, baseline in pairs]
    error = statistics.stdev(differences) / math.sqrt(len(pairs))
    mean = statistics.fmean(differences)
    noise = statistics.stdev(differences)
    return _difference(mean, error, len(pairs) - 1, noise, paired=True, count=len(pairs))


def unpaired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Of independent groups whose deviations may differ: Welch's t-test.

    Raises ValueError if a group has fewer than two values.
    """
    if min(len(values), len(baseline)) < 2:
        raise ValueError('an unpaired test needs two values in each group')
    parts = [statistics.variance(group) / len(group) for group in (values, baseline)]
    error, mean = math.sqrt(sum(parts)), statistics.fmean(values) - statistics.fmean(baseline)
    # Welch–Satterthwaite; without any spread it does not matter.
    squares = sum(
        part**2 / (len(group) - 1) for part, group in zip(parts, (values, baseline), strict=True)
    )
    freedom = sum(parts) ** 2 / squares if squares else len(values) + len(baseline) - 2
    count = min(len(values), len(baseline))
    noise = math.sqrt(statistics.variance(values) + statistics.variance(baseline))
    return _difference(mean, error, freedom, noise, paired=False, count=count)


def _difference(mean: float, error: float, freedom: float, noise: float, **rest) -> Difference:
    """From the difference's standard error and its degrees of freedom."""
    half = student_quantile(0.5 + CONFIDENCE / 2, freedom) * error
    if error:
        p_value = 2 * student_tail(abs(mean) / error, freedom)
    else:  # runs that repeat one another to the last bit
        p_value = 0.0 if mean else 1.0
    return Difference(mean, mean - half, mean + half, p_value, noise, error, freedom, **rest)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, in the given order (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


# --- Student's distribution ----------------------------------------------------------------------


def student_tail(t: float, freedom: float) -> float:
    """P(T > t) for t ≥ 0: half the regularised incomplete beta function at ν / (ν + t²)."""
    return 0.5 * _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


@functools.cache
def student_quantile(probability: float, freedom: float) -> float:
    """The t that T stays below with `probability`, from 0.5 up to, not including, 1."""
    return _root(lambda t: 1 - student_tail(t, freedom) - probability)


@functools.cache
def detectable_ratio(freedom: float, comparisons: int = 1) -> float:
    """The true difference, in standard errors, that the test finds with probability POWER.

    Holm's correction asks for α / comparisons of the first, and of the others for less.
    """
    critical = student_quantile(1 - (1 - CONFIDENCE) / 2 / comparisons, freedom)
    return _root(lambda ratio: power(ratio, freedom, critical) - POWER)


def power(ratio: float, freedom: float, critical: float) -> float:
    """P(|T| > critical) where T is Student's t of a true difference of `ratio` standard errors.

    The noncentral distribution as an integral over the estimated deviation s (σ = 1), whose
    square times ν is χ² distributed: Simpson's rule over all s that have any weight.
    """
    log_scale = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    normal = statistics.NormalDist().cdf

    def integrand(s: float) -> float:
        density = math.exp(log_scale + (freedom - 1) * math.log(s) - freedom * s * s / 2)
        return density * (normal(ratio - critical * s) + normal(-ratio - critical * s))

    upper, steps = 1 + 8 / math.sqrt(freedom), 400
    width = upper / steps
    # At s = 0 the density is 0, but for one degree of freedom, where it is that of nearly 0.
    total = integrand(1e-12) + integrand(upper)
    total += sum((4 if i % 2 else 2) * integrand(i * width) for i in range(1, steps))
    return total * width / 3


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function crosses zero, above 0, to sixteen digits."""
    high = 1.0
    while rising(high) < 0:
        high *= 2
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return high


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b) by its continued fraction, evaluated from the front (Lentz's method)."""
    if x <= 0 or x >= 1:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1) / (a + b + 2):  # there the fraction converges slowly
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(
        a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    )
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    fraction = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for coefficient in (even, odd):
            d = 1 / ((1 + coefficient * d) or tiny)
            c = (1 + coefficient / c) or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return front * fraction / a
