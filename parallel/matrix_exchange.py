"""Hidden matrices brought together whole, for an optimizer that cannot work on a part of one.

Ranks hold contiguous ranges of the flattened matrices: all of each (DDP), some rows of each (FSDP),
or whatever falls into their share of all parameters (ZeRO-1). Each matrix has one owner among them.
Of matrices A and B, whose shards on ranks 0 and 1 are A0 A1 and B0 B1, and which they own:

                  rank 0      rank 1
    shards        A0 B0       A1 B1
    gather        A0 A1       B0 B1     fp32, by one all-to-all, unless owners hold them whole
    optimizer     A'          B'        each whole matrix once, on its owner
    scatter_back  A'0 B'0     A'1 B'1   `dtype`, by one all-to-all
"""

from itertools import chain

import torch
import torch.distributed as dist

ShardRange = tuple[int, int]  # begin and end among the elements of a flattened matrix


class LocalMatrices:
    """A single process: every matrix is whole already."""

    bytes_sent: float = 0.0  # in an iteration, by a rank, on average

    def gather(self, indices: range, shards: list[torch.Tensor]) -> list[torch.Tensor]:
        """From this rank's shard, 1-D, of each matrix: the whole ones that it owns, flattened."""
        return shards

    def scatter_back(self, indices: range, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
        """From what became of those that it owns: this rank's shard of each matrix."""
        return matrices


class MatrixExchange(LocalMatrices):
    """Among the ranks of a group. Every rank calls every method, with the same indices."""

    def __init__(
        self,
        sizes: list[int],
        shard_ranges: list[ShardRange],
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ):
        """sizes: elements of each matrix; shard_ranges: this rank's of each; dtype: of what is
        scattered back; group: None for all ranks."""
        self.sizes, self.dtype, self.device, self.group = sizes, dtype, device, group
        self.rank = dist.get_rank(group)
        # By rank, then by matrix.
        self.shard_ranges: list[list[ShardRange]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(self.shard_ranges, shard_ranges, group=group)
        self.ranks = range(len(self.shard_ranges))
        self.owners = self._assign_owners()
        all_bytes = sum(self._bytes_sent_for(index) for index in range(len(sizes)))
        self.bytes_sent = all_bytes / len(self.ranks)

    def gather(self, indices, shards):
        shard_of, owned = dict(zip(indices, shards)), self._owned(indices, self.rank)
        # Under DDP each owner holds its matrices whole: nothing travels.
        if not any(self._lacks_part(self.owners[index], index) for index in indices):
            return [shard_of[index] for index in owned]
        # To each rank: my shards of the matrices that it owns and lacks a part of.
        outgoing = [
            [shard_of[i] for i in self._owned(indices, rank) if self._lacks_part(rank, i)]
            for rank in self.ranks
        ]
        # From each rank: its shards of those that are mine.
        incomplete = [index for index in owned if self._lacks_part(self.rank, index)]
        lengths = [[self._length(rank, index) for index in incomplete] for rank in self.ranks]
        incoming = self._all_to_all(outgoing, lengths, torch.float32)
        # Ranks hold the ranges of a matrix in their own order, so shards in it make the whole.
        gathered = dict(zip(incomplete, map(torch.cat, zip(*incoming))))
        return [gathered[index] if index in gathered else shard_of[index] for index in owned]

    def scatter_back(self, indices, matrices):
        owned = self._owned(indices, self.rank)
        # My own shards of the matrices that I own stay here.
        shard_of = {i: w[slice(*self.shard_ranges[self.rank][i])] for i, w in zip(owned, matrices)}
        # To each other rank: its shards of them.
        outgoing = [
            [whole[slice(*self.shard_ranges[rank][i])] for i, whole in zip(owned, matrices)]
            if rank != self.rank
            else []
            for rank in self.ranks
        ]
        # From each other rank: my shards of those that it owns.
        theirs = [self._owned(indices, rank) if rank != self.rank else [] for rank in self.ranks]
        lengths = [[self._length(self.rank, index) for index in of_rank] for of_rank in theirs]
        incoming = self._all_to_all(outgoing, lengths, self.dtype)
        shard_of |= zip(chain(*theirs), chain(*incoming))
        return [shard_of[index] for index in indices]

    def _all_to_all(
        self, outgoing: list[list[torch.Tensor]], lengths: list[list[int]], dtype: torch.dtype
    ) -> list[list[torch.Tensor]]:
        """Send each rank its tensors; what each rank sent, in tensors of the `lengths` given."""
        received_sizes = [sum(of_rank) for of_rank in lengths]
        sent_sizes = [sum(map(torch.numel, tensors)) for tensors in outgoing]
        empty = torch.empty(0, dtype=dtype, device=self.device)
        sent = torch.cat([empty, *chain(*outgoing)])  # `empty`: of nothing there is no cat
        received = empty.new_empty(sum(received_sizes))
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self.group)
        parts = received.split(received_sizes)
        return [part.split(of_rank) for part, of_rank in zip(parts, lengths)]

    def _assign_owners(self) -> list[int]:
        """The owner of each matrix: a rank that holds it whole if one does, the least laden."""
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
        """Whether a rank holds less than the whole matrix."""
        return self._length(rank, index) < self.sizes[index]

    def _bytes_sent_for(self, index: int) -> int:
        """By all ranks for a matrix: shards in fp32 to its owner, and what it scatters back."""
        owner = self.owners[index]
        others = sum(self._length(rank, index) for rank in self.ranks if rank != owner)
        gathered = torch.float32.itemsize if self._lacks_part(owner, index) else 0
        return others * (gathered + self.dtype.itemsize)
