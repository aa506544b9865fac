"""Signals as requests that a run answers at its next update boundary."""

import contextlib
import os
import signal
import time

from parallel.process_group import Alone

# Not on Windows.
SAVING = getattr(signal, 'SIGUSR1', None)
HANG_UP = getattr(signal, 'SIGHUP', None)  # the terminal was closed


def stopping_signals() -> list[int]:
    """The signals that ask to stop: SIGINT, SIGTERM, and SIGHUP unless `nohup` has it ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if HANG_UP is not None and signal.getsignal(HANG_UP) != signal.SIG_IGN:
        numbers.append(HANG_UP)
    return numbers


class Interruption:
    """While entered: `stopping_signals` ask to stop, SIGUSR1 asks for a checkpoint.

    A second one to stop ends the process at once, with the signal's exit code and nothing
    saved; what was published before stays whole. The same signal within a second is the same
    request: Slurm signals every process, and torchrun passes on what it gets; so is SIGHUP, which
    comes with SIGTERM where a session ends. speaks: whether this process is the one to say that it
    has heard.
    """

    def __init__(self, speaks: bool = True):
        self.speaks = speaks
        self._asked_at = 0.0  # on the monotonic clock
        # What this process was asked for, which the others are told at the next boundary; a signal
        # may come at any moment, also while they agree.
        self._asked_to_stop: int | None = None
        self._asked_to_save = False
        # What all have agreed on.
        self.stop_signal: int | None = None
        self.save_wanted = False
        self.writing = False

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP, 0 if nobody asked to stop."""
        return 128 + self.stop_signal if self.stop_signal else 0

    @property
    def pending(self) -> bool:
        """Whether anybody waits for a save."""
        return self.save_wanted or self.stop_signal is not None

    def agree(self, ranks: Alone, writing: bool = False) -> None:
        """Let every rank know what any of them was asked for, at an update boundary.

        writing: whether this rank is still at work on a checkpoint; then whether any is.
        """
        asked_to_save, self._asked_to_save = self._asked_to_save, False
        stop, save, writing = ranks.largest([self._asked_to_stop or 0, asked_to_save, writing])
        self.stop_signal, self.save_wanted = int(stop) or None, bool(save)
        self.writing = bool(writing)

    def __enter__(self) -> 'Interruption':
        self._before = {number: signal.signal(number, self._stop) for number in stopping_signals()}
        if SAVING is not None:
            self._before[SAVING] = signal.signal(SAVING, self._save)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame) -> None:
        before, self._asked_at = self._asked_at, time.monotonic()
        is_same = number == self._asked_to_stop or HANG_UP in (number, self._asked_to_stop)
        if is_same and self._asked_to_stop is not None and self._asked_at - before < 1.0:
            return
        if self._asked_to_stop is not None:
            os._exit(128 + number)
        self._asked_to_stop = number
        if not self.speaks:
            return
        name = signal.Signals(number).name
        # os.write: print may be in the middle of something when a signal arrives. The terminal may
        # be gone, which is what SIGHUP says.
        with contextlib.suppress(OSError):
            os.write(2, f'\n{name}: saving after this update; once more to stop at once\n'.encode())

    def _save(self, number: int, frame) -> None:
        self._asked_to_save = True
