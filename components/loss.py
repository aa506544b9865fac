"""The last matrix product and the cross-entropy in one, which never holds all of the logits."""

import torch

from components.contract import matmul_dtype

# Logits that are held at a time. Each further chunk adds up a whole gradient of the matrix, so a
# chunk is as large as memory may well be.
CHUNK_BYTES = 2**29
# Of fp32 scores, within a chunk: on a CPU they stay in the cache.
ROW_BYTES = {'cpu': 2**22, 'cuda': 2**27}


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
    loss = torch.zeros((), device=hidden.device)
    of_hidden, of_weight = [], None
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    rows = max(1, CHUNK_BYTES // (len(weight) * weight.element_size()))
    for some, its_targets in zip(hidden.split(rows), targets.split(rows)):
        logits = some @ weight.T  # (rows, V)
        loss += _loss(logits, its_targets, softcap, ignored, into_gradient=any(wanted))
        if wanted[0]:
            of_hidden.append(logits @ weight)
        if wanted[1]:
            product = logits.T @ some
            if len(hidden) > rows:  # several are added up in fp32
                product = product.float()
            of_weight = product if of_weight is None else of_weight.add_(product)
    return loss, torch.cat(of_hidden) if wanted[0] else None, of_weight


def _loss(logits, targets, softcap, ignored, into_gradient) -> torch.Tensor:
    """The summed cross-entropy of logits (R, V); `into_gradient` overwrites them with theirs."""
    rows = max(1, ROW_BYTES.get(logits.device.type, 2**27) // (4 * logits.size(1)))
    total = torch.zeros((), device=logits.device)
    for some, its_targets in zip(logits.split(rows), targets.split(rows)):
        counted = (its_targets != ignored)[:, None]
        place = its_targets[:, None].where(counted, 0)
        capped = None if softcap is None else torch.tanh(some.float() / softcap)
        scores = some if softcap is None else softcap * capped
        log_p = torch.log_softmax(scores, dim=-1, dtype=torch.float32)
        total -= log_p.gather(1, place).where(counted, 0.0).sum()
        if into_gradient:
            gradient = log_p.exp_()
            gradient.scatter_add_(1, place, gradient.new_full(place.shape, -1.0))
            if softcap is not None:
                gradient *= 1 - capped.square()
            some.copy_(gradient.mul_(counted))
    return total
