"""Mapping of other programs' tensors to our parameters, both ways."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from model_config import ModelArchitectureConfig


class Layout(NamedTuple):
    """Another arrangement of the same numbers. read: theirs -> ours. write: ours -> theirs."""

    read: Callable[[torch.Tensor], torch.Tensor]
    write: Callable[[torch.Tensor], torch.Tensor]


# Weights of a depthwise convolution: theirs (channels, 1, width), ours (channels, width).
CONVOLUTION = Layout(lambda theirs: theirs.squeeze(1), lambda ours: ours.unsqueeze(1))
# Weights of experts: theirs (experts, in, out), ours (experts, out, in).
TRANSPOSED = Layout(lambda theirs: theirs.mT, lambda ours: ours.mT.contiguous())


@dataclass(frozen=True)
class TensorMap:
    """The tensors that make up one of our parameters.

    templates: their names, concatenated along the rows; `{layer}` is the layer's number, and names
    with `{expert}` are those of one expert in our stack of all. choose_templates: a function of the
    config that returns the templates. rows: our rows per tensor; None: equally many. transposed:
    theirs are (in, out). row_order: our row i is their row row_order[i]. offset: ours = theirs +
    offset. resize: applied to an embedding of another length when it is read. unused_rows: number
    of their first rows that are unused. layout: of their concatenated tensors. their_shape: that of
    theirs, if ours has the same numbers in one dimension. any_split: files may divide the rows of
    all tensors in another way than `rows`. constants: scalar tensors beside it, the same in all
    models, which an export writes: template -> value.

    The configs that its functions and methods take are those of the parameter's layer.
    """

    templates: tuple[str, ...]
    rows: Callable[[ModelArchitectureConfig], tuple[int, ...]] | None = None
    transposed: bool = False
    row_order: Callable[[ModelArchitectureConfig], torch.Tensor] | None = None
    offset: float = 0.0
    resize: Callable[[torch.Tensor, ModelArchitectureConfig], torch.Tensor] | None = None
    unused_rows: int = 0
    choose_templates: Callable[[ModelArchitectureConfig], tuple[str, ...]] | None = None
    layout: Layout | Callable[[ModelArchitectureConfig], Layout] | None = None
    their_shape: Callable[[ModelArchitectureConfig], tuple[int, ...]] | None = None
    any_split: bool = False
    constants: tuple[tuple[str, float], ...] = ()

    def names(self, layer: str | None, config: ModelArchitectureConfig) -> list[str]:
        """Their names in a layer, in the order of `read` and `write`."""
        experts = range(config.num_experts) if self.is_expert_stack else (0,)
        templates = self.choose_templates(config) if self.choose_templates else self.templates
        return [name.format(layer=layer, expert=e) for e in experts for name in templates]

    @property
    def is_expert_stack(self) -> bool:
        return '{expert}' in self.templates[0]

    def layout_of(self, config: ModelArchitectureConfig) -> Layout | None:
        return self.layout(config) if callable(self.layout) else self.layout

    def read(self, tensors: list[torch.Tensor], config: ModelArchitectureConfig) -> torch.Tensor:
        """Our parameter from their tensors."""
        each = len(self.templates) if self.is_expert_stack else len(tensors)
        experts = [
            self._read(tensors[first : first + each], config)
            for first in range(0, len(tensors), each)
        ]
        return torch.stack(experts) if self.is_expert_stack else experts[0]

    def write(self, tensor: torch.Tensor, config: ModelArchitectureConfig) -> list[torch.Tensor]:
        """Their tensors from our parameter."""
        experts = tensor if self.is_expert_stack else (tensor,)
        return [part for expert in experts for part in self._write(expert, config)]

    def _read(self, tensors: list[torch.Tensor], config: ModelArchitectureConfig) -> torch.Tensor:
        tensors = [tensor.T if self.transposed else tensor for tensor in tensors]
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        joined = joined[self.unused_rows :]
        layout = self.layout_of(config)
        joined = layout.read(joined) if layout else joined
        joined = joined.flatten() if self.their_shape else joined
        if self.row_order:
            joined = joined[self.row_order(config)]
        if self.offset:
            joined = joined.float() + self.offset
        return self.resize(joined, config) if self.resize else joined

    def _write(self, tensor: torch.Tensor, config: ModelArchitectureConfig) -> list[torch.Tensor]:
        if self.offset:
            tensor = (tensor.float() - self.offset).to(tensor.dtype)
        if self.row_order and not tensor.is_meta:  # a meta tensor has only a shape
            tensor = tensor[self.row_order(config).argsort()]
        layout = self.layout_of(config)
        tensor = layout.write(tensor) if layout else tensor
        tensor = tensor.view(self.their_shape(config)) if self.their_shape else tensor
        if self.unused_rows:
            tensor = torch.cat((tensor.new_zeros(self.unused_rows, *tensor.shape[1:]), tensor))
        rows = self.rows(config) if self.rows else len(tensor) // len(self.templates)
        return [part.T if self.transposed else part for part in tensor.split(rows)]


def resize_vocabulary(table: torch.Tensor, config: ModelArchitectureConfig) -> torch.Tensor:
    """An embedding, or a bias of the logits, with rows removed or added at the end, for another
    vocab_size.

    An added row is the mean of the others, so its logit is their mean: by Jensen's inequality, k
    of them cost at most ln(1 + k / V) nats. A row of zeros can be far more likely than all others.
    """
    missing = config.vocab_size - len(table)
    if missing <= 0:
        return table[: config.vocab_size]
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat((table, mean.expand(missing, *table.shape[1:])))


def crop_positions(table: torch.Tensor, config: ModelArchitectureConfig) -> torch.Tensor:
    """The first block_size positions."""
    return table[: config.block_size]


def scale_rows(tensor: torch.Tensor, factors: torch.Tensor | float) -> torch.Tensor:
    """The tensor with its rows multiplied, in fp32. factors: of each row, or of all."""
    if not isinstance(factors, torch.Tensor):
        return tensor if factors == 1 else tensor.float() * factors
    return tensor.float() * factors.view(-1, *[1] * (tensor.dim() - 1))


def tensor(template: str, **details: Any) -> TensorMap:
    """A map from one tensor to one parameter."""
    return TensorMap((template,), **details)


def with_biases(weights: dict[str, TensorMap]) -> dict[str, TensorMap]:
    """The maps of the weights, and for each `….weight` one of its `….bias`."""

    def bias(name: str) -> str:
        return name.removesuffix('weight') + 'bias'

    biases = {
        bias(ours): TensorMap(tuple(map(bias, w.templates)), rows=w.rows, row_order=w.row_order)
        for ours, w in weights.items()
    }
    return weights | biases
