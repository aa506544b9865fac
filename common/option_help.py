"""`--help` of commands whose options are a schema: an overview, and pages for the rest.

--help          what the command is, its most used options, the groups of options
--help=GROUP    the options of a group
--help=OPTION   one option: type, default, choices, the components that use it
--help=all      every option
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from common.dict_option import DictOption
from common.errors import UserError, did_you_mean
from common.formatting import join_names
from common.help_layout import entry, first_paragraph, paragraph, reflowed
from common.registry import Option, Registry, conditions_text, owners

ALL = 'all'
OVERVIEW_COLUMN = 23  # where texts of the overview begin
NOTATION = (
    'A type that ends in ? also takes None (derived, or off). --flag and --no-flag set a bool. '
    'A config file sets the same options as Python assignments.'
)


@dataclass(frozen=True)
class HelpGroup:
    """Options that `--help=NAME` lists."""

    name: str
    about: str
    options: dict[str, Option]


@dataclass(frozen=True)
class CommandHelp:
    """The help pages of a command.

    usage: the beginning of the overview. essential: the options that the overview shows, under the
    title. list_groups: whether the overview describes the groups or only names them. more: the
    command's other pages, for the end of the overview.
    """

    usage: str
    groups: list[HelpGroup]
    essential: tuple[str, ...]
    title: str = 'Most used options'
    list_groups: bool = True
    more: dict[str, str] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Option]:
        return {key: option for group in self.groups for key, option in group.options.items()}

    def page(self, topic: str) -> str:
        """The page on a topic: '' for the overview. Raises UserError."""
        name = topic.lstrip('-').replace('-', '_')
        by_name = {group.name: group for group in self.groups}
        if not name:
            lines = list(self._overview())
        elif name in by_name:
            lines = list(self._group_page(by_name[name]))
        elif name in self.options:
            lines = list(self._option_page(name))
        elif name == ALL:
            lines = list(self._every_option())
        else:
            hint = did_you_mean(name, [*by_name, *self.options])
            if not hint and (similar := [key for key in self.options if name in key]):
                hint = f' Options with this word: {join_names(similar)}.'
            raise UserError(
                f'--help={topic}: no group and no option has this name.{hint} Groups: '
                f'{", ".join(by_name)}, {ALL}.'
            )
        return '\n'.join(lines).rstrip()

    def _overview(self) -> Iterator[str]:
        yield from reflowed(self.usage)
        yield ''
        yield f'{self.title}:'
        for key in self.essential:
            yield from entry(
                f'--{key}', option_text(self.options[key], brief=True), OVERVIEW_COLUMN
            )
        registered = list(registered_by_file(self.options))
        if registered:
            yield ''
            yield 'Registered by the config file:'
            for lines in registered:
                yield from lines
        yield ''
        if self.list_groups:
            yield 'Groups of options, with the number of each:'
            for group in self.groups:
                name = f'{group.name:<13}{len(group.options):>3}'
                yield from entry(name, group.about, OVERVIEW_COLUMN)
        else:
            names = ', '.join(group.name for group in self.groups)
            yield from paragraph(f'Groups of options, those of each run included: {names}.')
        yield ''
        for name, about in self._pages().items():
            yield from entry(name, about, OVERVIEW_COLUMN)

    def _pages(self) -> dict[str, str]:
        return {
            '--help=NAME': f'A group, an option, or all {len(self.options)} (--help={ALL})',
            **self.more,
        }

    def _group_page(self, group: HelpGroup) -> Iterator[str]:
        yield f'{group.about} ({group.name}):'
        for key, option in group.options.items():
            yield from option_entry(key, option)
        yield ''
        yield from paragraph(NOTATION)

    def _every_option(self) -> Iterator[str]:
        for group in self.groups:
            *lines, _, _ = self._group_page(group)
            yield from lines
        yield ''
        yield from paragraph(NOTATION)

    def _option_page(self, key: str) -> Iterator[str]:
        option = self.options[key]
        yield from option_details(key, option)
        if used_with := owners(key, self.options):
            yield from entry('Used with', conditions_text(used_with), 14)
        (group,) = (group.name for group in self.groups if key in group.options)
        yield from entry('Group', f'{group} (--help={group})', 14)
        for name, table in self.options.items():
            if isinstance(table, DictOption) and key in table.entry_options():
                yield from entry('By layer', f'--{name}.{table.placeholder}.{key}=value', 14)
        if isinstance(option, DictOption):
            yield ''
            yield 'Options of an entry:'
            yield from paragraph(', '.join(option.entry_options()), '  ')
        if isinstance(option.choices, Registry):
            yield ''
            yield 'Choices:'
            for name in option.choices:
                component = option.choices[name]
                own = f' Options: {", ".join(component.options)}.' if component.options else ''
                yield from entry(name, f'{first_paragraph(component)}{own}', 22)
        elif option.about:
            yield ''
            yield 'Choices:'
            for name, about in option.about.items():
                yield from entry(name, about, 22)


def option_details(key: str, option: Option) -> Iterator[str]:
    """The first lines of an option's page."""
    yield usage(key, option)
    yield ''
    yield from paragraph(option.help, '  ')
    yield ''
    yield from entry('Type', option.type_name(), 14)
    yield from entry('Default', repr(option.default), 14)
    if option.choices is not None or option.check is not None or isinstance(option, DictOption):
        yield from entry('Allowed', option.allowed(), 14)
    if isinstance(option, DictOption):
        yield from entry('In a file', f'{key} = {option.example!r}', 14)
        yield from entry('Removal', f'--{key}.{option.placeholder}=None', 14)
    for alias, (meant, value) in option.aliases.items():
        yield from entry('Alias', f'{key}={alias!r} sets {meant}={value!r}', 14)


