"""Initialization of all parameters and constant buffers of a model.

Each is filled from its own random stream, so that parameters with the same name and shape start
equal in different architectures.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn as nn

from common.errors import UserError
from components.base import Component, Fill, Initial
from model_config import INITIALIZATION_REGISTRY


class _OwnedTensor(NamedTuple):
    """A parameter or buffer of a component or of a plain module inside it."""

    name: str  # within the component
    module: nn.Module  # that has it as an attribute
    tensor: torch.Tensor


def initial_values(model: nn.Module) -> dict[str, Fill]:
    """Name of a parameter or buffer -> function that fills it; tied parameters once.

    Raises UserError if a component does not initialize one, or names one that it does not have.
    """
    config = model.config
    initialization = INITIALIZATION_REGISTRY[config.initialization]
    named = [(n, module) for n, module in model.named_modules() if isinstance(module, Component)]
    hidden, residual = _weight_roles(module for _, module in named)
    writers = _residual_writers(model, residual)

    def normal(weight: torch.Tensor) -> Fill:
        std = initialization.std(
            config, id(weight) in hidden, writers if id(weight) in residual else 0
        )
        if not isinstance(std, (int, float)) or not 0 <= std < math.inf:
            raise UserError(
                f'{initialization.__name__}.std must return a standard deviation, a number of at '
                f'least 0, and returned {std!r}.'
            )
        return Initial.normal(std)

    fill_of: dict[str, Fill] = {}
    seen = set()
    for prefix, component in named:
        owned = list(owned_tensors(component))
        fills = _declared_fills(component, {entry.name for entry in owned})
        for name, module, tensor in owned:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            attribute, full_name = name.rpartition('.')[2], f'{prefix}.{name}'
            if name in fills:
                fill_of[full_name] = _checked_fill(component, name, fills[name])
            elif id(tensor) in hidden or (
                isinstance(module, (nn.Linear, nn.Embedding)) and attribute == 'weight'
            ):
                fill_of[full_name] = normal(tensor)
            elif isinstance(module, nn.Linear) and attribute == 'bias':
                fill_of[full_name] = Initial.zeros
            else:
                raise UserError(
                    f'{full_name} is not initialized: {type(component).__name__}.initial_values() '
                    f'must return an entry for {name!r}, a function (tensor, generator) such as '
                    f'Initial.zeros or Initial.constant(1.0).'
                )
    return fill_of


def owned_tensors(module: nn.Module, prefix: str = '') -> Iterator[_OwnedTensor]:
    """The tensors that a component must initialize: all except those of components inside it."""
    for name, tensor in (
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ):
        yield _OwnedTensor(prefix + name, module, tensor)
    for name, child in module.named_children():
        if not isinstance(child, Component):
            yield from owned_tensors(child, f'{prefix}{name}.')


def _declared_fills(component: nn.Module, names: set[str]) -> dict[str, Fill]:
    """The result of the component's `initial_values()`. Raises UserError."""
    method = f'{type(component).__name__}.initial_values()'
    fills = component.initial_values()
    if not isinstance(fills, dict) or not all(callable(fill) for fill in fills.values()):
        raise UserError(
            f'{method} must return a dict, name -> function (tensor, generator), such as '
            f"{{'scale': Initial.ones}}, and returned {fills!r}."
        )
    for name in fills.keys() - names:
        if getattr(component, name, component) is None:  # a parameter that is switched off
            continue
        owned = ', '.join(map(repr, sorted(names))) or 'none'
        raise UserError(
            f'{method} names {name!r}, which is no parameter or buffer of '
            f'{type(component).__name__}. It has: {owned}.'
        )
    return fills


