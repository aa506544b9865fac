"""What components report of themselves in training, gathered between two logged steps."""

import torch

from parallel.process_group import Alone


class Readings:
    """Sums over micro-batches that stay on the device: adding to them waits for nothing."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.micro_batches = 0

    def add(self, readings: dict[str, torch.Tensor]) -> None:
        """Those of one micro-batch, the same names and shapes each time."""
        self.micro_batches += 1
        for name, value in readings.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take(self, ranks: Alone) -> dict[str, torch.Tensor]:
        """Means over the micro-batches of all ranks, each of which saw as many; begin anew."""
        sums, micro_batches = self.sums, self.micro_batches * ranks.world_size
        self.__init__()
        if not sums:
            return {}
        whole = ranks.sum(torch.cat([value.flatten() for value in sums.values()])) / micro_batches
        parts = whole.split([value.numel() for value in sums.values()])
        return {name: part.view_as(sums[name]) for name, part in zip(sums, parts)}
