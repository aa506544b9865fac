"""Values in `Option.requires` that stand for several values of the other option."""

from dataclasses import dataclass
from typing import Any

JOINT = '+'  # between names of which an option takes several


@dataclass(frozen=True)
class Condition:
    """In `Option.requires`, in place of a value of the other option."""

    value: Any

    def holds(self, value: Any) -> bool:
        raise NotImplementedError


class AnyBut(Condition):
    """Every value except this one."""

    def holds(self, value: Any) -> bool:
        return value != self.value


class Naming(Condition):
    """Every value of a `JoinedRegistry`'s option that has this name."""

    def holds(self, value: Any) -> bool:
        return self.value in str(value).split(JOINT)


def holds(needed: Any, value: Any) -> bool:
    """Whether the other option's value is the needed one, or one for which that stands."""
    return needed.holds(value) if isinstance(needed, Condition) else value == needed


def named_value(needed: Any) -> Any:
    """The value that a condition names, or the needed value itself."""
    return needed.value if isinstance(needed, Condition) else needed
