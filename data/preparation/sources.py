"""Where documents come from: files of text, JSON or Parquet, and Hugging Face datasets.

A source gives its documents in order, in pieces of about a megabyte. It only reads; what takes
time, such as parsing JSON, is left to the `text` of each record, which another process may call.
Where a source stands after a piece is a few plain values, from which it can go on.
"""

import bisect
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from common.errors import UserError, did_you_mean
from common.packages import optional_package
from common.text_files import BYTE_ORDER_MARK, decode, is_blank, json_values, parse_json
from data.preparation.corpus_files import (
    JSON,
    SNIFFED,
    find_files,
    kind_of,
    opened,
    zstandard,
)

PIECE_BYTES = 2**20
LINE_LIMIT = 2**28  # bytes: what is longer is no line of JSON, and need not fit into memory
ROWS = 256  # of a Parquet file, read at once


class Invalid(UserError):
    """A document that cannot be used: where it stands and what is the matter."""


class Text(NamedTuple):
    """A document as the bytes of a file, or of a part of one."""

    place: str
    content: bytes

    @property
    def raw(self) -> bytes:
        return self.content

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
    def raw(self) -> bytes:
        return self.line

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
        return _text_of(row, self.field, place)


class Row(NamedTuple):
    """A document as a field of a table's row."""

    path: str
    number: int
    field: str
    row: Any

    @property
    def raw(self) -> bytes:
        return repr(self.row).encode(errors='replace')

    @property
    def size(self) -> int:
        value = self.row.get(self.field) if isinstance(self.row, dict) else None
        return len(value) if isinstance(value, str) else 1

    def text(self) -> str:
        """The document. Raises Invalid."""
        return _text_of(self.row, self.field, f'{self.path}, row {self.number}')


class Broken(NamedTuple):
    """What stands for documents that cannot be read at all."""

    place: str
    reason: str
    size: int = 1
    raw: bytes = b''

    def text(self) -> str:
        """Raises Invalid."""
        raise Invalid(f'{self.place} cannot be read: {self.reason}.')


Record = Text | JsonLine | Row | Broken


def _text_of(row, field: str, place: str) -> str:
    if not isinstance(row, dict):
        raise Invalid(f'{place} is no JSON object, so it has no field {field!r}.')
    if isinstance(row.get(field), str):
        return row[field]
    texts = [name for name in row if isinstance(row[name], str)]
    if field in row:
        problem = (
            f'{place}: the field {field!r} is no text, but of type {type(row[field]).__name__}.'
        )
    else:
        names = ', '.join(map(repr, row)) or 'none at all'
        problem = f'{place} has no field {field!r}, but {names}.{did_you_mean(field, texts)}'
    if not texts:
        raise Invalid(f'{problem} No field of it is text.')
    # The longest is most likely what is meant, if it has no name like it.
    likely = max(texts, key=lambda name: (bool(did_you_mean(field, [name])), len(row[name])))
    raise Invalid(f'{problem} If all rows have their text there: --field={likely}')


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
    notes: Sequence[str] = ()  # sentences on what is left out of it

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

    def files(self) -> list:
        """What tells the files apart from what they may become, in plain values, in order."""
        return []

    def unchanged(self, before: list, positions: Sequence[Position]) -> int:
        """How many pieces, which end at `positions`, are as when `files()` was `before`."""
        return 0

    at: tuple[int, Any] = (0, None)  # done, and the marks, behind the last record given

    def mark(self) -> tuple[int, Any]:
        """`at`, for the position behind a piece, which ends here."""
        return self.at

    def pieces(self, position: Position | None = None) -> Iterator[Piece]:
        """The records from `position` on, in pieces of about PIECE_BYTES."""
        given, _, marks = position or Position()
        records, size = [], 0
        for record in self.records(marks) if given != self.max_documents else ():
            records.append(record)
            size += record.size
            given += 1
            if size >= PIECE_BYTES or given == self.max_documents:
                yield Piece(records, Position(given, *self.mark()))
                records, size = [], 0
            if given == self.max_documents:
                return
        if records:
            yield Piece(records, Position(given, *self.mark()))


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
        self.paths, self.notes = find_files(self.names)
        stats = [_size_and_time(path) for path in self.paths]
        self.sizes = [size for size, _ in stats]
        self.total = sum(self.sizes)
        self.times = [time for _, time in stats]
        self._segment = hashlib.sha256()  # of the records since the file or the piece began
        endings = {os.path.splitext(path.lower())[1] for path in self.paths}
        if '.parquet' in endings:
            optional_package('pyarrow', 'Parquet files')
        if '.zst' in endings:
            zstandard()

    def identity(self) -> dict:
        return {
            'paths': self.names,
            'files': len(self.paths),
            'bytes': self.total,
            'listing': self._listing(),
            'field': self.field,
            'cut': self.cut,
            'max_documents': self.max_documents,
        }

    def _listing(self) -> str:
        lines = (f'{path}\0{size}\0{time}\n' for path, size, time in self.files())
        return hashlib.sha256(''.join(lines).encode(errors='replace')).hexdigest()

    def files(self):
        paths = map(os.path.abspath, self.paths)
        return [list(file) for file in zip(paths, self.sizes, self.times)]

    @property
    def has_only_texts(self) -> bool:
        return all(reader_of(path) is _texts for path in self.paths)

    def with_cut(self, cut: int) -> 'Files':
        """The same files, cut otherwise."""
        return Files(self.names, self.field, cut, self.max_documents)

    def mark(self):
        done, marks = self.at
        digest, self._segment = self._segment.hexdigest(), hashlib.sha256()
        return done, [*marks, digest]

    def unchanged(self, before, positions):
        now = self.files()
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, now))
        same = sum(1 for _ in pairs)
        # A file that has changed may hold the same up to somewhere: it is read again that far.
        is_changed = same < min(len(before), len(now)) and before[same][0] == now[same][0]
        records = reader_of(now[same][0])(now[same][0], self, 0, 0) if is_changed else iter(())
        kept = 0
        for position in positions:
            if len(position.marks) != 4:  # of a version that kept no digest
                break
            number, *mark, digest = position.marks
            within = number == same and mark != [0, 0]
            if number > same or (within and not _gives(records, mark, digest)):
                break
            kept += 1
        return kept

    def records(self, marks):
        first, *begin = (marks or (0, 0, 0))[:3]
        before = sum(self.sizes[:first])
        for number in range(first, len(self.paths)):
            path, size = self.paths[number], self.sizes[number]
            try:
                self._segment = hashlib.sha256()
                for record, done, *marks in reader_of(path)(path, self, *begin):
                    self._segment.update(record.raw)
                    self.at = before + min(done, size), [number, *marks]
                    yield record
            except OSError as error:
                self.at = before + size, [number + 1, 0, 0]
                yield Broken(path, error.strerror or str(error))
            begin, before = (0, 0), before + size


