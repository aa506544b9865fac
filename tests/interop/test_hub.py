"""Models of the hub are read from Hugging Face's cache or downloaded into it."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import transformers_models as reference
from helpers.project import PROJECT
from huggingface_hub import constants, errors

import interop
from common.errors import UserError
from interop import hub

pytestmark = pytest.mark.optional

REVISION = '0123456789abcdef' * 2 + '01234567'
NAME = 'openai-community/gpt2'
GPT2 = {'model_type': 'gpt2', 'n_layer': 1, 'n_head': 2, 'n_embd': 8, 'n_positions': 8}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache; the package reads the environment when it is imported."""
    folder = tmp_path / 'home' / 'hub'
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(folder))
    return folder


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
    """A tiny GPT-2 of transformers and the folder that it was saved in."""
    folder = tmp_path_factory.mktemp('gpt2')
    model = reference.from_fields({**reference.NO_SPECIAL_TOKENS, 'vocab_size': 11, **GPT2})
    reference.randomize(model)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def address(gpt2):
    """A local hub that has GPT-2 only: (its address, its files, the requested paths)."""
    files = {path.name: path.read_bytes() for path in gpt2[1].iterdir()}
    files |= {'pytorch_model.bin': b'pickled', 'tf_model.h5': b'other', 'vocab.json': b'{}'}
    files |= {'model.py': b'raise SystemExit', 'onnx/model.safetensors': b'other'}
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition('?')[0]
            requests.append(path)
            body, headers = None, {}
            if path.startswith(f'/api/models/{NAME}/tree/'):
                listing = [
                    {'type': 'file', 'path': file, 'size': len(content), 'oid': 'a' * 40}
                    for file, content in files.items()
                ]
                body = json.dumps(listing).encode()
            elif path.startswith(f'/api/models/{NAME}'):
                info = {'id': NAME, 'sha': REVISION, 'siblings': [], 'tags': [], 'private': False}
                body = json.dumps(info).encode()
            elif path.startswith(f'/{NAME}/resolve/{REVISION}/'):
                body = files.get(path.removeprefix(f'/{NAME}/resolve/{REVISION}/'))
                etag = hashlib.sha1(body or b'').hexdigest()
                headers = {'ETag': f'"{etag}"', 'X-Repo-Commit': REVISION}
            self.send_response(404 if body is None else 200)
            for key, value in headers.items():
                self.send_header(key, value)
            if body is None:
                self.send_header('X-Error-Code', 'RepoNotFound')
            self.send_header('Content-Length', str(len(body or b'')))
            self.send_header('Content-Type', 'application/json')
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(body or b'')

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}', files, requests
        server.shutdown()


@pytest.fixture
def snapshot_download(monkeypatch, cache):
    """A stand-in for the download: raises, or copies the matching files of a folder."""

    class Download:
        def __init__(self):
            self.result: Path | Exception = ConnectionError('no network')
            self.patterns: list[list[str]] = []

        def __call__(self, name, allow_patterns, local_files_only=False):
            if local_files_only:
                raise errors.LocalEntryNotFoundError('not there')
            self.patterns.append(allow_patterns)
            if isinstance(self.result, Exception):
                raise self.result
            folder = cache / 'snapshot'
            folder.mkdir(parents=True, exist_ok=True)
            for path in self.result.iterdir():
                if any(path.match(pattern) for pattern in allow_patterns):
                    shutil.copy(path, folder)
            return str(folder)

    download = Download()
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    return download


def assert_is(source: interop.PretrainedCheckpoint, model) -> None:
    """Assert that the source has the token embedding of the model."""
    name = 'transformer.wte.weight'
    assert torch.equal(source.tensors[name].read(), model.state_dict()[name])


def in_cache(cache: Path, name: str, folder: Path) -> Path:
    """Put the folder into the cache as a snapshot of the model `name`."""
    home = cache / f'models--{name.replace("/", "--")}'
    snapshot = home / 'snapshots' / REVISION
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    (home / 'refs').mkdir()
    (home / 'refs/main').write_text(REVISION)
    return snapshot


