"""Run folders are made without collisions, and found wherever they are."""

import json
import os
import subprocess
import sys
from datetime import datetime

import pytest
from helpers.loggers import resumed_logger, started_logger
from helpers.project import PROJECT
from helpers.sample_run import METADATA

from common.errors import UserError
from records.run_folders import find_records, latest_run, new_run_folder


def test_run_folders_of_same_second_get_suffixes(tmp_path):
    now = datetime(2026, 1, 2, 3, 4, 5)
    folders = [new_run_folder(tmp_path / 'deep' / 'out', now) for _ in range(11)]
    assert len(set(folders)) == 11
    assert folders[0].name == 'run_20260102_030405'
    assert folders[10].name == 'run_20260102_030405_11'
    assert all((folder / 'checkpoints').is_dir() for folder in folders)

    out = folders[0].parent
    assert latest_run(out) is None  # none of them has begun
    for folder in folders[:10]:
        started_logger(folder).finish()
    assert latest_run(out) == folders[9]  # _10 comes after _2 and _9
    later = new_run_folder(out, datetime(2026, 1, 2, 3, 4, 6))
    started_logger(later)
    (out / 'run_of_mine').mkdir()
    assert latest_run(out) == later
    assert latest_run(tmp_path / 'nowhere') is None


def test_latest_run_ignores_time_zone(tmp_path):
    """Names are in local time: a container in UTC, a host in Tokyo, the hour after summer time."""
    names = {'run_20260102_120000': '+09:00', 'run_20260102_040000': '+00:00'}  # 03:00, 04:00 UTC
    for name, zone in names.items():
        folder = tmp_path / name
        folder.mkdir()
        hour = name[13:15]
        line = {'kind': 'start', 'time': 0.0, 'run_name': name}
        line['start_time'] = f'2026-01-02T{hour}:00:00{zone}'
        (folder / 'journal.jsonl').write_text(json.dumps(line) + '\n')
    assert latest_run(tmp_path).name == 'run_20260102_040000'
    # A record alone tells it too; without a time the name does.
    (tmp_path / 'run_20260102_040000' / 'journal.jsonl').rename(
        tmp_path / 'run_20260102_040000' / 'record.json'
    )
    assert latest_run(tmp_path).name == 'run_20260102_040000'
    for nonsense in ('', '{}', '{"start_time": "yesterday"}', '{"start_time": 5}'):
        for name in ('run_20260103_000000', 'run_99999999_999999'):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / 'journal.jsonl').write_text(nonsense)
        newest = 'run_20260103_000000' if nonsense else 'run_20260102_040000'
        assert latest_run(tmp_path).name == newest


def test_latest_run_of_job(tmp_path):
    first, second, third = (
        new_run_folder(tmp_path, datetime(2026, 1, 2, 3, 4, second)) for second in range(3)
    )
    for folder, job in ((first, 'a'), (second, 'b'), (third, None)):
        started_logger(folder, metadata={**METADATA, 'job': job}).finish()
    assert latest_run(tmp_path) == latest_run(tmp_path, 'another') == third
    assert [latest_run(tmp_path, job) for job in 'ab'] == [first, second]
    resumed_logger(second, 0, metadata={**METADATA, 'job': 'a'}).finish()
    assert [latest_run(tmp_path, job) for job in 'ab'] == [second, third]


def test_simultaneous_processes_get_distinct_folders(tmp_path):
    code = (
        'import sys; from datetime import datetime; from training_logger import new_run_folder\n'
        'for _ in range(25): print(new_run_folder(sys.argv[1], datetime(2026, 1, 1)))'
    )
    command = [sys.executable, '-c', code, str(tmp_path)]
    running = [subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE) for _ in range(3)]
    made = [line for process in running for line in process.communicate(timeout=60)[0].split()]
    assert len(made) == len(set(made)) == 75


def test_unwritable_out_dir_raises_user_error(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'file/out.*--out_dir'):
        new_run_folder(tmp_path / 'file' / 'out')

    def read_only(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(os, 'mkdir', read_only)
    with pytest.raises(UserError, match='Permission denied'):
        new_run_folder(tmp_path)


def test_find_records_skips_hidden_folders_and_data(tmp_path):
    runs = [new_run_folder(tmp_path / place) for place in ('out-a', 'out-b/study/x')]
    hidden = [
        new_run_folder(tmp_path / place)
        for place in ('.git/out', 'data/out', 'env/out', '.venv/lib', str(runs[0] / 'checkpoints'))
    ]
    (tmp_path / 'env' / 'pyvenv.cfg').touch()
    for run in runs + hidden:
        started_logger(run)
    renamed = runs[1].rename(tmp_path / 'baseline')
    (tmp_path / 'loop').symlink_to(tmp_path)
    new_run_folder(tmp_path / 'out-c')  # never began

    assert find_records(tmp_path) == sorted([runs[0], renamed])
    assert find_records(renamed) == [renamed]
    assert find_records(tmp_path / 'nowhere') == []
    (tmp_path / 'record.json').write_text('{}')  # a stray one hides nothing
    assert set(find_records(tmp_path)) == {tmp_path, runs[0], renamed}


def test_find_records_follows_links_once(tmp_path):
    disk, out = tmp_path / 'disk', tmp_path / 'out'
    run = started_logger(new_run_folder(disk / 'llama')).run_folder
    own = started_logger(new_run_folder(out / 'gpt2')).run_folder
    for name in ('away', 'again'):
        (out / name).symlink_to(disk)
    (disk / 'back').symlink_to(out)
    (out / 'gone').symlink_to('nowhere')
    (out / 'self').symlink_to('self')
    assert find_records(out) == sorted([own, out / 'again' / 'llama' / run.name])
