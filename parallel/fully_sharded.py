"""The strategy that shards parameters, gradients and optimizer state (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common.tensors import local_tensor
from components.weight_initialization import initial_values, initialize_buffers, name_seed
from model_builder import Transformer, build_model
from model_config import ModelArchitectureConfig
from parallel.process_group import tensor_timeout
from parallel.strategies import DataParallel, ParamShard, prepare_blocks, ring_bytes
from training_config import TrainingConfig


class FullySharded(DataParallel):
    """Parameters, gradients and optimizer state sharded, gathered block by block (FSDP2).

    With `fsdp_shard_size`, they are sharded over groups of that many ranks and replicated across
    groups (HSDP).
    """

    name = 'fsdp'
    frees_gradients = True

    def __init__(self, run: TrainingConfig, device: torch.device):
        super().__init__(run, device)
        size = run.fsdp_shard_size or self.world_size
        shape = (size,) if size == self.world_size else (self.world_size // size, size)
        names = ('replicate', 'shard')[-len(shape) :]
        self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        self.shard_group = self.matrix_group = self.mesh.get_group('shard')
        if self.mesh.ndim > 1:  # torch gives the groups of a mesh a timeout of its own
            timeout = tensor_timeout(device, timedelta(seconds=run.distributed_timeout))
            for group in self.mesh.get_all_groups():
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    def build(
        self, config: ModelArchitectureConfig, recomputed: list[int], compiled: bool
    ) -> tuple[Transformer, nn.Module]:
        model = build_model(config)  # on the meta device: no rank has the whole model
        prepare_blocks(model, recomputed, compiled)
        reduce_dtype = getattr(torch, self.run.reduce_dtype)
        shard_module = partial(
            fully_shard,
            mesh=self.mesh,
            reshard_after_forward=self.run.fsdp_reshard_after_forward,
            # Parameters are gathered in fp32 and cast by autocast, as in the other strategies.
            mp_policy=MixedPrecisionPolicy(reduce_dtype=reduce_dtype),
        )
        for block in model.blocks:
            shard_module(block)
        shard_module(model)  # embedding and head, which may be tied, are in the root's group
        for module in _fsdp_modules(model):  # gradients are summed, as with DDP
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        model.to_empty(device=self.device)
        model.tie_weights()
        self.initialize(model)
        return model, model

    @torch.no_grad()
    def initialize(self, model: Transformer) -> None:
        """Initialize one parameter at a time, each from its own generator, as in one process."""
        initialize_buffers(model)
        values = initial_values(model)
        for name, parameter in model.named_parameters():
            whole = torch.empty(parameter.shape)
            values[name](whole, torch.Generator().manual_seed(name_seed(self.run.seed, name)))
            shard, begin = local_tensor(parameter).view(-1), shard_offset(parameter)
            shard.copy_(whole.view(-1)[begin : begin + len(shard)])

    @contextmanager
    def micro_step(self, model: Any, last: bool) -> Iterator[None]:
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        yield

    def shard(self, parameter: nn.Parameter) -> ParamShard:
        return ParamShard(local_tensor(parameter).view(-1), shard_offset(parameter), parameter)

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return self.sum_over_shards(super().norm(gradients).square()).sqrt()

    def sum_over_shards(self, part: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(part, group=self.shard_group)
        return part

    def bytes_sent(self, model: Transformer, micro_steps: int) -> float:
        ranks = self.mesh.size(self.mesh.ndim - 1)
        # FSDP pads the rows of each rank to the largest number of rows.
        elements = sum(
            ranks * rows_per_rank(p) * (p.numel() // p.shape[0]) for p in model.parameters()
        )
        gathers = micro_steps * (2 if self.run.fsdp_reshard_after_forward else 1)
        gradients = getattr(torch, self.run.reduce_dtype).itemsize * elements
        return (
            gathers * ring_bytes(4 * elements, ranks)
            + ring_bytes(gradients, ranks)
            + 2 * ring_bytes(gradients / ranks, self.world_size // ranks)  # between the replicas
        )

    def weight_shards(self, model: Transformer) -> dict[str, ParamShard]:
        # Without fsdp_reshard_after_forward, an evaluation leaves gathered parameters behind.
        for module in _fsdp_modules(model):
            module.reshard()
        return {name: self.shard(parameter) for name, parameter in model.named_parameters()}

    @property
    def saves(self) -> tuple[bool, bool]:
        first_replica = self.mesh.ndim == 1 or self.mesh.get_local_rank('replicate') == 0
        return first_replica, first_replica


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def shard_offset(parameter: DTensor) -> int:
    """The first element of this rank's shard in the flattened parameter."""
    mesh = parameter.device_mesh
    rank, rows = mesh.get_local_rank(mesh.ndim - 1), rows_per_rank(parameter)
    return min(rank * rows, parameter.shape[0]) * (parameter.numel() // parameter.shape[0])


def rows_per_rank(parameter: DTensor) -> int:
    """Rows per shard in FSDP2, which splits the first dimension; the last may have fewer."""
    mesh = parameter.device_mesh
    return -(-parameter.shape[0] // mesh.size(mesh.ndim - 1))
