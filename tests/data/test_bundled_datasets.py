"""The prepare.py scripts of the bundled datasets."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers.project import PROJECT

from data.dataset import load_dataset
from data.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

TEXT = ''.join(f'Line {i}: to be, or not to be — that’s number {i * i}!\n' for i in range(300))


@pytest.fixture
def project_copy(tmp_path) -> Path:
    """A copy of the preparation code and a text, so that no test writes into the data folders."""
    copy = tmp_path / 'project'
    unprepared = shutil.ignore_patterns('*.bin', '*.tmp', 'meta.json', '__pycache__')
    for package in ('common', 'data'):
        shutil.copytree(PROJECT / package, copy / package, ignore=unprepared)
    (copy / 'mine.txt').write_text(TEXT, encoding='utf-8')
    return copy


def run_prepare(project_copy, dataset, *arguments, cwd='/'):
    script = project_copy / 'data' / dataset / 'prepare.py'
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'dataset, dtype', [('shakespeare', 'uint16'), ('shakespeare_char', 'uint8')]
)
def test_own_text_is_prepared(project_copy, dataset, dtype):
    run = run_prepare(project_copy, dataset, '--source', 'mine.txt', cwd=project_copy)
    assert run.returncode == 0, run.stderr
    data = load_dataset(dataset, 32, project_copy / 'data')
    tokenizer = Tokenizer(data.tokenizer)
    assert tokenizer.vocab_size == data.vocab_size and data.meta['dtype'] == dtype
    folder = project_copy / 'data' / dataset
    decoded = {}
    for split in ('train', 'val'):
        raw = (folder / f'{split}.bin').read_bytes()
        decoded[split] = tokenizer.decode(np.frombuffer(raw, dtype))
        assert data.sha256(split) == hashlib.sha256(raw).hexdigest()
        size = len(decoded[split].encode())
        assert data.bytes_per_token(split) == pytest.approx(size / data.tokens(split))
        assert f'{data.tokens(split):,} tokens of {size:,} bytes' in run.stdout
    assert decoded == {'train': TEXT[: len(TEXT) * 9 // 10], 'val': TEXT[len(TEXT) * 9 // 10 :]}
    assert data.meta['source'] == {
        'text': str(project_copy / 'mine.txt'),
        'sha256': hashlib.sha256(TEXT.encode()).hexdigest(),
    }


@pytest.mark.slow
def test_standard_library_is_prepared(project_copy):
    """train.py prepares the missing dataset by the same function."""
    code = 'from data import dataset; dataset.prepare_if_missing("python_stdlib")'
    run = subprocess.run(
        [sys.executable, '-c', code], cwd=project_copy, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert 'python_stdlib is not prepared yet' in run.stdout.splitlines()[0]
    data = load_dataset('python_stdlib', 256, project_copy / 'data')
    assert data.tokenizer == {'kind': 'byte'} and data.vocab_size == 256
    assert data.bytes_per_token('train') == data.bytes_per_token('val') == 1
    both = b''.join((data.folder / f'{split}.bin').read_bytes() for split in ('train', 'val'))
    for module in (json, tarfile, subprocess):
        assert Path(module.__file__).read_bytes() in both


def stdlib_script():
    path = PROJECT / 'data' / 'python_stdlib' / 'prepare.py'
    spec = importlib.util.spec_from_file_location('stdlib_prepare', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_library_files_keep_their_split(tmp_path):
    library_texts = stdlib_script().library_texts
    names = [f'package/module_{i}.py' for i in range(100)]
    (tmp_path / 'package').mkdir()
    for name in names:
        (tmp_path / name).write_text(f'<{name}>')
    before = library_texts(tmp_path)
    assert sorted(''.join(before.values())) == sorted(''.join(f'<{name}>' for name in names))
    assert 0 < before['val'].count('<') < 30

    for name in names[::2]:
        (tmp_path / name).unlink()
    for folder in ('site-packages', 'test', 'package/tests'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'module.py').write_text('not the library')
    (tmp_path / 'latin.py').write_bytes(b'# caf\xe9')
    (tmp_path / 'notes.txt').write_text('not Python')
    after = library_texts(tmp_path)
    for split in ('train', 'val'):
        split_names = [name for name in sorted(names[1::2]) if f'<{name}>' in before[split]]
        assert after[split] == ''.join(f'<{name}>' for name in split_names)


@pytest.mark.parametrize(
    'content, message', [(None, 'cannot be read'), (b'caf\xe9', 'not UTF-8'), (b'ab', 'too short')]
)
def test_unusable_text_leaves_the_dataset_unchanged(project_copy, content, message):
    assert (
        run_prepare(
            project_copy, 'shakespeare_char', f'--source={project_copy}/mine.txt'
        ).returncode
        == 0
    )
    folder = project_copy / 'data' / 'shakespeare_char'
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    if content is not None:
        (project_copy / 'bad.txt').write_bytes(content * (message != 'too short'))
    run = run_prepare(project_copy, 'shakespeare_char', f'--source={project_copy}/bad.txt')
    assert run.returncode == 2 and message in run.stderr and 'Traceback' not in run.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_concurrent_preparations_write_one_complete_dataset(project_copy):
    other = TEXT[: len(TEXT) // 2].upper()
    (project_copy / 'other.txt').write_text(other, encoding='utf-8')
    script = str(project_copy / 'data' / 'shakespeare_char' / 'prepare.py')
    processes = [
        subprocess.Popen(
            [sys.executable, script, f'--source={project_copy}/{name}.txt'],
            stdout=subprocess.DEVNULL,
        )
        for name in ('mine', 'other')
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    data = load_dataset('shakespeare_char', 8, project_copy / 'data')
    splits = [data.splits[split].read(0, data.tokens(split)) for split in ('train', 'val')]
    assert Tokenizer(data.tokenizer).decode(np.concatenate(splits)) in (TEXT, other)


@pytest.mark.parametrize('dataset', ['shakespeare', 'shakespeare_char', 'python_stdlib'])
def test_help_names_written_files(project_copy, dataset):
    run = run_prepare(project_copy, dataset, '--help')
    assert run.returncode == 0 and 'meta.json' in run.stdout
    assert ('--source=FILE' in run.stdout) == dataset.startswith('shakespeare')
