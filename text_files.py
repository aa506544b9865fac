"""How text and JSON come out of files, whichever command reads them.

Text is UTF-8. A byte order mark, which Windows editors write, is no part of it. Lines end at line
feeds and nowhere else: JSON lines may hold U+2028, U+0085 or a form feed as they are. Half of a
surrogate pair, which JSON can write and UTF-8 cannot, counts as U+FFFD. A leaf but for errors.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from errors import UserError

BYTE_ORDER_MARK = b'\xef\xbb\xbf'
UTF16_MARKS = (b'\xff\xfe', b'\xfe\xff')
# What a file begins with that is no text at all, and what to do about it.
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
        if content.startswith(UTF16_MARKS):
            raise ValueError(
                'no UTF-8 text but UTF-16: save it as UTF-8, or convert it: '
                'iconv -f UTF-16 -t UTF-8 OLD > NEW'
            ) from None
        for begin, what in SIGNATURES.items():
            if content.startswith(begin):
                raise ValueError(f'no UTF-8 text but {what}') from None
        mark = len(content) - len(content.removeprefix(BYTE_ORDER_MARK))
        raise ValueError(f'no UTF-8 text: {error.reason} at byte {error.start + mark:,}') from None


def read_bytes(path: Path | str, name: str) -> bytes:
    """The content of a file that messages call `name`. Raises UserError."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no path at all
        raise UserError(
            f'{name} cannot be read: {getattr(error, "strerror", None) or error}.'
        ) from error


def read_text(path: Path | str, name: str) -> str:
    """The text of a file that messages call `name`, its line ends as they are. Raises UserError."""
    content = read_bytes(path, name)
    try:
        return decode(content)
    except ValueError as error:
        raise UserError(f'{name} is {error}.') from error


def read_lines(path: Path | str, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1. Raises UserError."""
    for number, line in enumerate(read_bytes(path, name).split(b'\n'), start=1):
        if not is_blank(line):
            yield number, line


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing but spaces and perhaps a byte order mark."""
    return not line.removeprefix(BYTE_ORDER_MARK).strip()


def parse_json(content: bytes):
    """The value that a file or a line of JSON holds, all text in it valid. Raises ValueError."""
    text = content.removeprefix(BYTE_ORDER_MARK).decode('utf-8', 'surrogatepass')
    try:
        value = json.loads(text)
        may_be_halved = b'\\u' in content or b'\xed' in content  # surrogates escaped, or as bytes
        return valid_json(value) if may_be_halved else value
    except RecursionError:
        raise ValueError('nested too deeply') from None


def valid_json(value):
    """The value with `valid_text` in place of each text in it."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, list):
        return [valid_json(item) for item in value]
    if isinstance(value, dict):
        return {valid_text(key): valid_json(item) for key, item in value.items()}
    return value


def valid_text(text: str) -> str:
    """The text with U+FFFD for surrogates that are not one of a pair, as JSON may bring them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return text
