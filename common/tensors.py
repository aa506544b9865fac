"""Tensors that may be sharded, and their storages."""

import torch
from torch.distributed.tensor import DTensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor that may be sharded, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def storage_of(tensor: torch.Tensor) -> int:
    """A key of the tensor's storage, the same for all views while it exists."""
    return tensor.untyped_storage()._cdata
