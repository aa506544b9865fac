"""Linear attention with decay, in chunks: S_t = diag(α_t) S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t.

α_t is 1 (Katharopoulos et al. 2020), one constant of each head (RetNet: Sun et al. 2023, section
2.3), or a vector from the input (GLA: Yang et al. 2023, section 4). With products of decays over
tokens, α_(j:i) = α_(j+1) ⊙ … ⊙ α_i, a chunk of tokens is computed from the state S before it as

    o_i = (q_i ⊙ α_(0:i)) S + Σ_{j≤i} (q_i · (α_(j:i) ⊙ k_j)) v_j
    S'  = α_(0:C) ⊙ S + Σ_j (α_(j:C) ⊙ k_j) v_jᵀ

All decays are computed as such products of factors of at most 1, never as quotients, so that they
may be as strong as they like.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from components.base import at_least_fp32
from components.channel_decays import ChannelDecays

CHUNK = 64  # tokens


class _Chunks(NamedTuple):
    """What N chunks of C tokens contribute; the decays are 1 where they are left out.

    scores (B, H, N, C, C): q_i · (α_(j:i) ⊙ k_j), and 0 for j > i. q (B, H, N, C, K): with the
    decay since the beginning of the chunk. k (B, H, N, C, K): with the decay until its end. total
    (B or 1, H, N or 1, K or 1), or None: the decay over the chunk.
    """

    scores: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    total: torch.Tensor | None


def decayed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (B, H, T, V) and the state (B, H, K, V) after the last token.

    q, k: (B, H, T, K). v: (B, H, T, V). log_decay: log α ≤ 0, of each head (H,) or of each channel
    of a key (B, H, T, K); None: no decay. state: before the first token; None: zeros. starts
    (B, T): the first token of each document, which begins with a state of zeros.

    Computed in fp32, or in fp64 if the inputs are.
    """
    q, k, v = (at_least_fp32(x) for x in (q, k, v))
    log_decay = None if log_decay is None else at_least_fp32(log_decay)
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.size(-1), v.size(-1))
    # The last tokens are a shorter chunk.
    length = q.size(2)
    whole = length - length % CHUNK
    outputs = []
    for begin, end, size in ((0, whole, CHUNK), (whole, length, length - whole)):
        if begin == end:
            continue
        queries, keys, values = (x[:, :, begin:end].unflatten(2, (-1, size)) for x in (q, k, v))
        decay = log_decay
        if log_decay is not None and log_decay.dim() > 1:
            decay = log_decay[:, :, begin:end].unflatten(2, (-1, size))
        begins = None if starts is None else starts[:, begin:end].unflatten(1, (-1, size))
        output, state = _attend_chunks(queries, keys, values, decay, state, begins)
        outputs.append(output.flatten(2, 3))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)), state


def _attend_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    state: torch.Tensor,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decayed_attention` of N chunks of C tokens: (B, H, N, C, …); starts: (B, N, C)."""
    # 1. Within each chunk: scores, and queries and keys with their decays to its ends.
    if log_decay is None:
        chunks = _Chunks((q @ k.mT).tril(), q, k, None)
    elif log_decay.dim() == 1:
        chunks = _fixed_decays(q, k, log_decay)
    else:
        chunks = _channel_decays(q, k, log_decay)
    if starts is not None:
        chunks = _within_documents(chunks, starts)
    # 2. What each chunk adds to the state, and the states before all chunks.
    added = (chunks.k.mT @ v).unbind(2)
    totals = [None] * len(added)
    if chunks.total is not None:
        total = chunks.total[..., None]
        totals = total.expand(-1, -1, len(added), -1, -1).unbind(2)
    states = []
    for new, decay in zip(added, totals):
        states.append(state)
        state = state + new if decay is None else torch.addcmul(new, state, decay)
    # 3. Outputs from the tokens of the chunk and from the state before it.
    return chunks.scores @ v + chunks.q @ torch.stack(states, dim=2), state


def _fixed_decays(q: torch.Tensor, k: torch.Tensor, log_decay: torch.Tensor) -> _Chunks:
    """log_decay: (H,)."""
    index = torch.arange(q.size(-2), device=q.device, dtype=log_decay.dtype)
    log_decay = log_decay[:, None, None]  # (H, 1, 1), for (H, N, C)
    since_begin = (log_decay * (index + 1)).exp()
    until_end = (log_decay * index.flip(0)).exp()
    lag = (index[:, None] - index).clamp(min=0)
    between = (log_decay * lag).exp().tril()[:, None]  # (H, 1, C, C)
    return _Chunks(
        (q @ k.mT) * between,
        q * since_begin[..., None],
        k * until_end[..., None],
        since_begin[None, :, :, -1:],
    )


def _channel_decays(q: torch.Tensor, k: torch.Tensor, log_decay: torch.Tensor) -> _Chunks:
    """log_decay: (B, H, N, C, K)."""
    size = q.size(-2)
    missing = _power_of_two(size) - size
    if missing:
        q, k, log_decay = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, log_decay))
    scores, q, k, total = ChannelDecays.apply(q, k, log_decay)
    return _Chunks(scores[..., :size, :size], q[..., :size, :], k[..., :size, :], total.squeeze(-2))


def _power_of_two(size: int) -> int:
    """The smallest one that is not below `size`."""
    return 1 << (size - 1).bit_length()


def _within_documents(chunks: _Chunks, starts: torch.Tensor) -> _Chunks:
    """Without what crosses from one document into the next. starts: (B, N, C)."""
    # The document of each token, from 0 for the one that began before the chunk: (B, 1, N, C).
    document = starts.cumsum(dim=-1)[:, None]
    last = document[..., -1:]
    continues = (last == 0).to(chunks.q.dtype)
    return _Chunks(
        chunks.scores * (document[..., None] == document[..., None, :]),
        chunks.q * (document == 0)[..., None],
        chunks.k * (document == last)[..., None],
        continues if chunks.total is None else chunks.total * continues,
    )


def decayed_attention_flops(
    seq_len: int, heads: int, key_dim: int, value_dim: int, by_channel: bool
) -> float:
    """FLOPs of the matrix products that run for one sequence. by_channel: a decay of each channel.

    In a chunk of C tokens: scores and outputs from its own tokens, 2 · C² · (K + V), and what it
    reads from the state and adds to it, 2 · 2 · C · K · V. Scores with decays of channels:
    2 · K / 2 · C · (C - 1), with C rounded up to a power of two; see `ChannelDecays`.
    """
    total = 0.0
    rest = seq_len % CHUNK
    for number, size in ((seq_len // CHUNK, CHUNK), (bool(rest), rest)):
        scores = 2.0 * size**2 * key_dim
        if by_channel and size:
            padded = _power_of_two(size)
            scores = padded * (padded - 1) * key_dim
        total += number * (scores + 2.0 * size**2 * value_dim + 4.0 * size * key_dim * value_dim)
    return total * heads
