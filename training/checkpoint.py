"""Checkpoints that survive crashes: atomic save, verified load, retention.

A checkpoint is a folder `checkpoints/iter_00000100/` with `state.pt` (tensors and plain values,
read with `weights_only=True`) and `index.json` (the iterations done, the loss, the options of the
run, and the SHA-256 of `state.pt` and of itself). It is written under a temporary name, synced,
and published by one rename, so a published checkpoint is always complete. A checkpoint that is
saved again, after a resume or a rollback, is published as `iter_00000100_2` before the first is
removed. No code is stored.

Not torch.distributed.checkpoint (DCP): its metadata is a pickle, which can execute code, and it
has neither checksums nor a single rename that publishes a whole checkpoint.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.serialization import config as serialization

from common.errors import UserError
from common.files import file_chunks
from common.text_files import is_count
from parallel.process_group import SINGLE_PROCESS, SingleProcessGroup

FORMAT = 'architecture-checkpoint'
VERSION = 1
REPORT_SECONDS = 10  # between two signs of life of ranks that verify files
_NAME = re.compile(r'iter_(\d{8,})(?:_(\d+))?')


def _is_loss(value) -> bool:
    return value is None or (type(value) is float and math.isfinite(value))


def _is_dict(value) -> bool:
    return isinstance(value, dict)


def _is_names(value) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_files(value) -> bool:
    return (
        isinstance(value, dict)
        and list(value) == [state_file(rank) for rank in range(len(value))] != []
        and all(
            isinstance(facts, dict)
            and type(facts.get('sha256')) is str
            and is_count(facts.get('bytes'))
            for facts in value.values()
        )
    )


def _is_vocabulary(value) -> bool:
    return value is None or (
        isinstance(value, dict)
        and _is_dict(value.get('tokenizer'))
        and is_count(value.get('vocab_size'))
    )


def _is_data_seen(value) -> bool:
    return _is_dict(value) and all(
        type(amount) in (int, float) and amount >= 0
        for amount in value.values()
        if amount is not None
    )


# The keys of an index besides its format and version, and a check of each value.
_INDEX_CHECKS = {
    'data': _is_vocabulary,
    'seen': _is_data_seen,
    'iter': is_count,
    'val_loss': _is_loss,
    'files': _is_files,
    'config_files': _is_names,
    **dict.fromkeys(
        ('progress', 'config', 'chosen', 'commanded', 'architecture', 'surroundings'), _is_dict
    ),
}


# Keys added after the first version, and their values for older checkpoints.
_LATER_KEYS: dict[str, dict | None] = {'data': None, 'seen': {}}


class BrokenCheckpoint(UserError):
    """A checkpoint that cannot be read, with the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint: its folder and its index."""

    path: Path
    index: dict

    @property
    def iter(self) -> int:
        return self.index['iter']

    @property
    def val_loss(self) -> float | None:
        return self.index['val_loss']


class _HashingFile:
    """A file that hashes what is written to it, so that it need not be read back."""

    def __init__(self, file):
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class PendingCheckpoint:
    """A checkpoint that is being written to `folder/iter_<index['iter']>`.

    Every rank constructs one, writes its part of the state to a file of its own, and calls
    `publish`. Only `write` does not communicate: it may run in another thread.

        construct  folder .saving-iter_00000100-<random>/             by the main rank
        write      state.pt, state_1.pt, …, synced and hashed         by each rank
        publish    index.json with all hashes, synced; then renamed   by the main rank
    """

    def __init__(self, folder: Path, index: dict, process_group: SingleProcessGroup):
        """index: plain values, including `iter` and `val_loss`. Raises UserError as `publish`."""
        self.index, self.process_group = index, process_group
        self.temporary, self.final = process_group.broadcast_from_main(
            lambda: _make_folder(folder, index['iter'])
        )
        self.facts: dict | None = None
        self.problem: str | None = None
        self.seconds = 0.0  # time of writing; once published, of the slowest rank

    def write(self, state: dict) -> None:
        """Write this rank's file to the disk. An error is raised by `publish`."""
        began = time.perf_counter()
        try:
            self.facts = _write_state(self.temporary / state_file(self.process_group.rank), state)
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch's zip writer raises RuntimeError after an OSError
            self.problem = write_failure(error)
        self.seconds = time.perf_counter() - began

    def publish(self) -> Checkpoint:
        """Publish the checkpoint once all ranks have written, and remove an older one of the
        same iteration.

        Raises UserError on every rank if a part could not be written; earlier checkpoints are
        intact then.
        """
        # Collect the files of all ranks, or the reasons why they could not be written.
        facts, problems, seconds = zip(
            *self.process_group.all_gather_object((self.facts, self.problem, self.seconds)),
            strict=True,
        )
        self.seconds = max(seconds)
        # Write the index, with the hash of every file and of itself.
        files = {state_file(rank): written for rank, written in enumerate(facts)}
        index = {'format': FORMAT, 'version': VERSION, **self.index, 'files': files}
        index['sha256'] = index_sha256(index)
        failures = [problem for problem in problems if problem is not None]
        self.process_group.broadcast_from_main(
            lambda: _publish(self.temporary, self.final, index, failures)
        )
        return Checkpoint(self.final, index)


