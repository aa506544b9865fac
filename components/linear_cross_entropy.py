"""The last matrix product and the cross-entropy in one, which never holds all of the logits.

torch.nn.functional.cross_entropy takes the logits whole, and autograd keeps them for the backward
pass; torch has nothing that joins the two.
"""

from collections.abc import Sequence

import torch

from components.base import matmul_dtype

# Of logits, held at a time. Each further chunk adds up a whole gradient of the matrix, so a chunk
# is no smaller than memory wants it.
CHUNK_BYTES = {'cpu': 2**27, 'cuda': 2**29}
# Of fp32 scores, within a chunk: on a CPU they stay in the cache, on a GPU they fill it.
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

    Logits in autocast's precision, softmax and loss in fp32; with `softcap` c they become
    c · tanh(logits / c). The gradient is computed at once in the place of the logits, and can be
    taken once. (Like Hsu et al. 2024, Liger kernel; a chunk at a time as in Wijmans et al. 2024.)
    """
    arguments = hidden, weight, targets, matmul_dtype(weight), softcap, ignored
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(*arguments)
    return _loss_and_gradients(*arguments, needs_grad=(False, False))[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, *rest):
        # The gradients are computed here, while the logits are at hand, and kept until `backward`.
        ctx.dtypes = hidden.dtype, weight.dtype
        loss, *ctx.gradients = _loss_and_gradients(
            hidden, weight, *rest, needs_grad=ctx.needs_input_grad[:2]
        )
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if ctx.gradients is None:
            raise RuntimeError('this loss can be differentiated once: its gradients are gone')
        # Scaled in place by the gradient that comes in, so that they exist once.
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

    # All memory is taken before the loop: an allocator that aligns what it gives finds no room in
    # a hole of the same size. The gradient of the weight is added up in fp32 where there are
    # several chunks, by way of products of a quarter of a chunk's size.
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
        # Forward: the logits, then the loss, which turns them into their own gradient.
        logits = torch.mm(chunk, weight.T, out=logit_buffer[: len(chunk)])
        loss += cross_entropy_(logits, targets[rows], scratch, softcap, ignored, any(needs_grad))
        # Backward: ∂hidden = ∂logits · weight, and ∂weight = ∂logitsᵀ · hidden over all chunks.
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            _add_product(grad_weight, logits.T, chunk, product, begin=first == 0)
    return loss, grad_hidden, grad_weight


def chunk_starts(length: int, chunk_rows: int) -> Sequence[int]:
    """First row of each chunk of `chunk_rows` of `length` rows. A simulation of the memory, in
    which one chunk is like another, replaces it."""
    return range(0, length, chunk_rows)


def _add_product(
    total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, product: torch.Tensor | None, begin: bool
) -> None:
    """total += a b, or = where it is to `begin`; by way of `product`, as many rows of a at a time
    as that has, if it has another dtype."""
    if product is None:
        torch.addmm(total, a, b, beta=0 if begin else 1, out=total)
        return
    for total_part, a_part in zip(total.split(len(product)), a.split(len(product))):
        product_part = torch.mm(a_part, b, out=product[: len(a_part)])
        if begin:
            total_part.copy_(product_part)
            continue
        # A few rows at a time, since torch first makes them fp32.
        rows = _scratch_rows(total)
        for total_rows, product_rows in zip(total_part.split(rows), product_part.split(rows)):
            total_rows += product_rows


def _limit(sizes: dict[str, int], device: str) -> int:
    """That of this kind of device; of one that is not known, a GPU's."""
    return sizes.get(device, sizes['cuda'])


def _scratch_rows(matrix: torch.Tensor) -> int:
    """How many rows, each as long as those of the matrix, are worked on in fp32 at a time."""
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
    """logits (R, V), targets (R,), fp32 scratch (as many rows as are worked on at a time, V) -> the
    summed cross-entropy in fp32. `into_gradient`: the logits become its gradient by them.

    One operator, so that what simulates or compiles it need not follow the loop.
    """
    total = torch.zeros((), device=logits.device)
    for part, part_targets in zip(logits.split(len(scratch)), targets.split(len(scratch))):
        counted = (part_targets != ignored)[:, None]
        target_index = part_targets[:, None].where(counted, 0)

        # The scores in fp32, under the soft cap, whose slope tanh' = 1 - tanh² the gradient takes.
        scores = scratch[: len(part)].copy_(part)
        if softcap is not None:
            scores.div_(softcap).tanh_()
            slope = 1 - scores.square() if into_gradient else None
            scores.mul_(softcap)

        # The loss: log Σ exp(scores) - score of the target, the largest score taken out first.
        largest, target_score = scores.amax(dim=-1, keepdim=True), scores.gather(1, target_index)
        exponentials = scores.sub_(largest).exp_()
        z = exponentials.sum(dim=-1, keepdim=True)
        total += (largest + z.log() - target_score).where(counted, 0.0).sum()

        # Its gradient by the logits: (softmax - one-hot of the target) · slope, 0 if not counted.
        if into_gradient:
            gradient = exponentials.scatter_add_(1, target_index, -z)
            if softcap is not None:
                gradient *= slope
            part.copy_(gradient.mul_(counted / z))
    return total


@cross_entropy_.register_fake
def _(logits, targets, scratch, softcap, ignored, into_gradient):
    return scratch.new_empty(())
