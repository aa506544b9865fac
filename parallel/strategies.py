"""Parallel training strategies: one interface, four implementations.

`SingleProcess` is the reference, whose results all others reproduce: `DataParallel` (DDP), `ZeRO1`
(DDP with a sharded optimizer state) and `FullySharded` (FSDP2, `parallel.fully_sharded`). torchrun
starts the processes; `parallel.choice` reads the options `use_zero1` and `use_fsdp`. Model code is
written for one device, and `train.py` uses only this interface. All ranks must call each method
that communicates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from components.base import saved_buffers
from model_builder import (
    ParameterGroup,
    Transformer,
    build_model,
    recompute,
)
from model_config import ModelArchitectureConfig
from optim.optimizers import complete_optimizer
from parallel.matrix_exchange import LocalMatrices, MatrixExchange
from parallel.process_group import MultiProcessGroup, SingleProcessGroup, init_process_group
from training_config import OPTIMIZER_REGISTRY, TrainingConfig


class ParamShard(NamedTuple):
    """A rank's shard of a flattened parameter: elements offset … offset + len(tensor)."""

    tensor: torch.Tensor  # 1-D, sharing the parameter's memory
    offset: int
    key: torch.Tensor  # the tensor in the optimizer's groups


class SingleProcess(SingleProcessGroup):
    """One process, one device."""

    name = 'single'
    converts = False  # whether parameters are converted to bfloat16 before they are used

    def __init__(self, run: TrainingConfig, device: torch.device):
        self.run, self.device = run, device

    # --- The model ---

    def build(
        self, config: ModelArchitectureConfig, recomputed: list[int], compiled: bool
    ) -> tuple[Transformer, nn.Module]:
        """The initialized model, and the module to call in training.

        Sets up recomputation of the given blocks, compiles each block, then wraps the model.
        """
        model = build_model(config, self.device, self.run.seed)
        prepare_blocks(model, recomputed, compiled)
        return model, self.wrap(model)

    def wrap(self, model: Transformer) -> nn.Module:
        return model

    def build_optimizer(
        self, groups: list[ParameterGroup], run: TrainingConfig
    ) -> torch.optim.Optimizer:
        """The optimizer of `run`, whose options must be resolved."""
        return complete_optimizer(OPTIMIZER_REGISTRY[run.optimizer](groups, run, self), groups)

    def shard(self, parameter: nn.Parameter) -> ParamShard:
        """The shard of a parameter that this rank's optimizer updates."""
        return local_shard(parameter)

    def matrix_exchange(self, matrices: list[nn.Parameter], dtype: torch.dtype) -> LocalMatrices:
        """The exchange for whole matrices; `dtype` is that of the updated matrices."""
        return LocalMatrices()

    # --- One iteration ---

    frees_gradients = True  # between iterations, rather than to keep zeros

    def clear_gradients(self, owner: nn.Module | torch.optim.Optimizer) -> None:
        """Free the gradients of the parameters of a module or an optimizer, or set them to zero."""
        owner.zero_grad(set_to_none=self.frees_gradients)

    @contextmanager
    def micro_step(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Context of a forward and backward pass; only the last one reduces gradients."""
        yield

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The 2-norm of the whole gradient, from this rank's shards."""
        return torch.nn.utils.get_total_norm(gradients)

    def sum_over_shards(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over all elements of the gradient, from the sum over this rank's shards."""
        return part

    def bytes_sent(self, model: Transformer, micro_steps: int) -> float:
        """Bytes of parameters and gradients that a rank sends per iteration.

        For ring algorithms (Patarasuk & Yuan 2009), as in the bus bandwidth of nccl-tests:
        all-gather and reduce-scatter over n ranks send (n - 1) / n of the data, all-reduce twice
        that.
        """
        return 0.0

    # --- Checkpoints ---

    def weight_shards(self, model: Transformer) -> dict[str, ParamShard]:
        """This rank's shard of each parameter, by name; tied parameters once."""
        return local_weights(model)

    def optimizer_shards(self, model: Transformer) -> dict[str, ParamShard]:
        """The shard of each parameter that this rank's optimizer updates, by name."""
        return self.weight_shards(model)

    @property
    def saves(self) -> tuple[bool, bool]:
        """Whether this rank saves its weights, and whether it saves its optimizer state."""
        return True, True


class DataParallel(MultiProcessGroup, SingleProcess):
    """Each rank has the whole model and processes its part of the batch (Li et al. 2020)."""

    name = 'ddp'
    frees_gradients = False  # they are views of DDP's buckets, which always exist

    def __init__(self, run: TrainingConfig, device: torch.device):
        timeout = timedelta(seconds=run.distributed_timeout)
        MultiProcessGroup.__init__(self, *init_process_group(device, timeout))
        SingleProcess.__init__(self, run, device)

    def wrap(self, model: Transformer) -> nn.Module:
        wrapped = DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == 'cuda' else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # they are equal on all ranks
        )
        wrapped.register_comm_hook(getattr(torch, self.run.reduce_dtype), _sum_hook)
        _place_gradients_in_buckets(wrapped)
        return wrapped

    matrix_group: dist.ProcessGroup | None = None  # ranks between which matrices are exchanged

    def matrix_exchange(self, matrices: list[nn.Parameter], dtype: torch.dtype) -> LocalMatrices:
        shards = map(self.shard, matrices)
        shard_ranges = [(shard.offset, shard.offset + len(shard.tensor)) for shard in shards]
        sizes = [parameter.numel() for parameter in matrices]
        return MatrixExchange(sizes, shard_ranges, dtype, self.device, self.matrix_group)

    @contextmanager
    def micro_step(self, model: Any, last: bool) -> Iterator[None]:
        model.require_backward_grad_sync = last  # read by the forward pass
        yield

    def bytes_sent(self, model: Transformer, micro_steps: int) -> float:
        size = getattr(torch, self.run.reduce_dtype).itemsize
        elements = sum(parameter.numel() for parameter in model.parameters())
        return 2 * ring_bytes(size * elements, self.world_size)

    @property
    def saves(self) -> tuple[bool, bool]:
        return self.is_main, self.is_main


def _place_gradients_in_buckets(wrapped: DistributedDataParallel) -> None:
    """Make each gradient a view of a bucket, before the first iteration.

    DDP does so only when it reduces them. Until then, gradients that accumulate over micro-steps
    would take as much memory again, and a copy.
    """
    parameters = [p for p in wrapped.module.parameters() if p.requires_grad]
    # A backward pass without a model, whose gradients are zero; the last parameter comes first.
    wrapped.reducer.prepare_for_forward()
    wrapped.reducer.prepare_for_backward([])
    torch.autograd.backward(
        [parameter.view_as(parameter) for parameter in parameters],
        [parameter.new_zeros(()).expand_as(parameter) for parameter in parameters],
    )


def _sum_hook(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: the sum over the ranks, communicated in `dtype`.

    Not the mean, for which each part of the loss would have to be multiplied by the world size, so
    that it would overflow earlier with the fp16 scaler.
    """
    buffer = bucket.buffer()
    total = buffer.to(dtype)
    future = dist.all_reduce(total, async_op=True).get_future()
    return future.then(lambda _: buffer.copy_(total))


ALIGNMENT = 128  # bytes, of the parameters in ZeRO-1's buffer


class ZeRO1(DataParallel):
    """DDP with the optimizer state sharded over the ranks (Rajbhandari et al. 2020, stage 1).

    The parameters are views of one flat buffer. Each rank updates a shard of equal size, whose
    limits may be inside a parameter, and the shards are gathered in place.

    Not torch.distributed.optim.ZeroRedundancyOptimizer: it assigns whole parameters to ranks, which
    get shards of different size, and supports neither optimizers with their own communication
    (Muon) nor steps that are skipped on the device.
    """

    name = 'zero1'

    def wrap(self, model: Transformer) -> nn.Module:
        parameters = list(model.parameters())
        # Every parameter begins at a multiple of ALIGNMENT, as with an allocation of its own:
        # blocks share one compiled graph, which relies on the alignment of the first block's.
        elements = sum(aligned_elements(p.numel()) for p in parameters)
        self.shard_size = aligned_elements(-(-elements // self.world_size))
        self.shard_begin = self.rank * self.shard_size
        self.flat = torch.zeros(self.shard_size * self.world_size, device=self.device)
        self.shards: dict[nn.Parameter, ParamShard] = {}
        at = 0
        for parameter in parameters:
            # Move the parameter into the buffer.
            size = parameter.numel()
            view = self.flat[at : at + size].view_as(parameter)
            view.copy_(parameter.data)
            parameter.data = view
            # This rank's optimizer has the part of the parameter in its shard.
            low = min(max(at, self.shard_begin), at + size)
            high = max(low, min(at + size, self.shard_begin + self.shard_size))
            part = self.flat[low:high]  # may be empty
            self.shards[parameter] = ParamShard(part, low - at, nn.Parameter(part))
            at += aligned_elements(size)
        return super().wrap(model)

    def build_optimizer(
        self, groups: list[ParameterGroup], run: TrainingConfig
    ) -> torch.optim.Optimizer:
        return _ShardedOptimizer(super().build_optimizer(groups, run), self)

    def shard(self, parameter: nn.Parameter) -> ParamShard:
        return self.shards[parameter]

    def all_gather_params(self) -> None:
        """Gather the parameter shards of all ranks on every rank."""
        shard = self.flat[self.shard_begin : self.shard_begin + self.shard_size].clone()
        dist.all_gather_single(self.flat, shard)

    def bytes_sent(self, model: Transformer, micro_steps: int) -> float:
        gathered = ring_bytes(self.flat.nbytes, self.world_size)
        return super().bytes_sent(model, micro_steps) + gathered

    def optimizer_shards(self, model: Transformer) -> dict[str, ParamShard]:
        return {name: self.shards[p] for name, p in model.named_parameters()}

    @property
    def saves(self) -> tuple[bool, bool]:
        return self.is_main, True


class _ShardedOptimizer(torch.optim.Optimizer):
    """The optimizer of this rank's shard, with the interface of one for all parameters."""

    found_inf: torch.Tensor | None = None

    def __init__(self, inner: torch.optim.Optimizer, parallel: ZeRO1):
        parameters = {shard.key: parameter for parameter, shard in parallel.shards.items()}
        groups = [
            {**group, 'params': [parameters[key] for key in group['params']]}
            for group in inner.param_groups
        ]
        super().__init__(groups, {})
        self.inner, self.parallel = inner, parallel
        self.state, self.state_keys = inner.state, inner.state_keys
        self.bytes_sent = inner.bytes_sent

    def step(self) -> None:
        # Pass on this rank's shard of the gradients, the learning rates and `found_inf`.
        for parameter, shard in self.parallel.shards.items():
            end = shard.offset + len(shard.tensor)
            shard.key.grad = parameter.grad.view(-1)[shard.offset : end]
        for group, inner in zip(self.param_groups, self.inner.param_groups):
            inner['lr'] = group['lr']
        self.inner.found_inf = self.found_inf
        # Update this rank's shard, then gather those of all ranks.
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        self.parallel.all_gather_params()


def aligned_elements(elements: int) -> int:
    """The number of fp32 elements, rounded up to whole units of ALIGNMENT bytes."""
    unit = ALIGNMENT // 4
    return -(-elements // unit) * unit


def ring_bytes(whole: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-gather or reduce-scatter of `whole` bytes."""
    return (ranks - 1) / ranks * whole


# Recompilations of blocks, in all and per kind of layers. A user's component may have more graphs.
RECOMPILE_LIMIT, RECOMPILE_LIMIT_OF_KIND = 64, 4


def prepare_blocks(model: Transformer, recomputed: list[int], compiled: bool) -> None:
    """Make the blocks `recomputed` recompute their activations, then compile the blocks, and on a
    CUDA device the loss."""
    for number in recomputed:
        recompute(model.blocks[number])
    if not compiled:
        return
    # DDP's compiler pass would split each block at bucket limits, although blocks are compiled
    # one by one and gradients are reduced between them.
    torch._dynamo.config.optimize_ddp = False
    model.output_head.compiled = True
    limit = max(RECOMPILE_LIMIT, RECOMPILE_LIMIT_OF_KIND * len(model.config.kinds))
    for block in model.blocks:
        # Identical blocks share one graph, for training and for evaluation. All batches have one
        # shape, so no dynamic shapes are needed. The limit counts the graphs of all kinds.
        block.compile(dynamic=False, recompile_limit=limit)


def local_weights(model: Transformer) -> dict[str, ParamShard]:
    """The shard of each parameter, which this rank has whole, by name; tied parameters once."""
    return {name: local_shard(parameter) for name, parameter in model.named_parameters()}


def buffer_shards(model: Transformer) -> dict[str, ParamShard]:
    """The buffers that checkpoints contain, which every rank has whole, by name."""
    return {name: local_shard(buffer) for name, buffer in saved_buffers(model).items()}


def local_shard(parameter: torch.Tensor) -> ParamShard:
    """The shard of a parameter or buffer that this rank has whole."""
    return ParamShard(parameter.detach().view(-1), 0, parameter)


def recomputed_blocks(activation_checkpointing: str, n_layer: int) -> list[int]:
    """Indices of the blocks to recompute for 'none', 'full' or 'N' (every N-th)."""
    if activation_checkpointing == 'none':
        return []
    every = 1 if activation_checkpointing == 'full' else int(activation_checkpointing)
    return list(range(every - 1, n_layer, every))
