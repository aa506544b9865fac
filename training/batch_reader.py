"""Reads the batches of training by their number, for a GPU ahead of their use."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch


class HostBatch(NamedTuple):
    """A batch in host memory."""

    tensors: list[torch.Tensor]  # tokens and targets
    digest: int  # of the sequences


class BatchReader:
    """Reads a batch when it is asked for; on CUDA a thread has read it while the last one was used.

    Slow files, such as those of a network, then do not keep the device waiting. On a CPU the thread
    would only compete with training for the cores.
    """

    def __init__(self, read: Callable[[int], HostBatch], step: int, device: torch.device):
        """read: returns the batch of a number; step: from one number to the next."""
        self.read, self.step = read, step
        self.thread: ThreadPoolExecutor | None = None
        if device.type == 'cuda':
            # Each thread has its own current device, at first cuda:0.
            choose_device = partial(torch.cuda.set_device, device)
            self.thread = ThreadPoolExecutor(1, 'reader', initializer=choose_device)
        self.number: int | None = None  # of the batch that is read ahead
        self.task: Future[HostBatch] | None = None

    def __call__(self, number: int) -> HostBatch:
        """Batch `number`. Raises what reading it raises."""
        if self.thread is None:
            return self.read(number)
        # A rollback changes the number: what was read ahead is not used.
        task = self.task if number == self.number else self.thread.submit(self.read, number)
        assert task is not None
        self.number = number + self.step
        self.task = self.thread.submit(self.read, self.number)
        return task.result()

    def close(self) -> None:
        """End the thread, without waiting for what it reads."""
        if self.thread is not None:
            self.thread.shutdown(wait=False, cancel_futures=True)