@pytest.mark.slow
def test_download_by_the_package(gpt2, address, tmp_path):
    """The real huggingface_hub downloads the needed files once, into the shared cache."""
    url, _, requests = address
    code = (
        'import interop; source = interop.open_checkpoint("gpt2"); '
        'print(source.name, *sorted(source.tensors)[:1])'
    )

    def run(endpoint: str) -> subprocess.CompletedProcess:
        variables = {'HF_HOME': str(tmp_path / 'home'), 'HF_ENDPOINT': endpoint}
        return subprocess.run(
            [sys.executable, '-c', code],
            cwd=PROJECT,
            env={**os.environ, **variables, 'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_OFFLINE': '0'},
            capture_output=True,
            text=True,
            timeout=120,
        )

    first = run(url)
    assert first.returncode == 0, first.stderr
    assert f'Downloading {url}/{NAME}' in first.stdout and 'gpt2 transformer.h.0' in first.stdout
    fetched = {path.rpartition('/')[2] for path in requests if '/resolve/' in path}
    assert fetched == {'config.json', 'model.safetensors'}  # no pickled files and no code
    again = run('http://127.0.0.1:9')
    assert again.returncode == 0 and 'Downloading' not in again.stdout
    assert_is(interop.open_checkpoint('gpt2'), gpt2[0])
    refused = subprocess.run(
        [sys.executable, '-c', 'import interop; interop.open_checkpoint("hf:some/model")'],
        cwd=PROJECT,
        env={**os.environ, 'HF_HOME': str(tmp_path / 'home'), 'HF_ENDPOINT': url},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert 'there is no such model, or it is private' in refused.stderr


def test_cached_model_needs_no_hub(gpt2, cache, monkeypatch):
    """The old name of the model, without its organization, is found too."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    in_cache(cache, 'gpt2', gpt2[1])
    assert_is(interop.open_checkpoint('gpt2'), gpt2[0])
    assert_is(interop.open_checkpoint('hf:openai-community/gpt2'), gpt2[0])


def test_incomplete_snapshot_is_not_used(gpt2, cache):
    snapshot = in_cache(cache, 'gpt2', gpt2[1])
    assert hub.find_cached(huggingface_hub, 'gpt2') == snapshot
    (snapshot / 'model.safetensors').unlink()
    assert hub.find_cached(huggingface_hub, 'gpt2') is None


def test_pickled_weights_are_used_only_without_safetensors(gpt2, snapshot_download, tmp_path):
    snapshot_download.result = gpt2[1]
    assert_is(interop.open_checkpoint('hf:some/model'), gpt2[0])
    assert snapshot_download.patterns == [['config.json', *hub.SAFETENSORS]]
    assert not any('.bin' in pattern for pattern in hub.SAFETENSORS)

    shutil.copytree(gpt2[1], tmp_path / 'pickled')
    (tmp_path / 'pickled/model.safetensors').unlink()
    torch.save(gpt2[0].state_dict(), tmp_path / 'pickled/pytorch_model.bin')
    shutil.rmtree(tmp_path / 'home')
    snapshot_download.result = tmp_path / 'pickled'
    assert_is(interop.open_checkpoint('hf:some/model'), gpt2[0])
    assert len(snapshot_download.patterns) == 3


def hub_error(kind: str) -> Exception:
    """An error of the package, without the HTTP response that it normally holds."""
    error = getattr(errors, kind).__new__(getattr(errors, kind))
    error.args = ('of the hub',)
    return error


@pytest.mark.parametrize(
    'error, reason',
    [
        (
            errors.LocalEntryNotFoundError('offline'),
            'could not be downloaded (the hub cannot be reached)',
        ),
        ('RepositoryNotFoundError', '(there is no such model, or it is private: log in'),
        ('GatedRepoError', '(it is restricted: ask for access on that page, then log in'),
        (PermissionError(13, 'Permission denied'), '(Permission denied; HF_HOME=FOLDER sets'),
        (RuntimeError('first line\nsecond'), '(RuntimeError: first line)'),
        (RuntimeError(), '(RuntimeError: )'),
    ],
)
def test_failed_download_is_one_line(snapshot_download, cache, error, reason):
    snapshot_download.result = hub_error(error) if isinstance(error, str) else error
    with pytest.raises(UserError) as raised:
        interop.open_checkpoint('gpt2-xl')
    message = str(raised.value)
    assert message.startswith(
        f'gpt2-xl: openai-community/gpt2-xl is neither a folder nor in the cache {cache}'
    )
    assert reason in message and '--init_from=hf:FOLDER' in message and '\n' not in message


def test_impossible_names_are_not_looked_up(snapshot_download, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r'hf:\.\./model: the folder \.\./model does not exist'):
        interop.open_checkpoint('hf:../model')
    assert snapshot_download.patterns == []


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(UserError, match=r'gpt2: .*package huggingface_hub: pip install hugg'):
        interop.open_checkpoint('gpt2')
