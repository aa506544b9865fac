"""The folders of runs: made, found, and which of them began last.

A run is a folder `out_dir/run_<date>_<time>/` with its `journal.jsonl`, its `record.json` and its
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
# At the beginning of a journal and of a record.json. In the texts of both quotes are escaped.
_START_TIME = re.compile(rb'"start_time": "([^"]*)"')
# Big folders that hold no runs; hidden ones and virtual environments are left out as well.
_NOT_SEARCHED = {'data', 'node_modules', 'site-packages', '__pycache__'}


def new_run_folder(out_dir: str | os.PathLike, now: datetime | None = None) -> Path:
    """Make `out_dir/run_<date>_<time>/checkpoints/` and return the run's folder, which is new.

    A second run of the same second gets the suffix `_2`, and so on: `mkdir` decides the race.
    Raises UserError where the folder cannot be made.
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
            f'out_dir={str(out_dir)!r}: no run folder can be made there ({error.strerror}). '
            'Choose a folder that you may write to with --out_dir=FOLDER.'
        ) from error
    return folder


def latest_run(out_dir: str | os.PathLike, job: str | None = None) -> Path | None:
    """The run in `out_dir` that began last, or None; of one second by name (`_2` before `_10`).

    Given a `job`, the newest of those that it began or went on with last, if there are any. A
    folder without a journal or record belongs to a run that ended before it began: not counted.
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
    """When a run began, in seconds since 1970; None where it never did.

    The time in its folder's name is local, so that it depends on the time zone; it stands in only
    where neither journal nor record tell.
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
        return 0.0  # digits, but no date


def _last_job(folder: Path) -> str | None:
    """The job that began a run or went on with it last; None where its journal does not tell."""
    try:
        data = (folder / JOURNAL).read_bytes()
        at = data.rfind(b'\n{"kind": "resume"') + 1  # 0, the start, where it was never resumed
        return json.loads(data[at:].partition(b'\n')[0])['metadata'].get('job')
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def find_records(root: str | os.PathLike) -> list[Path]:
    """The run folders at or below `root`, sorted by path; folders that cannot be read are left out.

    Links to folders are followed, so that runs on another disk count, and each real folder counts
    once. Does not look inside runs, hidden folders, virtual environments or data.
    """
    runs = []
    for folder, subfolders, files in walk(Path(root)):
        names = {entry.name for entry in files}
        if names & {JOURNAL, RECORD}:
            runs.append(Path(folder))
        # A lone record.json may be a copy, or another program's: runs can still lie below it.
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
