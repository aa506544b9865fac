"""Linear attention and its relatives, which differ in how the state decays.

In each head S_t = diag(α_t) S_{t-1} + k_t v_tᵀ and o_t = S_tᵀ q_t; see `decayed_attention`. The
linear layers have no biases, as in the sources, whatever `bias` is.
"""

import math
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.registry import Option, above, at_least
from components.base import Fill, Initial, at_least_fp32
from components.decayed_mixer import (
    DecayedMixer,
    FixedDecayMixer,
    conv_option,
    eps_option,
    head_options,
)
from components.document_mask import DOCUMENT_OPTIONS
from components.gated_norm import GatedRMSNorm
from components.mixer_kernels import BACKEND_OPTIONS
from model_config import MIXER_REGISTRY, ModelArchitectureConfig

FEATURE_MAPS = {
    # elu(x) + 1; torch.compile is wrong about the memory layout of the gradient of F.elu.
    'elu': lambda x: x.relu() + x.clamp(max=0).exp(),
    'relu': F.relu,
    'silu': F.silu,
    'none': lambda x: x,
}


@MIXER_REGISTRY.register('linear_attention', source='Katharopoulos et al. 2020')
class LinearAttention(DecayedMixer):
    """o_t = Σ_{j≤t} φ(q_t)·φ(k_j) v_j / Σ_{j≤t} φ(q_t)·φ(k_j), with φ(x) = elu(x) + 1; no decay.

    Queries, keys and values are as many as n_embd, in n_head heads. The normalizer is one more
    column of the state. `linear_normalizer='rmsnorm'` norms the outputs of each head instead (Qin
    et al. 2022, "The Devil in Linear Transformer", section 4.1).
    """

    tag, prefix = 'LinAttn', 'linear'
    kernels: ClassVar = {'fla': 'simple_gla'}
    mup_rule = True
    options: ClassVar = {
        **head_options('linear', 'n_head', 'n_embd / linear_heads', 'n_embd / linear_heads'),
        'linear_feature_map': Option(
            str, 'elu', 'Feature map of queries and keys (elu: elu + 1)', choices=(*FEATURE_MAPS,)
        ),
        'linear_normalizer': Option(
            str,
            'sum',
            'Normalization of the outputs: by the sum of their weights, or RMSNorm of each head',
            choices=('sum', 'rmsnorm'),
        ),
        **conv_option('linear'),
        **BACKEND_OPTIONS,
        **DOCUMENT_OPTIONS,
    }
    eps: ClassVar = 1e-6  # of either normalizer

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        self.feature_map = FEATURE_MAPS[config.linear_feature_map]
        self.by_sum = config.linear_normalizer == 'sum'

    @classmethod
    def own_tags(cls, config: ModelArchitectureConfig) -> list[str]:
        feature_map, normalizer = config.linear_feature_map, config.linear_normalizer
        return [
            '' if feature_map == 'elu' else feature_map.capitalize(),
            '' if normalizer == 'sum' else 'RMS',
        ]

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        if config.linear_normalizer != 'sum' or config.linear_feature_map in ('elu', 'relu'):
            return []
        return [
            f"linear_normalizer='sum' divides by a sum of products of features, which must not be "
            f'negative, as they can be with linear_feature_map={config.linear_feature_map!r}. '
            f'Choose --linear_feature_map=elu or --linear_normalizer=rmsnorm.'
        ]

    def attend(self, q, k, v, *recurrence):
        q, k = self.feature_map(q), self.feature_map(k)
        if not self.by_sum:
            return super().attend(q, k, v, *recurrence)
        v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        y, state = super().attend(q, k, v, *recurrence)
        return y[..., :-1] / (y[..., -1:] + self.eps), state

    def finish(self, y, others):
        return y if self.by_sum else F.rms_norm(y, (self.value_dim,), eps=self.eps)

    @property
    def state_columns(self) -> int:
        return self.value_dim + self.by_sum


