"""The record of a run: a crash-proof journal and the document made from it.

A run is a folder `out_dir/run_<date>_<time>/`. While it trains, each thing that happens becomes
one line of `journal.jsonl`, handed to the operating system before the console shows it, so that a
crash loses at most the last line. `assemble` turns those lines into the document that people and
`compare_architectures.py` read; `record.json` is a copy of it, replaced in one step at the start,
at the end and, as long as that is cheap, after evaluations. `record_schema.json` describes it.

Plain numbers come in, JSON goes out: nothing here knows torch, devices or components. What a person
reads while the run goes on is `console.py`'s.
"""

import functools
import json
import math
import mmap
import os
import re
import time
from bisect import bisect_left
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from common.errors import UserError
from common.files import replace_file
from common.folders import walk
from records import console

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SCHEMA_VERSION = 1
JOURNAL, RECORD = 'journal.jsonl', 'record.json'
STATUSES = ('running', 'finished', 'interrupted', 'failed')

# The most of a run's time that keeping record.json up to date at evaluations may take: with 100,000
# entries, writing it takes seconds. The journal is never behind.
RECORD_SHARE = 0.01

# The lists of the document, and the kind of journal line that each collects.
LISTS = {
    'training_iterations': 'iteration',
    'eval_steps': 'evaluation',
    'checkpoints': 'checkpoint',
    'events': 'event',
}
# The document's other keys that are objects. They come with the first line of the journal, all but
# the summary, and a resumed process may state them again.
OBJECTS = ('config', 'architecture', 'metadata', 'startup_info', 'summary')

# ------------------------------------------------------------------------------------------------
# Run folders
# ------------------------------------------------------------------------------------------------

_RUN_NAME = re.compile(r'run_(\d{8}_\d{6})(?:_(\d+))?')
# At the beginning of a journal and of a record.json. In the texts of both quotes are escaped.
_START_TIME = re.compile(rb'"start_time": "([^"]*)"')
# Big folders that hold no runs; hidden ones and virtual environments are left out as well.
_NOT_SEARCHED = {'data', 'node_modules', 'site-packages', '__pycache__'}


def new_run_folder(out_dir, now: datetime | None = None) -> Path:
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


def latest_run(out_dir, job: str | None = None) -> Path | None:
    """The run in `out_dir` that began last, or None; of one second by name (`_2` before `_10`).

    Given a `job`, the newest of those that it began or went on with last, if there are any. A
    folder without a journal or record belongs to a run that ended before it began: not counted.
    """
    runs = []
    for folder in Path(out_dir).glob('run_*'):
        match = _RUN_NAME.fullmatch(folder.name)
        if match and (began := _began(folder)) is not None:
            runs.append((began, match[1], int(match[2] or 1), folder))
    folders = [folder for *_, folder in sorted(runs, reverse=True)]
    of_job = (folder for folder in folders if job is not None and _job_of(folder) == job)
    return next(of_job, folders[0] if folders else None)


def _began(folder: Path) -> float | None:
    """When a run began, in seconds since 1970; None where it never did.

    The time in its folder's name is local, so that it depends on the time zone; it stands in only
    where neither journal nor record tell.
    """
    began = None
    for name in (JOURNAL, RECORD):
        try:
            with open(folder / name, 'rb') as file:
                head = file.read(4096)
        except OSError:
            continue
        if not head:
            continue
        stated = _START_TIME.search(head)
        try:
            return datetime.fromisoformat(stated[1].decode()).timestamp()
        except (TypeError, ValueError, OverflowError, OSError):  # TypeError: not stated there
            began = began or _local_time(folder.name)
    return began


def _local_time(name: str) -> float:
    """The time in the name of a run's folder."""
    try:
        return datetime.strptime(_RUN_NAME.fullmatch(name)[1], '%Y%m%d_%H%M%S').timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0  # digits, but no date


