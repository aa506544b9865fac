"""Walk through folders, symbolic links included, each real folder once."""

import os
from collections.abc import Callable, Iterator


def walk(
    root: str | os.PathLike, on_error: Callable[[OSError], None] = lambda error: None
) -> Iterator[tuple[str, list[os.DirEntry], list[os.DirEntry]]]:
    """(folder, subfolders, other entries) of `root` and every folder below it, sorted by name.

    Symbolic links are followed after all real folders, so that a folder is visited under its real
    path if that is below `root`; loops end. Folders removed from the second list are not entered.
    `on_error` receives the OSError of an unreadable folder, which is skipped.
    """
    seen, own = set(), [os.fspath(root)]
    linked: list[str] = []
    while own or linked:
        folder = own.pop() if own else linked.pop(0)
        try:
            stat = os.stat(folder)
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            on_error(error)
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders: list[os.DirEntry] = []
        others: list[os.DirEntry] = []
        for entry in entries:
            (folders if os.path.isdir(entry) else others).append(entry)
        yield folder, folders, others
        own += [entry.path for entry in reversed(folders) if not entry.is_symlink()]
        linked += [entry.path for entry in folders if entry.is_symlink()]
