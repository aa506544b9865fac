"""Their tensors and our parameters: which of theirs one of ours is made of, both ways."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from model_config import ModelArchitectureConfig


@dataclass(frozen=True)
class Weight:
    """Which of their tensors a parameter of ours is made of.

    theirs: their names, one below the other in ours; with `{expert}` in them those of one expert
    in a stack of all. rows: how many of our rows each has; None: all the same. transposed: theirs
    are (in, out). order: our row i is their row order[i]. plus: ours = theirs + plus. fit: what is
    done to a table of another length, on the way in. unused: so many rows of theirs come first and
    hold nothing. named: `theirs`, where it depends.
    zeros: a vector of theirs beside it, a number for each row, that is nothing but zeros here.
    """

    theirs: tuple[str, ...]
    rows: Callable[[ModelArchitectureConfig], tuple[int, ...]] | None = None
    transposed: bool = False
    order: Callable[[ModelArchitectureConfig], torch.Tensor] | None = None
    plus: float = 0.0
    fit: Callable[[torch.Tensor, ModelArchitectureConfig], torch.Tensor] | None = None
    unused: int = 0
    named: Callable[[ModelArchitectureConfig], tuple[str, ...]] | None = None
    zeros: str | None = None

    def names(self, layer: str | None, config: ModelArchitectureConfig) -> list[str]:
        """Their names in that layer, in the order of `read` and `write`."""
        experts = range(config.num_experts) if self.of_experts else (0,)
        theirs = self.named(config) if self.named else self.theirs
        return [name.format(layer=layer, expert=e) for e in experts for name in theirs]

    @property
    def of_experts(self) -> bool:
        return '{expert}' in self.theirs[0]

    def read(self, tensors: list[torch.Tensor], config: ModelArchitectureConfig) -> torch.Tensor:
        """Theirs as ours."""
        each = len(self.theirs)
        experts = [
            self._read(tensors[first : first + each], config)
            for first in range(0, len(tensors), each)
        ]
        return torch.stack(experts) if self.of_experts else experts[0]

    def write(self, tensor: torch.Tensor, config: ModelArchitectureConfig) -> list[torch.Tensor]:
        """Ours as theirs."""
        experts = tensor if self.of_experts else (tensor,)
        return [part for expert in experts for part in self._write(expert, config)]

    def _read(self, tensors: list[torch.Tensor], config: ModelArchitectureConfig) -> torch.Tensor:
        tensors = [tensor.T if self.transposed else tensor for tensor in tensors]
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        joined = joined[self.unused :]
        if self.order:
            joined = joined[self.order(config)]
        if self.plus:
            joined = joined.float() + self.plus
        return self.fit(joined, config) if self.fit else joined

    def _write(self, tensor: torch.Tensor, config: ModelArchitectureConfig) -> list[torch.Tensor]:
        if self.plus:
            tensor = (tensor.float() - self.plus).to(tensor.dtype)
        if self.order and not tensor.is_meta:  # of which only the shape counts
            tensor = tensor[self.order(config).argsort()]
        if self.unused:
            tensor = torch.cat((tensor.new_zeros(self.unused, *tensor.shape[1:]), tensor))
        rows = self.rows(config) if self.rows else len(tensor) // len(self.theirs)
        return [part.T if self.transposed else part for part in tensor.split(rows)]


def fit_vocabulary(table: torch.Tensor, config: ModelArchitectureConfig) -> torch.Tensor:
    """Rows cut off at the end, or added, for another vocab_size.

    An added row is the mean of the others, so its logit is their mean: by Jensen's inequality k
    of them cost at most ln(1 + k / V) nats. A row of zeros can be far likelier than all others.
    """
    missing = config.vocab_size - len(table)
    if missing <= 0:
        return table[: config.vocab_size]
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat((table, mean.expand(missing, -1)))


def fit_positions(table: torch.Tensor, config: ModelArchitectureConfig) -> torch.Tensor:
    """The first block_size positions."""
    return table[: config.block_size]


def one(theirs: str, **how) -> Weight:
    """One tensor of theirs is one of ours."""
    return Weight((theirs,), **how)


def with_biases(weights: dict[str, Weight]) -> dict[str, Weight]:
    """The weights, and beside each `….weight` the `….bias` that is made in the same way."""

    def bias(name: str) -> str:
        return name.removesuffix('weight') + 'bias'

    biases = {
        bias(ours): Weight(tuple(map(bias, w.theirs)), rows=w.rows, order=w.order)
        for ours, w in weights.items()
    }
    return weights | biases
