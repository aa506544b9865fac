"""Checkpoints that survive crashes: atomic save, verified load, retention.

A checkpoint is a folder `checkpoints/iter_00000100/` holding `state.pt` (tensors and plain values,
read with `weights_only=True`) and `index.json` (the updates done, the loss, the options of the
run, and SHA-256 sums of `state.pt` and of itself). It is written under a temporary name, synced,
and published by one rename, so a folder of that name is whole or it is not there. One that is saved
a second time, after a resume or a rollback, is published as `iter_00000100_2` before the first
goes. No code is stored.

Not torch.distributed.checkpoint (DCP): its metadata are a pickle, which runs what it says, and it
has neither checksums nor a rename that publishes all of a checkpoint at once.
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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.serialization import config as serialization

from common.errors import UserError
from common.files import file_sha256
from common.text_files import is_count
from parallel.process_group import SingleProcessGroup

FORMAT = 'architecture-checkpoint'
VERSION = 1
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


# What an index holds beside its format and version, and how it is known to be that.
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


# Keys that came after the first version, and what stands for them in older checkpoints.
_LATER_KEYS: dict[str, dict | None] = {'data': None, 'seen': {}}


class BrokenCheckpoint(UserError):
    """A checkpoint that cannot be used, and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint: its folder and what its index says."""

    path: Path
    index: dict

    @property
    def iter(self) -> int:
        return self.index['iter']

    @property
    def val_loss(self) -> float | None:
        return self.index['val_loss']


class _HashingFile:
    """Hashes what is written through it, so that a checkpoint is not read back to be summed."""

    def __init__(self, file):
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class PendingCheckpoint:
    """A checkpoint on its way to `folder/iter_<index['iter']>`.

    Every rank makes one, writes its own part of the state to a file of its own, and publishes,
    which the main rank does for all. Only `write` talks to nobody: it may run in another thread.

        made       folder .saving-iter_00000100-<random>/             by the main rank
        write      state.pt, state_1.pt, …, synced and hashed         by each rank
        publish    index.json with all hashes, synced; then renamed   by the main rank
    """

    def __init__(self, folder: Path, index: dict, process_group: SingleProcessGroup):
        """index: plain values, with `iter` and `val_loss` among them. Raises UserError as below."""
        self.index, self.process_group = index, process_group
        self.temporary, self.final = process_group.broadcast_from_main(
            lambda: _make_folder(folder, index['iter'])
        )
        self.facts: dict | None = None
        self.problem: str | None = None
        self.seconds = 0.0  # that writing took; once published, on the slowest rank

    def write(self, state: dict) -> None:
        """Write this rank's file to the disk. Whatever prevents that is told by `publish`."""
        began = time.perf_counter()
        try:
            self.facts = _write_state(self.temporary / state_file(self.process_group.rank), state)
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch's zip writer makes the latter of the former
            self.problem = write_failure(error)
        self.seconds = time.perf_counter() - began

    def publish(self) -> Checkpoint:
        """Give it its name, when all have written; one of the same iteration is then removed.

        Raises UserError, on every rank, if anything could not be written; every checkpoint that was
        there before is then still whole.
        """
        # What each rank has written, or why it could not.
        facts, problems, seconds = zip(
            *self.process_group.all_gather_object((self.facts, self.problem, self.seconds)),
            strict=True,
        )
        self.seconds = max(seconds)
        # The index names every file by its hash, and itself.
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
    """A new folder to write to, and the name that it is to have."""
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
    """Write a rank's file to the disk; its size and checksum."""
    # The zip's own CRC-32 takes longer than all else, and SHA-256 says more.
    with open(path, 'wb') as raw, serialization.patch('save.compute_crc32', False):
        file = _HashingFile(raw)
        torch.save(state, file)
        raw.flush()
        os.fsync(raw.fileno())
    return {'bytes': file.bytes, 'sha256': file.sha256.hexdigest()}


def _publish(temporary: Path, final: Path, index: dict, problems: list[str]) -> None:
    """Rename the folder that every rank has written to, or remove it if one of them could not."""
    replaced = _checkpoints_at(final.parent, index['iter'])
    try:
        if problems:
            raise _cannot_write(final, problems[0])
        # The index and the folder reach the disk before the name, the name before what it replaces
        # goes: whenever the machine dies, one of the two is there and whole.
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
        shutil.rmtree(temporary, ignore_errors=True)  # nothing is there if it was published


def write_failure(error: BaseException) -> str:
    """Why it could not be written: what the system said before torch's zip writer spoke."""
    cause = error  # closing a zip file on a full disk fails once more
    while cause.__context__ is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    system = cause.strerror if isinstance(cause, OSError) else None
    return system or str(error).partition('\n')[0]


def _cannot_write(final: Path, reason: str) -> UserError:
    return UserError(
        f'the checkpoint {final} could not be written: {reason}. Earlier checkpoints and the '
        f'record are intact. Make room or mend the folder, then continue the run with '
        f'--init_from=resume.'
    )


