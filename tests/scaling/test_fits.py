"""scaling/fits.py equals scipy's optimizer, recovers exact curves, and copes with hopeless data."""

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import least_squares

from scaling import fits

COSTS = np.geomspace(1e15, 1e18, 6)
TRUE = fits.Curves(np.array([1.7, 1.7]), np.log([300.0, 280.0]), np.array([0.16, 0.158]))

pytestmark = pytest.mark.filterwarnings('error')


@pytest.fixture(autouse=True)
def no_overflow():
    with np.errstate(all='raise', under='ignore'):
        yield


def two_variants(missing=()):
    """Costs [variants, rungs], without the named cells."""
    costs = np.stack([COSTS, 1.1 * COSTS])
    for cell in missing:
        costs[cell] = np.nan
    return costs


def squared_error(curves, costs, losses):
    return np.nansum((curves.loss(costs) - losses) ** 2)


def least_error(costs, losses, shared):
    """The smallest squared error that scipy finds from several starts."""
    used = np.isfinite(costs) & np.isfinite(losses)
    x = np.log(costs) - np.nanmean(np.log(costs), axis=1, keepdims=True)
    smallest = [np.nanmin(losses[used])] * 2 if shared else np.nanmin(losses, axis=1)
    count = 1 if shared else 2

    def residuals(p):
        e, height, exponent = np.resize(p[:count], 2), p[count : count + 2], p[count + 2 :]
        return (e[:, None] + np.exp(height[:, None] - exponent[:, None] * x) - losses)[used]

    low = [*[0.0] * count, -np.inf, -np.inf, fits.MIN_EXPONENT, fits.MIN_EXPONENT]
    high = [*smallest[:count], np.inf, np.inf, fits.MAX_EXPONENT, fits.MAX_EXPONENT]
    results = []
    for share in (0.2, 0.9):
        e = share * np.array(smallest[:count])
        height = np.log(np.nanmean(losses - share * np.array(smallest)[:, None], axis=1))
        start = [*e, *height, 0.2, 0.2]
        tight = {'xtol': 1e-15, 'ftol': 1e-15, 'gtol': 1e-15, 'max_nfev': 200}
        results.append(2 * least_squares(residuals, start, bounds=(low, high), **tight).cost)
    return min(results)


@pytest.mark.parametrize('shared', [True, False])
@pytest.mark.parametrize('missing', [(), [(1, 5)], [(1, 0), (1, 5), (0, 2)]])
def test_exact_curves_are_recovered(shared, missing):
    costs = two_variants(missing)
    curves = fits.fit_curves(costs, TRUE.loss(costs), shared)
    np.testing.assert_allclose(curves.irreducible, TRUE.irreducible, rtol=1e-7)
    np.testing.assert_allclose(curves.scale, TRUE.scale, rtol=1e-6)
    np.testing.assert_allclose(curves.exponent, TRUE.exponent, rtol=1e-7)


@pytest.mark.parametrize('shared', [True, False])
@pytest.mark.parametrize('noise', [0.003, 0.03, 0.2])
def test_scipy_finds_no_better_fit(shared, noise):
    """From an identified E to losses that are hardly more than noise."""
    costs = two_variants([(1, 5)])
    losses = TRUE.loss(costs) + noise * np.random.default_rng(1).standard_normal((3, 2, 6))
    curves = fits.fit_curves(costs, losses, shared)
    assert (curves.irreducible >= 0).all()
    assert (curves.irreducible < np.nanmin(losses, axis=-1)).all()
    for number, of_draw in enumerate(losses):
        one = fits.Curves(*(array[number] for array in vars(curves).values()))
        least = least_error(costs, of_draw, shared)
        assert squared_error(one, costs, of_draw) <= least * (1 + 1e-5)


def test_draws_in_a_batch_have_the_fits_they_have_alone():
    costs = two_variants()
    losses = TRUE.loss(costs) + 0.02 * np.random.default_rng(2).standard_normal((3, 5, 2, 6))
    batch = fits.fit_curves(costs, losses)
    assert batch.irreducible.shape == (3, 5, 2)
    for index in np.ndindex(3, 5):
        alone = fits.fit_curves(costs, losses[index])
        for name, array in vars(alone).items():
            np.testing.assert_allclose(array, getattr(batch, name)[index], rtol=1e-9)


def test_shared_and_own_irreducible_loss():
    """One shared E for both variants, which is between those of separate fits."""
    costs = two_variants()
    true = fits.Curves(np.array([1.6, 1.8]), TRUE.log_scale, TRUE.exponent)
    shared, own = (fits.fit_curves(costs, true.loss(costs), each) for each in (True, False))
    assert shared.irreducible[0] == shared.irreducible[1]
    assert 1.6 < shared.irreducible[0] < 1.8
    np.testing.assert_allclose(own.irreducible, [1.6, 1.8], rtol=1e-7)


def test_units_of_cost_do_not_matter():
    costs = two_variants()
    losses = TRUE.loss(costs) + 0.01 * np.random.default_rng(3).standard_normal((2, 6))
    flops, seconds = fits.fit_curves(costs, losses), fits.fit_curves(costs / 1e13, losses)
    np.testing.assert_allclose(flops.irreducible, seconds.irreducible, rtol=1e-6)
    np.testing.assert_allclose(flops.loss(costs), seconds.loss(costs / 1e13), rtol=1e-7)


