"""The base class of all components, and the initial values of their parameters."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from common.old_names import RenamedMethods, by_old_name, renamed_classes
from common.registry import Configurable
from model_config import ModelArchitectureConfig

Fill = Callable[[torch.Tensor, torch.Generator], object]  # fills a parameter with initial values


class Initial:
    """Initial values of a parameter; random ones are drawn from the parameter's own generator."""

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

    @staticmethod
    def uniform(bound: float) -> Fill:
        """From -bound to bound."""
        return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)

    @staticmethod
    def step_bias(low: float, high: float) -> Fill:
        """Values whose softplus, the step size of a recurrence, is log-uniform from low to high."""

        def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
            tensor.uniform_(math.log(low), math.log(high), generator=generator).exp_()
            tensor.add_((-torch.expm1(-tensor)).log())  # log(exp(step) - 1), without overflow

        return fill


class AuxOutput(NamedTuple):
    """Auxiliary loss and metrics of a component, returned beside its output."""

    # Added to the training loss, but not part of any reported loss.
    loss: torch.Tensor | float
    # Metrics for the record: name -> tensor without gradient, with the same names and shapes in
    # every call. They are stacked over the layers and averaged over micro-batches.
    metrics: dict[str, torch.Tensor]
    # A vector of whole numbers, or nothing, for its `after_update`. In the output of a model: an
    # entry for each block, None without a vector; nothing if none has one.
    counts: tuple[torch.Tensor | None, ...] = ()

    @property
    def readings(self) -> dict[str, torch.Tensor]:
        return by_old_name(self, 'readings', 'metrics')


class Component(RenamedMethods, Configurable):
    """Base class of all components. Everything has a default, so most components override little.

    Components are constructed with the config; blocks, attentions and feed-forward networks also
    with the index of their layer, from 0.
    """

    # The part under which its parameters are counted; None: the part of the enclosing component.
    part: ClassVar[str | None] = None
    # The part under which the FLOPs of its linear layers are counted; None: `part`.
    flops_part: ClassVar[str | None] = None
    # Whether it supports a KV cache: several calls with parts of a sequence give the same output as
    # one call with all of it. True for anything that acts on each token separately. A model with a
    # component that does not support a cache generates without one.
    cacheable: ClassVar[bool] = True
    # Whether the rules of `initialization='mup'` hold for all of its weights: the inputs of its
    # `matrices()` grow with n_embd; other weights are vectors, or tables with a row for each token
    # or position. A subclass with an `__init__` or `matrices()` of its own must declare it itself.
    mup_rule: ClassVar[bool] = False

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        """Its part of the architecture's name: the class's `tag`, extended by its options.

        The tag of a class that sets none is the name under which it is registered.
        """
        return cls.tag

    @classmethod
    def training_problems(cls, config: ModelArchitectureConfig, device: str) -> list[str]:
        """Reasons why it cannot train on a 'cpu', 'cuda' or 'mps' device, a sentence each."""
        return []

    @classmethod
    def dtype_problems(cls, config: ModelArchitectureConfig, dtype: str) -> list[str]:
        """Reasons why it cannot train with matrix products in that dtype, a sentence each."""
        return []

    @classmethod
    def training_notes(
        cls, config: ModelArchitectureConfig, device: torch.device, dtype: str
    ) -> list[str]:
        """Notes for the user on what makes it slow on that device, a sentence each; dtype: that of
        matrix multiplications."""
        return []

    def flops(self, seq_len: int, causal: bool) -> dict[str, float]:
        """Matrix-multiplication FLOPs of one sequence's forward pass, by part.

        causal: in attention, count only the visible query-key pairs, not the full square.
        The default sums the linear layers and the components inside.
        """
        part = self.flops_part or self.part or 'other'
        return module_flops(cast(nn.Module, self), seq_len, causal, part)

    def inactive_params(self) -> int:
        """Number of its parameters that a token does not use, without components inside."""
        return 0

    def shared_inputs(self) -> tuple[str, ...]:
        """Entries of `SharedInputs` that it uses, such as 'x0'."""
        return ()

    def initial_values(self) -> dict[str, Fill]:
        """Parameter name -> function (tensor, generator) that fills it, for its own parameters.

        Linear layers, embeddings and the weights in `matrices()` may be left out.
        """
        return {}

    def saved_buffers(self) -> tuple[str, ...]:
        """Names of its buffers that `after_update` changes, which checkpoints and exports contain.
        Other buffers are constants."""
        return ()

    def after_update(self, counts: torch.Tensor) -> None:
        """Change its saved buffers after an update of the weights.

        Of feed-forward networks whose AuxOutput has `counts`: they are summed over the iteration's
        micro-batches and ranks, or zeros if the update was skipped.
        """

    def residual_weights(self) -> list[torch.Tensor]:
        """Weights of its projections into the residual stream, for depth-scaled initialization."""
        return []

    def undecayed(self) -> list[torch.Tensor]:
        """Its own parameters of two or more dimensions that have no weight decay, besides those
        of one dimension, which never have."""
        return []

    def matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        """Its own hidden matrices, for optimizers such as Muon.

        Parameter -> number of rows of each matrix that is stacked in it: (4, 4) for two matrices of
        four rows. A parameter with more than two dimensions is a stack of such matrices. The
        default: its linear layers, one matrix each. Embedding and output head have none.
        """
        layers = own_linear_layers(cast(nn.Module, self))
        return {layer.weight: (layer.out_features,) for layer in layers}


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What checkpoints and exports contain, by name: parameters, tied ones once, and saved
    buffers."""
    return {**dict(model.named_parameters()), **saved_buffers(model)}


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that training changes, by name."""
    return {
        f'{prefix}.{name}': cast(nn.Module, module).get_buffer(name)
        for prefix, module in model.named_modules()
        if isinstance(module, Component)
        for name in module.saved_buffers()
    }


def own_linear_layers(module: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers inside `module` that are not inside another component."""
    for child in module.children():
        if isinstance(child, nn.Linear):
            yield child
        elif not isinstance(child, Component):
            yield from own_linear_layers(child)


def module_flops(module: nn.Module, seq_len: int, causal: bool, part: str) -> dict[str, float]:
    """Forward FLOPs of everything inside `module`: 2 · in · out per token for a linear layer."""
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


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of matrix multiplications with x: autocast's if it is enabled, else x's."""
    device = x.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else x.dtype


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), computed again in the backward pass, so that only the arguments are
    kept. The function draws no random numbers."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """For math that stays in the dtype of its operands, such as that of recurrent states."""
    available = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


__getattr__ = renamed_classes(__name__, {'Auxiliary': 'AuxOutput'})
