"""Signals as requests that a run handles before its next iteration."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from common.live_region import write_in_signal_handler
from parallel.process_group import SingleProcessGroup

# Not on Windows.
SAVE_SIGNAL = getattr(signal, 'SIGUSR1', None)
HANGUP_SIGNAL = getattr(signal, 'SIGHUP', None)  # the terminal was closed


def stop_signals() -> list[int]:
    """The signals that request a stop: SIGINT, SIGTERM, and SIGHUP unless `nohup` ignores it."""
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    if HANGUP_SIGNAL is not None and signal.getsignal(HANGUP_SIGNAL) != signal.SIG_IGN:
        numbers.append(HANGUP_SIGNAL)
    return numbers


def exit_at_once(number: int) -> None:
    """End the process with the signal's exit code."""
    os._exit(128 + number)


def interrupt_at_once(number: int) -> None:
    """Raise KeyboardInterrupt for SIGINT; end the process for the other signals."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    exit_at_once(number)


class SignalHandler:
    """While entered: `stop_signals` request a stop, SIGUSR1 requests a checkpoint.

    A second stop signal calls `on_second_stop`; nothing more is saved then, and published
    checkpoints stay intact. The same signal within a second is the same request: Slurm signals
    every process, and torchrun forwards what it receives. So is SIGHUP, which comes with SIGTERM
    when a session ends. In a thread other than the main one no signal can be handled: it does
    nothing there.
    """

    def __init__(self, verbose: bool = True):
        """verbose: whether this process prints that it has received a signal."""
        self.verbose = verbose
        self.on_second_stop: Callable[[int], None] = exit_at_once
        self._previous: dict[int, Any] = {}  # signal -> handler to restore
        self._received_at = 0.0  # on the monotonic clock
        # Requests to this process, which `sync` passes on. A signal may come at any moment, also
        # during `sync`.
        self._received_stop: int | None = None
        self._received_save = False
        # Requests to any rank, known to all since the last `sync`.
        self.stop_signal: int | None = None
        self.save_requested = False
        self.checkpoint_writing = False

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP, 0 without a stop signal."""
        return 128 + self.stop_signal if self.stop_signal else 0

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is requested."""
        return self.save_requested or self.stop_signal is not None

    def sync(self, process_group: SingleProcessGroup, checkpoint_writing: bool = False) -> None:
        """Share the requests to any rank with all ranks, between two iterations.

        checkpoint_writing: whether this rank is still writing a checkpoint. The attribute of that
        name then tells whether any rank is.
        """
        save: float = self._received_save
        self._received_save = False
        stop, save, writing = process_group.all_reduce_max(
            [self._received_stop or 0, save, checkpoint_writing]
        )
        self.stop_signal, self.save_requested = int(stop) or None, bool(save)
        self.checkpoint_writing = bool(writing)

    def __enter__(self) -> 'SignalHandler':
        if threading.current_thread() is threading.main_thread():
            handlers = dict.fromkeys(stop_signals(), self._stop)
            if SAVE_SIGNAL is not None:
                handlers[SAVE_SIGNAL] = self._save
            self._previous = {
                number: signal.signal(number, handler) for number, handler in handlers.items()
            }
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, and cannot be restored by it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def redeliver(self, saved: str) -> None:
        """After the run, pass the signal that stopped it on to the handler that was there before.

        Raises KeyboardInterrupt with the message `saved` for SIGINT.
        """
        if self.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt(saved)
        if self.stop_signal is not None:
            signal.raise_signal(self.stop_signal)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        previous, self._received_at = self._received_at, time.monotonic()
        # The same request once more, forwarded by Slurm, torchrun or the terminal.
        same = number == self._received_stop or HANGUP_SIGNAL in (number, self._received_stop)
        if same and self._received_stop is not None and self._received_at - previous < 1.0:
            return
        # A second request.
        if self._received_stop is not None:
            self.on_second_stop(number)
            return
        # The first: before the next iteration.
        self._received_stop = number
        if not self.verbose:
            return
        again = 'Press again' if number == signal.SIGINT else 'Send another signal'
        message = (
            f'\n{signal.Signals(number).name}: saving a checkpoint after this iteration, then '
            f'stopping. {again} to stop immediately.\n'
        )
        write_in_signal_handler(message)

    def _save(self, number: int, frame: FrameType | None) -> None:
        self._received_save = True
