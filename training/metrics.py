"""Metrics of a run besides its losses: auxiliary metrics, FLOPs, memory, update ratio."""

from dataclasses import dataclass, field

import torch

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


@dataclass
class RunMetrics:
    """FLOPs and peak for the throughput, and the metrics that are collected during training."""

    flops_per_token: FlopsInfo
    peak: Peak
    update_ratio: UpdateRatio
    aux: MetricAccumulator = field(default_factory=MetricAccumulator)  # since the last log entry
    memory_footprint: MemoryFootprint | None = None  # bytes per rank; None: not yet measured
    retries_reported: bool = False  # whether an event has told of retries of the allocator
