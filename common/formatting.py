"""Numbers, lists and tables as text for people."""

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

from common.console_output import visible

WIDTH = 100  # columns that the text of a comparison aims at
LISTED = 8  # the most names or values that a line lists
SAMPLE_LINES = 10  # the most lines of a sample that are shown

# --- Numbers --------------------------------------------------------------------------------------


def or_dash(value: Any, form: Callable[[Any], str], unknown: str = '-') -> str:
    return unknown if value is None else form(value)


def or_na(value: Any, form: str) -> str:
    """The value in a format such as `.4f`; `n/a` for an unknown one."""
    return 'n/a' if value is None else format(value, form)


def counted(number: int, noun: str) -> str:
    """`1 sequence`, `2,048 sequences`."""
    return f'{number:,} {noun}' + ('' if number == 1 else 's')


def percent(part: float, whole: float) -> str:
    """Six columns and the sign, so that shares are aligned."""
    return f'{100 * part / whole:5.1f} %' if whole else '    n/a'


def p_text(p_value: float) -> str:
    return '<0.0001' if p_value < 1e-4 else f'{p_value:.4f}'


def nats(value: float) -> str:
    return f'{value:.4f}'


def _scaled(value: float, prefixes: Sequence[str], digits: int) -> tuple[float, str]:
    """The value with the first of the prefixes, factors of 1000 apart, that makes it below 1000."""
    *smaller, largest = prefixes
    for prefix in smaller:
        if abs(value) < 1000 - 0.5 * 10**-digits:
            return value, prefix
        value /= 1000
    return value, largest


def si(value: float) -> str:
    """`162.15M`, with the largest of K, M, G, T that leaves a whole part; `512` without one."""
    value, prefix = _scaled(value, ('', 'K', 'M', 'G', 'T'), digits=2)
    return f'{value:.2f}{prefix}' if prefix else f'{value:.0f}'


def approximate(count: float) -> str:
    """A count in three digits: `17.9 M`, `223 K`, `512`."""
    value, prefix = _scaled(float(f'{count:.3g}'), ('', 'K', 'M', 'G', 'T'), digits=1)
    return f'{value:.3g} {prefix}'.rstrip()


def amount(number: float | None) -> str:
    """A number of tokens or FLOPs: `460,800`, `2.29e+12`, `unknown`."""
    if number is None:
        return 'unknown'
    return f'{number:,}' if isinstance(number, int) and number < 10**9 else f'{number:.3g}'


def flop_count(value: float | None, unit: str = 'F') -> str:
    """FLOPs or FLOP/s with a prefix: `854.7 MF`, `101.2 TFLOP/s`."""
    if value is None:
        return 'n/a'
    value, prefix = _scaled(value, ('', 'K', 'M', 'G', 'T', 'P', 'E', 'Z'), digits=1)
    return f'{value:,.1f} {prefix}{unit}'


def teraflops(value: float | None, unit: str = 'F') -> str:
    """`flop_count` of a value in units of 10¹² FLOPs."""
    return flop_count(None if value is None else value * 1e12, unit)


def byte_count(count: float) -> str:
    """`1.50 GB`, `2.00 MB`, `0.50 kB`."""
    value, prefix = _scaled(count / 1000, ('k', 'M', 'G'), digits=2)
    return f'{value:.2f} {prefix}B'


# --- Times ----------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """`2h 03m`, `1m 00s`, `59.4s`."""
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours:
        return f'{hours}h {minutes % 60:02d}m'
    return f'{minutes}m {round(seconds) % 60:02d}s' if minutes else f'{seconds:.1f}s'


def clock(seconds: float | None) -> str:
    """`0:12:30`, or `2 days, 3:04:05`."""
    return 'n/a' if seconds is None else str(timedelta(seconds=round(seconds)))


def milliseconds(value: float | None) -> str:
    """`2.34ms`, `234ms`, `12.3s`."""
    if value is None:
        return 'n/a'
    if value < 10:
        return f'{value:.2f}ms'
    return f'{value:.0f}ms' if value < 10_000 else f'{value / 1000:.1f}s'


# --- Lines and tables -----------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns two spaces apart; `align` has '<' or '>' for each."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join(f'{cell:{side}{width}}' for cell, side, width in zip(row, align, widths)).rstrip()
        for row in rows
    )


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], rules: Sequence[str] = ()
) -> list[str]:
    """The lines of a table in Markdown, whose cells are escaped already.

    rules: of the columns, such as `---:` for right-aligned text; `---` by default.
    """
    lines = [header, rules or ['---'] * len(header), *rows]
    return [f'| {" | ".join(cells)} |' for cells in lines]


def markdown_anchor(title: str) -> str:
    """The name that GitHub gives a heading."""
    return re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')


def wrapped(text: str, indent: str = '') -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def commented(code: str, comment: str) -> str:
    """A line of a config file."""
    return f'{code:<48}  # {comment}'


def join_names(names: Sequence[str]) -> str:
    """The names with commas, at most LISTED of them."""
    more = len(names) - LISTED
    return ', '.join(names[:LISTED]) + (f' and {more} more' if more > 0 else '')


def first_lines(text: str, width: int) -> list[str]:
    """The first lines of a generated text, with its control characters escaped."""
    paragraphs = visible(text).replace('\t', ' ').strip('\n').split('\n')
    lines = [line for whole in paragraphs for line in textwrap.wrap(whole, width) or ['']]
    return lines if len(lines) <= SAMPLE_LINES else [*lines[:SAMPLE_LINES], '…']
