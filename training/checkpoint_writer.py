"""Save the checkpoints of a run, one at a time, optionally in a background thread.

Without `async_save` a checkpoint is written and published at once. With it, the state is copied to
host memory, a thread writes the copy while training continues, and the checkpoint is published
between two iterations, once every rank has written its part. All communication between ranks thus
stays in the main thread, in a fixed order.
"""

import contextlib
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial

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
    """Runs a task at once, in the calling thread."""

    def submit(self, function, /, *arguments, **keywords) -> Future:
        done: Future = Future()
        done.set_result(function(*arguments, **keywords))
        return done


class CheckpointManager:
    """Saves and publishes checkpoints. Every rank calls every method, at the same points."""

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
        # Function that maps tensors to those that are written.
        note = partial(logger.event, 'note', None)
        self.snapshot = (
            sharded_state.HostStaging(device, note) if run.async_save else sharded_state.no_copy
        )
        self.executor = ThreadPoolExecutor(1, 'saver') if run.async_save else _InlineExecutor()
        self.task = self.executor.submit(bool)  # the last task; at first an empty one
        self.checkpoint: PendingCheckpoint | None = None  # not yet published
        self.seconds = 0.0  # training time that it has cost

    @property
    def in_progress(self) -> bool:
        """Whether there is a checkpoint that is not yet published."""
        return self.checkpoint is not None

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing its part of the checkpoint."""
        return self.in_progress and not self.task.done()

    def begin(self, state: dict, index: dict, began: float) -> None:
        """Start to save a state collected with `snapshot`. Raises UserError.

        No other checkpoint may be in progress. began: the time at which training was interrupted.
        """
        # Wait until the last checkpoint's task and the copies for this one are done.
        self.task.result()
        hardware.synchronize(self.device)
        # Write, here or in the thread.
        self.checkpoint = PendingCheckpoint(self.folder, index, self.process_group)
        self.task = self.executor.submit(self.checkpoint.write, state)
        self.seconds = time.perf_counter() - began
        if not self.run.async_save:
            self.publish()

    def publish(self) -> None:
        """Publish and record the checkpoint in progress, if there is one. Raises UserError."""
        if self.checkpoint is None:
            return
        began, (pending, self.checkpoint) = time.perf_counter(), (self.checkpoint, None)
        # Wait for this rank's part, publish, and remove older checkpoints.
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
        """Publish the checkpoint in progress, and wait for all tasks. Raises UserError."""
        self.publish()
        self.task.result()

    def abort(self) -> None:
        """Handle the checkpoint in progress when the run fails.

        A single process publishes it. With several, the state of the others is unknown: the
        checkpoint is abandoned, and the next start removes its files.
        """
        if self.process_group.world_size == 1:
            with contextlib.suppress(UserError):  # the error that ended the run is shown instead
                self.finish()
