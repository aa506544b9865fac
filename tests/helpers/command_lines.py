"""Random wrong command lines for every command of the project."""

import importlib
import random
import string
from collections.abc import Callable, Iterator

import pytest

from common.errors import ArgumentParser
from configurator import flatten
from study import study_schema
from training_config import schema

# Values that no numeric, choice or flag option accepts.
NONSENSE = [
    *(
        '',
        ' ',
        'nan',
        '-inf',
        '1e400',
        '--',
        '-',
        '=',
        '0x10',
        '1_0_',
        '½',
        '٣x',
        'None?',
        "'",
        '"',
    ),
    *('\x1b[2J', '\u202e', '\udcff', '\x00', '../..', '~nobody-at-all', '[]', '{}', 'a' * 5000),
    *('9' * 400, '-1', '1e26', 'Truee', '$(x)', '%s', '{0}', 'é', '日本'),
]
HUGE = ['1000000', '1000000000', '1000000000000', str(2**62), str(2**64), '1e26', '-' + '9' * 30]


class _Parser(Exception):
    pass


def _parser_of(command: str) -> ArgumentParser:
    """The argument parser of a command."""

    def stop(self, argv):
        raise _Parser(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Parser) as caught:
        patch.setattr(ArgumentParser, 'parse', stop)
        main_of(command)([])
    return caught.value.args[0]


def main_of(command: str) -> Callable:
    return importlib.import_module(command.removesuffix('.py').replace('/', '.')).main


def options_of(command: str) -> dict[str, bool]:
    """Each option of a command, and whether it rejects every value of `NONSENSE`."""
    if command in ('train.py', 'study.py'):
        options = flatten((schema if command == 'train.py' else study_schema)())
        return {
            f'--{key}': option.base_type is not str or option.choices is not None
            for key, option in options.items()
            if key != 'debug'
        }
    return {
        action.option_strings[0]: action.type in (int, float) or action.choices is not None
        for action in _parser_of(command)._actions
        if action.option_strings and action.option_strings[-1] not in ('--help', '--debug')
    }


COMMANDS = (
    *('train.py', 'sample.py', 'evaluate.py', 'export_checkpoint.py', 'study.py'),
    *('compare_architectures.py', 'data/prepare.py', 'data/import_tokens.py'),
    *('data/inspect_tokens.py', 'data/shakespeare/prepare.py', 'data/python_stdlib/prepare.py'),
)


def bad_lines(command: str, rng: random.Random) -> Iterator[list[str]]:
    """An endless sequence of lines, each with at least one invalid argument."""
    options = options_of(command)
    names, typed = list(options), [name for name, is_typed in options.items() if is_typed]
    while True:
        line = [_wrong(rng, names, typed)]
        for _ in range(rng.choice((0, 0, 1, 3))):
            line.insert(rng.randrange(len(line) + 1), _any(rng, names))
        yield line


def _wrong(rng: random.Random, names: list[str], typed: list[str]) -> str:
    kind = rng.randrange(3 if typed else 2) if names else 1
    if kind == 0:  # a misspelled option
        name = list(rng.choice(names))
        at = rng.randrange(2, len(name))
        name[at] = rng.choice(string.ascii_lowercase) + 'qz'
        return ''.join(name) + rng.choice(('', '=1', '=' + rng.choice(NONSENSE)))
    if kind == 1:  # an unknown option
        return '--' + ''.join(
            rng.choices(string.printable.strip() + 'é\x1b', k=rng.randrange(3, 30))
        )
    return f'{rng.choice(typed)}={rng.choice(("zq", "nan?", "--", "1e", "é" * 300))}'


def _any(rng: random.Random, names: list[str]) -> str:
    form = rng.randrange(4) if names else 1
    if form == 0:
        return rng.choice(names)
    if form == 1:
        return rng.choice((*NONSENSE, 'no_such_file.py', 'folder/no_such.py', '.'))
    return f'{rng.choice(names)}={rng.choice((*NONSENSE, *HUGE, "True", "0.5", "8"))}'
