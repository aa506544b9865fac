"""The components that an architecture is made of, in their registries.

A component carries all that is special about it: its options, its part of the name, what it
cannot be combined with, its FLOPs, how its parameters begin. Adding one touches one place. See
`Component` for the contract; shapes are B batch, T time, C width (`n_embd`), H heads, D head size.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model_config import (
    ACTIVATION_REGISTRY,
    ATTENTION_BACKEND_REGISTRY,
    ATTENTION_REGISTRY,
    FFN_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    ModelArchitectureConfig,
)
from registry import Option, above, at_least

# --------------------------------------------------------------------------------------------------
# The contract


class Initial:
    """How a parameter begins. Each draws from the parameter's own generator, or not at all."""

    @staticmethod
    def zeros(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.zero_()

    @staticmethod
    def ones(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.fill_(1.0)

    @staticmethod
    def normal(tensor: torch.Tensor, generator: torch.Generator, std: float = 0.02) -> None:
        tensor.normal_(0.0, std, generator=generator)


class Component:
    """What every component offers. All of it has a default, so that most need little.

    A component in a registry is constructed with the config alone.
    """

    # Its own options: name -> Option. They become command-line flags and config keys.
    options: ClassVar[dict[str, Option]] = {}
    # The heading under which its parameters are counted; None: that of the component around it.
    part: ClassVar[str | None] = None
    # The heading of its linear layers' FLOPs; None: `part`.
    flops_part: ClassVar[str | None] = None
    # Its part of the architecture's name; '' for what goes without saying.
    tag: ClassVar[str] = ''

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        return cls.tag

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        """What it cannot be combined with, a sentence each."""
        return []

    def flops(self, seq_len: int, causal: bool) -> dict[str, float]:
        """Matrix-multiplication FLOPs of one sequence's forward pass, by part.

        causal: count only the half of the attention square that a causal model needs.
        The default adds up the linear layers and components inside.
        """
        return module_flops(self, seq_len, causal, self.flops_part or self.part or 'other')

    def initial_values(self) -> dict:
        """What fills each parameter that is directly its own: a function (tensor, generator).

        Linear layers and embeddings inside need no mention.
        """
        return {}

    def residual_weights(self) -> list[nn.Parameter]:
        """The projections that write into the residual stream (for depth-scaled beginnings)."""
        return []


def module_flops(module: nn.Module, seq_len: int, causal: bool, part: str) -> dict[str, float]:
    """Forward FLOPs of all that is inside `module`: 2 · in · out a token for a linear layer."""
    total: dict[str, float] = {}
    for child in module.children():
        if isinstance(child, Component):
            counted = child.flops(seq_len, causal)
        elif isinstance(child, nn.Linear):
            counted = {part: 2.0 * child.in_features * child.out_features * seq_len}
        else:
            counted = module_flops(child, seq_len, causal, part)
        for key, value in counted.items():
            total[key] = total.get(key, 0.0) + value
    return total


# --------------------------------------------------------------------------------------------------
# Normalization


class Norm(Component, nn.Module):
    """A norm over the last dimension, computed in fp32: `Norm(config, width)`."""

    part = 'normalization'
    options: ClassVar = {'norm_eps': Option(float, 1e-5, 'Epsilon of the norms', check=above(0))}
    has_bias: ClassVar[bool] = False

    def __init__(self, config: ModelArchitectureConfig, width: int):
        super().__init__()
        self.width, self.eps = (width,), config.norm_eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if self.has_bias else None

    def initial_values(self) -> dict:
        return {'weight': Initial.ones, 'bias': Initial.zeros}


@NORM_REGISTRY.register('layernorm', source='Ba et al. 2016')
class LayerNorm(Norm):
    tag = 'LN'
    has_bias = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.float(), self.width, self.weight, self.bias, self.eps)


@NORM_REGISTRY.register('layernorm_nobias', source='Ba et al. 2016; Xu et al. 2019')
class LayerNormNoBias(LayerNorm):
    tag = 'LN-NB'
    has_bias = False


@NORM_REGISTRY.register('rmsnorm', source='Zhang & Sennrich 2019')
class RMSNorm(Norm):
    tag = 'RMS'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.width, self.weight, self.eps)


# --------------------------------------------------------------------------------------------------
# Position encodings


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


