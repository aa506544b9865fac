"""KV caches and other states, so that generation processes each token once."""

from dataclasses import dataclass

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


class MixerState:
    """What a mixer other than attention keeps of earlier tokens: tensors (B, ...) by name.

    Such as a recurrent state, and the last inputs of a convolution. Empty before the first tokens.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def get(self, name: str) -> torch.Tensor | None:
        return self.tensors.get(name)

    def set(self, name: str, value: torch.Tensor) -> None:
        """Keep a copy, so that no more memory is held than the value's own."""
        self.tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


LayerStates = dict[str, LayerCache | MixerState]  # by mixer


@dataclass
class Cache:
    """What all layers keep of the earlier tokens of a batch of sequences."""

    layers: list[LayerStates]
    text: LayerCache  # the tokens themselves, used if documents are kept apart
    length: int = 0  # number of tokens per sequence so far

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for states in self.layers for state in states.values())
