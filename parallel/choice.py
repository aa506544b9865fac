"""The choice of a strategy by the options of a run."""

import os

import torch

from common.environment import world_size
from common.errors import UserError
from parallel.strategies import DataParallel, SingleProcess, ZeRO1
from training_config import TrainingConfig


def choose_strategy(run: TrainingConfig, device: torch.device) -> SingleProcess:
    """The strategy that the options choose, for the processes started by torchrun."""
    flag = 'use_fsdp' if run.use_fsdp else 'use_zero1' if run.use_zero1 else None
    if flag and 'WORLD_SIZE' not in os.environ:
        raise UserError(
            f'{flag}=True needs processes started by torchrun. Run torchrun --standalone '
            f'--nproc_per_node=2 train.py … --{flag}=True, or set --{flag}=False.'
        )
    if run.use_fsdp:
        from parallel.fully_sharded import FullySharded  # the import of FSDP2 takes a second

        return FullySharded(run, device)
    if run.use_zero1:
        return ZeRO1(run, device)
    return DataParallel(run, device) if world_size() > 1 else SingleProcess(run, device)