def state_file(rank: int) -> str:
    """The name of a rank's file: `state.pt`, `state_1.pt`, …"""
    return f'state_{rank}.pt' if rank else 'state.pt'


def _make_folder(folder: Path, iter: int) -> tuple[Path, Path]:
    """A new temporary folder, and its final path."""
    replaced = _checkpoints_at(folder, iter)
    again = f'_{_iter_and_attempt(replaced[0])[1] + 1}' if replaced else ''
    final = folder / f'iter_{iter:08d}{again}'
    temporary = folder / f'.saving-{final.name}-{uuid.uuid4().hex[:8]}'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        temporary.mkdir()
    except OSError as error:
        raise _cannot_write(final, write_failure(error)) from error
    return temporary, final


def _write_state(path: Path, state: dict) -> dict:
    """Write a rank's file to the disk. Returns its size and checksum."""
    # Skip the zip format's CRC-32, which is slow and weaker than SHA-256.
    with open(path, 'wb') as raw, serialization.patch('save.compute_crc32', False):
        file = _HashingFile(raw)
        torch.save(state, file)
        raw.flush()
        os.fsync(raw.fileno())
    return {'bytes': file.bytes, 'sha256': file.sha256.hexdigest()}


def _publish(temporary: Path, final: Path, index: dict, problems: list[str]) -> None:
    """Rename the folder that all ranks have written, or remove it if there are problems."""
    replaced = _checkpoints_at(final.parent, index['iter'])
    try:
        if problems:
            raise _cannot_write(final, problems[0])
        # Sync the index and the folder before the rename, and the rename before the old checkpoint
        # is removed: one of the two is complete whenever the machine fails.
        with open(temporary / 'index.json', 'w', encoding='utf-8') as text:
            json.dump(index, text, indent=1, allow_nan=False)
            text.flush()
            os.fsync(text.fileno())
        _sync_folder(temporary)
        os.rename(temporary, final)
        _sync_folder(final.parent)
        for path in replaced:
            _remove(path)
    except OSError as error:
        raise _cannot_write(final, write_failure(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone if it was published


def write_failure(error: BaseException) -> str:
    """The reason of a failed write: the system's error behind that of torch's zip writer."""
    cause = error  # closing a zip file on a full disk raises a second error
    while cause.__context__ is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    system = cause.strerror if isinstance(cause, OSError) else None
    return system or str(error).partition('\n')[0]


def _cannot_write(final: Path, reason: str) -> UserError:
    return UserError(
        f'the checkpoint {final} could not be written: {reason}. Earlier checkpoints and the '
        f'record are intact. Free space or repair the folder, then continue the run with '
        f'--init_from=resume.'
    )


def index_sha256(index: dict) -> str:
    """The hash that an index contains: of its other entries, as sorted JSON."""
    rest = {key: value for key, value in index.items() if key != 'sha256'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load_state(
    checkpoint: Checkpoint, process_group: SingleProcessGroup = SINGLE_PROCESS
) -> list[dict]:
    """The state of each rank, on the CPU, after the checksums are verified.

    The ranks of the group, which must all call this, divide the files to verify them. The tensors
    are memory-mapped. Raises BrokenCheckpoint, the same on every rank.
    """
    files = list(checkpoint.index['files'].items())
    problems: list[str] = []
    # One step for each chunk of this rank's part.
    steps = chain.from_iterable(
        _verify(checkpoint.path / name, facts, problems)
        for name, facts in files[process_group.rank :: process_group.world_size]
    )
    all_done = False
    while not all_done:  # exchange signs of life, so that a long wait is not taken for a lost rank
        until = time.monotonic() + REPORT_SECONDS
        done = not any(time.monotonic() > until for _ in steps)
        all_done = process_group.all_reduce_max([0.0 if done else 1.0]) == [0.0]
    problems = list(chain(*process_group.all_gather_object(problems)))
    if problems:
        raise BrokenCheckpoint(*problems)
    return [_load_file(checkpoint.path / name) for name, _ in files]


def _verify(path: Path, expected: dict, problems: list[str]) -> Iterator[None]:
    """Compare a file with its checksum, in steps; a problem is added to `problems`."""
    sha256, size = hashlib.sha256(), 0
    try:
        for chunk in file_chunks(path):
            sha256.update(chunk)
            size += len(chunk)
            yield
    except OSError as error:
        problems.append(f'{path} cannot be read: {error.strerror}')
        return
    if sha256.hexdigest() != expected['sha256']:
        problems.append(
            f'{path} is damaged: its SHA-256 differs from that in index.json '
            f'({size:,} bytes, {expected["bytes"]:,} expected).'
        )


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Raise BrokenCheckpoint if a file is missing or has another size."""
    for name, facts in checkpoint.index['files'].items():
        path = checkpoint.path / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise BrokenCheckpoint(f'{path} cannot be read: {error.strerror}') from error
        if size != facts['bytes']:
            raise BrokenCheckpoint(
                f'{path} is damaged: {size:,} bytes, {facts["bytes"]:,} expected.'
            )


def _load_file(path: Path) -> dict:
    try:
        state = load_tensors(path)
    except Exception as error:  # the unpickler raises all kinds of errors for a foreign file
        raise BrokenCheckpoint(unreadable_tensors(path, error)) from error
    if not isinstance(state, dict):
        raise BrokenCheckpoint(f'{path} is not a checkpoint of this program.')
    return state


def unreadable_tensors(path: Path, error: Exception) -> str:
    """The error message for a file that `load_tensors` could not read.

    torch's own message recommends weights_only=False, which executes code in the file.
    """
    return (
        f'{path} cannot be read as tensors and plain values ({type(error).__name__}). No code in '
        f'it was run.'
    )


def load_tensors(path: Path):
    """The tensors and plain values of a file written by torch.save, memory-mapped.

    A file whose name is not UTF-8, which torch's reader cannot open, is read into memory, and so
    is one of torch before version 1.6, which did not write zip archives.
    """
    mapped = zipfile.is_zipfile(path)
    if os.fsencode(path) != str(path).encode(errors='replace'):
        with open(path, 'rb') as file:
            return torch.load(file, map_location='cpu', weights_only=True)
    return torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)


def read_index(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`. Raises BrokenCheckpoint."""
    file = path / 'index.json'
    try:
        index = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f'{file} cannot be read: {error}') from error
    if not (isinstance(index, dict) and index.get('format') == FORMAT):
        raise BrokenCheckpoint(f'{file} is not the index of a checkpoint of this program.')
    if index.get('version') != VERSION:
        raise BrokenCheckpoint(
            f'{file} has version {index.get("version")!r}; this program reads version {VERSION}.'
        )
    if index.get('sha256') != index_sha256(index):
        raise BrokenCheckpoint(f'{file} is damaged: its SHA-256 differs from that in the file.')
    index = {**_LATER_KEYS, **index}
    wrong = [key for key, fits in _INDEX_CHECKS.items() if key not in index or not fits(index[key])]
    if wrong:
        raise BrokenCheckpoint(f'{file}: missing or invalid values: {", ".join(wrong)}.')
    return Checkpoint(path, index)


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders of all checkpoints, newest first."""
    if not folder.is_dir():
        return []
    folders = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(folders, key=_iter_and_attempt, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Whether the path is a checkpoint folder, possibly broken or renamed."""
    return path.is_dir() and bool(
        _NAME.fullmatch(path.absolute().name) or (path / 'index.json').is_file()
    )


def _iter_and_attempt(path: Path) -> tuple[int, int]:
    """The iteration in a checkpoint's name, and its number: 1, or 2 for `_2`."""
    match = _NAME.fullmatch(path.name)
    assert match is not None  # list_checkpoints returns no other names
    return int(match[1]), int(match[2] or 1)


def _checkpoints_at(folder: Path, iter: int) -> list[Path]:
    """The checkpoints of one iteration, latest first."""
    return [path for path in list_checkpoints(folder) if _iter_and_attempt(path)[0] == iter]


def load_latest(
    folder: Path, warn, process_group: SingleProcessGroup = SINGLE_PROCESS
) -> tuple[Checkpoint, list[dict]] | None:
    """The newest readable checkpoint and its state; None if there is no checkpoint.

    warn: called with a message for each newer one that is broken. process_group: the ranks that
    verify the files together. Raises BrokenCheckpoint if all are broken.
    """
    return _newest(folder, warn, process_group, partial(load_state, process_group=process_group))


def find_latest(folder: Path, warn) -> Checkpoint | None:
    """As `load_latest`, but of the files only the sizes are compared, and nothing is loaded."""
    newest = _newest(folder, warn, SINGLE_PROCESS, _check_sizes)
    return newest and newest[0]


def _newest(
    folder: Path, warn, process_group: SingleProcessGroup, read: Callable[[Checkpoint], Any]
) -> tuple[Checkpoint, Any] | None:
    """The newest checkpoint for which `read` raises no error, and its result."""
    problems: list[str] = []
    for path in process_group.broadcast_from_main(lambda: list_checkpoints(folder)):
        try:
            checkpoint = process_group.broadcast_from_main(partial(read_index, path))
            result = read(checkpoint)
        except UserError as error:
            problems.extend(error.problems)
            continue
        for problem in problems:
            warn(f'{problem} Using the previous checkpoint: {path}.')
        return checkpoint, result
    if problems:
        raise BrokenCheckpoint(
            *problems,
            f'{folder} has no readable checkpoint. Choose another run, or start a new one with '
            f'train.py --init_from=scratch.',
        )
    return None


def prune(saved: Checkpoint, keep_last: int, keep_best: bool) -> None:
    """Remove all but the newest `keep_last` checkpoints and, with `keep_best`, the best one.

    saved: the checkpoint just published. Newer ones are broken; they do not count and stay for
    inspection. The best has the lowest validation loss; among equals the newest.
    """
    paths = list_checkpoints(saved.path.parent)
    paths = paths[paths.index(saved.path) :]
    retained = set(paths[:keep_last])
    if keep_best:
        losses: dict[Path, float] = {}
        for path in paths:
            with contextlib.suppress(BrokenCheckpoint):
                loss = read_index(path).val_loss
                if loss is not None:
                    losses[path] = loss
        if losses:
            retained.add(min(losses, key=losses.__getitem__))
    for path in paths:
        if path not in retained:
            with contextlib.suppress(OSError):  # a folder that cannot be removed stays
                _remove(path)


def remove_leftovers(folder: Path) -> None:
    """Remove the files of a save or a removal that was cut off by a crash."""
    for path in folder.glob('.saving-*'):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint by a rename first, so that it is never incomplete."""
    doomed = path.with_name(f'.saving-removed-{path.name}-{uuid.uuid4().hex[:8]}')
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    if os.name == 'posix':  # elsewhere a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
