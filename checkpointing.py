"""Checkpoints that survive crashes: atomic save, verified load, retention.

A checkpoint is a folder `checkpoints/iter_00000100/` holding `state.pt` (tensors and plain values,
read with `weights_only=True`) and `index.json` (the updates done, the loss, the options of the
run, and the SHA-256 of every file beside it). It is written under a temporary name, synced, and
published by one rename, so a folder of that name is whole or it is not there. No code is stored.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch

from errors import UserError

FORMAT = 'architecture-checkpoint'
VERSION = 1
_NAME = re.compile(r'iter_(\d{8,})')


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


def save(folder: Path, state: dict, index: dict) -> Checkpoint:
    """Publish `state` as `folder/iter_<index['iter']>`; one that is there already is replaced.

    index: plain values, with `iter` and `val_loss` among them. Raises UserError if it cannot be
    written; every checkpoint that was there before is then still whole.
    """
    final = folder / f'iter_{index["iter"]:08d}'
    temporary = folder / f'.saving-{final.name}-{uuid.uuid4().hex[:8]}'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        temporary.mkdir()
        with open(temporary / 'state.pt', 'wb') as raw:
            file = _HashingFile(raw)
            torch.save(state, file)
            raw.flush()
            os.fsync(raw.fileno())
        files = {'state.pt': {'bytes': file.bytes, 'sha256': file.sha256.hexdigest()}}
        index = {'format': FORMAT, 'version': VERSION, **index, 'files': files}
        with open(temporary / 'index.json', 'w', encoding='utf-8') as text:
            json.dump(index, text, indent=1, allow_nan=False)
            text.flush()
            os.fsync(text.fileno())
        _sync_folder(temporary)
        if final.exists():
            _remove(final)
        os.rename(temporary, final)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into the latter
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(
            f'the checkpoint {final} could not be written: {reason}. Earlier checkpoints and the '
            f'record are intact. Make room or choose another --out_dir, then --init_from=resume.'
        ) from error
    return Checkpoint(final, index)


def load_state(checkpoint: Checkpoint) -> dict:
    """The state of a checkpoint, on the CPU, once its checksum is verified.

    Raises BrokenCheckpoint.
    """
    path = checkpoint.path / 'state.pt'
    expected = checkpoint.index['files']['state.pt']
    try:
        with open(path, 'rb') as file:
            found = hashlib.file_digest(file, 'sha256').hexdigest()
        if found != expected['sha256']:
            raise BrokenCheckpoint(
                f'{path} is damaged: its SHA-256 is not the one that index.json gives '
                f'({path.stat().st_size:,} bytes, {expected["bytes"]:,} expected).'
            )
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise BrokenCheckpoint(f'{path} cannot be read: {str(error).splitlines()[0]}') from error
    if not isinstance(state, dict):
        raise BrokenCheckpoint(f'{path} holds no checkpoint of this program.')
    return state


def read_index(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`. Raises BrokenCheckpoint."""
    file = path / 'index.json'
    try:
        index = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f'{file} cannot be read: {error}') from error
    if not (isinstance(index, dict) and index.get('format') == FORMAT):
        raise BrokenCheckpoint(f'{file} is not the index of a checkpoint of this program.')
    if index.get('version') != VERSION:
        raise BrokenCheckpoint(
            f'{file} has version {index.get("version")!r}; this program reads {VERSION}.'
        )
    shape = {'iter': int, 'files': dict, 'progress': dict, 'config_files': list}
    shape |= dict.fromkeys(('config', 'chosen', 'architecture', 'surroundings'), dict)
    missing = [key for key, kind in shape.items() if not isinstance(index.get(key), kind)]
    if missing or not isinstance(index['files'].get('state.pt'), dict):
        raise BrokenCheckpoint(f'{file} lacks {", ".join(missing) or "the checksum of state.pt"}.')
    return Checkpoint(path, index)


def published(folder: Path) -> list[Path]:
    """The folders of all checkpoints, the newest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest(folder: Path, warn) -> tuple[Checkpoint, dict] | None:
    """The newest checkpoint that can be read, and its state; None if there is none at all.

    warn: told, a sentence each, of newer ones that are broken. Raises BrokenCheckpoint if all are.
    """
    problems = []
    for path in published(folder):
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
        raise BrokenCheckpoint(*problems)
    return None


def prune(folder: Path, keep_last: int, keep_best: bool) -> None:
    """Remove all but the newest `keep_last` checkpoints and, with `keep_best`, the best one.

    The best is that of the lowest validation loss; of equals the newest.
    """
    paths = published(folder)
    kept = set(paths[:keep_last])
    if keep_best:
        scored = []
        for path in paths:
            try:
                checkpoint = read_index(path)
            except BrokenCheckpoint:
                continue
            if checkpoint.val_loss is not None:
                scored.append((checkpoint.val_loss, -checkpoint.iter, path))
        if scored:
            kept.add(min(scored)[2])
    for path in paths:
        if path not in kept:
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
