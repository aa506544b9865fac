"""The difference of two variants, tested with a noise that is estimated from all variants.

Losses form a table of variants by seeds, in which a loss is

    mean of the variant + effect of the seed + noise.

A seed sets the initial weights and the order of the data of every variant, so its effect cancels
where both variants have the seed. What is left is the noise. Few seeds estimate it badly: three
give two degrees of freedom. So the noise of a difference is *moderated*: the estimate from the two
variants alone is averaged with the one from all others, as in empirical Bayes methods for many
small experiments (Smyth 2004). The others count as at most PRIOR_FREEDOM degrees of freedom, since
variants may differ in their noise. `benchmarks/verdicts.py` shows by simulation that the procedure
then holds its error rate even if one variant has three times the deviation of the others.
"""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from comparison.significance import Difference

# Weight of the other variants, in degrees of freedom. The largest whole number with which at most
# 6 % of the experiments without any true difference call one significant, in every case of
# benchmarks/verdicts.py with normal or t5 noise, or with one variant of three times the deviation.
PRIOR_FREEDOM = 3
# Where only some runs have a partner, fewer degrees of freedom of the pairs' noise than this make
# the error rate too high (benchmarks/verdicts.py). Without pairs the test is conservative.
MIN_PAIR_FREEDOM = 3
NO_SPREAD = 1e-12  # of the losses: below this, runs repeat one another to the last digit

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
    """Mean of `group` minus mean of `baseline`, from all their runs.

    With seeds that both have, this is the paired t-test with a moderated variance; without any, it
    is Welch's test with moderated variances; with some, a weighted mean of both comparisons.
    None where no test is possible: fewer than two runs of either, or no spread at all.
    """
    if min(len(group), len(baseline)) < 2:
        return None
    shared = [seed for seed in group if seed in baseline]
    pair = _moderated(_pair_spread(group, baseline), _other_pairs_spread(group, baseline, others))
    partly = not len(shared) == len(group) == len(baseline)
    if pair is None or (partly and pair.freedom < MIN_PAIR_FREEDOM):
        shared = []  # nothing tells well enough what a seed shares, so nothing is subtracted for it
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

    The prior predicts a variance less well the fewer degrees of freedom it has itself and the more
    the variances of variants differ, which PRIOR_FREEDOM stands for.
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
    """The weight of one run with a partner, and of one without, for group and baseline.

    They are those of generalized least squares when the effect of a seed varies as much as the
    noise. Any weights that add up to one give an unbiased difference; these lose little whether
    seeds matter much or not at all.
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
    """The variance of the weighted difference as factors of estimated variances.

    Var(w a - v b) of a pair is (w - v) w Var(a) + (v - w) v Var(b) + w v Var(a - b), and `pair` is
    half of Var(a - b).
    """
    together = shared * weights[0][0] * weights[1][0]
    parts = [(2 * together, pair)] if shared and pair else []
    for (on_shared, on_own), variance, losses in zip(weights, within, tables):
        factor = shared * on_shared**2 + (len(losses) - shared) * on_own**2 - together
        if factor > 1e-9:  # a negative one would take away what was estimated only
            parts.append((factor, variance))
    return parts


# --- Sums of squares -----------------------------------------------------------------------------


def _pair_spread(group: Losses, baseline: Losses) -> Spread:
    """Half the squares of the differences of pairs around their mean: the noise of one run."""
    differences = [group[seed] - baseline[seed] for seed in group if seed in baseline]
    return Spread(_squares(differences) / 2, max(0, len(differences) - 1))


def _other_pairs_spread(group: Losses, baseline: Losses, others: Sequence[Losses]) -> Spread:
    """What the additive model of all variants leaves, without what the pair itself contributes."""
    all_variants, of_pair = _residual([group, baseline, *others]), _pair_spread(group, baseline)
    return Spread(
        max(0.0, all_variants.squares - of_pair.squares), all_variants.freedom - of_pair.freedom
    )


def _within(variants: Sequence[Losses]) -> Spread:
    """The squares of runs around the means of their variants."""
    return Spread(
        sum(_squares([*losses.values()]) for losses in variants),
        sum(max(0, len(losses) - 1) for losses in variants),
    )


def _squares(values: Sequence[float]) -> float:
    """The squares around the mean."""
    if len(values) < 2:
        return 0.0
    mean = statistics.fmean(values)
    return math.fsum((value - mean) ** 2 for value in values)


def _residual(variants: Sequence[Losses]) -> Spread:
    """Squares that are left by least squares of variant + seed, cells may be missing."""
    cells = {(v, seed): x for v, losses in enumerate(variants) for seed, x in losses.items()}
    if not cells:
        return Spread(0.0, 0)
    scale = max(map(abs, cells.values()))
    # Alternating projections: take the means off variants, then off seeds, until they stay.
    # A table without missing cells needs one turn.
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
    """The number of sets of variants that no shared seed connects."""
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
