"""Output projection and cross-entropy, fused so that only a chunk of the logits is in memory.

torch.nn.functional.cross_entropy takes all logits, and autograd keeps them for the backward pass;
torch has no fused operator.
"""

from collections.abc import Sequence

import torch

from components.base import matmul_dtype

# Size of a chunk of logits. Each chunk adds to a gradient of the whole matrix, so chunks are not
# smaller than memory requires.
CHUNK_BYTES = {'cpu': 2**27, 'cuda': 2**29}
# Size of the fp32 scores within a chunk: on a CPU they stay in the cache, on a GPU they occupy it.
SCRATCH_BYTES = {'cpu': 2**22, 'cuda': 2**27}


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    ignored: int,
) -> torch.Tensor:
    """hidden (N, C), weight (V, C), targets (N,) -> the cross-entropy of hidden · weightᵀ in nats,
    summed over the targets that are not `ignored`, in fp32.

    Logits are in autocast's precision, softmax and loss in fp32; with `softcap` c the logits become
    c · tanh(logits / c). The forward pass computes the gradients, in the memory of the logits, so
    that the loss can be differentiated once. (Similar to Liger kernel, Hsu et al. 2024, and to Cut
    Cross-Entropy, Wijmans et al. 2024.)
    """
    arguments = hidden, weight, targets, matmul_dtype(weight), softcap, ignored
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(*arguments)
    return _loss_and_gradients(*arguments, needs_grad=(False, False))[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, *rest):
        # The gradients are computed here, where the logits are, and kept until `backward`.
        ctx.dtypes = hidden.dtype, weight.dtype
        loss, *ctx.gradients = _loss_and_gradients(
            hidden, weight, *rest, needs_grad=ctx.needs_input_grad[:2]
        )
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if ctx.gradients is None:
            raise RuntimeError(
                'this loss can be differentiated only once: its gradients have been released'
            )
        # Scaled in place by the incoming gradient, so that no second copy exists.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.to(dtype).mul_(grad_loss)
            for gradient, dtype in zip(gradients, ctx.dtypes)
        ]
        return *scaled, None, None, None, None


