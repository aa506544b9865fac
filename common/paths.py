"""Paths given by the user, and the cache folder."""

import os
import re
import sys
from pathlib import Path

_PARTS = re.compile(r'((?:hf|nanogpt):|)(.*)', re.DOTALL)


class BadPath(ValueError):
    """A text that cannot be a path, with the reason."""


def expand_home(text: str) -> str:
    """The path with its `~` or `~user` expanded, also after `hf:` and `nanogpt:`.

    A shell expands it only at the beginning of a word, not in `--out_dir=~/runs`. Raises BadPath,
    also for a path that cannot be looked up: no permission for a parent folder, a name that is too
    long.
    """
    match = _PARTS.fullmatch(text)
    assert match, text  # every text matches
    prefix, path = match.groups()
    if path.startswith('~'):
        path = os.path.expanduser(path)
    if path.startswith('~'):
        name = re.split(r'[/\\]', path)[0]
        raise BadPath(f'{text!r}: {name} is not a home folder. For a file of that name: ./{path}')
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may not exist yet
    except OSError as error:
        raise BadPath(f'{text!r:.200}: {error.strerror}.') from error
    except ValueError as error:
        raise BadPath(f'{text!r:.200}: {error}.') from error
    return prefix + path


def expanded_path(text: str) -> Path:
    """`expand_home` as a Path."""
    return Path(expand_home(text))


def cache_folder() -> Path | None:
    """This project's folder in the user's cache folder; None if the user has no home folder."""
    chosen = os.environ.get('XDG_CACHE_HOME', '')
    if os.path.isabs(chosen):  # relative paths must be ignored (XDG Base Directory Specification)
        base = Path(chosen)
    else:
        try:
            home = Path.home()
        except RuntimeError:
            return None
        by_platform = {'darwin': home / 'Library' / 'Caches', 'win32': home / 'AppData' / 'Local'}
        base = by_platform.get(sys.platform, home / '.cache')
    return base / 'architecture-training-suite'
