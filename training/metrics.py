"""What is measured of a run beside its losses, between two logged iterations or once."""

from dataclasses import dataclass, field

import torch

from common.gpu_specs import Peak
from parallel.process_group import SingleProcessGroup
from records.record_types import FlopsInfo, MemoryFootprint
from training.diagnostics import UpdateRatio


class MetricAccumulator:
    """What components report of themselves: sums over micro-batches that stay on the
    device, so that adding to them waits for nothing."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.micro_batches = 0

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """Those of one micro-batch, the same names and shapes each time."""
        self.micro_batches += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def mean_and_reset(self, process_group: SingleProcessGroup) -> dict[str, torch.Tensor]:
        """Means over the micro-batches of all ranks, each of which saw as many; begin anew."""
        sums, micro_batches = self.sums, self.micro_batches * process_group.world_size
        self.sums, self.micro_batches = {}, 0
        if not sums:
            return {}
        # One collective for all of them: flattened side by side, and taken apart again.
        flat = torch.cat([value.flatten() for value in sums.values()])
        means = process_group.all_reduce_sum(flat) / micro_batches
        parts = means.split([value.numel() for value in sums.values()])
        return {name: part.view_as(sums[name]) for name, part in zip(sums, parts)}


@dataclass
class RunMetrics:
    """What the throughput is reckoned from, and what is measured on the way."""

    flops_per_token: FlopsInfo
    peak: Peak
    update_ratio: UpdateRatio
    aux: MetricAccumulator = field(default_factory=MetricAccumulator)  # since the last log entry
    memory_footprint: MemoryFootprint | None = None  # bytes on a rank, once they are measured
