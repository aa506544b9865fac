"""comparison/noise.py: moderated tests equal scipy, numpy's least squares, and simulations."""

import random

import numpy as np
import pytest
from scipy import stats

from comparison import noise
from comparison.noise import PRIOR_FREEDOM, moderated_difference


def losses(draw, seeds, mean=3.0, deviation=0.1):
    return {seed: mean + draw.gauss(0, deviation) for seed in seeds}


@pytest.mark.parametrize('count', [2, 3, 5, 9])
def test_shared_seeds_give_paired_t_test(count):
    draw = random.Random(count)
    one, two = losses(draw, range(count)), losses(draw, range(count), 3.1)
    test = moderated_difference(one, two)
    expected = stats.ttest_rel([*one.values()], [*two.values()])
    assert test.paired and test.counts == (count, count)
    assert test.mean == pytest.approx(np.mean([*one.values()]) - np.mean([*two.values()]))
    assert test.p_value == pytest.approx(expected.pvalue)
    assert test.noise == pytest.approx(np.std([one[s] - two[s] for s in one], ddof=1))


def test_no_shared_seeds_give_welch_test():
    draw = random.Random(1)
    one, two = losses(draw, range(4)), losses(draw, range(10, 17), 3.1, 0.5)
    test = moderated_difference(one, two)
    expected = stats.ttest_ind([*one.values()], [*two.values()], equal_var=False)
    assert not test.paired and test.counts == (4, 7)
    assert test.p_value == pytest.approx(expected.pvalue)


def test_noise_of_others_adds_prior_freedom():
    """The moderated test of a balanced table follows from the residuals of the additive model."""
    draw = random.Random(2)
    variants, seeds = 4, 5
    table = np.array([[draw.gauss(3, 0.1) for _ in range(seeds)] for _ in range(variants)])
    one, two, *others = [dict(enumerate(row)) for row in table]
    centered = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    own = np.var(table[0] - table[1], ddof=1) / 2
    rest_freedom = (variants - 1) * (seeds - 1) - (seeds - 1)
    rest = ((centered**2).sum() - own * (seeds - 1)) / rest_freedom
    prior = 1 / (1 / PRIOR_FREEDOM + 1 / rest_freedom)
    freedom = seeds - 1 + prior
    variance = ((seeds - 1) * own + prior * rest) / freedom
    error = np.sqrt(2 * variance / seeds)
    test = moderated_difference(one, two, others)
    assert test.freedom == pytest.approx(freedom) and test.error == pytest.approx(error)
    p_value = 2 * stats.t.sf(abs(table[0].mean() - table[1].mean()) / error, freedom)
    assert test.p_value == pytest.approx(p_value)


def test_residuals_with_missing_cells_match_least_squares():
    draw = random.Random(3)
    for _ in range(20):
        variants = [losses(draw, [s for s in range(8) if draw.random() < 0.5]) for _ in range(5)]
        cells = [(v, s, x) for v, table in enumerate(variants) for s, x in table.items()]
        design = np.zeros((len(cells), 13))
        for row, (v, s, _) in enumerate(cells):
            design[row, v] = design[row, 5 + s] = 1
        values = np.array([x for *_, x in cells])
        solution = np.linalg.lstsq(design, values, rcond=None)[0]
        rank = np.linalg.matrix_rank(design)
        residual = noise._residual(variants)
        assert residual.freedom == len(cells) - rank
        expected = ((values - design @ solution) ** 2).sum()
        assert residual.squares == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_partly_shared_seeds_use_all_runs():
    """The weights are those of generalized least squares and use every run."""
    one, two = range(1, 7), range(3, 9)  # seeds 3 to 6 are shared
    covariance = np.eye(12)
    for i, s in enumerate(one):
        for j, t in enumerate(two):
            covariance[i, 6 + j] = covariance[6 + j, i] = 0.5 * (s == t)
    design = np.kron(np.eye(2), np.ones((6, 1)))
    precision = np.linalg.inv(covariance)
    estimator = np.linalg.inv(design.T @ precision @ design) @ design.T @ precision
    expected = np.array([1, -1]) @ estimator
    (shared, own), (shared_baseline, own_baseline) = noise._weights(4, 6, 6)
    for weight, s in zip(expected[:6], one):
        assert weight == pytest.approx(shared if s in two else own)
    for weight, s in zip(-expected[6:], two):
        assert weight == pytest.approx(shared_baseline if s in one else own_baseline)

    draw = random.Random(5)
    a, b = losses(draw, one), losses(draw, two)
    test = moderated_difference(a, b)
    assert test.mean == pytest.approx(expected @ [*a.values(), *b.values()])
    assert test.counts == (6, 6) and not test.paired


def test_too_few_shared_seeds_are_not_paired():
    draw = random.Random(6)
    one, two = losses(draw, range(1, 6)), losses(draw, range(4, 9))
    expected = stats.ttest_ind([*one.values()], [*two.values()], equal_var=False)
    assert moderated_difference(one, two).p_value == pytest.approx(expected.pvalue)


def test_no_test_for_too_few_or_equal_runs():
    draw = random.Random(7)
    assert moderated_difference(losses(draw, [1]), losses(draw, [1, 2, 3])) is None
    assert moderated_difference({1: 2.0, 2: 2.0}, {1: 3.0, 2: 3.0}) is None
    assert (
        moderated_difference({1: 2.1, 2: 2.2, 3: 2.3}, {1: 3.1, 2: 3.2, 3: 3.3}) is None
    )  # all pairs are equal
    # Other variants provide the noise if two variants are equal.
    others = [losses(draw, [1, 2, 3]) for _ in range(2)]
    assert (
        moderated_difference({1: 2.1, 2: 2.2, 3: 2.3}, {1: 3.1, 2: 3.2, 3: 3.3}, others) is not None
    )


@pytest.mark.parametrize(
    'tables, rate',
    [
        ([range(1, 6), range(3, 9)], 0.09),  # with two variants at most 7 %
        ([range(5), range(3), range(4), range(2, 6)], 0.06),
    ],
)
def test_partly_shared_seeds_keep_error_rate(tables, rate):
    draw, trials, significant = random.Random(8), 300, 0
    for _ in range(trials):
        luck = {seed: draw.gauss(0, 0.7) for seed in range(10)}
        variants = [{s: 3 + luck[s] + draw.gauss(0, 0.7) for s in seeds} for seeds in tables]
        one, two, *others = variants
        significant += moderated_difference(one, two, others).p_value < 0.05
    assert significant / trials < rate
