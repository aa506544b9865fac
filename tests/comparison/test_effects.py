"""comparison/effects.py: main effects and interactions of a grid, by arithmetic and simulation."""

import itertools
import random

import pytest
from helpers.run_records import compared, decaying, fake_group, study_record, write_study

from comparison.effects import interactions, main_effects
from comparison.formats import render_text
from comparison.intervals import effect_rows


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


@pytest.mark.parametrize('patterns', [('G', 'LG'), ('LG', 'G')])
def test_effects_of_patterns_that_lack_kinds(patterns):
    """Without layers L there is one run instead of one for each of their windows."""
    window = 'layer_kinds.L.sliding_window'
    losses = {
        'G': [({'layer_pattern': 'G'}, 2.0)],
        'LG': [
            ({'layer_pattern': 'LG', window: size}, loss) for size, loss in ((4, 2.5), (8, 2.3))
        ],
    }
    grid = [
        (point, fake_group({(s, s): loss + 0.1 * s for s in range(3)}))
        for pattern in patterns
        for point, loss in losses[pattern]
    ]
    effects = {effect.option: effect for effect in main_effects(grid)}
    sign = 1 if patterns[0] == 'G' else -1
    assert effects['layer_pattern'].mean == pytest.approx(sign * (0.5 + 0.3) / 2)
    assert effects['layer_pattern'].pairs == 6
    assert effects[window].mean == pytest.approx(2.3 - 2.5) and effects[window].pairs == 3
    assert interactions(grid) == []


def test_tables_show_values_of_kinds_by_short_names(tmp_path):
    kinds = [{'L': {'n_head': 1}}, {'L': {'n_head': 2, 'qk_norm': True}}]
    variants = [
        {
            'label': f'L.sliding_window={window} {number}',
            'asked': {'layer_kinds.L.sliding_window': window, 'layer_kinds': kinds[number]},
        }
        for window in (4, None)
        for number in (0, 1)
    ]
    losses = [[study_record(n, seed, decaying(n * n, seed)) for seed in (1, 2)] for n in range(4)]
    comparison = compared(write_study(tmp_path, variants, losses, tuned=[]))
    text = render_text(comparison)
    effects = text.partition('MAIN EFFECTS')[2].partition('INTERACTIONS')
    rows = [
        line.split('  ')[0] for line in effects[0].splitlines() if line.startswith(('L.', 'lay'))
    ]
    assert rows == ['L.sliding_window', 'layer_kinds']
    assert 'L.n_head=2 L.qk_norm=True  L.n_head=1' in effects[0]
    assert 'L.sliding_window=None  layer_kinds=L.n_head=2 L.qk_norm=True' in effects[2]
    assert [row.text for row in effect_rows(comparison)] == [
        'L.sliding_window: None against 4',
        'layer_kinds: L.n_head=2 L.qk_norm=True against L.n_head=1',
    ]


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
