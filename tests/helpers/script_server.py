"""Run the project's scripts in forks of one process that has imported PyTorch already.

A script that trains for a second spends five in imports. A `ScriptServer` imports third-party
modules once and forks for each script; the project's own modules are imported in the fork, as in a
new process. Where a process cannot be forked so, `run_script` starts a new one.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CAN_FORK = sys.platform == 'linux'

# What a training without torchrun imports; nothing of the project.
PRELOADED = (
    'numpy',
    'psutil',
    'torch',
    'torch._dynamo',
    'torch.distributed.fsdp',
    'torch.distributed.tensor',
    'torch.nn.attention.flex_attention',
    'torch.utils.checkpoint',
    'torch.utils.flop_counter',
)

PROJECT_MODULES = (
    *('train', 'study', 'compare_architectures', 'sample', 'evaluate', 'export_checkpoint'),
    *('optim.optimizers', 'optim.schedules', 'data.preparation.pipeline'),
)


class ScriptServer:
    """Runs scripts with `OMP_NUM_THREADS=1`; a context manager.

    With a `project`, the modules of that folder are imported once, too: for scripts that only show
    that they work, where a fresh import would cost more than the script.
    """

    def __init__(self, project: Path | None = None):
        self.project = project

    def __enter__(self) -> 'ScriptServer':
        self.process = subprocess.Popen(
            [sys.executable, __file__, *map(str, filter(None, [self.project]))],
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def run(
        self,
        script: Path,
        arguments: Sequence[str],
        *,
        cwd: Path,
        env: dict[str, str],
        timeout: float,
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run([python, script, *arguments], capture_output=True, text=True)`.

        `env` reaches Python code; what C libraries read of it when they are loaded is the server's.
        """
        with tempfile.TemporaryDirectory() as folder:
            outputs = [f'{folder}/stdout', f'{folder}/stderr']
            request = {
                'script': str(script),
                'arguments': list(arguments),
                'cwd': str(cwd),
                'env': env,
                'outputs': outputs,
            }
            print(json.dumps(request), file=self.process.stdin, flush=True)
            pid = int(self.process.stdout.readline())
            in_time = select.select([self.process.stdout], [], [], timeout)[0]
            if not in_time:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            code = int(self.process.stdout.readline())
            stdout, stderr = (Path(path).read_text('utf-8', 'replace') for path in outputs)
        command = [sys.executable, str(script), *arguments]
        if not in_time:
            raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
        return subprocess.CompletedProcess(command, code, stdout, stderr)


def serve() -> None:
    """Answer each request with the process's number, and with its exit code when it has ended."""
    sys.path[1:1] = sys.argv[1:]
    for name in (*PRELOADED, *(PROJECT_MODULES if sys.argv[1:] else ())):
        __import__(name)
    answers = os.dup(1)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            become(**request)
            return
        os.write(answers, f'{pid}\n'.encode())
        status = os.waitpid(pid, 0)[1]
        os.write(answers, f'{os.waitstatus_to_exitcode(status)}\n'.encode())


def become(
    script: str, arguments: list[str], cwd: str, env: dict[str, str], outputs: list[str]
) -> None:
    """Run the script in this process. Its exit or exception goes up to the interpreter."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, path in enumerate([os.devnull, *outputs]):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 for the process's life
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
    serve()
