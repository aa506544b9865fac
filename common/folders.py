"""The folders below a folder, those behind links too, each real one once."""

import os
from collections.abc import Callable, Iterator


def walk(
    root: str | os.PathLike, on_error: Callable[[OSError], None] = lambda error: None
) -> Iterator[tuple[str, list[os.DirEntry], list[os.DirEntry]]]:
    """(folder, its folders, its other entries) of `root` and all below it, names in order.

    Links to folders are followed, after all that is there under its own name, so what has a name of
    its own keeps it; a loop ends where it closes. Folders taken out of the second list are not
    entered. `on_error` gets the OSError of a folder that cannot be read, which is then left out.
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
