"""Signals as requests that a run answers before its next iteration."""

import os
import signal
import time
from types import FrameType
from typing import Self

from common.live_region import write_in_signal_handler
from parallel.process_group import SingleProcessGroup

# Not on Windows.
SAVE_SIGNAL = getattr(signal, 'SIGUSR1', None)
HANGUP_SIGNAL = getattr(signal, 'SIGHUP', None)  # the terminal was closed


def stop_signals() -> list[int]:
    """The signals that ask to stop: SIGINT, SIGTERM, and SIGHUP unless `nohup` has it ignored."""
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    if HANGUP_SIGNAL is not None and signal.getsignal(HANGUP_SIGNAL) != signal.SIG_IGN:
        numbers.append(HANGUP_SIGNAL)
    return numbers


class SignalHandler:
    """While entered: `stop_signals` ask to stop, SIGUSR1 asks for a checkpoint.

    A second one to stop ends the process at once, with the signal's exit code and nothing
    saved; what was published before stays whole. The same signal within a second is the same
    request: Slurm signals every process, and torchrun passes on what it gets; so is SIGHUP, which
    comes with SIGTERM where a session ends. verbose: whether this process is the one to say that
    it has received one.
    """

    def __init__(self, verbose: bool = True):
        self.verbose = verbose
        self._received_at = 0.0  # on the monotonic clock
        # What this process was asked for, which the others are told at the next `sync`; a signal
        # may come at any moment, also during that.
        self._received_stop: int | None = None
        self._received_save = False
        # What all ranks know since the last `sync`.
        self.stop_signal: int | None = None
        self.save_requested = False
        self.checkpoint_writing = False

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP, 0 if nobody asked to stop."""
        return 128 + self.stop_signal if self.stop_signal else 0

    @property
    def pending(self) -> bool:
        """Whether anybody waits for a checkpoint."""
        return self.save_requested or self.stop_signal is not None

    def sync(self, process_group: SingleProcessGroup, checkpoint_writing: bool = False) -> None:
        """Let every rank know what any of them was asked for, between two iterations.

        checkpoint_writing: whether this rank is still at work on a checkpoint; then whether any is.
        """
        save: float = self._received_save
        self._received_save = False
        stop, save, writing = process_group.all_reduce_max(
            [self._received_stop or 0, save, checkpoint_writing]
        )
        self.stop_signal, self.save_requested = int(stop) or None, bool(save)
        self.checkpoint_writing = bool(writing)

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._stop) for number in stop_signals()}
        if SAVE_SIGNAL is not None:
            self._previous[SAVE_SIGNAL] = signal.signal(SAVE_SIGNAL, self._save)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        previous, self._received_at = self._received_at, time.monotonic()
        # The same request once more, passed on by Slurm, torchrun or the terminal.
        same = number == self._received_stop or HANGUP_SIGNAL in (number, self._received_stop)
        if same and self._received_stop is not None and self._received_at - previous < 1.0:
            return
        # A second request: at once.
        if self._received_stop is not None:
            os._exit(128 + number)
        # The first: before the next iteration.
        self._received_stop = number
        if not self.verbose:
            return
        name = signal.Signals(number).name
        write_in_signal_handler(f'\n{name}: saving after this update; once more to stop at once\n')

    def _save(self, number: int, frame: FrameType | None) -> None:
        self._received_save = True
