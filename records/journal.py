"""Writing a run's record to disk: the journal line by line, record.json in one step.

A line is handed to the operating system in one write, so that a crash loses at most the last one.
record.json is replaced atomically.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import lock_file, replace_file
from records.record import LISTS, is_whole_line, read_file
from records.record_types import JournalLine, Record


class Journal:
    """A file to which whole lines are appended, one `write` each, without a buffer.

    While it is open, no other process can open it for writing; reading is always possible.
    """

    def __init__(self, path: Path, *, new: bool):
        self.path = path
        flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT | os.O_EXCL if new else 0)
        try:
            self.fd = os.open(path, flags, 0o666)
        except OSError as error:
            raise UserError(f'{path}: cannot be opened for writing ({error.strerror}).') from error
        try:
            if not lock_file(self.fd):
                raise UserError(
                    f'{path.parent}: another process is training this run. Wait until it ends '
                    'or stop it; --init_from=scratch starts a new run instead.'
                )
            self._repair_last_line()
        except BaseException:
            self.close()
            raise

    def _repair_last_line(self) -> None:
        """Complete a torn last line if only its line feed is missing, and remove it otherwise."""
        data = read_file(self.path)
        tail = data[data.rfind(b'\n') + 1 :]
        try:
            if is_whole_line(tail):
                os.write(self.fd, b'\n')
            elif tail:
                os.ftruncate(self.fd, len(data) - len(tail))
        except OSError as error:
            raise _write_error(self.path, error) from error

    def append(self, kind: str, entry: dict[str, Any]) -> JournalLine:
        """Write one line and return it. A line that does not fit on the disk is removed again."""
        line = finite_json({'kind': kind, 'time': round(time.time(), 3), **entry})
        data = (json.dumps(line, allow_nan=False) + '\n').encode()
        size = os.fstat(self.fd).st_size
        try:
            while data:
                data = data[os.write(self.fd, data) :]
        except OSError as error:
            os.ftruncate(self.fd, size)
            raise _write_error(self.path, error) from error
        return line

    def close(self) -> None:
        os.close(self.fd)


def finite_json(value: Any) -> Any:
    """`value` in strict JSON: floats that are not finite become None, tuples become lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    return value


def write_record(path: Path, record: Record) -> None:
    """Replace `path` in one step: after any failure the file is complete, either old or new."""
    try:
        replace_file(path, _to_json(record).encode())
    except OSError as error:
        raise _write_error(path, error) from error


def _to_json(record: Record) -> str:
    """Indented JSON, with one line per entry in the long lists."""
    parts = []
    for key, value in record.items():
        if key in LISTS:
            assert isinstance(value, list)
            rows = ',\n  '.join(json.dumps(entry, allow_nan=False) for entry in value)
            text = f'[\n  {rows}\n ]' if rows else '[]'
        else:
            text = json.dumps(value, indent=1, allow_nan=False).replace('\n', '\n ')
        parts.append(f' {json.dumps(key)}: {text}')
    return '{\n' + ',\n'.join(parts) + '\n}\n'


def _write_error(path: Path, error: OSError) -> UserError:
    reason = error.strerror
    if error.filename not in (None, str(path), path):
        reason = f'{reason}: {error.filename}'
    return UserError(
        f'{path}: cannot be written ({reason}). The record up to this point is intact. '
        'Free space or repair the folder, then continue the run with --init_from=resume.'
    )
