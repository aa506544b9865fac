"""Block layouts: how attention, feed-forward network and norms stand around the residual stream."""

from typing import ClassVar

import torch
import torch.nn as nn

from components.contract import Component
from components.positions import Positions
from model_config import (
    ATTENTION_REGISTRY,
    FFN_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    ModelArchitectureConfig,
)


class Block(Component, nn.Module):
    """Attention and feed-forward network around the residual stream; a layout adds its norms.

    forward: x (B, T, C) and the prepared positions -> x (B, T, C) and the auxiliary loss.
    """

    # Whether the stream that leaves the last block still has to be normalised.
    final_norm: ClassVar[bool] = True

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__()
        self.attention = ATTENTION_REGISTRY[config.attention_type](config, layer)
        self.ffn = FFN_REGISTRY[config.ffn_type](config, layer)
        self.dropout = nn.Dropout(config.residual_dropout)
        norm = NORM_REGISTRY[config.normalization]
        self.attention_norm = norm(config, config.n_embd)
        self.ffn_norm = norm(config, config.n_embd)

    def attend(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        return self.dropout(self.attention(x, positions))

    def feed_forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        y, auxiliary_loss = self.ffn(x)
        return self.dropout(y), auxiliary_loss


@NORM_POSITION_REGISTRY.register('pre', source='Radford et al. 2019; Xiong et al. 2020')
class PreNormBlock(Block):
    tag = 'PreNorm'

    def forward(self, x, positions):
        x = x + self.attend(self.attention_norm(x), positions)
        y, auxiliary_loss = self.feed_forward(self.ffn_norm(x))
        return x + y, auxiliary_loss


@NORM_POSITION_REGISTRY.register('post', source='Vaswani et al. 2017')
class PostNormBlock(Block):
    tag = 'PostNorm'
    final_norm = False

    def forward(self, x, positions):
        x = self.attention_norm(x + self.attend(x, positions))
        y, auxiliary_loss = self.feed_forward(x)
        return self.ffn_norm(x + y), auxiliary_loss
