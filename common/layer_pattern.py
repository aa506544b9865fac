"""Layer patterns such as 'LLLG' and 'DDD MMMA*6': which kind each layer has.

A pattern is a list of terms of single letters, separated by spaces. `TERM*N` repeats the whole term
N times, `TERM*` repeats it to fill the depth and is cut off at the end of it. A single term without
a star fills the depth too. Otherwise the terms must add up to the number of layers.
"""

import re
from itertools import groupby

from common.errors import UserError
from common.registry import show_value

MOST_LAYERS = 10_000
MAX_TAG = 24  # characters of a pattern in a name
TAG_UNIT = 8  # letters of a repeating pattern that a name shows one by one
SHOWN_LETTERS = 64  # of the layers of a model, one by one
_TERM = re.compile(r'([A-Za-z]+)(\*([1-9][0-9]{0,8})?)?')
SYNTAX = (
    'letters, one per layer, in terms separated by spaces; TERM*N repeats a term, and one TERM* '
    "fills the depth, such as 'LLLG' or 'DDD MMMA*6'"
)


def is_kind(name: str) -> bool:
    """Whether `name` can be a letter of a pattern."""
    return len(name) == 1 and name.isascii() and name.isalpha()


def is_layer_pattern(pattern: str) -> bool:
    """Whether the pattern is well-formed, whatever the number of layers."""
    terms = _terms(pattern)
    return bool(terms) and [count for _, count in terms].count(None) <= 1


def _terms(pattern: str) -> list[tuple[str, int | None]]:
    """The letters and the repetitions of each term, None for one that fills the depth.

    Empty if the pattern is malformed.
    """
    terms: list[tuple[str, int | None]] = []
    words = pattern.split()
    for word in words:
        match = _TERM.fullmatch(word)
        if match is None:
            return []
        letters, star, count = match.groups()
        fills = star == '*' or (star is None and len(words) == 1)
        terms.append((letters, None if fills else int(count or 1)))
    return terms


def letters_of(pattern: str) -> list[str]:
    """The distinct letters of a well-formed pattern, in order."""
    return list(dict.fromkeys(filter(str.isalpha, pattern)))


def expand_pattern(pattern: str, layers: int) -> str:
    """The letter of each layer, for a well-formed pattern. Raises UserError if it does not fit."""
    terms = _terms(pattern)
    fills = any(count is None for _, count in terms)
    # The sum first: the text of a large repetition would not fit into memory.
    fixed = sum(len(term) * (count or 0) for term, count in terms)
    if fixed > layers or (fixed < layers and not fills):
        fixes = [f'Set --n_layer={fixed}'] if fixed <= MOST_LAYERS else []
        fixes += ['shorten the pattern' if fills else 'end one term with * to fill the depth']
        advice = ', or '.join(fixes)
        raise UserError(
            f'layer_pattern={show_value(pattern)} has {"at least " * fills}{fixed:,} layers, but '
            f'n_layer={layers}. {advice[0].upper()}{advice[1:]}.'
        )
    letters = ''
    for term, count in terms:
        length = layers - fixed if count is None else len(term) * count
        letters += (term * (length // len(term) + 1))[:length]
    return letters


def shortest_pattern(letters: str) -> str:
    """The shortest pattern whose repetition begins with those letters."""
    for length in range(1, len(letters)):
        repeated = letters[:length] * (len(letters) // length + 1)
        if repeated.startswith(letters):
            return letters[:length]
    return letters


def compact_pattern(letters: str) -> str:
    """A pattern of exactly these letters, short if they are many: 'LLLG*25', 'D*3 M*57'."""
    if len(letters) <= SHOWN_LETTERS:
        return letters
    unit = shortest_pattern(letters)
    repeats = len(letters) // len(unit)
    if len(unit) > 1 and repeats > 1:
        rest = letters[repeats * len(unit) :]
        return f'{unit}*{repeats} {rest}'.rstrip()
    return ' '.join(f'{letter}*{count}' for letter, count in _run_lengths(letters))


def pattern_tag(letters: str) -> str:
    """The layers as a part of a name, at most MAX_TAG characters: `LLLG`, `3D58M`."""
    runs = ''.join(f'{count if count > 1 else ""}{name}' for name, count in _run_lengths(letters))
    unit = shortest_pattern(letters)
    tag = unit if len(unit) <= TAG_UNIT else min(unit, runs, key=len)
    return tag if len(tag) <= MAX_TAG else f'{tag[: MAX_TAG - 3]}...'


def _run_lengths(letters: str) -> list[tuple[str, int]]:
    return [(letter, len([*run])) for letter, run in groupby(letters)]
