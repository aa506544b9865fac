"""Text to token ids and back, with the tokenizer that a dataset's meta.json describes.

Independent of datasets and models. tiktoken is imported only for byte pairs.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from common.errors import UserError, did_you_mean
from common.text_files import valid_text
from data.gpt2_vocabulary import byte_characters, gpt2_ranks

if TYPE_CHECKING:
    import tiktoken

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_END_OF_TEXT = 50256

REPLACEMENT = '\ufffd'
END_OF_TEXT = '<|endoftext|>'  # name of the token that ends a document


class Tokenizer:
    """`encode` and `decode` by a description `{'kind': 'gpt2' | 'byte' | 'char' | …, …}`.

    - `gpt2`: GPT-2's byte pairs; `tiktoken`: the encoding that tiktoken knows by `name`;
    - `bpe`: byte pairs trained on a corpus, in `file` beside its meta.json, with its `sha256`;
    - `byte`; `char`, which lists its `characters` in the order of their ids. With
      `"end_of_text": true`, one more id ends a document.

    `folder` is the dataset's folder, which only `bpe` needs. `end_of_text` is the token that ends a
    document, None if there is none; `special_tokens` are all tokens that do not occur in text, by
    name; `split_pattern` is the regular expression that splits text before byte pairs are merged,
    None without byte pairs. Decoding never fails: invalid text becomes U+FFFD. Raises UserError for
    a tokenizer that is unknown or not available.
    """

    def __init__(self, description: dict, folder: Path | None = None):
        kind = description.get('kind')
        makers: dict[str, Callable[[dict, Path | None], _Backend]] = {
            'gpt2': _gpt2,
            'char': _Characters,
            'byte': _Bytes,
            'tiktoken': _known_to_tiktoken,
            'bpe': _trained,
        }
        if kind not in makers:
            raise UserError(
                f'The tokenizer of this dataset is {kind!r}, but text can be encoded and decoded '
                f'only with {", ".join(makers)}. Prepare the data with data/prepare.py, or name '
                'the tokenizer in meta.json.'
            )
        self.kind: str = kind
        self._backend: _Backend = makers[kind](description, folder)
        self.vocab_size: int = self._backend.vocab_size
        self.special_tokens: dict[str, int] = self._backend.special_tokens
        self.end_of_text: int | None = self.special_tokens.get(END_OF_TEXT)
        self.split_pattern: str | None = self._backend.split_pattern

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Raises UserError for characters that are not in the vocabulary.

        A lone surrogate, which UTF-8 cannot encode, becomes U+FFFD. Text that looks like an
        end-of-text token is encoded as text.
        """
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as an array (N,) of an unsigned type, which takes far less memory."""
        return self._backend.encode(valid_text(text))

    def decode(self, ids: Iterable) -> str:
        """The text of token ids, in a list, an array or a tensor."""
        tokens = ids.tolist() if hasattr(ids, 'tolist') else [int(i) for i in ids]
        content = {token: self.token_bytes(token) for token in set(tokens)}  # each only once
        return b''.join(map(content.__getitem__, tokens)).decode(errors='replace')

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of a token; those of U+FFFD for an invalid one."""
        return self._backend.token_bytes(int(token))


class _Backend(Protocol):
    """The interface of one kind of tokenizer, behind `Tokenizer`."""

    vocab_size: int
    special_tokens: dict[str, int]
    split_pattern: str | None

    def encode(self, text: str) -> np.ndarray: ...

    def token_bytes(self, token: int) -> bytes: ...


class _Bytes:
    split_pattern: str | None = None

    def __init__(self, description: dict, folder: Path | None):
        self.special_tokens: dict[str, int] = (
            {END_OF_TEXT: 256} if description.get('end_of_text') else {}
        )
        self.vocab_size = 256 + len(self.special_tokens)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def token_bytes(self, token: int) -> bytes:
        if token < 256:
            return bytes([token])
        return (END_OF_TEXT if token in self.special_tokens.values() else REPLACEMENT).encode()


class _Characters:
    split_pattern: str | None = None

    def __init__(self, description: dict, folder: Path | None):
        characters = description.get('characters')
        if not isinstance(characters, list) or not all(
            isinstance(c, str) and len(c) == 1 for c in characters
        ):
            raise UserError(
                'A tokenizer of kind char needs "characters", the list of its characters in the '
                'order of their ids. Prepare the dataset again.'
            )
        self.characters: list[str] = characters
        count = len(characters)
        self.special_tokens: dict[str, int] = (
            {END_OF_TEXT: count} if description.get('end_of_text') else {}
        )
        self.vocab_size = count + len(self.special_tokens)
        code_points = [ord(character) for character in characters]
        self.ids = np.full(max(code_points, default=0) + 2, count, np.uint32)  # the last: unknown
        self.ids[code_points] = np.arange(count)

    def encode(self, text: str) -> np.ndarray:
        code_points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')
        ids = self.ids[np.minimum(code_points, len(self.ids) - 1)]
        if (ids == len(self.characters)).any():
            missing = sorted(set(text) - set(self.characters))
            shown = ' '.join(repr(character) for character in missing[:10])
            raise UserError(
                f'The vocabulary of {len(self.characters)} characters does not have {shown}'
                f'{" …" if len(missing) > 10 else ""}. It has: {"".join(self.characters)!r}'
            )
        return ids

    def token_bytes(self, token: int) -> bytes:
        if token < len(self.characters):
            return self.characters[token].encode(errors='replace')
        return (END_OF_TEXT if token in self.special_tokens.values() else REPLACEMENT).encode()


