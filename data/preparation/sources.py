"""Sources of documents: text, JSON or Parquet files, and Hugging Face datasets.

A source yields its documents in order, in batches of about a megabyte. It only reads: slow work,
such as parsing JSON, is done by the `text` of each document, which another process may call. The
position of a source after a batch is a few plain values, from which it can continue.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from common.errors import UserError
from common.packages import optional_package
from data.preparation.corpus_files import find_files, zstandard
from data.preparation.documents import Document, FileDocument, RowDocument, UnreadableDocument
from data.preparation.file_readers import ReadOptions, is_text, reader_of

BATCH_BYTES = 2**20


class SourcePosition(NamedTuple):
    """Position of a source: documents yielded, amount of `total` done, the reader's marks."""

    given: int = 0
    done: int = 0
    marks: Any = None


class DocumentBatch(NamedTuple):
    """Some documents, and the position of their source after them."""

    documents: Sequence[Document]
    position: SourcePosition


class DocumentSource:
    """A source of documents. Subclasses define `total`, `unit`, `identity` and `documents`."""

    total: int | None  # its size in `unit`; None: unknown
    unit: str
    max_documents: int | None = None
    notes: Sequence[str] = ()  # on files that are skipped

    @property
    def is_small(self) -> bool:
        """Whether it is too small to be worth starting processes for."""
        return self.unit == 'B' and self.total is not None and self.total < 2 * BATCH_BYTES

    def identity(self) -> dict:
        """Plain values that must be equal for a preparation to be continued."""
        raise NotImplementedError

    def documents(self, marks: Any) -> Iterator[FileDocument]:
        """The documents from `marks` (None: the start) on; updates `self.at`."""
        raise NotImplementedError

    def files(self) -> list:
        """Plain values that identify the state of each file, in order."""
        return []

    def count_unchanged(self, before: list, positions: Sequence[SourcePosition]) -> int:
        """Number of batches, which end at `positions`, unchanged since `files()` was `before`."""
        return 0

    at: tuple[int, Any] = (0, None)  # amount done and marks after the last document

    def mark(self) -> tuple[int, Any]:
        """`at`, for the position after a batch that ends here."""
        return self.at

    def batches(self, position: SourcePosition | None = None) -> Iterator[DocumentBatch]:
        """The documents from `position` on, in batches of about BATCH_BYTES."""
        count, _, marks = position or SourcePosition()
        documents, size = [], 0
        for document in self.documents(marks) if count != self.max_documents else ():
            documents.append(document)
            size += document.size
            count += 1
            if size >= BATCH_BYTES or count == self.max_documents:
                yield DocumentBatch(documents, SourcePosition(count, *self.mark()))
                documents, size = [], 0
            if count == self.max_documents:
                return
        if documents:
            yield DocumentBatch(documents, SourcePosition(count, *self.mark()))


class FileSource(DocumentSource):
    """The documents of files: a text file, or a part of about `cut` bytes; a row of other files.

    Raises UserError if there are no files or a package to read them is missing.
    """

    unit = 'B'

    def __init__(
        self, names: Iterable[str], field: str, cut: int, max_documents: int | None = None
    ):
        self.names, self.field, self.cut = list(names), field, cut
        self.max_documents = max_documents
        self._read_options = ReadOptions(field, cut)
        self.paths, self.notes = find_files(self.names)
        stats = [_size_and_time(path) for path in self.paths]
        self.sizes = [size for size, _ in stats]
        self.total = sum(self.sizes)
        self.times = [time for _, time in stats]
        self._segment = hashlib.sha256()  # of the documents since the file or the batch began
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

    def files(self) -> list:
        paths = map(os.path.abspath, self.paths)
        return [list(file) for file in zip(paths, self.sizes, self.times)]

    @property
    def has_only_texts(self) -> bool:
        return all(map(is_text, self.paths))

    def with_cut(self, cut: int) -> 'FileSource':
        """The same files with another cut."""
        return FileSource(self.names, self.field, cut, self.max_documents)

    def mark(self) -> tuple[int, Any]:
        done, marks = self.at
        digest, self._segment = self._segment.hexdigest(), hashlib.sha256()
        return done, [*marks, digest]

    def count_unchanged(self, before: list, positions: Sequence[SourcePosition]) -> int:
        now = self.files()
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, now))
        changed = sum(1 for _ in pairs)  # the number of the first file that has changed
        # A changed file may begin with the same documents: it is read again to find out.
        documents: Iterator = iter(())
        if changed < min(len(before), len(now)) and before[changed][0] == now[changed][0]:
            path = now[changed][0]
            documents = reader_of(path)(path, self._read_options, 0, 0)
        unchanged = 0
        for position in positions:
            if len(position.marks) != 4:  # of a version without digests
                break
            number, *mark, digest = position.marks
            within = number == changed and mark != [0, 0]
            if number > changed or (within and not _gives(documents, mark, digest)):
                break
            unchanged += 1
        return unchanged

    def documents(self, marks: Any) -> Iterator[FileDocument]:
        first, *begin = (marks or (0, 0, 0))[:3]
        before = sum(self.sizes[:first])
        for number in range(first, len(self.paths)):
            path, size = self.paths[number], self.sizes[number]
            try:
                self._segment = hashlib.sha256()
                for document, done, *marks in reader_of(path)(path, self._read_options, *begin):
                    self._segment.update(document.raw)
                    self.at = before + min(done, size), [number, *marks]
                    yield document
            except OSError as error:
                self.at = before + size, [number + 1, 0, 0]
                yield UnreadableDocument(path, error.strerror or str(error))
            begin, before = (0, 0), before + size


def _gives(documents: Iterator, mark: list[int], digest: str) -> bool:
    """Whether the next documents, up to a mark, have the digest."""
    segment = hashlib.sha256()
    try:
        for document, _, *marks in documents:
            segment.update(document.raw)
            if marks[0] >= mark[0]:
                return marks == mark and segment.hexdigest() == digest
    except OSError:
        pass
    return False


class HuggingFaceSource(DocumentSource):
    """The documents of a dataset on the Hugging Face Hub, or in a folder, streamed.

    Raises UserError if it cannot be opened or the package datasets is missing.
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
        except Exception as error:  # raised by the hub, the network or one of many formats
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

    def documents(self, marks: Any) -> Iterator[FileDocument]:
        self.number = 0
        if marks:
            self.number, state = marks
            self.dataset.load_state_dict(state)
        try:
            for row in self.dataset:
                self.number += 1
                yield RowDocument(self.name, self.number, self.field, row)
        except Exception as error:  # whatever a download can raise
            raise UserError(f'{self.name}, after row {self.number}: {_brief(error)}') from None


def _brief(error: Exception) -> str:
    return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:  # reported when the file is read
        return 0, 0
    return stat.st_size, stat.st_mtime_ns
