"""scaling/noise.py: the noise of seeds over the rungs of a ladder."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from scaling import noise
from scaling.results import Ladder, NoiseModel


def ladder(costs, losses):
    """losses: variant -> by rung: a list, whose seeds are 0, 1, ..."""
    tables = {v: [dict(enumerate(each)) for each in rows] for v, rows in losses.items()}
    return Ladder(next(iter(losses)), {v: list(costs[: len(r)]) for v, r in losses.items()}, tables)


@pytest.mark.parametrize('deviation, half_width', [(0.01, 0.005), (0.01, 0.0124), (0.01, 0.3)])
def test_seeds_needed_is_the_smallest_number_with_that_half_width(deviation, half_width):
    def expected(seeds):
        chi = stats.chi(seeds - 1, scale=deviation / math.sqrt(seeds - 1))
        return stats.t.ppf(0.975, seeds - 1) * chi.mean() / math.sqrt(seeds)

    seeds = noise.seeds_needed(deviation, half_width)
    assert expected(seeds) <= half_width
    assert seeds == 2 or expected(seeds - 1) > half_width


def test_seeds_needed_without_an_answer():
    with pytest.raises(ValueError):
        noise.seeds_needed(0.01, 0.0)


def test_deviation_is_moderated_by_the_rung_with_its_degrees_of_freedom():
    model = NoiseModel([0.02, None], [3, 0], math.log(0.01), 0.0)
    expected = math.sqrt((noise.PRIOR_FREEDOM * 0.01**2 + 3 * 0.02**2) / (noise.PRIOR_FREEDOM + 3))
    assert noise.moderated_deviation(model, 1e9, 0) == pytest.approx(expected)
    for without in (1, 2, None):  # a rung with no estimate, one of no runs, another ladder
        assert noise.moderated_deviation(model, 1e9, without) == pytest.approx(0.01)


def test_contrasts_of_a_complete_table_are_those_of_the_two_way_layout():
    draw = random.Random(1)
    table = np.array([[draw.gauss(0, 1) for _ in range(4)] for _ in range(3)])
    result = noise.contrasts([dict(enumerate(row)) for row in table])
    residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    of_seeds = 3 * ((table.mean(0) - table.mean()) ** 2).sum()
    assert result.squares[result.factors == 0].sum() == pytest.approx((residual**2).sum())
    assert result.squares[result.factors > 0].sum() == pytest.approx(of_seeds)
    assert sorted(result.factors) == pytest.approx([0] * 6 + [3] * 3)


def test_contrasts_with_missing_cells_have_the_restricted_likelihood():
    """Compared with the density of the losses around their generalized least-squares means."""
    tables = [{1: 0.3, 2: -0.2, 3: 0.9}, {2: 1.4, 3: 2.2, 5: 1.7}, {7: 0.1}, {}]
    result = noise.contrasts(tables)
    cells = [(v, s) for v, table in enumerate(tables) for s in table]
    values = np.array([tables[v][s] for v, s in cells])
    means = np.array([[v == w for w in range(3)] for v, _ in cells], float)
    same_seed = np.array([[s == t for _, t in cells] for _, s in cells], float)

    def restricted(share):
        inverse = np.linalg.inv((1 - share) * np.eye(len(cells)) + share * same_seed)
        information = means.T @ inverse @ means
        rest = values - means @ np.linalg.solve(information, means.T @ inverse @ values)
        return (
            np.linalg.slogdet(inverse)[1] - np.linalg.slogdet(information)[1]
        ) / 2 - rest @ inverse @ rest / 2

    def from_contrasts(share):
        scales = 1 - share + share * result.factors
        return -(np.log(scales) + result.squares / scales).sum() / 2

    # Both are log densities up to the same constant.
    constant = restricted(0.0) - from_contrasts(0.0)
    for share in (0.2, 0.5, 0.9):
        assert restricted(share) - from_contrasts(share) == pytest.approx(constant)


def test_moderated_noise_is_the_posterior_that_scipy_gives():
    """With one variant, the share of the seed does not matter, and each rung has an F density."""
    deviations, costs = [0.004, 0.009, 0.003], np.array([1e15, 4e15, 1.6e16])
    values = [[2.5 - d, 2.5, 2.5 + d] for d in deviations]  # sample deviations d
    model = noise.noise_model(ladder(costs, {'a': values}))
    assert model.deviations == pytest.approx(deviations)
    assert model.freedom == [2, 2, 2]
    x = np.log(costs / 4e15)
    levels = np.linspace(-16, -4, 500)[:, None]
    slopes = np.linspace(-1.8, 1.2, 120)[None, :]
    density = stats.norm(*noise.PRIOR_SLOPE).pdf(slopes) * np.ones(levels.shape)
    for position, deviation in zip(x, deviations):
        expected = np.exp(levels + slopes * position)
        density *= stats.f(2, noise.PRIOR_FREEDOM).pdf(deviation**2 / expected) / expected
    density /= density.sum()
    slope = float((slopes * density).sum()) / 2
    assert model.slope == pytest.approx(slope, abs=0.01)
    at_center = math.exp((levels * density).sum() / 2)
    assert model.deviation(4e15) == pytest.approx(at_center, rel=0.02)


def test_paired_noise_is_that_of_differences():
    draw = np.random.default_rng(2)
    luck, own = 0.02 * draw.standard_normal((2, 8)), 0.004 * draw.standard_normal((2, 2, 8))
    each = ladder([1e15, 4e15], {'a': (2.5 + luck + own[0]), 'b': (2.4 + luck + own[1])})
    model = noise.noise_model(each, paired=True)
    differences = [np.std(a - b, ddof=1) for a, b in zip(own[0], own[1])]
    assert model.deviations == pytest.approx(differences)
    assert model.freedom == [7, 7]
    assert model.deviation(2e15) == pytest.approx(0.004 * math.sqrt(2), rel=0.3)
    assert noise.noise_model(each).deviation(2e15) == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize('values', [[[2.5]], [[2.5, 2.5, 2.5]], [[]]])
def test_no_noise_model_without_spread(values):
    assert noise.noise_model(ladder([1e15], {'a': values})) is None
