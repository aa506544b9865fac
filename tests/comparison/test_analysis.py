"""judgement.py: effects of a grid, and verdicts under failures, by plain arithmetic and simulation.

The same simulations at full size are in benchmarks/verdicts.py.
"""

import itertools
import random
import types

import pytest

from comparison import analysis
from comparison.analysis import Group
from comparison.significance import detectable_ratio


def run(seeds, loss, outcome='finished'):
    config = {'seed': seeds[0], 'data_seed': seeds[1]}
    blown_up = outcome == 'diverged'
    return types.SimpleNamespace(
        config=config, val_loss=loss, outcome=outcome, blown_up=blown_up, start=0
    )


def group(losses, **others):
    """A group of finished runs with these losses by seed, and one run for each other outcome."""
    runs = [run(seeds, loss) for seeds, loss in losses.items()]
    runs += [run((99, outcome), None, outcome) for outcome in others]
    return Group(runs)


def test_main_effects_and_dependences_of_an_additive_grid():
    """Loss = a + b + noise of the seed: the effects are a and b, and nothing depends on another."""
    a, b = {'x': 0.0, 'y': -0.3, 'z': 0.1}, {1: 0.0, 2: 0.25}
    seeds = {(s, s): 0.1 * s for s in range(3)}
    placed = [
        ({'a': i, 'b': j}, group({s: 3 + a[i] + b[j] + noise for s, noise in seeds.items()}))
        for i, j in itertools.product(a, b)
    ]
    effects = {(e.option, e.value): e for e in analysis.main_effects(placed)}
    assert {key: e.mean for key, e in effects.items()} == {
        ('a', 'y'): pytest.approx(-0.3),
        ('a', 'z'): pytest.approx(0.1),
        ('b', 2): pytest.approx(0.25),
    }
    assert effects['a', 'y'].pairs == 6 and effects['b', 2].pairs == 9
    found = analysis.interactions(placed)
    assert len(found) == 2 and all(i.mean == pytest.approx(0, abs=1e-12) for i in found)

    placed[-1] = (placed[-1][0], group({s: loss - 1 for s, loss in placed[-1][1].losses.items()}))
    means = {i.values: i.mean for i in analysis.interactions(placed)}
    assert means == {('y', 2): pytest.approx(0, abs=1e-12), ('z', 2): pytest.approx(-1)}


def test_effects_leave_out_what_has_no_counterpart():
    placed = [({'a': 1}, group({(1, 1): 2.0})), ({'a': 2}, group({(2, 2): 3.0}))]
    (effect,) = analysis.main_effects(placed)
    assert (effect.mean, effect.difference, effect.pairs) == (None, None, 0)


def test_main_effects_take_the_seed_as_the_unit():
    """A value's luck with a seed is shared by all cells, so its pairs are not independent."""
    draw = random.Random(0)
    trials, significant = 300, 0
    for _ in range(trials):
        luck = [[draw.gauss(0, 0.6**0.5) for _ in range(3)] for _ in (0, 1)]
        placed = [
            (
                {'A': a, 'B': b},
                group({(s, s): luck[a][s] + draw.gauss(0, 0.4**0.5) for s in (0, 1, 2)}),
            )
            for b in range(4)
            for a in (0, 1)
        ]
        effect = next(e for e in analysis.main_effects(placed) if e.option == 'A')
        significant += effect.difference.p_value < 0.05
    assert 0.01 < significant / trials < 0.09  # 5 %, and three standard errors


def test_effects_go_over_the_seeds_that_every_cell_has():
    cells = {
        (1, 1): {1: 1.0, 2: 1.5},
        (2, 1): {1: 2.0, 2: 2.4},
        (1, 2): {1: 4.0, 2: 9.0},
        (2, 2): {1: 7.0},
    }
    placed = [
        ({'a': a, 'b': b}, group({(s, s): x for s, x in losses.items()}))
        for (a, b), losses in cells.items()
    ]
    effect = next(e for e in analysis.main_effects(placed) if e.option == 'a')
    assert (effect.mean, effect.difference, effect.pairs) == (pytest.approx((1 + 3) / 2), None, 2)


# --- Verdicts ------------------------------------------------------------------------------------


def shifted(shift, count=5):
    return {(s, s): 3 + 0.01 * s + shift + 0.001 * (-1) ** s * (shift != 0) for s in range(count)}


def verdict_of(variant, baseline, **options):
    return analysis.judge([variant, baseline], baseline, **options)[0]


@pytest.mark.parametrize(
    'shift, diverged_variant, diverged_baseline, text',
    [
        (-0.1, False, False, 'better'),
        (-0.1, True, False, 'blocked'),
        (-0.1, False, True, 'better'),
        (0.1, False, False, 'worse'),
        (0.1, True, False, 'worse'),
        (0.1, False, True, 'blocked'),
        (-0.1, True, True, 'blocked'),
        (0.1, True, True, 'blocked'),
    ],
)
def test_a_diverged_run_blocks_what_favors_its_group(
    shift, diverged_variant, diverged_baseline, text
):
    variant = group(shifted(shift), **{'diverged': None} if diverged_variant else {})
    baseline = group(shifted(0.0), **{'diverged': None} if diverged_baseline else {})
    verdict = verdict_of(variant, baseline)
    assert verdict.text == text
    assert verdict.finding == ('better' if shift < 0 else 'worse')
    if text == 'blocked':
        assert '1 of 6 seeds' in verdict.reasons[0] and 'diverged' in verdict.reasons[0]


