"""Metrics of a run besides its losses: auxiliary metrics, FLOPs, memory, update ratio."""

from dataclasses import dataclass, field

import torch
import torch.nn as nn

from common.gpu_specs import Peak
from parallel.process_group import SingleProcessGroup
from records.record_types import FlopsInfo, MemoryFootprint
from training.diagnostics import UpdateRatio


class MetricAccumulator:
    """Sums of the components' auxiliary metrics over micro-batches. They stay on the device, so
    that adding to them does not synchronize."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget the sums."""
        self.sums: dict[str, torch.Tensor] = {}
        self.micro_batches = 0

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """Add the metrics of one micro-batch; names and shapes are the same each time."""
        self.micro_batches += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def mean_and_reset(self, process_group: SingleProcessGroup) -> dict[str, torch.Tensor]:
        """Means over the micro-batches of all ranks (equally many per rank). Resets the sums."""
        sums, micro_batches = self.sums, self.micro_batches * process_group.world_size
        self.reset()
        if not sums:
            return {}
        # One collective for all metrics: concatenate, reduce, split.
        flat = torch.cat([value.flatten() for value in sums.values()])
        means = process_group.all_reduce_sum(flat) / micro_batches
        parts = means.split([value.numel() for value in sums.values()])
        return {name: part.view_as(sums[name]) for name, part in zip(sums, parts)}


class CountAccumulator:
    """Sums of the components' counts over the micro-batches of an iteration. They stay on the
    device."""

    def __init__(self):
        self.sums: dict[int, torch.Tensor] = {}  # number of the block -> (n,)

    def add(self, counts: tuple[torch.Tensor | None, ...]) -> None:
        """Add the counts of one micro-batch, an entry for each block."""
        for number, value in enumerate(counts):
            if value is not None:
                value = value.long()
                self.sums[number] = self.sums[number] + value if number in self.sums else value

    def pass_on(
        self, blocks: nn.ModuleList, process_group: SingleProcessGroup, skipped: torch.Tensor
    ) -> None:
        """Call `after_update` of the FFNs with the sums over all ranks, and reset them.

        skipped: a device scalar, whether the update was skipped: then the counts are zeros.
        """
        sums, self.sums = self.sums, {}
        if not sums:
            return
        totals = process_group.all_reduce_sum(torch.cat(list(sums.values())))
        totals = totals.masked_fill(skipped, 0)
        for number, part in zip(sums, totals.split([len(value) for value in sums.values()])):
            blocks[number].ffn.after_update(part)


@dataclass
class RunMetrics:
    """FLOPs and peak for the throughput, and the metrics that are collected during training."""

    flops_per_token: FlopsInfo
    peak: Peak
    update_ratio: UpdateRatio
    aux: MetricAccumulator = field(default_factory=MetricAccumulator)  # since the last log entry
    counts: CountAccumulator = field(default_factory=CountAccumulator)  # of this iteration
    memory_footprint: MemoryFootprint | None = None  # bytes per rank; None: not yet measured
    retries_reported: bool = False  # whether an event has told of retries of the allocator
