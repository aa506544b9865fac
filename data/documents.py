"""Where documents come from: files of text, JSON lines or Parquet, and Hugging Face datasets.

A source gives its documents in order, in pieces of about a megabyte. It only reads; what takes
time, such as parsing JSON, is left to the `text` of each record, which another process may call.
Where a source stands after a piece is a few plain values, from which it can go on.
"""

import bisect
import glob
import gzip
import hashlib
import importlib
import itertools
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError, nearest
from text_files import decode, is_blank, parse_json

PIECE_BYTES = 2**20
LINE_LIMIT = 2**28  # bytes: what is longer is no line of JSON, and need not fit into memory
ROWS = 256  # of a Parquet file, read at once
SUFFIXES = ('.txt', '.md', '.jsonl', '.jsonl.gz', '.parquet')  # what is looked for in folders


class Invalid(UserError):
    """A document that cannot be used: where it stands and what is the matter."""


class Text(NamedTuple):
    """A document as the bytes of a file, or of a part of one."""

    place: str
    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    def text(self) -> str:
        """The document. Raises Invalid."""
        try:
            return decode(self.content)
        except ValueError as error:
            raise Invalid(f'{self.place} is {error}.') from None


class JsonLine(NamedTuple):
    """A document as a line of JSON, an object that has it under `field`."""

    path: str
    number: int
    field: str
    line: bytes

    @property
    def size(self) -> int:
        return len(self.line)

    def text(self) -> str:
        """The document. Raises Invalid."""
        place = f'{self.path}, line {self.number}'
        try:
            row = parse_json(self.line)
        except ValueError as error:
            raise Invalid(f'{place} is no JSON: {error}.') from None
        if not isinstance(row, dict):
            raise Invalid(f'{place} is no JSON object, so it has no field {self.field!r}.')
        return _text_of(row, self.field, place)


class Row(NamedTuple):
    """A document as a field of a table's row."""

    path: str
    number: int
    field: str
    row: dict[str, Any]

    @property
    def size(self) -> int:
        value = self.row.get(self.field)
        return len(value) if isinstance(value, str) else 1

    def text(self) -> str:
        """The document. Raises Invalid."""
        return _text_of(self.row, self.field, f'{self.path}, row {self.number}')


class Broken(NamedTuple):
    """What stands for documents that cannot be read at all."""

    place: str
    reason: str
    size: int = 1

    def text(self) -> str:
        """Raises Invalid."""
        raise Invalid(f'{self.place} cannot be read: {self.reason}.')


Record = Text | JsonLine | Row | Broken


def _text_of(row: dict, field: str, place: str) -> str:
    if field not in row:
        raise Invalid(
            f'{place} has no field {field!r}, but {", ".join(map(repr, row)) or "none at all"}.'
            f'{nearest(field, row)} Name the one that holds the text: --field=NAME'
        )
    if not isinstance(row[field], str):
        kind = type(row[field]).__name__
        raise Invalid(f'{place}: the field {field!r} is no text, but of type {kind}.')
    return row[field]


class Position(NamedTuple):
    """Where a source stands: records given, how much of its `total` is done, and its own marks."""

    given: int = 0
    done: int = 0
    marks: Any = None


class Piece(NamedTuple):
    """Some records, and where their source stands behind them."""

    records: list[Record]
    position: Position


class Source:
    """What gives documents. Subclasses define `total`, `unit`, `identity` and `records`."""

    total: int | None  # how much there is, in `unit`; None: unknown
    unit: str
    max_documents: int | None = None

    @property
    def is_small(self) -> bool:
        """Whether it is hardly a piece, and not worth starting processes for."""
        return self.unit == 'B' and self.total is not None and self.total < 2 * PIECE_BYTES

    def identity(self) -> dict:
        """What has to be the same for a preparation to go on, in plain values."""
        raise NotImplementedError

    def records(self, marks) -> Iterator[Record]:
        """The records from `marks` (None: the start) on, with `self.at` kept up to date."""
        raise NotImplementedError

    def way_to_more(self) -> str:
        """A sentence on how the user gets more documents out of it."""
        return 'Take more of them: a larger --max_documents or --val_fraction.'

    at: tuple[int, Any] = (0, None)  # done, and the marks, behind the last record given

    def pieces(self, position: Position | None = None) -> Iterator[Piece]:
        """The records from `position` on, in pieces of about PIECE_BYTES."""
        given, _, marks = position or Position()
        records, size = [], 0
        for record in self.records(marks) if given != self.max_documents else ():
            records.append(record)
            size += record.size
            given += 1
            if size >= PIECE_BYTES or given == self.max_documents:
                yield Piece(records, Position(given, *self.at))
                records, size = [], 0
            if given == self.max_documents:
                return
        if records:
            yield Piece(records, Position(given, *self.at))


