"""A file is replaced whole or not at all, and nothing is left beside it."""

import errno
import os

import pytest

from common import files
from common.errors import UserError
from common.files import check_destination, replace_file, write_file


@pytest.mark.parametrize('function', ['fsync', 'replace'])
def test_full_disk_leaves_old_file(tmp_path, monkeypatch, function):
    path = tmp_path / 'a.json'
    path.write_bytes(b'old')

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, function, full)
    with pytest.raises(UserError, match=r'a\.json: cannot be written \(No space left on device\)'):
        write_file(path, b'new')
    assert path.read_bytes() == b'old'
    assert [*tmp_path.iterdir()] == [path]


def test_fsync_before_rename(tmp_path, monkeypatch):
    order = []
    for name in ('fsync', 'replace'):
        real = getattr(os, name)
        monkeypatch.setattr(
            files.os, name, lambda *a, name=name, real=real: (order.append(name), real(*a))
        )
    replace_file(tmp_path / 'a', b'new')
    assert order == ['fsync', 'replace'] and (tmp_path / 'a').read_bytes() == b'new'


def test_link_stays_a_link(tmp_path):
    (tmp_path / 'real').write_bytes(b'old')
    (tmp_path / 'link').symlink_to(tmp_path / 'real')
    replace_file(tmp_path / 'link', b'new')
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'real').read_bytes() == b'new'


def test_check_destination_reports_missing_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, 'access', lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match='no permission to write in the folder'):
        check_destination('--plot', tmp_path / 'p.png', ('.png',))
