"""A lock that admits one study at a time to a folder, shared by the study and its runs."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from common.console_output import write_progress
from common.errors import UserError
from common.files import lock_file

GRACE_SECONDS = 60.0  # for the runs of a killed study to save and exit


@contextlib.contextmanager
def study_lock(out_dir: Path) -> Iterator[list[int]]:
    """Keep other studies out of a folder; yields the file descriptors of the lock.

    The lock is released when all processes with one of the descriptors have ended: the study, and
    its runs, which still save after the study was killed. Raises UserError if another study runs.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(out_dir / 'study.lock', os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f'out_dir={str(out_dir)!r} cannot be written ({error.strerror}). Choose another folder '
            f'with --out_dir=FOLDER.'
        ) from error
    try:
        if os.name == 'posix':
            _acquire(lock, out_dir)
        yield [lock] if os.name == 'posix' else []
    finally:
        os.close(lock)


def _acquire(lock: int, out_dir: Path) -> None:
    """Take the lock. Raises UserError if another study holds it: at once if that one is alive."""
    deadline, waiting, hostname = time.monotonic() + GRACE_SECONDS, False, socket.gethostname()
    while not lock_file(lock):
        pid, _, host = os.pread(lock, 300, 0).decode(errors='replace').strip().partition(' ')
        holder = f'pid {pid or "unknown"}' + (f' on {host}' if host not in ('', hostname) else '')
        if host != hostname or _is_alive(pid):
            raise UserError(
                f'{out_dir}: another study ({holder}) is running there. Wait until it ends, stop '
                f'it, or choose another folder with --out_dir=FOLDER.'
            )
        if time.monotonic() > deadline:
            raise UserError(
                f'{out_dir}: the study that ran there ({holder}) has ended, but its runs have not. '
                f'Wait until its train.py processes end, or stop them.'
            )
        if not waiting:
            write_progress(f'{out_dir}: waiting for the runs of a killed study ({holder}) to save')
        waiting = True
        time.sleep(0.2)
    with contextlib.suppress(OSError):  # only the message uses it
        os.ftruncate(lock, 0)
        os.pwrite(lock, f'{os.getpid()} {hostname}\n'.encode(), 0)


def _is_alive(pid: str) -> bool:
    """Whether the process exists; True if the number is unreadable."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True
