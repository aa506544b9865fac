"""The values of a record, read with a check of each: a comparison trusts no file."""

import math
from collections.abc import Mapping
from typing import Any


class MalformedRecord(ValueError):
    """A record holds a value that no run writes."""


def _value(
    source: Mapping[str, Any], key: str, kind: type | tuple, description: str, default: Any = None
) -> Any:
    """The value of `key`, or the default where it is missing or null. Raises MalformedRecord."""
    value = source.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise MalformedRecord(f'{key} is {_short(value)}, not {description}')
    if isinstance(value, float) and not math.isfinite(value):
        raise MalformedRecord(f'{key} is {value}, which JSON cannot hold')
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f'{text[:37]}…'


def number(source: Mapping[str, Any], key: str) -> float | None:
    """A finite number that fits in a float, or None."""
    value = _value(source, key, (int, float), 'a number')
    if value is not None and abs(value) > 1e300:
        raise MalformedRecord(f'{key} is {_short(value)}, which is too large')
    return value


def count(source: Mapping[str, Any], key: str) -> int | None:
    value = number(source, key)
    if value is not None and (value != int(value) or value < 0):
        raise MalformedRecord(f'{key} is {value!r}, not a count')
    return None if value is None else int(value)


def text(source: Mapping[str, Any], key: str) -> str | None:
    return _value(source, key, str, 'a text')


def mapping(source: Mapping[str, Any], key: str) -> dict:
    return _value(source, key, dict, 'an object', {})


def entries(source: Mapping[str, Any], key: str) -> list[dict]:
    """A list of objects."""
    values = _value(source, key, list, 'a list', [])
    if not all(isinstance(value, dict) for value in values):
        raise MalformedRecord(f'{key} holds something that is no object')
    return values


def required(value: Any, key: str) -> Any:
    if value is None:
        raise MalformedRecord(f'{key} is missing')
    return value
