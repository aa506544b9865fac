"""components/moe.py in a run: metrics of the load balance in the record and on the console."""

import json
import math

import jsonschema
import pytest
import torch
from helpers.in_process import train_here
from helpers.project import PROJECT

from components.moe import MixtureOfExperts

pytestmark = pytest.mark.usefixtures('one_thread')


def by_hand(router_logits: list[torch.Tensor], layers: int) -> dict[str, float]:
    """Expected metrics of router logits (N, experts) per layer, with 2 experts per token."""
    busiest, effective, idle, balances, zs = [], [], 0, [], []
    for layer in range(layers):
        counts, experts = None, router_logits[0].size(1)
        for logits in router_logits[layer::layers]:
            here, probability = [0] * experts, [0.0] * experts
            for row in logits.double().tolist():
                total = sum(map(math.exp, row))
                for number in sorted(range(experts), key=lambda n: -row[n])[:2]:
                    here[number] += 1
                probability = [p + math.exp(v) / total for p, v in zip(probability, row)]
                zs.append(math.log(total) ** 2)
            n = len(logits)
            balances.append(experts * sum(c * p for c, p in zip(here, probability)) / n / n)
            counts = [a + b for a, b in zip(counts or [0] * experts, here)]
        shares = [count / sum(counts) for count in counts]
        busiest.append(experts * max(shares))
        effective.append(math.exp(-sum(s * math.log(s) for s in shares if s)))
        idle += shares.count(0.0)
    return {
        'busiest_expert': sum(busiest) / layers,
        'busiest_expert_worst_layer': max(busiest),
        'effective_experts': sum(effective) / layers,
        'idle_experts': idle,
        'load_balance_loss': sum(balances) / len(balances),
        'router_z_loss': sum(zs) / len(zs),
    }


TRAINED = {
    'ffn_type': 'moe',
    'num_experts': 6,
    'expert_d_ff': 16,
    'max_iters': 5,
    'log_interval': 2,
    'eval_interval': 2,
    'learning_rate': 0.01,
}


@pytest.fixture(scope='module')
def trained(tiny_dataset, tmp_path_factory):
    """A run of five iterations, and the router logits of each training pass."""
    router_logits, aux_output = [], MixtureOfExperts.aux_output

    def recorded(self, routing, *others):
        if self.training and torch.is_grad_enabled():  # not in the check at the start
            router_logits.append(routing.logits.detach())
        return aux_output(self, routing, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixtureOfExperts, 'aux_output', recorded)
        run = train_here(tiny_dataset, tmp_path_factory.mktemp('moe'), **TRAINED)
    return run, router_logits


def test_record_has_balance_since_last_log(trained):
    run, router_logits = trained
    entries = run.record['training_iterations']
    assert [entry['iter'] for entry in entries] == [0, 2, 4]
    a_step = 2 * 2  # two micro-batches of two layers
    assert len(router_logits) == 5 * a_step  # and none from an evaluation
    for entry, first, last in zip(entries, (0, 1, 3), (1, 3, 5)):
        expected = by_hand(router_logits[first * a_step : last * a_step], layers=2)
        assert entry['readings'] == pytest.approx(expected, rel=1e-4)


def test_record_matches_schema_and_counts_active_parameters(trained):
    run, _ = trained
    schema = json.loads((PROJECT / 'records/record_schema.json').read_text())
    jsonschema.Draft202012Validator(schema).validate(run.record)
    model = run.record['startup_info']['model']
    expert = 3 * 32 * 16
    assert model['total_params'] - model['active_params'] == 2 * (6 - 2) * (expert + 3 * 16 + 16)


def test_aux_loss_acts_but_is_not_reported(trained, tiny_dataset, tmp_path):
    run, _ = trained
    heavy = train_here(tiny_dataset, tmp_path, **TRAINED, load_balance_weight=10.0)
    assert heavy.losses[0] == run.losses[0]
    assert heavy.losses[-1] != run.losses[-1]
    busiest = [r.record['training_iterations'][-1]['readings'] for r in (heavy, run)]
    assert busiest[0]['load_balance_loss'] < busiest[1]['load_balance_loss']


@pytest.mark.slow
def test_console_shows_moe_metrics(train):
    arguments = [f'--{key}={value}' for key, value in TRAINED.items()]
    out = train(*arguments, '--max_iters=1', '--log_style=block', '--report=full').stdout
    assert 'Active: ' in out and 'for each token' in out
    assert 'Busiest Expert=' in out and 'Idle Experts=' in out
