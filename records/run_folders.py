"""Creating and finding run folders.

A run is a folder `out_dir/run_<date>_<time>/` with `journal.jsonl`, `record.json` and
`checkpoints/`.
"""

import json
import os
import re
from datetime import datetime
from pathlib import Path

from common.errors import UserError
from common.folders import walk

JOURNAL, RECORD = 'journal.jsonl', 'record.json'

_RUN_NAME = re.compile(r'run_(\d{8}_\d{6})(?:_(\d+))?')
# Near the beginning of a journal and of a record.json; quotes inside their strings are escaped.
_START_TIME = re.compile(rb'"start_time": "([^"]*)"')
# Large folders without runs; hidden folders and virtual environments are skipped as well.
_NOT_SEARCHED = {'data', 'node_modules', 'site-packages', '__pycache__'}


def new_run_folder(out_dir: str | os.PathLike, now: datetime | None = None) -> Path:
    """Create `out_dir/run_<date>_<time>/checkpoints/` and return the new run folder.

    A second run of the same second gets the suffix `_2`, and so on; `mkdir` resolves races between
    processes. Raises UserError if the folder cannot be created.
    """
    name = f'run_{now or datetime.now():%Y%m%d_%H%M%S}'
    try:
        os.makedirs(out_dir, exist_ok=True)
        number = 1
        while True:
            folder = Path(out_dir, name if number == 1 else f'{name}_{number}')
            try:
                os.mkdir(folder)
                break
            except FileExistsError:
                number += 1
        os.mkdir(folder / 'checkpoints')
    except OSError as error:
        raise UserError(
            f'out_dir={str(out_dir)!r}: a run folder cannot be created there ({error.strerror}). '
            'Choose a writable folder with --out_dir=FOLDER.'
        ) from error
    return folder


def latest_run(out_dir: str | os.PathLike, job: str | None = None) -> Path | None:
    """The run in `out_dir` that began last, or None; within a second by name (`_2` before `_10`).

    job: prefer the newest run that this job began or resumed last. A folder without a journal or
    record belongs to a run that failed before it began, and is ignored.
    """
    runs = []
    for folder in Path(out_dir).glob('run_*'):
        match = _RUN_NAME.fullmatch(folder.name)
        if match and (start := _start_time(folder)) is not None:
            runs.append((start, match[1], int(match[2] or 1), folder))
    folders = [folder for *_, folder in sorted(runs, reverse=True)]
    folders_of_job = (folder for folder in folders if job is not None and _last_job(folder) == job)
    return next(folders_of_job, folders[0] if folders else None)


def _start_time(folder: Path) -> float | None:
    """The time when a run began, in seconds since 1970; None if it never did.

    The time in the folder's name depends on the time zone; it is used only if neither journal nor
    record has the start time.
    """
    start = None
    for name in (JOURNAL, RECORD):
        try:
            with open(folder / name, 'rb') as file:
                head = file.read(4096)
        except OSError:
            continue
        if not head:
            continue
        match = _START_TIME.search(head)
        try:
            if match is not None:
                return datetime.fromisoformat(match[1].decode()).timestamp()
        except (ValueError, OverflowError, OSError):
            pass
        start = start or _local_time(folder.name)
    return start


def _local_time(name: str) -> float:
    """The time in the name of a run's folder."""
    match = _RUN_NAME.fullmatch(name)
    try:
        return datetime.strptime(match[1], '%Y%m%d_%H%M%S').timestamp() if match else 0.0
    except (ValueError, OverflowError, OSError):
        return 0.0  # digits that are not a date


def _last_job(folder: Path) -> str | None:
    """The job that began or resumed a run last; None if its journal does not say."""
    try:
        data = (folder / JOURNAL).read_bytes()
        at = data.rfind(b'\n{"kind": "resume"') + 1  # 0, the start line, if it was never resumed
        return json.loads(data[at:].partition(b'\n')[0])['metadata'].get('job')
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def find_records(root: str | os.PathLike) -> list[Path]:
    """The run folders at or below `root`, sorted by path; unreadable folders are skipped.

    Symbolic links are followed, so that runs on another disk are found; each real folder is
    returned once. Runs, hidden folders, virtual environments and data are not searched.
    """
    runs = []
    for folder, subfolders, files in walk(Path(root)):
        names = {entry.name for entry in files}
        if names & {JOURNAL, RECORD}:
            runs.append(Path(folder))
        # A lone record.json may be a copy, or another program's: there may be runs below it.
        is_run = JOURNAL in names or (
            RECORD in names and _RUN_NAME.fullmatch(os.path.basename(folder))
        )
        if is_run or 'pyvenv.cfg' in names:
            subfolders.clear()
        subfolders[:] = [
            entry
            for entry in subfolders
            if entry.name not in _NOT_SEARCHED and not entry.name.startswith('.')
        ]
    return sorted(runs)
