"""The test of a difference between two variants, with noise estimated from all variants.

Losses form a table of variants by seeds, in which a loss is

    mean of the variant + effect of the seed + noise.

A seed sets the initial weights and the data order of every variant, so its effect cancels in the
difference of two variants with the same seed. The rest is noise. Few seeds give a poor estimate of
it: three give two degrees of freedom. So the noise of a difference is *moderated*: the estimate
from the two variants is averaged with the one from all others, as in empirical Bayes methods for
many small experiments (Smyth 2004). The others count as at most PRIOR_FREEDOM degrees of freedom,
since variants may differ in their noise. `benchmarks/verdicts.py` shows by simulation that the
procedure keeps its error rate even if one variant has three times the deviation of the others.
"""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from comparison.significance import Difference

# Weight of the other variants, in degrees of freedom. The largest whole number for which at most
# 6 % of the experiments without a true difference report a significant one, in every case of
# benchmarks/verdicts.py with normal or t5 noise, or with one variant of three times the deviation.
PRIOR_FREEDOM = 3
# If only some runs have a partner, and the noise of the pairs has fewer degrees of freedom than
# this, the error rate is too high (benchmarks/verdicts.py). Without pairs the test is conservative.
MIN_PAIR_FREEDOM = 3
NO_SPREAD = 1e-12  # relative spread below which losses are identical

Losses = Mapping[Any, float]  # of one variant, by seed


class Spread(NamedTuple):
    """A sum of squares with its degrees of freedom."""

    squares: float
    freedom: float


class Variance(NamedTuple):
    """An estimated variance with its degrees of freedom."""

    value: float
    freedom: float


def moderated_difference(
    group: Losses, baseline: Losses, others: Sequence[Losses] = ()
) -> Difference | None:
    """The mean of `group` minus the mean of `baseline`, from all their runs.

    If all seeds are shared, this is the paired t-test with a moderated variance; if none is, it is
    Welch's test with moderated variances; if some are, a weighted mean of both comparisons. None if
    no test is possible: fewer than two runs of either, or no spread.
    """
    if min(len(group), len(baseline)) < 2:
        return None
    shared = [seed for seed in group if seed in baseline]
    pair = _moderated(_pair_spread(group, baseline), _other_pairs_spread(group, baseline, others))
    partly = not len(shared) == len(group) == len(baseline)
    if pair is None or (partly and pair.freedom < MIN_PAIR_FREEDOM):
        shared = []  # the effect of seeds is not estimated well enough: treat all runs as unpaired
    weights = _weights(len(shared), len(group), len(baseline))
    mean = sum(
        sign * losses[seed] * (on_shared if seed in shared else on_own)
        for losses, sign, (on_shared, on_own) in zip((group, baseline), (1, -1), weights)
        for seed in losses
    )
    of_others = _within(others)
    within = [
        of_one
        for losses in (group, baseline)
        if (of_one := _moderated(_within([losses]), of_others)) is not None  # with two runs it is
    ]
    parts = _variance_parts(len(shared), weights, pair, within, (group, baseline))
    variance = sum(factor * part.value for factor, part in parts)
    largest = max(map(abs, (*group.values(), *baseline.values())))
    if not math.sqrt(variance) > NO_SPREAD * largest:
        return None
    # Satterthwaite's degrees of freedom of a sum of estimated variances.
    freedom = variance**2 / sum((factor * p.value) ** 2 / p.freedom for factor, p in parts)
    of_pair = 2 * pair.value if shared and pair else sum(part.value for part in within)
    return Difference(
        mean=mean,
        error=math.sqrt(variance),
        freedom=freedom,
        noise=math.sqrt(of_pair),
        paired=bool(shared) and not partly,
        counts=(len(group), len(baseline)),
    )


def _moderated(spread: Spread, prior_spread: Spread) -> Variance | None:
    """The variance of `spread`, averaged with that of `prior_spread`.

    None with too few degrees of freedom.

    The prior has less weight the fewer degrees of freedom it has; PRIOR_FREEDOM bounds the weight,
    since variants may differ in their variance.
    """
    prior = 1 / (1 / PRIOR_FREEDOM + 1 / prior_spread.freedom) if prior_spread.freedom > 0 else 0.0
    freedom = spread.freedom + prior
    if freedom < 1:
        return None
    squares = spread.squares + (
        prior * prior_spread.squares / prior_spread.freedom if prior else 0.0
    )
    return Variance(squares / freedom, freedom)


