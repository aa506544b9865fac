"""What a run consists of, once it is set up, and what follows from that."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from common import hardware
from common.gpu_specs import Peak
from data import dataset as token_data
from data.dataset import TokenDataset
from data.order import EpochOrder, RandomOrder
from inference.sampling import OwnSample
from model_builder import Transformer
from model_components import IGNORED
from optim.optimizers import local
from optim.step import Updater
from parallel.strategies import SingleProcess
from training import diagnostics, resumption
from training.checkpoint_writer import Saver
from training.metrics import Readings
from training.signals import Interruption
from training_config import Settings
from training_logger import TrainingLogger


@dataclass
class Session:
    """What a run consists of, once it is set up."""

    settings: Settings
    parallel: SingleProcess
    device: torch.device
    dataset: TokenDataset
    raw_model: Transformer
    model: torch.nn.Module  # the same, as it is called in training
    updater: Updater
    logger: TrainingLogger
    progress: resumption.Progress
    flops_per_token: dict
    peak: Peak
    update_size: diagnostics.UpdateSize
    interruption: Interruption
    saver: Saver
    own_sample: OwnSample | None
    surroundings: dict  # threads, versions and the like, to be compared on a resume
    held: dict[str, int] | None = None  # bytes on a rank, once they are measured
    readings: Readings = field(default_factory=Readings)  # since the last logged update

    @property
    def tokens_per_iter(self) -> int:
        run, block_size = self.settings.run, self.settings.architecture.block_size
        return run.batch_size * run.gradient_accumulation_steps * block_size

    @cached_property
    def order(self) -> RandomOrder | EpochOrder:
        """In which the windows of the training split are read."""
        return self.dataset.order(self.settings.run.sampling, self.settings.run.data_seed)

    def training_batch(self, number: int) -> list[torch.Tensor]:
        """Micro-batch `number` of the run, (tokens, targets), on the device; noted as seen."""
        run, progress = self.settings.run, self.progress
        first = number * run.batch_size
        tokens, targets = self.dataset.batch(self.order, first, run.batch_size)
        progress.own_digest = (progress.own_digest + token_data.digest(first, tokens)) % 2**64
        return self.to_device((tokens, targets))

    def agree_on_data(self) -> str:
        """What all ranks have trained on since the start, as 16 hex digits."""
        progress = self.progress
        new = sum(self.parallel.gather(progress.own_digest))
        progress.data_digest, progress.own_digest = (progress.data_digest + new) % 2**64, 0
        return f'{progress.data_digest:016x}'

    def seen(self) -> dict[str, float | int | None]:
        """How much of the training split the updates so far have seen, and how often.

        None where the numbers of the sequences are not simply those from 0 on.
        """
        progress, block_size = self.progress, self.settings.architecture.block_size
        tokens, counted = progress.tokens, progress.one_order and progress.data_shift == 0
        return {
            'tokens_seen': tokens,
            'epochs': tokens / self.order.tokens_per_epoch if progress.one_order else None,
            'unique_tokens': self.order.unique_tokens(tokens // block_size) if counted else None,
        }

    def utilization(self, tokens_per_second: float) -> dict[str, float | str | None]:
        """FLOP/s of all ranks, and their share of the peak; None where that is not known."""
        flops = self.flops_per_token
        peak = self.peak.tflops and self.peak.tflops * self.parallel.world_size
        achieved, causal, recomputed = (
            tokens_per_second * flops[key] / 1e12
            for key in ('per_token', 'per_token_causal', 'recomputed_per_token')
        )
        return {
            'mfu_percent': peak and 100 * achieved / peak,
            'mfu_causal_percent': peak and 100 * causal / peak,
            'hfu_percent': peak and 100 * (achieved + recomputed) / peak,
            'achieved_tflops': achieved,
            'hardware_peak_tflops': peak,
            'flops_per_token': flops['per_token'],
            'architecture': self.settings.architecture.name,
        }

    def checkpoint_index(self) -> dict:
        """What a checkpoint of this moment says of itself."""
        index = resumption.checkpoint_index(
            self.settings, self.progress, self.surroundings, self.dataset
        )
        return {**index, 'seen': self.seen()}

    def evaluation_due(self, iter: int) -> bool:
        """Whether the loss is measured after `iter` updates: at intervals, and at the end."""
        return iter % self.settings.run.eval_interval == 0 or iter >= self.settings.run.max_iters

    def sample_due(self, iter: int) -> bool:
        """Whether the evaluation after `iter` updates writes text too: at intervals, at the end."""
        run = self.settings.run
        at_the_end = iter >= run.max_iters
        return self.own_sample is not None and (at_the_end or iter % run.sample_interval == 0)

    def write_sample(self) -> dict:
        """The run's own sample as the record has it."""
        with self.autocast():
            return self.own_sample.write(self.raw_model)

    def evaluation_batches(
        self, split: str, *, divided: bool = True
    ) -> Iterator[list[torch.Tensor]]:
        """The fixed windows of a split, (tokens, targets) of `batch_size` at a time.

        divided: among the ranks; else every rank gets all of them.
        """
        options = self.settings.run
        starts = self.dataset.windows(split, options.eval_iters)
        # Every rank takes part in as many forward passes as the others: what is left over at the
        # end is read by several and counted by one.
        ranks, rank = (self.parallel.world_size, self.parallel.rank) if divided else (1, 0)
        numbers = np.arange(rank, -(-len(starts) // ranks) * ranks, ranks)
        for first in range(0, len(numbers), options.batch_size):
            chosen = numbers[first : first + options.batch_size]
            tokens, targets = self.dataset.read(split, starts[chosen % len(starts)])
            targets[chosen >= len(starts)] = IGNORED
            yield self.to_device((tokens, targets))

    def to_device(self, arrays) -> list[torch.Tensor]:
        """numpy arrays as tensors on the device; the copy to a GPU does not wait."""
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.device.type == 'cuda':
            return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
        return [tensor.to(self.device) for tensor in tensors]

    def autocast(self):
        """The precision of the matrix multiplications; parameters and losses stay in fp32."""
        return hardware.autocast(self.device, self.settings.run.dtype)

    def record_held(self) -> None:
        """Record, once in a process, what a rank holds after an update: the largest over the ranks.

        In bytes, of the tensors themselves; what is gathered for a moment is not held.
        """
        if self.held is None:
            states = self.updater.optimizer.state.values()
            held = {
                'parameter_bytes': _bytes(self.raw_model.parameters()),
                'gradient_bytes': self.updater.gradient_bytes,
                'optimizer_bytes': sum(_bytes(state.values()) for state in states),
            }
            self.held = dict(zip(held, map(int, self.parallel.largest(list(held.values())))))
            self.logger.memory_footprint(self.held)

    def largest_memory(self) -> dict[str, float | None]:
        """The memory in use, the largest over the ranks."""
        usage = hardware.memory_usage(self.device)
        known = [-1.0 if value is None else value for value in usage.values()]
        largest = self.parallel.largest(known)
        return {key: None if value < 0 else value for key, value in zip(usage, largest)}


def _bytes(values: Iterable) -> int:
    """The bytes of the tensors among them, of divided ones what this rank holds."""
    return sum(local(value).nbytes for value in values if isinstance(value, torch.Tensor))
