"""The log entry of an iteration that the device may still be busy with."""

from dataclasses import dataclass

import torch

from common import hardware
from records.record_types import DataSeen, MemoryInfo


@dataclass(kw_only=True)
class Measurements:
    """What was measured in an iteration: on the host, and on the device, which may be busy."""

    iter: int
    learning_rate: float
    data_seen: DataSeen
    memory: MemoryInfo
    time: hardware.TimedSteps
    names: list[str]  # of the first values
    readings: list[str]  # names of the other values, which are readings of components
    values: hardware.HostCopy


class PendingLog:
    """The measurements that wait to be recorded.

    On CUDA those of an iteration wait until the host has queued the next one, so that the device
    does not idle while the host reads and records them. Elsewhere they are due at once.
    """

    def __init__(self, device: torch.device):
        self.deferred = device.type == 'cuda'
        self.waiting: Measurements | None = None

    def next(self, measured: Measurements | None) -> Measurements | None:
        """The measurements to record after an iteration is queued.

        measured: those of that iteration; None: it is not logged.
        """
        if not self.deferred:
            return measured
        due, self.waiting = self.waiting, measured
        return due

    def take(self) -> Measurements | None:
        """The measurements that wait, which then wait no longer."""
        due, self.waiting = self.waiting, None
        return due
