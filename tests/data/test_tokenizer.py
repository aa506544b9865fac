"""Tokenizers of every kind encode text to ids and decode ids to text."""

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from data.tokenizer import Tokenizer

BYTES = {'kind': 'byte'}
AB = {'kind': 'char', 'characters': ['a', 'b']}


@given(st.text(st.characters(exclude_categories=['Cs'])))
def test_round_trip(gpt2_tokenizer, text):
    characters = {'kind': 'char', 'characters': sorted(set(text))}
    for tokenizer in (gpt2_tokenizer, Tokenizer(BYTES), Tokenizer(characters)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(np.array(ids, dtype=np.int64)) == text
        assert b''.join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_gpt2_ids(gpt2_tokenizer):
    # From the documentation of OpenAI's and Hugging Face's GPT-2 tokenizers.
    assert gpt2_tokenizer.encode('Hello, world!') == [15496, 11, 995, 0]
    assert gpt2_tokenizer.encode('hello world') == [31373, 995]
    assert gpt2_tokenizer.decode([50256]) == '<|endoftext|>'
    assert gpt2_tokenizer.vocab_size == 50257


def test_decoding_never_fails(gpt2_tokenizer):
    for tokenizer in (gpt2_tokenizer, Tokenizer(BYTES), Tokenizer(AB)):
        ids = [tokenizer.vocab_size, *tokenizer.encode('ab'), tokenizer.vocab_size + 40]
        assert tokenizer.decode(ids) == '\ufffdab\ufffd'
        assert isinstance(tokenizer.decode(range(tokenizer.vocab_size)), str)


@pytest.mark.parametrize('description, last', [(BYTES, 255), (AB, 1)])
def test_end_of_text_adds_one_id(gpt2_tokenizer, description, last):
    without = Tokenizer(description)
    assert without.end_of_text is None and without.vocab_size == last + 1
    tokenizer = Tokenizer({**description, 'end_of_text': True})
    assert tokenizer.end_of_text == last + 1 and tokenizer.vocab_size == last + 2
    assert tokenizer.decode([0, last + 1, last + 2]).endswith('<|endoftext|>\ufffd')
    assert last + 1 not in tokenizer.encode('ab') and gpt2_tokenizer.end_of_text == 50256


@pytest.mark.slow
def test_lone_surrogate_is_encoded(gpt2_tokenizer):
    # JSON may contain a lone surrogate, and a pair of surrogates, which is one character.
    characters = {'kind': 'char', 'characters': [*'a😀\ufffd']}
    for tokenizer in (gpt2_tokenizer, Tokenizer(BYTES), Tokenizer(characters)):
        assert tokenizer.decode(tokenizer.encode('a\ud800a\ud83d\ude00')) == 'a\ufffda😀'
    spaces = ' ' * 3_000_000  # more than the stack of the regular expressions allows
    assert gpt2_tokenizer.decode(gpt2_tokenizer.encode(spaces)) == spaces
    assert gpt2_tokenizer.encode('<|endoftext|>') != [50256]


PLUG_IN = """
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
    """A tiktoken plug-in with the encoding 'small', for this process and its children."""
    (tmp_path / 'plug_in' / 'tiktoken_ext').mkdir(parents=True)
    (tmp_path / 'plug_in' / 'tiktoken_ext' / 'mine.py').write_text(PLUG_IN)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'plug_in'))
    monkeypatch.syspath_prepend(str(tmp_path / 'plug_in'))
    monkeypatch.setattr(tiktoken.registry, 'ENCODING_CONSTRUCTORS', None)
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    tiktoken.registry._available_plugin_modules.cache_clear()
    yield
    tiktoken.registry._available_plugin_modules.cache_clear()


def test_tiktoken_encodings(plug_in, monkeypatch):
    tokenizer = Tokenizer({'kind': 'tiktoken', 'name': 'small'})
    assert tokenizer.encode('the thé') == [257, 32, 256, *'é'.encode()]
    assert tokenizer.end_of_text == 300 and tokenizer.vocab_size == 301
    assert tokenizer.decode([257, 299, 300, 10**20]) == 'the\ufffd<|endoftext|>\ufffd'
    assert Tokenizer({'kind': 'tiktoken', 'name': 'gpt2'}).encode('hello world') == [31373, 995]
    with pytest.raises(UserError, match=r"'cl100k'.*Did you mean cl100k_base\?.*gpt2, .*small"):
        Tokenizer({'kind': 'tiktoken', 'name': 'cl100k'})

    def offline(name):
        raise ConnectionError('no network')

    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    with pytest.raises(UserError, match=r'cl100k_base.*no network.*TIKTOKEN_CACHE_DIR.*gpt2'):
        Tokenizer({'kind': 'tiktoken', 'name': 'cl100k_base'})


def test_unknown_characters_and_kinds_are_named():
    with pytest.raises(UserError, match="vocabulary of 2 characters does not have 'X' '\u00e9'"):
        Tokenizer(AB).encode('aéXb')
    with pytest.raises(UserError, match='characters'):
        Tokenizer({'kind': 'char', 'characters': 'ab'})
    for description in ({'kind': 'unknown'}, {}):
        with pytest.raises(UserError, match='only with gpt2, char, byte'):
            Tokenizer(description)
