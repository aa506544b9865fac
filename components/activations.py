"""Activations: element-wise functions of the feed-forward networks."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from components.base import Component, Initial, at_least_fp32
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


@ACTIVATION_REGISTRY.register('xielu', source='Huang & Schlag 2024')
class XIELU(Activation):
    """α₁ x² + x / 2 if x is above 0, else α₂ (exp(x) - 1 - x) + x / 2, with learned α: α₁ =
    softplus(a) and α₂ = 1/2 + softplus(b) (Apertus)."""

    tag = 'xIELU'
    mup_rule = True

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__(config)
        self.alpha_positive = nn.Parameter(torch.empty(1))  # before softplus
        self.alpha_negative = nn.Parameter(torch.empty(1))

    def initial_values(self) -> dict:
        """α₁ = α₂ = 0.8."""
        inverse = {alpha: math.log(math.expm1(alpha)) for alpha in (0.8, 0.3)}
        return {
            'alpha_positive': Initial.constant(inverse[0.8]),
            'alpha_negative': Initial.constant(inverse[0.3]),
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alpha_positive = F.softplus(self.alpha_positive)
        alpha_negative = 0.5 + F.softplus(self.alpha_negative)
        wide = at_least_fp32(x)
        below = wide.clamp(max=-1e-6)  # where exp cannot overflow, nor 0 · inf be a gradient
        curved = torch.where(
            wide > 0, alpha_positive * wide.square(), alpha_negative * (below.expm1() - wide)
        )
        return (curved + 0.5 * wide).to(x.dtype)
