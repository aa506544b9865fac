"""Attention backends, and the specification of the scores that they compute."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from common.errors import UserError
from common.old_names import renamed_attribute
from common.registry import sentences_of
from components import cpu_attention
from components.base import Component, matmul_dtype
from model_config import (
    ATTENTION_BACKEND_REGISTRY,
    ATTENTION_REGISTRY,
    Device,
    ModelArchitectureConfig,
)


@dataclass(frozen=True)
class AttentionSpec:
    """Specification of a layer's attention scores. A backend lists the fields that it supports.

    scale: factor of q kᵀ, supported by every backend. softcap: scores become c · tanh(scores / c)
    before the bias is added. window: number of tokens visible to a query, its own included.
    documents: only tokens of the same document are visible. sinks: a logit of each head joins the
    softmax without a value (`attend`). chunk: number of tokens of a chunk, within which tokens
    attend; backends get its chunks as documents, so that `documents` is true too.
    """

    scale: float
    bias: bool = False
    dropout: float = 0.0
    softcap: float | None = None
    window: int | None = None
    documents: bool = False
    sinks: bool = False
    chunk: int | None = None

    def features(self) -> set[str]:
        return {k for k, value in vars(self).items() if value and k not in ('scale', 'chunk')}

    @property
    def reach(self) -> int | None:
        """The most tokens that a query sees, its own included; None: all before it."""
        return self.window or self.chunk

    def needs_mask(self, queries: int, keys: int) -> bool:
        """Whether causality alone does not describe the mask: window, documents, or several queries
        that are not all positions of the keys.

        A single query is at the last position, so that all keys are visible.
        """
        limited = self.window is not None and self.window < keys
        return limited or self.documents or queries not in (1, keys)

    def is_visible(self, q_positions: torch.Tensor, k_positions: torch.Tensor) -> torch.Tensor:
        """Whether keys are visible to queries at these positions; the shapes broadcast."""
        return within_window(q_positions - k_positions, self.window)

    hides = renamed_attribute('hides', 'needs_mask')
    visible = renamed_attribute('visible', 'is_visible')


def within_window(distance: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether a key at this distance before the query is visible."""
    past = distance >= 0
    return past if window is None else past & (distance < window)


class AttentionBackend(Component):
    """Causal softmax(scale · q kᵀ + bias) v. Never instantiated: its methods are functions."""

    supports: ClassVar[frozenset[str]] = frozenset()
    # Kind of device -> the features with which it is the best backend there (`rank`).
    best_for: ClassVar[dict[str, frozenset[str]]] = {}
    stores_scores: ClassVar[bool] = False  # of all query-key pairs, for the backward pass
    needs_compiler: ClassVar[bool] = False

    @classmethod
    def rank(cls, config: ModelArchitectureConfig, device: Device) -> tuple[bool, ...]:
        """The key by which a backend is chosen if none is set: the smallest one, of equal ones that
        of the backend registered first.

        A backend that cannot compute or train this architecture there is the last resort. Then
        come the features for which it is the best, and the memory for scores.
        """
        needed = needed_features(config)
        reach = {spec.window for spec in layer_specs(config)}
        if all(window is None or window >= config.block_size for window in reach):
            needed -= {'window'}  # hides nothing
        return (
            not needed <= cls.supports,
            bool(sentences_of(cls, 'training_problems', config, device.kind)),
            cls.needs_compiler and not device.compiles,
            not needed <= cls.best_for.get(device.kind, frozenset()),
            cls.stores_scores,
        )

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        features = needed_features(config)
        able = [
            name
            for name in ATTENTION_BACKEND_REGISTRY
            if features <= ATTENTION_BACKEND_REGISTRY[name].supports
        ]
        return [
            f'attention_backend={config.attention_backend!r} does not support {feature}, which '
            f'this architecture needs. Choose a backend that supports everything it needs: '
            f'{", ".join(able)}.'
            for feature in sorted(features - cls.supports)
        ]

    @staticmethod
    def mask(
        spec: AttentionSpec,
        bias: torch.Tensor | None,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
        q_documents: torch.Tensor | None = None,
        k_documents: torch.Tensor | None = None,
    ) -> Any:
        """The mask, in the form that `attend` takes, once per forward pass for all layers with the
        same bias and the same window and documents of the spec; it depends on nothing else of it.

        bias (H or 1, Tq, Tk), positions (Tq,) and (Tk,). The queries are at the last positions of
        the keys; with a single query, the keys may be in any order. Document numbers (B or 1, Tq)
        and (B or 1, Tk) are passed if `spec.documents`.
        """
        raise NotImplementedError

    @staticmethod
    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        spec: AttentionSpec,
        dropout: float,
    ) -> torch.Tensor:
        """q (B, H, Tq, D), k (B, KV heads, Tk, D), v (B, KV heads, Tk, Dv) -> (B, H, Tq, Dv).

        A backend that supports `sinks` has them as another parameter: logits (H,), by which each
        head's weights add up to less than 1, or None.
        """
        raise NotImplementedError


