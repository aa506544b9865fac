"""The parts of the configuration: `Option`, `Registry`, `FrozenConfig`, `Configurable`.

An `Option` is one key that a user can set: its type, default, one line of help and allowed values.
A `Registry` maps names to components and is the list of allowed values of the option that chooses
among them. A `FrozenConfig` holds resolved values and their origins. A `Configurable` is the base
of every component.
"""

import copy
import functools
import importlib
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from common.class_contract import Contract, violations
from common.conditions import AnyBut, holds, named_value
from common.errors import UserError, did_you_mean
from common.paths import BadPath, expand_home

ALL_REGISTRIES: list['Registry'] = []


class Registry:
    """The components of one option, by name; the module `home` is imported on first use.

    The same name from two places is an error; the same class defined again (a config file that
    is read twice) replaces itself.
    """

    contract: Contract | None = None

    def __init__(self, option: str, title: str, home: str):
        self.option, self.title, self.home = option, title, home
        self._components: dict[str, type] = {}
        self._sources: dict[str, str] = {}
        ALL_REGISTRIES.append(self)

    @property
    def form_hint(self) -> str:
        """Forms of a value other than one of its names, in words."""
        return ''

    def registered(self) -> Iterator[tuple[str, type]]:
        """Names and components registered so far, without importing those of the project."""
        yield from self._components.items()

    def expect(
        self,
        *bases: type,
        constructed_with: tuple[str, ...] | None = None,
        **methods: tuple[str, ...],
    ) -> None:
        """Set the requirements of its components, which are checked from now on; see `Contract`."""
        self.contract = Contract(bases, constructed_with, methods)

    def register(self, name: str, source: str = '') -> Callable[[type], type]:
        """Class decorator: `@NORM_REGISTRY.register('rmsnorm', source='Zhang & Sennrich 2019')`.

        A class without a `tag` gets its name as one. Raises UserError if the class does not meet
        the registry's requirements.
        """
        if not isinstance(name, str) or not name:
            raise UserError(f'{self.option}={name!r}: the name of a component must be a string.')

        def add(component: typing.Any) -> type:
            self._check(name, component)
            known = self._components.get(name)
            if known is not None and _full_name(known) != _full_name(component):
                raise UserError(
                    f'{self.option}={name!r} is registered twice: by {_full_name(known)} and '
                    f'by {_full_name(component)}. Give one of them another name.'
                )
            self._components[name] = component
            self._sources[name] = source
            if 'tag' not in vars(component):
                component.tag = name
            return component

        return add

    def _check(self, name: str, component: typing.Any) -> None:
        if self.contract is None:
            return
        problems = list(dict.fromkeys(violations(component, self.contract)))
        if not problems:
            problems = [
                f'{component.__name__}.options: {problem}'
                for key, option in component.options.items()
                for problem in option_problems(key, option)
            ]
        if problems:
            raise UserError(f'{self.option}={name!r}: {" ".join(problems)}')

    def __getitem__(self, name: str) -> typing.Any:
        self._fill()
        return self._components[name]

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._components

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return iter(self._components)

    def components(self, value: str) -> dict[str, typing.Any]:
        """The components that a value of the option chooses, by name."""
        return {value: self[value]}

    def canonical(self, value: str) -> str:
        """The one spelling of a value that may be written in several ways."""
        return value

    def where(self, fits: Callable[[type], bool], option: str, title: str) -> 'Registry':
        """A registry for another option: the components that fit, including later ones."""
        return _Subset(self, fits, option, title)

    def source(self, name: str) -> str:
        """The paper or program where the component was published."""
        return self._sources[name]

    def _fill(self) -> None:
        if self.home not in sys.modules:
            importlib.import_module(self.home)


class _Subset(Registry):
    """The components of another registry that fit."""

    def __init__(self, whole: Registry, fits: Callable[[type], bool], option: str, title: str):
        super().__init__(option, title, whole.home)
        self.whole, self.fits, self._sources = whole, fits, whole._sources

    def __getitem__(self, name: str) -> typing.Any:
        if name not in self:
            raise KeyError(name)
        return self.whole[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.whole and self.fits(self.whole[name])

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.whole if name in self)


