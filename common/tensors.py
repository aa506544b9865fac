"""Tensors that may be divided among ranks."""

import torch
from torch.distributed.tensor import DTensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor that may be divided, in the tensor's own memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
