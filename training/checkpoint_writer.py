"""The checkpoints of a run, one at a time, written beside the training if that is asked for.

Without `async_save` a checkpoint is written and published at once. With it, the state is copied to
host memory, a thread writes the copy while training goes on, and the checkpoint is published
between two iterations, once every rank has written: so all that ranks tell one another stays in the
main thread, in one order. Until then the one before is the newest.
"""

import contextlib
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import torch

from common import hardware
from common.errors import UserError
from parallel import sharded_state
from parallel.process_group import SingleProcessGroup
from records.record_types import PartialDataSeen
from training.checkpoint import PendingCheckpoint, prune
from training_config import TrainingConfig
from training_logger import TrainingLogger


class _InlineExecutor(Executor):
    """Does what it is given while its caller waits."""

    def submit(self, function, /, *arguments, **keywords) -> Future:
        done: Future = Future()
        done.set_result(function(*arguments, **keywords))
        return done


class CheckpointManager:
    """Saves a run. Every rank calls every method, at the same moments."""

    def __init__(
        self,
        run: TrainingConfig,
        device: torch.device,
        process_group: SingleProcessGroup,
        logger: TrainingLogger,
    ):
        self.run, self.device, self.logger = run, device, logger
        self.process_group = process_group
        self.folder = logger.run_folder / 'checkpoints'
        # What makes of a tensor that of the checkpoint.
        self.snapshot = (
            sharded_state.HostStaging(device) if run.async_save else sharded_state.no_copy
        )
        self.executor = ThreadPoolExecutor(1, 'saver') if run.async_save else _InlineExecutor()
        self.task = self.executor.submit(bool)  # what it was given last: nothing yet
        self.checkpoint: PendingCheckpoint | None = None  # begun, and not yet published
        self.seconds = 0.0  # that it has taken from training

    @property
    def in_progress(self) -> bool:
        """Whether a checkpoint is begun that is not yet published."""
        return self.checkpoint is not None

    @property
    def writing(self) -> bool:
        """Whether this rank has not yet written its part of it."""
        return self.in_progress and not self.task.done()

    def begin(self, state: dict, index: dict, began: float) -> None:
        """Save what was collected by way of `snapshot`; none is in progress. Raises UserError.

        began: when this began to take time from training.
        """
        # The files that the last one replaced are removed, and the copies of this one complete.
        self.task.result()
        hardware.synchronize(self.device)
        # Write: here, or in the thread while training goes on.
        self.checkpoint = PendingCheckpoint(self.folder, index, self.process_group)
        self.task = self.executor.submit(self.checkpoint.write, state)
        self.seconds = time.perf_counter() - began
        if not self.run.async_save:
            self.publish()

    def publish(self) -> None:
        """Publish what is in progress, if anything is, and record it. Raises UserError."""
        if self.checkpoint is None:
            return
        began, (pending, self.checkpoint) = time.perf_counter(), (self.checkpoint, None)
        # Every rank has written; then the folder gets its name, and older ones go.
        self.task.result()
        checkpoint = pending.publish()
        if self.process_group.is_main:
            keep = self.run.keep_last, self.run.keep_best
            self.task = self.executor.submit(prune, checkpoint, *keep)
        self.seconds += time.perf_counter() - began
        seen: PartialDataSeen = checkpoint.index['seen']
        self.logger.checkpoint(
            {
                'iter': checkpoint.iter,
                'val_loss': checkpoint.val_loss,
                **seen,
                'path': str(checkpoint.path.relative_to(self.logger.run_folder)),
                'time_ms': self.seconds * 1e3,
                'write_ms': pending.seconds * 1e3,
            }
        )

    def finish(self) -> None:
        """Publish what is in progress, and wait until nothing is left to do. Raises UserError."""
        self.publish()
        self.task.result()

    def abort(self) -> None:
        """Make the best of what is in progress when the run fails.

        A process by itself can still publish it. Of several, others may be anywhere: it is left to
        be removed by the next start.
        """
        if self.process_group.world_size == 1:
            with contextlib.suppress(UserError):  # what made the run fail is on its way to the user
                self.finish()
