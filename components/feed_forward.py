"""Feed-forward networks."""

from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from components.contract import Component
from model_config import ACTIVATION_REGISTRY, FFN_REGISTRY, ModelArchitectureConfig
from registry import Option, at_least


class FeedForward(Component, nn.Module):
    """(B, T, C) -> (B, T, C) and an auxiliary loss (zero when dense)."""

    part = 'ffn'

    @classmethod
    def default_d_ff(cls, config) -> int:
        """The hidden width where `d_ff` is not set."""
        raise NotImplementedError

    @classmethod
    def derived_values(cls, config) -> dict[str, tuple]:
        return {'d_ff': (cls.default_d_ff(config), f"{config.ffn_type}'s own rule")}

    def residual_weights(self) -> list[nn.Parameter]:
        return [self.down.weight]


@FFN_REGISTRY.register('standard', source='Vaswani et al. 2017')
class StandardFeedForward(FeedForward):
    """down(activation(up(x))), four times as wide inside."""

    options: ClassVar = {
        'activation': Option(str, 'gelu', 'Activation of the FFN', choices=ACTIVATION_REGISTRY)
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.d_ff, bias=config.bias)
        self.activation = ACTIVATION_REGISTRY[config.activation](config)
        self.down = nn.Linear(config.d_ff, config.n_embd, bias=config.bias)

    @classmethod
    def default_d_ff(cls, config) -> int:
        return 4 * config.n_embd

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        return ACTIVATION_REGISTRY[config.activation].name_tag(config)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        return self.down(self.activation(self.up(x))), 0.0


@FFN_REGISTRY.register('swiglu', source='Shazeer 2020')
class SwiGLU(FeedForward):
    """down(silu(gate(x)) · up(x)), 8/3 times as wide inside: the standard one's cost."""

    tag = 'SwiGLU'
    options: ClassVar = {
        'multiple_of': Option(
            int, 8, 'A derived d_ff is the nearest multiple of this', check=at_least(1)
        )
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.d_ff, bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.n_embd, bias=config.bias)

    @classmethod
    def default_d_ff(cls, config) -> int:
        multiple = config.multiple_of
        return max(1, round(8 * config.n_embd / 3 / multiple)) * multiple

    def matrices(self) -> dict[nn.Parameter, tuple[int, ...]]:
        width = self.down.in_features
        return {**super().matrices(), self.gate_up.weight: (width, width)}

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up), 0.0
