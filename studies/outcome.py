"""What became of a run of a study: by its exit code, its record and its console."""

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
    """How a run ended, in one of the words of `ADVICE` or finished; and why."""

    kind: str
    reason: str = ''
    code: int = 0

    @property
    def is_final(self) -> bool:
        """Whether the same command would only come to the same again."""
        return self.kind in ('finished', 'diverged')


FINISHED = Outcome('finished')


# What to do about a run that came to this, after its folder and the reason.
ADVICE = {
    'diverged': 'counts as diverged; remove its folder to train it again',
    'interrupted': 'the same command continues it',
    'killed': 'the same command continues it',
    'failed': 'the same command tries it again',
    'unreadable': 'move its folder away, and the same command trains it again',
}


def outcome_from_exit(code: int, last_line: str, out_of_memory: bool) -> Outcome:
    """What the exit code of a run says, as subprocess or as a shell has it."""
    number = -code if code < 0 else code - 128
    if code == 0:
        return FINISHED
    if number not in set(signal.Signals):
        return Outcome('failed', last_line or f'exit code {code}', code)
    name = signal.Signals(number).name
    if number in STOP_SIGNALS:
        return Outcome('interrupted', name, 128 + number)
    memory = ', as the machine ran out of memory' if out_of_memory else ''
    return Outcome('killed', f'{name}{memory}', 128 + number)


def outcome_from_record(record: Record) -> Outcome | None:
    """What a record says that the run came to, if that is final.

    A run that diverged ends because of an update that is not finite, not merely after one.
    """
    if record['status'] == 'finished':
        return FINISHED
    if stopped_by_nonfinite(record):
        return Outcome('diverged', 'loss or gradient not finite')
    return None


def summary_value(record: Record | None, key: str) -> float | None:
    """A number of a record's summary; None where there is none."""
    value = record and record['summary'].get(key)
    with contextlib.suppress(OverflowError):
        if isinstance(value, int | float) and math.isfinite(value):
            return value
    return None


def count_oom_kills() -> int:
    """How many processes this machine's kernel has ended for want of memory, as far as it tells."""
    with contextlib.suppress(OSError, ValueError), open('/proc/vmstat') as file:
        return sum(int(line.split()[1]) for line in file if line.startswith('oom_kill '))
    return 0


def last_line(path: Path, start: int) -> str:
    """The last line of a console from `start` on."""
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - 4096))
        lines = [line.strip() for line in file.read().decode(errors='replace').splitlines()]
        text = next((line for line in reversed(lines) if line), '')
        return text if len(text) <= 160 else text[:159] + '…'
    return ''
