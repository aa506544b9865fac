"""Output projection and cross-entropy, fused so that only a chunk of the logits is in memory.

torch.nn.functional.cross_entropy takes all logits, and autograd keeps them for the backward pass.
torch.nn.functional.linear_cross_entropy ignores autocast, and rounds the loss to the dtype of its
input; it has no soft cap.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

from common import hardware
from components.base import matmul_dtype

# --------------------------------------------------------------------------------------------------
# The method, by device


class LossMethod(NamedTuple):
    """How the loss of a chunk of the logits and its gradients are computed."""

    # Bytes of a chunk of logits. Each chunk adds to a gradient of the whole matrix, so chunks are
    # not smaller than memory requires.
    chunk_bytes: int
    # Bytes of the fp32 scores within a chunk: on a CPU they stay in the cache.
    scratch_bytes: int
    # A function like `fused_cross_entropy_`, for all rows of a chunk; None: `cross_entropy_`.
    fused: Callable | None = None
    # Whether torch.addmm can add a product of bf16 or fp16 matrices to an fp32 matrix.
    adds_to_fp32: bool = False

    def chunk_rows(self, rows: int, row_bytes: int) -> int:
        """Number of rows of a chunk; the last chunk may have fewer."""
        chunks = max(1, -(-rows * row_bytes // self.chunk_bytes))
        if self.fused is not None:  # of equally many rows, since it is compiled for each shape
            divisors = (n for n in range(chunks, 2 * chunks) if rows % n == 0)
            chunks = next(divisors, chunks)
        return -(-rows // chunks)

    def scratch_rows(self, width: int) -> int:
        """Number of rows of `width` values that are processed in fp32 at a time."""
        return max(1, self.scratch_bytes // (4 * width))


CPU_METHOD = LossMethod(chunk_bytes=2**27, scratch_bytes=2**22)
OTHER_METHOD = LossMethod(chunk_bytes=2**29, scratch_bytes=2**27)
# Of a GPU's memory: at most this fraction is a chunk of logits, and at most so many bytes, so that
# indices of its elements fit into 32 bits.
CUDA_CHUNK_SHARE = 1 / 32
CUDA_CHUNK_BYTES = 2**31


def loss_method(device: torch.device, compiled: bool) -> LossMethod:
    """The method on a device; compiled: whether the run compiles."""
    if device.type == 'cuda':
        fused = _compiled_cross_entropy() if compiled else None
        return cuda_method(hardware.total_memory(device), fused)
    return CPU_METHOD if device.type == 'cpu' else OTHER_METHOD


def cuda_method(memory: float, fused: Callable | None) -> LossMethod:
    """The method on a CUDA device with `memory` bytes, with that function if the run compiles.

    A chunk is a power of two, so that a GPU's nominal memory, with which a run is planned, gives
    the same as the memory that the driver reports.
    """
    share = max(1, int(memory * CUDA_CHUNK_SHARE))
    return LossMethod(
        chunk_bytes=min(CUDA_CHUNK_BYTES, 2 ** (share.bit_length() - 1)),
        scratch_bytes=2**27,
        fused=fused,
        adds_to_fp32=torch.version.hip is None,  # not in all ROCm versions
    )


@cache
def _compiled_cross_entropy() -> Callable:
    # A graph for training and one for evaluation; twice that if the last chunk has fewer rows.
    return torch.compile(fused_cross_entropy_, dynamic=False)


# --------------------------------------------------------------------------------------------------
# Projection and loss


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    ignored: int,
    compiled: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """hidden (N, C), weight (V, C), targets (N,), bias (V,) -> the cross-entropy of the logits
    hidden · weightᵀ + bias in nats, summed over the targets that are not `ignored`, in fp32.

    Logits are in autocast's precision, softmax and loss in fp32; with `softcap` c the logits become
    c · tanh(logits / c). The forward pass computes the gradients, in the memory of the logits, so
    that the loss can be differentiated once. (Similar to Liger kernel, Hsu et al. 2024, and to Cut
    Cross-Entropy, Wijmans et al. 2024.)

    compiled: on a CUDA device, compute the loss of a chunk of logits in one compiled function.
    """
    method = loss_method(hidden.device, compiled)
    arguments = hidden, weight, bias, targets, matmul_dtype(weight), softcap, ignored, method
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(*arguments)
    return _loss_and_gradients(*arguments, needs_grad=(False, False, False))[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, *rest):
        # The gradients are computed here, where the logits are, and kept until `backward`.
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        loss, *ctx.gradients = _loss_and_gradients(
            hidden, weight, bias, *rest, needs_grad=ctx.needs_input_grad[:3]
        )
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if ctx.gradients is None:
            raise RuntimeError(
                'this loss can be differentiated only once: its gradients have been released'
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else _scaled(gradient, grad_loss, dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes)
        ]
        return *scaled, None, None, None, None, None


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient times a factor in `dtype`: multiplied in the wider of the two dtypes, and in
    place, so that no second copy exists."""
    wider = torch.promote_types(gradient.dtype, dtype)
    return gradient.to(wider).mul_(factor).to(dtype)


