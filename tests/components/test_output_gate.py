"""components/attention.py: the gate on the heads' outputs."""

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import perturbed_model, random_tokens, tiny
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from model_builder import build_model, parameter_groups
from model_components import module_flops

pytestmark = pytest.mark.usefixtures('one_thread')

GATES = {'elementwise': 16, 'head': 4}  # -> rows of the gate with 4 heads of 4 dimensions


def gated(kind, **values):
    options = {'position_encoding': 'rope', 'use_gqa': True, 'num_kv_heads': 2, **values}
    return tiny(attention_gate=kind, **options)


FUNCTIONS = {
    'sigmoid': lambda gate: 1 / (1 + torch.exp(-gate)),
    'softplus': lambda gate: torch.log(1 + torch.exp(gate)),
}


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('kind', GATES)
def test_gate_equals_formula(kind, function):
    """Values and gradients, against softmax attention and a gate written out here."""
    options = {'position_encoding': 'none', 'attention_gate_function': function}
    model = perturbed_model(gated(kind, **options)).double()
    attention = model.blocks[0].attention
    x = torch.randn(2, 6, 16, dtype=torch.double, requires_grad=True)

    def reference(x):
        projected = x @ attention.qkv.weight.T + attention.qkv.bias
        q, k, v, gate = projected.split((16, 8, 8, GATES[kind]), dim=-1)
        q, k, v = (part.view(2, 6, -1, 4) for part in (q, k, v))
        k, v = (part.repeat_interleave(2, dim=2) for part in (k, v))
        scores = torch.einsum('bthd,bshd->bhts', q, k) / 2
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        y = torch.einsum('bhts,bshd->bthd', scores.softmax(-1), v)
        y = y * FUNCTIONS[function](gate).view(2, 6, 4, -1)
        return y.flatten(2) @ attention.output.weight.T + attention.output.bias

    inputs = [x, *attention.parameters()]
    weights = torch.randn(2, 6, 16, dtype=torch.double)
    (attn_inputs, *_) = model.attention_inputs(torch.arange(6))
    results = []
    for y in (attention(x, attn_inputs), reference(x)):
        results.append((y, *torch.autograd.grad((y * weights).sum(), inputs)))
    assert attention.qkv.weight.shape == (32 + GATES[kind], 16)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_elementwise_gate_matches_qwen3_next():
    """Their query projection has a head's queries, then its gates, for each head in turn."""
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    model = perturbed_model(
        gated('elementwise', attention_bias=False, qk_norm='rmsnorm', attention_backend='manual')
    )
    attention = model.blocks[0].attention
    theirs = qwen.Qwen3NextAttention(
        qwen.Qwen3NextConfig(
            hidden_size=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            rms_norm_eps=model.config.norm_eps,
            attn_implementation='eager',
        ),
        0,
    )

    # Our row i, of all queries and then keys, values and gates, is row order[i] of theirs.
    queries = torch.arange(32).view(4, 2, 4)
    order = torch.cat((queries[:, 0].flatten(), torch.arange(32, 48), queries[:, 1].flatten()))

    def in_their_order(ours):
        return dict(zip('qkv', ours.detach()[order.argsort()].split((32, 8, 8))))

    parts = in_their_order(attention.qkv.weight)
    weights = {
        **{f'{part}_proj.weight': weight for part, weight in parts.items()},
        'o_proj.weight': attention.output.weight.detach(),
        'q_norm.weight': attention.q_norm.weight.detach() - 1,  # offsets from one
        'k_norm.weight': attention.k_norm.weight.detach() - 1,
    }
    theirs.load_state_dict(weights)
    x = torch.randn(2, 6, 16)
    (attn_inputs, *_) = model.attention_inputs(torch.arange(6))
    cos, sin = (each.repeat(1, 2)[None] for each in attn_inputs.rotation)
    hidden = torch.full((6, 6), -torch.inf).triu(1)[None, None]

    ours = attention(x, attn_inputs)
    expected, _ = theirs(x, (cos, sin), hidden)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)

    ours.square().sum().backward()
    expected.square().sum().backward()
    for part, grad in in_their_order(attention.qkv.weight.grad).items():
        other = getattr(theirs, f'{part}_proj').weight.grad
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4)
    for part in ('q_norm', 'k_norm'):
        other = getattr(theirs, part).weight.grad
        torch.testing.assert_close(
            getattr(attention, part).weight.grad, other, rtol=1e-4, atol=1e-4
        )


def test_without_gate_nothing_changes():
    """Its default is not in the hash, and the gate leaves all other initial weights as they are."""
    plain, own = tiny(), tiny(attention_gate='none')
    assert plain.hash == own.hash and plain.name == own.name
    sigmoid, softplus = (
        tiny(attention_gate='head', attention_gate_function=name) for name in FUNCTIONS
    )
    assert sigmoid.hash == tiny(attention_gate='head').hash != softplus.hash
    assert softplus.name == sigmoid.name.replace('HeadGate', 'SoftplusHeadGate')
    without = dict(build_model(plain, 'cpu', seed=3).named_parameters())
    with_gate = dict(build_model(tiny(attention_gate='head'), 'cpu', seed=3).named_parameters())
    assert without.keys() == with_gate.keys()
    for name, parameter in without.items():
        assert torch.equal(parameter, with_gate[name][: len(parameter)]), name
        assert (parameter.shape == with_gate[name].shape) == ('qkv' not in name)


@pytest.mark.parametrize('kind', GATES)
def test_gate_has_name_flops_and_optimizer_group(kind):
    config = gated(kind)
    assert config.hash != gated('none').hash
    assert ('-HeadGate-' in config.name) == (kind == 'head')
    assert ('-Gate-' in config.name) == (kind == 'elementwise')
    model = build_model(config.with_backend('manual'))
    groups = {group.name: group for group in parameter_groups(model)}
    rows = dict(zip(map(id, groups['matrices'].parameters), groups['matrices'].rows))
    qkv = [block.attention.qkv.weight for block in model.blocks]
    assert [rows[id(weight)] for weight in qkv] == [(16, 8, 8, GATES[kind])] * 2
    tokens = torch.empty((1, 6), dtype=torch.long, device='meta')
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    flops = module_flops(model, 6, False, 'other')
    assert sum(flops.values()) == counter.get_total_flops()
    ungated = module_flops(build_model(gated('none')), 6, False, 'other')
    difference = flops['attention_projections'] - ungated['attention_projections']
    assert difference == 2 * (2 * 16 * GATES[kind] * 6)  # 2 layers


@pytest.mark.parametrize('kind', GATES)
def test_gated_generation_with_cache(kind):
    model = perturbed_model(gated(kind)).eval()
    tokens = random_tokens(model.config, batch=2)
    cache = model.empty_cache(6)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split((2, 1, 3), dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-5, atol=1e-5)


def test_gated_attention_compiles_without_breaks():
    model = perturbed_model(gated('elementwise'))
    attention, x = model.blocks[0].attention, torch.randn(2, 6, 16)
    (attn_inputs, *_) = model.attention_inputs(torch.arange(6))
    compiled = torch.compile(attention, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x, attn_inputs), attention(x, attn_inputs))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        half = attention(x, attn_inputs)
    assert half.dtype == torch.bfloat16
    assert F.mse_loss(half.float(), attention(x, attn_inputs)) < 1e-3


def test_gate_belongs_to_standard_attention():
    with pytest.raises(UserError, match=r"attention_gate='head'.*needs attention_type='standard'"):
        tiny(attention_type='mla', position_encoding='rope', attention_gate='head')