def _loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype,
    softcap: float | None,
    ignored: int,
    needs_grad: tuple[bool, bool],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(loss, ∂/∂hidden, ∂/∂weight), None for a gradient that is not needed."""
    needs_grad_hidden, needs_grad_weight = needs_grad
    device, vocabulary = hidden.device.type, len(weight)
    hidden, weight = hidden.to(dtype), weight.to(dtype)

    # Chunks of equally many rows, and within them rows whose fp32 scores fit into the scratch.
    all_logit_bytes = len(hidden) * vocabulary * weight.element_size()
    chunks = -(-all_logit_bytes // _limit(CHUNK_BYTES, device))
    chunk_rows = -(-len(hidden) // max(1, chunks))
    scratch_rows = min(_scratch_rows(weight.T), chunk_rows)

    # Allocate all memory before the loop: an allocator that aligns blocks cannot reuse a gap of the
    # same size (see docs/performance.md on fragmentation). With several chunks, the weight gradient
    # is summed in fp32, through products of a quarter of a chunk's size.
    scratch = hidden.new_empty((scratch_rows, vocabulary), dtype=torch.float32)
    loss = torch.zeros((), device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if needs_grad_hidden else None
    accum_dtype = dtype if chunk_rows == len(hidden) else torch.float32
    grad_weight = torch.empty_like(weight, dtype=accum_dtype) if needs_grad_weight else None
    product = None
    if needs_grad_weight and accum_dtype != dtype:
        parts = -(-4 * weight.nbytes // _limit(CHUNK_BYTES, device))
        product = weight.new_empty((-(-vocabulary // parts), weight.size(1)))
    logit_buffer = hidden.new_empty((chunk_rows, vocabulary))

    for first in chunk_starts(len(hidden), chunk_rows):
        rows = slice(first, first + chunk_rows)
        chunk = hidden[rows]
        # Forward: the logits, then the loss, which overwrites them with their gradient.
        logits = torch.mm(chunk, weight.T, out=logit_buffer[: len(chunk)])
        loss += cross_entropy_(logits, targets[rows], scratch, softcap, ignored, any(needs_grad))
        # Backward: ∂hidden = ∂logits · weight, and ∂weight = ∂logitsᵀ · hidden over all chunks.
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            _add_product(grad_weight, logits.T, chunk, product, begin=first == 0)
    return loss, grad_hidden, grad_weight


def chunk_starts(length: int, chunk_rows: int) -> Sequence[int]:
    """First row of each chunk of `chunk_rows` rows. The memory simulation, for which all chunks are
    alike, replaces this function."""
    return range(0, length, chunk_rows)


def _add_product(
    total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, product: torch.Tensor | None, begin: bool
) -> None:
    """total += a b, or total = a b if `begin`. With another dtype, through the buffer `product`, as
    many rows at a time as it has."""
    if product is None:
        torch.addmm(total, a, b, beta=0 if begin else 1, out=total)
        return
    for total_part, a_part in zip(total.split(len(product)), a.split(len(product))):
        product_part = torch.mm(a_part, b, out=product[: len(a_part)])
        if begin:
            total_part.copy_(product_part)
            continue
        # A few rows at a time, since torch converts them to fp32 first.
        rows = _scratch_rows(total)
        for total_rows, product_rows in zip(total_part.split(rows), product_part.split(rows)):
            total_rows += product_rows


def _limit(sizes: dict[str, int], device: str) -> int:
    """The size for this kind of device; for an unknown one, the size for a GPU."""
    return sizes.get(device, sizes['cuda'])


def _scratch_rows(matrix: torch.Tensor) -> int:
    """Number of rows of the matrix's width that are processed in fp32 at a time."""
    return max(1, _limit(SCRATCH_BYTES, matrix.device.type) // (4 * matrix.size(-1)))


@torch.library.custom_op('components::cross_entropy_', mutates_args=('logits', 'scratch'))
def cross_entropy_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scratch: torch.Tensor,
    softcap: float | None,
    ignored: int,
    into_gradient: bool,
) -> torch.Tensor:
    """logits (R, V), targets (R,), fp32 scratch (rows per step, V) -> the summed cross-entropy in
    fp32. With `into_gradient`, the logits are overwritten with their gradient.

    A single operator, so that simulation and compilation need not trace the loop.
    """
    total = torch.zeros((), device=logits.device)
    for part, part_targets in zip(logits.split(len(scratch)), targets.split(len(scratch))):
        counted = (part_targets != ignored)[:, None]
        target_index = part_targets[:, None].where(counted, 0)

        # The scores in fp32, soft-capped; the gradient needs the slope, tanh' = 1 - tanh².
        scores = scratch[: len(part)].copy_(part)
        if softcap is not None:
            scores.div_(softcap).tanh_()
            slope = 1 - scores.square() if into_gradient else None
            scores.mul_(softcap)

        # The loss: log Σ exp(scores) - score of the target, after subtracting the largest score.
        largest, target_score = scores.amax(dim=-1, keepdim=True), scores.gather(1, target_index)
        exponentials = scores.sub_(largest).exp_()
        z = exponentials.sum(dim=-1, keepdim=True)
        total += (largest + z.log() - target_score).where(counted, 0.0).sum()

        # Its gradient: (softmax - one-hot of the target) · slope, and 0 if ignored.
        if into_gradient:
            gradient = exponentials.scatter_add_(1, target_index, -z)
            if softcap is not None:
                gradient *= slope
            part.copy_(gradient.mul_(counted / z))
    return total


@cross_entropy_.register_fake
def _(logits, targets, scratch, softcap, ignored, into_gradient):
    return scratch.new_empty(())
