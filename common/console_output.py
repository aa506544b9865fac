"""Standard output and standard error, as every command writes to them.

Four things are decided here and nowhere else. What a stream shows: a terminal in UTF-8 gets emoji
and box rules, everything else the same words in ASCII; color is for terminals, unless `NO_COLOR` is
set. Characters that the stream's encoding lacks are replaced. Characters that would control a
terminal are shown as escapes (`\\x1b`), since names and texts come from records, checkpoints and
models of others. And a stream that cannot be written (closed, on a full disk, its reader gone) ends
the command in `write_text`, while `write_progress` lets the work continue silently. A leaf: this
module imports nothing else of the project.
"""

import codecs
import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any, TextIO

# Substitutes for characters that an encoding may lack; the others become escapes.
_ASCII = {'─': '-', '━': '#', '│': '|', '├': '|', '└': '`', '×': 'x', '→': '->'}
_SUBSTITUTES = {
    **_ASCII,
    **{'…': '...', '–': '-', '—': '-', '−': '-', '±': '+/-', '≥': '>=', '≤': '<=', '·': '*'},
    **{'“': '"', '”': '"', '‘': "'", '’': "'", '²': '^2', '⁹': '^9', 'Δ': 'd', '\xa0': ' '},
}
# Begin and end of `bold`, `yellow` and `red`: characters that Unicode reserves for internal use.
# They become escape sequences where the stream shows color and vanish elsewhere.
_BOLD, _YELLOW, _RED, _PLAIN = '\ufdd0', '\ufdd1', '\ufdd2', '\ufddf'
_SEQUENCES = {_BOLD: '\x1b[1m', _YELLOW: '\x1b[33m', _RED: '\x1b[31m', _PLAIN: '\x1b[0m'}
_MARKS = re.compile(f'[{"".join(_SEQUENCES)}]')
_EMOJI = re.compile(f'^({_MARKS.pattern}*)[\u2600-\u27bf\U0001f300-\U0001faff] ', re.MULTILINE)

# Control characters except line feeds and tabs, other line separators, changes of the writing
# direction, and surrogates (a file name that is not UTF-8 has them).
_CONTROL = re.compile(
    '[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)

_BROKEN_PIPE = (errno.EPIPE, errno.ESHUTDOWN)


class OutputLost(Exception):
    """Standard output cannot be written; the text is lost."""

    def __init__(self, error: Exception):
        reason = getattr(error, 'strerror', None) or str(error)
        super().__init__(f'standard output cannot be written ({reason})')
        self.reader_gone = getattr(error, 'errno', None) in _BROKEN_PIPE


# --- What a stream can show -----------------------------------------------------------------------


def is_terminal(stream: TextIO | None) -> bool:
    """Whether the stream is a terminal; it may be None or closed."""
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, OSError, ValueError):
        return False


def can_redraw(stream: TextIO | None) -> bool:
    """Whether the stream is a terminal that moves its cursor."""
    unknown = 'dumb' if os.name == 'posix' else ''
    return is_terminal(stream) and os.environ.get('TERM', unknown) != 'dumb'


def has_color(stream: TextIO | None) -> bool:
    """Whether the stream gets color: a terminal that is not dumb, or any with FORCE_COLOR set.

    A `NO_COLOR` that is not empty turns color off (no-color.org).
    """
    if os.environ.get('NO_COLOR'):
        return False
    forced = os.environ.get('FORCE_COLOR') or os.environ.get('CLICOLOR_FORCE')
    return forced not in (None, '', '0') or can_redraw(stream)


def has_emoji(stream: TextIO | None) -> bool:
    """Whether the stream gets emoji and box rules: a terminal in UTF-8."""
    return is_terminal(stream) and _is_unicode(getattr(stream, 'encoding', None))


def _is_unicode(encoding: str | None) -> bool:
    return (encoding or 'utf-8').lower().startswith('utf')


# --- Text for a stream ----------------------------------------------------------------------------


def bold(text: str) -> str:
    """The text in bold where the stream has color; for headings."""
    return f'{_BOLD}{text}{_PLAIN}'


def yellow(text: str) -> str:
    """The text in yellow where the stream has color; for warnings."""
    return f'{_YELLOW}{text}{_PLAIN}'


def red(text: str) -> str:
    """The text in red where the stream has color; for errors."""
    return f'{_RED}{text}{_PLAIN}'


