"""Tensors that may be sharded, and their storages."""

import torch


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor that may be sharded, without a copy."""
    # Only a DTensor has this method. The import of its class would take a second.
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor.detach()


def storage_of(tensor: torch.Tensor) -> int:
    """A key of the tensor's storage, the same for all views while it exists."""
    return tensor.untyped_storage()._cdata
