"""comparison/costs.py: curves, losses at equal cost and Pareto fronts, by plain arithmetic."""

import random
import types

import numpy as np
import pytest

from comparison import costs, runs
from comparison.costs import loss_at, on_pareto_front, same_cost
from comparison.groups import Group


def record_of(evaluations):
    """A record with evaluations (iter, loss); an iteration took half a second."""
    return {
        'startup_info': {'data': {'tokens_per_iter': 100}, 'flops': {'per_token': 7.0}},
        'eval_steps': [
            {'iter': i, 'val_loss': loss, 'train_seconds': i / 2} for i, loss in evaluations
        ],
        'events': [],
        'summary': {},
    }


def test_curve_has_cost_of_each_loss():
    record = record_of([(0, 9.0), (20, 5.0), (30, None), (40, 4.0)])
    measured = [e for e in runs.trained_evaluations(record) if e['val_loss'] is not None]
    curve = runs.loss_curve(measured, 100, 7.0)
    assert [(p.iter, p.tokens, p.flops, p.seconds, p.loss) for p in curve] == [
        (20, 2000, 14000.0, 10.0, 5.0),
        (40, 4000, 28000.0, 20.0, 4.0),
    ]


def test_loss_at_cost_interpolates_linearly():
    draw = random.Random(0)
    costs = sorted(draw.uniform(1, 100) for _ in range(8))
    curve = [(cost, draw.uniform(2, 5)) for cost in costs]
    for amount in [costs[0], costs[-1], *(draw.uniform(costs[0], costs[-1]) for _ in range(50))]:
        expected = np.interp(amount, costs, [loss for _, loss in curve])
        assert loss_at(curve, amount) == pytest.approx(expected)
    assert loss_at(curve, costs[0] - 0.1) is None
    assert loss_at(curve, costs[-1] + 0.1) is None


def test_pareto_front_matches_brute_force():
    draw = random.Random(1)
    points = [(draw.randint(1, 9), draw.randint(0, 9)) for _ in range(40)]
    points[3] = None
    fronts = on_pareto_front([point and ([point[0]], point[1]) for point in points])
    for point, on_front in zip(points, fronts):
        beaten = point is None or any(
            other and other[0] <= point[0] and other[1] <= point[1] and other != point
            for other in points
        )
        assert on_front == (not beaten)
    assert any(fronts)


def test_loss_by_position_is_seed_mean_of_last_record():
    def run(scale):
        record = record_of([(0, 9.0), (20, 5.0), (40, 4.0), (50, 3.9)])
        for entry in record['eval_steps'][:3]:  # the last evaluation did not measure it
            position_losses = [(0, 1), (1, 2), (2, 4)] if entry['iter'] else [(0, 4)]
            entry['diagnostics'] = {
                'val_loss_by_position': [
                    {'from': a, 'to': b, 'loss': scale * (entry['iter'] + a)}
                    for a, b in position_losses
                ]
            }
        return types.SimpleNamespace(
            outcome='finished', position_losses=runs.losses_by_position(record)
        )

    assert run(1).position_losses == [(0, 1, 40), (1, 2, 41), (2, 4, 42)]
    both = Group([run(1), run(2)])
    assert costs.mean_loss_by_position(both) == {(0, 1): 60, (1, 2): 61.5, (2, 4): 63}
    both.runs[1].position_losses.pop()
    assert costs.mean_loss_by_position(both) == {(0, 1): 60, (1, 2): 61.5}
    assert runs.losses_by_position(record_of([(0, 9.0), (20, 5.0)])) == []


def test_stability_counts_events():
    record = record_of([])
    record['events'] = [{'event': 'rollback'}, {'event': 'note'}]
    record['summary'] = {'loss_spikes': 2, 'nonfinite_updates': 3, 'gradient_growth': 4.0}
    assert runs.training_stability(record) == (2, 3, 1, 4.0)


def run(loss, outcome='finished', **figures):
    figures = {'causal_flops': None, 'peak_memory_gb': None, 'curve': []} | figures
    config = {'seed': loss, 'data_seed': loss}
    return types.SimpleNamespace(val_loss=loss, outcome=outcome, config=config, **figures)


def test_costs_within_noise_make_no_front():
    memory = [(3.0, [0.3586, 0.3602]), (2.9, [0.3590, 0.3601]), (3.1, [0.3588])]
    groups = [Group([run(loss, peak_memory_gb=gb) for gb in amounts]) for loss, amounts in memory]
    fronts = {'M': costs.FRONTS['M']}
    assert costs.front_letters(groups, fronts) == ['', '', '']
    # With a fourth group that needs clearly less, the front is it and the best of the others.
    groups.append(Group([run(3.2, peak_memory_gb=0.2)]))
    assert costs.front_letters(groups, fronts) == ['', 'M', '', 'M']


def test_group_with_diverged_run_is_on_no_front():
    groups = [
        Group([run(2.0, causal_flops=1e9), run(2.1, 'diverged', causal_flops=1e8)]),
        Group([run(3.0, causal_flops=2e9)]),
        Group([run(2.5, causal_flops=3e9)]),
    ]
    assert costs.front_letters(groups, {'F': costs.FRONTS['F']}) == ['', 'F', 'F']


def test_same_cost_if_overlapping_or_close():
    assert same_cost([1.0, 2.0], [1.9, 3.0])
    assert same_cost([1.0], [1.009])
    assert not same_cost([1.0], [1.02])
