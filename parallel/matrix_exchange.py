"""Gathers whole hidden matrices from shards, for optimizers that cannot update a shard alone.

Each rank has a contiguous range of every flattened matrix: all of it (DDP), some rows (FSDP), or
the part in its shard of all parameters (ZeRO-1). Each matrix is owned by one rank. Example: shards
A0 and B0 on rank 0, which owns matrix A, and A1 and B1 on rank 1, which owns matrix B.

                  rank 0      rank 1
    shards        A0 B0       A1 B1
    gather        A0 A1       B0 B1     fp32, one all-to-all, not needed for whole matrices (DDP)
    optimizer     A'          B'        each matrix once, on its owner
    scatter_back  A'0 B'0     A'1 B'1   `dtype`, one all-to-all

Both return at once, and the results are waited for, so that several exchanges can be under way
while the device computes. Ranks must start them in the same order.
"""

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist

ShardRange = tuple[int, int]  # begin and end of elements in a flattened matrix


class PendingExchange(NamedTuple):
    """An exchange under way. `wait` gives its result; under NCCL the stream waits, not the host."""

    wait: Callable[[], list[torch.Tensor]]


class LocalMatrices:
    """A single process, with whole matrices."""

    bytes_sent: float = 0.0  # per iteration and rank, on average

    def start_gather(self, indices: range, shards: list[torch.Tensor]) -> PendingExchange:
        """This rank's shards of all matrices, 1-D -> the matrices that it owns, flattened."""
        return PendingExchange(lambda: shards)

    def start_scatter_back(self, indices: range, matrices: list[torch.Tensor]) -> PendingExchange:
        """The updated matrices that this rank owns -> its shards of all matrices."""
        return PendingExchange(lambda: matrices)


class MatrixExchange(LocalMatrices):
    """Exchange between the ranks of a group; all call each method with the same indices."""

    def __init__(
        self,
        sizes: list[int],
        shard_ranges: list[ShardRange],
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ):
        """sizes: elements of each matrix; shard_ranges: this rank's range of each; dtype: that of
        the updated matrices; group: None for all ranks."""
        self.sizes, self.dtype, self.device, self.group = sizes, dtype, device, group
        self.rank = dist.get_rank(group)
        # By rank, then by matrix.
        self.shard_ranges: list[list[ShardRange]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(self.shard_ranges, shard_ranges, group=group)
        self.ranks = range(len(self.shard_ranges))
        self.owners = self._assign_owners()
        all_bytes = sum(self._bytes_sent_for(index) for index in range(len(sizes)))
        self.bytes_sent = all_bytes / len(self.ranks)

    def start_gather(self, indices, shards):
        shard_of, owned = dict(zip(indices, shards)), self._owned(indices, self.rank)
        # With DDP, each owner has its matrices whole: nothing to communicate.
        if not any(self._lacks_part(self.owners[index], index) for index in indices):
            return PendingExchange(lambda: [shard_of[index] for index in owned])
        # To each rank: this rank's shards of incomplete matrices that it owns.
        outgoing = [
            [shard_of[i] for i in self._owned(indices, rank) if self._lacks_part(rank, i)]
            for rank in self.ranks
        ]
        # From each rank: its shards of incomplete matrices that this rank owns.
        incomplete = [index for index in owned if self._lacks_part(self.rank, index)]
        lengths = [[self._length(rank, index) for index in incomplete] for rank in self.ranks]
        received = self._start_all_to_all(outgoing, lengths, torch.float32)

        def whole_matrices() -> list[torch.Tensor]:
            # The ranges are in the order of the ranks: concatenation gives the whole matrix.
            gathered = dict(zip(incomplete, map(torch.cat, zip(*received()))))
            return [gathered[index] if index in gathered else shard_of[index] for index in owned]

        return PendingExchange(whole_matrices)

    def start_scatter_back(self, indices, matrices):
        owned = self._owned(indices, self.rank)
        # This rank's shards of its own matrices stay here.
        shard_of = {i: w[slice(*self.shard_ranges[self.rank][i])] for i, w in zip(owned, matrices)}
        # To each other rank: its shards of this rank's matrices.
        outgoing = [
            [whole[slice(*self.shard_ranges[rank][i])] for i, whole in zip(owned, matrices)]
            if rank != self.rank
            else []
            for rank in self.ranks
        ]
        # From each other rank: this rank's shards of the matrices that it owns.
        theirs = [self._owned(indices, rank) if rank != self.rank else [] for rank in self.ranks]
        lengths = [[self._length(self.rank, index) for index in of_rank] for of_rank in theirs]
        received = self._start_all_to_all(outgoing, lengths, self.dtype)

        def shards_of_all() -> list[torch.Tensor]:
            shards = shard_of | dict(zip(chain(*theirs), chain(*received())))
            return [shards[index] for index in indices]

        return PendingExchange(shards_of_all)

    def _start_all_to_all(
        self, outgoing: list[list[torch.Tensor]], lengths: list[list[int]], dtype: torch.dtype
    ) -> Callable[[], list[list[torch.Tensor]]]:
        """Send each rank its tensors.

        Returns a function that waits for the tensors, of given lengths, from each rank.
        """
        received_sizes = [sum(of_rank) for of_rank in lengths]
        sent_sizes = [sum(map(torch.numel, tensors)) for tensors in outgoing]
        empty = torch.empty(0, dtype=dtype, device=self.device)
        sent = torch.cat([empty, *chain(*outgoing)])  # `empty`, since torch.cat needs a tensor
        received = empty.new_empty(sum(received_sizes))
        work = dist.all_to_all_single(
            received, sent, received_sizes, sent_sizes, group=self.group, async_op=True
        )

        def wait() -> list[list[torch.Tensor]]:
            work.wait()
            parts = received.split(received_sizes)
            return [part.split(of_rank) for part, of_rank in zip(parts, lengths)]

        return wait

    def _assign_owners(self) -> list[int]:
        """The owner of each matrix: the least loaded rank, if possible one that has it whole."""
        load = [0] * len(self.ranks)
        owners = []
        for index, size in enumerate(self.sizes):
            able = [r for r in self.ranks if not self._lacks_part(r, index)] or self.ranks
            owner = min(able, key=load.__getitem__)
            load[owner] += size
            owners.append(owner)
        return owners

    def _owned(self, indices: range, rank: int) -> list[int]:
        return [index for index in indices if self.owners[index] == rank]

    def _length(self, rank: int, index: int) -> int:
        begin, end = self.shard_ranges[rank][index]
        return end - begin

    def _lacks_part(self, rank: int, index: int) -> bool:
        """Whether a rank has less than the whole matrix."""
        return self._length(rank, index) < self.sizes[index]

    def _bytes_sent_for(self, index: int) -> int:
        """Bytes that all ranks send for a matrix: fp32 shards to its owner, updated ones back."""
        owner = self.owners[index]
        others = sum(self._length(rank, index) for rank in self.ranks if rank != owner)
        gathered = torch.float32.itemsize if self._lacks_part(owner, index) else 0
        return others * (gathered + self.dtype.itemsize)
