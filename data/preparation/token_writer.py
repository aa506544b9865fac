"""Write token files so that a process killed at any time loses little and corrupts nothing."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.errors import UserError
from data.preparation.sources import SourcePosition
from data.token_files import SPLITS
from data.tokenizer import Tokenizer

JOURNAL = 'journal.jsonl'
COMMIT_SECONDS = 2  # of work that is lost at most
BLOCK = 2**20  # bytes read at once


class TokenWriter:
    """Token files in `folder`, in shards of `shard_bytes`, and a journal of their content.

    A line of the journal describes the tokens of one batch, and is written after these are on disk.
    When the folder is opened again, tokens without a line are cut off; `position` (None: the start)
    and `totals` are those of the last line. Errors of writing are raised as OSError.
    """

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.position: SourcePosition | None = None
        self.totals: dict[str, Any] = {'empty': 0, 'invalid': 0}
        self.totals |= {s: {'token_bytes': 0, 'bytes': 0, 'documents': 0} for s in SPLITS}
        self._files: dict[str, tuple[int, BinaryIO]] = {}
        self._uncommitted: list[str] = []
        self._committed_at = time.monotonic()
        valid_bytes = self._recover()
        self._journal = open(self._journal_path, 'ab')  # noqa: SIM115 closed by close()
        self._journal.truncate(valid_bytes)

    def add(self, entry: dict, tokens: dict[str, bytes]) -> None:
        """Append the `tokens` of each split, which `entry` describes (see `Encoder`)."""
        for split, content in tokens.items():
            self._write(split, memoryview(content))
        self._count(entry)
        self._uncommitted.append(json.dumps(entry) + '\n')
        if time.monotonic() - self._committed_at > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Flush everything to disk, so that it survives even a power failure."""
        for _, file in self._files.values():
            _flush_to_disk(file)
        self._journal.write(''.join(self._uncommitted).encode())
        _flush_to_disk(self._journal)
        self._uncommitted = []
        self._committed_at = time.monotonic()

    def close(self) -> None:
        """Commit and close. On a full disk, only the last lines may be lost."""
        with contextlib.suppress(OSError):
            self.commit()
        for file in (self._journal, *(file for _, file in self._files.values())):
            with contextlib.suppress(OSError):
                file.close()

    def shards(self, split: str) -> list[Path]:
        """The files of the split, in order."""
        count = -(-self.totals[split]['token_bytes'] // self.shard_bytes)
        return [self._shard(split, number) for number in range(count)]

    def check(self, tokenizer: Tokenizer, dtype: str) -> dict[str, dict]:
        """Read everything back: SHA-256 of each split, and of each of its shards in order.

        Checks that the bytes are those that the encoding process hashed, that every document ends
        with the end-of-text token, and that a document of each batch decodes to its text. Raises
        UserError.
        """
        readers = {split: _HashingReader(self.shards(split)) for split in SPLITS}
        for entry in self._entries():
            for split, split_info in entry['splits'].items():
                tokens = readers[split].read(split_info['token_bytes'])
                problem = _batch_problem(tokens, split_info, tokenizer, dtype)
                if problem:
                    raise UserError(
                        f'The {split} tokens in {self.folder} differ from what was written: '
                        f'{problem}. The disk or the memory may be faulty. Add --restart to start '
                        'over.'
                    )
        return {
            split: {'sha256': reader.digest(), 'shards': reader.digests()}
            for split, reader in readers.items()
        }

    def _entries(self) -> Iterator[dict]:
        with open(self._journal_path, 'rb') as journal:
            yield from map(json.loads, journal)

    def _recover(self) -> int:
        """Read the journal as far as the token files go; return the size of that part in bytes."""
        sizes = {split: self._size_on_disk(split) for split in SPLITS}
        valid_bytes = 0
        with contextlib.suppress(FileNotFoundError), open(self._journal_path, 'rb') as journal:
            for line in journal:
                try:
                    entry = json.loads(line)
                    after = {s: self._end(s) + entry['splits'][s]['token_bytes'] for s in SPLITS}
                except (ValueError, KeyError, TypeError):
                    break
                if any(after[split] > sizes[split] for split in SPLITS):
                    break
                self._count(entry)
                for split in SPLITS:
                    self.totals[split]['token_bytes'] = after[split]
                valid_bytes += len(line)
        for split in SPLITS:
            self._truncate(split)
        return valid_bytes

    @property
    def _journal_path(self) -> Path:
        return self.folder / JOURNAL

    def _end(self, split: str) -> int:
        return self.totals[split]['token_bytes']

    def _count(self, entry: dict) -> None:
        self.position = SourcePosition(*entry['position'])
        for key in ('empty', 'invalid'):
            self.totals[key] += entry[key]
        for split, split_info in entry['splits'].items():
            for key in ('bytes', 'documents'):
                self.totals[split][key] += split_info[key]

    def _write(self, split: str, content: memoryview) -> None:
        while content:
            number, offset = divmod(self._end(split), self.shard_bytes)
            part = content[: self.shard_bytes - offset]
            self._open(split, number).write(part)
            self.totals[split]['token_bytes'] += len(part)
            content = content[len(part) :]

    def _open(self, split: str, number: int):
        opened, file = self._files.get(split, (None, None))
        if opened != number:
            if file:
                _flush_to_disk(file)
                file.close()
            file = open(self._shard(split, number), 'ab')  # noqa: SIM115 closed by close()
            self._files[split] = number, file
        return file

    def _shard(self, split: str, number: int) -> Path:
        return self.folder / f'{split}_{number:05d}.bin'

    def _size_on_disk(self, split: str) -> int:
        """Bytes up to the first shard that is not full."""
        size = number = 0
        while (path := self._shard(split, number)).exists():
            size += path.stat().st_size
            number += 1
            if size < number * self.shard_bytes:
                break
        return size

    def _truncate(self, split: str) -> None:
        shards = self.shards(split)
        for path in self.folder.glob(f'{split}_*.bin'):
            if path not in shards:
                path.unlink()
        if offset := self._end(split) % self.shard_bytes:
            os.truncate(shards[-1], offset)


def read_positions(folder: Path) -> list[SourcePosition]:
    """The position of the source after each batch in the journal of a folder."""
    positions = []
    with contextlib.suppress(FileNotFoundError), open(folder / JOURNAL, 'rb') as journal:
        for line in journal:
            try:
                positions.append(SourcePosition(*json.loads(line)['position']))
            except (ValueError, KeyError, TypeError):
                break
    return positions


def truncate_journal(folder: Path, count: int) -> None:
    """Keep the first `count` batches; the writer then cuts off the tokens of the others."""
    with contextlib.suppress(FileNotFoundError), open(folder / JOURNAL, 'r+b') as journal:
        for _ in range(count):
            journal.readline()
        journal.truncate(journal.tell())


class _HashingReader:
    """Files read as one stream, with the SHA-256 of each file and of the whole."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self._whole = hashlib.sha256()
        self._each = [hashlib.sha256() for _ in paths]
        self._number = -1
        self._file: BinaryIO | None = None

    def read(self, size: int) -> bytes:
        """The next `size` bytes, or the rest."""
        blocks = []
        while size:
            block = self._file.read(min(size, BLOCK)) if self._file else b''
            if not block:
                if self._number + 1 == len(self.paths):
                    break
                self._next_file()
                continue
            if len(self.paths) > 1:  # the digest of a single file is that of the whole
                self._whole.update(block)
            self._each[self._number].update(block)
            blocks.append(block)
            size -= len(block)
        return b''.join(blocks)

    def digest(self) -> str:
        """The digest of all files together."""
        return (self._whole if len(self.paths) > 1 else self._each[0]).hexdigest()

    def digests(self) -> list[str]:
        """The digest of each file, in order."""
        return [digest.hexdigest() for digest in self._each]

    def _next_file(self) -> None:
        if self._file:
            self._file.close()
        self._number += 1
        self._file = open(self.paths[self._number], 'rb')  # noqa: SIM115 closed here or at the end


def _batch_problem(tokens: bytes, split_info: dict, tokenizer: Tokenizer, dtype: str) -> str | None:
    """The problem with the tokens of one batch, described by `split_info` of the journal."""
    if hashlib.sha256(tokens).hexdigest() != split_info['sha256']:
        return 'their SHA-256 differs'
    ids = np.frombuffer(tokens, dtype)
    ends = 0 if tokenizer.end_of_text is None else np.count_nonzero(ids == tokenizer.end_of_text)
    if ends != split_info['documents']:
        return f'{split_info["documents"]} documents have {ends} end-of-text tokens'
    for start, count, digest in split_info['samples']:
        text = tokenizer.decode(ids[start : start + count])
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            return f'a document does not decode to its text: {text[:60]!r}'
    return None


def _flush_to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())
