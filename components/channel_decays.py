"""Chunks of linear attention whose decay differs from channel to channel of a key."""

from collections.abc import Iterator

import torch


class ChannelDecays(torch.autograd.Function):
    """(q, k, log α) -> scores; queries, keys and total decay for the state around a chunk.

    q, k, log α: (…, C, K), with C a power of two. With α_(j:i) = α_(j+1) ⊙ … ⊙ α_i, the scores
    (…, C, C) are q_i · (α_(j:i) ⊙ k_j), and 0 for j > i. The others are q_i ⊙ α_(0:i) and
    k_i ⊙ α_(i:C), both (…, C, K), and α_(0:C), (…, 1, K).

    The scores of the right half of a block of 2, 4, …, C tokens with its left half are one matrix
    product, as α_(j:i) = α_(j:m) ⊙ α_(m:i) for the last token m of the left half. Both factors are
    products of decays. Nothing is divided, so no decay is too strong.

    The gradient of log α needs no derivative of these products. With G_i = log α_(0:i), all outputs
    are functions of q_i ⊙ exp(G_i), k_i ⊙ exp(-G_i) and G_C alone, so that
    dG_i = q_i ⊙ dq_i - k_i ⊙ dk_i for i < C (Yang et al. 2023, appendix C).
    """

    @staticmethod
    def forward(ctx, q, k, log_decay):
        ctx.save_for_backward(q, k, log_decay)
        scores = torch.diag_embed((q * k).sum(dim=-1))
        levels = _Levels(log_decay)
        for block in levels:
            right, left = levels.right(q, block), levels.left(k, block)
            _corners(scores, block).copy_(right @ left.mT)
        return scores, q * levels.since, k * levels.until, levels.since[..., -1:, :].clone()

    @staticmethod
    def backward(ctx, d_scores, d_q_in, d_k_out, d_total):
        q, k, log_decay = ctx.saved_tensors
        # 1. Gradients of q and k from the products of each level.
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        levels = _Levels(log_decay)
        for block in levels:
            corners = _corners(d_scores, block)
            by_right, by_left = corners @ levels.left(k, block), corners.mT @ levels.right(q, block)
            _halves(dq, block)[1].addcmul_(by_right, _halves(levels.since, block)[1])
            _halves(dk, block)[0].addcmul_(by_left, _halves(levels.until, block)[0])
        # 2. From the products with the state.
        dq.addcmul_(d_q_in, levels.since)
        from_state = d_k_out * levels.until
        dk += from_state
        # 3. Of log α: dG_i is the sum of the gradients of log α_1 … log α_i.
        d_log = q * dq - k * dk
        d_log[..., -1, :] += (k * from_state).sum(dim=-2)
        d_log[..., -1:, :] += levels.since[..., -1:, :] * d_total
        d_log = d_log.flip(-2).cumsum(dim=-2).flip(-2)
        # 4. From the diagonal of the scores, which has no decay.
        diagonal = d_scores.diagonal(dim1=-2, dim2=-1)[..., None]
        return dq.addcmul_(diagonal, k), dk.addcmul_(diagonal, q), d_log


class _Levels:
    """Iterates over blocks of 2, 4, …, C tokens, with the decays inside their halves.

    since, until (…, C, K): from the beginning of a token's half through the token, and after the
    token until the end of its half. After the last block: in the whole chunk.
    """

    def __init__(self, log_decay: torch.Tensor):
        self.since, self.until = log_decay.exp(), torch.ones_like(log_decay)

    def __iter__(self) -> Iterator[int]:
        block = 2
        while block <= self.since.size(-2):
            yield block
            (left, right), (before, _) = _halves(self.since, block), _halves(self.until, block)
            before *= right[..., -1:, :]
            right *= left[..., -1:, :]
            block *= 2

    def right(self, q: torch.Tensor, block: int) -> torch.Tensor:
        return _halves(q, block)[1] * _halves(self.since, block)[1]

    def left(self, k: torch.Tensor, block: int) -> torch.Tensor:
        return _halves(k, block)[0] * _halves(self.until, block)[0]


def _halves(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the halves of all blocks: (…, C, K) -> twice (…, C / block, block / 2, K)."""
    left, right = x.unflatten(-2, (-1, 2, block // 2)).unbind(-3)
    return left, right


def _corners(scores: torch.Tensor, block: int) -> torch.Tensor:
    """A view of the scores of right halves with left halves: (…, C, C) -> (…, C / block, h, h)."""
    blocks = (-1, 2, block // 2)
    pairs = scores.unflatten(-1, blocks).unflatten(-4, blocks)  # (…, n, 2, h, n, 2, h)
    return pairs[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
