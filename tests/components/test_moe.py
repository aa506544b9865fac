"""components/moe.py: against transformers' classes, simple loops and formulas."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.architectures import gradients, perturbed_model, random_tokens, tiny
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from components.moe import ExpertGroups, ExpertLinear, MixtureOfExperts, grouped_mm
from components.weight_initialization import initialize
from model_builder import build_model, count_parameters, training_flops
from model_config import FFN_REGISTRY
from training.setup import component_notes

pytestmark = pytest.mark.usefixtures('one_thread')

MOE = {'ffn_type': 'moe', 'bias': False, 'num_experts': 5, 'experts_per_token': 2}


def mixture(**values) -> MixtureOfExperts:
    """The first mixture of a tiny model."""
    model = perturbed_model(tiny(**{**MOE, **values}))
    return next(m for m in model.modules() if isinstance(m, MixtureOfExperts))


def some_input(rows=7, width=16, seed=0):
    x = torch.randn(3, rows, width, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_()


def output_and_gradients(module, x):
    """Gradients of a weighted sum of the elements, by parameter, and of x."""
    x.grad = None
    y = module(x)
    y = y[0] if isinstance(y, tuple) else y
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    (y * weights).sum().backward()
    return y.detach(), gradients(module), x.grad


# --- Transformers' own ----------------------------------------------------------------------------


def mixtral(ours):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    return MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=16,
            intermediate_size=24,
            num_local_experts=ours.num_experts,
            num_experts_per_tok=ours.experts_per_token,
        )
    )


def deepseek_v2(ours):
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    return DeepseekV2Moe(
        DeepseekV2Config(
            hidden_size=16,
            num_attention_heads=2,
            moe_intermediate_size=24,
            n_routed_experts=ours.num_experts,
            num_experts_per_tok=ours.experts_per_token,
            n_shared_experts=2,
            topk_method='greedy',
            routed_scaling_factor=1.7,
        )
    )


def deepseek_v3(ours):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    return DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=16,
            moe_intermediate_size=24,
            n_routed_experts=ours.num_experts,
            num_experts_per_tok=ours.experts_per_token,
            n_shared_experts=2,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        )
    )


def qwen2_moe(ours):
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    return Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(
            hidden_size=16,
            moe_intermediate_size=24,
            num_experts=ours.num_experts,
            num_experts_per_tok=ours.experts_per_token,
            shared_expert_intermediate_size=48,
            norm_topk_prob=True,
        )
    )


def as_ours(tensors: dict) -> dict:
    """transformers' weights under our names, with gate and up-projection of the shared expert."""
    named = {
        'router.weight': tensors['gate.weight'],
        'experts.gate_up.weight': tensors['experts.gate_up_proj'],
        'experts.down.weight': tensors['experts.down_proj'],
    }
    for shared in ('shared_expert', 'shared_experts'):
        if f'{shared}.up_proj.weight' in tensors:
            both = [tensors[f'{shared}.{half}_proj.weight'] for half in ('gate', 'up')]
            named['shared.gate_up.weight'] = torch.cat(both)
            named['shared.down.weight'] = tensors[f'{shared}.down_proj.weight']
    if 'shared_expert_gate.weight' in tensors:
        named['shared_gate.weight'] = tensors['shared_expert_gate.weight']
    return named


