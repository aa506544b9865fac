"""components/cpu_attention.py against a simple implementation in double precision."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from components import cpu_attention as module
from components.attention_backends import AttentionSpec, ManualAttention, ScaledDotProductAttention

SCALE = 0.3


def inputs(length, heads=3, kv_heads=3, width=8, v_width=8, dtype=torch.float32):
    """q, k, v (2, heads, length, width), in the memory layout of a fused projection, and a
    gradient.
    """
    generator = torch.Generator().manual_seed(length)

    def heads_first(count, columns):
        x = torch.randn(2, length, count, columns, generator=generator).to(dtype)
        return x.transpose(1, 2).requires_grad_()

    q, k, v = (
        heads_first(heads, width),
        heads_first(kv_heads, width),
        heads_first(kv_heads, v_width),
    )
    return (q, k, v), heads_first(heads, v_width).detach()


def written_out(q, k, v):
    scores = SCALE * q @ k.mT
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def with_gradients(attention, tensors, upstream):
    output = attention(*tensors)
    return output, *torch.autograd.grad(output, tensors, upstream)


@pytest.fixture(params=[(128, 2**23), (16, 2**23), (5, 1), (7, 600)])
def block_sizes(request, monkeypatch):
    monkeypatch.setattr(module, 'BLOCK', request.param[0])
    monkeypatch.setattr(module, 'SCORE_BYTES', request.param[1])


@pytest.mark.parametrize('length', [2, 33, 64])
@pytest.mark.parametrize('v_width', [8, 5])
def test_blocked_attention_matches_reference(block_sizes, length, v_width):
    tensors, upstream = inputs(length, v_width=v_width, dtype=torch.float64)
    expected = with_gradients(written_out, tensors, upstream)
    actual = with_gradients(lambda *qkv: module.blocked_attention(*qkv, SCALE), tensors, upstream)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # sums are in fp32


def test_bfloat16_error_is_that_of_plain_attention(block_sizes):
    tensors, upstream = inputs(48, width=64, v_width=64, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    true = with_gradients(written_out, exact, upstream.double())
    errors = []
    for attention in (written_out, lambda *qkv: module.blocked_attention(*qkv, SCALE)):
        actual = with_gradients(attention, tensors, upstream)
        assert all(x.dtype == torch.bfloat16 for x in actual)
        errors.append([(f - t).norm() / t.norm() for f, t in zip(actual, true)])
    assert all(own < 1.5 * plain for plain, own in zip(*errors)), errors


@pytest.mark.parametrize('kv_heads', [4, 2, 1])
def test_sdpa_uses_blocked_attention_under_autocast(kv_heads, monkeypatch):
    served = []
    real = module.blocked_attention
    monkeypatch.setattr(module, 'blocked_attention', lambda *a: served.append(1) or real(*a))
    tensors, upstream = inputs(20, heads=4, kv_heads=kv_heads)
    spec = AttentionSpec(scale=SCALE)
    mask = torch.zeros(20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
    with torch.autocast('cpu', torch.bfloat16):
        expected = ManualAttention.attend(*tensors, mask, spec, 0.0)
        actual = ScaledDotProductAttention.attend(*tensors, None, spec, 0.0)
        assert served == [1] and actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0.02, atol=0.02)
        gradients = torch.autograd.grad(actual, tensors, upstream.to(actual.dtype))
        ScaledDotProductAttention.attend(*tensors, None, spec, 0.1)
        ScaledDotProductAttention.attend(*tensors, mask[None, None], spec, 0.0)
        ScaledDotProductAttention.attend(tensors[0][:, :, -1:], *tensors[1:], None, spec, 0.0)
    ScaledDotProductAttention.attend(*tensors, None, spec, 0.0)
    assert served == [1], 'it does bfloat16, no dropout, no mask, no single queries'
    for gradient, tensor in zip(gradients, tensors):
        assert gradient.shape == tensor.shape and gradient.dtype == torch.float32


@pytest.mark.slow
def test_blocked_attention_opcheck():
    (q, k, v), upstream = inputs(9, v_width=5)
    torch.library.opcheck(module.attend, (q, k, v, SCALE))
    torch.library.opcheck(module.backward, (upstream, q.detach(), k.detach(), v.detach(), SCALE))


def test_flop_formula_matches_torch():
    tensors, upstream = inputs(32)
    flops = []
    for attention in (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda *qkv: module.blocked_attention(*qkv, SCALE),
    ):
        on_meta = [x.detach().to('meta').requires_grad_() for x in tensors]
        with FlopCounterMode(display=False) as counter:
            attention(*on_meta).backward(upstream.to('meta'))
        flops.append(counter.get_total_flops())
    # torch's implementation on the meta device keeps the scores, so it does not recompute them.
    square = 2 * 2 * 3 * 32 * 32 * 8
    assert flops[1] == flops[0] + square == 7 * square
