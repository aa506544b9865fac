"""Weight initializations, with the scales of logits and learning rates that belong to them."""

from typing import ClassVar

from common.registry import Option, above, at_least
from components.base import Component
from model_config import INITIALIZATION_REGISTRY, ModelArchitectureConfig


class Initialization(Component):
    """The standard deviation of each weight, which is drawn from a normal distribution around 0.

    It applies to linear layers, embeddings and the weights in a component's `matrices()`, unless
    its `initial_values()` overrides it. Never instantiated: its methods are functions of the
    config.
    """

    options: ClassVar = {
        'init_std': Option(float, 0.02, 'Standard deviation of initial weights', check=above(0))
    }

    @classmethod
    def std(cls, config: ModelArchitectureConfig, hidden: bool, residual: int) -> float:
        """The standard deviation of a weight. hidden: whether it is in `matrices()` (no embedding
        or head); residual: if it is in `residual_weights()`, the number of sublayers of the model
        that write into the residual stream, else 0."""
        return config.init_std

    @classmethod
    def output_scale(cls, config: ModelArchitectureConfig) -> float:
        """Factor of the hidden states before the output projection."""
        return 1.0

    @classmethod
    def hidden_lr_scale(cls, config: ModelArchitectureConfig) -> float:
        """Factor of the learning rate of hidden matrices."""
        return 1.0


INITIALIZATION_REGISTRY.expect(Initialization)


@INITIALIZATION_REGISTRY.register('normal', source='Devlin et al. 2019')
class NormalInitialization(Initialization):
    """One standard deviation for every weight."""

    tag = 'NormalInit'


@INITIALIZATION_REGISTRY.register('gpt2', source='Radford et al. 2019')
class GPT2Initialization(Initialization):
    """One standard deviation, divided by √(number of sublayers) in projections into the residual
    stream.

    Attention and FFN of n_layer blocks are 2 · n_layer sublayers.
    """

    tag = ''
    options: ClassVar = {
        **Initialization.options,
        'depth_scaled_init': Option(
            bool,
            True,
            'Divide init_std by √(number of sublayers) in projections into the residual stream',
        ),
    }

    @classmethod
    def std(cls, config: ModelArchitectureConfig, hidden: bool, residual: int) -> float:
        if residual and config.depth_scaled_init:
            return config.init_std / residual**0.5
        return config.init_std


@INITIALIZATION_REGISTRY.register('mup', source='Yang et al. 2022, table 8; Dey et al. 2024')
class MaximalUpdate(GPT2Initialization):
    """Maximal update parametrization: the learning rate tuned at `mup_base_width` suits any width.

    At that width it equals `gpt2`. At m times that width, hidden matrices have 1/√m of the standard
    deviation and 1/m of the learning rate (Adam's rule), and the logits are multiplied by 1/m;
    embeddings, norms and biases are unchanged. The fan-in of hidden matrices is assumed to grow
    with n_embd. With a constant head dimension the scale of attention scores is unchanged; if the
    head dimension grows instead, set `attention_scale`.
    """

    tag = 'muP'
    options: ClassVar = {
        **GPT2Initialization.options,
        'mup_base_width': Option(
            int, 256, 'The n_embd for which the learning rate was tuned', check=at_least(1)
        ),
    }

    @classmethod
    def std(cls, config: ModelArchitectureConfig, hidden: bool, residual: int) -> float:
        std = super().std(config, hidden, residual)
        return std * (config.mup_base_width / config.n_embd) ** 0.5 if hidden else std

    @classmethod
    def output_scale(cls, config: ModelArchitectureConfig) -> float:
        return config.mup_base_width / config.n_embd

    @classmethod
    def hidden_lr_scale(cls, config: ModelArchitectureConfig) -> float:
        return config.mup_base_width / config.n_embd
