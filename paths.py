"""Paths as people give them, for every option of every command that is one. A leaf."""

import os
import re
from pathlib import Path

_HOME = re.compile(r'((?:[a-z]+:)?)(~.*)', re.DOTALL)


class NoHome(ValueError):
    """A `~name` that is nobody's home folder."""


def expand_home(text: str) -> str:
    """The path with the home folder for its `~` or `~user`, also behind `hf:` and the like.

    A shell does this only at the beginning of a word, so that `--out_dir=~/runs` arrives as it is.
    Raises NoHome.
    """
    match = _HOME.fullmatch(text)
    if match is None:
        return text
    prefix, path = match.groups()
    expanded = os.path.expanduser(path)
    if expanded.startswith('~'):
        name = re.split(r'[/\\]', path)[0]
        raise NoHome(f'{text!r}: {name} is no home folder. For a file of that name: ./{path}')
    return prefix + expanded


def expanded_path(text: str) -> Path:
    """The same as a Path."""
    return Path(expand_home(text))
