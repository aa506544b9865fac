"""comparison/analysis.py: verdicts with failed runs, by plain arithmetic and simulation.

benchmarks/verdicts.py has the same simulations at full size.
"""

import random

import pytest
from helpers.run_records import fake_group, fake_run

from comparison import analysis
from comparison.groups import Group, group_runs
from comparison.runs import UNMEASURED
from comparison.significance import detectable_ratio


def shifted(shift, count=5):
    return {(s, s): 3 + 0.01 * s + shift + 0.001 * (-1) ** s * (shift != 0) for s in range(count)}


def verdict_of(variant, baseline, **options):
    return analysis.test_against_baseline([variant, baseline], baseline, **options)[0]


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
def test_diverged_run_blocks_favorable_verdict(shift, diverged_variant, diverged_baseline, text):
    variant = fake_group(shifted(shift), **{'diverged': None} if diverged_variant else {})
    baseline = fake_group(shifted(0.0), **{'diverged': None} if diverged_baseline else {})
    verdict = verdict_of(variant, baseline)
    assert verdict.text == text
    assert verdict.finding == ('better' if shift < 0 else 'worse')
    if text == 'blocked':
        assert '1 of 6 seeds' in verdict.reasons[0] and 'diverged' in verdict.reasons[0]


@pytest.mark.parametrize('outcome', ['interrupted', 'running', 'failed', UNMEASURED])
@pytest.mark.parametrize('which', [0, 1])
def test_unfinished_run_makes_verdict_provisional(outcome, which):
    groups = [fake_group(shifted(shift), **{outcome: None} if n == which else {})
              for n, shift in enumerate((-0.1, 0.0))]  # fmt: skip
    verdict = verdict_of(*groups)
    assert (verdict.text, verdict.finding) == ('provisional', 'better')
    assert f'1 of 6 seeds of {("this architecture", "the baseline")[which]}' in verdict.reasons[0]


def test_differing_conditions_make_verdict_provisional():
    groups = [fake_group(shifted(-0.1)), fake_group(shifted(0.0))]
    verdict = verdict_of(*groups, incomparable=lambda group: 'other data')
    assert (verdict.text, verdict.reasons) == ('provisional', ('other data',))


def test_identical_runs_give_no_test():
    same = {(s, s): 3.0 for s in range(3)}
    verdict = verdict_of(fake_group(dict.fromkeys(same, 2.9)), fake_group(same))
    assert (verdict.text, verdict.test) == ('not tested', None)
    assert 'all seeds gave the same loss' in verdict.reasons[0]
    verdict = verdict_of(fake_group({(1, 1): 2.9}), fake_group(same))
    assert verdict.reasons == ('this architecture has 1 finished seed, and a test needs two',)


def test_equivalence_needs_margin_and_precision():
    draw = random.Random(1)
    groups = [
        fake_group({(s, s): 3 + draw.gauss(0, noise) for s in range(5)}) for noise in (1e-3, 1e-3)
    ]
    assert verdict_of(*groups).text == 'not significant'
    assert verdict_of(*groups, margin=0.01).text == 'equivalent'
    assert verdict_of(*groups, margin=1e-5).text == 'not significant'
    # A significant difference below the margin is equivalent too; one above the margin is not.
    small, baseline = fake_group(shifted(-0.02)), fake_group(shifted(0.0))
    assert verdict_of(small, baseline).text == 'better'
    assert verdict_of(small, baseline, margin=0.05).text == 'equivalent'
    assert verdict_of(small, baseline, margin=0.01).text == 'better'
    lost = fake_group(shifted(-0.02), diverged=None)
    assert verdict_of(lost, baseline, margin=0.05).text == 'blocked'


def test_repeated_run_counts_once_and_keeps_divergence():
    runs = [
        fake_run((1, 1), None, 'interrupted'),
        fake_run((1, 1), 3.0),
        fake_run((1, 1), 2.0),
        fake_run((2, 2), None, 'diverged'),
        fake_run((2, 2), 2.5),
        fake_run((3, 3), None, 'interrupted'),
        fake_run((3, 3), None, 'running'),
    ]
    (merged,) = group_runs(runs, lambda run: 'one')
    assert merged.losses == {(1, 1): 3.0}
    assert merged.outcomes == {'finished': 1, 'diverged': 1, 'running': 1}


# --- Error rates ---------------------------------------------------------------------------------


def experiment(draw, effects, seeds=5, lose=()):
    """The verdicts on groups with these true effects; in `lose` the worst 40 % of runs diverge."""
    luck = {seed: draw.gauss(2.0, 0.02) for seed in range(seeds)}  # shared by all variants
    groups = []
    for number, effect in enumerate(effects):
        losses = {(s, s): x + draw.gauss(effect, 0.02) for s, x in luck.items()}
        worst = sorted(losses, key=losses.get)[-2 * seeds // 5 :] if number in lose else []
        groups.append(
            Group(
                [
                    fake_run(s, *((None, 'diverged') if s in worst else (x,)))
                    for s, x in losses.items()
                ]
            )
        )
    return analysis.test_against_baseline(groups, groups[0])


@pytest.mark.parametrize('lose', [(0,), (1,), (0, 1)])
def test_lost_seeds_give_no_winner(lose):
    draw = random.Random(4)
    trials = 300
    verdicts = [experiment(draw, (0.0, 0.0), lose=lose)[1] for _ in range(trials)]
    for text in ('better', 'worse'):
        # At most 2.5 % plus two and a half standard errors.
        assert sum(verdict.text == text for verdict in verdicts) / trials < 0.048
    blocked = sum(verdict.text == 'blocked' for verdict in verdicts)
    assert blocked / trials > 0.02  # these would have been false verdicts


def test_error_rate_and_power_of_several_comparisons():
    """Experiments with four variants and five seeds: 400 without, 400 with a true difference."""
    draw = random.Random(7)
    trials = 400
    false_positives = sum(
        any(v.text in ('better', 'worse') for v in experiment(draw, (0.0,) * 4))
        for _ in range(trials)
    )
    assert false_positives / trials < 0.06
    # The detectable difference of two variants with this noise, corrected for three comparisons.
    freedom = 4 + 1 / (1 / 3 + 1 / 8)
    effect = 0.02 * 2**0.5 / 5**0.5 * detectable_ratio(freedom, 3)
    hits = sum(experiment(draw, (0, -effect, 0, 0))[1].text == 'better' for _ in range(trials))
    # At least the power minus three standard errors: the first test has the strictest level.
    assert 0.8 - 0.06 < hits / trials < 0.95


def test_blown_up_run_adds_no_noise_to_others():
    draw = random.Random(9)
    groups = [
        fake_group({(s, s): 3 + shift + draw.gauss(0, 0.01) for s in range(3)})
        for shift in (0.0, -0.2, 0.1)
    ]
    before = analysis.test_against_baseline(groups, groups[0])[1].test.difference
    groups.append(fake_group({(1, 1): 3.0, (2, 2): 31.0, (3, 3): 3.0}))
    groups[-1].runs[1].blown_up = True
    assert analysis.test_against_baseline(groups, groups[0])[1].test.difference == before
