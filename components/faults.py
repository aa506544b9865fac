"""Errors in a user's own component are reported in one sentence instead of a traceback."""

import inspect
import traceback
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

from common import errors
from common.errors import UserError
from common.registry import ALL_REGISTRIES, Registry

# Packages with the project's own components, whose errors keep their traceback.
PROJECT_PACKAGES = ('components', 'optim')


class _ComponentMethod(NamedTuple):
    """A component and the method that a frame runs."""

    registry: Registry
    name: str
    component: type
    method: str


def explain(error: Exception) -> UserError | None:
    """A UserError with class, method, file and line if a user's own component raised `error`.

    None for other errors.
    """
    components = list(_foreign_components())
    frames = list(traceback.walk_tb(error.__traceback__))
    for index in reversed(range(len(frames))):
        culprit = _component_method(frames[index][0], components)
        if culprit is None:
            continue
        file = frames[index][0].f_code.co_filename
        line = next(n for frame, n in reversed(frames) if frame.f_code.co_filename == file)
        message = f'{type(error).__name__}: {error}' if str(error) else type(error).__name__
        return UserError(
            f'{culprit.registry.option}={culprit.name!r}: '
            f'{culprit.component.__name__}.{culprit.method} '
            f'raised {message} ({file}, line {line}). --debug shows the traceback.'
        )
    return None


def is_foreign(component: type) -> bool:
    """Whether a class is not part of the project."""
    return component.__module__.partition('.')[0] not in (
        *PROJECT_PACKAGES,
        'torch',
        'builtins',
        'abc',
    )


def _foreign_components() -> Iterator[tuple[Registry, str, type]]:
    for registry in ALL_REGISTRIES:
        for name, component in registry.registered():
            if is_foreign(component):
                yield registry, name, component


def _component_method(
    frame: FrameType, components: list[tuple[Registry, str, type]]
) -> _ComponentMethod | None:
    """The component whose method the frame runs, defined by its class or inherited."""
    code, owner = frame.f_code, frame.f_locals.get('self', frame.f_locals.get('cls'))
    owner = owner if isinstance(owner, type) else type(owner)
    for registry, name, component in components:
        for ancestor in component.__mro__:
            if ancestor.__module__.partition('.')[0] in ('torch', 'builtins', 'abc'):
                continue
            if not is_foreign(ancestor) and owner is not component:
                continue
            for method, value in vars(ancestor).items():
                if code in _codes(value):
                    return _ComponentMethod(registry, name, component, method)
    return None


def _codes(value: Any) -> Iterator[CodeType]:
    """The code of a method, and of the functions defined in it."""
    if isinstance(value, property):
        value = value.fget
    value = inspect.unwrap(getattr(value, '__func__', value), stop=lambda f: False)
    code = getattr(value, '__code__', None)
    pending = [code] if isinstance(code, CodeType) else []
    while pending:
        code = pending.pop()
        yield code
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


errors.error_translators.append(explain)