def _full_name(component: type) -> str:
    return f'{component.__module__}.{component.__qualname__}'


LARGEST_INT = 2**63 - 1  # of numpy and torch
NONE_WORDS = ('None', 'none', 'null')  # on the command line
SHOWN_LENGTH = 200  # characters of a value in a message
REPR_WIDTH = 88  # columns of a FrozenConfig's repr

Check = tuple[Callable[[typing.Any], bool], str]


@functools.cache  # equal options compare equal
def at_least(low: float, at_most: float = math.inf) -> Check:
    limit = '' if at_most == math.inf else f', at most {at_most:,}'
    return (lambda value: low <= value <= at_most), f'at least {low:g}{limit}'


@functools.cache
def above(low: float) -> Check:
    return (lambda value: value > low), f'above {low:g}'


@functools.cache
def between(low: float, high: float) -> Check:
    return (lambda value: low <= value <= high), f'from {low:g} to {high:g}'


@functools.cache
def fraction(value_name: str = 'a fraction') -> Check:
    return (lambda value: 0 <= value < 1), f'{value_name} from 0 up to, but not including, 1'


@dataclass(frozen=True)
class Option:
    """One key that a user can set.

    type: int, float, bool or str, or one of them `| None`, where None means "derived" or "off".
    choices: the allowed strings, as a tuple or as a Registry of components.
    check: (predicate, allowed values in words), applied to every value that is not None.
    requires: (other option, value, AnyBut(value) or Naming(name)) without which this option has no
    effect.
    aliases: value -> (other option, its value), for values that set the other option instead.
    is_path: a leading `~` is the home folder (`paths.expand_home`).
    about: a description of each choice, if they are too many for a line.
    scope: of an option of the architecture: 'layer' if layers may differ in it, 'model' if not,
    'pattern' if it is a short form of `layer_pattern`.
    """

    type: typing.Any
    default: typing.Any
    help: str
    choices: tuple[str, ...] | Registry | None = None
    check: Check | None = None
    requires: tuple[str, typing.Any] | None = None
    aliases: dict[str, tuple[str, typing.Any]] = field(default_factory=dict, hash=False)
    is_path: bool = False
    scope: str = 'layer'
    about: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def base_type(self) -> type:
        return next(t for t in self._types() if t is not types.NoneType)

    @property
    def optional(self) -> bool:
        return types.NoneType in self._types()

    def is_active(self, values: dict) -> bool:
        """Whether this option has an effect, given the values of all options."""
        if self.requires is None:
            return True
        key, needed = self.requires
        return holds(needed, values.get(key))

    def _types(self) -> tuple:
        return typing.get_args(self.type) or (self.type,)

    def type_name(self) -> str:
        return self.base_type.__name__ + (' or None' if self.optional else '')

    def allowed(self) -> str:
        """The allowed values, in words."""
        if self.choices is not None:
            names = ', '.join(repr(name) for name in self.choices)
            form = self.choices.form_hint if isinstance(self.choices, Registry) else ''
            return f'one of {names}{form}' + (' or None' if self.optional else '')
        if self.check is not None and self.base_type is str:
            return self.check[1]
        return self.type_name() + (f', {self.check[1]}' if self.check else '')

    def accept(self, key: str, value: typing.Any) -> typing.Any:
        """The value in this option's type (int becomes float); UserError if it is not allowed."""
        base = self.base_type
        if value is None and self.optional:
            return None
        if base is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) <= sys.float_info.max else math.inf
        if not isinstance(value, base) or (base is not bool and isinstance(value, bool)):
            given = type(value).__name__
            raise UserError(
                f'{key}={show_value(value)}: {given} given, but {key} takes {self.allowed()}.'
            )
        if base is int and abs(value) > LARGEST_INT:
            raise UserError(
                f'{key}={show_value(value)}: no whole number may be above {LARGEST_INT:,}.'
            )
        if self.is_path:
            try:
                value = expand_home(value)
            except BadPath as error:
                raise UserError(f'{key}={error}') from error
        if base is float and not math.isfinite(value):
            raise UserError(f'{key}={value!r}: not a finite number; {key} takes {self.allowed()}.')
        if self.choices is not None:
            if value not in self.choices and value not in self.aliases:
                hint = did_you_mean(value, (*self.choices, *self.aliases))
                raise UserError(f'{key}={show_value(value)}: {key} takes {self.allowed()}.{hint}')
            if isinstance(self.choices, Registry):
                value = self.choices.canonical(value)
        if self.check is not None and not self.check[0](value):
            raise UserError(f'{key}={show_value(value)}: {key} takes {self.allowed()}.')
        return value

    def means_none(self, text: str) -> bool:
        """Whether `text` on the command line is None, and not the name of a choice."""
        return text in NONE_WORDS and text not in (self.choices or ())

    def parse(self, key: str, text: str) -> typing.Any:
        """The value of `text` from the command line; UserError if it is not allowed."""
        base = self.base_type
        value: typing.Any
        if self.optional and self.means_none(text):
            return None
        try:
            if base is bool:
                value = _BOOLEANS[text.lower()]
            elif base is int:
                number = float(text) if 'e' in text.lower() else int(text.replace('_', ''))
                value = int(number) if number == int(number) else number
            elif base is float:
                value = float(text)
            else:
                value = text[1:-1] if len(text) > 1 and text[0] == text[-1] in '"\'' else text
        except (KeyError, ValueError, OverflowError):
            raise UserError(f'--{key}={text}: {key} takes {self.allowed()}.') from None
        return self.accept(key, value)


