"""Which parameters a model uses only in the dtype of autocast."""

from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import components.moe  # noqa: F401 - its operator
from common import hardware
from common.tensors import storage_of
from model_builder import Transformer
from model_config import ModelArchitectureConfig

CAST = torch.ops.aten._to_copy.default
CASTS = {CAST, torch.ops.components.grouped_mm.default}  # the latter casts its own operands


def parameters_cast_by_autocast(config: ModelArchitectureConfig) -> set[str]:
    """Names of the parameters that a forward pass under bfloat16 autocast reads only as bfloat16.

    These are the matrices of products, whatever component they are in, and the biases added to
    them. The table of embeddings is not among them, even if it is tied to the head: in bfloat16 its
    rows would be rounded, and so would the sum of the gradients of both uses. Read from the
    operations of a forward pass on fake tensors, so that users' components need no declaration.
    """
    config = config.with_backend('manual')  # backends have no parameters
    with FakeTensorMode():
        model = Transformer(config).train()
        tokens = torch.zeros((1, min(8, config.block_size)), dtype=torch.long)
        reads = ParameterReads(model)
        with reads, hardware.autocast(torch.device('cpu'), 'bfloat16'):
            model(tokens, tokens)
    return {
        name for name, operations in reads.operations.items() if operations and operations <= CASTS
    }


class ParameterReads(TorchDispatchMode):
    """Records the operations that read each parameter or a view of it, except views.

    A conversion to another dtype than bfloat16 counts as an operation of its own.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        self.names = {storage_of(p): name for name, p in model.named_parameters()}
        self.operations: dict[str, set] = {name: set() for name in self.names.values()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not func.is_view and func.namespace != 'prim':
            to_other = func is CAST and kwargs.get('dtype') is not torch.bfloat16
            for name in self._read(args, kwargs):
                self.operations[name].add('another dtype' if to_other else func)
        return func(*args, **kwargs)

    def _read(self, *arguments: object) -> Iterator[str]:
        for tensor in tree_leaves(arguments):
            if isinstance(tensor, torch.Tensor) and storage_of(tensor) in self.names:
                yield self.names[storage_of(tensor)]
