"""comparison/effects.py: main effects and interactions of a grid, by arithmetic and simulation."""

import itertools
import random

import pytest
from helpers.run_records import fake_group

from comparison.effects import interactions, main_effects


def test_effects_and_interactions_of_additive_grid():
    """Loss = a + b + noise of the seed: the main effects are a and b, without interactions."""
    a, b = {'x': 0.0, 'y': -0.3, 'z': 0.1}, {1: 0.0, 2: 0.25}
    seeds = {(s, s): 0.1 * s for s in range(3)}
    grid = [
        ({'a': i, 'b': j}, fake_group({s: 3 + a[i] + b[j] + noise for s, noise in seeds.items()}))
        for i, j in itertools.product(a, b)
    ]
    effects = {(e.option, e.value): e for e in main_effects(grid)}
    assert {key: e.mean for key, e in effects.items()} == {
        ('a', 'y'): pytest.approx(-0.3),
        ('a', 'z'): pytest.approx(0.1),
        ('b', 2): pytest.approx(0.25),
    }
    assert effects['a', 'y'].pairs == 6 and effects['b', 2].pairs == 9
    pairs = interactions(grid)
    assert len(pairs) == 2 and all(i.mean == pytest.approx(0, abs=1e-12) for i in pairs)

    grid[-1] = (grid[-1][0], fake_group({s: loss - 1 for s, loss in grid[-1][1].losses.items()}))
    means = {i.values: i.mean for i in interactions(grid)}
    assert means == {('y', 2): pytest.approx(0, abs=1e-12), ('z', 2): pytest.approx(-1)}


def test_effects_skip_unpaired_runs():
    grid = [({'a': 1}, fake_group({(1, 1): 2.0})), ({'a': 2}, fake_group({(2, 2): 3.0}))]
    (effect,) = main_effects(grid)
    assert (effect.mean, effect.difference, effect.pairs) == (None, None, 0)


def test_main_effects_use_seed_as_unit():
    """All cells of a value share its noise with a seed, so its pairs are not independent."""
    draw = random.Random(0)
    trials, significant = 300, 0
    for _ in range(trials):
        luck = [[draw.gauss(0, 0.6**0.5) for _ in range(3)] for _ in (0, 1)]
        grid = [
            (
                {'A': a, 'B': b},
                fake_group({(s, s): luck[a][s] + draw.gauss(0, 0.4**0.5) for s in (0, 1, 2)}),
            )
            for b in range(4)
            for a in (0, 1)
        ]
        effect = next(e for e in main_effects(grid) if e.option == 'A')
        significant += effect.difference.p_value < 0.05
    assert 0.01 < significant / trials < 0.09  # 5 % and three standard errors


def test_effects_use_seeds_shared_by_all_cells():
    cells = {
        (1, 1): {1: 1.0, 2: 1.5},
        (2, 1): {1: 2.0, 2: 2.4},
        (1, 2): {1: 4.0, 2: 9.0},
        (2, 2): {1: 7.0},
    }
    grid = [
        ({'a': a, 'b': b}, fake_group({(s, s): x for s, x in losses.items()}))
        for (a, b), losses in cells.items()
    ]
    effect = next(e for e in main_effects(grid) if e.option == 'a')
    assert (effect.mean, effect.difference, effect.pairs) == (pytest.approx((1 + 3) / 2), None, 2)
