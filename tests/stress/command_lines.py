"""Random command lines with a small run: no traceback, and an end within seconds.

    python tests/stress/command_lines.py [LINES] [SEED]

Unlike `tests/whole_program/test_command_lines.py`, the lines may be valid: huge numbers, unusual
paths, files of the wrong kind. Each runs in a forked process with a memory limit. The output is
every line that ends in a traceback or not at all, and the counts. The exit code is 1 if there is
any.
"""

import collections
import contextlib
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / 'tests')]

import torch  # noqa: E402
from helpers.command_lines import COMMANDS, HUGE, NONSENSE, bad_lines, main_of, options_of  # noqa: E402
from helpers.project import TINY_RUN, write_tiny_dataset  # noqa: E402

from common import errors  # noqa: E402

SECONDS, MEMORY = 60, 12 * 2**30
TINY = [f'--{key}={value}' for key, value in TINY_RUN.items()]
# A valid beginning of a line for each command; the random arguments follow.
BASE = {
    'train.py': [*TINY, '--dataset=data', '--max_iters=1', '--out_dir=more'],
    'sample.py': ['--max_new_tokens=2', '--num_samples=1'],
    'evaluate.py': ['--text=text.txt'],
    'export_checkpoint.py': ['--output=new.pt'],
    'study.py': ['study.py', *TINY, '--dataset=data', '--plan_only'],
    'compare_architectures.py': [],
    'data/prepare.py': ['texts', '--out=new', '--tokenizer=byte'],
    'data/inspect_tokens.py': ['data'],
    'data/import_tokens.py': ['data', '--out=new'],
}
WORDS = [
    *('text.txt', 'data', 'out', 'study.py', 'folder', 'locked', 'loop', 'b\udcff', '/dev/null'),
    *('record.json', 'out/nothing', 'text.txt/x', 'a' * 300, '', '~', '.', '/', 'empty.py'),
]


def odd_lines(command: str, rng: random.Random):
    names = list(options_of(command))
    while True:
        line = list(BASE[command])
        for _ in range(rng.choice((1, 1, 2))):
            values = rng.choice((HUGE, WORDS, NONSENSE))
            line.append(f'{rng.choice(names)}={rng.choice(values)}')
        yield line


def prepare_folder() -> None:
    write_tiny_dataset(Path('data'))
    Path('text.txt').write_text('the quick brown fox\n' * 200)
    Path('texts').mkdir()
    for number in range(30):
        Path('texts', f'{number}.txt').write_text(f'text number {number}\n' * 20)
    Path('study.py').write_text("sweep = {'seed': [1, 2]}\n")
    Path('empty.py').write_text('')
    Path('record.json').write_text('{}')
    Path('folder').mkdir()
    Path('locked').mkdir(mode=0)
    Path('loop').symlink_to('loop')
    arguments = [*TINY, '--dataset=data', '--max_iters=1']
    code, error_output = outcome('train.py', arguments)
    assert code == 0, error_output


def outcome(command: str, line: list[str]) -> tuple[int | str, str]:
    """The exit code or other outcome, and the output on standard error."""
    with tempfile.TemporaryFile() as stderr_file:
        child = os.fork()
        if child == 0:
            run(command, line, stderr_file.fileno())
        deadline = time.monotonic() + SECONDS
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return 'no end', ''
            time.sleep(0.02)
        stderr_file.seek(0)
        *text, code = stderr_file.read().decode(errors='replace').rpartition('exit code ')
        text = ''.join(text).removesuffix('exit code ')
    if 'Traceback' in text or not code.strip().isdecimal():
        return 'traceback', text + code
    return int(code), text


def run(command: str, line: list[str], stderr_fd: int) -> None:
    os.dup2(stderr_fd, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False)  # noqa: SIM115
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.argv = [command, *line]
    code = 99
    try:
        errors.run_script(main_of(command), line)
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    with contextlib.suppress(OSError):
        os.write(2, f'exit code {code or 0}'.encode())
    os._exit(0)


def main(lines: int = 300, seed: int = 0) -> int:
    torch.set_num_threads(1)
    for command in COMMANDS:
        importlib.import_module(command.removesuffix('.py').replace('/', '.'))
    counts, faults = collections.Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare_folder()
        rng = random.Random(seed)
        odd = {command: odd_lines(command, rng) for command in BASE}
        wrong = {command: bad_lines(command, rng) for command in COMMANDS}
        for number in range(lines):
            source = wrong if number % 4 == 0 else odd
            command = rng.choice(list(source))
            line = next(source[command])
            code, error_output = outcome(command, line)
            counts[code] += 1
            for path in Path().glob('new*'):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if code not in (0, 2):
                faults += 1
                last = error_output.strip().splitlines()[-1:] or ['']
                print(f'{code}: {command} {line[len(BASE.get(command, [])) :]}: {last[0][:200]}')
        os.chdir('/')
    print(f'{lines} lines: {dict(counts)}')
    return int(faults > 0)


if __name__ == '__main__':
    sys.exit(main(*map(int, sys.argv[1:])))
