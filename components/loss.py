"""The last matrix product and the cross-entropy in one, which never holds all of the logits."""

import torch

from components.contract import matmul_dtype

# Of logits, held at a time. Each further chunk adds up a whole gradient of the matrix, so a chunk
# is no smaller than memory wants it.
CHUNK_BYTES = {'cpu': 2**28, 'cuda': 2**29}
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
    chunks = -(-of_all // CHUNK_BYTES.get(kind, CHUNK_BYTES['cuda']))
    rows = -(-len(hidden) // max(1, chunks))  # equally many in each
    at_a_time = max(1, SCRATCH_BYTES.get(kind, SCRATCH_BYTES['cuda']) // (4 * vocabulary))
    scratch = hidden.new_empty((min(at_a_time, rows), vocabulary), dtype=torch.float32)
    loss = torch.zeros((), device=hidden.device)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    of_weight = None
    for first in range(0, len(hidden), rows):
        chunk = slice(first, first + rows)
        logits = hidden[chunk] @ weight.T  # (rows, V)
        loss += cross_entropy_(logits, targets[chunk], scratch, softcap, ignored, any(wanted))
        if wanted[0]:
            torch.mm(logits, weight, out=of_hidden[chunk])
        if wanted[1]:
            product = logits.T @ hidden[chunk]
            if of_weight is None:  # several are added up in fp32
                of_weight = product if len(hidden) <= rows else product.float()
            else:
                of_weight += product
            del product
        del logits  # before there are more
    return loss, of_hidden, of_weight


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
        log_z = scores.logsumexp(dim=-1, keepdim=True)
        total += (log_z - scores.gather(1, place)).where(counted, 0.0).sum()
        if into_gradient:
            gradient = scores.sub_(log_z).exp_()
            gradient.scatter_add_(1, place, gradient.new_full(place.shape, -1.0))
            if softcap is not None:
                gradient *= slope
            torch.mul(gradient, counted, out=some)
    return total


@cross_entropy_.register_fake
def _(logits, targets, scratch, softcap, ignored, into_gradient):
    return scratch.new_empty(())
