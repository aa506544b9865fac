"""Log entries of iterations: `measure` queues the measurements, `record` reads and writes them.

On CUDA an entry is recorded while the next iteration runs (see `pending_log`), and before anything
that depends on it: an evaluation, a checkpoint, the end.
"""

import contextlib
import time

import torch

from common import hardware
from common.errors import UserError
from optim.step import GradientSums
from records.record_types import MemoryInfo
from training import stability
from training.pending_log import Measurements
from training.session import Session

LAST_ENTRY_SECONDS = 10  # that a failed run waits for the measurements of its last iteration


def measure(
    session: Session,
    clock: hardware.StepClock,
    learning_rate: float,
    loss: torch.Tensor,
    sums: GradientSums,
) -> Measurements:
    """The measurements of the last iteration, without waiting for the device."""
    optimizer, metrics = session.optimizer, session.metrics
    # Collect them on the device, and queue their copy to the host.
    values = {
        'loss': loss,
        'norm': sums.norm,
        'total': sums.total,
        'skipped': optimizer.take_skipped(),
        **({'loss_scale': optimizer.loss_scale} if optimizer.scaler.is_enabled() else {}),
    }
    aux = session.raw_model.summarize_metrics(metrics.aux.mean_and_reset(session.parallel))
    copy = hardware.HostCopy(torch.stack([*values.values(), *aux.values()]))
    # Measure on the host, where a lost rank is detected. Since the next iteration is not yet
    # queued, the peak of the memory is that of this one.
    session.record_memory_footprint()
    measured = Measurements(
        iter=session.progress.iter - 1,
        learning_rate=learning_rate,
        data_seen=session.data_seen(),
        memory=session.memory_usage(),
        time=clock.take(),
        names=list(values),
        readings=list(aux),
        values=copy,
    )
    hardware.reset_peak_memory(session.device)
    return measured


def record_due(session: Session, clock: hardware.StepClock, measured: Measurements | None) -> None:
    """After an iteration is queued, record what is due then: this iteration or the one before.

    measured: the measurements of the iteration; None: it is not logged.
    """
    due = session.pending_log.next(measured)
    if due is None:
        return
    with clock.paused():
        went_back = _record_and_check(session, due)
    if went_back:  # the iteration that was queued meanwhile does not count
        clock.restart()


def flush(session: Session) -> bool:
    """Record what waits, and handle skipped updates, before an evaluation or a checkpoint.

    Returns whether the run went back to a checkpoint. Raises UserError if the run must stop.
    """
    due = session.pending_log.take()
    if due is not None and _record_and_check(session, due):
        return True
    skipped = int(session.optimizer.take_skipped())
    return stability.handle_nonfinite(session, skipped, session.progress.iter)


def record_last(session: Session) -> None:
    """Record what waits after the run has failed, unless the device does not deliver it."""
    due = session.pending_log.take()
    if due is None:
        return
    with contextlib.suppress(UserError, RuntimeError):  # the first error is shown instead
        deadline = time.monotonic() + LAST_ENTRY_SECONDS
        while not due.values.is_done and time.monotonic() < deadline:
            time.sleep(0.01)
        if due.values.is_done:
            _record(session, due)


def _record_and_check(session: Session, measured: Measurements) -> bool:
    """Record an iteration, and handle skipped updates as `flush` does."""
    skipped = _record(session, measured)
    return stability.handle_nonfinite(session, skipped, measured.iter + 1)


def _record(session: Session, measured: Measurements) -> int:
    """Record an iteration when the device is done with it. Returns the number of skipped updates
    since the entry before."""
    numbers = measured.values.tolist()
    values = dict(zip(measured.names, numbers))
    seconds, iter, memory = measured.time.seconds_per_step, measured.iter, measured.memory
    tokens_per_second, mfu = session.throughput(seconds)
    session.logger.iteration(
        {
            'iter': iter,
            'loss': values['loss'],
            'lr': measured.learning_rate,
            'time_ms': seconds * 1e3,
            'steps': measured.time.steps,
            'tokens_per_sec': tokens_per_second,
            **measured.data_seen,
            'mfu': mfu,
            'memory': memory,
            'gradients': session.optimizer.statistics(values['norm'], values['total']),
            'loss_scale': values.get('loss_scale'),
            'readings': dict(zip(measured.readings, numbers[len(values) :])),
        }
    )
    stability.report_spike(session, iter, values['loss'])
    if memory['allocator_retries'] and not session.metrics.retries_reported:
        session.metrics.retries_reported = True
        session.logger.event('allocator_retries', iter, _retries_message(memory))
    return int(values['skipped'])


def _retries_message(memory: MemoryInfo) -> str:
    return (
        f'the GPU was full {memory["allocator_retries"]} time(s): PyTorch returned unused memory '
        'to it and tried again, which slows training. Use a smaller --batch_size with more '
        '--gradient_accumulation_steps, or --activation_checkpointing=full.'
    )
