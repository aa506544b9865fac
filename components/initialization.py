"""Initialisations: how the weights begin."""

from typing import ClassVar

from components.contract import Component
from model_config import INITIALIZATION_REGISTRY, ModelArchitectureConfig
from registry import Option, above


class Initialization(Component):
    """The standard deviation of each weight, drawn from a normal distribution around zero.

    Weights are those of linear layers, tables, and whatever `matrices()` of a component names; its
    `initial_values()` may say otherwise. Never constructed: a function of the config.
    """

    options: ClassVar = {
        'init_std': Option(float, 0.02, 'Standard deviation of initial weights', check=above(0))
    }

    @classmethod
    def std(cls, config: ModelArchitectureConfig, hidden: bool, residual: bool) -> float:
        """Of a weight. hidden: one of `matrices()`, neither table nor head; residual: one of
        `residual_weights()`."""
        return config.init_std


@INITIALIZATION_REGISTRY.register('normal', source='Devlin et al. 2019')
class NormalInitialization(Initialization):
    """One standard deviation for every weight."""

    tag = 'NormalInit'


@INITIALIZATION_REGISTRY.register('gpt2', source='Radford et al. 2019')
class GPT2Initialization(Initialization):
    """One standard deviation; what writes into the stream has it divided by √(2 · n_layer)."""

    options: ClassVar = {
        **Initialization.options,
        'depth_scaled_init': Option(
            bool, True, 'Divide it by √(2 · n_layer) in projections into the residual stream'
        ),
    }

    @classmethod
    def std(cls, config: ModelArchitectureConfig, hidden: bool, residual: bool) -> float:
        if residual and config.depth_scaled_init:
            return config.init_std / (2 * config.n_layer) ** 0.5
        return config.init_std
