"""The logger of a run: keeps its journal, record.json, console and trackers consistent.

A run is a folder `out_dir/run_<date>_<time>/`. During training each entry becomes one line of
`journal.jsonl`, handed to the operating system before the console shows it, so that a crash loses
at most the last line. `record.json` is the document for people and for `compare_architectures.py`,
made of those lines and replaced in one step at the start, at the end and, as long as that is cheap,
after evaluations. `records/record_schema.json` describes it.

Entries are plain numbers, without tensors: this module does not depend on torch. It also exports
what scripts need to read runs: `find_records`, `latest_run`, `read_record`.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO, TypeVar

from common.errors import UserError
from records.console import Console, checkpoint_line, closing_block, event_line
from records.journal import Journal, finite_json, write_record
from records.record import STATUSES, assemble, parse_journal, read_file, read_record
from records.record_types import (
    ArchitectureInfo,
    CheckpointEntry,
    EvaluationEntry,
    IterationEntry,
    MemoryFootprint,
    Record,
    RecordHeader,
    RunMetadata,
    StartupInfo,
    Summary,
)
from records.run_folders import JOURNAL, RECORD, find_records, latest_run, new_run_folder
from records.short_report import short_report
from records.startup_report import resume_report, startup_report
from records.summary import best_evaluation
from records.trackers import Tracker

__all__ = ['TrainingLogger', 'find_records', 'latest_run', 'new_run_folder', 'read_record']

# The largest share of a run's time for updating record.json at evaluations: with 100,000 entries,
# writing it takes seconds. The journal is always up to date.
RECORD_SHARE = 0.01

Method = TypeVar('Method', bound=Callable)


def _on_main(method: Method) -> Method:
    """Every rank calls every method; only the main rank writes."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        return method(self, *args, **kwargs) if self.is_main else None

    return guarded  # type: ignore[return-value]


