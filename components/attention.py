"""Attentions."""

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn as nn

from components.attention_backends import AttentionNeeds
from components.contract import Component
from components.positions import Positions
from model_config import (
    ATTENTION_BACKEND_REGISTRY,
    ATTENTION_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    ModelArchitectureConfig,
)
from registry import Option, at_least


@ATTENTION_REGISTRY.register('standard', source='Vaswani et al. 2017; grouped: Ainslie et al. 2023')
class Attention(Component, nn.Module):
    """Causal multi-head attention; with `use_gqa`, heads share `num_kv_heads` keys and values."""

    part = 'attention'
    flops_part = 'attention_projections'
    options: ClassVar = {
        'use_gqa': Option(bool, False, 'Grouped-query attention: share keys and values'),
        'num_kv_heads': Option(
            int | None,
            None,
            'Key and value heads; must divide n_head (1: multi-query)',
            check=at_least(1),
            requires=('use_gqa', True),
        ),
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__()
        self.head_dim, self.num_heads = config.head_dim, config.n_head
        self.num_kv_heads = config.num_kv_heads if config.use_gqa else config.n_head
        self.needs_in_training = self.needs(config, layer)
        self.needs_in_evaluation = replace(self.needs_in_training, dropout=0.0)
        self.attend = ATTENTION_BACKEND_REGISTRY[config.attention_backend].attend
        self.rotate = POSITION_ENCODING_REGISTRY[config.position_encoding].rotate
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.n_embd, rows, bias=config.bias)
        self.output = nn.Linear(self.num_heads * self.head_dim, config.n_embd, bias=config.bias)

    @classmethod
    def needs(cls, config: ModelArchitectureConfig, layer: int) -> AttentionNeeds:
        """What the scores of that layer need of a backend."""
        return AttentionNeeds(
            causal=True,
            bias=POSITION_ENCODING_REGISTRY[config.position_encoding].has_bias,
            dropout=config.attention_dropout,
        )

    @classmethod
    def rotary_dim(cls, config: ModelArchitectureConfig) -> int:
        """How many columns of a head a position encoding may turn."""
        return config.head_dim

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        return f'GQA{config.num_kv_heads}' if config.use_gqa else ''

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        if not config.use_gqa:
            return []
        divisors = [h for h in range(1, config.n_head + 1) if config.n_head % h == 0]
        if config.num_kv_heads in divisors:
            return []
        return [
            f'num_kv_heads={config.num_kv_heads}: use_gqa=True needs a num_kv_heads that divides '
            f'n_head={config.n_head}: one of {", ".join(map(str, divisors))}.'
        ]

    def forward(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        batch, length, _ = x.shape
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = self.qkv(x).view(batch, length, heads, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q, k = self.rotate(q, positions.rotation), self.rotate(k, positions.rotation)
        needs = self.needs_in_training if self.training else self.needs_in_evaluation
        y = self.attend(q, k, v, needs, positions.bias)  # (B, H, T, D)
        return self.output(y.transpose(1, 2).reshape(batch, length, -1))

    def flops(self, seq_len: int, causal: bool) -> dict[str, float]:
        # Two products, q kᵀ and weights v, of 2 · D FLOPs for each (query, key) pair and head.
        pairs = seq_len * seq_len * (0.5 if causal else 1.0)
        scores = 4.0 * self.num_heads * self.head_dim * pairs
        return {**super().flops(seq_len, causal), 'attention_scores': scores}

    def residual_weights(self) -> list[nn.Parameter]:
        return [self.output.weight]

    def matrices(self) -> dict[nn.Parameter, tuple[int, ...]]:
        rows = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        return {**super().matrices(), self.qkv.weight: tuple(n * self.head_dim for n in rows)}
