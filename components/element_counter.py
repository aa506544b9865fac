"""Counting of the elements that operations write, and what custom operators do inside."""

from collections.abc import Callable

import torch
from torch._ops import OpOverloadPacket
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Elements that a custom operator writes, from its arguments.
ELEMENT_FORMULAS: dict[OpOverloadPacket, Callable[..., int]] = {}
# Bytes that a custom operator holds inside beside its results, at most, from its arguments.
WORKING_MEMORY: dict[OpOverloadPacket, Callable[..., int]] = {}


class ElementCounter(TorchDispatchMode):
    """Counts the elements written by operations other than matrix products and views."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        operation = func.overloadpacket
        if operation in ELEMENT_FORMULAS:
            self.elements += ELEMENT_FORMULAS[operation](*args)
            return result
        # `_unsafe_view` reshapes the output of a product, and writes nothing either.
        writes_nothing = operation in flop_registry or operation is torch.ops.aten._unsafe_view
        if not func.is_view and not writes_nothing:
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            self.elements += sum(o.numel() for o in outputs if isinstance(o, torch.Tensor))
        return result