def _job_of(folder: Path) -> str | None:
    """The job that began a run or went on with it last; None where its journal does not tell."""
    try:
        data = (folder / JOURNAL).read_bytes()
        at = data.rfind(b'\n{"kind": "resume"') + 1  # 0, the start, where it was never resumed
        return json.loads(data[at:].partition(b'\n')[0])['metadata'].get('job')
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def find_records(root) -> list[Path]:
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


# ------------------------------------------------------------------------------------------------
# From journal to document
# ------------------------------------------------------------------------------------------------


def read_record(path) -> dict:
    """The document of a run: `path` is its folder, its journal or its record.json.

    In a folder the journal comes first, since it is never behind; a torn last line is left out.
    Raises UserError, naming the file, for anything else.
    """
    path = Path(path)
    if path.is_dir():
        held = [path / name for name in (JOURNAL, RECORD) if (path / name).is_file()]
        if not held:
            raise UserError(f'{path}: no run there, since it holds no {JOURNAL} and no {RECORD}.')
        path = held[0]
    data = _read(path)
    try:
        return assemble(_parse(data)) if path.suffix == '.jsonl' else _checked(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{path}: not the record of a run ({type(error).__name__}: {error}). '
            f'Give a run folder, its {JOURNAL} or its {RECORD}.'
        ) from error


def read_outline(path) -> dict:
    """The document without `training_iterations`, which are most of it and take longest to read.

    Of a run that has ended, in a folder, only record.json is read. Raises UserError.
    """
    path = Path(path)
    record = path / RECORD
    if path.is_dir() and record.is_file() and (end := _last_line(path / JOURNAL)) is not None:
        try:
            document = _checked(json.loads(_without_iterations(record)))
            if (
                all(end[key] == document[key] for key in ('status', 'end_time'))
                and 'train_seconds' in document['summary']
            ):
                return document
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass  # the journal says it all
    return {**read_record(path), 'training_iterations': []}


def _last_line(journal: Path) -> dict | None:
    """The `end` line of a journal that closes with one."""
    try:
        with open(journal, 'rb') as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
            line = json.loads(file.read().rstrip().rpartition(b'\n')[2])
    except (OSError, ValueError):
        return None
    return line if isinstance(line, dict) and line.get('kind') == 'end' else None


def _without_iterations(path: Path) -> bytes:
    """The text of a record.json with an empty list in place of its longest one, which is not read.

    Raises OSError, or ValueError for an empty file.
    """
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        begin = text.find(b'\n "training_iterations": [')
        end = text.rfind(b'\n "eval_steps": ')  # no string in JSON has a line end of its own
        if not 0 <= begin < end:
            return text[:]
        return text[:begin] + b'\n "training_iterations": [],' + text[end:]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}).') from error


def _parse(data: bytes) -> list[dict]:
    """A journal's lines. Only the last may be broken: that is how far a crash reaches."""
    lines = []
    *whole, tail = data.split(b'\n')
    for number, line in enumerate(whole, 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f'line {number} is not JSON') from error
    if _is_whole(tail):
        lines.append(json.loads(tail))
    return lines


def _is_whole(tail: bytes) -> bool:
    """Whether what follows the last line end lacks nothing but its own line end."""
    try:
        return isinstance(json.loads(tail), dict)
    except ValueError:
        return False


def _checked(document) -> dict:
    """The document, if its outline is right. The schema says the rest, and tests hold us to it.

    Earlier versions averaged rates: where a record.json has their averages, they are taken again.
    """
    if document['schema_version'] != SCHEMA_VERSION:
        raise ValueError(f'schema_version {document["schema_version"]} is not {SCHEMA_VERSION}')
    for keys, kind in ((LISTS, list), (OBJECTS, dict)):
        for key in keys:
            if not isinstance(document[key], kind):
                raise TypeError(f'{key} is no {kind.__name__}')
    if 'train_seconds' not in document['summary'] and document['training_iterations']:
        document['summary'] |= _speed(document['training_iterations'], document['events'])
    return document


