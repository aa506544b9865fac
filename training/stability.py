"""Loss spikes, and losses, gradients and weights that are not finite."""

import math
import statistics
from functools import partial
from pathlib import Path

from common.errors import UserError
from training.checkpoint import list_checkpoints, load_latest
from training.resume import restore_checkpoint
from training.session import Session

SPIKE_WINDOW = 32  # number of logged losses that a new one is compared with
SPIKE_DEVIATIONS = 6.0
MAX_ROLLBACKS = 5


def is_spike(loss: float, recent: list[float]) -> bool:
    """Whether `loss` exceeds the mean of the last 32 logged losses by 6 standard deviations.

    recent: these losses, to which `loss` is appended.
    """
    spike = False
    if len(recent) == SPIKE_WINDOW:
        limit = statistics.fmean(recent) + SPIKE_DEVIATIONS * statistics.pstdev(recent)
        spike = loss > limit
    if math.isfinite(loss):
        recent.append(loss)
        del recent[:-SPIKE_WINDOW]
    return spike


def report_spike(session: Session, iter: int, loss: float) -> None:
    """Add an event if the logged loss is a spike."""
    if is_spike(loss, session.progress.recent_losses):
        message = f'loss {loss:.4f} is far above those before'
        session.logger.event('loss_spike', iter, message)


def handle_nonfinite(session: Session, skipped: int, iter: int) -> bool:
    """Apply `on_nonfinite` to the updates that the device has skipped.

    iter: number of iterations done when they were counted. One more may be queued, which does not
    count if the run stops or goes back.

    Returns whether the run went back to a checkpoint. Raises UserError if the run must stop.
    """
    if not skipped:
        return False
    run, failed, folder = session.settings.run, session.progress, session.checkpoints.folder
    message = f'{skipped} update(s) skipped: loss or gradient not finite'
    session.logger.event('nonfinite', iter - 1, message, count=skipped)
    if run.on_nonfinite == 'skip':
        return False

    # Stop, unless there is a checkpoint to return to.
    session.drop_measurements()
    session.checkpoints.finish()
    warn = partial(session.logger.event, 'broken_checkpoint', iter)
    rollback = run.on_nonfinite == 'rollback'
    latest = load_latest(folder, warn, session.parallel) if rollback else None
    if latest is None or failed.rollbacks == MAX_ROLLBACKS:
        raise nonfinite_error(iter, skipped, list_checkpoints(folder))

    # Load the checkpoint, and skip the data since then, which would cause the same failure again.
    checkpoint, state = latest
    session.progress = restore_checkpoint(
        session.parallel, session.raw_model, session.optimizer, checkpoint, state
    )
    skipped_iters = iter - checkpoint.iter
    session.progress.data_shift = failed.data_shift + skipped_iters
    session.progress.rollbacks = failed.rollbacks + 1
    session.logger.rollback(
        checkpoint.iter,
        from_iter=iter,
        checkpoint=str(checkpoint.path.relative_to(session.logger.run_folder)),
        message=f'went back from iter {iter}, skipping {skipped_iters} iteration(s) of data',
    )
    return True


def nonfinite_error(iter: int, count: int, checkpoints: list[Path]) -> UserError:
    """The error for a loss or gradient that is not finite."""
    return UserError(
        f'the loss or the gradient was not finite in {count} iteration(s) up to iter {iter - 1}; '
        f'they did not change the weights. {_last_of(checkpoints)} Try a lower --learning_rate, a '
        f'longer --warmup_iters or --dtype=float32; --on_nonfinite=skip skips such iterations, '
        f'--on_nonfinite=rollback returns to the last checkpoint and skips the data since then.'
    )


def nonfinite_weights_error(iter: int, checkpoints: list[Path]) -> UserError:
    """The error for weights that a finite gradient has taken out of range."""
    return UserError(
        f'the weights are not all finite after {iter} iterations, so they are not saved. '
        f'{_last_of(checkpoints)} Try a lower --learning_rate or a longer --warmup_iters.'
    )


def _last_of(checkpoints: list[Path]) -> str:
    return f'The last checkpoint is {checkpoints[0]}.' if checkpoints else 'No checkpoint exists.'
