"""Run folders with unusual names, or with unexpected files in them."""

import importlib
import json
import os
import shutil
import sys

import pytest
from helpers.in_process import train_here
from helpers.project import TINY_RUN

from common.errors import run_script

TINY = [f'--{key}={value}' for key, value in TINY_RUN.items()]


def exit_code_of(command, *arguments):
    """The exit code of a command run in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, 'argv', [f'{command}.py'])
        run_script(importlib.import_module(command).main, list(map(str, arguments)))
    return end.value.code


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='names are bytes on Linux')
@pytest.mark.parametrize('name', [b'b\xff', 'é 日'.encode(), b'a\x1b[2J'])
def test_commands_accept_any_folder_name(name, tmp_path, tiny_dataset, capsys):
    place = tmp_path / os.fsdecode(name)
    place.mkdir()
    run = train_here(tiny_dataset, place / 'out', max_iters=1)
    assert run.code == 0
    (place / 'text.txt').write_text('the quick brown fox\n' * 5)
    where = f'--out_dir={place}/out'
    assert exit_code_of('sample', where, '--num_samples=1', '--max_new_tokens=1') == 0
    result = place / 'results.json'
    assert exit_code_of('evaluate', where, f'--text={place}/text.txt', f'--json={result}') == 0
    assert json.loads(result.read_text())['text'][0]['file'] == f'{place}/text.txt'
    for suffix in ('pt', 'safetensors'):
        assert exit_code_of('export_checkpoint', where, f'--output={place}/model.{suffix}') == 0
    resume = (where, f'--dataset={tiny_dataset}', '--init_from=resume', '--max_iters=2')
    assert exit_code_of('train', *TINY, *resume) == 0
    assert '\x1b' not in capsys.readouterr().out


def replaced_by_folder(path):
    path.unlink()
    path.mkdir()


def replaced_by_file(path):
    shutil.rmtree(path)
    path.write_text('')


ODD = {
    'record.json': replaced_by_folder,
    'record.json.tmp': lambda path: path.mkdir(),
    'journal.jsonl': replaced_by_folder,
    'checkpoints': replaced_by_file,
    'checkpoints/iter_00000001': replaced_by_file,
    'checkpoints/iter_00000001/index.json': replaced_by_folder,
    'checkpoints/iter_00000001/state.pt': replaced_by_folder,
    'checkpoints/iter_00000009': lambda path: path.write_text(''),
}


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory, tiny_dataset):
    place = tmp_path_factory.mktemp('odd')
    return train_here(tiny_dataset, place / 'out', max_iters=1).folder


@pytest.mark.slow
@pytest.mark.parametrize('name', ODD)
@pytest.mark.parametrize(
    ('command', 'arguments'),
    [
        ('sample', ['--num_samples=1', '--max_new_tokens=1']),
        ('train', [*TINY, '--init_from=resume', '--max_iters=2']),
        ('train', [*TINY, '--init_from=auto', '--max_iters=2']),
    ],
)
def test_unexpected_files_are_skipped_or_reported(
    command, arguments, name, run_folder, tmp_path, tiny_dataset, capsys
):
    copy = shutil.copytree(run_folder, tmp_path / 'out' / run_folder.name)
    ODD[name](copy / name)
    data = [f'--dataset={tiny_dataset}'] if command == 'train' else []
    code = exit_code_of(command, *arguments, *data, f'--out_dir={tmp_path}/out')
    message = capsys.readouterr().err
    assert code in (0, 2) and 'Traceback' not in message
    if code == 2:
        assert message.startswith(f'{command}.py: ') and str(copy) in message, message
