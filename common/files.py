"""Files that several processes use: atomic replacement, locks, hashes."""

import contextlib
import hashlib
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from common.console_output import write_progress
from common.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two runs that start at once both prepare the data
    fcntl = None  # type: ignore[assignment]


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file in one step: after any failure it is complete, either old or new.

    Raises OSError, and leaves no temporary file. A symbolic link stays: its target is replaced. A
    pipe or a terminal is written to.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(content)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')  # several processes may write
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """`replace_file` for a command. Raises UserError."""
    try:
        replace_file(path, content)
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error.strerror or error}).') from error


def check_destination(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Raise UserError if the file cannot be written, before any work is done for it."""
    if os.path.isdir(path):
        raise UserError(f'{option}={path} is a folder: give the name of a file.')
    if path.suffix.lower() not in suffixes:
        raise UserError(
            f'{option}={path}: the name ends in {" or ".join(suffixes)}, for example '
            f'{option}={shlex.quote(str(path.with_suffix(suffixes[0])))}'
        )
    folder = path.parent
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            raise UserError(f'{option}={path}: {folder} is a file, not a folder.')
        raise UserError(
            f'{option}={path}: the folder {folder} does not exist. Create it first: '
            f'mkdir -p {shlex.quote(str(folder))}'
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f'{option}={path}: no permission to write in the folder {folder}.')


def lock_file(fd: int, wait: bool = False) -> bool:
    """Lock an open file for this process until it is closed, however the process ends.

    Returns whether it is locked now; `wait`: wait for that. Without support for locks in the system
    or the file system, it counts as locked.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


@contextlib.contextmanager
def file_lock(path: Path, message: str) -> Iterator[None]:
    """Hold the lock file `path`; if another process holds it, show `message` and wait."""
    try:
        lock = open(path, 'w')  # noqa: SIM115 closed, and with that unlocked, below
    except OSError as error:
        raise UserError(f'Cannot write to {path.parent}: {error.strerror}') from None
    with lock:
        if not lock_file(lock.fileno()):
            write_progress(message)
            lock_file(lock.fileno(), wait=True)
        yield


def files_sha256(paths: Iterable[Path]) -> str:
    """SHA-256 of the concatenated contents of files, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        for chunk in file_chunks(path):
            digest.update(chunk)
    return digest.hexdigest()


def file_chunks(path: Path) -> Iterator[bytes]:
    """The content of a file in chunks of 1 MiB."""
    with open(path, 'rb') as file:
        while chunk := file.read(2**20):
            yield chunk


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return files_sha256([path])
