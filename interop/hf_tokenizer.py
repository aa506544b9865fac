"""Export a tokenizer to the files that Hugging Face's AutoTokenizer reads, if they can express it.

The package tokenizers writes and checks them: unless they give the same tokens for a difficult
text, no files are written.
"""

import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from data.gpt2_vocabulary import byte_characters
from data.tokenizer import END_OF_TEXT, REPLACEMENT, Tokenizer

if TYPE_CHECKING:
    import tokenizers

# All kinds of spaces, runs of spaces, contractions, digits, scripts, marks, and characters of
# several code points or of three or more bytes.
DIFFICULT = (
    "  I'll  don't\u00a0\u3000\u2028we'VE 's\t\t\n\n  \r\n x=12345,6789;  \x0b\x0c\x85 naïve"
    ' ß Ǆ ½²٣\n'
    'привет 你好 नमस्ते e\u0301 👩‍👩‍👧 \U0001f600\ufffd\u200b<|end|>   '
)
SAMPLED = 20_000  # number of random tokens whose text must encode to the same tokens


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json. max_length: in tokens.

    Raises UserError if they cannot express the tokenizer, and OSError.
    """
    converted = convert(tokenizer)
    if not makes_same_tokens(tokenizer, converted):
        raise UserError('a tokenizer.json cannot split text exactly as this tokenizer does.')
    special = END_OF_TEXT if tokenizer.end_of_text is not None else None
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': max_length,
        'clean_up_tokenization_spaces': False,
        'bos_token': special,
        'eos_token': special,
    }
    (folder / 'tokenizer.json').write_text(converted.to_str(pretty=True), encoding='utf-8')
    text = json.dumps(config, indent=2) + '\n'
    (folder / 'tokenizer_config.json').write_text(text, encoding='utf-8')


def convert(tokenizer: Tokenizer) -> 'tokenizers.Tokenizer':
    """The tokenizer as an object of the package tokenizers. Raises UserError without it."""
    try:
        import tokenizers
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    except ImportError as error:
        raise UserError('the tokenizer needs a package: pip install tokenizers.') from error
    ids = {tokenizer.token_bytes(token): token for token in text_tokens(tokenizer)}
    special = tokenizer.special_tokens
    if tokenizer.kind == 'char':
        vocabulary = {token.decode(): number for token, number in ids.items()} | special
        converted = tokenizers.Tokenizer(models.WordLevel(vocabulary))
        converted.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        converted.decoder = decoders.Fuse()
    else:
        characters = byte_characters()

        def name(token: bytes) -> str:
            return ''.join(characters[byte] for byte in token)

        pairs = merges(ids) if tokenizer.split_pattern else []
        model = models.BPE(
            {name(token): number for token, number in ids.items()} | special,
            [(name(left), name(right)) for left, right in pairs],
            ignore_merges=True,  # a piece that is a token is not split, as in tiktoken
        )
        converted = tokenizers.Tokenizer(model)
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        # Its regular expressions have no possessive {m,n}; here the greedy form is equivalent.
        pattern = re.sub(r'(\{\d+,\d+\})\+', r'\1', tokenizer.split_pattern or r'[\s\S]+')
        split = pre_tokenizers.Split(Regex(pattern), 'isolated')
        converted.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
        converted.decoder = decoders.ByteLevel()
    converted.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return converted


def text_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that can occur in text: neither special tokens nor gaps of the vocabulary."""
    special = set(tokenizer.special_tokens.values())

    def is_gap(token: int) -> bool:
        text = tokenizer.token_bytes(token)
        return text == REPLACEMENT.encode() and tokenizer.encode(REPLACEMENT) != [token]

    return [t for t in range(tokenizer.vocab_size) if t not in special and not is_gap(t)]


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that merge into the tokens, in the order of their ranks.

    Each pair is the rest of a token after all pairs of lower rank in it are merged. A token with a
    longer rest can only be a whole piece of text.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            lowest, at = min(
                (ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1)
            )
            if lowest >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def makes_same_tokens(tokenizer: Tokenizer, converted: 'tokenizers.Tokenizer') -> bool:
    """Whether both encode a difficult text to the same tokens, and decode them to the text."""
    sample = tokenizer.decode(random.Random(0).choices(text_tokens(tokenizer), k=SAMPLED))
    text = sample if tokenizer.kind == 'char' else DIFFICULT * 2 + sample
    for name in tokenizer.special_tokens:  # text for one of them, a token for the other
        text = text.replace(name, '')
    ids = tokenizer.encode(text)
    converted_ids = converted.encode(text, add_special_tokens=False).ids
    return converted_ids == ids and converted.decode(ids, skip_special_tokens=False) == text
