"""Linear attention, RetNet, lightning attention and GLA: as loops over tokens, at any decay."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.mixers import mixer_config, mixer_module, random_inputs, random_starts, with_starts

from components import decayed_attention as chunked
from components.decayed_attention import CHUNK, decayed_attention
from model_builder import build_model

WIDTH = 16


# --- Loops over tokens, from the papers -----------------------------------------------------------


def heads_of(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(T, dimensions of all heads) -> (H, T, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def recurrence(q, k, v, decays, starts):
    """S_t = diag(α_t) S_{t-1} + k_t v_tᵀ and o_t = S_tᵀ q_t, with S = 0 before a document.

    q, k, v (H, T, D), complex or not; decays: for each token, (H, 1) or (H, K). -> (H, T, V)
    """
    state, outputs = q.new_zeros(q.size(0), q.size(2), v.size(2)), []
    for t in range(q.size(1)):
        if starts is not None and starts[t]:
            state = torch.zeros_like(state)
        state = decays[t][..., None] * state + k[:, t, :, None] * v[:, t, None, :]
        outputs.append((q[:, t, :, None] * state).sum(dim=1))
    return torch.stack(outputs, dim=1)


def convolved(x, module, starts):
    """SiLU of a convolution over tokens of the same document, (T, C)."""
    if module.conv is None:
        return x
    weight, rows = module.conv.weight, []
    for t in range(len(x)):
        total, back = 0, 0
        while back < weight.size(1) and t - back >= 0:
            total = total + weight[:, weight.size(1) - 1 - back] * x[t - back]
            if starts is not None and starts[t - back]:
                break
            back += 1
        rows.append(F.silu(total))
    return torch.stack(rows)


def projections(module, x, starts):
    """Queries, keys and values of heads (H, T, D), and the other projections (T, …)."""
    keys, _, values, *others = module.rows
    q, k, v, *rest = (x @ module.input.weight.T).split((keys, keys, values, *others), dim=-1)
    qkv = convolved(torch.cat((q, k, v), dim=-1), module, starts)
    return *(heads_of(each, module.heads) for each in qkv.split((keys, keys, values), -1)), *rest


def joined(module, y):
    """(H, T, V) -> (T, C)."""
    return y.transpose(0, 1).flatten(1) @ module.output.weight.T


def linear_attention(module, config, x, starts):
    """Katharopoulos et al. 2020, equation 9."""
    q, k, v = projections(module, x, starts)
    maps = {'elu': lambda x: F.elu(x) + 1, 'relu': F.relu, 'silu': F.silu, 'none': lambda x: x}
    q, k = (maps[config.linear_feature_map](each) for each in (q, k))
    ones = [torch.ones(module.heads, 1, dtype=x.dtype)] * len(x)
    y = recurrence(q, k, v, ones, starts)
    if config.linear_normalizer == 'sum':
        y = y / (recurrence(q, k, torch.ones_like(v[..., :1]), ones, starts) + 1e-6)
    else:
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + 1e-6)
    return joined(module, y)


def retnet(module, config, x, starts):
    """Sun et al. 2023, equations 5 to 8, with complex queries and keys."""
    q, k, v, gate = projections(module, x, starts)
    k = k / math.sqrt(config.retnet_key_dim)
    if config.retnet_rotation:
        half = config.retnet_key_dim // 2
        theta = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
        turns = torch.polar(torch.ones(()).double(), torch.arange(len(x))[:, None] * theta)
        # Re(q e^{inθ} · conj(k e^{imθ})) is the product of pairs that turn by their distance.
        q, k = (torch.complex(each[..., :half], each[..., half:]) * turns for each in (q, k))
        k, v = k.conj(), v.to(q.dtype)
    decays = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(module.heads)], dtype=x.dtype)
    y = recurrence(q, k, v, [decays[:, None]] * len(x), starts)
    y = y.real if y.is_complex() else y
    if config.retnet_norm == 'layernorm':
        y = y - y.mean(dim=-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + config.retnet_norm_eps)
    return joined(module, y * heads_of(F.silu(gate), module.heads))


def lightning_attention(module, config, x, starts, layer=0):
    """MiniMax 2025, section 2.2, with the slopes of their code."""
    q, k, v, gate = projections(module, x, starts)
    q, k, v = (F.silu(each) for each in (q, k, v))
    heads = torch.arange(1, module.heads + 1, dtype=x.dtype)
    slopes = 2 ** (-8 * heads / module.heads) * (1 - layer / (config.n_layer - 1 + 1e-5) + 1e-5)
    y = recurrence(q, k, v, [(-slopes).exp()[:, None]] * len(x), starts)
    y = y.transpose(0, 1).flatten(1)
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + config.lightning_norm_eps)
    return joined(module, heads_of(y * module.norm_weight * gate.sigmoid(), module.heads))


def gla(module, config, x, starts):
    """Yang et al. 2023, equation 3 and section 4.4."""
    q, k, v, gate, low_rank = projections(module, x, starts)
    logits = low_rank @ module.decay_weight.T + module.decay_bias
    decays = logits.sigmoid() ** (1 / config.gla_decay_root)
    decays = heads_of(decays, module.heads).unbind(1)
    y = recurrence(q / math.sqrt(config.gla_key_dim), k, v, decays, starts)
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + config.gla_norm_eps)
    return joined(module, y * module.norm.weight * heads_of(F.silu(gate), module.heads))


LOOPS = {
    'linear_attention': linear_attention,
    'retnet': retnet,
    'lightning_attention': lightning_attention,
    'gla': gla,
}
VARIANTS = [
    ('linear_attention', {}),
    ('linear_attention', {'linear_feature_map': 'relu', 'linear_conv_size': 3}),
    ('linear_attention', {'linear_feature_map': 'silu', 'linear_normalizer': 'rmsnorm'}),
    ('linear_attention', {'linear_feature_map': 'none', 'linear_normalizer': 'rmsnorm'}),
    ('retnet', {}),
    ('retnet', {'retnet_rotation': False, 'retnet_key_dim': 5, 'retnet_heads': 2}),
    ('retnet', {'retnet_norm': 'rmsnorm', 'retnet_conv_size': 4, 'retnet_norm_eps': 0.1}),
    ('lightning_attention', {}),
    ('lightning_attention', {'lightning_value_dim': 3, 'lightning_norm_eps': 0.1}),
    ('gla', {}),
    ('gla', {'gla_decay_root': 0.5, 'gla_decay_rank': 3, 'gla_heads': 3, 'gla_value_dim': 5}),
    ('gla', {'gla_key_dim': 7, 'gla_conv_size': 2, 'gla_norm_eps': 0.1}),
]


def module_of(mixer, values):
    config = mixer_config(mixer, **values)
    module = mixer_module(config)
    for name, fill in module.initial_values().items():
        if name == 'log_decays':  # in double precision
            fill(module.log_decays, torch.Generator())
    return config, module


def assert_equals_loop(mixer, values, length):
    config, module = module_of(mixer, values)
    x = random_inputs(2, length, WIDTH).requires_grad_()
    weights = random_inputs(2, length, WIDTH, seed=3)
    points = [x, *module.parameters()]
    for starts in (None, random_starts(2, length)):
        y = module(x, with_starts(starts))
        rows = starts if starts is not None else [None, None]
        expected = torch.stack([LOOPS[mixer](module, config, *each) for each in zip(x, rows)])
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
        actual, right = (torch.autograd.grad((y * weights).sum(), points) for y in (y, expected))
        for gradient, other in zip(actual, right):
            torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize('length', [1, 3, 7, 8, 9, 21])
@pytest.mark.parametrize(('mixer', 'values'), VARIANTS)
def test_equals_a_loop_over_tokens(mixer, values, length, monkeypatch):
    monkeypatch.setattr(chunked, 'CHUNK', 8)
    assert_equals_loop(mixer, values, length)


@pytest.mark.parametrize('mixer', LOOPS)
def test_equals_a_loop_in_chunks_of_the_real_size(mixer):
    assert_equals_loop(mixer, {}, 2 * CHUNK + 5)


# --- Decays ---------------------------------------------------------------------------------------


def random_heads(length, dtype, decay=None):
    """Queries, keys, values (2, 2, T, 4), and log decays of channels around `-decay`."""
    q, k, v, logs = (random_inputs(4, length, 4, seed=s, dtype=dtype) for s in range(4))
    logs = -decay * logs.abs() if decay is not None else None
    return [None if x is None else x.unflatten(0, (2, 2)) for x in (q, k, v, logs)]


@pytest.mark.parametrize('starts', [None, random_starts(2, 150)], ids=['one', 'documents'])
@pytest.mark.parametrize('decay', [0.0, 1e-6, 0.1, 3.0, 100.0, 1e6])
def test_any_decay_is_exact_in_fp32(decay, starts):
    """Values and gradients are those of a loop in double precision, to the precision of fp32."""
    inputs = random_heads(150, torch.float32, decay)
    logs = inputs[-1]
    # Strong decays among weak ones, in the same channel.
    logs[:, :, ::7] *= 1e3
    inputs = [x.requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, _ = decayed_attention(*inputs, starts=starts)
    rows = starts if starts is not None else [None, None]
    expected = torch.stack(
        [recurrence(q, k, v, g.exp().unbind(1), s) for q, k, v, g, s in zip(*wide, rows)]
    )
    weights = random_inputs(4, 150, 4, seed=9).unflatten(0, (2, 2))
    y_grads = torch.autograd.grad((y * weights.float()).sum(), inputs)
    grads = torch.autograd.grad((expected * weights).sum(), wide)
    for value, other in zip((y, *y_grads), (expected, *grads)):
        assert value.isfinite().all()
        assert (value.double() - other).abs().max() <= 1e-5 * other.abs().max()


def test_a_state_of_earlier_tokens_continues_exactly():
    """The state too has gradients, and so have the decays after it."""
    inputs = [x.requires_grad_() for x in random_heads(5, torch.float64, 0.5)]
    state = random_inputs(4, 4, 4, seed=8).unflatten(0, (2, 2)).requires_grad_()

    def value(state, *inputs):
        y, after = decayed_attention(*inputs, state=state)
        return y, after

    assert torch.autograd.gradcheck(value, (state, *inputs))


def test_a_constant_decay_is_that_of_all_channels():
    q, k, v, _ = random_heads(150, torch.float64)
    of_heads = torch.tensor([-0.05, -700.0], dtype=torch.float64)
    of_channels = of_heads[None, :, None, None].expand_as(k)
    starts = random_starts(2, 150)
    for actual, expected in zip(
        decayed_attention(q, k, v, of_heads, starts=starts),
        decayed_attention(q, k, v, of_channels, starts=starts),
    ):
        torch.testing.assert_close(actual, expected)


# --- Options --------------------------------------------------------------------------------------


def test_later_layers_of_lightning_attention_decay_less():
    config = mixer_config('lightning_attention', n_layer=3)
    blocks = build_model(config, 'cpu').blocks
    logs = [block.mixers['lightning_attention'].log_decays for block in blocks]
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    for layer, of_layer in enumerate((1.0, 0.5, 0.0)):
        torch.testing.assert_close(-logs[layer], slopes * of_layer, rtol=1e-4, atol=1e-5)
    assert all((each < 0).all() for each in logs)