def index_sha256(index: dict) -> str:
    """The sum that an index holds of itself: over all else in it, as sorted JSON."""
    rest = {key: value for key, value in index.items() if key != 'sha256'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load_state(checkpoint: Checkpoint) -> list[dict]:
    """The state that each rank wrote, on the CPU, once the checksums are verified.

    The tensors are mapped from the files, not read at once. Raises BrokenCheckpoint.
    """
    return [
        _load_file(checkpoint.path / name, facts)
        for name, facts in checkpoint.index['files'].items()
    ]


def _load_file(path: Path, expected: dict) -> dict:
    try:
        sha256, size = file_sha256(path), path.stat().st_size
    except OSError as error:
        raise BrokenCheckpoint(f'{path} cannot be read: {error.strerror}') from error
    if sha256 != expected['sha256']:
        raise BrokenCheckpoint(
            f'{path} is damaged: its SHA-256 is not the one that index.json gives '
            f'({size:,} bytes, {expected["bytes"]:,} expected).'
        )
    try:
        state = load_tensors(path)
    except Exception as error:  # a foreign file makes the unpickler fail in every way there is
        raise BrokenCheckpoint(unreadable_tensors(path, error)) from error
    if not isinstance(state, dict):
        raise BrokenCheckpoint(f'{path} holds no checkpoint of this program.')
    return state


def unreadable_tensors(path: Path, error: Exception) -> str:
    """What to say of a file that `load_tensors` could not read.

    The error's own words would send people to weights_only=False, which runs what a file says.
    """
    return (
        f'{path} cannot be read as tensors and plain values ({type(error).__name__}); whatever '
        f'else it holds was not run.'
    )


def load_tensors(path: Path):
    """What torch wrote to the file: tensors and plain values only, mapped from the file.

    Read into memory where the name is not UTF-8, which torch's own reader does not open, or where
    torch before version 1.6 wrote it, which was no zip archive.
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
            f'{file} has version {index.get("version")!r}; this program reads {VERSION}.'
        )
    if index.get('sha256') != index_sha256(index):
        raise BrokenCheckpoint(f'{file} is damaged: its SHA-256 is not the one that it gives.')
    index = {**_LATER_KEYS, **index}
    wrong = [key for key, fits in _INDEX_CHECKS.items() if key not in index or not fits(index[key])]
    if wrong:
        raise BrokenCheckpoint(f'{file} lacks {", ".join(wrong)}, or has something else there.')
    return Checkpoint(path, index)


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders of all checkpoints, the newest first."""
    if not folder.is_dir():
        return []
    folders = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(folders, key=_iter_and_attempt, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Whether that is the folder of a checkpoint, be it broken, or under another name."""
    return path.is_dir() and bool(
        _NAME.fullmatch(path.absolute().name) or (path / 'index.json').is_file()
    )


def _iter_and_attempt(path: Path) -> tuple[int, int]:
    """Updates done, and which checkpoint of that moment this is: 1, or 2 for `_2`."""
    match = _NAME.fullmatch(path.name)
    assert match is not None  # list_checkpoints gives no other names
    return int(match[1]), int(match[2] or 1)


def _checkpoints_at(folder: Path, iter: int) -> list[Path]:
    """The checkpoints of one moment, the latest saved first."""
    return [path for path in list_checkpoints(folder) if _iter_and_attempt(path)[0] == iter]


def load_latest(folder: Path, warn) -> tuple[Checkpoint, list[dict]] | None:
    """The newest checkpoint that can be read, and its state; None if there is none at all.

    warn: told, a sentence each, of newer ones that are broken. Raises BrokenCheckpoint if all are.
    """
    problems: list[str] = []
    for path in list_checkpoints(folder):
        try:
            checkpoint = read_index(path)
            state = load_state(checkpoint)
        except BrokenCheckpoint as error:
            problems.extend(error.problems)
            continue
        for problem in problems:
            warn(f'{problem} The one before it is used: {path}.')
        return checkpoint, state
    if problems:
        raise BrokenCheckpoint(
            *problems,
            f'{folder} holds no checkpoint that can be used: name another run, or start anew with '
            f'train.py --init_from=scratch.',
        )
    return None


def prune(saved: Checkpoint, keep_last: int, keep_best: bool) -> None:
    """Remove all but the newest `keep_last` checkpoints and, with `keep_best`, the best one.

    saved: the one just published. Any that claims to be newer was passed over as broken, so it
    counts for nothing and is left for somebody to look at. The best is that of the lowest
    validation loss; of equals the newest.
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
            with contextlib.suppress(OSError):  # what cannot be removed stays
                _remove(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what a crash during a save or a removal left behind."""
    for path in folder.glob('.saving-*'):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint such that it is whole or gone, whenever the process dies."""
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
