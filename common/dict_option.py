"""Options whose value is a dict, name -> {option: value}, such as `layer_kinds`.

On the command line `--KEY.NAME.OPTION=value` sets one value and `--KEY.NAME=None` removes an entry.
Values of a config file and of the command line are merged by name and option.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from common.errors import UserError, did_you_mean
from common.registry import NONE_WORDS, Check, Option, show_value


@dataclass(frozen=True)
class DictOption(Option):
    """One key whose value is a dict, name -> {option: value}.

    names: (predicate, allowed names in words). placeholder: of a name in a help text. example: a
    value. entry_options: returns the options of an entry. refusal: returns the reason why an entry
    may not have an option or a value of it, or None.
    """

    names: Check = field(default=(str.isidentifier, 'a name'), compare=False)
    placeholder: str = 'NAME'
    example: dict = field(default_factory=dict, compare=False)
    entry_options: Callable[[], dict[str, Option]] = field(default=dict, compare=False)
    refusal: Callable[[str, Any], str | None] = field(
        default=lambda key, value: None, compare=False
    )

    def allowed(self) -> str:
        return f'a dict, {self.names[1]} -> {{option: value}}'

    def accept(self, key: str, value: Any) -> dict:
        """The value with each entry's values in their types; UserError, which lists every problem.

        None for an entry removes it from the entries of layers below, and None for an option that
        does not take it removes the option.
        """
        if not isinstance(value, dict):
            raise UserError(f'{key}={show_value(value)}: {key} takes {self.allowed()}.')
        accepted: dict = {}
        problems: list[str] = []
        for name, entry in value.items():
            try:
                self._check_name(key, name)
                accepted[name] = self._accept_entry(f'{key}.{name}', entry)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(*problems)
        return accepted

    def parse(self, key: str, text: str) -> Any:
        raise UserError(
            f'--{key}={text}: {key} takes {self.allowed()}. On the command line, set one value: '
            f'--{self.usage(key)}.'
        )

    def usage(self, key: str) -> str:
        """How one value is set on the command line, without dashes."""
        return f'{key}.{self.placeholder}.OPTION=value'

    def option_at(self, path: str) -> Option:
        """The option that KEY.NAME.OPTION means; KEY.NAME takes None only. Raises UserError."""
        key, name, *option = path.split('.', 2)
        self._check_name(key, name)
        if option:
            return self.entry_option(f'{key}.{name}', option[0])
        words = f'None, which removes {name}; set a value with --{path}.OPTION=value'
        return Option(str, 'None', 'Removal', check=(NONE_WORDS.__contains__, words))

    def parse_path(self, path: str, text: str) -> dict:
        """The dict that `--PATH=text` sets. path: KEY.NAME.OPTION, or KEY.NAME to remove an entry.

        Raises UserError.
        """
        declared = self.option_at(path)
        key, name, *option = path.split('.', 2)
        if not option:
            declared.parse(path, text)
            return {name: None}
        if declared.means_none(text) and not declared.optional:
            return {name: {option[0]: None}}
        value = declared.parse(path, text)
        self._check_value(f'{key}.{name}', option[0], value)
        return {name: {option[0]: value}}

    def entry_option(self, place: str, option: object) -> Option:
        """The option of that name of an entry. place: KEY.NAME. Raises UserError."""
        options = self.entry_options()
        self._check_value(place, option, None)
        if option not in options:
            known = isinstance(option, str) and did_you_mean(option, options)
            hint = known or f' See --help={place.partition(".")[0]}.'
            raise UserError(f'{place}: unknown option {show_value(option)}.{hint}')
        return options[option]  # type: ignore[index]

    def refused(self, key: str, value: dict) -> dict:
        """The values that `accept` refuses, by dotted name."""
        result = {}
        for path, leaf in leaves(value).items():
            name, _, option = path.partition('.')
            try:
                self.accept(key, {name: {option: leaf} if option else leaf})
            except UserError:
                result[f'{key}.{path}'] = leaf
        return result

    @staticmethod
    def check_order(key: str, earlier: dict, value: dict) -> None:
        """Raise UserError if arguments both remove an entry and set an option of it."""
        for name, entry in value.items():
            if name in earlier and (entry is None) != (earlier[name] is None):
                raise UserError(
                    f'--{key}.{name}=None removes {name}, but --{key}.{name}.OPTION is set too. '
                    f'Remove one of them.'
                )

    @staticmethod
    def combined(below: dict, above: dict) -> dict:
        """`below` with the entries and values of `above`, each None included."""
        result = dict(below)
        for name, entry in above.items():
            earlier = result.get(name)
            result[name] = entry if entry is None or earlier is None else {**earlier, **entry}
        return result

    def _check_name(self, key: str, name: object) -> None:
        is_allowed, words = self.names
        if not isinstance(name, str) or not is_allowed(name):
            raise UserError(f'{key}: the name {show_value(name)} is not {words}.')

    def _accept_entry(self, place: str, entry: Any) -> dict | None:
        if entry is None:
            return None
        if not isinstance(entry, dict):
            raise UserError(
                f'{place}={show_value(entry)}: {place} takes a dict, option -> value, or None.'
            )
        accepted: dict = {}
        problems: list[str] = []
        for option, value in entry.items():
            try:
                declared = self.entry_option(place, option)
                if value is not None or declared.optional:
                    value = declared.accept(f'{place}.{option}', value)
                self._check_value(place, option, value)
                accepted[option] = value
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(*problems)
        return accepted

    def _check_value(self, place: str, option: object, value: Any) -> None:
        if isinstance(option, str) and (reason := self.refusal(option, value)):
            raise UserError(f'{place}.{option}: {reason}')


def leaves(values: Mapping, parts: int = 3) -> dict:
    """The values with dotted names in place of dicts: {'layer_kinds.L.sliding_window': 64}.

    parts: the most that a name has, since values of malformed records may be nested deeply.
    """
    result: dict = {}
    for name, value in values.items():
        if isinstance(value, dict) and value and parts > 1:
            result |= leaves({f'{name}.{part}': each for part, each in value.items()}, parts - 1)
        else:
            result[name] = value
    return result


def short_name(name: str) -> str:
    """A dotted name without its option: `L.sliding_window`."""
    return name.partition('.')[2] or name


def text_of(value: object) -> str:
    """A value as text; a dict by its single values: `L.sliding_window=64 L.n_head=2`."""
    if not isinstance(value, dict) or not value:
        return str(value)
    return ' '.join(f'{name}={each}' for name, each in leaves(value).items())


def flat_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with dotted names, without dicts that hold no value."""
    return {name: value for name, value in leaves(options).items() if value != {}}