class TrainingLogger:
    """Writes one run's journal and record.json, and shows the run on the console.

    `style` and `stream` are those of the console. Entries have the form of `record_schema.json`;
    floats that are not finite are recorded as null. Every method raises UserError if the disk
    cannot be written, and leaves the earlier record intact. The `trackers` receive the lines of the
    journal after they are written.
    """

    def __init__(
        self,
        run_folder: Path | str,
        *,
        is_main: bool = True,
        style: str = 'auto',
        stream: TextIO | None = None,
        max_iters: int,
        trackers: Sequence[Tracker] = (),
    ):
        self.is_main = is_main
        self.trackers = list(trackers)
        self.run_folder = Path(run_folder)
        self.console = Console(
            style, stream, max_iters=max_iters, on_lost=self._record_console_lost
        )
        self.journal: Journal | None = None
        self.evaluations: dict[int, EvaluationEntry] = {}  # by iter
        self.record_due = 0.0  # when record.json may be written next, on the monotonic clock

    # --- The beginning ----------------------------------------------------------------------------

    @_on_main
    def start(
        self,
        config: dict[str, Any],
        architecture: ArchitectureInfo,
        metadata: RunMetadata,
        startup_info: StartupInfo,
    ) -> None:
        """Begin a new run's journal and show the start-up report."""
        header: RecordHeader = {
            'config': config,
            'architecture': architecture,
            'metadata': metadata,
            'startup_info': startup_info,
        }
        is_full = config.get('report') == 'full'
        report = (startup_report if is_full else short_report)(header, self.run_folder)
        self.journal = Journal(self.run_folder / JOURNAL, new=True)
        self.journal.append(
            'start',
            {'run_name': self.run_folder.name, 'start_time': _now(), **header},
        )
        record = self._update_record()
        self.console.begin(report, startup_info['hardware'], architecture.get('layers'))
        self._begin_trackers(record, None)

    @_on_main
    def resume(
        self,
        iter: int,
        *,
        checkpoint: str,
        changed: dict[str, list],
        config: dict[str, Any],
        metadata: RunMetadata,
        startup_info: StartupInfo,
    ) -> Record | None:
        """Continue the folder's journal from the `checkpoint` of `iter` iterations.

        changed: key → [old, new] for options and versions that differ from the earlier process.
        Returns the record so far. Raises UserError if the folder has no journal, or if another
        process is writing it.
        """
        read_record(self.run_folder / JOURNAL)
        self.journal = Journal(self.run_folder / JOURNAL, new=False)
        self.journal.append(
            'resume',
            {
                'iter': iter,
                'checkpoint': checkpoint,
                'command': metadata['command'],
                'changed': changed,
                'config': config,
                'metadata': metadata,
                'startup_info': startup_info,
            },
        )
        record = self._update_record()
        self.evaluations = {entry['iter']: entry for entry in record['eval_steps']}
        report = resume_report(iter, checkpoint, changed, self.run_folder)
        layers = record['architecture'].get('layers')
        self.console.begin(report, startup_info['hardware'], layers)
        self._begin_trackers(record, iter)
        return record

    # --- While it runs ----------------------------------------------------------------------------

    @_on_main
    def memory_footprint(self, footprint: MemoryFootprint) -> None:
        """Record the memory per rank, which becomes part of `startup_info.parallel`."""
        self._record('held', footprint)

    @_on_main
    def iteration(self, entry: IterationEntry) -> None:
        """Record and show an entry of `training_iterations`; a nonfinite loss is an event too."""
        self._record('iteration', entry)
        self.console.iteration(entry)
        self._note_nonfinite(entry['iter'], loss=entry['loss'])

    @_on_main
    def evaluation(self, entry: EvaluationEntry) -> None:
        """Record and show an entry of `eval_steps`; update record.json if that is due."""
        self._record('evaluation', entry)
        if time.monotonic() >= self.record_due:
            self._update_record()
        self.evaluations[entry['iter']] = finite_json(entry)
        self.console.evaluation(entry, best_evaluation(self.evaluations.values()))
        self._note_nonfinite(
            entry['iter'], train_loss=entry['train_loss'], val_loss=entry['val_loss']
        )

    @_on_main
    def checkpoint(self, entry: CheckpointEntry) -> None:
        """Record and show an entry of `checkpoints`."""
        self._record('checkpoint', entry)
        self.console.show(checkpoint_line(entry))

    @_on_main
    def event(self, kind: str, iter: int | None, message: str | None = None, **extra) -> None:
        """Record and show an unusual event after `iter` iterations."""
        entry: dict[str, Any] = {'event': kind, 'iter': iter, **extra}
        if message is not None:
            entry['message'] = message
        self._record('event', entry)
        self.console.show(event_line(kind, iter, message))

    @_on_main
    def rollback(self, iter: int, *, from_iter: int, checkpoint: str, message: str) -> None:
        """Record and show that the run went back to the `checkpoint` of `iter` iterations.

        Entries after that, up to `from_iter`, are dropped. The rollback is an event.
        """
        entry = {'iter': iter, 'from_iter': from_iter, 'checkpoint': checkpoint, 'message': message}
        self._record('rollback', entry)
        self.evaluations = {n: e for n, e in self.evaluations.items() if n <= iter}
        self._repeat_evaluation(iter)
        self.console.rollback(iter, message)

    # --- The end ----------------------------------------------------------------------------------

    @_on_main
    def finish(self, status: str = 'finished', reason: str | None = None) -> Summary | None:
        """End the run as `finished`, `interrupted` or `failed`: record.json and closing block.

        reason: becomes an event of that name; the caller shows it to the user.

        Returns the summary, computed from the journal alone. Does nothing, and returns None, before
        `start` and on ranks that are not main.

        With `failed` a UserError is shown, not raised, and the result is None: the error that ended
        the run, often the same full disk, must reach the user.
        """
        assert status in STATUSES[1:], status
        self.console.close()
        if self.journal is None:
            return None
        end = {'status': status, 'end_time': _now(), 'time': round(time.time(), 3)}
        path, record = self.run_folder / RECORD, None
        try:
            if reason:
                self._record('event', {'event': status, 'iter': None, 'message': reason})
            lines = parse_journal(read_file(self.journal.path))
            record = assemble([*lines, {'kind': 'end', **end}])
            self.journal.append('end', {**end, 'summary': record['summary']})
            write_record(path, record)
        except UserError as error:
            if status != 'failed':
                raise
            self.console.show(f'⚠ {error}')
            return None
        finally:
            self.journal.close()
            self.journal = None
            summary = record and record['summary']
            self._call_trackers(lambda tracker: tracker.close(status, summary))
        self.console.show(closing_block(record, best_evaluation(record['eval_steps']), path))
        return record['summary']

    # --- Into the journal and to the trackers -----------------------------------------------------

    def _record(self, kind: str, entry) -> None:
        """Write a line to the journal and pass it to the trackers."""
        assert self.journal is not None, 'the run has not begun, or has ended'
        line = self.journal.append(kind, entry)
        self._call_trackers(lambda tracker: tracker.log(line))

    def _update_record(self) -> Record:
        """Replace record.json, and set the time when that may happen next."""
        assert self.journal is not None, 'the run has not begun, or has ended'
        began = time.monotonic()
        record = read_record(self.journal.path)
        write_record(self.run_folder / RECORD, record)
        now = time.monotonic()
        self.record_due = now + (now - began) / RECORD_SHARE
        return record

    def _record_console_lost(self, reason: str) -> None:
        """Record that the run continues without a console."""
        if self.journal:  # otherwise the run has ended
            self._record('event', {'event': 'console_lost', 'iter': None, 'message': reason})

    def _note_nonfinite(self, iter: int, **losses: float | None) -> None:
        """Add an event for each loss that is not finite, which the record has as null."""
        for name, loss in losses.items():
            if loss is not None and not math.isfinite(loss):
                self.event('nonfinite', iter, f'{name} is {loss}')

    def _begin_trackers(self, record: Record, iter: int | None) -> None:
        try:
            events = self._call_trackers(
                lambda tracker: tracker.begin(self.run_folder, record, iter)
            )
        except UserError as error:
            self.trackers = []
            self.finish('failed', reason=str(error))
            raise
        for event in events:
            if event:
                self.event(**event)
        self._repeat_evaluation(iter)

    def _repeat_evaluation(self, iter: int | None) -> None:
        """Pass the evaluation at `iter`, from which a run continues, to the trackers again.

        They may have dropped that step, and the evaluation is not repeated.
        """
        if iter in self.evaluations:
            line = {'kind': 'evaluation', **self.evaluations[iter]}
            self._call_trackers(lambda tracker: tracker.log(line))

    def _call_trackers(self, call: Callable[[Tracker], Any]) -> list:
        """Call every tracker, and stop those that fail: the record is complete without them.

        Raises the UserError of a tracker.
        """
        answers, failures = [], {}
        for tracker in self.trackers:
            try:
                answers.append(call(tracker))
            except UserError:
                raise
            except Exception as error:
                failures[tracker] = ' '.join(str(error).split()).rstrip('.') or type(error).__name__
        self.trackers = [tracker for tracker in self.trackers if tracker not in failures]
        for tracker, reason in failures.items():
            message = f'{tracker.title} logging stopped: {reason}. The record is complete.'
            if self.journal:  # otherwise the run has ended
                self._record('event', {'event': 'sink_failed', 'iter': None, 'message': message})
            self.console.show(event_line('sink_failed', None, message))
        return answers


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec='seconds')
