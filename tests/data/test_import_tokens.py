"""Token files of other programs are recognized, refused if they would be misread, and imported."""

import json
import re
import shlex

import numpy as np
import pytest

from common.errors import UserError
from data import import_tokens
from data.dataset import load_dataset
from data.token_files import SPLITS
from data.token_formats import IdFormat, recognize_format

TEXT = 'The quick brown fox jumps over a lazy dog, and 17 other animals — naïvely — again.\n' * 60
rng = np.random.default_rng(0)
CORPORA = {
    'uniform': rng.integers(0, 50257, 5000),
    'characters': rng.integers(0, 65, 5000),
    'wide': rng.integers(0, 100_000, 5000),
}
FORMS = {
    '<u4': 'uint32',
    '<i4': 'uint32',
    '>u4': 'uint32, big endian',
    '<i8': 'int64',
    '>i8': 'int64, big endian',
    '<f4': 'float32',
    '<f8': 'float64',
}


@pytest.fixture(scope='module')
def text_ids(gpt2_tokenizer):
    return np.array(gpt2_tokenizer.encode(TEXT))


def llm_c(ids, magic=20240520, dtype='<u2'):
    header = np.zeros(256, '<i4')
    header[:3] = magic, 1, len(ids)
    return header.tobytes() + ids.astype(dtype).tobytes()


def npy(ids, dtype, path):
    with open(path, 'wb') as file:
        np.save(file, ids.astype(dtype))
    return path.read_bytes()


def bare(folder, content):
    folder.mkdir(exist_ok=True)
    for split in SPLITS:
        (folder / f'{split}.bin').write_bytes(content)
    return folder


@pytest.mark.parametrize('corpus', ['text', *CORPORA])
def test_format_is_recognized_by_content(tmp_path, text_ids, corpus):
    ids, path = CORPORA.get(corpus, text_ids), tmp_path / 'train.bin'
    for dtype, name in FORMS.items():
        path.write_bytes(ids.astype(dtype).tobytes())
        assert str(recognize_format(path)) == name, dtype
    if corpus == 'wide':
        return
    path.write_bytes(ids.astype('<u2').tobytes())
    assert recognize_format(path) == IdFormat()
    if corpus != 'uniform':  # the two bytes of random ids look alike
        path.write_bytes(ids.astype('>u2').tobytes())
        assert recognize_format(path) == IdFormat('uint16', big_endian=True)


@pytest.mark.parametrize(
    'ids',
    [np.arange(1000), np.zeros(1000), np.arange(1000) % 2, np.arange(50), np.full(500, 50256)],
)
def test_uint16_is_recognized(tmp_path, ids):
    (tmp_path / 'train.bin').write_bytes(ids.astype('<u2').tobytes())
    assert recognize_format(tmp_path / 'train.bin') == IdFormat()


def test_large_file_is_recognized_by_samples(tmp_path, text_ids):
    path = tmp_path / 'train.bin'
    ids = np.tile(text_ids, 400)
    for dtype, name in {**FORMS, '<u2': 'uint16'}.items():
        path.write_bytes(ids.astype(dtype).tobytes())
        assert str(recognize_format(path)) == name


def contents(tmp_path, text_ids):
    """Files in other formats than nanoGPT's, each with its error message."""
    return {
        'uint32': (text_ids.astype('<u4').tobytes(), 'looks like uint32, but'),
        'int64': (text_ids.astype('<i8').tobytes(), 'looks like int64, but'),
        'wide': (CORPORA['wide'].astype('<u4').tobytes(), 'looks like uint32, but'),
        'big': (text_ids.astype('>u2').tobytes(), 'looks like uint16, big endian, but'),
        'float': (text_ids.astype('<f4').tobytes(), 'looks like float32, but'),
        'half': (CORPORA['characters'].astype('<f2').tobytes(), 'looks like float16, but'),
        'npy': (npy(text_ids, '<u2', tmp_path / 'a'), 'uint16, with a header of numpy.save'),
        'npy64': (
            npy(text_ids, '>i8', tmp_path / 'a'),
            'int64, big endian, with a header of numpy',
        ),
        'llm.c': (llm_c(text_ids), 'uint16, with a header of llm.c'),
        'llama': (llm_c(CORPORA['wide'], 20240801, '<u4'), 'uint32, with a header of llm.c'),
        'bytes': (TEXT.encode(), 'looks like uint8, but'),
        'odd': (TEXT.encode()[:255], '255 bytes, an odd number'),
    }


NAMES = [
    *('uint32', 'int64', 'wide', 'big', 'float', 'half', 'npy', 'npy64', 'llm.c', 'llama'),
    *('bytes', 'odd'),
]