def usage(key: str, option: Option) -> str:
    """How the option is set on the command line."""
    if isinstance(option, DictOption):
        return f'--{option.usage(key)}'
    return f'--{key}={type_mark(option)}'


def type_mark(option: Option) -> str:
    return option.base_type.__name__ + '?' * option.optional


def option_entry(key: str, option: Option) -> list[str]:
    """An option's lines in a list of options."""
    return entry(usage(key, option), option_text(option))


def option_text(option: Option, brief: bool = False) -> str:
    """Help text, default and choices; `brief` keeps the help up to its first `. `, `; ` or `: `."""
    about = re.split(r'[.;:] ', option.help)[0] if brief else option.help
    default = '' if option.default is None else f' (default {shown_default(option)})'
    listed = option.choices is not None and not option.about
    choices = f' [{", ".join(option.choices or ())}]' if listed else ''
    return f'{about}{default}{choices}'


def shown_default(option: Option) -> str:
    text = str(option.default)
    return text if text.strip() else repr(option.default)


def registered_by_file(options: dict[str, Option]) -> Iterator[list[str]]:
    """The entries of the components that config files registered, and of the options they add."""
    shared: set[str] = set()
    from_file: dict[Any, list[str]] = {}  # component -> the choices that lead to it
    for key, option in options.items():
        if isinstance(option.choices, Registry):
            for name in option.choices:
                component = option.choices[name]
                if component.__module__.startswith('config:'):
                    from_file.setdefault(component, []).append(f'{key}={name}')
                else:
                    shared |= component.options.keys()
    for component, choices in from_file.items():
        yield entry(', '.join(choices), first_paragraph(component))
        for key in component.options:
            if key not in shared:
                yield option_entry(key, options[key])


def split_by_choice(
    options: Mapping[str, Option], roots: Iterable[str]
) -> tuple[dict[str, Option], dict[str, Option]]:
    """The options that `roots` choose between, with their components' own; and the others."""
    roots = set(roots)
    chosen = {key for key in options if _root_choice(key, dict(options), roots) in roots}
    return (
        {key: option for key, option in options.items() if key in chosen},
        {key: option for key, option in options.items() if key not in chosen},
    )


def _root_choice(key: str, options: dict[str, Option], roots: set[str]) -> str:
    """The first of `roots` that leads to the option, else the option at the beginning of the path
    of choices to it."""
    parents = [choice for choice, _ in owners(key, options) if choice in options]
    if key in roots or not parents:
        return key
    tops = [c for c in parents if c in roots] or [c for c in parents if not owners(c, options)]
    return tops[0] if tops else _root_choice(parents[0], options, roots)
