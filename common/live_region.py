"""Lines at the bottom of a terminal that are redrawn in place, while other output scrolls above.

Everything that Python writes to standard output and standard error while a region is shown (the
project's messages, `print`, warnings, logging) appears above it. Output that bypasses Python's
streams, such as that of other processes, may disturb the display, and the next redraw may overwrite
it. The cursor stays visible, in the row below the region, so that a killed process leaves a usable
terminal.
"""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from common.console_output import (
    can_redraw,
    displayed,
    has_emoji,
    is_terminal,
    write_control,
    write_progress,
)
from common.text_width import cut_to_width, display_width

REDRAW_SECONDS = 0.1  # the minimum time between two redraws
_current: 'LiveRegion | None' = None  # the region that is shown; there is at most one


class LiveRegion:
    """The lines of `update`, shown at the bottom of the terminal `stream` until `close`.

    `available` is False if the stream cannot redraw, or while another region is shown; `update`
    must not be called then. There is no thread: a redraw that comes too soon after the last is left
    to the next `update`, to `close`, or to the next output above the region.
    """

    def __init__(self, stream: TextIO | None = None):
        self.stream = sys.stdout if stream is None else stream
        self._lines: list[str] = []  # to be shown
        self._widths: list[int] = []  # of the rows on the screen, in columns
        self._drawn_at = 0.0
        self._writing = False  # whether the screen is being changed
        self._deferred = ''  # what signal handlers wrote meanwhile
        self._at_line_start = True  # whether the output above ended with a line feed
        self._lock = threading.RLock()
        self._writers: dict[int, Callable[[str], Any]] = {}  # by id: the streams' own `write`
        self._restore = contextlib.ExitStack()

    @property
    def available(self) -> bool:
        return _current is self or (_current is None and can_redraw(self.stream))

    @property
    def columns(self) -> int:
        return terminal_size(self.stream).columns

    @property
    def due(self) -> bool:
        """Whether an `update` is drawn at once."""
        return not self._widths or time.monotonic() - self._drawn_at >= REDRAW_SECONDS

    def fits(self, lines: int) -> bool:
        """Whether the terminal has rows for so many lines, the cursor and a line above them."""
        return terminal_size(self.stream).lines >= lines + 2

    def update(self, lines: Sequence[str]) -> str | None:
        """Show these lines instead of the last ones; long ones are cut.

        Returns the reason if the stream cannot be written any more, once.
        """
        global _current
        assert self.available
        with self._exclusively():
            if _current is None:
                _current = self
                for stream in (self.stream, sys.stdout, sys.stderr):
                    self._intercept(stream)
            self._lines = list(lines)
            return self._draw() if self.due else None

    def write_line(self, text: str) -> str | None:
        """Write a line of ordinary text, above a region that is shown."""
        return write_progress(text, stream=self.stream)

    def close(self, keep: bool = False) -> None:
        """Remove the region. keep: leave its last lines on the screen, as ordinary text."""
        global _current
        if _current is not self:
            return
        with self._exclusively():
            if keep:
                self._draw()
            elif self._widths:
                self._write(self._erase())
            self._lines, self._widths = [], []
            self._restore.close()
            self._writers.clear()
            _current = None

    def write_below(self, text: str) -> None:
        """Write to standard error in place of the region, which appears again at its next update.

        For signal handlers: in the middle of another write, the text comes right after that.
        """
        self._deferred += text
        if not self._writing:
            self._write_deferred()

    # --- The screen ---

    def _draw(self) -> str | None:
        """Draw the lines over the last ones, in one write."""
        columns = self.columns
        mark = '…' if has_emoji(self.stream) else '>'
        rows = [
            cut_to_width(displayed(row.replace('\t', ' '), self.stream), columns, mark)
            for line in self._lines
            for row in line.split('\n')
        ]
        begin = self._to_top() if self._at_line_start else '\r\n'
        text = ''.join(f'\x1b[K{row}\n' for row in rows)
        reason = self._write(f'{begin}{text}\x1b[J')
        if not reason:
            self._widths, self._at_line_start = [display_width(row) for row in rows], True
            self._drawn_at = time.monotonic()
        return reason

    def _to_top(self) -> str:
        """Move the cursor to the first row of the region.

        Rows that are longer than a terminal that was made narrower have been wrapped by it.
        """
        columns = max(self.columns, 1)
        rows = sum(max(1, -(-width // columns)) for width in self._widths)
        return f'\r\x1b[{rows}A' if rows else '\r'

    def _erase(self) -> str:
        text = f'{self._to_top()}\x1b[J' if self._widths else ''
        self._widths = []
        return text

    def _write(self, text: str) -> str | None:
        reason = write_control(text, self.stream, self._writers[id(self.stream)])
        if reason:
            self._lines, self._widths = [], []
            self.close()
        return reason

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Change the screen while other threads and signal handlers wait."""
        with self._lock:
            nested, self._writing = self._writing, True
            try:
                yield
            finally:
                self._writing = nested
                if not nested:
                    self._write_deferred()

    def _write_deferred(self) -> None:
        text, self._deferred = self._deferred, ''
        if text:
            _write_to_stderr((self._erase() if is_terminal(sys.stderr) else '') + text)

    # --- What others write ---

    def _intercept(self, stream: TextIO | None) -> None:
        """Let what others write to the stream appear above the region.

        Its `write` is replaced, not the stream itself, which loggers keep a reference to.
        """
        if stream is None or id(stream) in self._writers or not is_terminal(stream):
            return
        write = stream.write
        with contextlib.suppress(AttributeError):  # a stream whose attributes cannot be set
            setattr(stream, 'write', lambda text: self._write_above(text, stream, write))  # noqa: B010
            self._restore.callback(delattr, stream, 'write')
        self._writers[id(stream)] = write

    def _write_above(self, text: str, stream: TextIO, write: Callable[[str], Any]) -> Any:
        if not text or self._writing_here():
            return write(text)
        with self._exclusively():
            if self._widths:
                self._write(self._erase())
            written = write(text)
            stream.flush()
            self._at_line_start = text.endswith('\n')
            if self._lines and self._at_line_start:
                self._draw()
            return written

    def _writing_here(self) -> bool:
        """Whether this thread is changing the screen: the text comes from a signal handler."""
        with self._lock:
            return self._writing


@contextlib.contextmanager
def closed_at_end() -> Iterator[None]:
    """Close a region that is still shown at the end, with its last lines left on the screen."""
    try:
        yield
    finally:
        if _current is not None:
            _current.close(keep=True)


def write_in_signal_handler(text: str) -> None:
    """Write a text to standard error, by number, as a signal handler must; below a shown region."""
    if _current is None:
        _write_to_stderr(text)
    else:
        _current.write_below(text)


def _write_to_stderr(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is gone, which is what SIGHUP means
        os.write(2, text.encode())


def terminal_size(stream: TextIO) -> os.terminal_size:
    """The size of the stream's terminal; that of `COLUMNS` and `LINES`, or 80 x 24, if unknown."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        size = os.get_terminal_size(stream.fileno())
        if size.columns and size.lines:
            return size
    return shutil.get_terminal_size()
