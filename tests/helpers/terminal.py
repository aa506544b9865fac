"""A terminal in memory: the screen and the scrolled-off history that a program's output leaves."""

import io
import os
import re

from common.text_width import display_width

_SEQUENCE = re.compile('\x1b\\[(\\??[0-9;]*)([A-Za-z])')


class Row(list):
    """The text of each column of a row of the screen."""

    continued = False  # by the next row


class Terminal(io.StringIO):
    """As much of a terminal as the project uses: wrapping, scrolling, cursor up, erasing, color.

    Every other control character or sequence is an error. `raw` is all that was written. The
    tests' own `terminal` fixture lets the project see its size.
    """

    encoding = 'utf-8'

    def __init__(self, columns=80, rows=24):
        super().__init__()
        self.columns, self.rows = columns, rows
        self.history: list[str] = []
        self.lines = [Row()]
        self.row = self.column = 0
        self.raw = ''
        self.writes = 0

    def isatty(self):
        return True

    @property
    def size(self):
        return os.terminal_size((self.columns, self.rows))

    @property
    def screen(self):
        """The text on the screen."""
        return [''.join(cells).rstrip() for cells in self.lines]

    @property
    def text(self):
        """History and screen, without empty rows at the end."""
        return '\n'.join([*self.history, *self.screen]).rstrip('\n')

    def write(self, text):
        self.raw += text
        self.writes += 1
        position = 0
        while position < len(text):
            if sequence := _SEQUENCE.match(text, position):
                self._control(*sequence.groups())
                position = sequence.end()
            else:
                self._put(text[position])
                position += 1
        return len(text)

    def resize(self, columns, rows):
        """Make the window another size; rows are wrapped and joined, as most terminals do.

        The cursor must be at the beginning of a line.
        """
        assert self.column == 0
        lines, before = [], []
        for number, cells in enumerate(self.lines):
            if number == self.row:
                self.row = len(lines)
            before += cells
            if cells.continued:
                continue
            pieces = [Row(before[i : i + columns]) for i in range(0, len(before), columns)]
            for piece in pieces[:-1]:
                piece.continued = True
            lines += pieces or [Row()]
            before = []
        self.lines, self.columns, self.rows = lines, columns, rows
        self._scroll()

    def _put(self, character):
        if character == '\n':  # the driver adds the carriage return
            self.row, self.column = self.row + 1, 0
            if self.row == len(self.lines):
                self.lines.append(Row())
            self._scroll()
        elif character == '\r':
            self.column = 0
        else:
            assert character.isprintable() or character in '\u200d\ufe0f', repr(character)
            width = display_width(character)
            if self.column + width > self.columns:
                self.lines[self.row].continued = True
                self._put('\n')
            cells = self.lines[self.row]
            cells += [' '] * (self.column + width - len(cells))
            if width:
                cells[self.column : self.column + width] = [character, *[''] * (width - 1)]
                self.column += width

    def _control(self, argument, kind):
        if kind == 'A':
            self.row = max(0, self.row - int(argument or 1))
        elif kind in 'KJ':
            assert argument == '', argument
            del self.lines[self.row][self.column :]
            self.lines[self.row].continued = False
            if kind == 'J':
                del self.lines[self.row + 1 :]
        else:
            assert kind == 'm', (argument, kind)

    def _scroll(self):
        while len(self.lines) > self.rows:
            self.history.append(''.join(self.lines.pop(0)).rstrip())
            self.row -= 1
        assert self.row >= 0
