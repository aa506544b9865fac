"""The selection bias of routers in training: its updates, checkpoints and strategies."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.bit_equality import bit_differences
from helpers.in_process import train_here
from helpers.project import PROJECT, TINY_RUN

from components.router import Router
from optim.step import GuardedOptimizer

MIXTURE = {
    'arch_preset': 'llama',
    'ffn_type': 'moe',
    'num_experts': 6,
    'expert_d_ff': 16,
    'router_score': 'sigmoid',
    'router_selection_bias': True,
    'router_bias_update': 0.01,
    'eval_interval': 4,
    'learning_rate': 0.01,
}
LAYERS = [f'blocks.{layer}.ffn.router.selection_bias' for layer in range(2)]


def biases(run) -> dict[str, torch.Tensor]:
    """The biases in the newest checkpoint."""
    saved = run.saved_weights()
    return {name: saved[name] for name in LAYERS}


@pytest.fixture(scope='module')
def trained(tiny_dataset, tmp_path_factory):
    """A run of four iterations, and the choices of each training pass."""
    choices = []
    choose = Router.choose

    def seen(self, scores):
        chosen = choose(self, scores)
        if self.training and torch.is_grad_enabled():
            choices.append(chosen)
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, 'choose', seen)
        run = train_here(tiny_dataset, tmp_path_factory.mktemp('router'), **MIXTURE)
    return run, choices


def test_bias_equals_loop(trained):
    run, choices = trained
    (iterations, micro_batches, layers), saved = (4, 2, 2), biases(run)
    choices = choices[-iterations * micro_batches * layers :]  # the first ones are the start's
    for layer, name in enumerate(LAYERS):
        bias = torch.zeros(6)
        for iteration in range(iterations):
            load = [0] * 6
            for micro_batch in range(micro_batches):
                chosen = choices[(iteration * micro_batches + micro_batch) * layers + layer]
                for expert in chosen.flatten().tolist():
                    load[expert] += 1
            assert sum(load) == 2 * 2 * 32 * 2  # micro-batches, sequences, tokens, experts
            for expert in range(6):
                difference = sum(load) / 6 - load[expert]
                bias[expert] += 0.01 * ((difference > 0) - (difference < 0))
        torch.testing.assert_close(saved[name], bias)
        assert saved[name].abs().max() > 0.015, 'the bias hardly moved'


def test_evaluations_and_recomputation_are_not_counted(trained, tiny_dataset, tmp_path):
    run, _ = trained
    options = {**MIXTURE, 'eval_interval': 1, 'activation_checkpointing': 'full'}
    again = train_here(tiny_dataset, tmp_path, **options)
    assert bit_differences(biases(again), biases(run)) == []


def test_resume_is_bit_equal(trained, tiny_dataset, tmp_path):
    options = {**MIXTURE, 'decay_lr': False, 'eval_interval': 2}
    whole = train_here(tiny_dataset, tmp_path / 'whole', **options)
    train_here(tiny_dataset, tmp_path / 'out', **options, max_iters=2)
    again = train_here(tiny_dataset, tmp_path / 'out', init_from='resume', max_iters=4)
    assert biases(whole)[LAYERS[0]].any()
    assert bit_differences(again.saved_weights(), whole.saved_weights()) == []
    assert again.losses == whole.losses


def test_skipped_update_changes_no_bias(tiny_dataset, tmp_path, monkeypatch):
    step = GuardedOptimizer.step

    def first_is_bad(self, learning_rate, loss, measured):
        losses.append(loss * torch.nan if not losses else loss)
        return step(self, learning_rate, losses[-1], measured)

    losses = []
    monkeypatch.setattr(GuardedOptimizer, 'step', first_is_bad)
    run = train_here(tiny_dataset, tmp_path, **MIXTURE, max_iters=2, on_nonfinite='skip')
    for bias in biases(run).values():
        assert bias.abs().max() == pytest.approx(0.01)  # of one update


@pytest.mark.slow
def test_compiled_blocks_have_the_same_bias(trained, tiny_dataset, tmp_path):
    compiled = train_here(tiny_dataset, tmp_path, **MIXTURE, compile=True)
    for name, bias in biases(compiled).items():
        torch.testing.assert_close(bias, biases(trained[0])[name])


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.skipif(sys.platform != 'linux', reason='ranks are forked')
def test_any_strategy_has_the_same_bias(trained, tiny_dataset, tmp_path):
    """With two ranks; a checkpoint of each strategy is resumed by the next one."""
    options = {**TINY_RUN, **MIXTURE, 'dataset': str(tiny_dataset), 'log_style': 'line'}
    strategies = {'ddp': {}, 'zero1': {'use_zero1': True}, 'fsdp': {'use_fsdp': True}}
    runs = [
        {'name': name, 'options': {**options, 'out_dir': str(tmp_path / name), **values}}
        for name, values in strategies.items()
    ]
    off = {'use_zero1': False, 'use_fsdp': False, 'init_from': 'resume', 'max_iters': 6}
    resumed = {'name': 'resumed', 'options': {**runs[2]['options'], **off}}
    (tmp_path / 'plan.json').write_text(json.dumps([(2, runs), (1, [resumed])]))
    driver = PROJECT / 'tests/helpers/rank_driver.py'
    subprocess.run(
        [sys.executable, driver, tmp_path / 'plan.json', tmp_path],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(PROJECT)},
        check=True,
        timeout=300,
    )
    expected = biases(trained[0])
    for name in strategies:
        ranks = [torch.load(tmp_path / f'{name}.{rank}.pt', weights_only=True) for rank in range(2)]
        assert [rank['code'] for rank in ranks] == [0, 0]
        for rank in ranks:
            assert bit_differences(rank['biases'], expected) == [], name
    assert torch.load(tmp_path / 'resumed.0.pt', weights_only=True)['code'] == 0
