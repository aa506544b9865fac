"""Checks of a class before it is registered: its bases, methods, signatures and attributes.

Every message names the class, the method or attribute, and the expectation.
"""

import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Contract:
    """Requirements of the components of one registry.

    bases: required base classes. constructed_with: arguments of the constructor; None if components
    are never instantiated. methods: methods that a component must define itself, with arguments.
    """

    bases: tuple[type, ...]
    constructed_with: tuple[str, ...] | None = None
    methods: dict[str, tuple[str, ...]] = field(default_factory=dict)


def violations(component: typing.Any, contract: Contract) -> Iterator[str]:
    """The reasons why `component` cannot be registered, a sentence each."""
    missing = [
        base.__name__
        for base in contract.bases
        if not (isinstance(component, type) and issubclass(component, base))
    ]
    if missing:
        given = getattr(component, '__name__', repr(component))
        yield f'{given} must be a subclass of {" and ".join(missing)}.'
        return
    yield from _attributes(component)
    yield from _methods(component, contract)
    yield from _overrides(component, contract.bases)
    if contract.constructed_with is not None:
        problem = _cannot_take(component, len(contract.constructed_with))
        if problem:
            arguments = ', '.join(('self', *contract.constructed_with))
            yield f'{component.__name__}.__init__ must be __init__({arguments}): {problem}.'


def _attributes(component: type) -> Iterator[str]:
    """Class attributes against the types that a base's `name: ClassVar[type]` declares."""
    declared = {
        name: typing.get_args(hint)[0]
        for base in reversed(component.__mro__)
        for name, hint in inspect.get_annotations(base).items()
        if typing.get_origin(hint) is typing.ClassVar and typing.get_args(hint)
    }
    for name, hint in declared.items():
        union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        allowed = tuple(
            typing.get_origin(each) or each for each in (typing.get_args(hint) if union else [hint])
        )
        value = getattr(component, name)
        if all(isinstance(each, type) for each in allowed) and not isinstance(value, allowed):
            names = ' or '.join('None' if t is types.NoneType else t.__name__ for t in allowed)
            yield f'{component.__name__}.{name} must be {names}, but is {value!r}.'


def _methods(component: type, contract: Contract) -> Iterator[str]:
    """The required methods and their arguments."""
    from_bases = {id(inspect.getattr_static(b, n, None)) for b in contract.bases for n in dir(b)}
    for name, arguments in contract.methods.items():
        method = inspect.getattr_static(component, name, None)
        plain = isinstance(method, types.FunctionType)
        shown = f'{name}({", ".join(("self", *arguments) if plain else arguments)})'
        if method is None or id(method) in from_bases:
            yield f'{component.__name__} must define {name}({", ".join(arguments)}).'
        elif problem := _cannot_take(getattr(component, name), len(arguments) + plain):
            yield f'{component.__name__}.{name} must be {shown}: {problem}.'


def _overrides(component: type, bases: tuple[type, ...]) -> Iterator[str]:
    """Methods that override a base's, which must accept the same arguments."""
    defined: dict[str, object] = {}
    for base in bases:
        for ancestor in reversed(base.__mro__):
            if ancestor is not object and ancestor.__module__.partition('.')[0] != 'torch':
                defined |= vars(ancestor)
    for name, replaced in defined.items():
        if name.startswith('_') or inspect.getattr_static(component, name) is replaced:
            continue
        if not isinstance(replaced, (types.FunctionType, classmethod, staticmethod)):
            continue
        form = '' if isinstance(replaced, types.FunctionType) else f' ({type(replaced).__name__})'
        signature = inspect.signature(replaced.__get__(None, component))
        shown = f'{name}({", ".join(signature.parameters)}){form}'
        override = getattr(component, name)
        if not callable(override):
            yield f'{component.__name__}.{name} must be {shown}, but is {override!r}.'
        elif problem := _cannot_be_called_as(override, signature):
            yield f'{component.__name__}.{name} must be {shown}: {problem}.'


def _cannot_be_called_as(method, signature: inspect.Signature) -> str | None:
    """The reason why `method` does not accept the positional arguments of `signature`, or None."""
    positional = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    least = sum(parameter.default is parameter.empty for parameter in positional)
    return _cannot_take(method, least) or _cannot_take(method, len(positional))


def _cannot_take(method, count: int) -> str | None:
    """The reason why `method` cannot be called with `count` positional arguments, or None."""
    try:
        inspect.signature(method).bind(*[None] * count)
    except TypeError as error:
        return str(error)
    except ValueError:  # written in C, without a signature
        return None
    return None
