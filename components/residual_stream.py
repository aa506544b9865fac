"""How the outputs of sublayers join the residual stream."""

from typing import ClassVar

import torch
import torch.nn as nn

from common.registry import FrozenConfig, Option, above
from components.attention_inputs import SharedInputs
from components.base import Component, Fill, Initial
from model_config import RESIDUAL_REGISTRY, ModelArchitectureConfig


class Residual(Component, nn.Module):
    """The residual stream x (B, T, C) in a block.

    A block calls `enter` at its entrance, and `add` with the output of each sublayer, to which
    dropout and the norm that follows the sublayer, if any, were applied.
    """

    part = 'residual'
    mup_rule = True

    def __init__(self, config: ModelArchitectureConfig, layer: int, sublayers: tuple[str, ...]):
        """sublayers: names of those that the block has, such as 'mixer' and 'ffn'."""
        super().__init__()
        self.sublayers = sublayers

    def enter(self, x: torch.Tensor, shared: SharedInputs) -> torch.Tensor:
        """The stream at the entrance of a block. shared: the inputs in `shared_inputs()`."""
        return x

    def add(self, x: torch.Tensor, y: torch.Tensor, sublayer: str) -> torch.Tensor:
        """The stream after a sublayer with the output y."""
        return x + y


RESIDUAL_REGISTRY.expect(Residual, constructed_with=('config', 'layer', 'sublayers'))


@RESIDUAL_REGISTRY.register('addition', source='He et al. 2015')
class Addition(Residual):
    """x + sublayer."""

    tag = ''


@RESIDUAL_REGISTRY.register('multiplier', source='Granite 3.0: IBM 2024')
class Multiplier(Residual):
    """x + m · sublayer, with a constant m."""

    options: ClassVar = {
        'residual_multiplier': Option(
            float, 0.22, 'Factor of the outputs of sublayers', check=above(0)
        )
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int, sublayers: tuple[str, ...]):
        super().__init__(config, layer, sublayers)
        self.multiplier = config.residual_multiplier

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        return f'ResMul{config.residual_multiplier:g}'

    def add(self, x: torch.Tensor, y: torch.Tensor, sublayer: str) -> torch.Tensor:
        return x + y * self.multiplier


@RESIDUAL_REGISTRY.register('deepnorm', source='DeepNet: Wang et al. 2022; MiniMax 2025')
class DeepNorm(Residual):
    """α · x + β · sublayer, with constants of the mixer and of the FFN.

    α = (2 n_layer)^(1/4) is that of a decoder in DeepNet; its smaller initial weights are not part
    of this. It is meant for streams that are normed after each sublayer, or before it with
    norm_position='entrance', as in MiniMax-01.
    """

    options: ClassVar = {
        f'deepnorm_{sublayer}_{name}': Option(type_, default, text, check=above(0))
        for sublayer, what in (('mixer', 'mixers'), ('ffn', 'the FFN'))
        for name, type_, default, text in (
            ('alpha', float | None, None, f'Factor of the stream at {what}; None: (2 n_layer)^¼'),
            ('beta', float, 1.0, f'Factor of the output of {what}'),
        )
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int, sublayers: tuple[str, ...]):
        super().__init__(config, layer, sublayers)
        self.factors = {
            'mixer': (config.deepnorm_mixer_alpha, config.deepnorm_mixer_beta),
            'ffn': (config.deepnorm_ffn_alpha, config.deepnorm_ffn_beta),
        }

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        alpha = (2 * config.n_layer) ** 0.25, '(2 n_layer)^(1/4)'
        return {'deepnorm_mixer_alpha': alpha, 'deepnorm_ffn_alpha': alpha}

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        usual = ((2 * config.n_layer) ** 0.25, 1.0)
        mixer = config.deepnorm_mixer_alpha, config.deepnorm_mixer_beta
        ffn = config.deepnorm_ffn_alpha, config.deepnorm_ffn_beta
        values = (*mixer, *ffn) if (mixer, ffn) != (usual, usual) else ()
        return 'DeepNorm' + '_'.join(f'{value:g}' for value in values)

    def add(self, x: torch.Tensor, y: torch.Tensor, sublayer: str) -> torch.Tensor:
        alpha, beta = self.factors[sublayer]
        return x * alpha + y * beta


