"""`capacity_factor`: dropped tokens of a mixture of experts, against a loop from the papers."""

import json
import math
from functools import partial

import jsonschema
import pytest
import torch
from helpers.architectures import gradients, perturbed_model, random_tokens, tiny
from helpers.bit_equality import bit_differences
from helpers.in_process import train_here
from helpers.project import PROJECT
from torch.utils.checkpoint import checkpoint

import interop
from common.errors import UserError
from components.moe import MixtureOfExperts
from model_builder import build_model, training_flops

pytestmark = pytest.mark.usefixtures('one_thread')

MOE = {'ffn_type': 'moe', 'bias': False, 'num_experts': 5, 'experts_per_token': 2}
SHAPE = (3, 7, 16)
SWITCH = {'experts_per_token': 1, 'router_normalize': False}


def mixture(**values) -> MixtureOfExperts:
    return perturbed_model(tiny(**{**MOE, **values})).blocks[0].ffn.train()


def some_input(seed=0) -> torch.Tensor:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    # A common part, so that all tokens like the same experts.
    return (x + 2 * torch.linspace(-1, 1, SHAPE[-1])).requires_grad_()


def expert_output(
    ours: MixtureOfExperts, number: int, token: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The weighted output of one SwiGLU for a token (C,), or that for the weighted token."""

    def linear(layer, x):
        y = layer.weight[number] @ x
        return y if layer.bias is None else y + layer.bias.unflatten(0, (-1, len(y)))[number]

    at_input = ours.weighs_inputs
    gate, up = linear(ours.experts.gate_up, weight * token if at_input else token).chunk(2)
    output = linear(ours.experts.down, torch.nn.functional.silu(gate) * up)
    return output if at_input else weight * output


def switch_loop(ours: MixtureOfExperts, x: torch.Tensor, factor: float, k: int):
    """Switch Transformer, section 2.2, with k experts, for each sequence: an expert with `capacity`
    tokens takes no more; a token gets nothing from an expert that is full.

    -> outputs, and the share of dropped pairs.
    """
    experts, dropped, outputs = ours.num_experts, 0, []
    capacity = math.ceil(round(factor * x.size(1) * k / experts, 9))
    for sequence in x:
        taken = [0] * experts
        for token in sequence:
            scores = torch.softmax(ours.router.weight @ token, dim=-1)
            best = scores.argsort(descending=True)[:k].tolist()
            total = scores[best].sum() if ours.router.normalize else 1.0
            output = torch.zeros_like(token)
            for expert in best:
                if taken[expert] < capacity:
                    taken[expert] += 1
                    weight = scores[expert] / total
                    output = output + expert_output(ours, expert, token, weight)
                else:
                    dropped += 1
            outputs.append(output)
    return torch.stack(outputs).view(x.shape), dropped / (k * len(outputs))


CASES = {
    'top 2': (0.75, 2, {}),
    'few': (0.1, 2, {}),
    'equal load': (1.0, 3, {}),
    'Switch': (1.25, 1, SWITCH),
    'biases': (0.75, 2, {'bias': True}),
    'weighted inputs': (0.75, 2, {'bias': True, 'expert_weights_at': 'input'}),
}


@pytest.mark.parametrize('case', CASES)
def test_outputs_and_gradients_equal_loop(case):
    factor, k, values = CASES[case]
    ours = mixture(**{'capacity_factor': factor, 'experts_per_token': k, **values})
    x = some_input()
    weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    expected, share = switch_loop(ours, x, factor, k)
    (expected * weights).sum().backward()
    expected_gradients, expected_x = gradients(ours), x.grad.clone()
    ours.zero_grad()
    x.grad = None

    y, aux = ours(x)
    (y * weights).sum().backward()
    assert share > 0.05, 'hardly anything is dropped'
    assert aux.metrics['dropped_share'].item() == pytest.approx(share, abs=1e-6)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, expected_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(ours), expected_gradients, rtol=1e-4, atol=1e-5)


def test_capacity_is_rounded_up_exactly():
    def capacity(factor, tokens):
        return mixture(**SWITCH, capacity_factor=factor, num_experts=4).capacity(tokens)

    assert [capacity(1.1, 40), capacity(1.1, 41), capacity(1.0, 6)] == [11, 12, 2]
    # At most all tokens, so that any factor fits a tensor of integers.
    assert [capacity(0.001, 8), capacity(1e-12, 8), capacity(1e308, 4)] == [1, 1, 4]


def test_large_capacity_changes_nothing():
    plain, ours = (perturbed_model(tiny(**MOE, **more)) for more in ({}, {'capacity_factor': 2.5}))
    ours.load_state_dict(plain.state_dict())
    tokens = random_tokens(plain.config, batch=3)
    for model in (plain, ours):
        loss, count, aux = model.train()(tokens, tokens.roll(-1, dims=1))
        (loss / count + aux.loss).backward()
    assert aux.metrics['dropped_share'].eq(0).all()
    assert bit_differences(gradients(ours), gradients(plain)) == []


def test_evaluation_drops_nothing():
    ours, plain = mixture(capacity_factor=0.2).eval(), mixture()
    plain.load_state_dict(ours.state_dict())
    x = some_input()
    y, aux = ours(x)
    assert torch.equal(y, plain(x)[0]) and aux.metrics['dropped_share'] == 0
    assert not torch.equal(y, ours.train()(x)[0])


def test_auxiliary_loss_and_counts_are_those_before_dropping():
    values = {'router_selection_bias': True, 'router_z_loss': 0.1}
    dropping, plain = mixture(capacity_factor=0.2, **values), mixture(**values)
    plain.load_state_dict(dropping.state_dict())
    aux, expected = dropping(some_input())[1], plain(some_input())[1]
    assert aux.metrics.pop('dropped_share') > 0.5
    assert torch.equal(aux.loss, expected.loss) and torch.equal(aux.counts[0], expected.counts[0])
    assert bit_differences(aux.metrics, expected.metrics) == []


def test_output_depends_on_earlier_tokens_of_its_sequence_only():
    ours = mixture(capacity_factor=0.4)
    x = some_input().detach()
    y = ours(x)[0]
    changed = x.clone()
    changed[1, 3:] = -changed[1, 3:]
    differs = ((ours(changed)[0] - y).abs() > 1e-5).any(dim=-1)
    assert not differs[[0, 2]].any() and not differs[1, :3].any() and differs[1, 3:].any()
    changed = x.clone()
    changed[1, :3] = -changed[1, :3]  # other experts, so that there is room for later tokens
    assert ((ours(changed)[0] - y).abs() > 1e-3)[1, 3:].any()
    for number, sequence in enumerate(x):
        torch.testing.assert_close(ours(sequence[None])[0][0], y[number])


def results(model, tokens):
    loss, count, aux = model.train()(tokens, tokens.roll(-1, dims=1))
    (loss / count + aux.loss).backward()
    return loss.detach(), aux.metrics, gradients(model)


def test_recomputation_drops_the_same():
    config = tiny(**MOE, capacity_factor=0.5)
    tokens = random_tokens(config, batch=3)
    model = perturbed_model(config)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    expected = results(perturbed_model(config), tokens)
    assert expected[1]['dropped_share'].min() > 0
    torch.testing.assert_close(results(model, tokens), expected)


@pytest.mark.slow
def test_compiles_to_one_graph():
    config = tiny(**MOE, capacity_factor=0.7)
    tokens = random_tokens(config, batch=3)
    expected = results(perturbed_model(config), tokens)
    model = perturbed_model(config)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(results(model, tokens), expected)


def test_drops_the_same_under_autocast():
    ours = mixture(capacity_factor=0.5)
    y, aux = ours(some_input())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        short, short_aux = ours(some_input())
    assert bit_differences(aux.metrics, short_aux.metrics) == []
    assert short.dtype == torch.bfloat16
    assert 0 < torch.linalg.norm(short.float() - y) / torch.linalg.norm(y) < 0.02


def test_flops_name_and_hash():
    plain, ours = tiny(**MOE), tiny(**MOE, capacity_factor=1.25)
    assert ours.name.replace('-Capacity1.25', '') == plain.name != ours.name
    assert tiny(**MOE, capacity_factor=None).hash == plain.hash != ours.hash
    counts = [training_flops(build_model(config)) for config in (plain, ours)]
    assert counts[0]['per_token'] == counts[1]['per_token']
    with pytest.raises(UserError, match=r'capacity_factor=0.*above 0'):
        tiny(**MOE, capacity_factor=0.0)


@pytest.mark.optional
def test_export_leaves_it_out():
    """Weights and evaluation do not depend on it."""
    config = tiny(arch_preset='mixtral', num_experts=4)
    fields = interop.convert_config(config.replace(capacity_factor=1.5)).fields
    assert fields == interop.convert_config(config).fields


TRAINED = {**MOE, 'capacity_factor': 0.8, 'expert_d_ff': 16, 'eval_interval': 2, 'max_iters': 4}


def test_record_has_the_share_of_training_and_resume_is_bit_equal(tiny_dataset, tmp_path):
    masks, within = [], MixtureOfExperts.within_capacity

    def seen(self, *arguments):
        fits = within(self, *arguments)
        masks.append(fits)
        return fits

    options = {**TRAINED, 'decay_lr': False, 'log_interval': 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixtureOfExperts, 'within_capacity', seen)
        whole = train_here(tiny_dataset, tmp_path / 'whole', **options)
    layers, micro_batches = 2, 2
    masks = masks[-4 * layers * micro_batches :]  # the first ones are the start's
    for number, entry in enumerate(whole.record['training_iterations']):
        here = masks[number * layers * micro_batches :][: layers * micro_batches]
        share = 1 - sum(mask.float().mean().item() for mask in here) / len(here)
        assert entry['readings']['dropped_share'] == pytest.approx(share, rel=1e-5)
        assert share > 0.05
    schema = json.loads((PROJECT / 'records/record_schema.json').read_text())
    jsonschema.Draft202012Validator(schema).validate(whole.record)

    train_here(tiny_dataset, tmp_path / 'out', **options | {'max_iters': 2})
    again = train_here(tiny_dataset, tmp_path / 'out', init_from='resume', max_iters=4)
    assert bit_differences(again.saved_weights(), whole.saved_weights()) == []
    assert again.losses == whole.losses