def _weights(shared: int, group: int, baseline: int) -> tuple[tuple[float, float], ...]:
    """For group and baseline: the weight of a run with a partner, and of one without.

    These are the weights of generalized least squares if the effect of a seed varies as much as the
    noise. Any weights that sum to one give an unbiased difference; these are nearly optimal whether
    seeds have a large effect or none.
    """
    if not shared:
        return (0.0, 1 / group), (0.0, 1 / baseline)
    unpaired, unpaired_baseline = group - shared, baseline - shared
    # Normal equations of the two means: the covariance of a pair is [[2, 1], [1, 2]].
    a, d = 2 * shared / 3 + unpaired / 2, 2 * shared / 3 + unpaired_baseline / 2
    b = -shared / 3
    determinant = a * d - b * b
    # The contrast (1, -1) times the inverse of [[a, b], [b, d]].
    x, y = (d + b) / determinant, -(a + b) / determinant
    return ((2 * x - y) / 3, x / 2), ((x - 2 * y) / 3, -y / 2)


def _variance_parts(
    shared: int,
    weights: tuple[tuple[float, float], ...],
    pair: Variance | None,
    within: list[Variance],
    tables: tuple[Losses, Losses],
) -> list[tuple[float, Variance]]:
    """The variance of the weighted difference as (factor, estimated variance) terms.

    Var(w a - v b) of a pair is (w - v) w Var(a) + (v - w) v Var(b) + w v Var(a - b), and `pair` is
    half of Var(a - b).
    """
    together = shared * weights[0][0] * weights[1][0]
    parts = [(2 * together, pair)] if shared and pair else []
    for (on_shared, on_own), variance, losses in zip(weights, within, tables):
        factor = shared * on_shared**2 + (len(losses) - shared) * on_own**2 - together
        if factor > 1e-9:  # never subtract an estimated variance
            parts.append((factor, variance))
    return parts


# --- Sums of squares -----------------------------------------------------------------------------


def _pair_spread(group: Losses, baseline: Losses) -> Spread:
    """Half the squared deviations of the pairs' differences: the noise of one run."""
    differences = [group[seed] - baseline[seed] for seed in group if seed in baseline]
    return Spread(_squares(differences) / 2, max(0, len(differences) - 1))


def _other_pairs_spread(group: Losses, baseline: Losses, others: Sequence[Losses]) -> Spread:
    """The residual of the additive model over all variants, without the pair's own contribution."""
    all_variants, of_pair = _residual([group, baseline, *others]), _pair_spread(group, baseline)
    return Spread(
        max(0.0, all_variants.squares - of_pair.squares), all_variants.freedom - of_pair.freedom
    )


def _within(variants: Sequence[Losses]) -> Spread:
    """The squared deviations of runs from the mean of their variant."""
    return Spread(
        sum(_squares([*losses.values()]) for losses in variants),
        sum(max(0, len(losses) - 1) for losses in variants),
    )


def _squares(values: Sequence[float]) -> float:
    """The sum of squared deviations from the mean."""
    if len(values) < 2:
        return 0.0
    mean = statistics.fmean(values)
    return math.fsum((value - mean) ** 2 for value in values)


def _residual(variants: Sequence[Losses]) -> Spread:
    """The residual of the least-squares fit of variant + seed; cells may be missing."""
    cells = {(v, seed): x for v, losses in enumerate(variants) for seed, x in losses.items()}
    if not cells:
        return Spread(0.0, 0)
    scale = max(map(abs, cells.values()))
    # Alternating projections: subtract the means of variants, then of seeds, until both vanish.
    # A table without missing cells needs one pass.
    for _ in range(1000):
        largest = 0.0
        for axis in (0, 1):
            lines: dict[Hashable, list] = {}
            for cell in cells:
                lines.setdefault(cell[axis], []).append(cell)
            for line in lines.values():
                mean = statistics.fmean(cells[cell] for cell in line)
                largest = max(largest, abs(mean))
                for cell in line:
                    cells[cell] -= mean
        if largest <= 1e-13 * scale:
            break
    seeds = {seed for _, seed in cells}
    used = sum(bool(losses) for losses in variants)
    freedom = len(cells) - used - len(seeds) + _connected_components(variants)
    return Spread(math.fsum(x * x for x in cells.values()), freedom)


def _connected_components(variants: Sequence[Losses]) -> int:
    """The number of sets of variants that share no seed with each other."""
    components: list[set] = []
    for losses in variants:
        component = set(losses)
        disjoint = []
        for other in components:
            if other & component:
                component |= other
            else:
                disjoint.append(other)
        components = [*disjoint, component] if component else disjoint
    return len(components)
