"""Standard output and standard error, as every command writes to them.

Three things are done here and nowhere else. What the stream's encoding lacks is replaced by what it
has. Characters that would steer a terminal are shown as escapes (`\\x1b`), since names and texts
come from records, checkpoints and models of others. And a stream that takes no more (closed, on a
full disk, its reader gone) is dealt with: `write_text` ends the command, `write_progress` lets the
work go on in silence. A leaf: it knows nothing else of the project.
"""

import codecs
import contextlib
import errno
import io
import os
import re
import sys
from typing import TextIO

# What stands for characters that an encoding may lack; escapes stand for the others.
_ASCII = {'─': '-', '│': '|', '├': '|', '└': '`', '×': 'x', '→': '->'}
_SUBSTITUTES = {
    **_ASCII,
    **{'…': '...', '–': '-', '—': '-', '−': '-', '±': '+/-', '≥': '>=', '≤': '<=', '·': '*'},
    **{'“': '"', '”': '"', '‘': "'", '’': "'", '²': '^2', '⁹': '^9', 'Δ': 'd', '\xa0': ' '},
}
_EMOJI = re.compile('^[\u2600-\u27bf\U0001f300-\U0001faff] ', re.MULTILINE)

# Control characters but line feeds and tabs, other line ends, what turns the direction of writing,
# and halves of characters (a file name that is not UTF-8 has them).
_STEERING = re.compile(
    '[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)

_BROKEN_PIPE = (errno.EPIPE, errno.ESHUTDOWN)


class OutputLost(Exception):
    """Standard output takes no more; what was to be written is lost."""

    def __init__(self, error: Exception):
        reason = getattr(error, 'strerror', None) or str(error)
        super().__init__(f'standard output cannot be written ({reason})')
        self.reader_gone = getattr(error, 'errno', None) in _BROKEN_PIPE


def visible(text: str) -> str:
    """The text with an escape for each character that would move a cursor or turn the writing."""
    return _STEERING.sub(lambda match: _escape(match[0]), text)


def _escape(character: str) -> str:
    r"""As Python writes it; from 0x7f on `\u009b`, so that a text of JSON stays one."""
    return repr(character)[1:-1] if character < ' ' else f'\\u{ord(character):04x}'


def plain(text: str) -> str:
    """The text with rules of ASCII and without the emoji that lines begin with."""
    return _EMOJI.sub('', text).translate(
        {ord(character): substitute for character, substitute in _ASCII.items()}
    )


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody watches the stream, which may be None or closed."""
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, OSError, ValueError):
        return False


def write_text(text: str, end: str = '\n') -> None:
    """Write what the command is for to standard output. Raises OutputLost."""
    _write(sys.stdout, visible(text) + end)


def write_progress(text: str, end: str = '\n', stream: TextIO | None = None) -> str | None:
    """Write a word on work that goes on, whatever becomes of the stream.

    stream: standard output unless given. Where it takes no more, standard error says so once, and
    so does the result; later writes are silent.
    """
    return _write_or_go_on(visible(text) + end, stream)


def overwrite_line(text: str) -> None:
    """Show a line on the terminal that takes the place of the last one shown by this function."""
    _write_or_go_on(f'\r\x1b[K{visible(text)}', None)


def write_error(text: str, end: str = '\n') -> None:
    """Write to standard error, if it can be."""
    with contextlib.suppress(OutputLost):
        _write(sys.stderr, visible(text) + end)


def _write_or_go_on(text: str, stream: TextIO | None) -> str | None:
    try:
        _write(sys.stdout if stream is None else stream, text)
    except OutputLost as error:
        write_error(f'{error}: the work goes on in silence')
        return str(error)
    return None


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # Python's word for a standard stream that was closed at the start
        return
    try:
        stream.write(_encodable(text, getattr(stream, 'encoding', None)))
        stream.flush()
    except (OSError, ValueError) as error:  # the latter: it was closed since
        silence(stream)
        raise OutputLost(error) from error


def _encodable(text: str, encoding: str | None) -> str:
    """The text in the characters that the encoding has."""
    encoding = encoding or 'utf-8'
    if not encoding.lower().startswith('utf'):
        text = plain(text)
    return text.encode(encoding, SUBSTITUTE).decode(encoding)


def _substitute(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = visible(error.object[error.start : error.end])
    shown = ''.join(c if c.isascii() else _SUBSTITUTES.get(c, c) for c in lacking)
    return shown.encode('ascii', 'backslashreplace').decode(), error.end


SUBSTITUTE = 'substitute'  # as an `errors` of str.encode and of streams
codecs.register_error(SUBSTITUTE, _substitute)


def silence(stream) -> None:
    """Point the stream at nothing, so that what it still holds and later writes are no errors."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
        stream.flush()
        return
    for name in ('stdout', 'stderr'):  # it was closed, or is no file
        if getattr(sys, name) is stream:
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115 for the process's life


def open_streams() -> None:
    """Make the three standard streams of the process usable, at its start.

    One that is closed is opened on nothing: else the next file would get its number, and whatever
    writes to standard error by number would write into a checkpoint. Plain `print` replaces what
    the encoding lacks too.
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
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 for the process's life
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=SUBSTITUTE)


def flush_streams() -> None:
    """Write what the standard streams still hold; what they do not take is given up."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                silence(stream)
