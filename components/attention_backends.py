"""Ways to compute attention, and what an attention asks of them."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from components.contract import Component
from model_config import ATTENTION_BACKEND_REGISTRY, ATTENTION_REGISTRY, ModelArchitectureConfig


@dataclass(frozen=True)
class AttentionNeeds:
    """What an attention's scores need; a backend says which of these fields it supports."""

    causal: bool = True
    bias: bool = False
    dropout: float = 0.0

    def features(self) -> set[str]:
        return {name for name, value in vars(self).items() if value}


class AttentionBackend(Component):
    """A way to compute softmax(q kᵀ / √D + bias) v. Never constructed: `attend` is a function."""

    supports: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        attention = ATTENTION_REGISTRY[config.attention_type]
        needs = set().union(
            *(attention.needs(config, layer).features() for layer in range(config.n_layer))
        )
        return [
            f'attention_backend={config.attention_backend!r} does not do {feature}, which this '
            f'architecture needs; attention_backend=manual does all.'
            for feature in sorted(needs - cls.supports)
        ]

    @staticmethod
    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        needs: AttentionNeeds,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """q (B, H, T, D), k and v (B, KV heads, T, D), bias (H or 1, T, T) -> (B, H, T, D)."""
        raise NotImplementedError


def causal_mask(length: int, device: torch.device) -> torch.Tensor:
    """(T, T), True where a query may look."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


@ATTENTION_BACKEND_REGISTRY.register('sdpa', source='torch scaled_dot_product_attention')
class ScaledDotProductAttention(AttentionBackend):
    """torch's fused kernels."""

    supports = frozenset({'causal', 'bias', 'dropout'})

    @staticmethod
    def attend(q, k, v, needs, bias):
        mask = None
        if bias is not None:
            mask = bias.to(q.dtype)[None]
            if needs.causal:
                mask = mask.masked_fill(~causal_mask(q.size(2), q.device), -math.inf)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=needs.dropout,
            is_causal=needs.causal and mask is None,
            enable_gqa=k.size(1) != q.size(1),
        )


@ATTENTION_BACKEND_REGISTRY.register('manual', source='Vaswani et al. 2017, written out')
class ManualAttention(AttentionBackend):
    """Two matrix multiplications and a softmax in fp32: does all, and counts its FLOPs."""

    supports = frozenset({'causal', 'bias', 'dropout'})

    @staticmethod
    def attend(q, k, v, needs, bias):
        groups = q.size(1) // k.size(1)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.size(-1))  # (B, H, T, T)
        if bias is not None:
            scores = scores + bias
        if needs.causal:
            scores = scores.masked_fill(~causal_mask(q.size(2), q.device), -math.inf)
        weights = F.dropout(scores.softmax(dim=-1), needs.dropout)
        return weights.to(v.dtype) @ v
