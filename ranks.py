"""What the processes of a job tell one another: all of it trivial when there is only one."""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from errors import UserError


def world_size() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return int(os.environ.get('WORLD_SIZE', '1'))


class Alone:
    """One process. Every method that communicates is to be called by every rank."""

    rank, world_size = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the record and publishes checkpoints."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        return tensor

    def largest(self, numbers: list[float]) -> list[float]:
        """The largest of each number over all ranks; the device is not waited for."""
        return numbers

    def gather(self, value) -> list:
        """The plain value of each rank, on every rank."""
        return [value]

    def from_main(self, make: Callable):
        """What `make()` returns on the main rank, on every rank; its UserError is raised on all."""
        return make()

    def close(self) -> None:
        """Take leave of the others."""


class Together(Alone):
    """The processes that torchrun started, once the process group is there."""

    def __init__(self):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def sum(self, tensor):
        dist.all_reduce(tensor)
        return tensor

    def largest(self, numbers):
        on_host = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(on_host, op=dist.ReduceOp.MAX)
        return on_host.tolist()

    def gather(self, value):
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, make):
        answer, problems = None, None
        if self.is_main:
            try:
                answer = make()
            except UserError as error:
                problems = error.problems
        shared = [answer, problems]
        dist.broadcast_object_list(shared, src=0)
        if shared[1] is not None:
            raise UserError(*shared[1])
        return shared[0]

    def close(self):
        dist.destroy_process_group()
