"""data/inspect_tokens.py shows counts, lengths and the text at a position."""

import hashlib
import json
import statistics
import tracemalloc

import numpy as np
import pytest

from common.errors import UserError
from data import inspect_tokens
from data.dataset import load_dataset

END = 256  # the end-of-text token of the byte tokenizer
DOCUMENTS = ['naïve – 日本語\x1b[31m\n', '', 'a' * 5, 'to be', *('x' * n for n in (60, 64, 700))]


@pytest.fixture
def folder(tmp_path):
    """A dataset of bytes: DOCUMENTS in three training files, three words for validation."""
    texts = {'train': DOCUMENTS, 'val': ['one', 'two', 'three']}
    meta = {'format_version': 2, 'tokenizer': {'kind': 'byte', 'end_of_text': True}}
    meta |= {'vocab_size': 257, 'end_of_text': END, 'dtype': 'uint16', 'splits': {}}
    for split, documents in texts.items():
        tokens = np.array([t for text in documents for t in (*text.encode(), END)], '<u2')
        parts = np.split(tokens, [10, 30] if split == 'train' else [])
        shards = []
        for number, part in enumerate(parts):
            name = f'{split}_{number:05d}.bin'
            part.tofile(tmp_path / name)
            sha256 = hashlib.sha256(part.tobytes()).hexdigest()
            shards.append({'file': name, 'tokens': len(part), 'sha256': sha256})
        meta['splits'][split] = {
            'tokens': len(tokens),
            'bytes': sum(len(text.encode()) for text in documents),
            'documents': len(documents),
            'sha256': hashlib.sha256(tokens.tobytes()).hexdigest(),
            'shards': shards,
        }
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    return tmp_path


@pytest.fixture
def shown(folder, capsys):
    """shown('--at=3'): the output of the script for the folder."""

    def run(*arguments):
        inspect_tokens.main([str(folder), *arguments])
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize('chunk', [1, 7, 64, 2**20])
def test_document_lengths(shown, monkeypatch, chunk):
    monkeypatch.setattr(inspect_tokens, 'CHUNK', chunk)
    text = ' '.join(shown('--split=train').split())
    lengths = [len(text.encode()) for text in DOCUMENTS]
    assert f'documents: {len(DOCUMENTS)} ' in text
    assert (
        f'minimum {min(lengths)}, median {statistics.median(lengths):g}, '
        f'mean {statistics.mean(lengths):.1f}, maximum {max(lengths)} '
    ) in text
    assert 'val' not in text and 'incomplete document' not in text and 'meta.json has' not in text
    for low, high in ((0, 0), (4, 7), (8, 15), (16, 31), (32, 63), (64, 127), (512, 1023)):
        count = sum(low <= length <= high for length in lengths)
        assert f'{low:,} – {high:,} {count} {100 * count / len(lengths):.1f} %' in text


def test_files_and_bytes_per_token(shown):
    text = shown()
    total, size = (sum(len(d.encode()) + end for d in DOCUMENTS) for end in (1, 0))
    assert f'train: {total:,} tokens of {size:,} bytes, {size / total:.3f} bytes per token' in text
    lines = [line.split() for line in text.splitlines() if 'train_0' in line]
    assert [(line[0], int(line[1]), int(line[4])) for line in lines] == [
        ('train_00000.bin', 10, 0),
        ('train_00001.bin', 20, 10),
        ('train_00002.bin', total - 30, 30),
    ]
    assert 'val: 14 tokens of 11 bytes' in text and 'documents: 3' in text


@pytest.mark.parametrize('chunk', [1, 7, 2**20])
def test_document_option_shows_each_document(shown, monkeypatch, chunk):
    monkeypatch.setattr(inspect_tokens, 'CHUNK', chunk)
    for number, document in enumerate(DOCUMENTS):
        title, _, text = shown(f'--document={number}', '--length=1000').partition(':\n\n')
        assert f'document {number}: {len(document.encode())} tokens' in title
        assert text == document.replace('\x1b', '\\x1b') + '\n'
    assert 'the first 5 (' in shown('--document=6', '--length=5')


def test_at_option_shows_any_range(shown):
    everything = ''.join(document + '\uffff' for document in DOCUMENTS).encode()
    title, _, text = shown('--split=val', '--at=1', '--length=2').partition(':\n\n')
    assert title == 'val, tokens 1 to 2 of 14' and text == 'ne\n'
    place = everything.index('日'.encode()) + 1  # in the middle of a character
    assert '\ufffd本' in shown(f'--at={place}', '--length=5')
    assert 'tokens 10 to 13 of 14' in shown('--split=val', '--at=10')  # to the end


def test_changed_files_are_named(shown, folder):
    assert shown('--verify').count('SHA-256: verified') == 2
    path = folder / 'train_00001.bin'
    path.write_bytes(b'\0' + path.read_bytes()[1:])
    with pytest.raises(UserError) as error:
        shown('--verify')
    file, split, advice = error.value.problems
    assert 'import_tokens.py' in advice
    assert 'train_00001.bin has the SHA-256' in file and 'is expected' in file
    assert 'train_00000.bin to train_00002.bin together has the SHA-256' in split


def test_mismatch_of_files_and_meta_json(shown, folder):
    tokens = np.fromfile(folder / 'val_00000.bin', '<u2')
    tokens[[3, -1]] = ord('!')
    tokens.tofile(folder / 'val_00000.bin')
    text = ' '.join(shown('--split=val').split())
    assert 'documents: 1 ' in text and 'meta.json has 3' in text
    assert '6 tokens at the end belong to an incomplete document' in text


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--at=99999'], r'--at=99999: the train split has tokens 0 to \d+'),
        (['--at=-1'], 'has tokens 0 to'),
        (['--document=7'], r'--document=7: the split has 7 documents, 0 to 6\.'),
        (['--document=-1'], 'counted from 0'),
        (['--document=1', '--at=1'], 'Give one of them'),
        (['--at=1', '--length=0'], '--length=0'),
        (['--splitt=val'], 'Did you mean --split'),
    ],
)
def test_invalid_ranges_are_user_errors(shown, arguments, message):
    with pytest.raises(UserError, match=message):
        shown(*arguments)


def test_dataset_without_end_of_text_has_no_documents(tiny_dataset, capsys):
    inspect_tokens.main([str(tiny_dataset)])
    assert capsys.readouterr().out.count('documents: unknown') == 2
    with pytest.raises(UserError, match=r'has no end-of-text token\. Use --at'):
        inspect_tokens.main([str(tiny_dataset), '--document=0'])


def test_memory_is_independent_of_file_size(folder, monkeypatch):
    monkeypatch.setattr(inspect_tokens, 'CHUNK', 2**14)
    monkeypatch.setattr(inspect_tokens.LengthCounts, 'SHORT', 2**10)
    tokens = np.full(2_000_000, 65, '<u2')
    tokens[99::100] = END
    tokens.tofile(folder / 'val_00000.bin')
    meta = json.loads((folder / 'meta.json').read_text())
    meta['splits']['val']['tokens'] = meta['splits']['val']['shards'][0]['tokens'] = len(tokens)
    (folder / 'meta.json').write_text(json.dumps(meta))
    data = load_dataset(folder, 1)
    tracemalloc.start()
    text = '\n'.join(inspect_tokens.document_lines(data, 'val'))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 'documents: 20,000' in text and 'minimum 99, median 99, mean 99.0, maximum 99' in text
    assert peak < 2**19 < data.splits['val'].nbytes / 7