@MIXER_REGISTRY.register('retnet', source='Sun et al. 2023')
class Retention(FixedDecayMixer):
    """Head h decays by 1 - 2^(-5-h), with h from 0; queries and keys are rotated as by RoPE.

    As in the published models, 8 heads have keys of n_embd and values of 2 · n_embd dimensions in
    all (equation 8). Each head is normalized alone, without learned weights as in the authors'
    code, and gated by silu. Keys are scaled by 1 / √(their dimensions). The other normalizations of
    section 2.4 cancel in that of the heads.
    """

    tag, prefix = 'RetNet', 'retnet'
    source_heads, value_ratio, key_unit = 8, 2.0, 2
    mup_rule = True
    options: ClassVar = {
        **head_options(
            'retnet',
            '8, or fewer that divide n_embd',
            'n_embd / retnet_heads',
            '2 n_embd / retnet_heads',
        ),
        'retnet_rotation': Option(
            bool, True, 'Rotate queries and keys by their positions (xPos without its own decay)'
        ),
        'retnet_norm': Option(
            str,
            'layernorm',
            'Norm of each head: layernorm (group norm, in the paper) or rmsnorm (later code)',
            choices=('layernorm', 'rmsnorm'),
        ),
        **eps_option('retnet', 1e-6),
        **conv_option('retnet'),
        **BACKEND_OPTIONS,
        **DOCUMENT_OPTIONS,
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        self.rotates = config.retnet_rotation
        self.norm = F.layer_norm if config.retnet_norm == 'layernorm' else F.rms_norm

    def log_decays_of_heads(self, config, layer):
        return [math.log1p(-(2.0 ** (-5 - head))) for head in range(self.heads)]

    @classmethod
    def own_tags(cls, config: ModelArchitectureConfig) -> list[str]:
        return [
            '' if config.retnet_rotation else 'NoRot',
            '' if config.retnet_norm == 'layernorm' else 'RMS',
        ]

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        if not config.retnet_rotation or config.retnet_key_dim % 2 == 0:
            return []
        return [
            f'retnet_key_dim={config.retnet_key_dim}: retnet_rotation=True rotates pairs of '
            f'dimensions. Choose an even retnet_key_dim or --retnet_rotation=False.'
        ]

    def attend(self, q, k, v, *recurrence):
        """Positions count from the first token of this call, which suffices as only distances
        matter; those in the state end at -1."""
        k = k * self.key_dim**-0.5
        if not self.rotates:
            return super().attend(q, k, v, *recurrence)
        length = q.size(2)
        real = {'device': q.device, 'dtype': torch.promote_types(q.dtype, torch.float32)}
        positions = torch.arange(length + 1, **real)
        exponents = torch.arange(0, self.key_dim, 2, **real)
        angles = positions[:, None] * 10000.0 ** (-exponents / self.key_dim)
        cos, sin = angles.cos(), angles.sin()
        q, k = (rotated(x, cos[:-1], sin[:-1]) for x in (q, k))
        y, state = super().attend(q, k, v, *recurrence)
        return y, None if state is None else rotated(state.mT, cos[-1], -sin[-1]).mT

    def norm_and_gate(self, y, gate):
        gate = gate.unflatten(-1, (self.heads, -1)).to(y.dtype)
        return self.norm(y, (self.value_dim,), eps=self.eps) * F.silu(gate)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (..., D), with dimensions i and i + D/2 rotated by angles (..., D/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@MIXER_REGISTRY.register('lightning_attention', source='Qin et al. 2024; MiniMax 2025')
class LightningAttention(FixedDecayMixer):
    """The decays of ALiBi's slopes, weaker in later layers, as in MiniMax-01.

    Head h of H and layer l of L decay by exp(-2^(-8 (h+1) / H) · (1 - l / (L - 1))). Queries, keys
    and values are silu(W x). RMSNorm over all heads together, and a sigmoid gate, follow.
    """

    tag, prefix = 'Lightning', 'lightning'
    mup_rule = True
    options: ClassVar = {
        **head_options(
            'lightning', 'n_head', 'n_embd / lightning_heads', 'n_embd / lightning_heads'
        ),
        **eps_option('lightning', 1e-6),
        **BACKEND_OPTIONS,
        **DOCUMENT_OPTIONS,
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        self.norm_weight = nn.Parameter(torch.empty(self.heads * self.value_dim))

    def log_decays_of_heads(self, config, layer):
        # The small terms are those of MiniMax, whose last layer so still has a decay.
        of_layer = 1 - layer / (config.n_layer - 1 + 1e-5) + 1e-5
        return [-(2.0 ** (-8 * (head + 1) / self.heads)) * of_layer for head in range(self.heads)]

    def attend(self, q, k, v, *recurrence):
        return super().attend(F.silu(q), F.silu(k), F.silu(v), *recurrence)

    def norm_and_gate(self, y, gate):
        normed = F.rms_norm(y.flatten(2), self.norm_weight.shape, eps=self.eps)
        return (self.norm_weight * normed * gate.to(y.dtype).sigmoid()).unflatten(
            -1, (self.heads, -1)
        )

    def initial_values(self) -> dict[str, Fill]:
        return {**super().initial_values(), 'norm_weight': Initial.ones}


@MIXER_REGISTRY.register('gla', source='Yang et al. 2023')
class GatedLinearAttention(DecayedMixer):
    """Each channel of a key decays by sigmoid(W₂ W₁ x_t + b)^(1/16), with W₁ of rank 16.

    As in the published models (section 4.4), 4 heads have keys of n_embd / 2 and values of n_embd
    dimensions in all. Queries are scaled by 1 / √(dimensions of a key). RMSNorm of each head and a
    silu gate follow.
    """

    tag, prefix = 'GLA', 'gla'
    kernels: ClassVar = {'fla': 'gla'}
    source_heads, key_ratio, decays_by_channel = 4, 0.5, True
    mup_rule = True
    options: ClassVar = {
        **head_options(
            'gla',
            '4, or fewer that divide n_embd / 2',
            'n_embd / 2 / gla_heads',
            'n_embd / gla_heads',
        ),
        'gla_decay_rank': Option(
            int, 16, 'Rank of the projection to the logits of decays', check=at_least(1)
        ),
        'gla_decay_root': Option(
            float, 16.0, 'Root τ of the decay, sigmoid(logit)^(1/τ)', check=above(0)
        ),
        **eps_option('gla', 1e-5),
        **conv_option('gla'),
        **BACKEND_OPTIONS,
        **DOCUMENT_OPTIONS,
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        self.decay_root = config.gla_decay_root
        # A table of channels: its inputs do not grow with n_embd, as those of `matrices()` do.
        self.decay_weight = nn.Parameter(
            torch.empty(self.heads * self.key_dim, config.gla_decay_rank)
        )
        self.decay_bias = nn.Parameter(torch.empty(self.heads * self.key_dim))
        self.norm = GatedRMSNorm(self.value_dim, config.gla_norm_eps)

    def other_rows(self, config):
        return self.heads * self.value_dim, config.gla_decay_rank

    @classmethod
    def own_tags(cls, config: ModelArchitectureConfig) -> list[str]:
        rank, root = config.gla_decay_rank, config.gla_decay_root
        return ['' if rank == 16 else f'R{rank}', '' if root == 16 else f'Root{root:g}']

    def log_decay(self, others):
        logits = F.linear(others[1], self.decay_weight, self.decay_bias)
        return self.split_heads(F.logsigmoid(at_least_fp32(logits)) / self.decay_root)

    def attend(self, q, k, v, *recurrence):
        return super().attend(q * self.key_dim**-0.5, k, v, *recurrence)

    def finish(self, y, others):
        return self.norm(y, others[0].unflatten(-1, (self.heads, -1)))

    def flops(self, seq_len: int, causal: bool) -> dict[str, float]:
        flops = super().flops(seq_len, causal)
        flops['mixer_projections'] += 2.0 * self.decay_weight.numel() * seq_len
        return flops

    def initial_values(self) -> dict[str, Fill]:
        return {'decay_weight': Initial.normal(0.02), 'decay_bias': Initial.zeros}
