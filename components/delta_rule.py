"""The delta rule, with or without decay, over a whole sequence in chunks of matrix products.

A head's state S (Dk, Dv) holds values under keys. With its decay a_t first, a token does

    S_t = a_t ⊙ S_(t-1) + k_t u_tᵀ,    u_t = β_t (v_t - (a_t ⊙ S_(t-1))ᵀ k_t),    y_t = S_tᵀ q_t.

a_t is 1 (DeltaNet: Schlag et al. 2021; Yang et al. 2024, arXiv:2406.06484), a number (Gated
DeltaNet: Yang et al. 2024, arXiv:2412.06464) or a vector over Dk (Kimi Delta Attention: Kimi Team
2025, arXiv:2510.26692).

In a chunk of C tokens, let G_ij be the decay after token j until token i, g_i the one from before
the chunk until token i, and S the state before the chunk. The written values solve (I + N) U = R,

    N = strictly_lower(diag(β) (K Kᵀ ⊙ G)),    R = diag(β) V - diag(β) (g ⊙ K) S,

by the inverse of I + N (the UT transform). It is applied to V and K for all chunks at once; what is
left is a recurrence over chunks, S' = g_C ⊙ S + (G_C ⊙ K)ᵀ U, and then the outputs are, for all at
once, Y = (g ⊙ Q) S + lower(Q Kᵀ ⊙ G) U.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

CHUNK = 64  # tokens; a power of 2
# Of the logarithm of a token's decay. exp(-30) is 1e-13; sums over a chunk keep their precision.
LOWEST_LOG_DECAY = -30.0


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (B, T, H, Dv), and the state (B, H, Dk, Dv) after the last token.

    q, k (B, T, Hk, Dk); v (B, T, H, Dv); each key head serves H / Hk value heads in a row.
    beta (B, T, H). log_decay: log a_t ≤ 0, (B, T, H) or, per channel, (B, T, H, Dk); None: 0.
    starts (B, T): tokens before which the state is emptied. state: that of earlier tokens.
    All in one dtype, in which it is computed.
    """
    key_heads = k.size(2)
    if log_decay is None:
        log_decay = torch.zeros_like(beta)
    log_decay = log_decay.clamp(min=LOWEST_LOG_DECAY)
    if log_decay.dim() == 3:
        log_decay = log_decay[..., None]
    if state is None:
        state = v.new_zeros(v.size(0), v.size(2), k.size(-1), v.size(-1))
    # From here on, the heads are two dimensions: (Hk, H / Hk), or (Hk, 1) of q and k.
    split = (x.unflatten(2, (key_heads, -1)) for x in (q, k, v, beta[..., None], log_decay))
    q, k, v, beta, log_decay = split
    state = state.unflatten(1, (key_heads, -1))
    over_tokens = _step if v.size(1) == 1 else _chunked
    y, state = over_tokens(q, k, v, beta, log_decay, starts, state)
    return y.flatten(2, 3), state.flatten(1, 2)


def _step(q, k, v, beta, log_decay, starts, state):
    """The rule for one token: (B, 1, Hk, H / Hk, ...), state (B, Hk, H / Hk, Dk, Dv)."""
    q, k, v, beta, log_decay = (x.movedim(1, -2) for x in (q, k, v, beta, log_decay))
    decay = log_decay.exp().mT
    if starts is not None:
        decay = decay * ~starts[..., None, None, None]
    state = state * decay
    state = state + k.mT @ (beta * (v - k @ state))
    return (q @ state).movedim(-2, 1), state


def chunk_size(tokens: int) -> int:
    """CHUNK, or the smallest power of 2 that holds fewer tokens."""
    return min(CHUNK, 1 << (tokens - 1).bit_length())


