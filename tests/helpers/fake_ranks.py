"""The first rank of a job of several, without the others: collectives return at once, with results
that have the right sizes and no meaning."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel import strategies
from parallel.matrix_exchange import MatrixExchange
from parallel.process_group import MultiProcessGroup, SingleProcessGroup

# They exchange Python values, which a fake group cannot.
LOCAL_METHODS = (
    'all_reduce_max',
    'all_gather_object',
    'broadcast_from_main',
    'propagate_failures',
    'close',
)


class _Finished:
    """The work of an asynchronous collective, with the future that DDP's hooks read."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def wait(self) -> None:
        pass

    def get_future(self) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future()
        future.set_result([self.tensor])
        return future


def _returning(others: list) -> Callable:
    """`all_gather_object`, with these values of the other ranks."""

    def all_gather_object(values, own, group=None):
        values[:] = [own, *others]

    return all_gather_object


@contextmanager
def fake_group(world_size: int, rank: int = 0) -> Iterator[None]:
    """A context in which strategies are built for one rank of a fake process group."""
    dist.init_process_group('fake', store=FakeStore(), rank=rank, world_size=world_size)
    members = dist.HashStore(), dist.group.WORLD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, 'init_process_group', lambda device, timeout: members)
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """A context in which this process is the first of `world_size`, as torchrun starts them."""
    all_reduce, initialize = dist.all_reduce, MatrixExchange.__init__

    def finished_all_reduce(tensor, *arguments, async_op=False, **options):
        all_reduce(tensor, *arguments, **options)
        return _Finished(tensor) if async_op else None

    def gathered_ranges(exchange, sizes, shard_ranges, *arguments):
        # The second rank has what the first one lacks.
        rests = [(end, size) for (_, end), size in zip(shard_ranges, sizes)]
        empty = [(size, size) for size in sizes]
        others = [rests, *[empty] * (world_size - 2)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, 'all_gather_object', _returning(others))
            initialize(exchange, sizes, shard_ranges, *arguments)

    variables = {'RANK': 0, 'LOCAL_RANK': 0, 'WORLD_SIZE': world_size}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**variables, 'MASTER_ADDR': 'localhost', 'MASTER_PORT': 1}.items():
            patch.setitem(os.environ, key, str(value))
        patch.setattr(dist, 'all_reduce', finished_all_reduce)
        # The fake group refuses a rank that sends nothing.
        patch.setattr(dist, 'all_to_all_single', lambda output, *_, **__: _Finished(output))
        patch.setattr(MatrixExchange, '__init__', gathered_ranges)
        for name in LOCAL_METHODS:
            patch.setattr(MultiProcessGroup, name, vars(SingleProcessGroup)[name])
        with fake_group(world_size):
            yield
