"""Hidden matrices brought together whole, for an optimizer that cannot work on a part of one.

Ranks hold contiguous stretches of the flattened matrices: all of each (DDP), some rows of each
(FSDP), or whatever falls into their share of all parameters (ZeRO-1). Each matrix has one owner
among them, which is sent the others' pieces, works on the whole, and sends the pieces back.
"""

from itertools import chain

import torch
import torch.distributed as dist

Stretch = tuple[int, int]  # begin and end among the elements of a flattened matrix


class Undivided:
    """A single process: every matrix is whole already."""

    bytes_sent: float = 0.0  # in an update, by a rank, on average

    def collect(self, numbers: range, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
        """From this rank's piece, 1-D, of each matrix: the whole ones that it owns, flattened."""
        return pieces

    def hand_back(self, numbers: range, wholes: list[torch.Tensor]) -> list[torch.Tensor]:
        """From what became of those that it owns: this rank's piece of each matrix."""
        return wholes


class MatrixExchange(Undivided):
    """Among the ranks of a group. Every rank calls every method, with the same numbers."""

    def __init__(
        self,
        sizes: list[int],
        held: list[Stretch],
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ):
        """sizes: elements of each matrix; held: this rank's stretch of each; dtype: of what is
        handed back; group: None for all ranks."""
        self.sizes, self.dtype, self.device, self.group = sizes, dtype, device, group
        self.rank = dist.get_rank(group)
        # By rank, then by matrix.
        self.held: list[list[Stretch]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(self.held, held, group=group)
        self.ranks = range(len(self.held))
        self.owners = self._shared_out()
        self.bytes_sent = sum(map(self._bytes_of, range(len(sizes)))) / len(self.held)

    def collect(self, numbers, pieces):
        piece_of = dict(zip(numbers, pieces))
        mine = self._owned(numbers, self.rank)
        if not any(self._needs(self.owners[n], n) for n in numbers):
            return [piece_of[n] for n in mine]
        outgoing = [
            [piece_of[n] for n in self._owned(numbers, rank) if self._needs(rank, n)]
            for rank in self.ranks
        ]
        missing = [n for n in mine if self._needs(self.rank, n)]
        lengths = [[self._length(rank, n) for n in missing] for rank in self.ranks]
        incoming = self._all_to_all(outgoing, lengths, torch.float32)
        # Ranks hold the stretches of a matrix in their own order.
        wholes = dict(zip(missing, map(torch.cat, zip(*incoming))))
        return [wholes[n] if n in wholes else piece_of[n] for n in mine]

    def hand_back(self, numbers, wholes):
        mine = self._owned(numbers, self.rank)
        piece_of = {n: w[slice(*self.held[self.rank][n])] for n, w in zip(mine, wholes)}
        others = [rank for rank in self.ranks if rank != self.rank]
        outgoing = [
            [whole[slice(*self.held[rank][n])] for n, whole in zip(mine, wholes)]
            if rank in others
            else []
            for rank in self.ranks
        ]
        owned = [self._owned(numbers, rank) if rank in others else [] for rank in self.ranks]
        lengths = [[self._length(self.rank, n) for n in theirs] for theirs in owned]
        incoming = self._all_to_all(outgoing, lengths, self.dtype)
        piece_of |= zip(chain(*owned), chain(*incoming))
        return [piece_of[n] for n in numbers]

    def _bytes_of(self, number: int) -> int:
        """Sent for a matrix by all ranks: pieces in fp32 to its owner, and what it hands back."""
        owner = self.owners[number]
        others = sum(self._length(rank, number) for rank in self.ranks if rank != owner)
        collected = torch.float32.itemsize if self._needs(owner, number) else 0
        return others * (collected + self.dtype.itemsize)

    def _length(self, rank: int, number: int) -> int:
        begin, end = self.held[rank][number]
        return end - begin

    def _needs(self, rank: int, number: int) -> bool:
        """Whether a rank holds less than the whole matrix."""
        return self._length(rank, number) < self.sizes[number]

    def _owned(self, numbers: range, rank: int) -> list[int]:
        return [n for n in numbers if self.owners[n] == rank]

    def _shared_out(self) -> list[int]:
        """The owner of each matrix: a rank that holds it whole if one does, the least laden."""
        load = [0] * len(self.held)
        owners = []
        for number, size in enumerate(self.sizes):
            able = [rank for rank in self.ranks if not self._needs(rank, number)] or self.ranks
            owner = min(able, key=load.__getitem__)
            load[owner] += size
            owners.append(owner)
        return owners

    def _all_to_all(
        self, outgoing: list[list[torch.Tensor]], lengths: list[list[int]], dtype: torch.dtype
    ) -> list[list[torch.Tensor]]:
        """Send each rank its tensors; what each rank sent, in tensors of the `lengths` given."""
        sizes = [sum(of_rank) for of_rank in lengths]
        nothing = torch.empty(0, dtype=dtype, device=self.device)
        sent = torch.cat([nothing, *chain(*outgoing)])
        received = nothing.new_empty(sum(sizes))
        sent_sizes = [sum(map(torch.numel, tensors)) for tensors in outgoing]
        dist.all_to_all_single(received, sent, sizes, sent_sizes, group=self.group)
        return [part.split(of_rank) for part, of_rank in zip(received.split(sizes), lengths)]
