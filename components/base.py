"""The contract: what every component offers, and how its parameters begin."""

import math
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple, cast

import torch
import torch.nn as nn

from common.errors import UserError
from common.old_names import RenamedMethods, by_old_name, renamed_classes
from common.registry import Configurable
from model_config import ModelArchitectureConfig

Fill = Callable[[torch.Tensor, torch.Generator], object]  # what fills a parameter


class Initial:
    """How a parameter begins. Each draws from the parameter's own generator, or not at all."""

    @staticmethod
    def zeros(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.zero_()

    @staticmethod
    def ones(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.fill_(1.0)

    @staticmethod
    def constant(value: float) -> Fill:
        return lambda tensor, generator: tensor.fill_(value)

    @staticmethod
    def normal(std: float) -> Fill:
        return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


class AuxOutput(NamedTuple):
    """What a component gives beside its output."""

    # Added to the loss in training and part of no reported one.
    loss: torch.Tensor | float
    # What it measures of itself for the record: name -> tensor, without gradient, the same names
    # and shapes each time. Those of all layers are stacked, and averaged over micro-batches.
    metrics: dict[str, torch.Tensor]

    @property
    def readings(self) -> dict[str, torch.Tensor]:
        return by_old_name(self, 'readings', 'metrics')


class Component(RenamedMethods, Configurable):
    """What every component offers. All of it has a default, so that most need little.

    A component in a registry is constructed with the config; blocks, attentions and feed-forward
    networks with the number of their layer too, from 0.
    """

    # The heading under which its parameters are counted; None: that of the component around it.
    part: ClassVar[str | None] = None
    # The heading of its linear layers' FLOPs; None: `part`.
    flops_part: ClassVar[str | None] = None
    # Whether it gives the same for a sequence's tokens in several calls as in one, as everything
    # does that looks at each token by itself. Without that a model generates without a cache.
    cacheable: ClassVar[bool] = True

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        """Its part of the architecture's name: the class's `tag`, and what its options add to it.

        Where a class sets no `tag`, that is the name it is registered under.
        """
        return cls.tag

    @classmethod
    def training_problems(cls, config: ModelArchitectureConfig, device: str) -> list[str]:
        """What keeps it from being trained on a 'cpu', 'cuda' or 'mps', a sentence each."""
        return []

    def flops(self, seq_len: int, causal: bool) -> dict[str, float]:
        """Matrix-multiplication FLOPs of one sequence's forward pass, by part.

        causal: of attention, count the pairs that are seen only, not the full square.
        The default adds up the linear layers and components inside.
        """
        part = self.flops_part or self.part or 'other'
        return module_flops(cast(nn.Module, self), seq_len, causal, part)

    def inactive_params(self) -> int:
        """How many of its parameters, without those of components inside, a token does not use."""
        return 0

    def initial_values(self) -> dict[str, Fill]:
        """What fills each parameter that is directly its own: a function (tensor, generator).

        Linear layers and embeddings inside need no mention, nor does what `matrices()` names.
        """
        return {}

    def residual_weights(self) -> list[torch.Tensor]:
        """The projections that write into the residual stream (for depth-scaled beginnings)."""
        return []

    def matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        """The hidden matrices directly its own, for optimizers that treat matrices as such.

        Parameter -> the rows of each matrix where several are stacked in one projection: (4, 4)
        for two of four rows. A parameter of more than two dimensions is a stack of such matrices.
        The default: its linear layers, each one matrix. The ends of the model have none.
        """
        layers = own_linear_layers(cast(nn.Module, self))
        return {layer.weight: (layer.out_features,) for layer in layers}


def own_linear_layers(module: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers inside `module` that are not inside another component."""
    for child in module.children():
        if isinstance(child, nn.Linear):
            yield child
        elif not isinstance(child, Component):
            yield from own_linear_layers(child)


def module_flops(module: nn.Module, seq_len: int, causal: bool, part: str) -> dict[str, float]:
    """Forward FLOPs of all that is inside `module`: 2 · in · out a token for a linear layer."""
    total: dict[str, float] = {}
    for child in module.children():
        if isinstance(child, Component):
            counted = _flops_of(child, seq_len, causal)
        elif isinstance(child, nn.Linear):
            counted = {part: 2.0 * child.in_features * child.out_features * seq_len}
        else:
            counted = module_flops(child, seq_len, causal, part)
        for key, value in counted.items():
            total[key] = total.get(key, 0.0) + value
    return total


def _flops_of(component: Component, seq_len: int, causal: bool) -> dict[str, float]:
    counted = component.flops(seq_len, causal)
    if not isinstance(counted, dict) or not all(
        isinstance(value, (int, float)) and 0 <= value < math.inf for value in counted.values()
    ):
        raise UserError(
            f'{type(component).__name__}.flops(seq_len, causal) must return a dict, part -> FLOPs '
            f'of one sequence, and returned {counted!r}.'
        )
    return counted


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of x's matrix multiplications: autocast's, where that is on."""
    device = x.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else x.dtype


__getattr__ = renamed_classes(__name__, {'Auxiliary': 'AuxOutput'})
