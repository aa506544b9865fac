"""The strategy that shards parameters, gradients and optimizer state (FSDP2).

The parameters are sharded in units, each of which is gathered by one all-gather in one dtype:

    root          everything that no other unit has, in fp32: gains, routers, positions
    embedding     with the output head if they are tied
    each block
    output head   with the final norm if both are gathered in fp32

With fsdp_param_dtype=bfloat16, the parameters that autocast would convert are converted before the
all-gather, so that no copy of them is kept for the backward pass; the others stay in fp32, and so
do shards, gradient sums and optimizer state. FSDP2 reduces the gradients of a unit in one
reduce-scatter and refuses mixed dtypes; hence the fp32 parameters of all blocks are in the root's
unit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
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
from parallel.shard_units import ShardUnit, rows_per_rank, shard_units
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
        self.units = shard_units(
            model, self.run.fsdp_param_dtype, self.run.fsdp_reshard_after_forward
        )
        for unit in self.units:  # the root first, since it has parameters inside the others
            self.shard_unit(model, unit)
        for module in _fsdp_modules(model):  # gradients are summed, as with DDP
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        model.to_empty(device=self.device)
        model.tie_weights()
        self.initialize(model)
        return model, model

    def shard_unit(self, model: Transformer, unit: ShardUnit) -> None:
        others = set(model.parameters()) - set(unit.parameters)
        sharded = fully_shard(
            unit.modules if len(unit.modules) > 1 else unit.modules[0],
            mesh=self.mesh,
            reshard_after_forward=unit.freed,
            # Activations keep their dtype; parameters in fp32 are cast by autocast.
            mp_policy=MixedPrecisionPolicy(
                param_dtype=unit.dtype,
                reduce_dtype=getattr(torch, self.run.reduce_dtype),
                cast_forward_inputs=False,
            ),
            ignored_params=others,
        )
        if unit.freed and not unit.gathered_again:
            sharded.set_unshard_in_backward(False)
            # By default FSDP2 would gather ahead what came before it in the forward pass: the last
            # unit of the previous micro-step.
            sharded.set_modules_to_backward_prefetch([sharded])

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
        reduces = last or self.run.fsdp_reduce_every_micro_step
        model.set_requires_gradient_sync(reduces)
        # Between replicas only sums travel; those in bfloat16 would lose bits as they accumulate.
        model.set_requires_all_reduce(last or (reduces and self.run.reduce_dtype != 'float32'))
        model.set_is_last_backward(reduces)  # which frees the last buffer of the reduction
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
        reduced = getattr(torch, self.run.reduce_dtype).itemsize
        reductions = micro_steps if self.run.fsdp_reduce_every_micro_step else 1
        between_replicas = 1 if self.run.reduce_dtype == 'float32' else reductions
        total = 0.0
        for unit in self.units:
            elements = unit.elements(ranks)
            gathers = micro_steps * (2 if unit.gathered_again else 1)
            total += gathers * ring_bytes(unit.dtype.itemsize * elements, ranks)
            total += reductions * ring_bytes(reduced * elements, ranks)
            replicas = self.world_size // ranks
            total += between_replicas * 2 * ring_bytes(reduced * elements / ranks, replicas)
        return total

    def weight_shards(self, model: Transformer) -> dict[str, ParamShard]:
        # Without fsdp_reshard_after_forward, an evaluation leaves gathered parameters behind.
        for module in _fsdp_modules(model):
            module.reshard()
        return {name: self.shard(parameter) for name, parameter in model.named_parameters()}

    @property
    def converts(self) -> bool:  # type: ignore[override]
        return self.run.fsdp_param_dtype == 'bfloat16'

    @property
    def saves(self) -> tuple[bool, bool]:
        first_replica = self.mesh.ndim == 1 or self.mesh.get_local_rank('replicate') == 0
        return first_replica, first_replica


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def shard_offset(parameter: DTensor) -> int:
    """The first element of this rank's shard in the flattened parameter."""
    mesh = parameter.device_mesh
    last = mesh.ndim - 1
    rank, rows = mesh.get_local_rank(last), rows_per_rank(parameter, mesh.size(last))
    return min(rank * rows, parameter.shape[0]) * (parameter.numel() // parameter.shape[0])