@pytest.mark.parametrize(
    ('make', 'values'),
    [
        (mixtral, {}),
        (mixtral, {'num_experts': 8, 'experts_per_token': 3}),
        (deepseek_v2, {'router_normalize': False, 'router_scale': 1.7, 'shared_experts': 2}),
        (deepseek_v3, {'router_score': 'sigmoid', 'router_scale': 2.5, 'shared_experts': 2}),
        (qwen2_moe, {'shared_experts': 2, 'shared_gate': True}),
    ],
    ids=['mixtral', 'mixtral-8-3', 'deepseek-v2', 'deepseek-v3', 'qwen2-moe'],
)
def test_moe_matches_transformers(make, values):
    ours = mixture(expert_d_ff=24, **values)
    theirs, x = make(ours), some_input()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.4, generator=torch.Generator().manual_seed(1))
    ours.load_state_dict(as_ours(dict(theirs.named_parameters())))
    y, grads, grad_x = output_and_gradients(ours, x)
    their_y, their_grads, their_grad_x = output_and_gradients(theirs, x)
    torch.testing.assert_close(y, their_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_x, their_grad_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, as_ours(their_grads), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('chosen', [1, 2, 3])
def test_load_balance_loss_matches_transformers(chosen):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    ours = mixture(experts_per_token=chosen, router_normalize=chosen > 1, load_balance_weight=0.5)
    x = some_input()
    logits = torch.nn.functional.linear(x, ours.router.weight).flatten(0, 1)
    theirs = load_balancing_loss_func((logits,), ours.num_experts, chosen)
    loss, readings, _ = ours(x)[1]
    torch.testing.assert_close(readings['load_balance_loss'], theirs)
    torch.testing.assert_close(loss, 0.5 * theirs)
    (expected,) = torch.autograd.grad(theirs, ours.router.weight)
    (grad,) = torch.autograd.grad(loss, ours.router.weight)
    torch.testing.assert_close(2 * grad, expected)


def test_router_z_loss_formula():
    ours = mixture(load_balance_weight=0.0, router_z_loss=0.25)
    x = some_input()
    loss, readings, _ = ours(x)[1]
    rows = (x.flatten(0, 1).double() @ ours.router.weight.double().T).tolist()
    z = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in rows) / len(rows)
    assert readings['router_z_loss'].item() == pytest.approx(z, rel=1e-5)
    assert loss.item() == pytest.approx(0.25 * z, rel=1e-5)


# --- A plain loop ---------------------------------------------------------------------------------


def one_expert(ours: MixtureOfExperts, number: int, config):
    """Expert `number` as a dense network with the mixture's weights."""
    dense = FFN_REGISTRY[config.expert_ffn](config, 0, config.expert_d_ff)
    for name, parameter in list(dense.named_parameters()):
        stack = ours.experts.get_parameter(name).view(config.num_experts, *parameter.shape)
        place, _, leaf = name.rpartition('.')
        delattr(dense.get_submodule(place), leaf)
        setattr(dense.get_submodule(place), leaf, stack[number])
    return lambda x: dense(x)[0]


def looped(ours: MixtureOfExperts, x, config):
    """Reference: token by token, choice by choice."""
    weighs_inputs = config.expert_weights_at == 'input'
    experts = [one_expert(ours, number, config) for number in range(config.num_experts)]
    out = []
    for token in x.flatten(0, 1):
        scores = torch.softmax(ours.router(token), dim=-1)
        best = scores.argsort(descending=True)[: config.experts_per_token].tolist()
        total = sum(scores[number] for number in best)
        weights = {number: scores[number] / total for number in best}
        if weighs_inputs:
            out.append(sum(experts[n](weight * token[None])[0] for n, weight in weights.items()))
        else:
            out.append(sum(weight * experts[n](token[None])[0] for n, weight in weights.items()))
    return torch.stack(out).view(x.shape)


EXPERTS = [name for name in FFN_REGISTRY if name not in ('moe', 'none')]


@pytest.mark.parametrize('place', ['output', 'input'])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('expert', EXPERTS)
def test_any_ffn_can_be_expert(expert, bias, place):
    weights = {'expert_weights_at': place}
    config = tiny(**{**MOE, 'expert_ffn': expert, 'bias': bias, 'd_ff': 24, **weights})
    ours, x = perturbed_model(config).blocks[0].ffn, some_input()
    y, grads, grad_x = output_and_gradients(ours, x)
    ours.zero_grad()
    their_y, their_grads, their_grad_x = output_and_gradients(
        type('Loop', (torch.nn.Module,), {'forward': lambda self, x: looped(ours, x, config)})(), x
    )
    torch.testing.assert_close(y, their_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_x, their_grad_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads, gradients(ours), rtol=1e-4, atol=1e-5)
    assert their_grads == {} and len(grads) == (5 if bias else 3)


