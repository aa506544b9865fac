"""How `--help` is laid out, in all commands: names on the left, help texts in one column.

A leaf: it knows no command and no option.
"""

import argparse
import inspect
import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path

from common.paths import expand_home

HELP_COLUMN = 28  # where help texts begin
WIDEST = 100  # columns, on however wide a terminal


def page_width() -> int:
    return min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)


def paragraph(text: str, indent: str = '') -> list[str]:
    return textwrap.wrap(
        text,
        max(page_width(), 40),
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def reflowed(text: str) -> list[str]:
    """A docstring's lines at the page's width; a paragraph with an indented line is left alone."""
    lines: list[str] = []
    for block in text.strip('\n').split('\n\n'):
        verbatim = any(line.startswith(' ') for line in block.splitlines())
        lines += [*(block.splitlines() if verbatim else paragraph(block)), '']
    return lines[:-1]


def entry(name: str, text: str, column: int = HELP_COLUMN) -> list[str]:
    """The lines of one option: its name, and its help from the column on.

    A name that reaches into the column stands on a line of its own.
    """
    head = f'  {name}'
    lines = textwrap.wrap(
        text,
        width=max(page_width(), column + 20),
        initial_indent=' ' * column,
        subsequent_indent=' ' * column,
        break_on_hyphens=False,
    )
    if not lines:
        return [head]
    if len(head) > column - 2:
        return [head, *lines]
    return [f'{head:<{column}}{lines[0].lstrip()}', *lines[1:]]


def first_paragraph(component: type) -> str:
    """The first paragraph of a docstring, on one line."""
    return ' '.join((inspect.getdoc(component) or '').partition('\n\n')[0].split())


def parser_help(parser: argparse.ArgumentParser, actions: Iterable[argparse.Action]) -> str:
    """The page of a command that uses argparse: description, usage, arguments, options."""
    actions = [action for action in actions if action.help != argparse.SUPPRESS]
    positional = [action for action in actions if not action.option_strings]
    # --help and --debug, which every command has, come last.
    options = sorted(
        (action for action in actions if action.option_strings),
        key=lambda action: action.option_strings[-1] in ('--help', '--debug'),
    )
    arguments = ''.join(f' {_placeholder(action)}' for action in positional)
    lines = [
        *reflowed(parser.description or ''),
        '',
        f'Usage: python {parser.prog}{arguments} [OPTIONS]',
        '',
    ]
    for title, group in (('Arguments', positional), ('Options', options)):
        if group:
            lines.append(f'{title}:')
            for action in group:
                lines += entry(_name(action), _help(action))
            lines.append('')
    return '\n'.join(lines)


def _metavar(action: argparse.Action) -> str:
    if action.metavar:
        return str(action.metavar)
    if action.choices is not None:
        return 'NAME'
    kinds = {int: 'N', float: 'X', Path: 'PATH', expand_home: 'PATH'}
    default = 'TEXT' if action.option_strings else action.dest.upper()
    return kinds.get(action.type, default)  # type: ignore[arg-type]


def _placeholder(action: argparse.Action) -> str:
    name = _metavar(action)
    nargs = getattr(action, 'save_nargs', action.nargs)  # set while arguments are parsed
    return {'*': f'[{name} ...]', '+': f'{name} ...', '?': f'[{name}]'}.get(str(nargs), name)


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return _metavar(action)
    name = action.option_strings[-1]
    return name if action.nargs == 0 else f'{name}={_metavar(action)}'


def _help(action: argparse.Action) -> str:
    text = 'Show this help' if action.dest == 'help' else action.help or ''
    required = ' (required)' if action.required and action.option_strings else ''
    choices = f' [{", ".join(map(str, action.choices))}]' if action.choices else ''
    return f'{text}{required}{choices}'
