"""Block layouts: attention, feed-forward network and norms around the residual stream."""

from typing import ClassVar

import torch.nn as nn

from common.registry import Option
from components.base import Component
from model_config import (
    ATTENTION_REGISTRY,
    FFN_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    ModelArchitectureConfig,
)


class Block(Component, nn.Module):
    """Attention and feed-forward network around the residual stream; subclasses add norms.

    forward: x (B, T, C) and AttentionInputs -> x (B, T, C) and the AuxOutput of the FFN. Dropout is
    applied to what is added to the residual stream, after its norm if there is one.
    """

    # Whether the output of the last block needs a final norm.
    final_norm: ClassVar[bool] = True

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__()
        self.attention = ATTENTION_REGISTRY[config.attention_type](config, layer)
        self.ffn = FFN_REGISTRY[config.ffn_type](config, layer)
        self.dropout = nn.Dropout(config.residual_dropout)
        for name in self.norms(config):
            self.add_module(name, NORM_REGISTRY[config.normalization](config, config.n_embd))

    @classmethod
    def norms(cls, config: ModelArchitectureConfig) -> tuple[str, ...]:
        """Attribute names of the layout's norms."""
        return 'attention_norm', 'ffn_norm'


NORM_POSITION_REGISTRY.expect(
    Block, constructed_with=('config', 'layer'), forward=('x', 'attn_inputs')
)


@NORM_POSITION_REGISTRY.register('pre', source='Radford et al. 2019; Xiong et al. 2020')
class PreNormBlock(Block):
    """x + sublayer(norm(x)), attention then FFN."""

    tag = 'PreNorm'

    def forward(self, x, attn_inputs):
        x = x + self.dropout(self.attention(self.attention_norm(x), attn_inputs))
        y, aux = self.ffn(self.ffn_norm(x))
        return x + self.dropout(y), aux


@NORM_POSITION_REGISTRY.register('post', source='Vaswani et al. 2017')
class PostNormBlock(Block):
    """norm(x + sublayer(x)); no norm follows the last block."""

    tag = 'PostNorm'
    final_norm = False

    def forward(self, x, attn_inputs):
        x = self.attention_norm(x + self.dropout(self.attention(x, attn_inputs)))
        y, aux = self.ffn(x)
        return self.ffn_norm(x + self.dropout(y)), aux


@NORM_POSITION_REGISTRY.register('sandwich', source='Ding et al. 2021; Gemma 2: Gemma Team 2024')
class SandwichNormBlock(Block):
    """x + norm(sublayer(norm(x)))."""

    tag = 'SandwichNorm'

    @classmethod
    def norms(cls, config: ModelArchitectureConfig) -> tuple[str, ...]:
        return 'attention_norm', 'attention_output_norm', 'ffn_norm', 'ffn_output_norm'

    def forward(self, x, attn_inputs):
        y = self.attention(self.attention_norm(x), attn_inputs)
        x = x + self.dropout(self.attention_output_norm(y))
        y, aux = self.ffn(self.ffn_norm(x))
        return x + self.dropout(self.ffn_output_norm(y)), aux


@NORM_POSITION_REGISTRY.register('reordered', source='Liu et al. 2022; OLMo 2: OLMo et al. 2024')
class ReorderedNormBlock(Block):
    """x + norm(sublayer(x))."""

    tag = 'ReorderedNorm'

    def forward(self, x, attn_inputs):
        x = x + self.dropout(self.attention_norm(self.attention(x, attn_inputs)))
        y, aux = self.ffn(x)
        return x + self.dropout(self.ffn_norm(y)), aux


@NORM_POSITION_REGISTRY.register('parallel', source='Wang & Komatsuzaki 2021; Black et al. 2022')
class ParallelBlock(Block):
    """x + attention(norm(x)) + FFN(norm(x)), with two norms or a shared one."""

    tag = 'Parallel'
    options: ClassVar = {
        'parallel_shared_norm': Option(
            bool, False, 'Use one norm for both branches (GPT-J, PaLM) instead of two'
        )
    }

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        return cls.tag + ('1Norm' if config.parallel_shared_norm else '')

    @classmethod
    def norms(cls, config: ModelArchitectureConfig) -> tuple[str, ...]:
        both = super().norms(config)
        return both[:1] if config.parallel_shared_norm else both

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        self.shared_norm = config.parallel_shared_norm

    def forward(self, x, attn_inputs):
        normed = self.attention_norm(x)
        attended = self.attention(normed, attn_inputs)
        y, aux = self.ffn(normed if self.shared_norm else self.ffn_norm(x))
        return x + self.dropout(attended) + self.dropout(y), aux
