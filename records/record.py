"""Reading the record of a run, from its journal or its record.json.

`assemble` turns the lines of a journal into the document that `record_schema.json` describes.
record.json is a copy of that document, possibly an older one. This module does not depend on torch.
"""

import json
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError
from records.record_types import JournalLine, Record
from records.run_folders import JOURNAL, RECORD
from records.summary import add_training_seconds, averages, summarize

SCHEMA_VERSION = 1
STATUSES = ('running', 'finished', 'interrupted', 'failed')

# The lists of the document, and the kind of journal line that each collects.
LISTS = {
    'training_iterations': 'iteration',
    'eval_steps': 'evaluation',
    'checkpoints': 'checkpoint',
    'events': 'event',
}
# The document's other keys that are objects. All but the summary are in the first line of the
# journal, and a resumed process may write them again.
OBJECTS = ('config', 'architecture', 'metadata', 'startup_info', 'summary')

# Exceptions raised by reading a file that is not a record.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)

# --- Reading --------------------------------------------------------------------------------------


def read_record(path: str | os.PathLike) -> Record:
    """The document of a run: `path` is its folder, its journal or its record.json.

    In a folder the journal is preferred, since it is always up to date; a torn last line is
    ignored. Raises UserError, naming the file, for anything else.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in (JOURNAL, RECORD) if (path / name).is_file()]
        if not files:
            raise UserError(f'{path} is not a run folder: it has neither {JOURNAL} nor {RECORD}.')
        path = files[0]
    data = read_file(path)
    try:
        if path.suffix == '.jsonl':
            return assemble(parse_journal(data))
        return _check_record(json.loads(data))
    except _MALFORMED as error:
        raise UserError(
            f'{path} is not the record of a run ({type(error).__name__}: {error}). '
            f'Give a run folder, its {JOURNAL} or its {RECORD}.'
        ) from error


def read_outline(path: str | os.PathLike) -> Record:
    """The document without `training_iterations`, its longest part.

    For a run folder whose run has ended only record.json is read. Raises UserError.
    """
    path = Path(path)
    end = _end_line(path / JOURNAL)
    if end is not None:
        try:
            record = _check_record(json.loads(_without_iterations(path / RECORD)))
            ended_then = end['status'] == record['status'] and end['end_time'] == record['end_time']
            if ended_then and 'train_seconds' in record['summary']:
                return record
        except (OSError, *_MALFORMED):
            pass  # the journal is complete
    record = read_record(path)
    record['training_iterations'] = []
    return record


def _end_line(journal: Path) -> JournalLine | None:
    """The last line of a journal if it is an `end` line, else None."""
    try:
        with open(journal, 'rb') as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
            line = json.loads(file.read().rstrip().rpartition(b'\n')[2])
    except (OSError, ValueError):
        return None
    return line if isinstance(line, dict) and line.get('kind') == 'end' else None


def _without_iterations(path: Path) -> bytes:
    """The text of a record.json with an empty `training_iterations`, which is not read.

    Raises OSError, or ValueError for an empty file.
    """
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        begin = text.find(b'\n "training_iterations": [')
        end = text.rfind(b'\n "eval_steps": ')  # strings in JSON contain no line feed
        if not 0 <= begin < end:
            return text[:]
        return text[:begin] + b'\n "training_iterations": [],' + text[end:]


def read_file(path: Path) -> bytes:
    """The content of a journal or a record.json. Raises UserError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}).') from error


def parse_journal(data: bytes) -> list[JournalLine]:
    """A journal's lines. Only the last may be torn, by a crash."""
    parsed = []
    *lines, tail = data.split(b'\n')
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f'line {number} is not JSON') from error
    if is_whole_line(tail):
        parsed.append(json.loads(tail))
    return parsed


def is_whole_line(tail: bytes) -> bool:
    """Whether the text after the last line feed is a complete line except for its line feed."""
    try:
        return isinstance(json.loads(tail), dict)
    except ValueError:
        return False


