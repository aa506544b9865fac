"""hub.py: models are found in Hugging Face's cache, or fetched whole from a hub."""

import contextlib
import hashlib
import http.server
import json
import threading

import pytest
import torch
from helpers import transformers_models as reference

import interop
from common.errors import UserError
from interop import hub

REVISION = '0123456789abcdef' * 2 + '01234567'
GPT2 = {'model_type': 'gpt2', 'n_layer': 1, 'n_head': 2, 'n_embd': 8, 'n_positions': 8}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    for name in ('HF_HUB_CACHE', 'HF_ENDPOINT', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
    """A tiny GPT-2 of theirs, and the folder that it was saved in."""
    folder = tmp_path_factory.mktemp('gpt2')
    model = reference.from_fields({**reference.NO_SPECIAL_TOKENS, 'vocab_size': 11, **GPT2})
    reference.randomise(model)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def hosted(gpt2, monkeypatch):
    """A hub on this machine that has gpt2 only: (its files, which may be changed; paths asked).

    A file that is an iterator is sent on and on; 'listing' and 'revision' replace its answers.
    """
    files = {path.name: path.read_bytes() for path in gpt2[1].iterdir()}
    files |= {'pytorch_model.bin': b'pickled', 'tf_model.h5': b'other', 'vocab.json': b'{}'}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    sizes = {name: len(content) for name, content in files.items()}
    asked = []

    def answer_to(path: str) -> bytes | None:
        name = hub.ORGANISATION + 'gpt2'
        kind = path.removeprefix(f'/api/models/{name}/').partition('/')[0]
        replaced = {'tree': 'listing', 'revision': 'revision'}.get(kind)
        if replaced in files:
            return files[replaced]
        if path == f'/api/models/{name}/revision/main':
            return json.dumps({'sha': REVISION}).encode()
        if path == f'/api/models/{name}/tree/{REVISION}':
            listing = [{'type': 'directory', 'path': 'onnx'}]
            for file, size in sizes.items():
                lfs = {'lfs': {'oid': sums[file]}} if file.startswith('model') else {}
                listing.append({'type': 'file', 'path': file, 'size': size, **lfs})
            return json.dumps(listing).encode()
        return files.get(path.removeprefix(f'/{name}/resolve/{REVISION}/'))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = answer_to(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            with contextlib.suppress(OSError):  # whoever reads has gone
                for part in (body or b'',) if isinstance(body, bytes | None) else body:
                    self.wfile.write(part)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
        yield files, asked
        server.shutdown()


def assert_is(source: interop.Source, model) -> None:
    """The source is that model, in one tensor at least."""
    name = 'transformer.wte.weight'
    assert torch.equal(source.tensors[name].read(), model.state_dict()[name])


def test_a_model_is_downloaded_once_and_into_the_cache_that_others_read(gpt2, hosted):
    from transformers import AutoModelForCausalLM

    _, asked = hosted
    assert_is(interop.open_source('gpt2'), gpt2[0])
    fetched = {path.rpartition('/')[2] for path in asked if '/resolve/' in path}
    assert fetched == {'config.json', 'model.safetensors'}  # nothing that is pickled

    asked.clear()
    again = interop.open_source('gpt2')
    assert_is(again, gpt2[0])
    assert asked == [] and again.name == 'gpt2'
    assert_is(interop.open_source('hf:openai-community/gpt2'), gpt2[0])
    theirs = AutoModelForCausalLM.from_pretrained(
        'openai-community/gpt2', local_files_only=True, cache_dir=hub.cache_folder()
    )
    assert torch.equal(theirs.transformer.wte.weight, gpt2[0].transformer.wte.weight)


@pytest.mark.parametrize('damage', ['cut', 'changed'])
def test_what_is_not_what_the_hub_says_is_not_kept(hosted, damage):
    files, _ = hosted
    whole = files['model.safetensors']
    files['model.safetensors'] = whole[:-1] + (b'' if damage == 'cut' else b'?')
    with pytest.raises(UserError, match=r'gpt2: .*(bytes, and|another SHA-256)'):
        interop.open_source('gpt2')
    assert [path.name for path in hub.cache_folder().rglob('*model*.safetensors*')] == []
    files['model.safetensors'] = whole
    interop.open_source('gpt2')


@pytest.mark.parametrize('answer', ['model.safetensors', 'listing', 'revision', 'config.json'])
def test_an_endless_answer_is_read_no_further_than_it_was_announced(hosted, monkeypatch, answer):
    files, _ = hosted
    monkeypatch.setattr(hub, 'MOST_JSON', 100_000)
    sent = []
    files[answer] = (sent.append(2**16) or bytes(2**16) for _ in range(2000))
    with pytest.raises(UserError, match=r'bytes, and more came|longer than|no JSON'):
        interop.open_source('gpt2')
    # What was on its way when the reader went: far from all.
    assert sum(sent) < 20 * 2**20
    assert [path.name for path in hub.cache_folder().rglob('*.incomplete')] == []


LISTINGS = (
    *(3, None, {}, 'x', [3], [None], [[]], [{'type': 'file'}], [{'type': 'file', 'path': 3}]),
    *(
        [{'type': 'file', 'path': path, 'size': size} for path in ('config.json', 'model.bin')]
        for size in (None, '5', -1, 1.5, True, 10**30, [])
    ),
    [
        {'type': 'file', 'path': 'config.json', 'size': 2, 'lfs': 'x'},
        {'type': 'file', 'path': 'model.safetensors', 'size': 10**15},
    ],
)


@pytest.mark.parametrize('number', range(len(LISTINGS)))
def test_a_listing_that_is_none_or_of_what_no_disk_holds(hosted, number):
    files, asked = hosted
    files['listing'] = json.dumps(LISTINGS[number]).encode()
    with pytest.raises(UserError, match=r'could not be downloaded'):
        interop.open_source('gpt2')
    assert not any('/resolve/' in path for path in asked)


@pytest.mark.parametrize('revision', [b'[]', b'{"sha": 3}', b'[' * 100_000, b'\xff', b''])
def test_a_revision_that_is_none(hosted, revision):
    hosted[0]['revision'] = revision
    with pytest.raises(UserError, match=r'could not be downloaded'):
        interop.open_source('gpt2')


def test_a_model_in_the_cache_needs_no_hub(gpt2, monkeypatch):
    """Under the name that it had before it belonged to an organisation, too."""
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    home = hub.cache_folder() / 'models--gpt2'
    snapshot = home / 'snapshots' / REVISION
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(gpt2[1])
    assert hub.find_cached('openai-community/gpt2') is None
    (home / 'refs').mkdir()
    (home / 'refs/main').write_text(REVISION)
    assert_is(interop.open_source('gpt2'), gpt2[0])
    (home / 'refs/main').write_text(f'../../../{snapshot}')  # leads nowhere else
    assert hub.find_cached('gpt2') == snapshot


def test_a_cache_that_cannot_be_written_to(tmp_path):
    (tmp_path / 'home').write_text('a file')
    with pytest.raises(UserError, match=r'gpt2: the cache .*home/hub .*HF_HOME=FOLDER'):
        interop.open_source('gpt2')


def test_a_hub_that_cannot_be_reached_and_a_model_that_it_does_not_have(hosted, monkeypatch):
    with pytest.raises(UserError, match=r'gpt2-xl: .*cache .*home/hub .*HTTP Error 404.*hf:FOLDER'):
        interop.open_source('gpt2-xl')
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(UserError, match=r'127.0.0.1:9/some/model could not.*refused'):
        interop.open_source('hf:some/model')
    with pytest.raises(UserError, match=r'hf:\.\./model: there is no folder \.\./model'):
        interop.open_source('hf:../model')
