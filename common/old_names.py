"""Former names that users' components may implement or call: each works, with a note once.

`old_imports` has the import paths of moved modules.
"""

import sys
from collections.abc import Callable
from typing import Any, ClassVar

from common.console_output import write_progress

_noted: set[str] = set()


def note_once(old: str, new: str) -> None:
    if old not in _noted:
        _noted.add(old)
        write_progress(f'note: {old} is now {new}; the old name will be removed.')


def renamed_classes(module: str, new_names: dict[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a module with renamed classes, `new_names` (old -> new)."""

    def __getattr__(name: str) -> object:
        if name not in new_names:
            raise AttributeError(f'module {module!r} has no attribute {name!r}')
        note_once(name, new_names[name])
        return getattr(sys.modules[module], new_names[name])

    return __getattr__


def renamed_attribute(old: str, new: str) -> property:
    """For a class body: `old = renamed_attribute('old', 'new')`."""

    return property(
        lambda instance: by_old_name(instance, old, new),
        lambda instance, value: setattr(instance, new, value),
    )


def by_old_name(instance: object, old: str, new: str) -> Any:
    """The attribute or method `new`, accessed as `old`."""
    note_once(f'{type(instance).__name__}.{old}', new)
    return getattr(instance, new)


class RenamedMethods:
    """Base of classes with renamed methods: `renamed_methods`, old -> new.

    A subclass may define and call either name, also through `super()`.
    """

    renamed_methods: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for old, new in cls.renamed_methods.items():
            if old in vars(cls):
                note_once(f'{cls.__name__}.{old}', new)
                setattr(cls, new, vars(cls)[old])
            elif new in vars(cls):
                setattr(cls, old, _OldMethod(old, new, vars(cls)[new]))


class _OldMethod:
    """A method under its former name."""

    def __init__(self, old: str, new: str, method):
        self.old, self.new, self.method = old, new, method

    def __get__(self, instance: object, owner: type):
        note_once(f'{owner.__name__}.{self.old}', self.new)
        return self.method.__get__(instance, owner)
