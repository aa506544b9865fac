"""Tables of a command's options: help, type, default and limits of each."""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Argument:
    """One `--option`. `range_problems` reports numbers outside its limits."""

    help: str
    type: Callable[[str], Any] = str
    default: Any = None
    low: float = -math.inf
    high: float = math.inf
    settings: Mapping[str, Any] = field(default_factory=dict)  # further arguments of add_argument

    def add_to(self, parser: argparse.ArgumentParser, name: str) -> None:
        settings = {'default': self.default, 'help': self.help, **self.settings}
        if self.settings.get('action') != 'store_true':
            settings['type'] = self.type
        parser.add_argument(f'--{name}', **settings)


DEVICE_ARGUMENTS = {
    'device': Argument('auto, cpu, cuda, cuda:N or mps (default auto)', default='auto'),
    'dtype': Argument('auto, float32, bfloat16 or float16 (default auto)', default='auto'),
}


def add_arguments(parser: argparse.ArgumentParser, arguments: Mapping[str, Argument]) -> None:
    for name, argument in arguments.items():
        argument.add_to(parser, name)


def range_problems(options: object, arguments: Mapping[str, Argument]) -> list[str]:
    """A sentence for each number that is outside its limits."""
    problems = []
    for name, argument in arguments.items():
        value, low, high = getattr(options, name), argument.low, argument.high
        if low == -math.inf or value is None or low <= value <= high:
            continue
        at_most = f' and at most {high}' if high < math.inf else ''
        problems.append(f'--{name}={value}: takes a number of at least {low}{at_most}.')
    return problems
