"""Ways to compute attention, and what an attention asks of them."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from components.contract import Component
from model_config import ATTENTION_BACKEND_REGISTRY, ATTENTION_REGISTRY, ModelArchitectureConfig


@dataclass(frozen=True)
class AttentionNeeds:
    """What the scores of a layer need. A backend says which of the fields it supports.

    scale: what q kᵀ is multiplied by; every backend does that. softcap: scores become
    c · tanh(scores / c), before the bias. window: tokens that a query sees, itself included.
    """

    scale: float
    bias: bool = False
    dropout: float = 0.0
    softcap: float | None = None
    window: int | None = None

    def features(self) -> set[str]:
        return {name for name, value in vars(self).items() if value and name != 'scale'}

    def visible(self, q_positions: torch.Tensor, k_positions: torch.Tensor) -> torch.Tensor:
        """Whether queries at those positions may look at keys at those; the shapes broadcast."""
        distance = q_positions - k_positions
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)


class AttentionBackend(Component):
    """Causal softmax(scale · q kᵀ + bias) v. Never constructed: its methods are functions."""

    supports: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        attention = ATTENTION_REGISTRY[config.attention_type]
        needs = set().union(
            *(attention.needs(config, layer).features() for layer in range(config.n_layer))
        )
        able = [
            name
            for name in ATTENTION_BACKEND_REGISTRY
            if needs <= ATTENTION_BACKEND_REGISTRY[name].supports
        ]
        return [
            f'attention_backend={config.attention_backend!r} does not do {feature}, which this '
            f'architecture needs. What does all that it needs: {", ".join(able)}.'
            for feature in sorted(needs - cls.supports)
        ]

    @staticmethod
    def mask(
        needs: AttentionNeeds,
        bias: torch.Tensor | None,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
    ) -> Any:
        """Who sees whom, in the form that `attend` takes: made once a forward pass for all layers
        with the same needs. bias (H or 1, Tq, Tk), positions (Tq,) and (Tk,); the queries are the
        last of the keys."""
        raise NotImplementedError

    @staticmethod
    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        needs: AttentionNeeds,
        dropout: float,
    ) -> torch.Tensor:
        """q (B, H, Tq, D), k (B, KV heads, Tk, D), v (B, KV heads, Tk, Dv) -> (B, H, Tq, Dv)."""
        raise NotImplementedError


def additive_mask(needs, bias, q_positions, k_positions) -> torch.Tensor:
    """What is added to the scores, fp32: (H or 1, Tq, Tk), -inf where a query may not look."""
    hidden = ~needs.visible(q_positions[:, None], k_positions)
    if bias is None:
        bias = torch.zeros((1, *hidden.shape), device=hidden.device)
    return bias.masked_fill(hidden, -math.inf)


def shared_by_groups(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values (B, KV heads, T, D), repeated for each head: (B, H, T, D)."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)


@ATTENTION_BACKEND_REGISTRY.register('sdpa', source='torch scaled_dot_product_attention')
class ScaledDotProductAttention(AttentionBackend):
    """PyTorch's fused attention: flash where nothing but causality masks."""

    supports = frozenset({'bias', 'dropout', 'window'})

    @staticmethod
    def mask(needs, bias, q_positions, k_positions):
        length = len(k_positions)
        limited = needs.window is not None and needs.window < length
        if bias is None and not limited and len(q_positions) == length:
            return None
        return additive_mask(needs, bias, q_positions, k_positions)

    @staticmethod
    def attend(q, k, v, mask, needs, dropout):
        if mask is not None:
            # The fused kernels that take a mask do not share keys and values among heads.
            k, v = shared_by_groups(k, q.size(1)), shared_by_groups(v, q.size(1))
            mask = mask.to(q.dtype)[None]
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=needs.scale,
            enable_gqa=k.size(1) != q.size(1),
        )


@ATTENTION_BACKEND_REGISTRY.register('manual', source='Vaswani et al. 2017, written out')
class ManualAttention(AttentionBackend):
    """Two matrix products and a softmax in fp32: does everything, keeps every score."""

    supports = frozenset({'bias', 'dropout', 'softcap', 'window'})

    mask = staticmethod(additive_mask)

    @staticmethod
    def attend(q, k, v, mask, needs, dropout):
        k, v = shared_by_groups(k, q.size(1)), shared_by_groups(v, q.size(1))
        scores = (q @ k.transpose(-2, -1)).float() * needs.scale  # (B, H, Tq, Tk)
        if needs.softcap is not None:
            scores = needs.softcap * torch.tanh(scores / needs.softcap)
        weights = F.dropout((scores + mask).softmax(dim=-1), dropout)
        return weights.to(v.dtype) @ v
