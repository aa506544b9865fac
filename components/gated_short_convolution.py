"""LFM2's mixer: a short convolution between two gates."""

from typing import ClassVar

import torch
import torch.nn as nn

from common.registry import FrozenConfig, Option, at_least
from components.attention_inputs import AttentionInputs
from components.document_mask import DOCUMENT_OPTIONS
from components.mixers import Mixer
from components.short_convolution import ShortConvolution
from model_config import MIXER_REGISTRY, ModelArchitectureConfig


@MIXER_REGISTRY.register('short_conv', source='LFM2: Liquid AI 2025')
class GatedShortConvolution(Mixer):
    """Gated short convolution: output(C · convolution(B · x)), with B, C and x linear in the input.

    The filters have no activation. It sees `short_conv_size` tokens, so that a layer of it keeps
    `short_conv_size` - 1 vectors of width n_embd for generation. LFM2 has filters of size 3 without
    biases, and a few layers of attention among them.
    """

    tag = 'ShortConv'
    cacheable = True
    mup_rule = True
    options: ClassVar = {
        'short_conv_size': Option(
            int, 3, 'Tokens that the short convolution sees, its own included', check=at_least(1)
        ),
        'short_conv_bias': Option(
            bool | None,
            None,
            'Use biases in the short convolution and its projections; None: bias',
        ),
        **DOCUMENT_OPTIONS,
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        width, bias = config.n_embd, config.short_conv_bias
        self.input = nn.Linear(width, 3 * width, bias=bias)  # rows of B, C and x
        self.convolution = ShortConvolution(width, config.short_conv_size, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        return {'short_conv_bias': (config.bias, 'bias')}

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        size = '' if config.short_conv_size == 3 else str(config.short_conv_size)
        return cls.tag + size

    def forward(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        before, after, x = self.input(x).chunk(3, dim=-1)
        y = self.convolution(before * x, attn_inputs.starts, attn_inputs.cache)
        return self.output(after * y)

    def matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        width = self.output.in_features
        return {**super().matrices(), self.input.weight: (width, width, width)}

    def residual_weights(self) -> list[torch.Tensor]:
        return [self.output.weight]
