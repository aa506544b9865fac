"""Read the documents of one text, JSON or Parquet file, from any position.

A reader yields each document with the number of file bytes read so far and two marks: integers from
which another reader can continue after the document. Every problem with a file is an OSError.
"""

import bisect
import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from common.text_files import BYTE_ORDER_MARK, is_blank, json_values, parse_json
from data.preparation.corpus_files import JSON, SNIFFED_BYTES, kind_of, open_decompressed
from data.preparation.documents import FileDocument, JsonDocument, RowDocument, TextDocument

LINE_LIMIT = 2**28  # bytes; a longer line is rejected, as it may not fit into memory
ROWS = 256  # rows of a Parquet file that are read at once

Reading = Iterator[tuple[FileDocument, int, int, int]]


class ReadOptions(NamedTuple):
    """field: the field of a row with its text. cut: approximate size in bytes of parts of texts."""

    field: str
    cut: int


def is_text(path: str) -> bool:
    """Whether a file is plain text, not rows."""
    return reader_of(path) is _texts


def reader_of(path: str) -> Callable[..., Reading]:
    """The reader for a file: yields (document, file bytes read, two marks to continue from)."""
    if path.lower().endswith('.parquet'):
        return _rows
    return _json if kind_of(path) in JSON else _texts


def _texts(path: str, options: ReadOptions, offset: int, number: int) -> Reading:
    """A text, or the parts of a long one. Marks: offset in the decompressed file, parts so far."""
    with open_decompressed(path) as (file, raw):
        file.seek(offset)
        rest = file.read(2 * options.cut)
        if not offset and rest[257:262] == b'ustar':
            raise OSError('it is a tar archive; unpack it first')
        while rest:
            end = _end_of_part(rest, options.cut)
            part, rest = rest[:end], rest[end:]
            rest += file.read(2 * options.cut - len(rest))
            place = f'{path}, part {number + 1}' if rest or number else path
            offset, number = offset + end, number + 1
            yield TextDocument(place, part), offset if file is raw else raw.tell(), offset, number


def _end_of_part(content: bytes, size: int) -> int:
    """The end of a part of about `size` bytes: after the next blank line.

    Without one in the next `size` bytes, at the end of a line, else at the end of a character.
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


def _json(path: str, options: ReadOptions, *marks: int) -> Reading:
    """JSON lines, values that span several lines, or one array."""
    with open_decompressed(path) as (file, _):
        begin = file.read(SNIFFED_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
    first_line = begin.partition(b'\n')[0]
    is_array = begin.startswith(b'[')
    if is_array or (
        kind_of(path) == '.json' and len(first_line) < len(begin) and not _is_json(first_line)
    ):
        yield from _values(path, options, *marks)
    else:
        yield from _lines(path, options, *marks)


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def _lines(path: str, options: ReadOptions, offset: int, number: int) -> Reading:
    """A JsonDocument for each line. Marks: offset in the decompressed file, lines so far."""
    with open_decompressed(path) as (file, raw):
        file.seek(offset)
        while line := file.readline(LINE_LIMIT):
            if len(line) == LINE_LIMIT:
                raise OSError(f'line {number + 1} is longer than {LINE_LIMIT:,} bytes')
            offset, number = offset + len(line), number + 1
            if not is_blank(line):
                yield JsonDocument(path, number, options.field, line), raw.tell(), offset, number


def _values(path: str, options: ReadOptions, number: int, _: int) -> Reading:
    """A RowDocument for each value. Marks: rows so far, 0."""
    row = 0
    with open_decompressed(path) as (file, raw):
        try:
            for value in json_values(file, LINE_LIMIT):
                row += 1
                if row > number:
                    yield RowDocument(path, row, options.field, value), raw.tell(), row, 0
        except ValueError as error:
            raise OSError(
                f'row {row + 1} is not valid JSON: {error}. That row and the rest of the file '
                'would be skipped'
            ) from None


def _rows(path: str, options: ReadOptions, number: int, _: int) -> Reading:
    """A RowDocument for each row. Marks: rows so far, 0."""
    import pyarrow
    from pyarrow import parquet

    field, size = options.field, os.path.getsize(path)
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                schema = file.schema_arrow
                kinds = {name: str(schema.field(name).type) for name in schema.names}
                # Only the types matter: the document is an error that names the text fields.
                row = {name: '' if 'string' in kind else 0 for name, kind in kinds.items()}
                yield RowDocument(path, 1, field, row), size, 0, 0
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
                        yield (
                            RowDocument(path, row, field, {field: value}),
                            size * row // total,
                            row,
                            0,
                        )
    except pyarrow.ArrowException as error:
        raise OSError(str(error).partition('\n')[0]) from None
