"""A copy of the project in which documented commands and code run at small size.

Its config files end with tiny sizes, its datasets are a few KB, and it has the runs and the texts
that the pages speak of: `out-llama`, `my_texts/`, `config/mine.py`, ….
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.project import PROJECT, TINY_RUN, write_tiny_dataset

SMALL_RUN = {**TINY_RUN, 'eval_iters': 2, 'dataset': 'shakespeare'}
# A study in config/studies/ keeps two values of each option, and one seed.
SMALL_STUDY = """
sweep = {key: values[:1 if key == 'seed' else 2] for key, values in sweep.items()}
"""
# Trained before any page is run, into the folders that their config files name.
TRAINED = ('gpt2', 'llama', 'gemma2')
COPIED_RUNS = {
    'out': ['out-llama'],
    'out-a': ['out-gpt2'],
    'out-b': ['out-llama'],
    'out-mine': ['out-gpt2', 'out-llama', 'out-gemma2'],
}
TEXT = 'First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n'
NOT_COPIED = (
    *('.*', 'tests', 'benchmarks', 'out', 'out-*', '*.bin', '*.tmp', '__pycache__', 'build', '*.egg-info'),
    *('meta.json', 'checked.json', 'input.txt', '*.png', '*.svg'),
)
SECONDS = 60  # for one command


class Sandbox:
    """`folder` is the copy; `run` and `execute` work in it."""

    def __init__(self, root: Path):
        self.pristine, self.folder = root / 'pristine', root / 'project'
        self.output = root / 'output.txt'
        shutil.copytree(PROJECT, self.folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
        write_small_files(self.folder)
        self.server = subprocess.Popen(
            [sys.executable, str(PROJECT / 'tests/helpers/command_server.py'), str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env={**os.environ, 'COLUMNS': '100', 'PYTHONDONTWRITEBYTECODE': '1'},
        )
        for name in TRAINED:
            code, output = self.run(['train.py', f'config/arch_{name}.py'])
            assert code == 0, output
        for name, sources in COPIED_RUNS.items():
            for source in sources:
                shutil.copytree(self.folder / source, self.folder / name, dirs_exist_ok=True)
        shutil.copytree(self.folder, self.pristine)

    def reset(self) -> None:
        """Bring the folder back to how it was before the first page."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.pristine, self.folder)

    def run(self, words: list[str]) -> tuple[int, str]:
        """Exit code and output of `python SCRIPT ARGUMENTS`."""
        return self._request({'words': words})

    def execute(self, code: str, name: str) -> tuple[int, str]:
        """Exit code and output of a program given as text."""
        return self._request({'code': code, 'name': name})

    def _request(self, request: dict) -> tuple[int, str]:
        places = {'cwd': str(self.folder), 'output': str(self.output), 'timeout': SECONDS}
        print(json.dumps({**request, **places}), file=self.server.stdin, flush=True)
        code = int(self.server.stdout.readline())
        return code, self.output.read_text(encoding='utf-8', errors='replace')

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(60)


def write_small_files(project: Path) -> None:
    """Shrink configs and studies, and write the datasets and texts that pages speak of."""
    small = '\n' + '\n'.join(f'{key} = {value!r}' for key, value in SMALL_RUN.items()) + '\n'
    for path in project.glob('config/*.py'):
        append(path, small)
    for path in project.glob('config/studies/*.py'):
        append(path, small + SMALL_STUDY)
    for name in ('shakespeare', 'shakespeare_char'):
        write_tiny_dataset(project / 'data' / name)
    files = {
        'config/mine.py': (project / 'config/arch_llama.py').read_text(encoding='utf-8'),
        'my_book.txt': TEXT * 300,
        'book.txt': TEXT * 3,
        'code.py': 'def double(x):\n    return 2 * x\n',
        'prompt.txt': 'ROMEO:\n',
        **{f'my_texts/{number}.txt': f'{number}\n{TEXT * 20}' for number in range(40)},
    }
    for name, text in files.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(text, encoding='utf-8')


def append(path: Path, text: str) -> None:
    with path.open('a', encoding='utf-8') as file:
        file.write(text)
