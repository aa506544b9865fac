"""Causal attention on a CPU as batched matrix products over blocks of queries.

torch's flash kernel for CPUs runs far below the speed of the matrix products that it consists of.
Here a block of queries meets all the keys that it sees at once, for as many heads as fit into the
caches, and the products are oneDNN's. `benchmarks/attention_speed.py` compares the two.
"""

from collections.abc import Iterator

import torch
from torch.utils.flop_counter import register_flop_formula

from components.base import matmul_dtype

BLOCK = 128  # queries; twice as many from LONG tokens on
LONG = 2048
SCORE_BYTES = 2**23  # of the scores that are worked on at a time


def serves(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether causal attention of these is for here: on a CPU, in bfloat16 (in fp32 torch's kernel
    is as fast), and not of new tokens only."""
    return (
        q.device.type == 'cpu' and matmul_dtype(q) == torch.bfloat16 and q.size(2) == k.size(2) > 1
    )


def blocked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal softmax(scale · q kᵀ) v, as `AttentionBackend.attend` has it, as many heads in each.

    Products and scores in autocast's precision, sums within them and the softmax in fp32. Keeps
    only q, k and v for the backward pass, which computes the scores again.
    """
    dtype = matmul_dtype(q)
    return attend(q.to(dtype), k.to(dtype), v.to(dtype), scale)


@torch.library.custom_op('components::blocked_attention', mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    output = _heads_inside(q, v.size(-1))
    for some in _groups(q):
        keys, values = _in_one(k[some]), _in_one(v[some])
        for rows in _blocks(q.size(2)):
            seen = slice(0, rows.stop)
            weights = _weights(_in_one(q[(*some, rows)]), keys[:, seen].contiguous(), rows, scale)
            y = weights @ values[:, seen]
            output[(*some, rows)] = y.view_as(output[(*some, rows)])
    return output


@torch.library.custom_op('components::blocked_attention_backward', mutates_args=())
def backward(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v; those of keys and values are added up in fp32."""
    found = [_heads_inside(tensor, tensor.size(-1)) for tensor in (q, k, v)]
    for some in _groups(q):
        keys, values = _in_one(k[some]), _in_one(v[some])
        of_keys, of_values = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        for rows in _blocks(q.size(2)):
            seen = slice(0, rows.stop)
            queries, own = _in_one(q[(*some, rows)]), _in_one(gradient[(*some, rows)])
            keys_seen, values_seen = (x[:, seen].contiguous() for x in (keys, values))
            weights = _weights(queries, keys_seen, rows, scale)
            of_values[:, seen] += weights.mT @ own
            of_weights = own @ values_seen.mT
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, q.dtype)
            of_queries = _scaled_product(of_scores, keys_seen, scale)
            found[0][(*some, rows)] = of_queries.view_as(found[0][(*some, rows)])
            of_keys[:, seen] += _scaled_product(of_scores.mT, queries, scale)
        for of_all, own in zip(found[1:], (of_keys, of_values)):
            of_all[some] = own.view_as(of_all[some])
    return tuple(found)


@attend.register_fake
def _(q, k, v, scale):
    return _heads_inside(q, v.size(-1))


@backward.register_fake
def _(gradient, q, k, v, scale):
    return tuple(_heads_inside(tensor, tensor.size(-1)) for tensor in (q, k, v))


def _keep(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


attend.register_autograd(
    lambda ctx, gradient: (*backward(gradient, *ctx.saved_tensors, ctx.scale), None),
    setup_context=_keep,
)


@register_flop_formula(torch.ops.components.blocked_attention)
def _(q, k, v, *_, **__) -> int:
    """Of the full square, as torch counts its own."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


@register_flop_formula(torch.ops.components.blocked_attention_backward)
def _(gradient, q, k, v, *_, **__) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


# --- Pieces ---------------------------------------------------------------------------------------


def _heads_inside(like: torch.Tensor, width: int) -> torch.Tensor:
    """Uninitialized (B, H, T, width) that lies in memory as (B, T, H, width)."""
    batch, heads, length, _ = like.shape
    return like.new_empty((batch, length, heads, width)).transpose(1, 2)


def _groups(q: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Sequences and heads that are worked on at a time."""
    batch, heads, length, _ = q.shape
    scores = _block(length) * length * q.element_size()
    at_a_time = max(1, SCORE_BYTES // scores)
    sequences = max(1, at_a_time // heads)
    for first in range(0, batch, sequences):
        for head in range(0, heads, at_a_time):
            yield (
                slice(first, min(first + sequences, batch)),
                slice(head, min(head + at_a_time, heads)),
            )


def _blocks(length: int) -> Iterator[slice]:
    block = _block(length)
    for first in range(0, length, block):
        yield slice(first, min(first + block, length))


def _block(length: int) -> int:
    """Queries at a time: longer texts have more to gain from fewer passes over the keys."""
    return min(length, BLOCK * (2 if length >= LONG else 1))


def _in_one(x: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) -> (B · H, T, D), contiguous."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


# torch copies what it is given for a product unless that, or its transpose, lies in one piece; the
# transpose of a part it copies element by element.


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    product = a.new_empty((a.size(0), a.size(1), b.size(2)))
    return torch.baddbmm(product, a, b, beta=0, alpha=scale, out=product)


def _weights(queries: torch.Tensor, keys: torch.Tensor, rows: slice, scale: float) -> torch.Tensor:
    """(groups, rows, keys up to the last row's): what each query takes of each value."""
    scores = _scaled_product(queries, keys.mT, scale)
    count = rows.stop - rows.start
    later = torch.full((count, count), -torch.inf, dtype=scores.dtype).triu(1)
    scores[:, :, rows] += later  # 2.7 times as fast as a fill under a mask
    return torch.softmax(scores, dim=-1)
