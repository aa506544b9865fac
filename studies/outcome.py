"""The outcome of a run of a study, from its exit code, record and console output."""

import contextlib
import math
import os
import signal
from pathlib import Path
from typing import NamedTuple

from comparison.runs import stopped_by_nonfinite
from records.record_types import Record

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)
)


class Outcome(NamedTuple):
    """How a run ended, `finished` or a key of `ADVICE`, and the reason."""

    kind: str
    reason: str = ''
    code: int = 0

    @property
    def is_final(self) -> bool:
        """Whether running it again would give the same result."""
        return self.kind in ('finished', 'diverged')


FINISHED = Outcome('finished')


# Advice for a run with this outcome; it follows the run's folder and the reason.
ADVICE = {
    'diverged': 'counts as a result; remove its folder to train it again',
    'interrupted': 'run the same command to continue it',
    'killed': 'run the same command to continue it',
    'failed': 'run the same command to retry it',
    'unreadable': 'move its folder away and run the same command to train it again',
}


def outcome_from_exit(code: int, last_line: str, out_of_memory: bool) -> Outcome:
    """The outcome by exit code, in the form of subprocess or of a shell."""
    number = -code if code < 0 else code - 128
    if code == 0:
        return FINISHED
    if number not in set(signal.Signals):
        return Outcome('failed', last_line or f'exit code {code}', code)
    name = signal.Signals(number).name
    if number in STOP_SIGNALS:
        return Outcome('interrupted', name, 128 + number)
    memory = ', because the machine ran out of memory' if out_of_memory else ''
    return Outcome('killed', f'{name}{memory}', 128 + number)


def outcome_from_record(record: Record) -> Outcome | None:
    """The outcome by record, if it is final.

    A diverged run was stopped by a loss or gradient that is not finite.
    """
    if record['status'] == 'finished':
        return FINISHED
    if stopped_by_nonfinite(record):
        return Outcome('diverged', 'loss or gradient not finite')
    return None


def summary_value(record: Record | None, key: str) -> float | None:
    """A number in the summary of a record; None if it is missing."""
    value = record and record['summary'].get(key)
    with contextlib.suppress(OverflowError):
        if isinstance(value, int | float) and math.isfinite(value):
            return value
    return None


def count_oom_kills() -> int:
    """Number of processes that the kernel killed because memory ran out; 0 if unknown."""
    with contextlib.suppress(OSError, ValueError), open('/proc/vmstat') as file:
        return sum(int(line.split()[1]) for line in file if line.startswith('oom_kill '))
    return 0


def last_line(path: Path, start: int) -> str:
    """The last line of a console file after position `start`."""
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - 4096))
        lines = [line.strip() for line in file.read().decode(errors='replace').splitlines()]
        text = next((line for line in reversed(lines) if line), '')
        return text if len(text) <= 160 else text[:159] + '…'
    return ''