def assemble(lines: Iterable[dict]) -> dict:
    """The document of `record.json` from the parsed lines of a journal.

    A resume or a rollback to iteration k takes back what was done after k; where an `iter` still
    occurs twice, the later line holds. A run without an `end` line counts as `running`, a crashed
    one included. Raises ValueError, KeyError or TypeError for lines that are no journal.
    """
    document = {'schema_version': SCHEMA_VERSION}
    lists = {kind: {} for kind in LISTS.values()}
    began = last = wall_seconds = 0.0
    rollbacks = 0
    for number, line in enumerate(lines):
        line = dict(line)
        kind = line.pop('kind')
        if 'run_name' not in document and kind != 'start':
            raise ValueError(f'the first line is of kind {kind!r}, not start')
        if kind in ('start', 'resume'):
            wall_seconds += last - began
            began = line['time']
            document |= {key: line[key] for key in OBJECTS if key in line}
            document |= {'end_time': None, 'status': 'running'}
        last = max(began, line['time'])

        if kind == 'start':
            document |= {key: line[key] for key in ('run_name', 'start_time')}
        elif kind == 'held':
            info, found = document['startup_info'], {k: line[k] for k in line if k != 'time'}
            document['startup_info'] = {**info, 'parallel': {**info['parallel'], **found}}
        elif kind == 'end':
            document |= {key: line[key] for key in ('end_time', 'status')}
        elif kind in ('resume', 'rollback'):
            # A rollback is part of the run: what led to it happened. A lost process's did not.
            taken_back = set(lists) if kind == 'resume' else set(lists) - {'event'}
            _take_back({name: lists[name] for name in taken_back}, line['iter'])
            rollbacks += kind == 'rollback'
            entry = {key: value for key, value in line.items() if key not in OBJECTS}
            lists['event'][kind, number] = {'event': kind, **entry}
        elif kind == 'event':
            # What a resumed process meets a second time happened once.
            key = (line['event'], line['iter'], line.get('message'), rollbacks)
            lists[kind].pop(key, None)
            lists[kind][key] = line
        else:
            del line['time']
            lists[kind][line['iter']] = line
    if 'run_name' not in document:
        raise ValueError('it has no start line')
    wall_seconds += last - began

    for key, kind in LISTS.items():
        entries = lists[kind]
        document[key] = [entries[i] for i in (entries if kind == 'event' else sorted(entries))]
    _note_training_time(document)
    document['summary'] = _summary(document, wall_seconds)
    order = ['schema_version', 'run_name', 'start_time', 'end_time', 'status', *OBJECTS[:-1]]
    return {key: document[key] for key in [*order, *LISTS, 'summary']}


def _note_training_time(document: dict) -> None:
    """Give each evaluation the seconds that the updates before it took, as far as they are logged.

    A log entry stands for its `steps` updates up to and with its own.
    """
    ends, totals = [0], [0.0]  # after so many updates, so many seconds
    for entry in document['training_iterations']:
        begin = max(ends[-1], entry['iter'] + 1 - entry['steps'])
        for end, milliseconds in ((begin, 0.0), (entry['iter'] + 1, entry['time_ms'])):
            totals.append(totals[-1] + (end - ends[-1]) * (milliseconds or 0.0) / 1000)
            ends.append(end)
    for entry in document['eval_steps']:
        place = bisect_left(ends, entry['iter'])
        if place == len(ends):
            entry['train_seconds'] = None
            continue
        beyond, width = ends[place] - entry['iter'], ends[place] - ends[max(place - 1, 0)]
        part = (totals[place] - totals[max(place - 1, 0)]) * beyond / width if beyond else 0.0
        entry['train_seconds'] = round(totals[place] - part, 6)


def _gradient_growth(iterations: list[dict]) -> float | None:
    """The gradient norm's mean over the last quarter of the log against that over the second.

    The first has the warm-up in it. None: too short a log.
    """
    norms = [(entry.get('gradients') or {}).get('norm') for entry in iterations]
    norms = [norm for norm in norms if norm is not None]
    quarter = len(norms) // 4
    if quarter < 2:
        return None
    early, late = sum(norms[quarter : 2 * quarter]), sum(norms[-quarter:])
    return late / early if early else None