def _gives(records: Iterator, mark: list[int], digest: str) -> bool:
    """Whether the next records up to a mark are those of which the digest was taken."""
    segment = hashlib.sha256()
    try:
        for record, _, *marks in records:
            segment.update(record.raw)
            if marks[0] >= mark[0]:
                return marks == mark and segment.hexdigest() == digest
    except OSError:
        pass
    return False


def reader_of(path: str):
    """What gives (record, bytes of the file done, two marks to go on from) for such a file."""
    if path.lower().endswith('.parquet'):
        return _rows
    return _json if kind_of(path) in JSON else _texts


def _texts(path: str, source: Files, offset: int, number: int):
    """A text, or the parts of a long one. Marks: offset in what the file holds, parts so far."""
    with opened(path) as (file, raw):
        file.seek(offset)
        rest = file.read(2 * source.cut)
        if not offset and rest[257:262] == b'ustar':
            raise OSError('it is a tar archive: unpack it first')
        while rest:
            end = _end_of_part(rest, source.cut)
            part, rest = rest[:end], rest[end:]
            rest += file.read(2 * source.cut - len(rest))
            place = f'{path}, part {number + 1}' if rest or number else path
            offset, number = offset + end, number + 1
            yield Text(place, part), offset if file is raw else raw.tell(), offset, number


def _end_of_part(content: bytes, size: int) -> int:
    """Where a part of about `size` bytes ends: after a blank line if one is near.

    Near is within `size` bytes more; otherwise a line's end counts, and else a character's.
    """
    if len(content) <= size:
        return len(content)
    for ending in (b'\n\n', b'\r\n\r\n', b'\n'):
        if (begin := content.find(ending, size - 1)) >= 0:
            return begin + len(ending)
    end = len(content)
    if end == 2 * size:  # there may be more
        while end > size and content[end - 1] & 0xC0 == 0x80:  # within a character of UTF-8
            end -= 1
        end -= end > size and content[end - 1] >= 0xC0
    return end


def _json(path: str, source: Files, *marks: int):
    """JSON lines; or values that go over several lines, or a whole array."""
    with opened(path) as (file, _):
        begin = file.read(SNIFFED).removeprefix(BYTE_ORDER_MARK).lstrip()
    first_line = begin.partition(b'\n')[0]
    is_array = begin.startswith(b'[')
    if is_array or (
        kind_of(path) == '.json' and len(first_line) < len(begin) and not _is_json(first_line)
    ):
        yield from _values(path, source, *marks)
    else:
        yield from _lines(path, source, *marks)


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def _lines(path: str, source: Files, offset: int, number: int):
    """A JsonLine each. Marks: offset in what the file holds, lines so far."""
    with opened(path) as (file, raw):
        file.seek(offset)
        while line := file.readline(LINE_LIMIT):
            if len(line) == LINE_LIMIT:
                raise OSError(f'line {number + 1} is longer than {LINE_LIMIT:,} bytes')
            offset, number = offset + len(line), number + 1
            if not is_blank(line):
                yield JsonLine(path, number, source.field, line), raw.tell(), offset, number


def _values(path: str, source: Files, number: int, _):
    """A Row for each value. Marks: rows so far, 0."""
    row = 0
    with opened(path) as (file, raw):
        try:
            for value in json_values(file, LINE_LIMIT):
                row += 1
                if row > number:
                    yield Row(path, row, source.field, value), raw.tell(), row, 0
        except ValueError as error:
            raise OSError(
                f'row {row + 1} is no JSON: {error}. That row and what follows it in the file '
                'would be left out'
            ) from None


def _rows(path: str, source: Files, number: int, _):
    """(Row, bytes of the file done, rows so far, 0)."""
    import pyarrow
    from pyarrow import parquet

    field, size = source.field, os.path.getsize(path)
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                schema = file.schema_arrow
                kinds = {name: str(schema.field(name).type) for name in schema.names}
                # Only whether they are text counts, and not which.
                row = {name: '' if 'string' in kind else 0 for name, kind in kinds.items()}
                yield Row(path, 1, field, row), size, 0, 0
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


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:  # told when it is read
        return 0, 0
    return stat.st_size, stat.st_mtime_ns
