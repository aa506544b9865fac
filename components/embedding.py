"""The token embedding."""

import math

import torch
import torch.nn as nn

from components.base import Component
from model_config import ModelArchitectureConfig


class TokenEmbedding(Component, nn.Embedding):
    """Tokens (B, T) -> (B, T, C), times √C with `scale_embeddings` (Vaswani et al. 2017), and times
    `embedding_multiplier` (Granite 3.0: IBM 2024)."""

    part = 'token_embedding'
    mup_rule = True

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__(config.vocab_size, config.n_embd)
        scale = math.sqrt(config.n_embd) if config.scale_embeddings else 1.0
        self.scale = scale * config.embedding_multiplier

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        # The hidden states are fp32, also if FSDP gathers a tied table in bfloat16.
        x = super().forward(tokens).float()
        return x if self.scale == 1 else x * self.scale