def _check_record(record: Any) -> Record:
    """The document, if its top level is valid; tests check the rest against the schema.

    Earlier versions averaged rates: such averages in a record.json are computed again.
    """
    if record['schema_version'] != SCHEMA_VERSION:
        raise ValueError(f'schema_version {record["schema_version"]} is not {SCHEMA_VERSION}')
    for keys, kind in ((LISTS, list), (OBJECTS, dict)):
        for key in keys:
            if not isinstance(record[key], kind):
                raise TypeError(f'{key} is not a {kind.__name__}')
    if 'train_seconds' not in record['summary'] and record['training_iterations']:
        record['summary'] |= averages(record['training_iterations'], record['events'])
    return record


# --- From journal to document ---------------------------------------------------------------------


def assemble(lines: Iterable[JournalLine]) -> Record:
    """The document of `record.json` from the parsed lines of a journal.

    A resume or a rollback to iteration k drops the entries after k; if an `iter` still occurs
    twice, the later line is used. A run without an `end` line counts as `running`, also after a
    crash. Raises ValueError, KeyError or TypeError for lines that are not a journal.
    """
    assembly = _Assembly()
    for line in lines:
        assembly.add(line)
    return assembly.record()


class _Assembly:
    """The document of the journal lines that were added so far."""

    def __init__(self) -> None:
        self.document: dict[str, Any] = {'schema_version': SCHEMA_VERSION}
        # Entries by kind and by the key that identifies an entry, usually the iteration.
        self.entries: dict[str, dict[Any, JournalLine]] = {kind: {} for kind in LISTS.values()}
        self.lines = self.rollbacks = 0
        self.process_began = self.last_time = self.earlier_seconds = 0.0

    def add(self, journal_line: JournalLine) -> None:
        line = dict(journal_line)
        kind = line.pop('kind')
        if 'run_name' not in self.document and kind != 'start':
            raise ValueError(f'the first line is of kind {kind!r}, not start')
        if kind in ('start', 'resume'):
            self._begin_process(line)
        self.last_time = max(self.process_began, line['time'])
        if kind == 'start':
            self.document |= {key: line[key] for key in ('run_name', 'start_time')}
        elif kind == 'held':
            del line['time']
            info = self.document['startup_info']
            self.document['startup_info'] = {**info, 'parallel': {**info['parallel'], **line}}
        elif kind == 'end':
            self.document |= {key: line[key] for key in ('end_time', 'status')}
        elif kind in ('resume', 'rollback'):
            self._go_back(kind, line)
        elif kind == 'event':
            # An event that a resumed process repeats happened once.
            key = (line['event'], line['iter'], line.get('message'), self.rollbacks)
            self.entries[kind].pop(key, None)
            self.entries[kind][key] = line
        else:
            del line['time']
            self.entries[kind][line['iter']] = line
        self.lines += 1

    def _begin_process(self, line: JournalLine) -> None:
        self.earlier_seconds += self.last_time - self.process_began
        self.process_began = line['time']
        self.document |= {key: line[key] for key in OBJECTS if key in line}
        self.document |= {'end_time': None, 'status': 'running'}

    def _go_back(self, kind: str, line: JournalLine) -> None:
        """Drop the entries after the checkpoint of `iter` iterations, and add an event for that."""
        for name, entries in self.entries.items():
            # The events before a rollback are part of the run; those of a lost process are not.
            if name == 'event' and kind == 'rollback':
                continue
            # Iteration `iter` comes after that checkpoint; an evaluation at `iter` does not.
            first_dropped = line['iter'] + (name != 'iteration')
            for key, entry in list(entries.items()):
                if entry['iter'] is not None and entry['iter'] >= first_dropped:
                    del entries[key]
        self.rollbacks += kind == 'rollback'
        event = {key: value for key, value in line.items() if key not in OBJECTS}
        self.entries['event'][kind, self.lines] = {'event': kind, **event}

    def record(self) -> Record:
        if 'run_name' not in self.document:
            raise ValueError('it has no start line')
        document: Any = self.document
        for key, kind in LISTS.items():
            entries = self.entries[kind]
            document[key] = [entries[i] for i in (entries if kind == 'event' else sorted(entries))]
        add_training_seconds(document)
        seconds = self.earlier_seconds + self.last_time - self.process_began
        document['summary'] = summarize(document, seconds)
        order = ['schema_version', 'run_name', 'start_time', 'end_time', 'status', *OBJECTS[:-1]]
        record: Any = {key: document[key] for key in [*order, *LISTS, 'summary']}
        return record