def layer_specs(config: ModelArchitectureConfig) -> list[AttentionSpec]:
    """The attention scores of the first layer of each kind."""
    return [
        ATTENTION_REGISTRY[kind.attention_type].layer_spec(kind, config.layer_letters.index(letter))
        for letter, kind in config.kinds.items()
        if 'attention_type' in kind
    ]


def needed_features(config: ModelArchitectureConfig) -> set[str]:
    """The features of attention scores that any layer needs."""
    return set().union(*(spec.features() for spec in layer_specs(config)))


ATTENTION_BACKEND_REGISTRY.expect(
    AttentionBackend,
    mask=('spec', 'bias', 'q_positions', 'k_positions', 'q_documents', 'k_documents'),
    attend=('q', 'k', 'v', 'mask', 'spec', 'dropout'),
)


def additive_mask(
    spec: AttentionSpec,
    bias: torch.Tensor | None,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    q_documents: torch.Tensor | None = None,
    k_documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """A term of the scores, (B or 1, H or 1, Tq, Tk) in fp32, -inf for invisible keys."""
    hidden = ~spec.is_visible(q_positions[:, None], k_positions)
    if spec.documents and q_documents is not None and k_documents is not None:
        hidden = hidden | (q_documents[:, None, :, None] != k_documents[:, None, None])
    if bias is None:
        bias = torch.zeros((1, *hidden.shape[-2:]), device=hidden.device)
    return bias[None].masked_fill(hidden, -math.inf)


def repeat_kv(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values (B, KV heads, T, D), repeated for each query head: (B, H, T, D)."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)


def fold_single_query(
    q: torch.Tensor, mask: torch.Tensor | None, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Single queries (B, H, 1, D) and their mask as several queries of each key head,
    (B, KV heads, group, D), so that cached keys need not be repeated."""
    if mask is not None and mask.size(1) > 1:
        mask = mask.view(mask.size(0), kv_heads, -1, mask.size(-1))
    return q.view(q.size(0), kv_heads, -1, q.size(-1)), mask


def pad_head_dims(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors, zero-padded to one head dimension, as flash kernels require."""
    head_dim = max(x.size(-1) for x in tensors)
    return [x if x.size(-1) == head_dim else F.pad(x, (0, head_dim - x.size(-1))) for x in tensors]


@ATTENTION_BACKEND_REGISTRY.register('sdpa', source='torch scaled_dot_product_attention')
class ScaledDotProductAttention(AttentionBackend):
    """PyTorch's fused attention; blocked matrix products for causal bfloat16 attention on a CPU."""

    tag = ''
    supports = frozenset({'bias', 'dropout', 'window', 'documents'})
    # On CUDA, windows and documents need a mask of all pairs, with which no flash kernel works.
    best_for: ClassVar = {
        'cpu': supports,
        'mps': supports,
        'cuda': frozenset({'bias', 'dropout'}),
    }

    @staticmethod
    def mask(spec, bias, q_positions, k_positions, *documents):
        if bias is None and not spec.needs_mask(len(q_positions), len(k_positions)):
            return None
        mask = additive_mask(spec, bias, q_positions, k_positions, *documents)
        # Converted once for all layers, unless it is learned: gradients are summed in fp32.
        return mask if mask.requires_grad else mask.to(matmul_dtype(mask))

    @staticmethod
    def attend(q, k, v, mask, spec, dropout):
        shape, causal = q.shape, mask is None and q.size(2) > 1
        # On a CPU in bfloat16: blocks of batched products, faster than torch's kernel.
        if causal and dropout == 0 and cpu_attention.supports(q, k):
            k, v = repeat_kv(k, q.size(1)), repeat_kv(v, q.size(1))
            return cpu_attention.blocked_attention(q, k, v, spec.scale)
        # A single new token: its heads become several queries of a key head.
        if q.size(2) == 1:
            q, mask = fold_single_query(q, mask, k.size(1))
        if mask is not None:
            # Fused kernels with a mask do not support grouped-query attention.
            k, v = repeat_kv(k, q.size(1)), repeat_kv(v, q.size(1))
            mask = mask.to(q.dtype)
        # Values may be narrower than keys: pad with zeros, and cut these off again.
        v_head_dim = v.size(-1)
        y = F.scaled_dot_product_attention(
            *pad_head_dims(q, k, v),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=spec.scale,
            enable_gqa=k.size(1) != q.size(1),
        )
        return y[..., :v_head_dim].reshape(*shape[:3], v_head_dim)


@ATTENTION_BACKEND_REGISTRY.register('manual', source='Vaswani et al. 2017, written out')
class ManualAttention(AttentionBackend):
    """Two matrix products and an fp32 softmax: supports every feature, stores all scores."""

    tag = ''
    supports = frozenset({'bias', 'dropout', 'softcap', 'window', 'documents', 'sinks'})
    stores_scores = True

    mask = staticmethod(additive_mask)

    @staticmethod
    def attend(q, k, v, mask, spec, dropout, sinks=None):
        shape = q.shape
        if q.size(2) == 1:
            q, mask = fold_single_query(q, mask, k.size(1))
        k, v = repeat_kv(k, q.size(1)), repeat_kv(v, q.size(1))
        scores = (q @ k.transpose(-2, -1)).float() * spec.scale  # (B, H, Tq, Tk)
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        scores = scores + mask
        if sinks is None:
            weights = scores.softmax(dim=-1)
        else:
            logits = sinks.float().view(scores.size(1), -1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat((scores, logits), dim=-1).softmax(dim=-1)[..., :-1]
        weights = F.dropout(weights, dropout)
        return (weights.to(v.dtype) @ v).reshape(*shape[:3], -1)


BLOCK = 128  # queries, or keys, of a block in flex's masks
FEW_QUERIES = BLOCK  # for fewer, flex uses `manual`


@lru_cache(maxsize=64)  # more than the windows and lengths of a model
def window_mask(window: int | None, queries: int, keys: int, device: torch.device) -> BlockMask:
    """The block mask without documents, cached for later forward passes.

    Not in inference mode, in which generation runs: its tensors could not be saved for a later
    backward pass.
    """
    with torch.inference_mode(False):
        return block_mask(window, queries, keys, device)


def block_mask(
    window: int | None,
    queries: int,
    keys: int,
    device: torch.device,
    q_documents: torch.Tensor | None = None,
    k_documents: torch.Tensor | None = None,
) -> BlockMask:
    """The mask of queries at the last positions of the keys, by blocks of `BLOCK` positions.

    Document numbers (B or 1, queries or keys) do not decrease, so the ends of the blocks decide
    whether a block is visible in part or as a whole. No tensor has an entry per pair, unlike in
    torch's `create_block_mask`.
    """
    before = keys - queries  # position of the first query
    # First and last positions of the blocks: (query blocks, 1) and (key blocks).
    q_first, k_first = (torch.arange(0, length, BLOCK, device=device) for length in (queries, keys))
    q_first = q_first[:, None] + before
    q_last, k_last = (q_first + BLOCK - 1).clamp(max=keys - 1), (k_first + BLOCK - 1)
    k_last = k_last.clamp(max=keys - 1)
    # Any pair: the nearest ends. Every pair: the first query sees the last key, and the last query
    # the first key. Blocks that the end cuts off count as partial, as their rest must be masked.
    visible = k_first <= q_last
    whole = (k_first + BLOCK <= keys) & (q_first + BLOCK <= keys) & (k_last <= q_first)
    if window is not None:
        visible = visible & (q_first - k_last < window)
        whole = whole & (q_last - k_first < window)
    visible, whole = visible[None], whole[None]  # (1 or B, query blocks, key blocks)
    if q_documents is not None and k_documents is not None:
        q_documents, k_documents = q_documents.int(), k_documents.int()
        visible = visible & (k_documents[:, None, k_last] >= q_documents[:, q_first - before])
        whole = whole & (k_documents[:, None, k_first] == q_documents[:, q_last - before])

    def is_visible(batch, head, query, key):
        near = within_window(query + before - key, window)
        if q_documents is None or k_documents is None:
            return near
        batch = batch % len(q_documents)  # chunks are those of all sequences
        return near & (q_documents[batch, query] == k_documents[batch, key])

    parts = torch.stack((visible & ~whole, whole)).int()[:, :, None]
    (kv_count, full_kv_count), (kv_index, full_kv_index) = _listed_blocks(parts)
    (q_count, full_q_count), (q_index, full_q_index) = _listed_blocks(parts.transpose(-1, -2))
    return BlockMask(
        (queries, keys),
        *(kv_count, kv_index, full_kv_count, full_kv_index),
        *(q_count, q_index, full_q_count, full_q_index),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=is_visible,
    )


def _listed_blocks(marks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of blocks that are marked 1 in each row, and their indices, followed by others."""
    order = marks.argsort(dim=-1, descending=True, stable=True)
    return (
        marks.sum(-1, dtype=torch.int32),
        order.to(torch.int32, memory_format=torch.contiguous_format),
    )


def fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    bias: torch.Tensor | None,
    spec: AttentionSpec,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """flex_attention with the spec's softcap, a bias (H or 1, Tq, Tk) and sinks (H,)."""

    def score_mod(score, batch, head, query, key):
        if spec.softcap is not None:
            score = spec.softcap * torch.tanh(score / spec.softcap)
        return score if bias is None else score + bias[head % bias.size(0), query, key]

    # Uncompiled, it would compute and store all scores. Inside a compiled block it is compiled with
    # the rest; on a CPU, compiling it has no benefit.
    fused = q.is_cuda and not torch.compiler.is_compiling()
    y = (compiled_flex() if fused else flex_attention)(
        q,
        k,
        v,
        score_mod=None if spec.softcap is None and bias is None else score_mod,
        block_mask=mask,
        scale=spec.scale,
        enable_gqa=k.size(1) != q.size(1),
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )
    if sinks is None:
        return y
    y, aux = y  # the log of the sum without the sink, (B, H, Tq) in fp32
    share = torch.sigmoid(aux.lse - sinks.float()[:, None])
    return (y * share[..., None]).to(y.dtype)


@cache
def compiled_flex() -> Callable:
    # A process may attend to many lengths and masks. Beyond the limit it would run uncompiled.
    return torch.compile(flex_attention, recompile_limit=64)


# Every sampling run on a CPU would print this warning.
warnings.filterwarnings('ignore', message='flex_attention called without torch.compile')


@ATTENTION_BACKEND_REGISTRY.register('flex', source='torch flex_attention; Dong et al. 2024')
class FlexAttention(AttentionBackend):
    """torch's flex_attention, a compiled kernel that skips masked blocks; trains on CUDA only.

    Fewer queries than a block of the mask, as in generation, use `manual`: flex would compile a
    kernel for every length.
    """

    tag = ''
    supports = frozenset({'bias', 'softcap', 'window', 'documents', 'sinks'})
    best_for: ClassVar = {'cuda': frozenset({'softcap', 'window', 'documents', 'sinks'})}
    needs_compiler = True

    @classmethod
    def training_problems(cls, config: ModelArchitectureConfig, device: str) -> list[str]:
        others = ' or '.join(
            name
            for name in ATTENTION_BACKEND_REGISTRY
            if name != 'flex'
            and needed_features(config) <= ATTENTION_BACKEND_REGISTRY[name].supports
        )
        if device != 'cuda':
            return [
                f"attention_backend='flex' has no backward pass on {device}: it trains on CUDA "
                f'only. Train with {others} (evaluation and sampling with flex work here).'
            ]
        smallest = min(
            size
            for layer in config.kinds.values()
            if 'attention_type' in layer
            for size in ATTENTION_REGISTRY[layer.attention_type].head_dims(layer)
        )
        if smallest >= 16:
            return []
        return [
            f"attention_backend='flex' needs head dimensions of at least 16 on CUDA, and these "
            f'are {smallest}. Choose larger heads, or {others}.'
        ]

    @staticmethod
    def mask(spec, bias, q_positions, k_positions, *documents):
        queries, keys = len(q_positions), len(k_positions)
        if queries < FEW_QUERIES:
            return additive_mask(spec, bias, q_positions, k_positions, *documents)
        if bias is not None and bias.requires_grad:
            if torch.are_deterministic_algorithms_enabled():
                raise UserError(
                    "attention_backend='flex' adds up the gradient of a learned bias in varying "
                    'order, which deterministic=True rules out. Set --attention_backend=manual, or '
                    'remove deterministic.'
                )
            # From a compiled block, the gradient of a view that flex captures would be lost.
            bias = bias.clone(memory_format=torch.contiguous_format)
        # A fake tensor, as in a plan, must not be cached beyond its mode.
        make = block_mask if documents or isinstance(q_positions, FakeTensor) else window_mask
        return make(spec.window, queries, keys, q_positions.device, *documents), bias

    @staticmethod
    def attend(q, k, v, mask, spec, dropout, sinks=None):
        if q.size(2) < FEW_QUERIES:
            return ManualAttention.attend(q, k, v, mask, spec, dropout, sinks)
        return fused_attention(q, k, v, *mask, spec, sinks)