# --------------------------------------------------------------------------------------------------
# Attention


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
        needs = ATTENTION_REGISTRY[config.attention_type].needs(config).features()
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

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.head_dim, self.num_heads = config.head_dim, config.n_head
        self.num_kv_heads = config.num_kv_heads if config.use_gqa else config.n_head
        self.needs_in_training = self.needs(config)
        self.needs_in_evaluation = replace(self.needs_in_training, dropout=0.0)
        self.attend = ATTENTION_BACKEND_REGISTRY[config.attention_backend].attend
        self.rotate = POSITION_ENCODING_REGISTRY[config.position_encoding].rotate
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.n_embd, rows, bias=config.bias)
        self.output = nn.Linear(self.num_heads * self.head_dim, config.n_embd, bias=config.bias)

    @classmethod
    def needs(cls, config: ModelArchitectureConfig) -> AttentionNeeds:
        return AttentionNeeds(
            causal=True,
            bias=POSITION_ENCODING_REGISTRY[config.position_encoding].has_bias,
            dropout=config.attention_dropout,
        )

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


# --------------------------------------------------------------------------------------------------
# Activations and feed-forward networks


class Activation(Component, nn.Module):
    """An element-wise function."""

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()


@ACTIVATION_REGISTRY.register('gelu', source='Hendrycks & Gimpel 2016, exact')
class GELU(Activation):
    tag = 'GELU'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)


@ACTIVATION_REGISTRY.register('silu', source='Elfwing et al. 2017; Ramachandran et al. 2017')
class SiLU(Activation):
    tag = 'SiLU'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x)


@ACTIVATION_REGISTRY.register('relu', source='Nair & Hinton 2010')
class ReLU(Activation):
    tag = 'ReLU'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)


@ACTIVATION_REGISTRY.register('leaky_relu', source='Maas et al. 2013')
class LeakyReLU(Activation):
    tag = 'LeakyReLU'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(x)


class FeedForward(Component, nn.Module):
    """(B, T, C) -> (B, T, C) and an auxiliary loss (zero when dense)."""

    part = 'ffn'

    @classmethod
    def default_d_ff(cls, config) -> int:
        """The hidden width where `d_ff` is not set."""
        raise NotImplementedError

    def residual_weights(self) -> list[nn.Parameter]:
        return [self.down.weight]


@FFN_REGISTRY.register('standard', source='Vaswani et al. 2017')
class StandardFeedForward(FeedForward):
    """down(activation(up(x))), four times as wide inside."""

    options: ClassVar = {
        'activation': Option(str, 'gelu', 'Activation of the FFN', choices=ACTIVATION_REGISTRY)
    }

    def __init__(self, config: ModelArchitectureConfig):
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

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.d_ff, bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.n_embd, bias=config.bias)

    @classmethod
    def default_d_ff(cls, config) -> int:
        multiple = config.multiple_of
        return max(1, round(8 * config.n_embd / 3 / multiple)) * multiple

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up), 0.0


# --------------------------------------------------------------------------------------------------
# Block layouts


class Block(Component, nn.Module):
    """Attention and feed-forward network around the residual stream; a layout adds its norms.

    forward: x (B, T, C) and the prepared positions -> x (B, T, C) and the auxiliary loss.
    """

    # Whether the stream that leaves the last block still has to be normalised.
    final_norm: ClassVar[bool] = True

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.attention = ATTENTION_REGISTRY[config.attention_type](config)
        self.ffn = FFN_REGISTRY[config.ffn_type](config)
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


# --------------------------------------------------------------------------------------------------
# Both ends


class TokenEmbedding(Component, nn.Embedding):
    """(B, T) tokens -> (B, T, C)."""

    part = 'token_embedding'

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__(config.vocab_size, config.n_embd)

    def initial_values(self) -> dict:
        return {'weight': Initial.normal}


IGNORED = -100  # a target that does not count, as in torch's cross-entropy


class OutputHead(Component, nn.Module):
    """Hidden states to logits, and to the loss: one place for all that concerns it."""

    part = 'output_head'

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.projection = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden (B, T, C) -> logits (B, T, V); with targets (B, T): the loss in nats, summed over
        the targets that are not -100, in fp32, and their number."""
        logits = self.projection(hidden)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction='sum')
        return loss, (targets != IGNORED).sum()
