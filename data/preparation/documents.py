"""Documents as a source yields them: raw, parsed when `text` is called.

Slow work, such as parsing JSON, can thus be done in another process.
"""

from typing import Any, NamedTuple, Protocol

from common.errors import UserError, did_you_mean
from common.text_files import decode, parse_json


class Document(Protocol):
    """The interface of a document that preparation uses."""

    def text(self) -> str:
        """The document's text. Raises InvalidDocument."""


class InvalidDocument(UserError):
    """A document that cannot be used, with its place and the reason."""


class TextDocument(NamedTuple):
    """A document that is a file, or a part of one, as bytes."""

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
    """A document that is a line of JSON, an object with the text under `field`."""

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
            raise InvalidDocument(f'{place} is not valid JSON: {error}.') from None
        return _text_of(row, self.field, place)


class RowDocument(NamedTuple):
    """A document that is a field of a table row."""

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
    """A placeholder for documents that cannot be read at all."""

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
        raise InvalidDocument(f'{place} is not a JSON object, so it has no field {field!r}.')
    if isinstance(row.get(field), str):
        return row[field]
    texts = [name for name in row if isinstance(row[name], str)]
    if field in row:
        problem = f'{place}: the field {field!r} is not text but {type(row[field]).__name__}.'
    else:
        names = ', '.join(map(repr, row)) or 'none'
        problem = (
            f'{place} has no field {field!r}. Its fields: {names}.{did_you_mean(field, texts)}'
        )
    if not texts:
        raise InvalidDocument(f'{problem} None of its fields is text.')
    # The most likely field: one with a similar name, else the one with the longest text.
    likely = max(texts, key=lambda name: (bool(did_you_mean(field, [name])), len(row[name])))
    raise InvalidDocument(f'{problem} Use --field={likely} if all rows have their text there.')