def _take_back(lists: dict, k: int) -> None:
    """Drop what came after the checkpoint of k updates: batch k and later, the rest beyond k."""
    for kind, entries in lists.items():
        kept_below = k if kind == 'iteration' else k + 1
        for key, entry in list(entries.items()):
            if entry['iter'] is not None and entry['iter'] >= kept_below:
                del entries[key]


def _summary(document: dict, wall_seconds: float) -> dict:
    """What the run came to; None where nothing tells. Counts are those after `final_iter` updates,
    the last that an iteration, an evaluation or a checkpoint recorded."""
    iterations, evaluations = document['training_iterations'], document['eval_steps']
    entries = [(entry['iter'] + 1, entry) for entry in iterations]
    entries += [(entry['iter'], entry) for entry in evaluations + document['checkpoints']]
    final_iter = max((done for done, _ in entries), default=0)
    best = _best(evaluations)
    seen = _seen([entry for done, entry in entries if done == final_iter], document, final_iter)
    tokens = seen.pop('tokens_seen')
    per_token = document['startup_info']['flops']['per_token']
    events = document['events']
    return {
        'total_iterations': document['config'].get('max_iters'),
        'final_iter': final_iter,
        'final_train_loss': iterations[-1]['loss'] if iterations else None,
        'best_val_loss': best and best['val_loss'],
        'final_val_loss': evaluations[-1]['val_loss'] if evaluations else None,
        'val_bits_per_byte': best and best['val_bits_per_byte'],
        **_speed(iterations, events),
        'total_tokens': tokens,
        **seen,
        'total_flops': None if tokens is None or per_token is None else tokens * per_token,
        'wall_seconds': round(wall_seconds, 3),
        'peak_memory_gb': max(filter(None, map(console.memory_peak, iterations)), default=None),
        # A loss that is logged as not finite is an event of this kind too, but counts no updates.
        'nonfinite_updates': sum(e.get('count', 0) for e in events if e['event'] == 'nonfinite'),
        'loss_spikes': sum(event['event'] == 'loss_spike' for event in events),
        'gradient_growth': _gradient_growth(iterations),
    }


def _seen(at_the_end: list[dict], document: dict, final_iter: int) -> dict:
    """The data that `final_iter` updates have seen, from the entries of that moment.

    Records of before have the tokens in iterations alone: what came after the last is added.
    """
    keys = ('tokens_seen', 'epochs', 'unique_tokens')
    seen = {key: next((e[key] for e in at_the_end if key in e), None) for key in keys}
    iterations = document['training_iterations']
    if seen['tokens_seen'] is None and iterations:
        last, per_iter = iterations[-1], document['startup_info']['data'].get('tokens_per_iter')
        seen['tokens_seen'] = last['tokens_seen']
        if per_iter is not None:
            seen['tokens_seen'] += (final_iter - last['iter'] - 1) * per_iter
    return seen


def _speed(iterations: list[dict], events: list[dict]) -> dict:
    """Averages over the updates, each from totals: all time over all updates, and all FLOPs over
    those that the peak allows in that time. A mean of rates would count slow updates too little.
    """
    # A process warms up (compilation, caches) in its first logged step: no part of an average.
    starts = [0, *(event['iter'] for event in events if event['event'] == 'resume')]
    warm_up = {next((e['iter'] for e in iterations if e['iter'] >= k), None) for k in starts}
    steady = [entry for entry in iterations if entry['iter'] not in warm_up] or iterations
    timed = [(e, e['time_ms'] * e['steps']) for e in steady if e['time_ms'] is not None]
    steps, milliseconds = sum(e['steps'] for e, _ in timed), sum(ms for _, ms in timed)
    possible = achieved = 0.0  # TFLOP/s times ms
    for entry, ms in timed:
        mfu = entry['mfu']
        if mfu['mfu_percent'] is not None and mfu['hardware_peak_tflops'] is not None:
            possible += mfu['hardware_peak_tflops'] * ms
            achieved += mfu['hardware_peak_tflops'] * ms * mfu['mfu_percent'] / 100
    trained = [e['time_ms'] * e['steps'] for e in iterations if e['time_ms'] is not None]
    return {
        'avg_mfu': 100 * achieved / possible if possible else None,
        'avg_time_ms': milliseconds / steps if steps else None,
        'train_seconds': round(sum(trained) / 1000, 6) if trained else None,
    }


