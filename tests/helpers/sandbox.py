"""A copy of the project in which documented commands and code run at small size.

Its config files end with tiny sizes, its datasets are a few KB, and it has the runs and the texts
that the pages speak of: `out-llama`, `my_texts/`, `config/mine.py`, ….
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.documents import fences
from helpers.ladder_records import write_ladder
from helpers.project import PROJECT, TINY_RUN, write_tiny_dataset
from helpers.script_server import CAN_FORK, ScriptServer

SMALL_RUN = {**TINY_RUN, 'eval_iters': 2, 'dataset': 'shakespeare'}
# A study in config/studies/ keeps two values of each option, and one seed.
SMALL_STUDY = """
sweep = {key: values[:1 if key == 'seed' else 2] for key, values in sweep.items()}
"""
SMALL_LADDER = """
ladder, horizon = {'params': [4e3, 8e3]}, {'tokens': 1e3}
"""
# Trained before any page is run, into the folders that their config files name.
TRAINED = ('gpt2', 'llama', 'gemma2')
COPIED_RUNS = {
    'out': 'out-llama',
    'out-a': 'out-gpt2',
    'out-b': 'out-llama',
    **{f'out-mine/{name}': f'out-{name}' for name in TRAINED},
}
TEXT = 'First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n'
NOT_COPIED = (
    *('.*', 'tests', 'benchmarks', 'out', 'out-*', 'build', '*.egg-info', '__pycache__', '*.tmp'),
    *('*.bin', 'meta.json', 'checked.json', 'input.txt', '*.png', '*.svg', '*.ipynb'),
)
SECONDS = 180  # for one command, on a busy machine
# Exported weights and those of nanoGPT, where the pages have them.
FOREIGN_CHECKPOINTS = """
import sys

import torch

import export_checkpoint

# A file, and a folder for transformers, which itself would only check it.
export_checkpoint.main(['--out_dir=out-llama', '--output=llama.pt'])
sys.modules['transformers'] = None
export_checkpoint.main(['--out_dir=out-llama', '--format=hf', '--output=llama-hf'])

# A ckpt.pt as nanoGPT writes it.
layers, width, vocabulary, block_size = 2, 32, 256, 32
shapes = {'wte.weight': (vocabulary, width), 'wpe.weight': (block_size, width)}
for layer in range(layers):
    shapes |= {
        f'h.{layer}.ln_1.weight': (width,),
        f'h.{layer}.attn.c_attn.weight': (3 * width, width),
        f'h.{layer}.attn.c_proj.weight': (width, width),
        f'h.{layer}.ln_2.weight': (width,),
        f'h.{layer}.mlp.c_fc.weight': (4 * width, width),
        f'h.{layer}.mlp.c_proj.weight': (width, 4 * width),
    }
shapes['ln_f.weight'] = (width,)
model = {f'transformer.{name}': torch.randn(shape) / 10 for name, shape in shapes.items()}
model['lm_head.weight'] = model['transformer.wte.weight']
sizes = {'n_layer': layers, 'n_head': 2, 'n_embd': width, 'block_size': block_size}
arguments = {**sizes, 'vocab_size': vocabulary, 'bias': False, 'dropout': 0.0}
torch.save({'model': model, 'model_args': arguments}, 'out/ckpt.pt')
"""


class Sandbox:
    """`folder` is the copy; `run` and `execute` work in it."""

    def __init__(self, root: Path):
        self.pristine, self.folder = root / 'pristine', root / 'project'
        shutil.copytree(PROJECT, self.folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
        write_small_files(self.folder)
        self.server = ScriptServer(self.folder).__enter__() if CAN_FORK else None
        for name in TRAINED:
            self.must_run('train.py', f'config/arch_{name}.py')
        for name, source in COPIED_RUNS.items():
            shutil.copytree(self.folder / source, self.folder / name)
        code, output = self.execute(FOREIGN_CHECKPOINTS)
        assert code == 0, output
        shutil.copytree(self.folder, self.pristine)

    def reset(self) -> None:
        """Bring the folder back to how it was before the first page."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.pristine, self.folder)

    def close(self) -> None:
        if self.server:
            self.server.__exit__()

    def run(self, script: str | Path, *arguments: str) -> tuple[int, str]:
        """Exit code and output of `python SCRIPT ARGUMENTS`."""
        path, env = self.folder / script, {**os.environ, 'OMP_NUM_THREADS': '1', 'COLUMNS': '100'}
        if self.server:
            done = self.server.run(path, arguments, cwd=self.folder, env=env, timeout=SECONDS)
        else:
            done = subprocess.run(
                [sys.executable, str(path), *arguments],
                cwd=self.folder,
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        return done.returncode, done.stdout + done.stderr

    def must_run(self, script: str, *arguments: str) -> str:
        code, output = self.run(script, *arguments)
        assert code == 0, output
        return output

    def execute(self, code: str) -> tuple[int, str]:
        """Exit code and output of a program given as text."""
        path = self.folder / 'program.py'
        path.write_text(code, encoding='utf-8')
        return self.run(path)


def write_small_files(project: Path) -> None:
    """Shrink configs and studies, and write the datasets and texts that pages speak of."""
    lines = [f'{key} = {value!r}\n' for key, value in SMALL_RUN.items()]
    small = ''.join(['\n', *lines])
    without_length = ''.join(line for line in lines if not line.startswith('max_iters'))
    for path in project.glob('config/*.py'):
        append(path, small)
    for path in project.glob('config/studies/*.py'):
        append(path, small + SMALL_STUDY)
    for name in ('shakespeare', 'shakespeare_char'):
        write_tiny_dataset(project / 'data' / name)
    study, ladder = (
        next(fence.text for fence in fences(PROJECT / f'docs/{page}.md', 'python'))
        for page in ('faq', 'ladders')
    )
    (project / 'examples').mkdir(exist_ok=True)
    files = {
        'config/mine.py': (project / 'config/arch_llama.py').read_text(encoding='utf-8'),
        'config/my_study.py': study + small + SMALL_STUDY,
        'config/my_ladder.py': ladder + without_length + SMALL_STUDY + SMALL_LADDER,
        'my_book.txt': ''.join(f'{line}. {TEXT}' for line in range(3000)),
        'book.txt': TEXT * 3,
        'code.py': 'def double(x):\n    return 2 * x\n',
        'prompt.txt': 'ROMEO:\n',
        **{f'my_texts/{number}.txt': f'{number}\n{TEXT * 20}' for number in range(40)},
    }
    write_ladder(project / 'out-my-ladder')
    for name, text in files.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(text, encoding='utf-8')


def append(path: Path, text: str) -> None:
    with path.open('a', encoding='utf-8') as file:
        file.write(text)
