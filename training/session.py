"""Session: everything that the training loop needs (model, data, optimizer, logger, progress).

`train.py` has the order of events; this module reads batches, combines data hashes and computes
the throughput.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from common import hardware
from common.tensors import local_tensor
from data import dataset as token_data
from data.dataset import TokenDataset
from data.order import EpochOrder, RandomOrder
from inference.sampling import PeriodicSample
from model_builder import Transformer
from model_components import IGNORED
from optim.step import GuardedOptimizer
from parallel.strategies import SingleProcess
from records.record_types import DataSeen, Diagnostics, MemoryInfo, MfuInfo, Sample
from training import diagnostics
from training.batch_reader import BatchReader, HostBatch
from training.checkpoint_writer import CheckpointManager
from training.metrics import RunMetrics
from training.pending_log import PendingLog
from training.profiler import IterationProfiler
from training.resume import TrainingProgress, checkpoint_index
from training.signals import SignalHandler
from training_config import Settings
from training_logger import TrainingLogger


@dataclass(kw_only=True)
class RunContext:
    """Input of a run: settings, processes, device, dataset, and the command that started it."""

    settings: Settings
    parallel: SingleProcess  # the strategy, which is also the process group
    device: torch.device
    dataset: TokenDataset
    argv: list[str]


@dataclass(kw_only=True)
class Session(RunContext):
    """A run that is set up: its input, and the objects built from it."""

    raw_model: Transformer
    model: torch.nn.Module  # raw_model as called in training (wrapped by the strategy)
    optimizer: GuardedOptimizer
    progress: TrainingProgress
    logger: TrainingLogger
    checkpoints: CheckpointManager
    signals: SignalHandler
    metrics: RunMetrics
    pending_log: PendingLog
    profiler: IterationProfiler
    sample_writer: PeriodicSample | None
    environment: dict  # threads, versions and the like, compared when the run is resumed

    # --- Data ---

    @property
    def tokens_per_iter(self) -> int:
        run, block_size = self.settings.run, self.settings.architecture.block_size
        return run.batch_size * run.gradient_accumulation_steps * block_size

    @cached_property
    def order(self) -> RandomOrder | EpochOrder:
        """The order in which the windows of the training split are read."""
        return self.dataset.order(self.settings.run.sampling, self.settings.run.data_seed)

    def training_batch(self, number: int) -> list[torch.Tensor]:
        """Micro-batch `number` of the run: (tokens, targets) on the device. Updates the hash."""
        tensors, digest = self.batch_reader(number)
        self.progress.own_digest = (self.progress.own_digest + digest) % 2**64
        return self.to_device(tensors)

    @cached_property
    def batch_reader(self) -> BatchReader:
        """Reads the micro-batches of this rank in the order of their numbers."""
        return BatchReader(self._read_batch, self.parallel.world_size, self.device)

    def _read_batch(self, number: int) -> HostBatch:
        batch_size = self.settings.run.batch_size
        first = number * batch_size
        tokens, targets = self.dataset.batch(self.order, first, batch_size)
        digest = token_data.batch_digest(first, tokens)
        return HostBatch(self.in_host_memory((tokens, targets)), digest)

    def evaluation_batches(
        self, split: str, *, divided: bool = True
    ) -> Iterator[list[torch.Tensor]]:
        """The fixed windows of a split, in batches (tokens, targets) of `batch_size`.

        divided: each rank gets a part of the windows; otherwise every rank gets all of them.
        """
        run = self.settings.run
        starts = self.dataset.windows(split, run.eval_iters)
        # All ranks make the same number of forward passes. A last window may be read by several
        # ranks; all but one of them ignore its targets. A compiled model gets full batches only,
        # since it is compiled for their shape.
        ranks, rank = (self.parallel.world_size, self.parallel.rank) if divided else (1, 0)
        multiple = ranks * (run.batch_size if run.compile else 1)
        numbers = np.arange(rank, -(-len(starts) // multiple) * multiple, ranks)
        for first in range(0, len(numbers), run.batch_size):
            chosen = numbers[first : first + run.batch_size]
            tokens, targets = self.dataset.read(split, starts[chosen % len(starts)])
            targets[chosen >= len(starts)] = IGNORED
            yield self.to_device(self.in_host_memory((tokens, targets)))

    def in_host_memory(self, arrays: Iterable[np.ndarray]) -> list[torch.Tensor]:
        """numpy arrays as tensors, for a GPU in pinned memory."""
        tensors = [torch.from_numpy(array) for array in arrays]
        return [t.pin_memory() for t in tensors] if self.device.type == 'cuda' else tensors

    def to_device(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors of `in_host_memory` on the device; the copy to a GPU is asynchronous."""
        non_blocking = self.device.type == 'cuda'
        return [tensor.to(self.device, non_blocking=non_blocking) for tensor in tensors]

    def sync_data_hash(self) -> str:
        """The hash of all data that all ranks have trained on, as 16 hex digits."""
        progress = self.progress
        new = sum(self.parallel.all_gather_object(progress.own_digest))
        progress.data_digest, progress.own_digest = (progress.data_digest + new) % 2**64, 0
        return f'{progress.data_digest:016x}'

    def data_seen(self) -> DataSeen:
        """Tokens, epochs and distinct tokens of the training split seen so far.

        A value is None if it is unknown, since the data order has changed during the run.
        """
        progress, block_size = self.progress, self.settings.architecture.block_size
        tokens, counted = progress.tokens, progress.one_order and progress.data_shift == 0
        return {
            'tokens_seen': tokens,
            'epochs': tokens / self.order.tokens_per_epoch if progress.one_order else None,
            'unique_tokens': self.order.unique_tokens(tokens // block_size) if counted else None,
        }

    # --- Schedule ---

    def evaluation_due(self, iter: int) -> bool:
        """Whether to evaluate after `iter` iterations: at intervals, and at the end."""
        return iter % self.settings.run.eval_interval == 0 or iter >= self.settings.run.max_iters

    def sample_due(self, iter: int) -> bool:
        """Whether the evaluation after `iter` iterations also generates a sample."""
        run = self.settings.run
        at_the_end = iter >= run.max_iters
        return self.sample_writer is not None and (at_the_end or iter % run.sample_interval == 0)

    # --- Measurements ---

    def autocast(self) -> AbstractContextManager:
        """Context for the precision of matrix products; parameters and losses stay in fp32."""
        return hardware.autocast(self.device, self.settings.run.dtype)

    def mean_loss(self, split: str) -> float:
        """The mean loss over the evaluation windows of a split, over all ranks."""
        total = torch.zeros(2, device=self.device)  # summed loss, number of targets
        for batch in self.evaluation_batches(split):
            with self.autocast():
                loss_sum, count, _ = self.model(*batch)
            total += torch.stack([loss_sum, count.to(loss_sum.dtype)])
        loss_sum, count = self.parallel.all_reduce_sum(total).tolist()
        return loss_sum / count

    def write_sample(self) -> Sample:
        """The run's periodic sample, as an entry of the record."""
        assert self.sample_writer is not None
        with self.autocast():
            return self.sample_writer.write(self.raw_model)

    def measure_diagnostics(self) -> Diagnostics:
        """Diagnostics of the model's layers and of the last update, as an entry of the record."""
        tokens, targets = next(self.evaluation_batches('val', divided=False))
        return {
            'layers': diagnostics.layer_statistics(
                self.raw_model, self.model, self.parallel, tokens, targets, self.autocast
            ),
            'update_to_weight': self.metrics.update_ratio.ratios or {},
            'val_loss_by_position': diagnostics.loss_by_position(
                self.model, self.parallel, self.evaluation_batches('val'), self.autocast
            ),
        }

    def throughput(self, seconds: float) -> tuple[float, MfuInfo]:
        """Tokens per second at `seconds` per iteration, and the MFU.

        The FLOP/s are those of all ranks; the MFU is None if the peak is unknown.
        """
        tokens_per_second = self.tokens_per_iter / seconds
        flops, peak = self.metrics.flops_per_token, self.metrics.peak.tflops
        peak = peak and peak * self.parallel.world_size
        achieved = tokens_per_second * flops['per_token'] / 1e12
        causal = tokens_per_second * flops['per_token_causal'] / 1e12
        recomputed = tokens_per_second * flops['recomputed_per_token'] / 1e12
        return tokens_per_second, {
            'mfu_percent': peak and 100 * achieved / peak,
            'mfu_causal_percent': peak and 100 * causal / peak,
            'hfu_percent': peak and 100 * (achieved + recomputed) / peak,
            'achieved_tflops': achieved,
            'hardware_peak_tflops': peak,
            'flops_per_token': flops['per_token'],
            'architecture': self.settings.architecture.name,
        }

    def record_memory_footprint(self) -> None:
        """Record the memory per rank after an iteration, once in a process.

        The bytes of parameters, gradients and optimizer state, each the maximum over the ranks.
        Buffers that exist only during an iteration are not counted.
        """
        if self.metrics.memory_footprint is not None:
            return
        states = self.optimizer.inner.state.values()
        sizes: list[float] = [
            _local_bytes(self.raw_model.parameters()),
            self.optimizer.gradient_bytes,
            sum(_local_bytes(state.values()) for state in states),
        ]
        parameters, gradients, optimizer = map(int, self.parallel.all_reduce_max(sizes))
        self.metrics.memory_footprint = {
            'parameter_bytes': parameters,
            'gradient_bytes': gradients,
            'optimizer_bytes': optimizer,
        }
        self.logger.memory_footprint(self.metrics.memory_footprint)

    def memory_usage(self) -> MemoryInfo:
        """The memory in use, the maximum over the ranks."""
        usage = hardware.memory_usage(self.device)
        known = [-1.0 if value is None else value for value in usage.values()]
        largest = [None if v < 0 else v for v in self.parallel.all_reduce_max(known)]
        values = dict(zip(usage, largest))
        retries = values['allocator_retries']
        return {
            'allocated_gb': values['allocated_gb'],
            'peak_gb': values['peak_gb'],
            'reserved_gb': values['reserved_gb'],
            'reserved_peak_gb': values['reserved_peak_gb'],
            'rss_gb': values['rss_gb'],
            'allocator_retries': None if retries is None else int(retries),
        }

    def drop_measurements(self) -> None:
        """Forget what was measured since the last recorded iteration."""
        self.pending_log.take()
        self.metrics.aux.reset()
        self.optimizer.take_skipped()

    # --- Checkpoints ---

    def checkpoint_index(self) -> dict:
        """The index of a checkpoint of the current state."""
        index = checkpoint_index(self.settings, self.progress, self.environment, self.dataset)
        return {**index, 'seen': self.data_seen()}


def _local_bytes(values: Iterable) -> int:
    """The bytes of the tensors in `values`; of a sharded tensor, those of the local shard."""
    return sum(local_tensor(value).nbytes for value in values if isinstance(value, torch.Tensor))
