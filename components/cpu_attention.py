"""Causal attention on a CPU as batched matrix products over blocks of queries.

torch's flash kernel for CPUs is far slower than the matrix products that it consists of. Here each
block of queries is multiplied with all of its visible keys at once, for as many heads as fit into
the caches, by oneDNN. `benchmarks/attention_speed.py` compares the two.
"""

from collections.abc import Iterator

import torch
from torch.utils.flop_counter import register_flop_formula

from components.base import matmul_dtype

BLOCK = 128  # queries; twice as many from LONG tokens on
LONG = 2048
SCORE_BYTES = 2**23  # of the scores that are computed at a time


def supports(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether `blocked_attention` applies: on a CPU, in bfloat16 (in fp32, torch's kernel is as
    fast), with as many queries as keys and more than one.
    """
    return (
        q.device.type == 'cpu' and matmul_dtype(q) == torch.bfloat16 and q.size(2) == k.size(2) > 1
    )


def blocked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal softmax(scale · q kᵀ) v of tensors as in `AttentionBackend.attend`, without grouping.

    Products and scores are in autocast's precision, sums within products and the softmax in fp32.
    Only q, k and v are saved for the backward pass, which recomputes the scores.
    """
    dtype = matmul_dtype(q)
    return attend(q.to(dtype), k.to(dtype), v.to(dtype), scale)


@torch.library.custom_op('components::blocked_attention', mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    output = _empty_heads(q, v.size(-1))
    for heads in _head_groups(q):
        keys, values = _fold_heads(k[heads]), _fold_heads(v[heads])
        for rows in _query_blocks(q.size(2)):
            past = slice(0, rows.stop)
            # P = softmax(scale · Q Kᵀ), under the causal mask
            queries = _fold_heads(q[(*heads, rows)])
            weights = _attention_weights(queries, keys[:, past].contiguous(), rows, scale)
            # O = P V
            y = weights @ values[:, past]
            output[(*heads, rows)] = y.view_as(output[(*heads, rows)])
    return output


@torch.library.custom_op('components::blocked_attention_backward', mutates_args=())
def backward(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v; those of keys and values are summed in fp32."""
    grad_q, grad_k, grad_v = (_empty_heads(tensor, tensor.size(-1)) for tensor in (q, k, v))
    for heads in _head_groups(q):
        keys, values = _fold_heads(k[heads]), _fold_heads(v[heads])
        sum_dk, sum_dv = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        for rows in _query_blocks(q.size(2)):
            past = slice(0, rows.stop)
            queries, d_output = (
                _fold_heads(q[(*heads, rows)]),
                _fold_heads(gradient[(*heads, rows)]),
            )
            past_keys, past_values = keys[:, past].contiguous(), values[:, past].contiguous()
            # P, recomputed as in the forward pass
            weights = _attention_weights(queries, past_keys, rows, scale)
            # dV += Pᵀ dO
            sum_dv[:, past] += weights.mT @ d_output
            # dP = dO Vᵀ
            d_weights = d_output @ past_values.mT
            # dS = P ∘ (dP - Σ P ∘ dP), through the softmax
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, q.dtype)
            # dQ = scale · dS K
            d_queries = _scaled_product(d_scores, past_keys, scale)
            grad_q[(*heads, rows)] = d_queries.view_as(grad_q[(*heads, rows)])
            # dK += scale · dSᵀ Q
            sum_dk[:, past] += _scaled_product(d_scores.mT, queries, scale)
        grad_k[heads] = sum_dk.view_as(grad_k[heads])
        grad_v[heads] = sum_dv.view_as(grad_v[heads])
    return grad_q, grad_k, grad_v


@attend.register_fake
def _(q, k, v, scale):
    return _empty_heads(q, v.size(-1))


@backward.register_fake
def _(gradient, q, k, v, scale):
    return tuple(_empty_heads(tensor, tensor.size(-1)) for tensor in (q, k, v))


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


attend.register_autograd(
    lambda ctx, gradient: (*backward(gradient, *ctx.saved_tensors, ctx.scale), None),
    setup_context=_save_for_backward,
)


@register_flop_formula(torch.ops.components.blocked_attention)
def _(q, k, v, *_, **__) -> int:
    """FLOPs of the full square, as torch counts for its own kernels."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


@register_flop_formula(torch.ops.components.blocked_attention_backward)
def _(gradient, q, k, v, *_, **__) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


# --- Blocks ---------------------------------------------------------------------------------------


def _empty_heads(like: torch.Tensor, width: int) -> torch.Tensor:
    """Uninitialized (B, H, T, width) with the memory layout (B, T, H, width)."""
    batch, heads, length, _ = like.shape
    return like.new_empty((batch, length, heads, width)).transpose(1, 2)


def _head_groups(q: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of sequences and heads that are computed at a time."""
    batch, heads, length, _ = q.shape
    scores = _block_size(length) * length * q.element_size()
    heads_per_group = max(1, SCORE_BYTES // scores)
    sequences = max(1, heads_per_group // heads)
    for first in range(0, batch, sequences):
        for head in range(0, heads, heads_per_group):
            yield (
                slice(first, min(first + sequences, batch)),
                slice(head, min(head + heads_per_group, heads)),
            )


def _query_blocks(length: int) -> Iterator[slice]:
    """Slices of the queries that are computed at a time."""
    block = _block_size(length)
    for first in range(0, length, block):
        yield slice(first, min(first + block, length))


def _block_size(length: int) -> int:
    """Queries at a time: longer sequences benefit more from fewer passes over the keys."""
    return min(length, BLOCK * (2 if length >= LONG else 1))


def _fold_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) -> (B · H, T, D), contiguous."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


# torch copies an operand of a product unless it or its transpose is contiguous, and it copies the
# transpose of a slice element by element.


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    product = a.new_empty((a.size(0), a.size(1), b.size(2)))
    return torch.baddbmm(product, a, b, beta=0, alpha=scale, out=product)


def _attention_weights(
    queries: torch.Tensor, keys: torch.Tensor, rows: slice, scale: float
) -> torch.Tensor:
    """The weight of each value for each query: (groups, rows, keys up to the last row)."""
    scores = _scaled_product(queries, keys.mT, scale)
    count = rows.stop - rows.start
    later = torch.full((count, count), -torch.inf, dtype=scores.dtype).triu(1)
    scores[:, :, rows] += later  # 2.7 times as fast as a masked fill
    return torch.softmax(scores, dim=-1)