def visible(text: str) -> str:
    """The text with an escape for each character that would control a terminal."""
    return _CONTROL.sub(lambda match: _escape(match[0]), text)


def _escape(character: str) -> str:
    r"""The escape that Python writes; from 0x7f on `\u009b`, so that JSON stays JSON."""
    return repr(character)[1:-1] if character < ' ' else f'\\u{ord(character):04x}'


def plain(text: str) -> str:
    """The text with rules of ASCII and without the emoji at the beginning of lines."""
    return _EMOJI.sub(r'\1', text).translate(
        {ord(character): substitute for character, substitute in _ASCII.items()}
    )


def displayed(text: str, stream: TextIO | None) -> str:
    """The text as `stream` shows it: emoji, rules and color if it has them, no control characters.

    The escape sequences of colors are the only ones in it.
    """
    text = visible(text)
    if not has_emoji(stream):
        text = plain(text)
    color = has_color(stream)
    text = _MARKS.sub(lambda mark: _SEQUENCES[mark[0]] if color else '', text)
    return _encodable(text, getattr(stream, 'encoding', None))


# --- Writing --------------------------------------------------------------------------------------


def write_text(text: str, end: str = '\n', literal: bool = False) -> None:
    """Write the result of a command to standard output. Raises OutputLost.

    literal: keep rules and emoji, since they are part of the result (data, or generated text).
    """
    text += end
    _write(sys.stdout, visible(text) if literal else displayed(text, sys.stdout))


def write_progress(text: str, end: str = '\n', stream: TextIO | None = None) -> str | None:
    """Write a message about work in progress; the work continues if the stream cannot be written.

    stream: standard output by default. When it fails, standard error and the result give the
    reason, once; later writes are silent.
    """
    stream = sys.stdout if stream is None else stream
    return _write_or_continue(displayed(text + end, stream), stream)


def write_control(text: str, stream: TextIO, write: Callable[[str], Any]) -> str | None:
    """Write a text that is `displayed` already and may move the cursor, with the stream's `write`.

    Returns the reason if the stream cannot be written, as `write_progress` does.
    """
    return _write_or_continue(text, stream, write)


def write_error(text: str, end: str = '\n') -> None:
    """Write to standard error, if it can be written."""
    with contextlib.suppress(OutputLost):
        _write(sys.stderr, displayed(text + end, sys.stderr))


def _write_or_continue(
    text: str, stream: TextIO | None, write: Callable[[str], Any] | None = None
) -> str | None:
    try:
        _write(stream, text, write)
    except OutputLost as error:
        write_error(f'{error}: the work continues silently')
        return str(error)
    return None


def _write(stream: TextIO | None, text: str, write: Callable[[str], Any] | None = None) -> None:
    if stream is None:  # a standard stream that was closed at the start of the process
        return
    try:
        (write or stream.write)(_encodable(text, getattr(stream, 'encoding', None)))
        stream.flush()
    except (OSError, ValueError) as error:  # ValueError: the stream has been closed since
        silence(stream)
        raise OutputLost(error) from error


def _encodable(text: str, encoding: str | None) -> str:
    """The text in the characters that the encoding has."""
    if not _is_unicode(encoding):
        text = plain(text)
    encoding = encoding or 'utf-8'
    return text.encode(encoding, SUBSTITUTE).decode(encoding)


def _substitute(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = visible(error.object[error.start : error.end])
    shown = ''.join(c if c.isascii() else _SUBSTITUTES.get(c, c) for c in missing)
    return shown.encode('ascii', 'backslashreplace').decode(), error.end


SUBSTITUTE = 'substitute'  # as an `errors` of str.encode and of streams
codecs.register_error(SUBSTITUTE, _substitute)


def silence(stream) -> None:
    """Redirect the stream to the null device: its buffer and later writes raise no errors."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
        stream.flush()
        return
    for name in ('stdout', 'stderr'):  # it was closed, or is not a file
        if getattr(sys, name) is stream:
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115 until the process ends


def open_streams() -> None:
    """Make the three standard streams of the process usable, at its start.

    A closed one is opened on the null device: otherwise the next file would get its number, and
    libraries that write to standard error by number would write into a checkpoint. Plain `print`
    replaces characters that the encoding lacks, too.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, descriptor)
            if null != descriptor:
                os.close(null)
    for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 until the process ends
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=SUBSTITUTE)


def flush_streams() -> None:
    """Write the buffers of the standard streams; drop what cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                silence(stream)
