"""Position encodings that add biases to the attention scores: ALiBi and T5's."""

import math
from typing import ClassVar

import torch
import torch.nn as nn

from common.registry import Option, at_least
from components.attention_inputs import AttentionInputs
from components.positions import PositionEncoding
from model_config import POSITION_ENCODING_REGISTRY, ModelArchitectureConfig


@POSITION_ENCODING_REGISTRY.register('alibi', source='Press et al. 2022')
class ALiBi(PositionEncoding):
    """Subtracts slope · distance from the attention scores, with a fixed slope per head."""

    tag = 'ALiBi'
    has_bias = True
    options: ClassVar = {
        'alibi_scaled': Option(
            bool, False, 'Multiply the biases by attention_scale, as the scores (Falcon-RW)'
        )
    }

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__(config)
        self.num_heads = config.n_head
        self.scale = config.attention_scale if config.alibi_scaled else 1.0

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        return f'{cls.tag}scaled' if config.alibi_scaled else cls.tag

    @classmethod
    def depends_on(cls, config: ModelArchitectureConfig) -> tuple:
        return config.n_head, config.attention_scale if config.alibi_scaled else None

    def prepare(self, q_positions: torch.Tensor, k_positions: torch.Tensor) -> AttentionInputs:
        slopes = alibi_slopes(self.num_heads, q_positions.device) * self.scale
        # -slope · (query's position - key's position), (H, Tq, Tk)
        return AttentionInputs(bias=slopes[:, None, None] * (k_positions - q_positions[:, None]))


def alibi_slopes(heads: int, device: torch.device) -> torch.Tensor:
    """2^(-8i/n) for i = 1 … n if the number of heads n is a power of two.

    Otherwise the slopes of the next lower power of two, and every second one of the next higher.
    """
    power = 1 << (heads.bit_length() - 1)
    below = torch.arange(1, power + 1, device=device) * (8 / power)
    between = (2 * torch.arange(heads - power, device=device) + 1) * (4 / power)
    return torch.exp2(-torch.cat((below, between)))


@POSITION_ENCODING_REGISTRY.register('t5_relative', source='Raffel et al. 2020')
class T5Relative(PositionEncoding):
    """Adds a learned bias to the attention scores, per head and bucket of distances.

    Layers with as many heads share one table. Half of the buckets hold a single distance each, the
    others grow logarithmically up to `t5_max_distance`; all larger distances share the last bucket.
    """

    tag = 'T5Pos'
    mup_rule = True
    has_bias = True
    options: ClassVar = {
        't5_buckets': Option(int, 32, 'Number of distance buckets', check=at_least(2)),
        't5_max_distance': Option(
            int, 128, 'Distance from which on all share the last bucket', check=at_least(2)
        ),
    }

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__(config)
        self.max_distance = config.t5_max_distance
        self.table = nn.Embedding(config.t5_buckets, config.n_head)

    @classmethod
    def depends_on(cls, config: ModelArchitectureConfig) -> tuple:
        return (config.n_head,)

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        if config.t5_max_distance > config.t5_buckets // 2:
            return []
        return [
            f't5_max_distance={config.t5_max_distance} must exceed half of '
            f't5_buckets={config.t5_buckets}, since that many distances have a bucket each. Set '
            f'for example --t5_max_distance={4 * config.t5_buckets}.'
        ]

    def prepare(self, q_positions: torch.Tensor, k_positions: torch.Tensor) -> AttentionInputs:
        distance = (q_positions[:, None] - k_positions).clamp(min=0)  # (T, T); the future is masked
        return AttentionInputs(bias=self.table(self.bucket(distance)).movedim(-1, 0))

    def bucket(self, distance: torch.Tensor) -> torch.Tensor:
        """The bucket of each distance, from 0."""
        buckets = self.table.num_embeddings
        exact = buckets // 2  # smaller distances have a bucket each, others grow logarithmically
        growth = (distance.clamp(min=exact) / exact).log() / math.log(self.max_distance / exact)
        shared = exact + (growth * (buckets - exact)).long()
        return torch.where(distance < exact, distance, shared.clamp(max=buckets - 1))
