"""The exported tokenizer files give the same tokens as the project's tokenizer."""

import json
from pathlib import Path

import pytest
import tiktoken
from helpers.project import published_gpt2_folder

from common.errors import UserError
from data.gpt2_vocabulary import byte_characters
from data.tokenizer import GPT2_SPLIT, Tokenizer, byte_pair_encoding
from interop import hf_tokenizer

# tiktoken's pattern for cl100k_base, with its possessive quantifiers.
CL100K_SPLIT = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"""
    r"""\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)


def trained_ranks(size: int = 400) -> dict[bytes, int]:
    """Ranks of byte pairs that the package tokenizers trains on a short text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    text = Path(__file__).read_text(encoding='utf-8') + ' 123 1234 12345 6789 99 678 naïve привет'
    tokenizer.train_from_iterator([text * 3], trainer)
    return byte_pair_encoding(json.loads(tokenizer.to_str()))._mergeable_ranks


def tiktoken_tokenizer(monkeypatch, split: str, special_tokens: dict[str, int]) -> Tokenizer:
    """The tokenizer of a tiktoken encoding with byte pairs trained here."""
    encoding = tiktoken.Encoding(
        'tiny', pat_str=split, mergeable_ranks=trained_ranks(), special_tokens=special_tokens
    )
    monkeypatch.setattr(tiktoken, 'list_encoding_names', lambda: ['tiny'])
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: encoding)
    return Tokenizer({'kind': 'tiktoken', 'name': 'tiny'})


@pytest.mark.slow
def test_gpt2_merges_are_the_published_ones():
    published = published_gpt2_folder() / 'vocab.bpe'
    lines = published.read_text(encoding='utf-8').splitlines()[1:]
    tokenizer, characters = Tokenizer({'kind': 'gpt2'}), byte_characters()
    ranks = {tokenizer.token_bytes(token): token for token in range(tokenizer.end_of_text)}
    written = [
        ' '.join(''.join(characters[byte] for byte in part) for part in pair)
        for pair in hf_tokenizer.merges(ranks)
    ]
    assert written == lines


@pytest.mark.parametrize('split', [GPT2_SPLIT, CL100K_SPLIT])
def test_special_tokens_and_vocabulary_gaps(monkeypatch, tmp_path, split):
    from transformers import AutoTokenizer

    special = {'<|endoftext|>': 401, '<|fim_prefix|>': 402, '<|endofprompt|>': 410}
    tokenizer = tiktoken_tokenizer(monkeypatch, split, special)
    hf_tokenizer.write_tokenizer(tokenizer, tmp_path, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = hf_tokenizer.DIFFICULT + ' fim_prefix endofprompt 1234567 ' + 'a' * 50
    assert theirs(text, add_special_tokens=False)['input_ids'] == tokenizer.encode(text)
    assert {name: theirs.convert_tokens_to_ids(name) for name in special} == special
    assert (theirs.eos_token_id, theirs.model_max_length) == (401, 64)


def test_inexact_conversion_is_not_written(monkeypatch, tmp_path):
    """The possessive {1,4}+ leaves no digit for the next part; the package tokenizers would."""
    tokenizer = tiktoken_tokenizer(monkeypatch, r'\p{N}{1,4}+\p{N}|[\s\S]', {})
    with pytest.raises(UserError, match='exactly'):
        hf_tokenizer.write_tokenizer(tokenizer, tmp_path, 64)
    assert list(tmp_path.iterdir()) == []


def test_unknown_character_is_an_error_in_the_converted_tokenizer(tmp_path):
    tokenizer = hf_tokenizer.convert(Tokenizer({'kind': 'char', 'characters': ['a', '\n']}))
    assert tokenizer.encode('a\na').ids == [0, 1, 0]
    with pytest.raises(Exception, match='WordLevel'):
        tokenizer.encode('ab')
