"""Linear recurrences h_t = a_t · h_(t-1) + b_t, element by element, by a parallel scan.

Odd-even reduction (Blelloch 1990): neighbors are joined in pairs, the recurrence of the pairs is
solved in the same way, and its states complete the others: 2 · log2(T) steps of three products per
element in all. It only multiplies and adds decays, so that a = 0 and any underflow are exact.

Both scans are custom operators, with plain PyTorch inside, that walk through a sequence in blocks:
their memory beyond inputs and outputs is that of a block, and `torch.compile` sees one node,
whatever the length. (`torch._higher_order_ops.associative_scan` is private, keeps every state for
the backward pass, and is fast on CUDA alone.)
"""

from collections.abc import Iterator

import torch
from torch.utils.flop_counter import register_flop_formula

from components.element_counter import ELEMENT_FORMULAS, WORKING_MEMORY

# Elements of a block's states: the cache of a CPU core holds a few such tensors, and on other
# devices they fill the machine. A block has at least MIN_TOKENS, as the scan of a sequence keeps
# the state at the end of each.
BLOCK_ELEMENTS = {'cpu': 2**18}
OTHER_BLOCK_ELEMENTS = 2**24
MIN_TOKENS = 32
LOG2_E = 1.4426950408889634


def linear_scan(a: torch.Tensor, b: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """h_t = a_t · h_(t-1) + b_t with h_0 = initial: (B, T, W), (B, T, W), (B, W) -> (B, T, W)."""
    return _linear_scan(a, b, initial)


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    initial: torch.Tensor,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The selective state space of Mamba (Gu & Dao 2023, equation 2 and section 3.2), without D.

    h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t and y_t = C_t · h_t, for N states in each of D
    channels.

    x, dt (B, T, D); decay A (N, D); inputs B and outputs C (B, T, N); initial (B, N, D); keep
    (B, T): 0 at the first token of a document, else 1. Returns y (B, T, D) and the last state
    (B, N, D). The states (B, T, N, D) exist for one block at a time, forward and backward.
    """
    y, ends = _selective_scan(x, dt, decay, inputs, outputs, initial, keep)
    return y, ends[:, -1]


def scan_(links: torch.Tensor, b: torch.Tensor, reverse: bool = False) -> None:
    """Replace b (B, T, ...) by h_t = links_(t-1) · h_(t-1) + b_t, in place.

    links (B, T - 1, ...): link t joins the tokens t and t + 1. reverse: h_t = links_t · h_(t+1) +
    b_t.
    """
    length = b.size(1)
    if length == 1:
        return
    pairs = length // 2
    # 1. Every second token takes in its neighbor; forward the tokens 1, 3, ..., reversed those at
    # an odd distance from the end.
    first = length % 2 if reverse else 1
    joined = b[:, first::2]
    neighbors = b[:, first + 1 :: 2] if reverse else b[:, 0 : length - 1 : 2]
    joined.addcmul_(links[:, first::2] if reverse else links[:, ::2], neighbors)
    # 2. Solve the recurrence of these tokens, each two links apart.
    if pairs > 1:
        end = first + 2 * (pairs - 1)
        scan_(links[:, first:end:2] * links[:, first + 1 : end + 1 : 2], joined, reverse)
    # 3. The tokens between them follow.
    if reverse:
        between, after = slice(1 - first, length - 2, 2), slice(2 - first, length - 1, 2)
        b[:, between].addcmul_(links[:, between], b[:, after])
    else:
        b[:, 2::2].addcmul_(links[:, 1::2], b[:, 1 : length - 1 : 2])


def _block_sizes(batch: int, state: int, device: torch.device) -> tuple[int, int]:
    """Sequences and tokens of a block; state: elements of one token's state."""
    elements = BLOCK_ELEMENTS.get(device.type, OTHER_BLOCK_ELEMENTS)
    rows = min(batch, max(1, elements // (MIN_TOKENS * state)))
    return rows, max(MIN_TOKENS, elements // (rows * state))


def _blocks(x: torch.Tensor, state: int, reverse: bool = False) -> Iterator[tuple[slice, slice]]:
    """Sequences and tokens of each block of x (B, T, ...), those of a sequence in order."""
    rows, tokens = _block_sizes(x.size(0), state, x.device)
    starts = range(0, x.size(1), tokens)
    for row in range(0, x.size(0), rows):
        for start in reversed(starts) if reverse else starts:
            yield slice(row, row + rows), slice(start, start + tokens)


# --------------------------------------------------------------------------------------------------
# The linear scan


@torch.library.custom_op('components::linear_scan', mutates_args=())
def _linear_scan(a: torch.Tensor, b: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    h = b.clone(memory_format=torch.contiguous_format)
    for rows, tokens in _blocks(b, b.size(2)):
        before = h[rows, tokens.start - 1] if tokens.start else initial[rows]
        block, links = h[rows, tokens], a[rows, tokens]
        block[:, 0].addcmul_(links[:, 0], before)
        scan_(links[:, 1:], block)
    return h


@_linear_scan.register_fake
def _(a, b, initial):
    return torch.empty_like(b, memory_format=torch.contiguous_format)


@torch.library.custom_op('components::linear_scan_backward', mutates_args=())
def _linear_scan_backward(
    grad: torch.Tensor, a: torch.Tensor, h: torch.Tensor, initial: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a, b and initial: the gradient of h_t is scanned from the end, and is that of
    b_t; the one of a_t is its product with h_(t-1)."""
    grad_b = grad.clone(memory_format=torch.contiguous_format)
    length = grad.size(1)
    for rows, tokens in _blocks(grad, grad.size(2), reverse=True):
        block, end = grad_b[rows, tokens], tokens.stop
        if end < length:
            block[:, -1].addcmul_(a[rows, end], grad_b[rows, end])
        scan_(a[rows, tokens][:, 1:], block, reverse=True)
    grad_a = torch.empty_like(grad_b)
    torch.mul(grad_b[:, 1:], h[:, :-1], out=grad_a[:, 1:])
    torch.mul(grad_b[:, 0], initial, out=grad_a[:, 0])
    return grad_a, grad_b, a[:, 0] * grad_b[:, 0]


@_linear_scan_backward.register_fake
def _(grad, a, h, initial):
    like_h = torch.empty_like(h)
    return like_h, torch.empty_like(h), torch.empty_like(initial)


def _save_linear_scan(ctx, inputs, output):
    a, _, initial = inputs
    ctx.save_for_backward(a, output, initial)


_linear_scan.register_autograd(
    lambda ctx, grad: _linear_scan_backward(grad, *ctx.saved_tensors),
    setup_context=_save_linear_scan,
)


# --------------------------------------------------------------------------------------------------
# The selective scan


def _part(tensors: tuple, rows: slice, tokens: slice) -> tuple:
    """The part of each tensor (B, T, ...), or None, that is in a block."""
    return tuple(None if each is None else each[rows, tokens] for each in tensors)


def _states(
    block: tuple, decay: torch.Tensor, initial: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decays and the states of a block (x, dt, inputs, keep), (B, T, N, D) each."""
    x, dt, inputs, keep = block
    # exp2 takes a third of the time of exp on a CPU.
    a = torch.mul(dt.unsqueeze(2), decay * LOG2_E).exp2_()
    if keep is not None:
        a.mul_(keep[:, :, None, None])
    h = inputs.unsqueeze(3) * (dt * x).unsqueeze(2)
    h[:, 0].addcmul_(a[:, 0], initial)
    scan_(a[:, 1:], h)
    return a, h


@torch.library.custom_op('components::selective_scan', mutates_args=())
def _selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    initial: torch.Tensor,
    keep: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, T, D), and the states at the ends of the blocks (B, blocks, N, D)."""
    y, ends = _empty_results(x, decay)
    _, size = _block_sizes(x.size(0), decay.numel(), x.device)
    for rows, tokens in _blocks(x, decay.numel()):
        number = tokens.start // size
        before = ends[rows, number - 1] if number else initial[rows]
        block = _part((x, dt, inputs, keep), rows, tokens)
        a, h = _states(block, decay, before)
        y[rows, tokens] = _vector_times(outputs[rows, tokens], h)
        ends[rows, number] = h[:, -1]
        del a, h  # before those of the next block
    return y, ends


def _empty_results(x: torch.Tensor, decay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length = x.shape[:2]
    _, size = _block_sizes(batch, decay.numel(), x.device)
    ends = x.new_empty((batch, (length + size - 1) // size, *decay.shape))
    return torch.empty_like(x, memory_format=torch.contiguous_format), ends


@_selective_scan.register_fake
def _(x, dt, decay, inputs, outputs, initial, keep):
    return _empty_results(x, decay)


@torch.library.custom_op('components::selective_scan_backward', mutates_args=())
def _selective_scan_backward(
    grad_y: torch.Tensor,
    grad_ends: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    initial: torch.Tensor,
    keep: torch.Tensor | None,
    ends: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, dt, decay, inputs, outputs and initial. The states of a block are computed
    again from the one before it."""
    tensors = (x, dt, decay, inputs, outputs, initial)
    grad_x, grad_dt, grad_decay, grad_inputs, grad_outputs, carry = map(_contiguous_like, tensors)
    grad_decay.zero_()
    carry.zero_()  # the gradient of the state before the last block, at the end that of `initial`
    _, size = _block_sizes(x.size(0), decay.numel(), x.device)
    for rows, tokens in _blocks(x, decay.numel(), reverse=True):
        number = tokens.start // size
        before = ends[rows, number - 1] if number else initial[rows]
        block = _part((x, dt, inputs, keep), rows, tokens)
        block_x, block_dt, block_inputs, _ = block
        a, h = _states(block, decay, before)
        # 1. The gradient of each state: from its output, from the end of the block, from the next.
        grad = grad_y[rows, tokens]
        g = outputs[rows, tokens].unsqueeze(3) * grad.unsqueeze(2)
        g[:, -1].add_(carry[rows]).add_(grad_ends[rows, number])
        scan_(a[:, 1:], g, reverse=True)
        torch.mul(a[:, 0], g[:, 0], out=carry[rows])
        # 2. Of the products in h = a · h + dt · x · B and y = C · h.
        grad_outputs[rows, tokens] = _vector_times(grad, h.mT)
        grad_inputs[rows, tokens] = _vector_times(block_dt * block_x, g.mT)
        grad_u = _vector_times(block_inputs, g)
        grad_x[rows, tokens] = grad_u * block_dt
        # 3. Of the exponents dt · A: the gradient of a decay, g · h_(t-1), times the decay.
        g.mul_(a)
        g[:, 1:].mul_(h[:, :-1])
        g[:, 0].mul_(before)
        grad_dt[rows, tokens] = torch.mul(g, decay, out=a).sum(2).addcmul_(grad_u, block_x)
        grad_decay.add_(g.mul_(block_dt.unsqueeze(2)).sum((0, 1)))
        del a, h, g  # before those of the next block
    return grad_x, grad_dt, grad_decay, grad_inputs, grad_outputs, carry


def _vector_times(vectors: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """(B, T, K), (B, T, K, M) -> (B, T, M). With the vector on the right, a CPU takes ten times as
    long."""
    return torch.matmul(vectors.unsqueeze(2), matrices).squeeze(2)


def _contiguous_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@_selective_scan_backward.register_fake
def _(grad_y, grad_ends, x, dt, decay, inputs, outputs, initial, keep, ends):
    return tuple(map(_contiguous_like, (x, dt, decay, inputs, outputs, initial)))


def _save_selective_scan(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def _selective_scan_gradients(ctx, grad_y, grad_ends):
    return (*_selective_scan_backward(grad_y, grad_ends, *ctx.saved_tensors), None)


_selective_scan.register_autograd(_selective_scan_gradients, setup_context=_save_selective_scan)


@register_flop_formula(torch.ops.components.selective_scan)
def _selective_scan_flops(x, dt, decay, *shapes, **unused) -> int:
    """Of the matrix products that run, y = C · h: 2 for each element of the states."""
    return 2 * x[0] * x[1] * decay[0] * decay[1]


# Elements written, per state: 3 by a scan (half of the elements three times, at all its levels),
# 1 by the copy of b; decays of the selective scan take 2, and its input 1.
ELEMENT_FORMULAS[torch.ops.components.linear_scan] = lambda a, b, initial: 4 * b.numel()
ELEMENT_FORMULAS[torch.ops.components.selective_scan] = lambda x, dt, decay, *_: (
    6 * x.size(0) * x.size(1) * decay.numel()
)


def _block_bytes(x: torch.Tensor, state: int) -> int:
    """Bytes of the states of a block of x (B, T, ...); state: elements of one token's state."""
    rows, tokens = _block_sizes(x.size(0), state, x.device)
    return rows * min(tokens, x.size(1)) * state * x.element_size()


# A scan holds products of links, at all its levels together fewer elements than a block's states.
# The selective scan holds decays and states too, and gradients of states in the backward pass.
for _operator in (torch.ops.components.linear_scan, torch.ops.components.linear_scan_backward):
    WORKING_MEMORY[_operator] = lambda a, *_: _block_bytes(a, a.size(2))
WORKING_MEMORY[torch.ops.components.selective_scan] = lambda x, dt, decay, *_: (
    3 * _block_bytes(x, decay.numel())
)
WORKING_MEMORY[torch.ops.components.selective_scan_backward] = (
    lambda grad_y, grad_ends, x, dt, decay, *_: 4 * _block_bytes(x, decay.numel())
)
