"""How the comparison writes numbers, lists and tables."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

WIDTH = 100  # columns that the text aims at
LISTED = 8  # as many names or values as one line lists


def table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns two spaces apart; `align` has '<' or '>' for each."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join(f'{cell:{side}{width}}' for cell, side, width in zip(row, align, widths)).rstrip()
        for row in rows
    )


def wrapped(text: str, indent: str = '') -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def listing(texts: Sequence[str]) -> str:
    """The texts with commas, at most LISTED of them."""
    more = len(texts) - LISTED
    return ', '.join(texts[:LISTED]) + (f' and {more} more' if more > 0 else '')


def or_dash(value: Any, form: Callable[[Any], str], unknown: str = '-') -> str:
    return unknown if value is None else form(value)


def si(value: float) -> str:
    """`162.15M`, with the largest of K, M, G, T that leaves a whole part."""
    for size, unit in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'K')):
        if value >= size:
            return f'{value / size:.2f}{unit}'
    return f'{value:.0f}'


def duration(seconds: float) -> str:
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours:
        return f'{hours}h {minutes % 60:02d}m'
    return f'{minutes}m {round(seconds) % 60:02d}s' if minutes else f'{seconds:.1f}s'


def p_text(p_value: float) -> str:
    return '<0.0001' if p_value < 1e-4 else f'{p_value:.4f}'


def nats(value: float) -> str:
    return f'{value:.4f}'
