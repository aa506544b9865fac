"""Draws of the mean losses of a ladder: a parametric bootstrap.

A draw is the measured mean plus noise of a drawn variance. Where the mean and the variance of a
normal sample are estimated, such draws have Student's distribution around the mean, so their
percentiles are the usual intervals (the percentile bootstrap of three seeds covers 74 % instead of
95 %). Variants that share a seed share its effect. Rungs are independent of each other.
"""

import math
from typing import NamedTuple

import numpy as np

from scaling.noise import noise_posterior, rung_tables
from scaling.results import Ladder


class LossDraws(NamedTuple):
    """Mean losses as measured and as drawn. NaN where a variant has no runs."""

    measured: np.ndarray  # [variants, rungs]
    drawn: np.ndarray  # [draws, variants, rungs]; no draws if no loss has several seeds


def cost_table(ladder: Ladder) -> np.ndarray:
    """Costs [variants, rungs]; NaN where a variant has no runs."""
    table = np.full((len(ladder.costs), len(rung_tables(ladder))), np.nan)
    for v, (name, costs) in enumerate(ladder.costs.items()):
        for r, cost in enumerate(costs):
            if cost and ladder.losses[name][r]:
                table[v, r] = cost
    return table


def mean_losses(ladder: Ladder) -> np.ndarray:
    """The mean over seeds, [variants, rungs]; NaN where a variant has no runs."""
    means = np.full((len(ladder.losses), len(rung_tables(ladder))), np.nan)
    for v, rows in enumerate(ladder.losses.values()):
        for r, losses in enumerate(rows):
            if losses:
                means[v, r] = math.fsum(losses.values()) / len(losses)
    return means


def draw_losses(ladder: Ladder, draws: int, generator: np.random.Generator) -> LossDraws:
    """Draws of the mean losses, jointly over the variants that share seeds."""
    measured = mean_losses(ladder)
    posterior = noise_posterior(ladder)
    if posterior is None:
        return LossDraws(measured, np.empty((0, *measured.shape)))
    variances, shares = posterior.draw(generator, draws)
    drawn = np.full((draws, *measured.shape), np.nan)
    for r in range(measured.shape[1]):
        variants = [v for v in range(len(measured)) if not math.isnan(measured[v, r])]
        if not variants:
            continue
        tables = [list(ladder.losses.values())[v][r] for v in variants]
        seeds = [*dict.fromkeys(seed for table in tables for seed in table)]
        # The mean of a variant has the mean effect of its seeds. [variants, seeds]
        parts = np.array([[(seed in table) / len(table) for seed in seeds] for table in tables])
        counts = np.array([len(table) for table in tables])
        of_seeds = generator.standard_normal((draws, len(seeds))) @ parts.T
        own = generator.standard_normal((draws, len(tables))) / np.sqrt(counts)
        noise = np.sqrt(shares)[:, None] * of_seeds + np.sqrt(1 - shares)[:, None] * own
        drawn[:, variants, r] = measured[variants, r] + np.sqrt(variances[:, r, None]) * noise
    return LossDraws(measured, drawn)
