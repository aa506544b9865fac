"""Values in `Option.requires` that stand for several values of the other option."""

import typing
from dataclasses import dataclass


@dataclass(frozen=True)
class AnyBut:
    """In `Option.requires`: every value of the other option except this one."""

    value: typing.Any


@dataclass(frozen=True)
class Naming:
    """In `Option.requires`: every value of a `JoinedRegistry`'s option that has this name."""

    name: str