def _chunked(q, k, v, beta, log_decay, starts, state):
    """The rule for several tokens: (B, T, Hk, H / Hk, ...), state (B, Hk, H / Hk, Dk, Dv)."""
    tokens, size = v.size(1), chunk_size(v.size(1))
    q, k, v, beta, log_decay = (_in_chunks(x, size) for x in (q, k, v, beta, log_decay))
    documents = None if starts is None else _documents(starts, size)
    since_begin = log_decay.cumsum(dim=-2)
    decays = _decays(since_begin, documents)
    # 1. Products of keys with earlier keys, and of queries with earlier keys and their own.
    pairs = _ChannelPairs.apply if log_decay.size(-1) > 1 else _pairs
    key_pairs, query_pairs = pairs(q, k, since_begin)
    if documents is not None:
        key_pairs, query_pairs = key_pairs * documents.same, query_pairs * documents.same
    # 2. The written values and the states before each chunk.
    keys = beta * decays.since_begin * k
    by_head = (beta * key_pairs, keys, beta * v, decays.until_end * k, decays.across, state)
    written, states, last = _ChunkRecurrence.apply(*(x.flatten(0, 2) for x in by_head))
    # 3. Reads of both.
    heads = v.shape[:3]
    y = query_pairs @ written.unflatten(0, heads)
    y = y + (decays.since_begin * q) @ states.unflatten(0, heads)
    return y.movedim((1, 2), (3, 4)).flatten(1, 2)[:, :tokens], last.unflatten(0, heads)


def _in_chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, T, Hk, G, D) -> (B, Hk, G, N, C, D), with zeros after the last token: such tokens write
    nothing and let nothing decay."""
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, -x.size(1) % size))
    return x.unflatten(1, (-1, size)).movedim((3, 4), (1, 2)).contiguous()


class _Documents(NamedTuple):
    """Which tokens of a chunk share a document, (B, 1, 1, N, C or 1, C or 1), true or false."""

    same: torch.Tensor  # (C, C): two tokens
    before: torch.Tensor  # (C, 1): the token with those before the chunk
    last: torch.Tensor  # (C, 1): the token with the last one
    across: torch.Tensor  # (1, 1): the last token with those before the chunk


def _documents(starts: torch.Tensor, size: int) -> _Documents:
    number = _in_chunks(starts[:, :, None, None, None], size).cumsum(dim=-2)
    last = number[..., -1:, :]
    return _Documents(number == number.mT, number == 0, number == last, last == 0)


class _Decays(NamedTuple):
    """Decays between a chunk's tokens and its ends, (B, Hk, G, N, C or 1, Dk or 1)."""

    since_begin: torch.Tensor  # of the state before the chunk, until each token
    until_end: torch.Tensor  # of what each token wrote, until the last token
    across: torch.Tensor  # of the state before the chunk, until the last token; transposed


def _decays(since_begin: torch.Tensor, documents: _Documents | None) -> _Decays:
    """since_begin: the logarithm."""
    last = since_begin[..., -1:, :]
    decays = _Decays(since_begin.exp(), (last - since_begin).exp(), last.exp().mT)
    if documents is None:
        return decays
    masks = documents.before, documents.last, documents.across
    return _Decays(*(decay * mask for decay, mask in zip(decays, masks)))


def _pairs(q, k, since_begin):
    """lower(K Kᵀ ⊙ G) and lower(Q Kᵀ ⊙ G) for decays of heads, (B, Hk, G, N, C, C)."""
    decay = (since_begin - since_begin.mT).tril().exp().tril()
    return (k @ k.mT) * decay, (q @ k.mT) * decay


