"""Columns that a text takes on a terminal: wide characters take two, combining ones none."""

import re
import unicodedata

_ESCAPE_SEQUENCE = re.compile('(\x1b\\[[0-9;]*m)')
_EMOJI_STYLE = '\ufe0f'  # makes the character before it an emoji, which is wide


def display_width(text: str) -> int:
    """The columns of a line of text; escape sequences of colors take none."""
    return sum(width for _, width in _characters(_ESCAPE_SEQUENCE.sub('', text)))


def cut_to_width(text: str, columns: int, mark: str = '…') -> str:
    """A line of text in at most so many columns; what is cut ends with `mark`, in its color."""
    if display_width(text) <= columns:
        return text
    room, parts = columns - display_width(mark), []
    for i, part in enumerate(_ESCAPE_SEQUENCE.split(text)):
        if i % 2:
            parts.append(part)  # the colors behind the cut too, since they end the others
            continue
        for character, width in _characters(part):
            room -= width
            if room < 0:
                parts.append(mark)
                mark, room = '', -1  # nothing fits after it
                break
            parts.append(character)
    return ''.join(parts)


def _characters(text: str) -> list[tuple[str, int]]:
    """Each character and its columns."""
    characters: list[tuple[str, int]] = []
    for character in text:
        width = _columns_of(character)
        if character == _EMOJI_STYLE and characters and characters[-1][1] == 1:
            width = 1  # the second column of the character before it
        characters.append((character, width))
    return characters


def _columns_of(character: str) -> int:
    if unicodedata.east_asian_width(character) in ('W', 'F'):
        return 2
    if character == '\xad':  # a soft hyphen, which terminals show
        return 1
    return 0 if unicodedata.category(character) in ('Mn', 'Me', 'Cf', 'Cc') else 1
