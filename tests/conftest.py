"""Fixtures of all tests: a small dataset, a terminal, and the scripts as a user runs them."""

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
from components import attention_backends
from data.gpt2_vocabulary import MERGES_FILE
from records.run_folders import new_run_folder

STARTS_PROCESSES = {'run_script', 'train'}


def pytest_collection_modifyitems(items):
    """Mark tests that start the scripts as slow; other slow tests have the marker themselves."""
    for item in items:
        if STARTS_PROCESSES & set(item.fixturenames):
            item.add_marker('slow')


@pytest.fixture(scope='session', autouse=True)
def empty_cache_folder(tmp_path_factory):
    """Use an own cache folder for the tests instead of the user's.

    It contains GPT-2's vocabulary, so that no test needs a network.
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
    """`terminal(columns, rows)`: a simulated terminal, which the project treats as a real one.

    standard: use it as standard output and standard error too.
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


@pytest.fixture
def flex_of_few_queries(monkeypatch):
    """Let flex attention compute also sequences that are shorter than a block of its mask."""
    monkeypatch.setattr(attention_backends, 'FEW_QUERIES', 2)


@pytest.fixture(scope='module')
def one_thread():
    """Use one thread: small tensors are slower with several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def tiny_dataset(tmp_path_factory) -> Path:
    """A dataset folder with 30,000 training and 5,000 validation bytes, which are predictable."""
    folder = tmp_path_factory.mktemp('tiny_dataset')
    write_tiny_dataset(folder)
    return folder


@pytest.fixture
def delayed_saves(monkeypatch) -> list[list[int]]:
    """Delay each asynchronous write until the publication waits for it.

    Returns a list that gets, at each publication, the iterations of the existing checkpoints.
    """
    from training.checkpoint import PendingCheckpoint, list_checkpoints, read_index
    from training.checkpoint_writer import CheckpointManager

    write, publish = PendingCheckpoint.write, CheckpointManager.publish
    awaited, existing = threading.Event(), []

    def delayed_write(self, state):
        assert awaited.wait(60)
        write(self, state)

    def publish_and_release(self):
        if self.in_progress:
            self.folder.mkdir(exist_ok=True)
            paths = list_checkpoints(self.folder)
            existing.append([read_index(path).iter for path in paths])
        awaited.set()
        publish(self)
        awaited.clear()

    monkeypatch.setattr(PendingCheckpoint, 'write', delayed_write)
    monkeypatch.setattr(CheckpointManager, 'publish', publish_and_release)
    return existing


@pytest.fixture(scope='session')
def script_server():
    """A server that starts scripts fast; None where processes cannot be forked."""
    if not CAN_FORK:
        yield None
        return
    with ScriptServer() as server:
        yield server


@pytest.fixture
def run_script(tmp_path, script_server):
    """run_script('train.py', '--help', code=0) runs a project script in tmp_path with one thread.

    Returns the finished process with `stdout` and `stderr` as text; asserts the exit code.
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
    """train('--max_iters=8', code=0) runs train.py on `tiny_dataset` with output in tmp_path/out.

    By default four iterations of a model with two blocks of width 32; arguments override these.
    """
    tiny = [f'--{key}={value}' for key, value in TINY_RUN.items()]

    def run(*arguments: str, code: int = 0):
        return run_script('train.py', f'--dataset={tiny_dataset}', *tiny, *arguments, code=code)

    return run


@pytest.fixture
def study_file(tmp_path, tiny_dataset):
    """study_file('sweep = …') writes a study of tiny runs and returns its path."""

    def write(text: str, name: str = 'study.py') -> Path:
        settings = {**TINY_RUN, 'dataset': str(tiny_dataset), 'out_dir': str(tmp_path / 'out')}
        lines = [f'{key} = {value!r}' for key, value in settings.items()]
        path = tmp_path / name
        path.write_text('\n'.join([*lines, text]), encoding='utf-8')
        return path

    return write


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """The folder of a new run."""
    return new_run_folder(tmp_path)
