"""The checkpoints of a run, one at a time, written beside the training if that is asked for.

Without `async_save` a checkpoint is written and published at once. With it, the state is copied to
host memory, a thread writes the copy while training goes on, and the checkpoint is published at an
update boundary, once every rank has written: so all that ranks tell one another stays in the main
thread, in one order. Until then the one before is the newest.
"""

import contextlib
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import torch

from common import hardware
from common.errors import UserError
from parallel import sharded_state
from parallel.process_group import Alone
from training import checkpointing
from training_logger import TrainingLogger


class _AtOnce(Executor):
    """Does what it is given while its caller waits."""

    def submit(self, function, /, *arguments) -> Future:
        done = Future()
        done.set_result(function(*arguments))
        return done


class Saver:
    """Saves a run. Every rank calls every method, at the same moments."""

    def __init__(self, run, device: torch.device, ranks: Alone, logger: TrainingLogger):
        self.run, self.device, self.ranks, self.logger = run, device, ranks, logger
        self.folder = logger.run_folder / 'checkpoints'
        self.kept = sharded_state.HostCopies(device) if run.async_save else sharded_state.live
        self.worker = ThreadPoolExecutor(1, 'saver') if run.async_save else _AtOnce()
        self.work = self.worker.submit(bool)  # what it was given last: nothing yet
        self.save: checkpointing.Save | None = None  # begun, and not yet published
        self.seconds = 0.0  # that it has taken from training

    @property
    def under_way(self) -> bool:
        """Whether a checkpoint is begun that is not yet published."""
        return self.save is not None

    @property
    def writing(self) -> bool:
        """Whether this rank has not yet written its part of it."""
        return self.under_way and not self.work.done()

    def begin(self, state: dict, index: dict, began: float) -> None:
        """Save what was collected by way of `kept`, none being under way. Raises UserError.

        began: when this began to take time from training.
        """
        self.work.result()
        hardware.synchronize(self.device)  # the copies are complete
        self.save = checkpointing.Save(self.folder, index, self.ranks)
        self.work = self.worker.submit(self.save.write, state)
        self.seconds = time.perf_counter() - began
        if not self.run.async_save:
            self.publish()

    def publish(self) -> None:
        """Publish what is under way, if anything is, and record it. Raises UserError."""
        if not self.under_way:
            return
        began, (save, self.save) = time.perf_counter(), (self.save, None)
        self.work.result()
        checkpoint = save.publish()
        if self.ranks.is_main:
            keep = self.run.keep_last, self.run.keep_best
            self.work = self.worker.submit(checkpointing.prune, checkpoint, *keep)
        self.seconds += time.perf_counter() - began
        self.logger.checkpoint(
            {
                'iter': checkpoint.iter,
                'val_loss': checkpoint.val_loss,
                **checkpoint.index['seen'],
                'path': str(checkpoint.path.relative_to(self.logger.run_folder)),
                'time_ms': self.seconds * 1e3,
                'write_ms': save.seconds * 1e3,
            }
        )

    def finish(self) -> None:
        """Publish what is under way, and wait until nothing is left to do. Raises UserError."""
        self.publish()
        self.work.result()

    def give_up(self) -> None:
        """Make the best of what is under way when the run fails.

        Alone a process can still publish it. Others may be anywhere: it is left to be removed by
        the next start.
        """
        if self.ranks.world_size == 1:
            with contextlib.suppress(UserError):  # what made the run fail is on its way to the user
                self.finish()