class _BytePairs:
    """The byte pairs of a `tiktoken.Encoding`."""

    def __init__(self, encoding: 'tiktoken.Encoding'):
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.special_tokens = encoding._special_tokens
        self.split_pattern: str | None = encoding._pat_str

    def encode(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a long run of spaces exceeds the stack of its regular expressions
            middle = len(text) // 2
            return np.concatenate([self.encode(text[:middle]), self.encode(text[middle:])])

    def token_bytes(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):  # outside the vocabulary, or in a gap of it
            return REPLACEMENT.encode()


def _gpt2(description: dict, folder: Path | None) -> _BytePairs:
    """GPT-2's byte pairs (Radford et al. 2019)."""
    encoding = _tiktoken().Encoding(
        'gpt2',
        pat_str=GPT2_SPLIT,
        mergeable_ranks=gpt2_ranks(),
        special_tokens={END_OF_TEXT: GPT2_END_OF_TEXT},
        explicit_n_vocab=GPT2_END_OF_TEXT + 1,
    )
    return _BytePairs(encoding)


def _known_to_tiktoken(description: dict, folder: Path | None) -> _BytePairs:
    """An encoding of tiktoken or of one of its plug-ins, downloaded by tiktoken at first use."""
    name, known = description.get('name'), tiktoken_names()
    if name not in known:
        hint = did_you_mean(name, known) if isinstance(name, str) else ''
        raise UserError(f'tiktoken has no encoding {name!r}.{hint} Encodings: {", ".join(known)}')
    if name == 'gpt2':
        return _gpt2(description, folder)
    try:
        return _BytePairs(_tiktoken().get_encoding(name))
    except Exception as error:  # the network and tiktoken can raise many kinds
        raise UserError(
            f'The encoding {name} could not be loaded: {type(error).__name__}: {error}. tiktoken '
            'downloads its files at first use into the folder in the environment variable '
            'TIKTOKEN_CACHE_DIR. Load it once with a network connection and copy that folder, or '
            'choose the tokenizer gpt2, byte or bpe.'
        ) from None


def _trained(description: dict, folder: Path | None) -> _BytePairs:
    """Byte pairs trained on a corpus, from a tokenizer.json beside its meta.json."""
    name, expected = description.get('file'), description.get('sha256')
    if folder is None or not isinstance(name, str) or Path(name).name != name:
        raise UserError(
            f'A tokenizer of kind bpe needs "file", the name of a file beside meta.json, not '
            f'{name!r}. Prepare the dataset again.'
        )
    path = Path(folder) / name
    try:
        content = path.read_bytes()
        if (actual := hashlib.sha256(content).hexdigest()) != expected:
            raise ValueError(f'its SHA-256 is {actual}, not {expected}')
        return _BytePairs(byte_pair_encoding(json.loads(content)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'The tokenizer {path} cannot be used: {error}. Prepare the dataset again.'
        ) from None


def tiktoken_names() -> list[str]:
    """The names of the encodings of tiktoken and its plug-ins."""
    return sorted(_tiktoken().list_encoding_names())


def byte_pair_encoding(description: dict) -> 'tiktoken.Encoding':
    """The `tiktoken.Encoding` of a Hugging Face tokenizer.json.

    It must be a byte-level BPE with GPT-2's split pattern and a vocabulary in the order of the
    merges. Raises KeyError, ValueError or TypeError otherwise.
    """
    of_character = {character: byte for byte, character in byte_characters().items()}
    ranks = {
        bytes(of_character[character] for character in token): rank
        for token, rank in description['model']['vocab'].items()
        if token != END_OF_TEXT
    }
    if not ranks.keys() >= {bytes([byte]) for byte in range(256)}:
        raise ValueError('its vocabulary does not have all 256 bytes')
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f'its ids are not 0 to {len(ranks) - 1}')
    return _tiktoken().Encoding(
        'bpe',
        pat_str=GPT2_SPLIT,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
    )


def _tiktoken():
    try:
        import tiktoken
    except ImportError:
        raise UserError('Byte pairs need the package tiktoken. Run pip install tiktoken') from None
    return tiktoken
