"""Paths as people give them, for every option that is one; and the cache folder. A leaf."""

import os
import re
import sys
from pathlib import Path

_PARTS = re.compile(r'((?:hf|nanogpt):|)(.*)', re.DOTALL)


class BadPath(ValueError):
    """A text that cannot be the path of anything here, and why."""


def expand_home(text: str) -> str:
    """The path with the home folder for its `~` or `~user`, also behind `hf:` and `nanogpt:`.

    A shell does this only at the beginning of a word, so that `--out_dir=~/runs` arrives as it is.
    Raises BadPath, also for a path that cannot even be asked for: a folder on its way that may not
    be entered, a name that is too long.
    """
    match = _PARTS.fullmatch(text)
    assert match, text  # as every text does
    prefix, path = match.groups()
    if path.startswith('~'):
        path = os.path.expanduser(path)
    if path.startswith('~'):
        name = re.split(r'[/\\]', path)[0]
        raise BadPath(f'{text!r}: {name} is no home folder. For a file of that name: ./{path}')
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # whether it must be there is for others to say
    except OSError as error:
        raise BadPath(f'{text!r:.200}: {error.strerror}.') from error
    except ValueError as error:
        raise BadPath(f'{text!r:.200}: {error}.') from error
    return prefix + path


def expanded_path(text: str) -> Path:
    """The same as a Path."""
    return Path(expand_home(text))


def cache_folder() -> Path | None:
    """This project's folder among the user's caches; None where the user has no home."""
    chosen = os.environ.get('XDG_CACHE_HOME', '')
    if os.path.isabs(chosen):  # others are to be ignored (XDG Base Directory Specification)
        base = Path(chosen)
    else:
        try:
            home = Path.home()
        except RuntimeError:
            return None
        by_platform = {'darwin': home / 'Library' / 'Caches', 'win32': home / 'AppData' / 'Local'}
        base = by_platform.get(sys.platform, home / '.cache')
    return base / 'architecture-training-suite'
