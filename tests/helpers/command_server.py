"""Runs documented commands in forks of one process that has imported everything already.

Started with a folder that holds a copy of the project; reads one JSON object a line from standard
input ({'words': [script, arguments…], 'cwd', 'output', 'timeout'} or {'code': …} in place of
`words`) and writes the exit code, a line each. A start of Python with torch takes seconds, a fork
milliseconds.
"""

import json
import os
import runpy
import signal
import sys
import traceback


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    os.environ['OMP_NUM_THREADS'] = '1'
    import torch

    torch.set_num_threads(1)
    import compare_architectures  # noqa: F401
    import evaluate  # noqa: F401
    import export_checkpoint  # noqa: F401
    import model_components  # noqa: F401
    import optim.optimizers  # noqa: F401
    import sample  # noqa: F401
    import study  # noqa: F401
    import train  # noqa: F401

    answers = os.fdopen(os.dup(1), 'w')
    for line in sys.stdin:
        print(run(json.loads(line)), file=answers, flush=True)


def run(request: dict) -> int:
    child = os.fork()
    if child == 0:
        try:
            in_child(request)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def in_child(request: dict) -> None:
    """Run a script as `python SCRIPT ARGUMENTS` would, or a piece of code, and exit."""
    signal.alarm(request['timeout'])
    os.chdir(request['cwd'])
    output = os.open(request['output'], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 0
    try:
        if 'code' in request:
            exec(compile(request['code'], request['name'], 'exec'), {'__name__': '__main__'})
        else:
            sys.argv = request['words']
            sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == '__main__':
    main(sys.argv[1])