@pytest.mark.parametrize('irreducible', [0.0, 1.2, np.array([1.0, 1.5])])
def test_fixed_irreducible_loss(irreducible):
    costs = two_variants()
    losses = TRUE.loss(costs) + 0.02 * np.random.default_rng(4).standard_normal((2, 6))
    curves = fits.fit_curves(costs, losses, irreducible=irreducible)
    np.testing.assert_array_equal(curves.irreducible, np.broadcast_to(irreducible, 2))
    for v, e in enumerate(curves.irreducible):
        x = np.log(costs[v] / 1e16)

        def residuals(p, v=v, e=e, x=x):
            return e + np.exp(p[0] - p[1] * x) - losses[v]

        height, exponent = least_squares(residuals, [0.0, 0.1], xtol=1e-14, ftol=1e-14).x
        assert curves.exponent[v] == pytest.approx(exponent, rel=1e-5)
        assert curves.log_scale[v] == pytest.approx(height + exponent * np.log(1e16), rel=1e-5)


def test_lines_in_logarithms():
    costs = two_variants([(1, 3)])
    values = np.exp(np.random.default_rng(5).standard_normal((4, 2, 6))) * costs**0.3
    lines = fits.fit_lines(costs, values)
    for index in np.ndindex(4, 2):
        used = np.isfinite(costs[index[1]])
        line = stats.linregress(np.log(costs[index[1]][used]), np.log(values[index][used]))
        assert lines.exponent[index] == pytest.approx(-line.slope)
        assert lines.log_scale[index] == pytest.approx(line.intercept)
    assert (lines.irreducible == 0).all()


@pytest.mark.parametrize('shared', [True, False])
@pytest.mark.parametrize(
    'losses',
    {
        'power law': 300 * COSTS**-0.12,  # E = 0
        'flat': np.full(6, 2.0),
        'rising': np.linspace(2.0, 2.5, 6),
        'step': np.array([4.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        'log-linear': np.linspace(3.0, 2.0, 6),
        'huge': 1e30 * COSTS**-0.12,
        'tiny': 1e-30 * COSTS**-0.12,
    }.items(),
    ids=lambda case: case[0],
)
def test_hopeless_losses_have_a_fit_within_the_bounds(losses, shared):
    _, of_both = losses
    losses = np.stack([of_both, of_both])
    curves = fits.fit_curves(two_variants(), losses, shared)
    assert all(np.isfinite(array).all() for array in vars(curves).values())
    assert (curves.irreducible >= 0).all()
    assert (curves.irreducible < losses.min()).all()
    assert (curves.exponent >= fits.MIN_EXPONENT).all()
    assert np.isfinite(curves.loss(10 * two_variants())).all()
    # No worse than a constant, except that a curve must fall a little.
    constant = ((losses - losses.mean(axis=1, keepdims=True)) ** 2).sum()
    assert (
        squared_error(curves, two_variants(), losses)
        <= 1.0001 * constant + 1e-9 * (losses**2).sum()
    )


@pytest.mark.parametrize('seed', range(2))
def test_any_losses_have_a_fit_without_overflow(seed):
    """Losses at random over many orders of magnitude, with missing cells."""
    random = np.random.default_rng(seed)
    for _ in range(6):
        shape = random.integers(1, [6, 8])
        steps = random.choice([0.02, 0.5, 3]) * random.uniform(0, 1, shape)
        costs = np.exp(random.uniform(0, 50) + steps.cumsum(axis=1))
        costs[random.random(shape) < random.choice([0, 0.5])] = np.nan
        noise = random.choice([0.01, 0.3, 3]) * random.standard_normal((5, *shape))
        losses = random.choice([1e-3, 1, 30]) * np.exp(noise) * costs ** random.choice([-0.2, 0])
        has_curve = np.isfinite(costs).sum(axis=1) >= 2
        used = np.where(has_curve[:, None] & np.isfinite(costs), losses, np.nan)
        count = np.maximum(np.isfinite(used).sum(axis=-1, keepdims=True), 1)
        mean = np.nansum(used, axis=-1, keepdims=True) / count
        constant = np.nansum((used - mean) ** 2, axis=(1, 2))
        for options in ({}, {'shared': False}, {'irreducible': 0.0}):
            curves = fits.fit_curves(costs, losses, **options)
            for array in vars(curves).values():
                assert (np.isfinite(array) == has_curve).all()
            error = np.nansum((curves.loss(costs) - losses) ** 2, axis=(1, 2))
            assert (error <= 1.001 * constant + 1e-6 * np.nansum(used**2, axis=(1, 2))).all()


def test_variants_with_too_few_rungs_have_no_curve():
    missing = [(1, rung) for rung in range(5)]
    costs = two_variants(missing)
    for shared in (True, False):
        curves = fits.fit_curves(costs, TRUE.loss(costs), shared)
        np.testing.assert_allclose(curves.exponent, [0.16, np.nan], rtol=1e-6)
        np.testing.assert_allclose(curves.irreducible, [1.7, np.nan], rtol=1e-6)
    assert np.isnan(fits.fit_lines(costs, TRUE.loss(costs)).exponent).tolist() == [False, True]
    empty = np.full((2, 6), np.nan)
    assert np.isnan(fits.fit_curves(empty, empty).irreducible).all()