def owners(key: str, options: dict[str, Option]) -> list[tuple[str, typing.Any]]:
    """The (option, value) pairs with which `key` has an effect; none for a core option."""
    required = options[key].requires
    if required and required[0] in options:
        return [required]
    return [
        (choice, name)
        for choice, option in options.items()
        if isinstance(option.choices, Registry)
        for name in option.choices
        if key in option.choices[name].options
    ]


def conditions_text(conditions: list[tuple[str, typing.Any]]) -> str:
    """`owners` in words: `ffn_type='swiglu' or 'geglu', or use_gqa=True`."""
    values: dict[str, list[str]] = {}
    for choice, value in conditions:
        relation = ' other than ' if isinstance(value, AnyBut) else '='
        values.setdefault(choice + relation, []).append(repr(named_value(value)))
    listed = [
        choice + ', '.join(names[:-1]) + ' or ' * (len(names) > 1) + names[-1]
        for choice, names in values.items()
    ]
    return ', or '.join(listed)


def option_problems(key: object, option: object) -> list[str]:
    """The problems of an entry of a component's `options`, a sentence each."""
    if not isinstance(key, str) or not key.isidentifier():
        return [f'{key!r} must be a name, as it becomes --NAME=value.']
    if not isinstance(option, Option):
        return [
            f'{key!r} must be an Option (from model_components import Option), but is {option!r}.'
        ]
    if not set(option._types()) <= {int, float, bool, str, types.NoneType}:
        return [f'the type of {key!r} must be int, float, bool or str, or one of them | None.']
    if isinstance(option.choices, Registry):  # not all of its names are known yet
        return []
    try:
        option.accept(key, option.default)
    except UserError as error:
        return [f'its default is not allowed: {problem}' for problem in error.problems]
    except (
        Exception
    ) as error:  # the check is not a (function, text), or the choices are not a tuple
        return [f'the check or the choices of {key!r}: {type(error).__name__}: {error}.']
    return []


def show_value(value) -> str:
    """The value for a message, shortened."""
    try:
        text = repr(value)
    except Exception:  # a class of the config file, or an int of thousands of digits
        text = f'a value of type {type(value).__name__}'
    return text if len(text) <= SHOWN_LENGTH else f'{text[:SHOWN_LENGTH]}…'


_BOOLEANS = {'true': True, 'false': False, '1': True, '0': False, 'yes': True, 'no': False}


