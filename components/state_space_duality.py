"""State-space duality: a recurrence with one decay per head as products of matrices.

Of each head, with a state S (N, P), values x (P,), keys b and queries c (N,), step sizes Δ and
decays a in (0, 1] (Dao & Gu 2024, section 2.1 and equation 1):

    S_t = a_t · S_(t-1) + Δ_t · b_t x_tᵀ        y_t = S_tᵀ c_t + D · x_t

Over a chunk of tokens, with the state S before it and products of decays over tokens, a_(s:t) =
a_(s+1) · … · a_t, this is (their section 6, listing 1):

    y_t = Σ_(s≤t) (c_t · b_s) a_(s:t) Δ_s x_s + a_(0:t) Sᵀ c_t + D · x_t
    S'  = a_(0:Q) S + Σ_s a_(s:Q) Δ_s b_s x_sᵀ

Heads of a group share keys and queries. Decays are given as logarithms; only differences that are
at most 0 are exponentiated, so that no decay is too strong.

Gradients need no gradients of single decays: y_t is proportional to exp(sum_t), with sum_t = log
a_(0:t), and each contribution of token s to Δ_s exp(-sum_s), so that with D = 0 the gradient of
sum_t is y_t · dy_t - x_t · dx_t, and that of log Δ_t is x_t · dx_t (a dot of vectors of P). The
terms of D, which cancel, are left out of both, since they may be many times as large.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

CHUNK = 64  # tokens
SEGMENT = 2**19  # elements of (B, chunks, H, Q, Q) that are computed at once on a CPU
LEAST_STEP = 1e-30  # smaller steps are taken as this one, whose logarithm is finite
# Of the logarithm of a decay: exp(-30) is 1e-13, and sums over a chunk keep their precision.
LOWEST_LOG_DECAY = -30.0


class Inputs(NamedTuple):
    """Inputs of the recurrence."""

    x: torch.Tensor  # (B, T, H, P)
    steps: torch.Tensor  # Δ (B, T, H), at least 0
    log_decays: torch.Tensor  # log a (B, T, H), at most 0
    keys: torch.Tensor  # b (B, T, G, N); head h is in group h // (H / G)
    queries: torch.Tensor  # c (B, T, G, N)


class Masks(NamedTuple):
    """What is hidden in chunks of Q tokens; all but the first are None without documents."""

    later: torch.Tensor  # (Q, Q): tokens s > t
    other: torch.Tensor | None  # (B, chunks, 1, Q, Q): those, and s in another document
    other_before: torch.Tensor | None  # (B, chunks, Q, 1): the document begins in the chunk
    other_after: torch.Tensor | None  # (B, chunks, Q, 1): it ends in the chunk

    @property
    def hidden(self) -> torch.Tensor:
        return self.later if self.other is None else self.other


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
    x, steps, log_decays, keys, queries = (_into_chunks(each, size, missing) for each in inputs)
    masks = _find_masks(
        size, x.device, None if starts is None else _into_chunks(starts, size, missing)
    )
    # 2. Without a state before or after, a single chunk needs none.
    if state is None and (needs_state or x.size(1) > 1):
        heads, groups = x.size(3), keys.size(3)
        state = x.new_zeros(x.size(0), groups, keys.size(4), heads // groups, x.size(4))
    # 3. Compute segments of a few chunks, one after the other.
    log_steps = steps.clamp(min=LEAST_STEP).log()
    sums = log_decays.clamp(min=LOWEST_LOG_DECAY).cumsum(dim=2)
    outputs = []
    for segment in _segments((x, log_steps, sums, keys, queries), masks):
        y, state = _Chunks.apply(skip, state, *segment)
        outputs.append(y)
    y = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).flatten(1, 2)
    return (y[:, :length] if missing else y), state


def matrix_flops(
    length: int, heads: int, head_dim: int, groups: int, state: int, chunk: int
) -> float:
    """FLOPs of the products of a sequence: within chunks, to states, and from states.

    chunk: tokens of a chunk.
    """
    size = min(chunk, length)
    tokens = length + -length % size
    scores = 2.0 * tokens * size * (groups * state + heads * head_dim)
    return scores + (4.0 * tokens * heads * head_dim * state if tokens > size else 0.0)


def _into_chunks(x: torch.Tensor, size: int, missing: int) -> torch.Tensor:
    """(B, T, ...) -> (B, chunks, Q, ...), with zeros after the last token."""
    padded = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x
    return padded.unflatten(1, (-1, size))


def _find_masks(size: int, device: torch.device, starts: torch.Tensor | None) -> Masks:
    """starts: (B, chunks, Q) or None."""
    later = torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
    if starts is None:
        return Masks(later, None, None, None)
    document = starts.cumsum(dim=2)[..., None]  # numbers within the chunk
    return Masks(
        later=later,
        other=(later | (document != document.mT))[:, :, None],
        other_before=document != 0,
        other_after=document != document[:, :, -1:],
    )


def _segments(chunks: tuple[torch.Tensor, ...], masks: Masks) -> Iterable[tuple]:
    """The chunks and masks, in parts that fit into the caches of a CPU."""
    x = chunks[0]
    batch, number, size, heads, _ = x.shape
    most = max(1, SEGMENT // (batch * heads * size**2))
    if x.device.type != 'cpu' or torch.compiler.is_compiling() or number <= most:
        return [(*chunks, *masks)]
    of_chunks = [each.split(most, dim=1) for each in chunks]
    of_masks = [
        each.split(most, dim=1) if each is not None and each.dim() > 2 else itertools.repeat(each)
        for each in masks
    ]
    return zip(*of_chunks, *of_masks)


class _Chunks(torch.autograd.Function):
    """y (B, chunks, Q, H, P), and the state after the last chunk unless `state` is None.

    A function of its own, since autograd would keep several tensors (B, chunks, H, Q, Q) and pass
    over them many times. It keeps its inputs, y without D · x, and the states.
    """

    @staticmethod
    def forward(ctx, skip, state, x, log_steps, sums, keys, queries, *masks):
        masks = Masks(*masks)
        _, mixing = _mixing(log_steps, sums, keys, queries, masks)
        y = (mixing @ x.transpose(2, 3)).transpose(2, 3)
        states = None
        if state is not None:
            weights = _until_end(log_steps, sums, masks)
            added = _by_group(keys).mT @ _heads_by_group(x * weights, keys.size(3))
            states = _recurrence(added.unflatten(-1, state.shape[-2:]), _decays(sums, masks), state)
            y = _of_states(queries, states[:, :-1]).mul_(_since_begin(sums, masks)).add_(y)
        y = y.contiguous()
        ctx.save_for_backward(skip, states, y, x, log_steps, sums, keys, queries, *masks)
        y = torch.addcmul(y, x, skip[:, None])
        return y, None if states is None else states[:, -1].clone()

    @staticmethod
    def backward(ctx, grad, grad_state):
        skip, states, y, x, log_steps, sums, keys, queries, *masks = ctx.saved_tensors
        masks = Masks(*masks)
        # 1. Within chunks: gradients of x, and of the scores, from which those of b and c follow.
        weights, mixing = _mixing(log_steps, sums, keys, queries, masks)
        grad_by_head = grad.transpose(2, 3).contiguous()
        grad_x = (mixing.mT @ grad_by_head).transpose(2, 3)
        grad_mixing = grad_by_head @ x.permute(0, 1, 3, 4, 2)
        grad_scores = grad_mixing.unflatten(2, weights.shape[2:4]).mul_(weights).sum(dim=3)
        grad_scores.masked_fill_(masks.hidden, 0.0)
        grad_queries = grad_scores @ _by_group(keys)
        grad_keys = grad_scores.mT @ _by_group(queries)
        grad_end = None
        # 2. From the states before chunks, back to those after chunks.
        if states is not None:
            groups, heads_of_group = keys.size(3), states.shape[-2:]
            read = _heads_by_group(grad * _since_begin(sums, masks), groups)
            grad_queries += read @ states[:, :-1].flatten(-2).mT
            grad_read = (_by_group(queries).mT @ read).unflatten(-1, heads_of_group)
            grad_states = _recurrence(grad_read, _decays(sums, masks), grad_state, reverse=True)
            # 3. From the states after chunks to what was added to them.
            of_states = grad_states[:, 1:]
            weights = _until_end(log_steps, sums, masks)
            grad_keys += _heads_by_group(x * weights, groups) @ of_states.flatten(-2).mT
            grad_x = _of_states(keys, of_states).mul_(weights).add_(grad_x)
            grad_end = (states[:, 1:] * of_states).sum(dim=(3, 5)).flatten(2)
            grad_state = grad_states[:, 0]
        # 4. Gradients of steps and decays, as above.
        grad_log_steps = (x * grad_x).sum(dim=-1)
        grad_sums = (y * grad).sum(dim=-1) - grad_log_steps
        if grad_end is not None:
            grad_sums[:, :, -1] += grad_end
        return (
            (x * grad).sum(dim=(0, 1, 2, 4)),
            grad_state,
            torch.addcmul(grad_x, grad, skip[:, None]),
            grad_log_steps,
            grad_sums,
            grad_keys.transpose(2, 3),
            grad_queries.transpose(2, 3),
            *(None,) * len(masks),
        )


def _mixing(
    log_steps: torch.Tensor,
    sums: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    masks: Masks,
) -> tuple[torch.Tensor, torch.Tensor]:
    """a_(s:t) Δ_s, or 1 where s > t, (B, chunks, G, H / G, Q, Q), and the matrix (B, chunks, H, Q,
    Q) that maps x to y within a chunk, if D = 0."""
    # 1. Scores of pairs of tokens, 0 where s > t or in another document: (B, chunks, G, Q, Q).
    scores = (_by_group(queries) @ _by_group(keys).mT).masked_fill_(masks.hidden, 0.0)
    # 2. Decays and steps.
    begins, ends = (sums - log_steps).transpose(2, 3), sums.transpose(2, 3)
    weights = (ends[..., :, None] - begins[..., None, :]).masked_fill_(masks.later, 0.0).exp_()
    weights = weights.unflatten(2, (keys.size(3), -1))
    return weights, (weights * scores[:, :, :, None]).flatten(2, 3)


def _until_end(log_steps: torch.Tensor, sums: torch.Tensor, masks: Masks) -> torch.Tensor:
    """a_(s:Q) Δ_s, (B, chunks, Q, H, 1), or 0 where another document follows."""
    weights = (sums[:, :, -1:] - sums + log_steps).exp_()
    if masks.other_after is not None:
        weights.masked_fill_(masks.other_after, 0.0)
    return weights[..., None]


def _since_begin(sums: torch.Tensor, masks: Masks) -> torch.Tensor:
    """a_(0:t), (B, chunks, Q, H, 1), or 0 where another document is before."""
    decays = sums.exp()
    if masks.other_before is not None:
        decays.masked_fill_(masks.other_before, 0.0)
    return decays[..., None]


def _decays(sums: torch.Tensor, masks: Masks) -> torch.Tensor:
    """a_(0:Q), or 0 where another document is before the last token: (B, chunks, H)."""
    return _since_begin(sums, masks)[:, :, -1, :, 0]


def _recurrence(
    added: torch.Tensor, decays: torch.Tensor, first: torch.Tensor, reverse: bool = False
) -> torch.Tensor:
    """The states S' = a S + what is added, the first one included: (B, 1 + chunks, G, N, H / G, P).

    added (B, chunks, G, N, H / G, P), decays (B, chunks, H), first (B, G, N, H / G, P).
    """
    decays = decays.unflatten(2, (added.size(2), 1, -1, 1))
    way = -1 if reverse else 1
    states = [first]
    for decay, new in list(zip(decays.unbind(1), added.unbind(1)))[::way]:
        states.append(torch.addcmul(new, decay, states[-1]))
    return torch.stack(states[::way], dim=1)


def _of_states(keys: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Sᵀ b for keys or queries, (B, chunks, Q, H, P)."""
    values = _by_group(keys) @ states.flatten(-2)  # (B, chunks, G, Q, H / G · P)
    return values.transpose(2, 3).unflatten(-1, states.shape[-2:]).flatten(3, 4)


def _by_group(keys: torch.Tensor) -> torch.Tensor:
    """(B, chunks, Q, G, N) -> (B, chunks, G, Q, N)."""
    return keys.transpose(2, 3)


def _heads_by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, chunks, Q, H, P) -> (B, chunks, G, Q, H / G · P)."""
    return x.unflatten(3, (groups, -1)).transpose(2, 3).flatten(4)
