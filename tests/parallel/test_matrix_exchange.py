"""The exchange of whole matrices between pretended ranks, in one process."""

import random

import pytest
import torch

from parallel import matrix_exchange
from parallel.matrix_exchange import LocalMatrices, MatrixExchange

SIZES = [12, 8, 30, 8, 12, 5, 16]
STACKS = [range(3), range(3, 4), range(4, 7)]


class Network:
    """torch.distributed for ranks that take turns: data arrives when all have sent."""

    def __init__(self, ranges):
        self.ranges, self.rank, self.calls = ranges, 0, [[] for _ in ranges]

    def get_rank(self, group):
        return self.rank

    def get_world_size(self, group):
        return len(self.ranges)

    def all_gather_object(self, values, value, group):
        assert value == self.ranges[self.rank]
        values[:] = self.ranges

    def all_to_all_single(self, received, sent, received_sizes, sent_sizes, group, async_op):
        assert async_op and sent.dtype == received.dtype
        self.calls[self.rank].append((received.split(received_sizes), sent.split(sent_sizes)))
        return Arrival(self, self.rank, len(self.calls[self.rank]) - 1)


class Arrival:
    """A work handle: data arrives in `wait`, and not before."""

    def __init__(self, network, rank, number):
        self.network, self.rank, self.number = network, rank, number

    def wait(self):
        calls = [of_rank[self.number] for of_rank in self.network.calls]
        for part, (_, sent) in zip(calls[self.rank][0], calls, strict=True):
            part.copy_(sent[self.rank])


def rows(ranks):
    """As FSDP: a part of every matrix, some of them empty."""
    shares = [-(-size // ranks) for size in SIZES]
    return [
        [(min(r * n, s), min(r * n + n, s)) for n, s in zip(shares, SIZES)] for r in range(ranks)
    ]


def stretches(ranks):
    """As ZeRO-1: equal parts of all matrices, one after another."""
    share, ranges = -(-sum(SIZES) // ranks), []
    for begin in range(0, share * ranks, share):
        at, of_rank = 0, []
        for size in SIZES:
            low = min(max(begin - at, 0), size)
            of_rank.append((low, max(low, min(begin + share - at, size))))
            at += size
        ranges.append(of_rank)
    return ranges


def whole(ranks):
    return [[(0, size) for size in SIZES] for _ in range(ranks)]


@pytest.mark.parametrize('ranges', [rows(3), rows(8), stretches(3), stretches(8), whole(3)])
@pytest.mark.parametrize('shuffled', [False, True])
def test_exchanges_under_way_together_keep_their_data(ranges, shuffled, monkeypatch):
    """All stacks are started before any is waited for, in any order of waiting."""
    network = Network(ranges)
    monkeypatch.setattr(matrix_exchange, 'dist', network)
    matrices = [torch.randn(size) for size in SIZES]
    exchanges, pending = [], {}
    for rank in range(len(ranges)):
        network.rank = rank
        exchanges.append(MatrixExchange(SIZES, ranges[rank], torch.bfloat16, torch.device('cpu')))
        for stack in STACKS:
            shards = [matrices[i][slice(*ranges[rank][i])] for i in stack]
            pending[rank, stack] = exchanges[rank].start_gather(stack, shards)

    order = random.Random(0).sample(STACKS, len(STACKS)) if shuffled else STACKS
    owned = {}
    for rank, exchange in enumerate(exchanges):
        for stack in order:
            owned[rank, stack] = pending[rank, stack].wait()
            expected = [matrices[i] for i in stack if exchange.owners[i] == rank]
            assert all(map(torch.equal, owned[rank, stack], expected))
            assert len(owned[rank, stack]) == len(expected)

    network.calls = [[] for _ in ranges]
    for rank, exchange in enumerate(exchanges):
        network.rank = rank
        for stack in STACKS:
            updated = [matrix.bfloat16() * 2 for matrix in owned[rank, stack]]
            pending[rank, stack] = exchange.start_scatter_back(stack, updated)
    for rank in range(len(ranges)):
        for stack in order:
            expected = [(matrices[i].bfloat16() * 2)[slice(*ranges[rank][i])] for i in stack]
            shards = pending[rank, stack].wait()
            assert len(shards) == len(expected) and all(map(torch.equal, shards, expected))


def test_single_process_exchanges_nothing():
    matrices = [torch.randn(size) for size in SIZES]
    local = LocalMatrices()
    assert local.start_gather(range(7), matrices).wait() is matrices
    assert local.start_scatter_back(range(7), matrices).wait() is matrices