class FrozenConfig:
    """Resolved values as read-only attributes, with the origin of each (`origins[key]`).

    Only options in use are attributes; `dropped` has a note on each value that an override made
    useless. Configs of a class are equal if their values are, whatever the origins.
    """

    def __init__(self, values: dict, origins: dict[str, str], dropped: list[str] | None = None):
        self.__dict__['_values'] = dict(values)
        self.__dict__['origins'] = dict(origins)
        self.__dict__['dropped'] = dropped or []

    def __getattr__(self, key: str):
        values = self.__dict__.get('_values', {})
        if key in values:
            return values[key]
        raise AttributeError(
            f'{type(self).__name__} has no option {key!r}, or no chosen component uses it',
            name=key,
            obj=self,
        )

    def __setattr__(self, key: str, value) -> None:
        raise AttributeError(f'{type(self).__name__} is frozen: {key} cannot be set')

    def __delattr__(self, key: str) -> None:
        raise AttributeError(f'{type(self).__name__} is frozen: {key} cannot be deleted')

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str):
        """The value; None if no chosen component uses the option."""
        return self._values.get(key)

    def to_dict(self) -> dict:
        return copy.deepcopy(self._values)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values == other._values  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        values = self._values.items()
        return hash(frozenset(item for item in values if not isinstance(item[1], dict)))

    def __repr__(self) -> str:
        """`Name(key=value, …)`, with a line for each key if it does not fit on one line."""
        name = type(self).__name__
        values = [f'{key}={value!r}' for key, value in self._values.items()]
        text = f'{name}({", ".join(values)})'
        if len(text) <= REPR_WIDTH:
            return text
        return '\n'.join([f'{name}(', *(f'    {value},' for value in values), ')'])

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._values})


class Configurable:
    """The interface between a component and the configuration; every part has a default.

    config: a ModelArchitectureConfig or a TrainingConfig, depending on the registry.
    """

    # Its own options: name -> Option. They become command-line options and config keys.
    options: typing.ClassVar[dict[str, Option]] = {}
    # Its part of the architecture's name; '' for the usual choice.
    tag: typing.ClassVar[str] = ''

    @classmethod
    def derived_values(cls, config: typing.Any) -> dict[str, tuple]:
        """Values for its options that are None: key -> (value, reason), from the other options."""
        return {}

    @classmethod
    def problems(cls, config: typing.Any) -> list[str]:
        """Combinations that are not allowed, a sentence each."""
        return []

    @classmethod
    def model_problems(cls, config: typing.Any) -> list[str]:
        """Combinations of layers that are not allowed, a sentence each. config: the model's."""
        return []

    @classmethod
    def notes(cls, config: typing.Any) -> list[str]:
        """Notes for the user on unexpected effects of the resolved options, a sentence each."""
        return []

    @classmethod
    def layer_overrides(cls, config: typing.Any, layer: int) -> tuple[str, dict]:
        """The letter of that layer, '' if all are alike, and its overrides of options, for short
        forms of `layer_pattern` among its options."""
        return '', {}


def derived_values_of(component: type[Configurable], config: FrozenConfig) -> dict[str, tuple]:
    """`component.derived_values(config)`; UserError if that is not a dict of (value, reason)."""
    derived = component.derived_values(config)
    if not isinstance(derived, dict) or not all(
        isinstance(entry, tuple) and len(entry) == 2 for entry in derived.values()
    ):
        raise UserError(
            f'{component.__name__}.derived_values(config) must return a dict, '
            f'option -> (value, reason), but returned {derived!r}.'
        )
    return derived


def sentences_of(component: type[Configurable], method: str, *arguments) -> list[str]:
    """The result of `component.problems(config)` or a similar `method`; UserError if it is not a
    list of strings."""
    problems = getattr(component, method)(*arguments)
    if not isinstance(problems, list) or not all(isinstance(each, str) for each in problems):
        raise UserError(
            f'{component.__name__}.{method} must return a list of strings, but returned '
            f'{problems!r}.'
        )
    return problems


def tag_of(component: typing.Any, config: FrozenConfig) -> str:
    """`component.name_tag(config)`; UserError if that is not a string."""
    tag = component.name_tag(config)
    if not isinstance(tag, str):
        raise UserError(
            f'{component.__name__}.name_tag(config) must return a string, but returned {tag!r}.'
        )
    return tag
