"""Position encodings."""

from typing import ClassVar, NamedTuple

import torch
import torch.nn as nn

from components.contract import Component
from model_config import POSITION_ENCODING_REGISTRY, ModelArchitectureConfig
from registry import Option, above


class Positions(NamedTuple):
    """What a position encoding prepared once for all layers of a forward pass."""

    rotation: tuple[torch.Tensor, ...] = ()  # handed to `rotate`
    bias: torch.Tensor | None = None  # added to the scores, (H or 1, T, T), fp32


class PositionEncoding(Component, nn.Module):
    """Three hooks, each with a do-nothing default. Tables are made in `prepare`, never stored."""

    part = 'position_encoding'
    # What its scores need of an attention backend beside causality.
    has_bias: ClassVar[bool] = False
    # The longest sequence that it can place; None: any.
    max_length: int | None = None

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()

    def prepare(self, q_positions: torch.Tensor, k_positions: torch.Tensor) -> Positions:
        """Called once a forward pass with positions (Tq,) and (Tk,)."""
        return Positions()

    def embed(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token embeddings (B, T, C) and positions (T,) to what enters the first block."""
        return x

    @staticmethod
    def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Queries or keys (B, H, T, D), turned by their positions."""
        return x


@POSITION_ENCODING_REGISTRY.register('none', source='Haviv et al. 2022')
class NoPositionEncoding(PositionEncoding):
    tag = 'NoPos'


@POSITION_ENCODING_REGISTRY.register('learned_absolute', source='Radford et al. 2019')
class LearnedAbsolute(PositionEncoding):
    tag = 'AbsPos'

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__(config)
        self.max_length = config.block_size
        self.table = nn.Embedding(config.block_size, config.n_embd)

    def embed(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return x + self.table(positions)


@POSITION_ENCODING_REGISTRY.register('rope', source='Su et al. 2021')
class RotaryPositionEncoding(PositionEncoding):
    """Rotates pairs (i, i + D/2) of each head by position · theta^(-2i/D), as Llama does."""

    tag = 'RoPE'
    options: ClassVar = {
        'rope_theta': Option(float, 10000.0, 'Base of the rotary frequencies', check=above(0))
    }

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__(config)
        self.theta, self.head_dim = config.rope_theta, config.head_dim

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        if config.head_dim % 2 == 0:
            return []
        return [
            f"position_encoding='rope' turns pairs of columns, and a head of {config.head_dim} "
            f'(n_embd={config.n_embd} / n_head={config.n_head}) has an odd one left over: choose '
            f'an n_head that gives an even head size.'
        ]

    def prepare(self, q_positions: torch.Tensor, k_positions: torch.Tensor) -> Positions:
        exponent = torch.arange(0, self.head_dim, 2, device=q_positions.device) / self.head_dim
        angles = q_positions.float()[:, None] * self.theta ** -exponent.float()  # (T, D/2)
        return Positions(rotation=(angles.cos(), angles.sin()))

    @staticmethod
    def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> torch.Tensor:
        cos, sin = rotation
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.to(x.dtype)
