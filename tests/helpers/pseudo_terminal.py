"""A command run on a pseudo-terminal, and what its user sees."""

import contextlib
import os
import select
import subprocess
import time

from helpers.terminal import Terminal


def run_on_terminal(command, columns=80, rows=24, until=None, then=None, timeout=120, **options):
    """Run a command to its end; its Terminal and exit code.

    until, then: a text on the screen, and what is called with the process when it is there.
    """
    import fcntl
    import struct
    import termios

    screen, text = Terminal(columns, rows), ''
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', rows, columns, 0, 0))
    environment = {**os.environ, 'TERM': 'xterm', 'PYTHONIOENCODING': 'utf-8'}
    for name in ('NO_COLOR', 'COLUMNS', 'LINES'):
        environment.pop(name, None)
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, **options
    )
    os.close(theirs)
    end = time.monotonic() + timeout
    try:
        with contextlib.suppress(OSError):  # EIO: the last process has closed it
            while time.monotonic() < end:
                if not select.select([ours], [], [], 1.0)[0]:
                    continue
                if not (data := os.read(ours, 65536)):
                    break
                text += data.decode(errors='replace')
                if then and until in text:
                    then(process)
                    then = None
        code = process.wait(timeout=10)
    finally:
        process.kill()
        os.close(ours)
    screen.write(text)
    return screen, code