def _loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    dtype: torch.dtype,
    softcap: float | None,
    ignored: int,
    method: LossMethod,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(loss, ∂/∂hidden, ∂/∂weight, ∂/∂bias), None for a gradient that is not needed."""
    needs_grad_hidden, needs_grad_weight, needs_grad_bias = needs_grad
    vocabulary = len(weight)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    chunk_rows = method.chunk_rows(len(hidden), vocabulary * weight.element_size())

    # Allocate all memory before the loop: an allocator that aligns blocks cannot reuse a gap of the
    # same size (see docs/performance.md on fragmentation).
    scratch = None
    if method.fused is None:  # within a chunk, rows whose fp32 scores fit into the scratch
        scratch_rows = min(method.scratch_rows(vocabulary), chunk_rows)
        scratch = hidden.new_empty((scratch_rows, vocabulary), dtype=torch.float32)
    loss = torch.zeros((), device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if needs_grad_hidden else None
    sum_of_products = None
    if needs_grad_weight:
        sum_of_products = SumOfProducts(weight, method, one_product=chunk_rows == len(hidden))
    grad_bias = None
    if needs_grad_bias:  # a sum over all rows, in fp32
        grad_bias = torch.zeros(vocabulary, device=hidden.device)
    logit_buffer = hidden.new_empty((chunk_rows, vocabulary))

    for first in chunk_starts(len(hidden), chunk_rows):
        rows = slice(first, first + chunk_rows)
        chunk = hidden[rows]
        # Forward: the logits, then the loss, which overwrites them with their gradient.
        logits = logit_buffer[: len(chunk)]
        if bias is None:
            torch.mm(chunk, weight.T, out=logits)
        else:
            torch.addmm(bias, chunk, weight.T, out=logits)
        rest = softcap, ignored, any(needs_grad)
        if method.fused is not None:
            loss += method.fused(logits, targets[rows], *rest).sum()
        else:
            loss += cross_entropy_(logits, targets[rows], scratch, *rest)
        # Backward: ∂hidden = ∂logits · weight, and ∂weight = ∂logitsᵀ · hidden over all chunks.
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden[rows])
        if sum_of_products is not None:
            sum_of_products.add(logits.T, chunk)
        if grad_bias is not None:
            grad_bias += logits.sum(dim=0, dtype=torch.float32)
    return loss, grad_hidden, sum_of_products and sum_of_products.total, grad_bias


def chunk_starts(length: int, chunk_rows: int) -> Sequence[int]:
    """First row of each chunk of `chunk_rows` rows. The memory simulation, for which all chunks are
    alike, replaces this function."""
    return range(0, length, chunk_rows)


class SumOfProducts:
    """The gradient of `weight`: a sum of products of two matrices each, in the dtype of `weight`.

    The sum is in fp32 if it has several terms, if torch can add to an fp32 matrix, and for fp16,
    which would overflow before the factor of the gradient scaler is applied.
    """

    def __init__(self, weight: torch.Tensor, method: LossMethod, one_product: bool):
        self.method, self.empty = method, True
        dtype = weight.dtype
        narrow = one_product and not method.adds_to_fp32 and dtype != torch.float16
        self.total = torch.empty_like(weight, dtype=dtype if narrow else torch.float32)
        # Without that ability, products of a quarter of a chunk's size.
        self.rows = -(-len(weight) // -(-4 * weight.nbytes // method.chunk_bytes))
        self.product = None
        if dtype == torch.bfloat16 and not narrow and not method.adds_to_fp32:
            self.product = weight.new_empty((self.rows, weight.size(1)))

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add a · b."""
        total, beta, self.empty = self.total, 0 if self.empty else 1, False
        if total.dtype == a.dtype:
            torch.addmm(total, a, b, beta=beta, out=total)
        elif self.method.adds_to_fp32:
            torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
        elif self.product is None:  # fp16, whose products may overflow too
            b = b.float()
            for total_part, a_part in zip(total.split(self.rows), a.split(self.rows)):
                torch.addmm(total_part, a_part.float(), b, beta=beta, out=total_part)
        else:
            for total_part, a_part in zip(total.split(self.rows), a.split(self.rows)):
                product = torch.mm(a_part, b, out=self.product[: len(a_part)])
                self._add_product(total_part, product, beta)

    def _add_product(self, total: torch.Tensor, product: torch.Tensor, beta: int) -> None:
        if beta == 0:
            total.copy_(product)
            return
        # A few rows at a time, since torch converts them to fp32 first.
        rows = self.method.scratch_rows(total.size(1))
        for total_rows, product_rows in zip(total.split(rows), product.split(rows)):
            total_rows += product_rows


# --------------------------------------------------------------------------------------------------
# The loss of a chunk


def fused_cross_entropy_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    ignored: int,
    into_gradient: bool,
) -> torch.Tensor:
    """As `cross_entropy_`, without scratch, and with a loss per row, (R,).

    Written for torch.compile, which on a GPU makes one kernel of it: each row is read twice (for
    the largest score and the sums; for the gradient) and written once. All fp32 values of the size
    of the logits are in registers.
    """
    counted = targets != ignored
    is_target = torch.arange(logits.size(1), device=logits.device) == targets[:, None]
    scores, slope = logits.float(), None
    if softcap is not None:
        bounded = torch.tanh(scores / softcap)
        scores, slope = bounded * softcap, 1 - bounded.square()
    largest = scores.amax(dim=-1, keepdim=True)
    exponentials = (scores - largest).exp()
    z = exponentials.sum(dim=-1, keepdim=True)
    # A sum, which joins the others; `gather` would need a kernel of its own.
    target_score = scores.where(is_target, 0.0).sum(dim=-1, keepdim=True)
    loss = (largest + z.log() - target_score).squeeze(-1).where(counted, 0.0)
    if into_gradient:
        gradient = exponentials - z.where(is_target, 0.0)
        if slope is not None:
            gradient = gradient * slope
        logits.copy_(gradient * (counted[:, None] / z))
    return loss


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
