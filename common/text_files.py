"""Reading text and JSON from files, for every command.

Text is UTF-8, without its byte order mark (which Windows editors write). Lines end at line feeds
only: JSON lines may contain U+2028, U+0085 or a form feed. Unpaired surrogates, which JSON can
encode and UTF-8 cannot, become U+FFFD.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError

CHUNK = 2**20  # bytes read at a time
BYTE_ORDER_MARK = b'\xef\xbb\xbf'
_SPACES = re.compile(r'[ \t\r\n]*')
_JSON = json.JSONDecoder()
_LONGEST_WORD = len('-Infinity\\u')
UTF16_MARKS = (b'\xff\xfe', b'\xfe\xff')
# First bytes of files that are not text, and the advice for each.
SIGNATURES = {
    b'\x1f\x8b': 'compressed by gzip: unpack it first',
    b'\x28\xb5\x2f\xfd': 'compressed by Zstandard: unpack it first',
    b'BZh': 'compressed by bzip2: unpack it first',
    b'\xfd7zXZ\0': 'compressed by xz: unpack it first',
    b'PAR1': 'a Parquet file: data/prepare.py reads one whose name ends in .parquet',
    b'PK\x03\x04': 'a zip archive: unpack it first',
    b'%PDF': 'a PDF: extract its text first',
}


def decode(content: bytes) -> str:
    """The text. Raises ValueError that completes the sentence 'FILE is …'."""
    try:
        return content.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        raise ValueError(text_problem(content) or _reason(content, error)) from None


def text_problem(begin: bytes) -> str | None:
    """The end of the sentence 'FILE is …' if the first bytes are not those of a text, else None."""
    if begin.startswith(UTF16_MARKS):
        return (
            'not UTF-8 text but UTF-16: save it as UTF-8, or convert it: '
            'iconv -f UTF-16 -t UTF-8 OLD > NEW'
        )
    for signature, what in SIGNATURES.items():
        if begin.startswith(signature):
            return f'not UTF-8 text but {what}'
    if begin[257:262] == b'ustar':
        return 'not text but a tar archive: unpack it first'
    try:
        codecs.getincrementaldecoder('utf-8')().decode(begin.removeprefix(BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        return _reason(begin, error)
    return None


def _reason(content: bytes, error: UnicodeDecodeError) -> str:
    mark = len(content) - len(content.removeprefix(BYTE_ORDER_MARK))
    return f'not UTF-8 text: {error.reason} at byte {error.start + mark:,}'


def read_bytes(path: Path | str, name: str) -> bytes:
    """The content of a file; messages call it `name`. Raises UserError."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: not a path
        raise UserError(
            f'{name} cannot be read: {getattr(error, "strerror", None) or error}.'
        ) from error


def read_text(path: Path | str, name: str) -> str:
    """The text of a file with its line ends; messages call it `name`. Raises UserError."""
    content = read_bytes(path, name)
    try:
        return decode(content)
    except ValueError as error:
        raise UserError(f'{name} is {error}.') from error


def read_lines(path: Path | str, name: str) -> Iterator[tuple[int, bytes]]:
    """The numbers, from 1, and contents of the lines that are not blank. Raises UserError."""
    for number, line in enumerate(read_bytes(path, name).split(b'\n'), start=1):
        if not is_blank(line):
            yield number, line


def is_blank(line: bytes) -> bool:
    """Whether a line contains only whitespace and possibly a byte order mark."""
    return not line.removeprefix(BYTE_ORDER_MARK).strip()


def parse_json(content: bytes):
    """The value of a file or line of JSON, with valid text only. Raises ValueError."""
    text = content.removeprefix(BYTE_ORDER_MARK).decode('utf-8', 'surrogatepass')
    try:
        value = json.loads(text)
        may_be_halved = (
            b'\\u' in content or b'\xed' in content
        )  # escaped surrogates, or their bytes
        return valid_json(value) if may_be_halved else value
    except RecursionError:
        raise ValueError('nested too deeply') from None


def is_count(value) -> bool:
    """Whether a value from a file is an integer of at least 0."""
    return type(value) is int and value >= 0


def valid_json(value):
    """The value with `valid_text` applied to each text in it."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, list):
        return [valid_json(item) for item in value]
    if isinstance(value, dict):
        return {valid_text(key): valid_json(item) for key, item in value.items()}
    return value


def valid_text(text: str) -> str:
    """The text with U+FFFD for unpaired surrogates, which JSON may contain."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return text


def json_values(file: BinaryIO, limit: int) -> Iterator:
    """The consecutive values in a file of JSON; the items of an array one by one.

    Reads the file in chunks. Raises ValueError for invalid JSON, and for a value that is longer
    than `limit` characters.
    """
    text = _Scanner(file, limit)
    while begin := text.peek():
        if begin != '[':
            yield text.value()
            continue
        text.at += 1
        while (begin := text.peek()) != ']':
            yield text.value()
            if (after := text.peek()) not in (',', ']'):
                raise ValueError(
                    f'{after!r} where , or ] is expected' if after else 'it is cut off'
                )
            text.at += after == ','
        text.at += 1


class _Scanner:
    """Incremental JSON reader: `text` is the part in memory, unread from `at` on."""

    def __init__(self, file: BinaryIO, limit: int):
        self.file, self.limit = file, limit
        self.text, self.at, self.ended = '', 0, False
        self._decode = codecs.getincrementaldecoder('utf-8')('surrogatepass').decode
        self._begun = False

    def peek(self) -> str:
        """The next character that is not a space; '' at the end."""
        while True:
            spaces = _SPACES.match(self.text, self.at)
            self.at = spaces.end() if spaces else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._read()

    def value(self):
        """The value that begins here. Raises ValueError."""
        while True:
            try:
                value, end = _JSON.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # else a number may continue
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                # A keyword or escape that is cut off is recognized by its beginning.
                near = 0 if self.ended else _LONGEST_WORD
                cut_off = error.msg.startswith('Unter') or error.pos + near >= len(self.text)
                if self.ended or not cut_off:
                    raise ValueError('it is cut off' if cut_off else error.msg) from None
            except RecursionError:
                raise ValueError('nested too deeply') from None
            if len(self.text) - self.at > self.limit:
                raise ValueError(f'it is longer than {self.limit:,} characters')
            self._read()

    def _read(self) -> None:
        """Double the text in memory, so that a long value is not parsed too often."""
        rest = self.text[self.at :]
        content = self.file.read(max(CHUNK, len(rest)))
        if not self._begun:
            content, self._begun = content.removeprefix(BYTE_ORDER_MARK), True
        self.ended = not content
        self.text, self.at = rest + self._decode(content, final=self.ended), 0
