"""How a model is trained on the devices that there are: one interface, whatever the strategy.

Every method that communicates is to be called by every rank. `train.py` asks for nothing else.
"""

import os
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from errors import UserError
from model_builder import Transformer


class SingleProcess:
    """One process, one device: the reference that every other strategy must equal."""

    name = 'single'
    rank, world_size = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes records and checkpoints."""
        return self.rank == 0

    def wrap(self, model: Transformer, recomputed: list[int], compiled: bool) -> Transformer:
        """The model as it is to be called in training.

        recomputed: the blocks that keep only their input for the backward pass.
        """
        for number in recomputed:
            block = model.blocks[number]
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if compiled:
            for block in model.blocks:  # identical blocks share one graph
                block.compile()
        return model

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        return tensor


def recomputed_blocks(activation_checkpointing: str, n_layer: int) -> list[int]:
    """The blocks that 'none', 'full' or 'N', every N-th, stands for."""
    if activation_checkpointing == 'none':
        return []
    every = 1 if activation_checkpointing == 'full' else int(activation_checkpointing)
    return list(range(every - 1, n_layer, every))


def choose_strategy() -> SingleProcess:
    """The strategy of this process, from the environment that torchrun sets."""
    world_size = int(os.environ.get('WORLD_SIZE', '1'))
    if world_size > 1:
        raise UserError(
            f'WORLD_SIZE={world_size}: training on several processes is not built yet. Start one '
            f'process: python train.py …, without torchrun.'
        )
    return SingleProcess()
