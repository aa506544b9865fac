"""What an optimizer needs of the way in which processes work together.

`parallel.strategies` has it: that package imports this one, so only the form stands here.
"""

from typing import Protocol

import torch


class Shard(Protocol):
    """What a rank holds of a parameter."""

    @property
    def key(self) -> torch.Tensor:
        """What the optimizer knows it as."""


class MatrixExchange(Protocol):
    """Matrices brought together whole, and back; `indices` are those in the list of all."""

    bytes_sent: float

    def gather(self, indices: range, shards: list[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's shards of every matrix -> the whole matrices that are its to work on."""

    def scatter_back(self, indices: range, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
        """The whole matrices that it has worked on -> its shards of every matrix."""


class ParallelStrategy(Protocol):
    world_size: int

    def shard(self, parameter: torch.nn.Parameter) -> Shard: ...

    def matrix_exchange(
        self, matrices: list[torch.nn.Parameter], dtype: torch.dtype
    ) -> MatrixExchange: ...

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The 2-norm of all ranks' gradients."""

    def sum_over_shards(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over all that is divided among the ranks."""

    def all_reduce_max(self, values: list[float]) -> list[float]: ...
