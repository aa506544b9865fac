"""State-space duality: a recurrence with one decay per head as products of matrices.

Of each head, with a state S (N, P), values x (P,), keys b and queries c (N,), step sizes Δ and
decays a in (0, 1] (Dao & Gu 2024, section 2.1 and equation 1):

    S_t = a_t · S_(t-1) + Δ_t · b_t x_tᵀ        y_t = S_tᵀ c_t + D · x_t

Over a chunk of tokens, with the state S before it and products of decays over tokens, a_(s:t) =
a_(s+1) · … · a_t, this is (their section 6, listing 1):

    y_t = Σ_(s≤t) (c_t · b_s) a_(s:t) Δ_s x_s + a_(0:t) Sᵀ c_t + D · x_t
    S'  = a_(0:Q) S + Σ_s a_(s:Q) Δ_s b_s x_sᵀ

Heads of a group share keys and queries. Decays are given as logarithms; only differences that are
at most 0 are exponentiated, so that decays may be as strong as they like.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 64  # tokens
LEAST_STEP = 1e-30  # smaller steps are taken as this one, whose logarithm is finite


class Inputs(NamedTuple):
    """Inputs of the recurrence, of tokens (B, T, ...) or of chunks (B, chunks, Q, ...)."""

    x: torch.Tensor  # (B, T, H, P)
    steps: torch.Tensor  # Δ (B, T, H), at least 0
    log_decays: torch.Tensor  # log a (B, T, H), at most 0
    keys: torch.Tensor  # b (B, T, G, N); head h is in group h // (H / G)
    queries: torch.Tensor  # c (B, T, G, N)


class Boundaries(NamedTuple):
    """What document boundaries hide in chunks of Q tokens."""

    same: torch.Tensor  # (B, chunks, Q, Q): whether two tokens are of the same document
    before: torch.Tensor  # (B, chunks, Q): whether a token's document began before the chunk
    until_end: torch.Tensor  # (B, chunks, Q): whether it goes on until the end of the chunk


def state_space_duality(
    inputs: Inputs,
    skip: torch.Tensor,
    state: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    needs_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y (B, T, H, P), and the state (B, G, N, H / G, P) after the last token if it is needed.

    skip: D (H,). state: before the first token; None: zeros. starts (B, T): the first token of each
    document, before which the state is zero.
    """
    length = inputs.x.size(1)
    size = min(CHUNK, length)
    # 1. Split the tokens into chunks; tokens that fill the last one change nothing.
    missing = -length % size
    chunks = Inputs(*(_into_chunks(each, size, missing) for each in inputs))
    boundaries = None if starts is None else _find_boundaries(_into_chunks(starts, size, missing))
    sums = chunks.log_decays.cumsum(dim=2)  # log a_(0:t), (B, chunks, Q, H)
    # 2. Add what tokens of the same chunk contribute.
    y = _without_intermediates(_within_chunks, chunks, sums, skip, boundaries)
    # 3. Add what the states before the chunks contribute.
    if chunks.x.size(1) > 1 or state is not None or needs_state:
        before, state = _states(chunks, sums, state, boundaries)
        y = y + _read_states(chunks.queries, before, sums, boundaries)
    y = y.flatten(1, 2)
    return (y[:, :length] if missing else y), state


def matrix_flops(length: int, heads: int, head_dim: int, groups: int, state: int) -> float:
    """FLOPs of the products of a sequence: within chunks, to states, and from states."""
    size = min(CHUNK, length)
    tokens = length + -length % size
    scores = 2.0 * tokens * size * (groups * state + heads * head_dim)
    return scores + (4.0 * tokens * heads * head_dim * state if tokens > size else 0.0)


def _into_chunks(x: torch.Tensor, size: int, missing: int) -> torch.Tensor:
    """(B, T, ...) -> (B, chunks, Q, ...), with zeros after the last token."""
    padded = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x
    return padded.unflatten(1, (-1, size))


def _find_boundaries(starts: torch.Tensor) -> Boundaries:
    """starts: (B, chunks, Q)."""
    document = starts.cumsum(dim=2)
    return Boundaries(
        same=document[..., :, None] == document[..., None, :],
        before=document == 0,
        until_end=document == document[..., -1:],
    )