def _best(evaluations: Iterable[dict]) -> dict | None:
    measured = [entry for entry in evaluations if entry['val_loss'] is not None]
    return min(measured, key=lambda entry: entry['val_loss'], default=None)


# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------


def _strict(value):
    """`value` as strict JSON has it: a float that is not finite is unknown, a tuple is a list."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


class _Journal:
    """A file to which whole lines are added, one `write` each, so that none waits in a buffer.

    While it is open, no other process can open it so; reading it is free.
    """

    def __init__(self, path: Path, *, new: bool):
        self.path = path
        flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT | os.O_EXCL if new else 0)
        try:
            self.fd = os.open(path, flags, 0o666)
        except OSError as error:
            raise UserError(f'{path}: cannot be opened for writing ({error.strerror}).') from error
        try:
            self._lock()
            self._mend()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        """Keep others out until the file is closed, which happens however this process ends."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f'{self.path.parent}: another process is training this run. Wait for its end or '
                'stop it first; --init_from=scratch starts a run of its own instead.'
            ) from error
        except OSError:
            pass  # a file system that has no locks

    def _mend(self) -> None:
        """Give a torn last line its line end if that is all it lacks, and cut it off otherwise."""
        data = _read(self.path)
        tail = data[data.rfind(b'\n') + 1 :]
        try:
            if _is_whole(tail):
                os.write(self.fd, b'\n')
            elif tail:
                os.ftruncate(self.fd, len(data) - len(tail))
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def append(self, kind: str, entry: dict) -> dict:
        """Write one line, and return it. One that does not fit on the disk leaves no trace."""
        line = _strict({'kind': kind, 'time': round(time.time(), 3), **entry})
        data = (json.dumps(line, allow_nan=False) + '\n').encode()
        size = os.fstat(self.fd).st_size
        try:
            while data:
                data = data[os.write(self.fd, data) :]
        except OSError as error:
            os.ftruncate(self.fd, size)
            raise _cannot_write(self.path, error) from error
        return line

    def close(self) -> None:
        os.close(self.fd)


def _write_record(path: Path, document: dict) -> None:
    """Replace `path` in one step: whatever goes wrong, the file there is whole, old or new."""
    try:
        replace_file(path, _to_json(document).encode())
    except OSError as error:
        raise _cannot_write(path, error) from error


def _to_json(document: dict) -> str:
    """Indented where people look, one line an entry where there are thousands."""
    parts = []
    for key, value in document.items():
        if key in LISTS:
            rows = ',\n  '.join(json.dumps(entry, allow_nan=False) for entry in value)
            text = f'[\n  {rows}\n ]' if rows else '[]'
        else:
            text = json.dumps(value, indent=1, allow_nan=False).replace('\n', '\n ')
        parts.append(f' {json.dumps(key)}: {text}')
    return '{\n' + ',\n'.join(parts) + '\n}\n'


def _cannot_write(path: Path, error: OSError) -> UserError:
    what = error.strerror
    if error.filename not in (None, str(path), path):
        what += f': {error.filename}'
    return UserError(
        f'{path}: cannot be written ({what}). What was recorded before is intact. '
        'Make room or mend the folder, then continue the run with --init_from=resume.'
    )


# ------------------------------------------------------------------------------------------------
# The logger
# ------------------------------------------------------------------------------------------------