@pytest.mark.parametrize('values', [{}, {'router_normalize': False}, {'router_score': 'sigmoid'}])
def test_single_expert_equals_dense_ffn(values):
    model = perturbed_model(tiny(**{**MOE, 'num_experts': 1, 'experts_per_token': 1, **values}))
    dense = build_model(tiny(ffn_type='swiglu', bias=False), device='cpu')
    for block, moe in zip(dense.blocks, model.blocks):
        with torch.no_grad():
            block.load_state_dict(
                {
                    name: moe.state_dict()[name.replace('ffn.', 'ffn.experts.')].view(p.shape)
                    for name, p in block.named_parameters()
                }
            )
    for part in ('token_embedding', 'position_encoding', 'final_norm'):
        getattr(dense, part).load_state_dict(getattr(model, part).state_dict())
    tokens = random_tokens(model.config, batch=3)
    torch.testing.assert_close(model(tokens), dense(tokens))


def test_idle_expert_has_zero_gradient():
    ours = mixture(num_experts=8, experts_per_token=1, router_normalize=False)
    x = some_input(rows=1)  # three tokens
    _, grads, _ = output_and_gradients(ours, x)
    idle = ours(x)[1].metrics['expert_load'] == 0
    assert 5 <= idle.sum() < 8
    for name in ('experts.gate_up.weight', 'experts.down.weight'):
        sizes = grads[name].abs().amax(dim=(1, 2))
        assert torch.equal(sizes == 0, idle), name


def test_grouped_mm_opcheck():
    """torch's operator checks: schema, gradient, shapes on the meta device, tracing."""
    a = torch.randn(9, 16, requires_grad=True)
    b = torch.randn(3, 16, 8, requires_grad=True)
    ends = torch.tensor([4, 4, 9], dtype=torch.int32)
    torch.library.opcheck(grouped_mm, (a, b, ends))
    expected = torch.cat([a[:4] @ b[0], a[4:] @ b[2]])
    torch.testing.assert_close(grouped_mm(a, b, ends), expected)


def test_no_copy_of_the_experts_is_saved():
    """Under autocast the backward pass keeps the fp32 weights themselves."""
    layer = ExpertLinear(3, 16, 8, bias=False)
    torch.nn.init.normal_(layer.weight)
    x, saved = torch.randn(9, 16, requires_grad=True), []
    groups = ExpertGroups(torch.tensor([4, 4, 9], dtype=torch.int32), torch.empty(0))
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with keep, torch.autocast('cpu', torch.bfloat16):
        y = layer(x, groups)
    (weight,) = [t for t in saved if t.dim() == 3]
    assert weight.data_ptr() == layer.weight.data_ptr() and y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    gradient = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x, groups).square().sum().backward()
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, layer.weight.grad, rtol=0.05, atol=0.5)