def _without_intermediates(function, *arguments) -> torch.Tensor:
    """The function's result; only the arguments are kept for the backward pass."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _within_chunks(
    chunks: Inputs, sums: torch.Tensor, skip: torch.Tensor, boundaries: Boundaries | None
) -> torch.Tensor:
    """Σ_(s≤t) (c_t · b_s) a_(s:t) Δ_s x_s + D · x_t, (B, chunks, Q, H, P)."""
    size, heads, groups = chunks.x.size(2), chunks.x.size(3), chunks.keys.size(3)
    later = torch.ones(size, size, dtype=torch.bool, device=sums.device).triu(1)
    # 1. Scores of pairs of tokens, 0 where s > t or in another document: (B, chunks, G, Q, Q).
    scores = chunks.queries.transpose(2, 3) @ chunks.keys.permute(0, 1, 3, 4, 2)
    hidden = later if boundaries is None else (later | ~boundaries.same)[:, :, None]
    scores = scores.masked_fill(hidden, 0.0)
    # 2. a_(s:t) Δ_s, and 1 where s > t: (B, chunks, H, Q, Q).
    of_end = sums.transpose(2, 3)
    of_begin = of_end - chunks.steps.clamp(min=LEAST_STEP).log().transpose(2, 3)
    weights = (of_end[..., :, None] - of_begin[..., None, :]).masked_fill_(later, 0.0).exp_()
    # 3. Their products, with D on the diagonal.
    weights = weights.unflatten(2, (groups, heads // groups)) * scores[:, :, :, None]
    weights = weights.flatten(2, 3)
    weights.diagonal(dim1=-2, dim2=-1).add_(skip[:, None])
    return (weights @ chunks.x.transpose(2, 3)).transpose(2, 3)


def _states(
    chunks: Inputs,
    sums: torch.Tensor,
    state: torch.Tensor | None,
    boundaries: Boundaries | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states before each chunk, (B, chunks, G, N, H / G, P), and the one after the last."""
    heads, groups = chunks.x.size(3), chunks.keys.size(3)
    # 1. What each chunk adds to the state: Σ_s a_(s:Q) Δ_s b_s x_sᵀ.
    weights = (sums[:, :, -1:] - sums).exp() * chunks.steps
    decays = sums[:, :, -1].exp()
    if boundaries is not None:
        weights = weights * boundaries.until_end[..., None]
        decays = decays * boundaries.before[:, :, -1:]
    weighted = _by_group(chunks.x * weights[..., None], groups)
    added = chunks.keys.permute(0, 1, 3, 4, 2) @ weighted  # (B, chunks, G, N, H / G · P)
    added = added.unflatten(-1, (heads // groups, -1))
    # 2. The recurrence over chunks: S' = a_(0:Q) S + what the chunk adds.
    decays = decays.unflatten(2, (groups, 1, -1, 1))
    before = [torch.zeros_like(added[:, 0]) if state is None else state.to(added.dtype)]
    for decay, new in zip(decays.unbind(1), added.unbind(1)):
        before.append(torch.addcmul(new, decay, before[-1]))
    return torch.stack(before[:-1], dim=1), before[-1]


def _read_states(
    queries: torch.Tensor,
    before: torch.Tensor,
    sums: torch.Tensor,
    boundaries: Boundaries | None,
) -> torch.Tensor:
    """a_(0:t) Sᵀ c_t, (B, chunks, Q, H, P)."""
    decays = sums.exp()
    if boundaries is not None:
        decays = decays * boundaries.before[..., None]
    read = queries.transpose(2, 3) @ before.flatten(-2)  # (B, chunks, G, Q, H / G · P)
    read = read.transpose(2, 3).unflatten(-1, before.shape[-2:]).flatten(3, 4)
    return read * decays[..., None]


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, chunks, Q, H, P) -> (B, chunks, G, Q, H / G · P)."""
    return x.unflatten(3, (groups, -1)).transpose(2, 3).flatten(4)
