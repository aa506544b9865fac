"""The last matrix product and the cross-entropy in one, which never holds all of the logits."""

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
    return _loss_and_gradients(*arguments, wanted=(False, False))[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, *rest):
        ctx.dtypes = hidden.dtype, weight.dtype
        loss, *ctx.gradients = _loss_and_gradients(
            hidden, weight, *rest, wanted=ctx.needs_input_grad[:2]
        )
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError('this loss can be differentiated once: its gradients are gone')
        found, ctx.gradients = ctx.gradients, None
        gradients = [
            None if gradient is None else gradient.to(dtype).mul_(upstream)
            for gradient, dtype in zip(found, ctx.dtypes)
        ]
        return *gradients, None, None, None, None


def _loss_and_gradients(hidden, weight, targets, dtype, softcap, ignored, wanted):
    """(loss, ∂/∂hidden, ∂/∂weight), None for a gradient that is not wanted."""
    kind, vocabulary = hidden.device.type, len(weight)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    of_all = len(hidden) * vocabulary * weight.element_size()
    chunks = -(-of_all // _limit(CHUNK_BYTES, kind))
    rows = -(-len(hidden) // max(1, chunks))  # equally many in each
    at_a_time = min(_rows_at_a_time(weight.T), rows)
    scratch = hidden.new_empty((at_a_time, vocabulary), dtype=torch.float32)
    loss = torch.zeros((), device=hidden.device)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    # Several are added up in fp32, by way of products of a quarter of a chunk's size. All use the
    # same memory: an allocator that aligns what it gives finds no room in a hole of the same size.
    summed_in = dtype if rows == len(hidden) else torch.float32
    of_weight = torch.empty_like(weight, dtype=summed_in) if wanted[1] else None
    product = None
    if wanted[1] and summed_in != dtype:
        pieces = -(-4 * weight.nbytes // _limit(CHUNK_BYTES, kind))
        product = weight.new_empty((-(-vocabulary // pieces), weight.size(1)))
    all_logits = hidden.new_empty((rows, vocabulary))
    for first in chunk_starts(len(hidden), rows):
        chunk = slice(first, first + rows)
        some = hidden[chunk]
        logits = torch.mm(some, weight.T, out=all_logits[: len(some)])
        loss += cross_entropy_(logits, targets[chunk], scratch, softcap, ignored, any(wanted))
        if wanted[0]:
            torch.mm(logits, weight, out=of_hidden[chunk])
        if wanted[1]:
            _add_product(of_weight, logits.T, some, product, begin=first == 0)
    return loss, of_hidden, of_weight


def chunk_starts(length: int, rows: int) -> Sequence[int]:
    """First row of each chunk of `rows` of `length` rows. A simulation of the memory, in which one
    chunk is like another, replaces it."""
    return range(0, length, rows)


def _add_product(total, a, b, product, begin: bool) -> None:
    """total += a b, or = where it is to `begin`; by way of `product`, some rows at a time, if that
    has another dtype."""
    if product is None:
        torch.addmm(total, a, b, beta=0 if begin else 1, out=total)
        return
    for into, some in zip(total.split(len(product)), a.split(len(product))):
        found = torch.mm(some, b, out=product[: len(some)])
        if begin:
            into.copy_(found)
            continue
        # A few rows at a time, since torch first makes them fp32.
        pieces = (tensor.split(_rows_at_a_time(total)) for tensor in (into, found))
        for of_total, of_product in zip(*pieces):
            of_total += of_product


def _limit(sizes: dict[str, int], kind: str) -> int:
    """That of this kind of device; of one that is not known, a GPU's."""
    return sizes.get(kind, sizes['cuda'])


def _rows_at_a_time(like: torch.Tensor) -> int:
    """So many rows, each as long as those of a matrix, are worked on in fp32 at a time."""
    return max(1, _limit(SCRATCH_BYTES, like.device.type) // (4 * like.size(-1)))


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
    pieces = (tensor.split(len(scratch)) for tensor in (logits, targets))
    for some, its_targets in zip(*pieces):
        counted = (its_targets != ignored)[:, None]
        place = its_targets[:, None].where(counted, 0)
        scores = scratch[: len(some)].copy_(some)
        if softcap is not None:
            scores.div_(softcap).tanh_()
            slope = 1 - scores.square() if into_gradient else None
            scores.mul_(softcap)
        largest, chosen = scores.amax(dim=-1, keepdim=True), scores.gather(1, place)
        exponentials = scores.sub_(largest).exp_()
        z = exponentials.sum(dim=-1, keepdim=True)
        total += (largest + z.log() - chosen).where(counted, 0.0).sum()
        if into_gradient:
            gradient = exponentials.scatter_add_(1, place, -z)
            if softcap is not None:
                gradient *= slope
            some.copy_(gradient.mul_(counted / z))
    return total


@cross_entropy_.register_fake
def _(logits, targets, scratch, softcap, ignored, into_gradient):
    return scratch.new_empty(())
