"""Ctrl-C while a command imports its modules ends it as it does later: one word, no traceback.

Every command imports this before anything that takes long (pyproject.toml has isort put it there);
once its imports are done, `errors.run_script` sees to it.
"""

import contextlib
import os
import sys

_show = sys.excepthook


def _end(kind, error, traceback) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        _show(kind, error, traceback)
        return
    with contextlib.suppress(OSError):
        os.write(2, b'\ninterrupted\n')
    os._exit(130)  # half of the modules are there: nothing of theirs is to be taken down


sys.excepthook = _end
