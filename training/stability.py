"""When training goes wrong: loss spikes, losses, gradients and weights that are not finite."""

import math
import statistics
from functools import partial
from pathlib import Path

from common.errors import UserError
from training.checkpoint import list_checkpoints, load_latest
from training.resume import restore_checkpoint
from training.session import Session

SPIKE_WINDOW = 32  # logged losses that a new one is held against
SPIKE_DEVIATIONS = 6.0
MAX_ROLLBACKS = 5


def is_spike(loss: float, recent: list[float]) -> bool:
    """Whether `loss` lies far above the `recent` logged losses, which it then joins.

    Far: more than 6 standard deviations above the mean of the last 32. `recent` is changed.
    """
    spike = False
    if len(recent) == SPIKE_WINDOW:
        limit = statistics.fmean(recent) + SPIKE_DEVIATIONS * statistics.pstdev(recent)
        spike = loss > limit
    if math.isfinite(loss):
        recent.append(loss)
        del recent[:-SPIKE_WINDOW]
    return spike


def handle_nonfinite(session: Session, skipped: int) -> bool:
    """Do as `on_nonfinite` says about iterations that the device has skipped.

    Returns whether the run went back to a checkpoint. Raises UserError if it is to stop.
    """
    if not skipped:
        return False
    run, failed, folder = session.settings.run, session.progress, session.checkpoints.folder
    session.optimizer.skipped.zero_()
    message = f'{skipped} update(s) skipped: loss or gradient not finite'
    session.logger.event('nonfinite', failed.iter - 1, message, count=skipped)
    if run.on_nonfinite == 'skip':
        return False

    # Stop, unless there is a checkpoint to go back to.
    session.checkpoints.finish()
    warn = partial(session.logger.event, 'broken_checkpoint', failed.iter)
    latest = load_latest(folder, warn) if run.on_nonfinite == 'rollback' else None
    if latest is None or failed.rollbacks == MAX_ROLLBACKS:
        raise nonfinite_error(failed.iter, skipped, list_checkpoints(folder))

    # Go back, and leave out the data between the checkpoint and here, or the same would happen
    # again.
    checkpoint, state = latest
    session.progress = restore_checkpoint(
        session.parallel, session.raw_model, session.optimizer, checkpoint, state
    )
    left_out = failed.iter - checkpoint.iter
    session.progress.data_shift = failed.data_shift + left_out
    session.progress.rollbacks = failed.rollbacks + 1
    session.logger.rollback(
        checkpoint.iter,
        from_iter=failed.iter,
        checkpoint=str(checkpoint.path.relative_to(session.logger.run_folder)),
        message=f"went back from iter {failed.iter}, leaving out {left_out} updates' worth of data",
    )
    return True


def nonfinite_error(iter: int, count: int, checkpoints: list[Path]) -> UserError:
    """What a run says that stops at a loss or gradient that is not finite."""
    return UserError(
        f'the loss or the gradient was not finite in {count} update(s) up to iter {iter - 1}; the '
        f'weights were not touched by them. {_last_of(checkpoints)} Try a lower --learning_rate, a '
        f'longer --warmup_iters or --dtype=float32; --on_nonfinite=skip goes on without such '
        f'updates, --on_nonfinite=rollback goes back to the last checkpoint and leaves out the '
        f'data between.'
    )


def nonfinite_weights_error(iter: int, checkpoints: list[Path]) -> UserError:
    """What a run says that has nothing to save: finite gradients took a weight out of range."""
    return UserError(
        f'the weights are not all finite after {iter} updates, so they are not saved. '
        f'{_last_of(checkpoints)} Try a lower --learning_rate or a longer --warmup_iters.'
    )


def _last_of(checkpoints: list[Path]) -> str:
    return f'The last checkpoint is {checkpoints[0]}.' if checkpoints else 'None is saved yet.'