class LearnedScales(Residual):
    """x + scale · sublayer, with learned scales of each sublayer: `scales.NAME`."""

    mup_rule = True

    def __init__(self, config: ModelArchitectureConfig, layer: int, sublayers: tuple[str, ...]):
        super().__init__(config, layer, sublayers)
        self.initial_scale = self.initial(config)
        width = self.width(config)
        self.scales = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(width)) for name in sublayers}
        )

    @classmethod
    def width(cls, config: ModelArchitectureConfig) -> int:
        """The number of scales of a sublayer."""
        raise NotImplementedError

    @classmethod
    def initial(cls, config: ModelArchitectureConfig) -> float:
        raise NotImplementedError

    def initial_values(self) -> dict[str, Fill]:
        fill = Initial.constant(self.initial_scale)
        return {f'scales.{name}': fill for name in self.sublayers}

    def add(self, x: torch.Tensor, y: torch.Tensor, sublayer: str) -> torch.Tensor:
        return (x + y * self.scales[sublayer]).to(x.dtype)


@RESIDUAL_REGISTRY.register('layer_scale', source='Touvron et al. 2021')
class LayerScale(LearnedScales):
    """x + γ ⊙ sublayer, with a learned γ of n_embd numbers for each sublayer, small at first."""

    tag = 'LayerScale'
    options: ClassVar = {
        'layer_scale_init': Option(
            float | None,
            None,
            'Initial γ; None: 0.1 up to 18 layers, 1e-5 up to 24, else 1e-6',
            check=above(0),
        )
    }

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        """The values of the paper's section 2."""
        limits = {18: 0.1, 24: 1e-5}
        value = next((v for most, v in limits.items() if config.n_layer <= most), 1e-6)
        return {'layer_scale_init': (value, 'by n_layer')}

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        return f'{cls.tag}{config.layer_scale_init:g}'

    @classmethod
    def width(cls, config: ModelArchitectureConfig) -> int:
        return config.n_embd

    @classmethod
    def initial(cls, config: ModelArchitectureConfig) -> float:
        return config.layer_scale_init


@RESIDUAL_REGISTRY.register('rezero', source='Bachlechner et al. 2020')
class ReZero(LearnedScales):
    """x + α · sublayer, with a learned number α for each sublayer, 0 at first."""

    tag = 'ReZero'

    @classmethod
    def width(cls, config: ModelArchitectureConfig) -> int:
        return 1

    @classmethod
    def initial(cls, config: ModelArchitectureConfig) -> float:
        return 0.0


@RESIDUAL_REGISTRY.register('x0_lambdas', source='modded-nanogpt: Jordan et al. 2024')
class InputLambdas(Residual):
    """λ₀ · x + λ₁ · x₀ at the entrance of each block, then x + sublayer.

    x₀ is the input of the first block; the λ of each block are learned, 1 and 0 at first.
    """

    tag = 'X0'
    mup_rule = True

    def __init__(self, config: ModelArchitectureConfig, layer: int, sublayers: tuple[str, ...]):
        super().__init__(config, layer, sublayers)
        self.lambdas = nn.Parameter(torch.empty(2))

    def shared_inputs(self) -> tuple[str, ...]:
        return ('x0',)

    def initial_values(self) -> dict[str, Fill]:
        def one_and_zero(tensor: torch.Tensor, generator: torch.Generator) -> None:
            tensor.copy_(torch.tensor([1.0, 0.0]))

        return {'lambdas': one_and_zero}

    def enter(self, x: torch.Tensor, shared: SharedInputs) -> torch.Tensor:
        own, first = self.lambdas.split(1)
        return (own * x + first * shared.x0).to(x.dtype)