def _on_main(method):
    """Every rank calls every method; only the main one has anything to write."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        return method(self, *args, **kwargs) if self.is_main else None

    return guarded


class TrainingLogger:
    """Writes one run's journal and record.json, and shows the run on the console.

    `style` and `stream` are the console's. Entries are those of `record_schema.json`; any float in
    them that is not finite is recorded as null. Every method raises UserError when the disk takes
    no more, and leaves what was recorded before as it was. The `sinks` (`sinks.py`) are given what
    the journal is given, after it.
    """

    def __init__(
        self, run_folder, *, is_main=True, style='auto', stream=None, max_iters: int, sinks=()
    ):
        self.is_main = is_main
        self.sinks = list(sinks)
        self.run_folder = run_folder and Path(run_folder)  # other ranks may have none
        self.console = console.Console(
            style, stream, max_iters=max_iters, on_lost=self._note_console_lost
        )
        self.journal = None
        self.evaluations = {}  # by iter
        self.record_due = 0.0  # when record.json may be written next, on the monotonic clock

    @_on_main
    def start(self, config: dict, architecture: dict, metadata: dict, startup_info: dict) -> None:
        """Begin a new run's journal and show the start-up report."""
        report = console.startup_report(
            config, architecture, startup_info, self.run_folder, metadata.get('weights_from')
        )
        self.journal = _Journal(self.run_folder / JOURNAL, new=True)
        self.journal.append(
            'start',
            {
                'run_name': self.run_folder.name,
                'start_time': _now(),
                'config': config,
                'architecture': architecture,
                'metadata': metadata,
                'startup_info': startup_info,
            },
        )
        document = self._write_record()
        self.console.begin(report, startup_info['hardware'])
        self._begin_sinks(document, None)

    @_on_main
    def resume(
        self,
        iter: int,
        *,
        checkpoint: str,
        changed: dict,
        config: dict,
        metadata: dict,
        startup_info: dict,
    ) -> dict | None:
        """Continue the folder's journal from the `checkpoint` of `iter` updates.

        `changed` is key → [old, new] for what differs from the earlier process: options, versions.
        Returns the document as it now is. Raises UserError where the folder holds no journal to
        continue, or another process does so.
        """
        read_record(self.run_folder / JOURNAL)
        self.journal = _Journal(self.run_folder / JOURNAL, new=False)
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
        document = self._write_record()
        self.evaluations = {entry['iter']: entry for entry in document['eval_steps']}
        report = console.resume_report(iter, checkpoint, changed, self.run_folder)
        self.console.begin(report, startup_info['hardware'])
        self._begin_sinks(document, iter)
        return document

    @_on_main
    def held(self, entry: dict) -> None:
        """Record what a rank holds, which joins `startup_info.parallel`."""
        self._record('held', entry)

    @_on_main
    def iteration(self, entry: dict) -> None:
        """Record and show an entry of `training_iterations`. A lost loss becomes an event too."""
        self._record('iteration', entry)
        self.console.iteration(entry)
        self._note_nonfinite(entry, 'loss')

    @_on_main
    def evaluation(self, entry: dict) -> None:
        """Record and show an entry of `eval_steps`; bring record.json up to date if that is due."""
        self._record('evaluation', entry)
        if time.monotonic() >= self.record_due:
            self._write_record()
        self.evaluations[entry['iter']] = _strict(entry)
        self.console.evaluation(entry, _best(self.evaluations.values()))
        self._note_nonfinite(entry, 'train_loss', 'val_loss')

    @_on_main
    def checkpoint(self, entry: dict) -> None:
        """Record and show an entry of `checkpoints`."""
        self._record('checkpoint', entry)
        self.console.show(console.checkpoint_line(entry))

    @_on_main
    def event(self, kind: str, iter: int | None, message: str | None = None, **extra) -> None:
        """Record and show that something out of the ordinary happened after `iter` updates."""
        entry = {'event': kind, 'iter': iter, **extra}
        if message is not None:
            entry['message'] = message
        self._record('event', entry)
        self.console.show(console.event_line(entry))

    @_on_main
    def rollback(self, iter: int, *, from_iter: int, checkpoint: str, message: str) -> None:
        """Record and show that the run went back to the `checkpoint` of `iter` updates.

        What was recorded after that, up to `from_iter`, is taken back. The rollback is an event.
        """
        entry = {'iter': iter, 'from_iter': from_iter, 'checkpoint': checkpoint, 'message': message}
        self._record('rollback', entry)
        self.evaluations = {n: e for n, e in self.evaluations.items() if n <= iter}
        self._feed_evaluation(iter)
        self.console.rollback({'event': 'rollback', **entry})

    @_on_main
    def finish(self, status: str = 'finished', reason: str | None = None) -> dict | None:
        """End the run as `finished`, `interrupted` or `failed`: record.json, closing summary.

        The `reason`, which is told to the user elsewhere, becomes an event of that name.

        Returns the summary, which is computed from the journal alone. Does nothing, and returns
        None, before `start` and on ranks that are not main.

        After `failed` no UserError is raised, only shown: what ended the run is on its way to the
        user, often the very same full disk, and must not be replaced. The result is None then.
        """
        assert status in STATUSES[1:], status
        if self.journal is None:
            return None
        end = {'status': status, 'end_time': _now(), 'time': round(time.time(), 3)}
        path, document = self.run_folder / RECORD, None
        try:
            if reason:
                self._record('event', {'event': status, 'iter': None, 'message': reason})
            document = assemble([*_parse(_read(self.journal.path)), {'kind': 'end', **end}])
            self.journal.append('end', {**end, 'summary': document['summary']})
            _write_record(path, document)
        except UserError as error:
            if status != 'failed':
                raise
            self.console.show(f'⚠ {error}')
            return None
        finally:
            self.journal.close()
            self.journal = None
            self._feed('end', status, document and document['summary'])
        best = _best(document['eval_steps'])
        self.console.show(console.closing_block(document, best, path))
        return document['summary']

    def _record(self, kind: str, entry: dict) -> None:
        """Write a line of the journal, and give the same line to the sinks."""
        self._feed('take', self.journal.append(kind, entry))

    def _note_console_lost(self, reason: str) -> None:
        """Record that the run goes on without being shown."""
        if self.journal:  # else it has its last line
            event = {'event': 'console_lost', 'iter': None, 'message': reason}
            self._record('event', event)

    def _begin_sinks(self, document: dict, iter: int | None) -> None:
        try:
            events = self._feed('begin', self.run_folder, document, iter)
        except UserError as error:
            self.sinks = []
            self.finish('failed', reason=str(error))
            raise
        for event in events:
            if event:
                self.event(**event)
        self._feed_evaluation(iter)

    def _feed_evaluation(self, iter: int | None) -> None:
        """Tell the sinks once more of the evaluation with which a run goes on from `iter`.

        They may take back the whole of that step, and the evaluation is not made again.
        """
        if iter in self.evaluations:
            self._feed('take', {'kind': 'evaluation', **self.evaluations[iter]})

    def _feed(self, action: str, *arguments) -> list:
        """Have every sink do that. One that cannot is given up: it is the record that counts.

        Raises UserError where a sink has one.
        """
        answers, failed = [], {}
        for sink in self.sinks:
            try:
                answers.append(getattr(sink, action)(*arguments))
            except UserError:
                raise
            except Exception as error:
                failed[sink] = ' '.join(str(error).split()).rstrip('.') or type(error).__name__
        self.sinks = [sink for sink in self.sinks if sink not in failed]
        for sink, reason in failed.items():
            event = {
                'event': 'sink_failed',
                'iter': None,
                'message': f'{sink.title} is told nothing more of this run: {reason}. '
                'The record has it all.',
            }
            if self.journal:  # else it has its last line
                self._record('event', event)
            self.console.show(console.event_line(event))
        return answers

    def _note_nonfinite(self, entry: dict, *keys: str) -> None:
        """The record has null for such a loss; an event says that it was measured, and what."""
        for key in keys:
            if entry[key] is not None and not math.isfinite(entry[key]):
                self.event('nonfinite', entry['iter'], f'{key} is {entry[key]}')

    def _write_record(self) -> dict:
        began = time.monotonic()
        document = read_record(self.journal.path)
        _write_record(self.run_folder / RECORD, document)
        now = time.monotonic()
        self.record_due = now + (now - began) / RECORD_SHARE
        return document


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec='seconds')
