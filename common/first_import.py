"""Make Ctrl-C during a command's imports end it as Ctrl-C does later: without a traceback.

Every command imports this first (isort's settings in pyproject.toml place it there); after the
imports `errors.run_script` handles Ctrl-C. A program that imports a command, such as a notebook,
keeps its own hook.
"""

import contextlib
import os
import sys
from pathlib import Path

# Expandable segments reduce the fragmentation of GPU memory. torch reads this when it is imported.
if sys.platform == 'linux' and 'PYTORCH_CUDA_ALLOC_CONF' not in os.environ:
    os.environ.setdefault('PYTORCH_ALLOC_CONF', 'expandable_segments:True')

_show = sys.excepthook


def _end(kind, error, traceback) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        _show(kind, error, traceback)
        return
    with contextlib.suppress(OSError):
        os.write(2, b'\ninterrupted\n')
    os._exit(130)  # modules are half imported: skip Python's own shutdown


_program = getattr(sys.modules['__main__'], '__file__', None)
if _program and Path(__file__).resolve().parents[1] in Path(_program).resolve().parents:
    sys.excepthook = _end
