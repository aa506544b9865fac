"""Find and read the runs to compare: each once, without tuning and superseded runs."""

from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from comparison.record_fields import MalformedRecord
from comparison.runs import DIVERGED, Run, run_folder, run_from_record
from records.record import read_outline
from records.run_folders import find_records

# Errors that reading a damaged record can raise.
RECORD_ERRORS = (UserError, AttributeError, KeyError, TypeError, ValueError, OverflowError)
SCORES = ('final', 'best')


def read_runs(
    paths: Sequence[Path], latest: int | None = None, score: str = 'final'
) -> tuple[list[Run], list[str]]:
    """All runs at or below `paths`, newest first, and one line for each that is skipped.

    score: whether a run is ranked by its final evaluation or by its best. Raises UserError if a
    path does not exist or no run can be read.
    """
    runs, skipped = [], []
    for path in _record_paths(paths):
        try:
            runs.append(run_from_record(read_outline(path), path, score))
        except RECORD_ERRORS as error:
            skipped.append(skip_reason(path, error))
    if not runs:
        raise UserError(
            f'no run to compare at or below {", ".join(map(str, paths)) or Path.cwd()}. '
            'Make one with: python train.py config/arch_llama.py --max_iters=100, '
            'or give the folder of existing runs: python compare_architectures.py OUT_DIR',
            *(f'skipped {line}' for line in skipped),
        )
    runs.sort(key=lambda run: run.start, reverse=True)
    return drop_superseded_runs(drop_tuning_runs(runs))[:latest], skipped


def skip_reason(path: Path, error: Exception) -> str:
    """One line on why a record is skipped."""
    if isinstance(error, UserError):
        reason = ' '.join(str(error).split())
        return reason if str(path) in reason else f'{path}: {reason}'
    reason = str(error)
    if not isinstance(error, MalformedRecord):
        reason = f'{type(error).__name__}: {error}'
    return f'{path}: not a complete record ({reason})'


def _record_paths(paths: Sequence[Path]) -> list[Path]:
    """The records at or below `paths`, or the working folder. Raises UserError."""
    missing = [f'{path}: no such file or folder' for path in paths if not path.exists()]
    if missing:
        raise UserError(*missing)
    records = [] if paths else find_records(Path('.'))
    for path in paths:
        # A path without runs goes to the reader, which accepts more names and reports errors.
        records += ([] if path.is_file() else find_records(path)) or [path]
    # A run that two paths contain counts once.
    return [*{run_folder(path).resolve(): path for path in reversed(records)}.values()]


def drop_tuning_runs(runs: Sequence[Run]) -> list[Run]:
    """The runs without the tuning and timing runs of studies.

    A run that chose an option is no evidence for it. Tuning runs are kept only while their study
    has no other runs.
    """
    studies_with_trials = {_study_of(run) for run in runs if run.variant is not None}
    return [
        run for run in runs if run.variant is not None or _study_of(run) not in studies_with_trials
    ]


def _study_of(run: Run) -> object:
    return run.study and run.study.origin


def drop_superseded_runs(newest_first: Sequence[Run]) -> list[Run]:
    """The runs, with only the newest run of each trial of a study.

    A trial that was killed before its first checkpoint starts again in a new run. A diverged run
    is kept, since it is evidence.
    """
    compared, trial_folders = [], set()
    for run in newest_first:
        if run.variant is not None:
            if run.folder.parent in trial_folders and run.outcome != DIVERGED:
                continue
            trial_folders.add(run.folder.parent)
        compared.append(run)
    return compared
