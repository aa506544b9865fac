"""KV caches, so that generation processes each token once."""

from typing import NamedTuple

import torch


class LayerCache:
    """The tensors of one attention for the last `capacity` tokens, such as keys and values.

    Memory is allocated once, with the first tokens. Token t is stored at index t modulo `capacity`,
    so that a sliding window overwrites tokens that it has left.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0  # length: tokens so far, overwritten ones included
        self.tensors: tuple[torch.Tensor, ...] = ()  # (B, ..., capacity, D) each

    def extend(self, *new: torch.Tensor) -> list[torch.Tensor]:
        """Store tensors (B, ..., T, D) of the next T tokens; returns those of all tokens visible to
        them, (B, ..., K, D), in the order of `positions`."""
        start, count = self.length, new[0].size(-2)
        self.length += count
        if not self.tensors:
            self.tensors = tuple(
                x.new_empty((*x.shape[:-2], self.capacity, x.size(-1))) for x in new
            )
        if self._overwrites_visible(start, count):
            # Several tokens: the first ones still see entries that the last ones overwrite.
            visible = [torch.cat((old, x), dim=-2) for old, x in zip(self._until(start), new)]
            last = torch.arange(start, self.length, device=new[0].device)[-self.capacity :]
            for cached, x in zip(self.tensors, new):
                cached.index_copy_(-2, last % self.capacity, x[..., -self.capacity :, :])
            return visible
        for cached, x in zip(self.tensors, new):
            cached.narrow(-2, start % self.capacity, count).copy_(x)
        return self._until(self.length)

    def positions(self, new: torch.Tensor) -> torch.Tensor:
        """Positions (K,) of the tokens visible to the next tokens at positions (T,)."""
        start, count = self.length, len(new)
        if self._overwrites_visible(start, count):
            return torch.cat((self._positions_until(start, new.device), new))
        return self._positions_until(start + count, new.device)

    def _overwrites_visible(self, start: int, count: int) -> bool:
        """Whether new tokens overwrite visible ones. (A single one overwrites an invisible one.)"""
        return count > 1 and start + count > self.capacity

    def _until(self, end: int) -> list[torch.Tensor]:
        return [cached.narrow(-2, 0, min(end, self.capacity)) for cached in self.tensors]

    def _positions_until(self, end: int, device: torch.device) -> torch.Tensor:
        slots = torch.arange(min(end, self.capacity), device=device)
        return slots if end <= self.capacity else end - 1 - (end - 1 - slots) % self.capacity

    @property
    def nbytes(self) -> int:
        return sum(cached.nbytes for cached in self.tensors)


class Cache(NamedTuple):
    """The caches of all layers for a batch of sequences."""

    layers: list[LayerCache]
    text: LayerCache  # the tokens themselves, used if masks depend on documents

    @property
    def length(self) -> int:
        """Number of tokens per sequence so far."""
        return self.layers[0].length
