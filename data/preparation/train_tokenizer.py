"""Tokenizers built from the corpus: its characters, or byte pairs trained on it."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.console_output import write_progress
from common.errors import UserError
from common.packages import optional_package
from common.text_files import valid_text
from data.preparation.documents import InvalidDocument
from data.preparation.sources import DocumentBatch, DocumentSource
from data.preparation.workers import map_in_order
from data.tokenizer import END_OF_TEXT

TRAINING_BYTES = 2**27  # of text; more changes the pairs little and takes memory
TOKENIZER_FILE = 'tokenizer.json'
SMALLEST_BPE = 257  # 256 bytes and the end-of-text token


def valid_texts(batch: DocumentBatch) -> Iterator[str]:
    """The texts of a batch, without invalid documents."""
    for document in batch.documents:
        try:
            yield valid_text(document.text())
        except InvalidDocument:
            continue


def characters_in(batch: DocumentBatch) -> set[str]:
    """The characters of a batch."""
    return set().union(*valid_texts(batch))


@dataclass(frozen=True)
class TrainingSample:
    """Selects a share `fraction` of the training documents of a batch, by hash."""

    is_validation: Callable[[bytes], bool]
    fraction: float

    def __call__(self, batch: DocumentBatch) -> list[str]:
        return [text for text in valid_texts(batch) if self._takes(text)]

    def _takes(self, text: str) -> bool:
        digest = hashlib.sha256(text.encode()).digest()
        share = int.from_bytes(digest[8:16], 'big') / 2**64  # the first eight bytes split
        return share < self.fraction and not self.is_validation(digest)


def character_tokenizer(source: DocumentSource, workers: int) -> dict:
    """A tokenizer of all characters in the corpus, sorted by code point."""
    write_progress('Collecting characters ...')
    characters = set()
    for batch_characters in map_in_order(characters_in, source.batches(), workers):
        characters |= batch_characters
    return {'kind': 'char', 'characters': sorted(characters)}


def train_byte_pairs(
    source: DocumentSource,
    vocab_size: int,
    is_validation: Callable[[bytes], bool],
    folder: Path,
    workers: int,
) -> dict:
    """A tokenizer of byte pairs (Sennrich et al. 2016), trained on a sample of training documents.

    Writes Hugging Face's tokenizer.json into `folder`. The vocabulary has `vocab_size` tokens, or
    as many as the text yields; the end-of-text token is the last. Raises UserError.
    """
    tokenizers = optional_package('tokenizers', 'Byte pairs trained on a corpus')
    known = source.total if source.unit == 'B' else None
    fraction = min(1.0, TRAINING_BYTES / known) if known else 1.0
    share = 'the' if fraction == 1 else f'{fraction:.1%} of the'
    write_progress(f'Training {vocab_size:,} byte pairs on {share} training documents ...')
    sample = map_in_order(TrainingSample(is_validation, fraction), source.batches(), workers)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_take_characters(sample, TRAINING_BYTES), trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    content = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1).encode()
    try:
        (folder / TOKENIZER_FILE).write_bytes(content)
    except OSError as error:
        raise UserError(f'{folder / TOKENIZER_FILE} cannot be written: {error.strerror}') from None
    digest = hashlib.sha256(content).hexdigest()
    return {'kind': 'bpe', 'file': TOKENIZER_FILE, 'sha256': digest}


def _take_characters(lists: Iterator[list[str]], size: int) -> Iterator[str]:
    for texts in lists:
        for text in texts:
            yield text
            size -= len(text)
            if size <= 0:
                return
