"""The wheel contains every module, package and data file, and nothing else."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.project import PROJECT

NOT_INSTALLED = {'tests', 'benchmarks', 'scripts', 'docs', 'examples'}


def python_files(folder: Path) -> set[str]:
    """The Python files below a folder that belong in the wheel."""
    files = {path.relative_to(folder) for path in folder.rglob('*.py')}
    return {
        path.as_posix()
        for path in files
        if path.parts[0] not in NOT_INSTALLED
        and not any(
            part.startswith(('.', 'out')) or part in ('build', 'venv') for part in path.parts
        )
    }


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel of a copy of the project, built offline."""
    copy, out = tmp_path_factory.mktemp('copy'), tmp_path_factory.mktemp('wheel')
    names = python_files(PROJECT) | {'records/record_schema.json', 'requirements.txt', 'LICENSE'}
    for name in names | {'pyproject.toml', 'tests/conftest.py', 'benchmarks/loader.py'}:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PROJECT / name, copy / name)
    (copy / 'data/shakespeare/train.bin').write_bytes(b'tokens')
    code = f'from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})'
    built = subprocess.run(
        [sys.executable, '-c', code], cwd=copy, capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0, built.stderr
    (path,) = out.iterdir()
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_wheel_contains_all_modules(wheel):
    names = {name for name in wheel.namelist() if '.dist-info/' not in name}
    assert names == python_files(PROJECT) | {'records/record_schema.json'}
    assert {'train.py', 'common/registry.py', 'config/arch_llama.py'} <= names
    assert 'data/shakespeare/prepare.py' in names


def test_wheel_requirements_match_requirements_file(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith('/METADATA'))
    metadata = wheel.read(name).decode()
    required = re.findall(r'^Requires-Dist: ([^;\n]+)$', metadata, re.MULTILINE)
    listed = (PROJECT / 'requirements.txt').read_text().split()
    assert sorted(required) == sorted(listed)
    assert [re.split('[=>]', entry)[0] for entry in listed] == [
        'torch',
        'numpy',
        'tiktoken',
        'psutil',
    ]
