"""The units in which FSDP2 shards a model, and their sizes; see fully_sharded.py.

Planning needs them without FSDP2, whose import takes longer than those of all our modules.
"""

from typing import NamedTuple

import torch
import torch.nn as nn

from model_builder import Transformer
from parallel.autocast import parameters_cast_by_autocast


class ShardUnit(NamedTuple):
    """Parameters that are gathered together, by the first call of one of `modules`."""

    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    dtype: torch.dtype  # in which they are gathered, and have gradients before the reduction
    # Whether they are freed after the forward pass, and gathered again in the backward pass.
    freed: bool = False
    gathered_again: bool = False

    def elements(self, ranks: int) -> int:
        """Elements when gathered. FSDP pads each rank's rows to the largest number of rows."""
        return sum(
            ranks * rows_per_rank(p, ranks) * (p.numel() // len(p)) if len(p) else 0
            for p in self.parameters
        )


def shard_units(
    model: Transformer, param_dtype: str, reshard_after_forward: bool
) -> list[ShardUnit]:
    """The units of a model that is not sharded yet: the root's, then in the order of use."""
    cast: set[nn.Parameter] = set()
    if param_dtype == 'bfloat16':
        names = parameters_cast_by_autocast(model.config)
        cast = {p for name, p in model.named_parameters() if name in names}

    def unit(modules: list[nn.Module], freed: bool = False, gathered_again: bool = False):
        """The unit of the modules, in bfloat16 if that is the dtype of most of the elements."""
        all_parameters = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        in_cast = [p for p in all_parameters if p in cast]
        if 2 * _elements(in_cast) > _elements(all_parameters):
            return ShardUnit(modules, in_cast, torch.bfloat16, freed, gathered_again)
        return ShardUnit(modules, all_parameters, torch.float32, freed, gathered_again)

    embedding, final_norm, head = model.token_embedding, model.final_norm, model.output_head
    # The last block is needed first in the backward pass: to free it would save nothing.
    *blocks, last = model.blocks
    again = reshard_after_forward
    units = [unit([block], again, again) for block in blocks] + [unit([last])]
    if model.config.weight_tying:
        units.insert(0, unit([embedding, head]))
    else:
        # The gradient of a lookup does not depend on the table.
        units.insert(0, unit([embedding], freed=True))
        units.append(unit([final_norm, head] if head.projection.weight not in cast else [head]))
    in_units = {parameter for unit in units for parameter in unit.parameters}
    others = [parameter for parameter in model.parameters() if parameter not in in_units]
    return [ShardUnit([model], others, torch.float32), *units]


def _elements(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def rows_per_rank(parameter: torch.Tensor, ranks: int) -> int:
    """Rows per shard in FSDP2, which splits the first dimension; the last may have fewer."""
    return -(-len(parameter) // ranks)
