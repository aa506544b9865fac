"""Activations: element-wise functions of the feed-forward networks."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from components.base import Component
from model_config import ACTIVATION_REGISTRY, ModelArchitectureConfig


class Activation(Component, nn.Module):
    """An element-wise function."""

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()


ACTIVATION_REGISTRY.expect(Activation, constructed_with=('config',), forward=('x',))


@ACTIVATION_REGISTRY.register('gelu', source='Hendrycks & Gimpel 2016, exact')
class GELU(Activation):
    """x · Φ(x), with Φ the normal distribution function."""

    tag = 'GELU'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)


@ACTIVATION_REGISTRY.register('gelu_tanh', source='Hendrycks & Gimpel 2016, tanh approximation')
class TanhGELU(Activation):
    """GELU's tanh approximation, as in OpenAI's GPT-2 and Gemma."""

    tag = 'GELUtanh'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate='tanh')


@ACTIVATION_REGISTRY.register('silu', source='Elfwing et al. 2017; Ramachandran et al. 2017')
class SiLU(Activation):
    """x · sigmoid(x), also called swish."""

    tag = 'SiLU'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x)


@ACTIVATION_REGISTRY.register('relu', source='Nair & Hinton 2010')
class ReLU(Activation):
    """max(x, 0)."""

    tag = 'ReLU'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)


@ACTIVATION_REGISTRY.register('relu2', source='So et al. 2021')
class SquaredReLU(Activation):
    """max(x, 0)²."""

    tag = 'ReLU2'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x).square()


@ACTIVATION_REGISTRY.register('leaky_relu', source='Maas et al. 2013')
class LeakyReLU(Activation):
    """max(x, 0.01 · x)."""

    tag = 'LeakyReLU'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(x)
