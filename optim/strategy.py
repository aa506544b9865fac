"""The interface of parallel strategies that optimizers use.

The strategies are in `parallel.strategies`, which imports this package; hence the protocols.
"""

from typing import Protocol

import torch


class Shard(Protocol):
    """The part of a parameter on a rank."""

    @property
    def key(self) -> torch.Tensor:
        """The tensor that the optimizer updates."""


class PendingExchange(Protocol):
    """An exchange under way."""

    def wait(self) -> list[torch.Tensor]:
        """The tensors received."""


class MatrixExchange(Protocol):
    """Gathers whole matrices from shards, and scatters them; `indices` refer to all matrices.

    Ranks must start the exchanges in the same order.
    """

    bytes_sent: float

    def start_gather(self, indices: range, shards: list[torch.Tensor]) -> PendingExchange:
        """This rank's shards of all matrices -> the whole matrices that it owns."""

    def start_scatter_back(self, indices: range, matrices: list[torch.Tensor]) -> PendingExchange:
        """The whole matrices that this rank owns -> its shards of all matrices."""


class ParallelStrategy(Protocol):
    world_size: int

    def shard(self, parameter: torch.nn.Parameter) -> Shard: ...

    def matrix_exchange(
        self, matrices: list[torch.nn.Parameter], dtype: torch.dtype
    ) -> MatrixExchange: ...

    def clear_gradients(self, owner: torch.optim.Optimizer) -> None:
        """Free the gradients, or set them to zero."""

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The 2-norm of the gradient over all ranks."""

    def sum_over_shards(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over the shards of all ranks."""

    def all_reduce_max(self, values: list[float]) -> list[float]: ...
