"""Shared by the tests: a small dataset on disk, and the scripts run as a user runs them."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers.project import PROJECT, TINY_RUN, published_gpt2_folder, write_tiny_dataset
from helpers.script_server import CAN_FORK, ScriptServer
from helpers.terminal import Terminal

from common import live_region
from common.paths import cache_folder
from data.gpt2_vocabulary import MERGES_FILE
from records.run_folders import new_run_folder

STARTS_PROCESSES = {'run_script', 'train'}


def pytest_collection_modifyitems(items):
    """Tests that start the program as a user does are slow; others that are carry the marker."""
    for item in items:
        if STARTS_PROCESSES & set(item.fixturenames):
            item.add_marker('slow')


@pytest.fixture(scope='session', autouse=True)
def no_memory_of_the_user(tmp_path_factory):
    """What runs remember of this machine goes into a folder of the tests.

    GPT-2's vocabulary is there already, so that no test needs a network.
    """
    cache = tmp_path_factory.mktemp('cache')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(cache))
        folder = cache_folder()
        folder.mkdir()
        shutil.copyfile(published_gpt2_folder() / 'vocab.bpe', folder / MERGES_FILE)
        yield


@pytest.fixture
def register(monkeypatch):
    """`register(registry, name, component)`, undone after the test."""

    def add(registry, name, component):
        components = {key: registry[key] for key in registry}  # imports the project's own first
        monkeypatch.setattr(registry, '_components', components)
        monkeypatch.setattr(registry, '_sources', dict(registry._sources))
        registry.register(name)(component)

    return add


@pytest.fixture
def terminal(monkeypatch):
    """`terminal(columns, rows)`: a terminal in memory, which the project sees as a real one.

    standard: it is standard output and standard error too.
    """

    def make(*size, standard=False):
        screen = Terminal(*size)
        if standard:
            monkeypatch.setattr(sys, 'stdout', screen)
            monkeypatch.setattr(sys, 'stderr', screen)
        return screen

    monkeypatch.setattr(live_region, 'terminal_size', lambda stream: stream.size)
    monkeypatch.setenv('TERM', 'xterm')
    for name in ('NO_COLOR', 'FORCE_COLOR', 'CLICOLOR_FORCE'):
        monkeypatch.delenv(name, raising=False)
    with live_region.closed_at_end():
        yield make


@pytest.fixture(scope='module')
def one_thread():
    """Tensors this small only suffer from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def tiny_dataset(tmp_path_factory) -> Path:
    """A dataset folder of bytes with some order in them: 30,000 to train on, 5,000 to validate."""
    folder = tmp_path_factory.mktemp('tiny_dataset')
    write_tiny_dataset(folder)
    return folder


@pytest.fixture
def delayed_saves(monkeypatch) -> list[list[int]]:
    """What async_save writes is held back until somebody insists on a publication.

    The iters of the checkpoints that were there then, each time.
    """
    from training.checkpoint import PendingCheckpoint, list_checkpoints, read_index
    from training.checkpoint_writer import CheckpointManager

    write, publish = PendingCheckpoint.write, CheckpointManager.publish
    insisted, there = threading.Event(), []

    def held_write(self, state):
        assert insisted.wait(60)
        write(self, state)

    def insist(self):
        if self.in_progress:
            self.folder.mkdir(exist_ok=True)
            paths = list_checkpoints(self.folder)
            there.append([read_index(path).iter for path in paths])
        insisted.set()
        publish(self)
        insisted.clear()

    monkeypatch.setattr(PendingCheckpoint, 'write', held_write)
    monkeypatch.setattr(CheckpointManager, 'publish', insist)
    return there


@pytest.fixture(scope='session')
def script_server():
    """Starts scripts fast; None where processes cannot be forked."""
    if not CAN_FORK:
        yield None
        return
    with ScriptServer() as server:
        yield server


@pytest.fixture
def run_script(tmp_path, script_server):
    """run_script('train.py', '--help', code=0): the project's script, from tmp_path, one thread.

    Returns the finished process with `stdout` and `stderr` as text; fails on another exit code.
    """

    def run(script: str, *arguments: str, code: int = 0, timeout: float = 120):
        path, words = PROJECT / script, [str(argument) for argument in arguments]
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'COLUMNS': '100'}
        if script_server:
            result = script_server.run(path, words, cwd=tmp_path, env=env, timeout=timeout)
        else:
            result = subprocess.run(
                [sys.executable, str(path), *words],
                cwd=tmp_path,
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        assert result.returncode == code, f'{result.stdout}\n{result.stderr}'
        return result

    return run


@pytest.fixture
def train(run_script, tiny_dataset):
    """train('--max_iters=8', code=0): train.py, tiny on `tiny_dataset`, into tmp_path/out.

    Four iterations of two blocks, 32 wide; what is given wins over these settings.
    """
    tiny = [f'--{key}={value}' for key, value in TINY_RUN.items()]

    def run(*arguments: str, code: int = 0):
        return run_script('train.py', f'--dataset={tiny_dataset}', *tiny, *arguments, code=code)

    return run


@pytest.fixture
def study_file(tmp_path, tiny_dataset):
    """study_file('sweep = …') -> the path of a study of tiny runs."""

    def write(text: str, name: str = 'study.py') -> Path:
        settings = {**TINY_RUN, 'dataset': str(tiny_dataset), 'out_dir': str(tmp_path / 'out')}
        lines = [f'{key} = {value!r}' for key, value in settings.items()]
        path = tmp_path / name
        path.write_text('\n'.join([*lines, text]), encoding='utf-8')
        return path

    return write


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """The folder of a run that has not begun."""
    return new_run_folder(tmp_path)