@pytest.mark.parametrize('name', NAMES)
def test_misread_files_are_refused_with_a_working_command(tmp_path, text_ids, name):
    """The command in the error message makes the dataset."""
    content, message = contents(tmp_path, text_ids)[name]
    folder = bare(tmp_path / 'foreign ids', content)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_dataset(folder, 8)
    (command,) = re.findall(r'python data/import_tokens\.py (.*)', str(error.value))
    import_tokens.main(shlex.split(command))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    data = load_dataset(f'{folder}-ids', 8)
    data.verify_checksums(full=True)
    ids = {'wide': CORPORA['wide'], 'llama': CORPORA['wide'], 'half': CORPORA['characters']}
    raw = np.frombuffer(content, np.uint8)
    expected = ids.get(name, raw if name in ('bytes', 'odd') else text_ids)
    for split in SPLITS:
        assert np.array_equal(data.splits[split].read(0, data.tokens(split)), expected)
    kind = 'unknown' if name in ('wide', 'llama') else 'gpt2'
    assert data.tokenizer == {'kind': kind}
    assert data.vocab_size == (50257 if kind == 'gpt2' else expected.max() + 1)


@pytest.mark.parametrize(
    'content, message',
    [
        (
            b'PK\x03\x04' + b'x' * 999,
            'not contain token ids: it is a zip archive: unpack it first',
        ),
        (b'\x93NUMPY\x01\x00\x05\x00junk', 'a damaged file of numpy.save'),
    ],
)
def test_files_without_ids_are_refused(tmp_path, content, message):
    folder = bare(tmp_path / 'f', content)
    for call in (lambda: load_dataset(folder, 8), lambda: run(folder, tmp_path / 'out')):
        with pytest.raises(UserError, match=re.escape(message)):
            call()
    assert not (tmp_path / 'out').exists()


def run(folder, out, *options):
    import_tokens.main([str(folder), f'--out={out}', *options])
    return load_dataset(out, 8)


def test_two_dimensional_arrays_are_refused(tmp_path):
    folder = bare(tmp_path / 'f', npy(np.ones((50, 50)), '<u2', tmp_path / 'a'))
    with pytest.raises(UserError, match=r'of shape \(50, 50\), not a vector of ids'):
        run(folder, tmp_path / 'out')


@pytest.mark.parametrize(
    'values, options, message',
    [
        ([1, -1] * 50, ['--dtype=int32'], 'number 1 is -1, which is not a token id'),
        ([2**40] * 99, ['--dtype=int64'], 'at most 4294967295'),
        ([1] * 99, ['--dtype=uint64', '--tokenizer=gtp2'], 'Did you mean gpt2'),
        ([60_000] * 99, ['--dtype=uint64', '--tokenizer=gpt2'], '--tokenizer=unknown'),
        ([1] * 99, ['--big_endian'], '--big_endian needs --dtype'),
    ],
)
def test_invalid_ids_are_refused(tmp_path, values, options, message):
    dtype = options[0].partition('=')[2] or 'uint16'
    folder = bare(tmp_path / 'f', np.array(values, np.int64).astype(dtype).tobytes())
    with pytest.raises(UserError, match=re.escape(message)):
        run(folder, tmp_path / 'out', *options)
    assert not (tmp_path / 'out').exists()


def test_npy_files_are_imported(tmp_path, text_ids):
    for split in SPLITS:
        np.save(tmp_path / f'{split}.npy', text_ids)
    data = run(tmp_path, tmp_path / 'out')
    assert np.array_equal(data.splits['val'].read(0, len(text_ids)), text_ids)
    with pytest.raises(UserError, match='exists already'):
        run(tmp_path, tmp_path / 'out')
    with pytest.raises(UserError, match='has neither'):
        run(tmp_path / 'out' / '..' / '..', tmp_path / 'more')


def test_changed_dataset_is_imported_with_its_tokenizer(tmp_path, tiny_dataset):
    meta = json.loads((tiny_dataset / 'meta.json').read_text())
    for split in SPLITS:
        content = bytearray((tiny_dataset / f'{split}.bin').read_bytes())
        content[7] ^= 1
        (tmp_path / f'{split}.bin').write_bytes(content)
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    with pytest.raises(UserError) as error:
        load_dataset(tmp_path, 8).verify_checksums()
    (command,) = re.findall(r'python data/import_tokens\.py (.*)', str(error.value))
    import_tokens.main(shlex.split(command))
    data = load_dataset(f'{tmp_path}-ids', 8)
    data.verify_checksums(full=True)
    assert data.tokenizer == meta['tokenizer'] and data.bytes_per_token('val') is None
    assert data.splits['val'].read(0, 9).astype('u1').tobytes() == content[:9]


@pytest.mark.parametrize('described', [False, True])
def test_ids_beyond_the_vocabulary_are_imported(tmp_path, tiny_dataset, described):
    folder = bare(tmp_path / 'f', (rng.integers(0, 60_000, 999)).astype('<u2').tobytes())
    if described:
        meta = json.loads((tiny_dataset / 'meta.json').read_text()) | {'dtype': 'uint16'}
        meta['splits'] = {split: {'tokens': 999} for split in SPLITS}
        (folder / 'meta.json').write_text(json.dumps(meta))
    with pytest.raises(UserError, match='but the vocabulary ends at') as error:
        load_dataset(folder, 8)
    (command,) = re.findall(r'python data/import_tokens\.py (.*)', str(error.value))
    import_tokens.main(shlex.split(command))
    data = load_dataset(f'{folder}-ids', 8)
    assert data.tokenizer == {'kind': 'unknown'} and 50257 < data.vocab_size <= 60_000
