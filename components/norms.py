"""Normalizations."""

from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from components.contract import Component, Initial
from model_config import NORM_REGISTRY, ModelArchitectureConfig
from registry import Option, above


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


@NORM_REGISTRY.register('none', source='for ablations, such as He & Hofmann 2024')
class NoNorm(Component, nn.Module):
    """The identity."""

    tag = 'NoNorm'

    def __init__(self, config: ModelArchitectureConfig, width: int):
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
