"""Preparation publishes datasets atomically and encodes long texts in chunks."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data.dataset import load_dataset
from data.preparation.pipeline import split_text, write_dataset
from data.token_files import is_complete
from data.tokenizer import Tokenizer

OLD = {'train': 'old ' * 50, 'val': 'old ' * 20}
NEW = {'train': 'brand new ' * 50, 'val': 'brand new ' * 30}


def characters_of(texts):
    return {'kind': 'char', 'characters': sorted(set(''.join(texts.values())))}


def content_of(folder):
    """The texts of the dataset in `folder`, or None if it is not prepared."""
    if not is_complete(folder):
        return None
    data = load_dataset(folder, 8)
    tokenizer = Tokenizer(data.tokenizer)
    return {
        split: tokenizer.decode(np.fromfile(folder / f'{split}.bin', data.meta['dtype']))
        for split in ('train', 'val')
    }


@pytest.mark.parametrize('old', [None, OLD])
def test_publishing_is_atomic(tmp_path, monkeypatch, old):
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


def test_dtype_follows_the_vocabulary(tmp_path):
    for size, dtype in ((256, 'uint8'), (257, 'uint16'), (70_000, 'uint32')):
        alphabet = ''.join(chr(0x10000 + i) for i in range(size))
        texts = {'train': alphabet, 'val': alphabet}
        write_dataset(tmp_path, characters_of(texts), texts, 'all characters')
        assert load_dataset(tmp_path, 8).meta['dtype'] == dtype
        assert content_of(tmp_path) == texts


def test_unwritable_folder_is_user_error(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'cannot be written to .*nowhere.*Not a directory'):
        write_dataset(tmp_path / 'file' / 'nowhere', characters_of(OLD), OLD, 'old')


@pytest.mark.parametrize('size', [1, 2, 3])
def test_chunks_encode_like_the_whole(gpt2_tokenizer, size):
    # All texts of six of these characters, and so all combinations of spaces and line ends.
    for text in map(''.join, itertools.product('a9 \n\x85', repeat=6)):
        parts = list(split_text(text, size))
        assert ''.join(parts) == text
        assert [i for part in parts for i in gpt2_tokenizer.encode(part)] == gpt2_tokenizer.encode(
            text
        ), repr(text)


def test_chunk_size():
    assert [len(part) for part in split_text('abc\n' * 10, 8)] == [8] * 5
