"""Checked access to the values of a record, which may be damaged or edited."""

import math
from collections.abc import Mapping
from typing import Any


class MalformedRecord(ValueError):
    """A record contains a value that no run writes."""


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
        raise MalformedRecord(f'{key} is {value}, which is not valid JSON')
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f'{text[:37]}…'


def number(source: Mapping[str, Any], key: str) -> float | None:
    """A finite number that fits in a float, or None."""
    value = _value(source, key, (int, float), 'a number')
    if value is not None and abs(value) > 1e300:
        raise MalformedRecord(f'{key} is {_short(value)}: too large')
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
        raise MalformedRecord(f'{key} contains a value that is not an object')
    return values


def required(value: Any, key: str) -> Any:
    if value is None:
        raise MalformedRecord(f'{key} is missing')
    return value
