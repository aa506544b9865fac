"""Changed token files are detected, at low cost and by one process."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from helpers.in_process import train_here
from helpers.project import TINY_RUN

from common.errors import UserError, run_script
from data import inspect_tokens, token_check
from data.dataset import load_dataset
from data.token_check import CHECKED


@pytest.fixture
def folder(tmp_path, tiny_dataset):
    """A copy of the tiny dataset that has not been checked."""
    shutil.copytree(tiny_dataset, tmp_path / 'data', ignore=shutil.ignore_patterns(CHECKED))
    return tmp_path / 'data'


@pytest.fixture
def hashed(monkeypatch):
    """The names of the first files of the splits that are hashed, in order."""
    names, real = [], token_check.hash_split

    def watched(folder, facts):
        names.append(facts['shards'][0]['file'])
        return real(folder, facts)

    monkeypatch.setattr(token_check, 'hash_split', watched)
    return names


def check(folder, **options):
    data = load_dataset(folder, 8)
    data.verify_checksums(**options)
    return data


def change(path, keep_time=False):
    """Change bytes of the file, but not its size."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def test_files_are_hashed_once(folder, hashed):
    check(folder)
    assert hashed == ['train.bin', 'val.bin']
    check(folder)
    assert len(hashed) == 2
    check(folder, full=True)
    assert len(hashed) == 4
    os.utime(folder / 'val.bin')  # like a copy or a checkout
    check(folder)
    check(folder)
    assert hashed[4:] == ['val.bin']
    (folder / CHECKED).unlink()
    check(folder, splits=('val',))
    assert hashed[5:] == ['val.bin']


@pytest.mark.parametrize('name', ['train.bin', 'val.bin'])
def test_changed_tokens_are_user_error(folder, name):
    check(folder)
    change(folder / name)
    for _ in range(2):  # the result is not stored as verified
        with pytest.raises(UserError, match=rf'{name} has the SHA-256 .*(\n.*)*import_tokens\.py'):
            check(folder)
    change(folder / name)
    check(folder)  # changed back


def test_full_check_finds_hidden_changes(folder):
    check(folder)
    change(folder / 'val.bin', keep_time=True)
    check(folder)
    with pytest.raises(UserError, match=r'val\.bin has the SHA-256'):
        check(folder, full=True)


def test_changed_meta_json_is_user_error(folder):
    check(folder)
    meta = json.loads((folder / 'meta.json').read_text())
    meta['splits']['val']['sha256'] = 'f' * 64
    (folder / 'meta.json').write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r'val\.bin has the SHA-256 .* but f+ is expected'):
        check(folder)


def test_folder_without_hashes_is_hashed_once(tmp_path, hashed):
    for split, count in (('train', 1000), ('val', 200)):
        np.arange(count, dtype='<u2').tofile(tmp_path / f'{split}.bin')
    expected = hashlib.sha256((tmp_path / 'val.bin').read_bytes()).hexdigest()
    assert check(tmp_path).sha256('val') == check(tmp_path).sha256('val') == expected
    assert len(hashed) == 2
    change(tmp_path / 'val.bin')
    expected = hashlib.sha256((tmp_path / 'val.bin').read_bytes()).hexdigest()
    assert check(tmp_path).sha256('val') == expected


@pytest.mark.parametrize('content', ['', '[]', '{"val": 3}', '{"val": {"sha256": [], "files": 1}}'])
def test_invalid_checksum_file_is_ignored(folder, hashed, content):
    (folder / CHECKED).write_text(content)
    check(folder)
    assert len(hashed) == 2 and set(json.loads((folder / CHECKED).read_text())) == {'train', 'val'}


def test_read_only_folder_is_checked(folder, hashed):
    (folder / CHECKED).mkdir()
    for count in (2, 4):
        check(folder)
        assert len(hashed) == count
    assert not list(folder.glob('*.tmp'))


def test_one_process_hashes_for_all(folder, hashed):
    main = load_dataset(folder, 8)
    sent = []

    def from_main(make):
        sent.append(make())
        return sent[0]

    main.verify_checksums(from_main=from_main)
    assert len(hashed) == 2
    other = load_dataset(folder, 8)
    other.verify_checksums(from_main=lambda make: sent[0])
    assert len(hashed) == 2 and other.hash == main.hash
    (folder / 'meta.json').unlink()
    bare = np.arange(200, dtype='<u2').tobytes()
    for split in ('train', 'val'):
        (folder / f'{split}.bin').write_bytes(bare)
    other = load_dataset(folder, 8)
    other.verify_checksums(from_main=lambda make: {'train': 'a', 'val': 'b'})
    assert (other.sha256('train'), other.sha256('val'), len(hashed)) == ('a', 'b', 2)


def test_inspect_verifies_and_stores_result(folder, hashed, capsys):
    inspect_tokens.main([str(folder), '--verify'])
    check(folder)
    assert len(hashed) == 2 and capsys.readouterr().out.count('verified') == 2


@pytest.mark.slow
def test_run_on_changed_data_is_refused(folder, tmp_path, capsys, hashed):
    run = train_here(folder, tmp_path / 'out', max_iters=1)
    assert run.code == 0 and len(hashed) == 2
    train_here(folder, tmp_path / 'again', max_iters=1, verify_data=True)
    assert len(hashed) == 4
    saved = {path: path.stat().st_mtime_ns for path in run.folder.rglob('*')}
    change(folder / 'val.bin')
    command = [f'--{key}={value}' for key, value in {**TINY_RUN, 'dataset': folder}.items()]
    import train

    for options in (['--init_from=resume', '--max_iters=2'], [], ['--eval_only=True']):
        with pytest.raises(SystemExit) as exit:
            run_script(train.main, [*command, f'--out_dir={tmp_path}/out', *options])
        assert exit.value.code == 2
        assert 'val.bin has the SHA-256' in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob('*')} == saved
    assert list((tmp_path / 'out').iterdir()) == [run.folder]
    for option in ('--plan=True', '--print_config'):  # these read no tokens
        with pytest.raises(SystemExit) as exit:
            run_script(train.main, [*command, option])
        assert exit.value.code == 0


def test_resumed_run_does_not_verify_again(folder, tmp_path, hashed):
    train_here(folder, tmp_path / 'out', max_iters=1, verify_data=True)
    before = len(hashed)
    train_here(folder, tmp_path / 'out', init_from='resume', max_iters=2)
    assert len(hashed) == before