def _checked_fill(component: nn.Module, name: str, fill: Fill) -> Fill:
    """`fill`, with a UserError if it fails or leaves a non-finite value."""
    what = f'{type(component).__name__}.initial_values()[{name!r}]'

    def fill_and_check(tensor: torch.Tensor, generator: torch.Generator) -> None:
        try:
            fill(tensor, generator)
        except Exception as error:
            raise UserError(
                f'{what}, called with a tensor {tuple(tensor.shape)} and a generator, raised '
                f'{type(error).__name__}: {error}'
            ) from error
        if not tensor.isfinite().all():
            raise UserError(f'{what} leaves values in the tensor that are not finite.')

    return fill_and_check


def _weight_roles(components: Iterator[nn.Module]) -> tuple[set[int], set[int]]:
    """The ids of hidden matrices and of residual projections. Raises UserError."""
    hidden, residual = set(), set()
    for component in components:
        name, matrices = type(component).__name__, component.matrices()
        for weight, rows in _checked_matrices(matrices, f'{name}.matrices()'):
            if sum(rows) != weight.shape[-2]:
                raise UserError(
                    f'{name}.matrices(): the rows {rows} do not add up to those of a parameter '
                    f'{tuple(weight.shape)}.'
                )
            hidden.add(id(weight))
        weights = component.residual_weights()
        if not isinstance(weights, list) or not all(isinstance(w, nn.Parameter) for w in weights):
            raise UserError(
                f'{name}.residual_weights() must return a list of parameters, such as '
                f'[self.output.weight], and returned {_types_of(weights)}.'
            )
        residual |= {id(weight) for weight in weights}
    return hidden, residual


def _types_of(value: object) -> str:
    """What a value is, without its numbers."""
    if isinstance(value, list):
        return f'a list of {", ".join(sorted({type(each).__name__ for each in value}))}'
    return type(value).__name__


def _residual_writers(model: nn.Module, residual: set[int]) -> int:
    """The number of sublayers, attentions and FFNs, that write into the residual stream.

    Sublayers that share a projection count one by one.
    """
    return sum(
        any(id(parameter) in residual for parameter in sublayer.parameters())
        for block in model.blocks
        for sublayer in set(_sublayers(block))
    )


def _sublayers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost components inside a block, also in containers, and its own plain layers."""
    for child in module.children():
        if isinstance(child, Component) or next(child.children(), None) is None:
            yield child
        else:
            yield from _sublayers(child)


def _checked_matrices(
    matrices: object, method: str
) -> Iterator[tuple[nn.Parameter, tuple[int, ...]]]:
    for weight, rows in matrices.items() if isinstance(matrices, dict) else [(matrices, None)]:
        if not isinstance(weight, nn.Parameter) or weight.dim() < 2 or not isinstance(rows, tuple):
            raise UserError(
                f'{method} must return a dict, parameter of at least two dimensions -> rows of '
                f'each matrix in it, such as {{self.up.weight: (64,)}}.'
            )
        yield weight, rows


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter from its own random stream, seeded by (seed, parameter name).

    Values are drawn on the CPU, so that they are the same on every device.
    """
    initialize_buffers(model)
    values = initial_values(model)
    for name, parameter in model.named_parameters():
        whole = parameter
        if parameter.device.type != 'cpu':
            whole = torch.empty(parameter.shape, dtype=parameter.dtype)
        values[name](whole, torch.Generator().manual_seed(name_seed(seed, name)))
        if whole is not parameter:
            parameter.copy_(whole)


@torch.no_grad()
def initialize_buffers(model: nn.Module) -> None:
    """Fill every buffer. Buffers are constants, equal for all seeds and in no checkpoint."""
    if next(model.buffers(), None) is None:
        return
    values = initial_values(model)
    for name, buffer in model.named_buffers():
        whole = torch.empty(buffer.shape, dtype=buffer.dtype)
        values[name](whole, torch.Generator().manual_seed(name_seed(0, name)))
        buffer.copy_(whole)


def name_seed(seed: int, name: str) -> int:
    """A 63-bit seed from a seed and a name."""
    digest = hashlib.sha256(f'{seed}/{name}'.encode()).digest()
    return int.from_bytes(digest[:8], 'little') >> 1
