"""Layer patterns such as 'LLLG' and 'DDD MMMA*6': which kind each layer has.

A pattern is a list of terms of single letters, separated by spaces. `TERM*N` repeats the whole term
N times, `TERM*` repeats it to fill the depth and is cut off at the end of it. A single term without
a star fills the depth too. Otherwise the terms must add up to the number of layers.
"""

import re

from common.errors import UserError

_TERM = re.compile(r'([A-Za-z]+)(\*([1-9][0-9]{0,4})?)?')
SYNTAX = (
    'letters, one per layer, in terms separated by spaces; TERM*N repeats a term, and one TERM* '
    "fills the depth, such as 'LLLG' or 'DDD MMMA*6'"
)


def is_kind(name: str) -> bool:
    """Whether `name` can be a letter of a pattern."""
    return len(name) == 1 and name.isascii() and name.isalpha()


def is_layer_pattern(pattern: str) -> bool:
    """Whether the pattern is well-formed, whatever the number of layers."""
    matches = [_TERM.fullmatch(term) for term in pattern.split()]
    return bool(matches) and all(matches) and sum(map(_fills, matches)) <= 1


def letters_of(pattern: str) -> list[str]:
    """The distinct letters of a well-formed pattern, in order."""
    return list(dict.fromkeys(filter(str.isalpha, pattern)))


def expand_pattern(pattern: str, layers: int) -> str:
    """The letter of each layer, for a well-formed pattern. Raises UserError if it does not fit."""
    terms = [_TERM.fullmatch(term) for term in pattern.split()]
    single = len(terms) == 1 and terms[0] is not None and terms[0][2] is None
    fills = [single or _fills(term) for term in terms]
    texts = ['' if fill else term[1] * int(term[3] or 1) for term, fill in zip(terms, fills)]
    missing = layers - sum(map(len, texts))
    if missing < 0 or (missing > 0 and not any(fills)):
        raise UserError(
            f'layer_pattern={pattern!r} has {layers - missing} layers, but n_layer={layers}. '
            f'Set --n_layer={layers - missing}, or end one term with * to fill the depth.'
        )
    if any(fills):
        position = fills.index(True)
        term = terms[position][1]
        texts[position] = (term * (missing // len(term) + 1))[:missing]
    return ''.join(texts)


def shortest_pattern(letters: str) -> str:
    """The shortest pattern whose repetition begins with those letters."""
    for length in range(1, len(letters)):
        repeated = letters[:length] * (len(letters) // length + 1)
        if repeated.startswith(letters):
            return letters[:length]
    return letters


def _fills(term: re.Match | None) -> bool:
    return term is not None and term[2] == '*'