class Files(Source):
    """The documents of files: of text a file each, or parts of about `cut` bytes; of others a row.

    Raises UserError where there are no files, or a package to read them is missing.
    """

    unit = 'B'

    def __init__(
        self, names: Iterable[str], field: str, cut: int, max_documents: int | None = None
    ):
        self.names, self.field, self.cut = list(names), field, cut
        self.max_documents = max_documents
        self.paths = find_files(self.names)
        stats = [_size_and_time(path) for path in self.paths]
        self.sizes = [size for size, _ in stats]
        self.total = sum(self.sizes)
        listing = hashlib.sha256()
        for path, (size, changed) in zip(self.paths, stats):
            listing.update(f'{os.path.abspath(path)}\0{size}\0{changed}\n'.encode(errors='replace'))
        self.listing = listing.hexdigest()
        if any(path.lower().endswith('.parquet') for path in self.paths):
            optional_package('pyarrow', 'Parquet files')

    def identity(self) -> dict:
        return {
            'paths': self.names,
            'files': len(self.paths),
            'bytes': self.total,
            'listing': self.listing,
            'field': self.field,
            'cut': self.cut,
            'max_documents': self.max_documents,
        }

    def way_to_more(self):
        part = max(self.total // 200, 64)
        return f'To make more documents, cut the texts at blank lines: --cut={part}'

    def records(self, marks):
        first, *begin = marks or (0, 0, 0)
        before = sum(self.sizes[:first])
        for number in range(first, len(self.paths)):
            path, size = self.paths[number], self.sizes[number]
            readers = {'.jsonl': _lines, '.jsonl.gz': _lines, '.parquet': _rows}
            read = next((readers[end] for end in readers if path.lower().endswith(end)), _texts)
            try:
                for record, done, *marks in read(path, self, *begin):
                    self.at = before + min(done, size), [number, *marks]
                    yield record
            except (OSError, EOFError, zlib.error) as error:
                self.at = before + size, [number + 1, 0, 0]
                yield Broken(path, getattr(error, 'strerror', None) or str(error))
            begin, before = (0, 0), before + size


def _texts(path: str, source: Files, offset: int, number: int):
    """(Text, bytes done, offset, parts so far) for the file, or for each part of a long one."""
    with open(path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(offset)
        while content := _part(file, source.cut, size - offset):
            offset, number = offset + len(content), number + 1
            place = path if len(content) == size else f'{path}, part {number}'
            yield Text(place, content), offset, offset, number


def _part(file, size: int, left: int) -> bytes:
    """The next `size` bytes of a text and what belongs to them: up to a blank line if one is near.

    Near is within `size` bytes more; otherwise a line's end counts, and else a character's.
    """
    content = file.read(min(2 * size, left))
    if len(content) <= size:
        return content
    for ending in (b'\n\n', b'\r\n\r\n', b'\n'):
        if (found := content.find(ending, size - 1)) >= 0:
            end = found + len(ending)
            break
    else:
        if len(content) < 2 * size:
            return content
        end = len(content)
        while end > size and content[end - 1] & 0xC0 == 0x80:  # within a character of UTF-8
            end -= 1
        end -= end > size and content[end - 1] >= 0xC0
    file.seek(end - len(content), os.SEEK_CUR)
    return content[:end]


def _lines(path: str, source: Files, offset: int, number: int):
    """(JsonLine, bytes of the file done, offset in what it holds, lines so far)."""
    with open(path, 'rb') as raw:
        file = gzip.GzipFile(fileobj=raw) if path.lower().endswith('.gz') else raw
        file.seek(offset)
        while line := file.readline(LINE_LIMIT):
            if len(line) == LINE_LIMIT:
                raise OSError(f'line {number + 1} is longer than {LINE_LIMIT:,} bytes')
            offset, number = offset + len(line), number + 1
            if not is_blank(line):
                yield JsonLine(path, number, source.field, line), raw.tell(), offset, number


def _rows(path: str, source: Files, number: int, _):
    """(Row, bytes of the file done, rows so far, 0)."""
    import pyarrow
    from pyarrow import parquet

    field, size = source.field, os.path.getsize(path)
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                yield Row(path, 1, field, dict.fromkeys(file.schema_arrow.names)), size, 0, 0
                return
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = list(itertools.accumulate(groups))
            first = bisect.bisect_right(ends, number)
            row, total = sum(groups[:first]), sum(groups)
            later = range(first, len(groups))
            for batch in file.iter_batches(ROWS, row_groups=later, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    if row > number:
                        yield Row(path, row, field, {field: value}), size * row // total, row, 0
    except pyarrow.ArrowException as error:
        raise OSError(str(error).partition('\n')[0]) from None


class HuggingFace(Source):
    """The documents of a dataset on Hugging Face's hub, or in a folder, as they arrive.

    Raises UserError where it cannot be opened, or the package datasets is missing.
    """

    unit = 'documents'

    def __init__(
        self, name: str, subset: str | None, split: str, field: str, max_documents: int | None
    ):
        self.name, self.subset, self.split, self.field = name, subset, split, field
        self.max_documents = max_documents
        datasets = optional_package('datasets', 'Hugging Face datasets')
        try:
            self.dataset = datasets.load_dataset(name, subset, split=split, streaming=True)
        except Exception as error:  # of the hub, the network, or its many formats
            raise UserError(f'--hf={name} cannot be opened: {_brief(error)}') from None
        if field in (self.dataset.column_names or ()):
            self.dataset = self.dataset.select_columns([field])
        splits = self.dataset.info.splits or {}
        sizes = [splits[split].num_examples] if split in splits else []
        self.total = min([*filter(None, [*sizes, max_documents])], default=None)
        self.number = 0

    def identity(self) -> dict:
        return {
            'hf': self.name,
            'subset': self.subset,
            'split': self.split,
            'field': self.field,
            'max_documents': self.max_documents,
        }

    @property
    def at(self):
        return self.number, [self.number, self.dataset.state_dict()]

    def records(self, marks):
        self.number = 0
        if marks:
            self.number, state = marks
            self.dataset.load_state_dict(state)
        try:
            for row in self.dataset:
                self.number += 1
                yield Row(self.name, self.number, self.field, row)
        except Exception as error:  # whatever a download can raise
            raise UserError(f'{self.name}, after row {self.number}: {_brief(error)}') from None


def _brief(error: Exception) -> str:
    return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'


def optional_package(name: str, purpose: str):
    """The module `name`. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'{purpose} need the package {name}: pip install {name}') from None


def find_files(names: Iterable[str]) -> list[str]:
    """The files that files, folders and glob patterns stand for, each once, in that order.

    A folder stands for all files in and below it that end in one of SUFFIXES; what is hidden is
    left out. Raises UserError for a name that stands for nothing.
    """
    found = {}
    for name in names:
        matches = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        files = [file for match in matches for file in _below(match)]
        if not files:
            raise UserError(_nothing_there(name, matches))
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def _below(path: str) -> list[str]:
    """The file itself, or the files of a folder that end in one of SUFFIXES."""
    if not os.path.isdir(path):
        return [path]
    return sorted(file for file in _all_below(path) if file.lower().endswith(SUFFIXES))


def _all_below(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith('.')]
        yield from (os.path.join(parent, name) for name in files if not name.startswith('.'))


def _nothing_there(name: str, matches: list[str]) -> str:
    if not matches:
        parent = os.path.dirname(name) or '.'
        beside = os.listdir(parent) if os.path.isdir(parent) else []
        return f'There is no file or folder {name}.{nearest(os.path.basename(name), beside)}'
    others = Counter(Path(file).suffix for match in matches for file in _all_below(match))
    message = f'{name} holds no file that ends in {", ".join(SUFFIXES)}'
    if not others:
        return f'{message}: it is empty.'
    ((suffix, count),) = others.most_common(1)
    pattern = os.path.join(matches[0], '**', f'*{suffix}')
    return f"{message}, but {count:,} that end in {suffix!r}. To read those as text: '{pattern}'"


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:  # told when it is read
        return 0, 0
    return stat.st_size, stat.st_mtime_ns