@pytest.mark.parametrize(
    ('device', 'dtype', 'capability', 'noted'),
    [
        ('cpu', 'bfloat16', None, False),
        ('cuda', 'bfloat16', (9, 0), False),
        ('cuda', 'bfloat16', (10, 3), False),
        ('cuda', 'float16', (9, 0), True),
        ('cuda', 'bfloat16', (8, 0), True),
        ('cuda', 'bfloat16', (12, 0), True),
    ],
)
def test_products_without_a_kernel_are_noted(device, dtype, capability, noted, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    config, device = tiny(**MOE), torch.device(device)
    notes = MixtureOfExperts.training_notes(config, device, dtype)
    assert [dtype in note for note in notes] == [True] * noted
    run = SimpleNamespace(eval_only=False, dtype=dtype)
    settings = SimpleNamespace(run=run, architecture=config)
    assert component_notes(settings, device) == notes


# --- What it costs --------------------------------------------------------------------------------

SHARED = {'shared_experts': 1, 'dense_layers': 1, 'expert_d_ff': 24, 'd_ff': 40, 'n_layer': 3}


def test_moe_flops_match_loop_and_formula():
    config = tiny(**MOE, expert_d_ff=24)
    ours, x = perturbed_model(config).blocks[0].ffn, some_input().detach()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        looped(ours, x, config)
    rows = x.numel() // 16
    assert ours.flops(rows, causal=False) == {'ffn': counter.get_total_flops()}
    router, expert = 2 * 16 * 5, 2 * 3 * 16 * 24
    assert ours.flops(rows, causal=True) == {'ffn': rows * (router + 2 * expert)}
    inputs = config.replace(expert_weights_at='input')
    assert build_model(inputs).blocks[0].ffn.flops(rows, True) == ours.flops(rows, True)
    assert count_parameters(build_model(inputs)) == count_parameters(build_model(config))


def test_moe_flops_with_shared_experts_and_dense_layers():
    config = tiny(**MOE, **SHARED)
    router, expert, dense = 2 * 16 * 5, 2 * 3 * 16 * 24, 2 * 3 * 16 * 40
    per_token = dense + 2 * (router + (2 + 1) * expert)
    assert training_flops(build_model(config))['breakdown']['ffn'] == 3 * per_token


def test_gate_of_shared_experts_costs_a_vector():
    plain = tiny(**MOE, **SHARED)
    gated = plain.replace(shared_gate=True)
    assert plain.hash != gated.hash and gated.name == plain.name.replace('+1', '+1Gated')
    more = [training_flops(build_model(config))['breakdown']['ffn'] for config in (plain, gated)]
    assert more[1] - more[0] == 3 * 2 * (2 * 16)  # in 2 of 3 layers
    counts = [count_parameters(build_model(config)) for config in (plain, gated)]
    for key in ('total_params', 'active_params'):
        assert counts[1][key] - counts[0][key] == 2 * 16


def test_active_parameters():
    counted = count_parameters(build_model(tiny(**MOE, **SHARED)))
    expert, dense, router = 3 * 16 * 24, 3 * 16 * 40, 5 * 16
    assert counted['components']['ffn'] == dense + 2 * (router + (5 + 1) * expert)
    assert counted['total_params'] - counted['active_params'] == 2 * (5 - 2) * expert
    # With biases: 24 + 24 of gate and up-projection, 16 of the down-projection.
    biased = count_parameters(build_model(tiny(**{**MOE, 'bias': True}, **SHARED)))
    assert biased['total_params'] - biased['active_params'] == 2 * 3 * (expert + 24 + 24 + 16)
    dense = count_parameters(build_model(tiny(ffn_type='swiglu')))
    assert dense['total_params'] == dense['active_params']


def test_dense_layers_come_first_with_dense_width():
    blocks = build_model(tiny(**MOE, **SHARED)).blocks
    assert [type(block.ffn).__name__ for block in blocks] == ['SwiGLU', *['MixtureOfExperts'] * 2]
    assert blocks[0].ffn.down.in_features == 40
    assert blocks[1].ffn.experts.down.weight.shape == (5, 16, 24)
    assert blocks[1].ffn.shared.down.in_features == 24


# --- Beginnings and optimizers --------------------------------------------------------------------


def test_experts_are_initialized_like_dense_ffn():
    config = tiny(**MOE, n_embd=64, expert_d_ff=256)
    model = build_model(config)
    model.to_empty(device='cpu')
    initialize(model, seed=1)
    experts = model.blocks[0].ffn.experts
    dense = build_model(tiny(ffn_type='swiglu', n_embd=64, d_ff=256), 'cpu', seed=1).blocks[0].ffn
    for name in ('gate_up.weight', 'down.weight'):
        stack, one = experts.get_parameter(name), dense.get_parameter(name)
        torch.testing.assert_close(stack.std(dim=(1, 2)), one.std().expand(5), rtol=0.05, atol=0)
        assert stack.flatten(1).unique(dim=0).size(0) == 5


def test_expert_matrices_for_optimizers():
    block = build_model(tiny(**MOE, expert_d_ff=24, shared_experts=1)).blocks[0]
    experts = block.ffn.experts
    assert experts.matrices() == {experts.gate_up.weight: (24, 24), experts.down.weight: (16,)}
    assert experts.residual_weights() == [experts.down.weight]
    assert block.ffn.matrices() == {} and block.ffn.residual_weights() == []


def test_expert_biases_do_not_decay():
    experts = build_model(tiny(**{**MOE, 'bias': True})).blocks[0].ffn.experts
    assert {p.dim() for layer in (experts.gate_up, experts.down) for p in [layer.bias]} == {1}
    assert isinstance(experts.down, ExpertLinear)


# --- Precision, compilation, recomputation --------------------------------------------------------


def test_router_is_fp32_under_autocast():
    ours, x = mixture(shared_experts=1, router_z_loss=0.1), some_input()
    y, aux = ours(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        short, short_aux = ours(x)
    assert short.dtype == torch.bfloat16 and aux.loss.dtype == torch.float32
    assert torch.equal(aux.loss, short_aux.loss)
    for name, metric in aux.metrics.items():
        assert torch.equal(metric, short_aux.metrics[name]) and not metric.requires_grad
    error = torch.linalg.norm(short.float() - y) / torch.linalg.norm(y)
    assert 0 < error < 0.02


def test_moe_runs_on_meta_device():
    model = build_model(tiny(**MOE, **SHARED))
    tokens = torch.empty((3, 6), dtype=torch.long, device='meta')
    loss, _, aux = model(tokens, tokens)
    (loss + aux.loss).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    assert {name: r.shape for name, r in aux.metrics.items()} == {
        'expert_load': (2, 5),
        'load_balance_loss': (2,),
        'router_z_loss': (2,),
    }


def results(model, tokens):
    loss, count, aux = model(tokens, tokens.roll(-1, dims=1))
    (loss / count + aux.loss).backward()
    return loss.detach(), aux.loss.detach(), aux.metrics, gradients(model)


@pytest.mark.slow
def test_moe_blocks_compile_to_one_graph_per_kind():
    config = tiny(**MOE, **{**SHARED, 'n_layer': 4})
    tokens = random_tokens(config, batch=2)
    expected = results(perturbed_model(config), tokens)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = perturbed_model(config)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    torch.testing.assert_close(results(model, tokens), expected)
    assert len(graphs) == 2  # of a dense layer, and of the three others


def test_recomputation_does_not_change_metrics():
    config = tiny(**MOE, **SHARED)
    tokens = random_tokens(config, batch=2)
    model = perturbed_model(config)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    torch.testing.assert_close(results(model, tokens), results(perturbed_model(config), tokens))


# --- Refusals and names ---------------------------------------------------------------------------


def test_moe_cannot_be_expert():
    with pytest.raises(UserError, match="expert_ffn takes one of 'standard', 'swiglu'"):
        tiny(ffn_type='moe', expert_ffn='moe')


def test_moe_options_are_rejected_elsewhere():
    with pytest.raises(UserError, match="it needs ffn_type='moe'"):
        tiny(ffn_type='swiglu', num_experts=4)


def test_expert_widths_are_derived():
    assert tiny(**MOE, n_embd=64).expert_d_ff == tiny(ffn_type='swiglu', n_embd=64).d_ff == 168
    assert tiny(**MOE, expert_ffn='standard').expert_d_ff == 64
    assert tiny(**MOE, d_ff=40).expert_d_ff == 40
    config = tiny(**MOE, expert_d_ff=24)
    assert (config.d_ff, config.expert_d_ff) == (40, 24)


def test_moe_name_tag():
    assert '-MoE2of5-SwiGLU-' in tiny(**MOE).name
    name = tiny(**MOE, expert_ffn='standard', activation='relu2', shared_experts=1).name
    assert '-MoE2of5+1-ReLU2-' in name
    config = tiny(**MOE, expert_weights_at='input')
    assert '-MoE2of5-InputWeights-SwiGLU-' in config.name and config.hash != tiny(**MOE).hash
    assert tiny(**MOE, expert_weights_at='output').hash == tiny(**MOE).hash
