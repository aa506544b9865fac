"""Normalizations."""

from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.registry import Option, above
from components.base import Component, Initial
from model_config import NORM_REGISTRY, ModelArchitectureConfig

NORM_REGISTRY.expect(Component, nn.Module, constructed_with=('config', 'width'), forward=('x',))


class ElementwiseAffine(Component, nn.Module):
    """A learned weight, unless `has_gain` is False, and, if `has_bias`, a bias of the last
    dimension: `Norm(config, width)`."""

    part = 'normalization'
    mup_rule = True
    has_gain: ClassVar[bool] = True
    has_bias: ClassVar[bool] = False
    # Name of the registered norm with the same statistics, without weights of its own.
    plain: ClassVar[str | None] = None

    def __init__(self, config: ModelArchitectureConfig, width: int):
        super().__init__()
        self.width = (width,)
        self.weight = nn.Parameter(torch.empty(width)) if self.has_gain else None
        self.bias = nn.Parameter(torch.empty(width)) if self.has_bias else None

    def initial_values(self) -> dict:
        return {'weight': Initial.ones, 'bias': Initial.zeros}


class Norm(ElementwiseAffine):
    """A normalization of the last dimension in fp32: `Norm(config, width)`."""

    mup_rule = True
    options: ClassVar = {'norm_eps': Option(float, 1e-5, 'Epsilon of the norms', check=above(0))}

    def __init__(self, config: ModelArchitectureConfig, width: int):
        super().__init__(config, width)
        self.eps = config.norm_eps


@NORM_REGISTRY.register('layernorm', source='Ba et al. 2016')
class LayerNorm(Norm):
    """(x - mean) / standard deviation, with learned weight and bias."""

    tag = 'LN'
    has_bias = True
    plain: ClassVar[str | None] = 'layernorm_nogain'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.float(), self.width, self.weight, self.bias, self.eps)


@NORM_REGISTRY.register('layernorm_nobias', source='Ba et al. 2016; Xu et al. 2019')
class LayerNormNoBias(LayerNorm):
    """LayerNorm with a learned weight and no bias."""

    tag = 'LN-NB'
    has_bias = False


@NORM_REGISTRY.register('layernorm_nogain', source='Groeneveld et al. 2024 (OLMo)')
class LayerNormNoGain(LayerNorm):
    """LayerNorm without learned weights: (x - mean) / standard deviation."""

    tag = 'LN-NG'
    has_gain = False
    has_bias = False
    plain: ClassVar[str | None] = None


@NORM_REGISTRY.register('rmsnorm', source='Zhang & Sennrich 2019')
class RMSNorm(Norm):
    """x / root mean square, with a learned weight."""

    tag = 'RMS'
    plain: ClassVar[str | None] = 'rmsnorm_nogain'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.width, self.weight, self.eps)


@NORM_REGISTRY.register('rmsnorm_nogain', source='Karpathy 2025 (nanochat)')
class RMSNormNoGain(RMSNorm):
    """x / root mean square, without a learned weight."""

    tag = 'RMS-NG'
    has_gain = False
    plain: ClassVar[str | None] = None


@NORM_REGISTRY.register('dyt', source='Zhu et al. 2025')
class DynamicTanh(ElementwiseAffine):
    """weight · tanh(α x) + bias with one learned α; uses no statistics."""

    tag = 'DyT'
    mup_rule = True
    has_bias = True
    options: ClassVar = {
        'dyt_alpha': Option(float, 0.5, 'Initial α of dynamic tanh', check=above(0))
    }

    def __init__(self, config: ModelArchitectureConfig, width: int):
        super().__init__(config, width)
        self.alpha = nn.Parameter(torch.empty(1))
        self.initial_alpha = config.dyt_alpha

    def initial_values(self) -> dict:
        alpha = Initial.constant(self.initial_alpha)
        return {**super().initial_values(), 'alpha': alpha}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.alpha * x.float()) * self.weight + self.bias


@NORM_REGISTRY.register('none', source='for ablations, e.g. He & Hofmann 2024')
class NoNorm(Component, nn.Module):
    """No normalization (the identity)."""

    tag = 'NoNorm'

    def __init__(self, config: ModelArchitectureConfig, width: int):
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