@pytest.mark.parametrize('outcome', ['interrupted', 'running', 'failed', analysis.UNMEASURED])
@pytest.mark.parametrize('which', [0, 1])
def test_an_unfinished_run_makes_a_verdict_provisional(outcome, which):
    groups = [group(shifted(shift), **{outcome: None} if n == which else {})
              for n, shift in enumerate((-0.1, 0.0))]  # fmt: skip
    verdict = verdict_of(*groups)
    assert (verdict.text, verdict.finding) == ('provisional', 'better')
    assert f'1 of 6 seeds of {("this architecture", "the baseline")[which]}' in verdict.reasons[0]


def test_unlike_conditions_make_a_verdict_provisional():
    groups = [group(shifted(-0.1)), group(shifted(0.0))]
    verdict = verdict_of(*groups, unlike=lambda group: 'other data')
    assert (verdict.text, verdict.reasons) == ('provisional', ('other data',))


def test_runs_that_repeat_one_another_are_no_evidence():
    same = {(s, s): 3.0 for s in range(3)}
    verdict = verdict_of(group(dict.fromkeys(same, 2.9)), group(same))
    assert (verdict.text, verdict.p_value) == ('not tested', None)
    assert 'repeat one another' in verdict.reasons[0]
    verdict = verdict_of(group({(1, 1): 2.9}), group(same))
    assert verdict.reasons == ('this architecture has 1 finished seed, and a test needs two',)


def test_equivalence_needs_a_margin_and_precision():
    draw = random.Random(1)
    groups = [group({(s, s): 3 + draw.gauss(0, noise) for s in range(5)}) for noise in (1e-3, 1e-3)]
    assert verdict_of(*groups).text == 'not significant'
    assert verdict_of(*groups, margin=0.01).text == 'equivalent'
    assert verdict_of(*groups, margin=1e-5).text == 'not significant'
    # A difference that is real and below the margin is equivalent too; one above is not.
    small, baseline = group(shifted(-0.02)), group(shifted(0.0))
    assert verdict_of(small, baseline).text == 'better'
    assert verdict_of(small, baseline, margin=0.05).text == 'equivalent'
    assert verdict_of(small, baseline, margin=0.01).text == 'better'
    lost = group(shifted(-0.02), diverged=None)
    assert verdict_of(lost, baseline, margin=0.05).text == 'blocked'


def test_a_repeated_run_counts_once_and_divergence_is_not_undone():
    runs = [
        run((1, 1), None, 'interrupted'),
        run((1, 1), 3.0),
        run((1, 1), 2.0),
        run((2, 2), None, 'diverged'),
        run((2, 2), 2.5),
        run((3, 3), None, 'interrupted'),
        run((3, 3), None, 'running'),
    ]
    (merged,) = analysis.group_runs(runs, lambda run: 'one')
    assert merged.losses == {(1, 1): 3.0}
    assert merged.outcomes == {'finished': 1, 'diverged': 1, 'running': 1}


# --- Error rates ---------------------------------------------------------------------------------


def experiment(draw, effects, seeds=5, lose=()):
    """The verdicts on groups with these true differences; the worst 40 % of `lose` diverge."""
    luck = {seed: draw.gauss(2.0, 0.02) for seed in range(seeds)}  # shared by all variants
    groups = []
    for number, effect in enumerate(effects):
        losses = {(s, s): x + draw.gauss(effect, 0.02) for s, x in luck.items()}
        worst = sorted(losses, key=losses.get)[-2 * seeds // 5 :] if number in lose else []
        groups.append(
            Group(
                [run(s, *((None, 'diverged') if s in worst else (x,))) for s, x in losses.items()]
            )
        )
    return analysis.judge(groups, groups[0])


@pytest.mark.parametrize('lose', [(0,), (1,), (0, 1)])
def test_lost_seeds_do_not_make_a_winner(lose):
    draw = random.Random(4)
    trials = 300
    verdicts = [experiment(draw, (0.0, 0.0), lose=lose)[1] for _ in range(trials)]
    for text in ('better', 'worse'):
        # At most 2.5 %, and two and a half standard errors.
        assert sum(verdict.text == text for verdict in verdicts) / trials < 0.048
    blocked = sum(verdict.text == 'blocked' for verdict in verdicts)
    assert blocked / trials > 0.02  # what would have been a false verdict


def test_several_comparisons_are_significant_as_rarely_as_is_said_and_find_a_known_effect():
    """Experiments of four variants, five seeds: 400 alike, 400 with one that truly differs."""
    draw = random.Random(7)
    trials = 400
    falsely = sum(
        any(v.text in ('better', 'worse') for v in experiment(draw, (0.0,) * 4))
        for _ in range(trials)
    )
    assert falsely / trials < 0.06
    # Of a difference between two variants with this much noise each, corrected for three.
    freedom = 4 + 1 / (1 / 3 + 1 / 8)
    effect = 0.02 * 2**0.5 / 5**0.5 * detectable_ratio(freedom, 3)
    hits = sum(experiment(draw, (0, -effect, 0, 0))[1].text == 'better' for _ in range(trials))
    # At least the power, but for three standard errors: the bar of the first test is the highest.
    assert 0.8 - 0.06 < hits / trials < 0.95


def test_a_run_that_blew_up_is_no_noise_of_the_others():
    draw = random.Random(9)
    groups = [
        group({(s, s): 3 + shift + draw.gauss(0, 0.01) for s in range(3)})
        for shift in (0.0, -0.2, 0.1)
    ]
    before = analysis.judge(groups, groups[0])[1].difference
    groups.append(group({(1, 1): 3.0, (2, 2): 31.0, (3, 3): 3.0}))
    groups[-1].members[1].blown_up = True
    assert analysis.judge(groups, groups[0])[1].difference == before
