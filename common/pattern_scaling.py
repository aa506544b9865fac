"""A released model's pattern of layers at another depth, with its period and its proportions."""

from collections import Counter
from math import floor
from typing import NamedTuple

from common.layer_pattern import shortest_pattern


class Parts(NamedTuple):
    """Letters of layers as first layers, then a unit that repeats to the end."""

    first: str
    unit: str


def scaled_pattern(letters: str, layers: int) -> str:
    """The pattern of so many layers. letters: those of the released model's layers.

    First layers of other kinds keep their share, the unit that repeats is kept if it fits. What
    does not fit is sampled: each kind has its share, but at least one layer, at the same part of
    the depth.
    """
    if layers < len({*letters}):
        return shortest_pattern(letters)  # cut off
    return shortest_pattern(_at_depth(letters, layers))


def _at_depth(letters: str, layers: int) -> str:
    first, unit = parts(letters)
    count = max(1, round(len(first) * layers / len(letters))) if first else 0
    rest = layers - count
    if len({*unit}) > rest or len({*first}) > count:
        return sampled(letters, layers)
    begin = sampled(first, count)
    if len(unit) > rest:
        return begin + sampled(unit, rest)
    return begin + (unit * (rest // len(unit) + 1))[:rest]


def parts(letters: str) -> Parts:
    """First layers, as few as possible, and the shortest unit that then repeats at least twice.

    Layers at the end that are fewer than a unit may differ, as a last layer of attention does. If
    nothing repeats, all layers are one unit.
    """
    for begin in range(len(letters) // 2 + 1):
        rest = letters[begin:]
        for length in range(1, len(rest) // 2 + 1):
            whole = rest[: len(rest) // length * length]
            if whole == rest[:length] * (len(whole) // length):
                return Parts(letters[:begin], rest[:length])
    return Parts('', letters)


def sampled(letters: str, layers: int) -> str:
    """So many of the letters, in proportion, and each at its part of the depth."""
    if layers >= len(letters):
        return (letters * (layers // max(1, len(letters)) + 1))[:layers]
    shares = _shares(Counter(letters), layers)
    places = []
    for letter, share in shares.items():
        own = [place for place, other in enumerate(letters) if other == letter]
        for number in range(share):
            middle = (number + 0.5) * len(own) / share - 0.5
            low = min(len(own) - 1, max(0, floor(middle)))
            high = min(len(own) - 1, low + 1)
            places.append((own[low] + (own[high] - own[low]) * (middle - low), letter))
    places.sort(key=lambda entry: (entry[0], letters.index(entry[1])))
    return ''.join(letter for _, letter in places)


def _shares(counts: Counter, layers: int) -> dict[str, int]:
    """Layers of each kind, in proportion by largest remainders; if possible, at least one."""
    total = sum(counts.values())
    exact = {letter: count * layers / total for letter, count in counts.items()}
    least = 1 if layers >= len(counts) else 0
    shares = {letter: max(least, floor(share)) for letter, share in exact.items()}
    while sum(shares.values()) != layers:
        step = 1 if sum(shares.values()) < layers else -1
        movable = [k for k in shares if step > 0 or shares[k] > least]
        shares[max(movable, key=lambda k: step * (exact[k] - shares[k]))] += step
    return shares
