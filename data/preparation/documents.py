"""Documents as a source gives them: raw, with their text only where `text` is called.

So what takes time, such as parsing JSON, can be left to another process.
"""

from typing import Any, NamedTuple, Protocol

from common.errors import UserError, did_you_mean
from common.text_files import decode, parse_json


class Document(Protocol):
    """What a preparation needs of a document."""

    def text(self) -> str:
        """The document. Raises InvalidDocument."""


class InvalidDocument(UserError):
    """A document that cannot be used: where it stands and what is the matter."""


class TextDocument(NamedTuple):
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
        """The document. Raises InvalidDocument."""
        try:
            return decode(self.content)
        except ValueError as error:
            raise InvalidDocument(f'{self.place} is {error}.') from None


class JsonDocument(NamedTuple):
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
        """The document. Raises InvalidDocument."""
        place = f'{self.path}, line {self.number}'
        try:
            row = parse_json(self.line)
        except ValueError as error:
            raise InvalidDocument(f'{place} is no JSON: {error}.') from None
        return _text_of(row, self.field, place)


class RowDocument(NamedTuple):
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
        """The document. Raises InvalidDocument."""
        return _text_of(self.row, self.field, f'{self.path}, row {self.number}')


class UnreadableDocument(NamedTuple):
    """What stands for documents that cannot be read at all."""

    place: str
    reason: str
    size: int = 1
    raw: bytes = b''

    def text(self) -> str:
        """Raises InvalidDocument."""
        raise InvalidDocument(f'{self.place} cannot be read: {self.reason}.')


FileDocument = TextDocument | JsonDocument | RowDocument | UnreadableDocument


def _text_of(row, field: str, place: str) -> str:
    if not isinstance(row, dict):
        raise InvalidDocument(f'{place} is no JSON object, so it has no field {field!r}.')
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
        raise InvalidDocument(f'{problem} No field of it is text.')
    # The longest is most likely what is meant, if it has no name like it.
    likely = max(texts, key=lambda name: (bool(did_you_mean(field, [name])), len(row[name])))
    raise InvalidDocument(f'{problem} If all rows have their text there: --field={likely}')