def _halves(x: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """The first and the second half of each 2 · size rows: (..., C, D) -> two (..., n, size, D)."""
    return x.unflatten(-2, (-1, 2, size)).unbind(-3)


def _decays_of_halves(since_begin: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The decay from each row of first halves to their last row, and from there to each row of the
    second halves; since_begin: its logarithm."""
    first, second = _halves(since_begin, size)
    middle = first[..., -1:, :]
    return (middle - first).exp(), (second - middle).exp()


class _ChannelPairs(torch.autograd.Function):
    """As `_pairs`, for decays of channels, since_begin (B, Hk, G, N, C, Dk).

    Here G_ij stands inside the sum over channels, and 1 / g_j may overflow. So the matrices are
    made of blocks of doubling size: in a block whose rows all follow its columns, both are decayed
    to the row between them, each by at most 1. In the backward pass, what a row's products add to
    the gradient of its logarithm is the row times its gradient, and for a column minus that.
    """

    @staticmethod
    def forward(ctx: Any, q, k, since_begin):
        ctx.save_for_backward(q, k, since_begin)
        query_pairs = (q * k).sum(dim=-1).expand(since_begin.shape[:-1])[..., None, None]
        key_pairs = torch.zeros_like(query_pairs)
        while (size := key_pairs.size(-1)) < k.size(-2):
            (first_k, second_k), second_q = _halves(k, size), _halves(q, size)[1]
            to_middle, from_middle = _decays_of_halves(since_begin, size)
            columns = (to_middle * first_k).mT
            key_pairs = _join(key_pairs, (from_middle * second_k) @ columns)
            query_pairs = _join(query_pairs, (from_middle * second_q) @ columns)
        return key_pairs.squeeze(-3), query_pairs.squeeze(-3)

    @staticmethod
    def backward(ctx: Any, d_key_pairs, d_query_pairs):
        q, k, since_begin = ctx.saved_tensors
        own = d_query_pairs.diagonal(dim1=-2, dim2=-1)[..., None]
        d_q, d_column = own * k, own * q
        d_row = torch.zeros_like(d_q)  # of keys as rows, beside that as columns
        size = 1
        while size < k.size(-2):
            (first_k, second_k), second_q = _halves(k, size), _halves(q, size)[1]
            to_middle, from_middle = _decays_of_halves(since_begin, size)
            columns = to_middle * first_k
            of_keys, of_queries = (_blocks_below(x, size) for x in (d_key_pairs, d_query_pairs))
            d_columns = of_keys.mT @ (from_middle * second_k)
            d_columns += of_queries.mT @ (from_middle * second_q)
            _halves(d_row, size)[1].addcmul_(from_middle, of_keys @ columns)
            _halves(d_q, size)[1].addcmul_(from_middle, of_queries @ columns)
            _halves(d_column, size)[0].addcmul_(to_middle, d_columns)
            size *= 2
        d_since_begin = q * d_q + k * (d_row - d_column)
        return d_q.sum_to_size(*q.shape), (d_row + d_column).sum_to_size(*k.shape), d_since_begin


def _blocks_below(x: torch.Tensor, size: int) -> torch.Tensor:
    """Of the diagonal blocks of `size` rows, the blocks below the first of each pair:
    (..., C, C) -> (..., n, size, size)."""
    rows = x.unflatten(-2, (-1, 2, size))[..., 1, :, :]
    blocks = rows.unflatten(-1, (-1, 2, size))[..., 0, :]
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _join(diagonal: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Lower block-triangular matrices from pairs of their diagonal blocks, (..., 2n, S, S), and
    the block below the first of each pair, (..., n, S, S) -> (..., n, 2S, 2S)."""
    upper, lower = diagonal[..., 0::2, :, :], diagonal[..., 1::2, :, :]
    return torch.cat((F.pad(upper, (0, upper.size(-1))), torch.cat((below, lower), -1)), -2)


def _inverse_of_unit_lower(below: torch.Tensor) -> torch.Tensor:
    """(I + N)⁻¹ with the part of N (..., C, C) below the diagonal, by blocks of doubling size:

    [[A, 0], [B, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ B A⁻¹, D⁻¹]].
    """
    inverse = below.new_ones(*below.shape[:-1], 1, 1)
    while (size := inverse.size(-1)) < below.size(-1):
        blocks = _blocks_below(below, size)
        if size > 1:
            blocks = inverse[..., 1::2, :, :] @ blocks @ inverse[..., 0::2, :, :]
        inverse = _join(inverse, -blocks)
    return inverse.squeeze(-3)


class _ChunkRecurrence(torch.autograd.Function):
    """(I + N_n) U_n = V_n - K_n S_n and S_(n+1) = a_n ⊙ S_n + E_nᵀ U_n over chunks n, for the heads
    X of all sequences.

    N (X, N, C, C), of which the part below the diagonal counts; K, E (X, N, C, Dk);
    V (X, N, C, Dv); a (X, N, Dk or 1, 1); S_0 (X, Dk, Dv)
    -> U (X, N, C, Dv), all S_n (X, N, Dk, Dv) and the last S (X, Dk, Dv).
    """

    @staticmethod
    def forward(ctx: Any, below, keys, values, to_end, across, state):
        inverse = _inverse_of_unit_lower(below)
        keys, values = inverse @ keys, inverse @ values
        written, states = [], []
        by_chunk = (x.unbind(1) for x in (keys, values, to_end, across))
        for keys_n, values_n, to_end_n, across_n in zip(*by_chunk):
            states.append(state)
            written.append(torch.baddbmm(values_n, keys_n, state, alpha=-1))
            state = torch.baddbmm(across_n * state, to_end_n.mT, written[-1])
        all_written, all_states = torch.stack(written, dim=1), torch.stack(states, dim=1)
        ctx.save_for_backward(inverse, keys, to_end, across, all_written, all_states)
        return all_written, all_states, state

    @staticmethod
    def backward(ctx: Any, d_written, d_states, d_state):
        inverse, keys, to_end, across, written, states = ctx.saved_tensors
        # 1. In the loop, the gradients of U and S alone.
        d_solved, d_next = [], []
        by_chunk = (x.unbind(1)[::-1] for x in (keys, to_end, across, d_written, d_states))
        for keys_n, to_end_n, across_n, d_written_n, d_state_n in zip(*by_chunk):
            d_next.append(d_state)
            d_solved.append(torch.baddbmm(d_written_n, to_end_n, d_state))
            decayed = torch.addcmul(d_state_n, across_n, d_state)
            d_state = torch.baddbmm(decayed, keys_n.mT, d_solved[-1], alpha=-1)
        # 2. The others for all chunks at once: that of V - K S first.
        d_nexts = torch.stack(d_next[::-1], dim=1)
        d_values = inverse.mT @ torch.stack(d_solved[::-1], dim=1)
        d_below = (d_values @ written.mT).tril(-1).neg()
        d_keys = -d_values @ states.mT
        d_across = (d_nexts * states).sum_to_size(*across.shape)
        return d_below, d_keys, d_values, written @ d_nexts.mT, d_across, d_state


def chunk_flops(
    tokens: int, key_heads: int, heads: int, k_dim: int, v_dim: int, per_channel: bool
) -> float:
    """FLOPs of the matrix products of `delta_rule` for one sequence.

    In a chunk of C tokens: 4C²Dk for the products of keys with keys and queries per key head, or
    2C(C - 1)Dk per value head if the decay is per channel; 2C(C² - 4) / 3 for the inverse,
    2C²(Dk + Dv) to apply it, 2C²Dv for the chunk's own reads, 6C · Dk · Dv for the state.
    """
    if tokens == 1:
        return recurrent_flops(tokens, heads, k_dim, v_dim)
    size = chunk_size(tokens)
    pairs = heads * (size - 1) / 2 if per_channel else key_heads * size
    inverse = 2 * size * (size**2 - 4) / 3
    within = 2 * size**2 * (k_dim + 2 * v_dim)
    across = 6 * size * k_dim * v_dim
    chunks = -(-tokens // size)
    return float(chunks * (4 * size * k_dim * pairs + heads * (inverse + within + across)))


def recurrent_flops(tokens: int, heads: int, k_dim: int, v_dim: int) -> float:
    """FLOPs of the rule token by token: 2 · Dk · Dv per value head for each of kᵀ S, k uᵀ and qᵀ S.

    Decays act element by element and are not counted.
    """
    return 6.0 * tokens * heads * k_dim * v_dim
