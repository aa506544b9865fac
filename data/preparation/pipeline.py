"""From documents to a dataset: encode on all cores, save progress, verify, publish.

    DocumentSource --batches--> Encoder, in every process --tokens--> TokenWriter --> meta.json

Batches do not depend on the number of processes and are written in order, so the files are the same
for any number of processes and interruptions.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.console_output import write_progress
from common.errors import UserError
from common.files import file_lock
from common.text_files import valid_text
from data.preparation.advice import split_hint
from data.preparation.documents import InvalidDocument
from data.preparation.progress import NAMED_INVALID, PreparationProgress, summary, train_hint
from data.preparation.sources import DocumentBatch, DocumentSource, SourcePosition
from data.preparation.token_writer import TokenWriter
from data.preparation.train_tokenizer import TOKENIZER_FILE, character_tokenizer, train_byte_pairs
from data.preparation.unfinished import load_or_make_tokenizer, open_unfinished, write_json
from data.preparation.workers import available_cores, map_in_order
from data.token_check import record_checksums, verify_checksums
from data.token_files import DTYPES, FORMAT_VERSION, SPLITS, is_complete, read_meta
from data.tokenizer import Tokenizer

CHUNK_CHARACTERS = 2**22  # characters encoded at once: limits the memory of a long document
SHARD_TOKENS = 10**9
VAL_FRACTION = 0.1


@dataclass(frozen=True)
class HashSplitRule:
    """Whether a document is for validation: its hash selects a share `val_fraction` of all.

    Other documents thus do not matter, equal documents share a split, and a larger share only adds
    documents.
    """

    val_fraction: float

    def __call__(self, digest: bytes) -> bool:
        return int.from_bytes(digest[:8], 'big') < self.val_fraction * 2**64


@dataclass
class Encoder:
    """Turns a batch into its journal entry and the token bytes of each split.

    The entry has the `position`, the numbers of skipped documents (`empty`, `invalid`), and for
    each of the `splits`: `token_bytes`, their `sha256`, `documents`, `bytes` of text, and
    `samples`, the first text as (start, tokens, SHA-256 of its UTF-8).

    Without `is_validation`, each document has a known split, and no token marks its end.
    """

    description: dict
    folder: Path
    dtype: str
    is_validation: HashSplitRule | None
    skip_invalid: bool = False

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.description, self.folder)

    def __call__(self, batch: DocumentBatch) -> tuple[dict, dict[str, bytes]]:
        parts = {split: _SplitTokens(self.dtype) for split in SPLITS}
        entry: dict[str, Any] = {
            'position': batch.position,
            'empty': 0,
            'invalid': 0,
            'complaints': [],
        }
        for document in batch.documents:
            try:
                text = valid_text(document.text())
            except InvalidDocument as error:
                if not self.skip_invalid:
                    raise UserError(
                        f'{error} Progress is saved. Fix the document and run the same command to '
                        'continue, or add --skip_invalid to skip and count such documents.'
                    ) from None
                entry['invalid'] += 1
                entry['complaints'] += [str(error)] * (len(entry['complaints']) < NAMED_INVALID)
                continue
            # Empty documents are skipped and counted.
            if not text or text.isspace():
                entry['empty'] += 1
                continue
            # Encode in chunks, so that a long document takes little memory.
            content = text.encode()
            digest = hashlib.sha256(content)
            ids = [self.tokenizer.encode_array(part) for part in split_text(text)]
            # The document's hash decides its split, unless the split is known.
            if self.is_validation is None:
                assert isinstance(document, InMemoryDocument)
                parts[document.split].add(ids, len(content), digest)
            else:
                split = 'val' if self.is_validation(digest.digest()) else 'train'
                parts[split].add(ids, len(content), digest, self.tokenizer.end_of_text)
        tokens = {split: b''.join(part.tokens) for split, part in parts.items()}
        entry['splits'] = {split: part.split_info(tokens[split]) for split, part in parts.items()}
        return entry, tokens


class _SplitTokens:
    """The tokens of a batch for one split."""

    def __init__(self, dtype: str):
        self.dtype = dtype
        self.tokens: list[bytes] = []
        self.samples: list[tuple[int, int, str]] = []
        self.documents = self.bytes = 0

    def add(self, ids: list[np.ndarray], size: int, digest, end: int | None = None) -> None:
        if not self.samples:
            self.samples.append((0, sum(map(len, ids)), digest.hexdigest()))
        self.tokens += [chunk.astype(self.dtype).tobytes() for chunk in ids]
        if end is not None:
            self.tokens.append(np.array(end, self.dtype).tobytes())
            self.documents += 1
        self.bytes += size

    def split_info(self, tokens: bytes) -> dict:
        return {
            'token_bytes': len(tokens),
            'sha256': hashlib.sha256(tokens).hexdigest(),
            'documents': self.documents,
            'bytes': self.bytes,
            'samples': self.samples,
        }


@dataclass(frozen=True)
class PreparationOptions:
    """Options of a preparation.

    tokenizer: as in meta.json, or without the part that is built from the corpus: `file` (kind bpe,
        with `vocab_size`) or `characters` (kind char).
    val_fraction: share of documents for validation, by hash; None: each document has a known split,
        and no token marks its end.
    workers: number of processes; None: one per core.
    """

    tokenizer: dict
    val_fraction: float | None = VAL_FRACTION
    shard_tokens: int = SHARD_TOKENS
    workers: int | None = None
    skip_invalid: bool = False
    restart: bool = False

    @property
    def is_validation(self) -> HashSplitRule | None:
        return None if self.val_fraction is None else HashSplitRule(self.val_fraction)


def prepare(folder: Path, source: DocumentSource, options: PreparationOptions) -> None:
    """Prepare the dataset `folder` from the documents of `source`, or continue doing so.

    Readers see either the old dataset, none, or the complete new one. Raises UserError for invalid
    documents, for an empty split, for an unfinished preparation with other settings, and for a
    folder that cannot be written.
    """
    settings = {
        'source': source.identity(),
        'tokenizer': options.tokenizer,
        'val_fraction': options.val_fraction,
        'shard_tokens': options.shard_tokens,
    }
    for note in source.notes:
        write_progress(note)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(
            folder / 'publish.lock.tmp', f'another process is writing {folder}: waiting'
        ):
            work = folder / 'unfinished.tmp'
            if not options.restart and _is_prepared_from(folder, settings):
                shutil.rmtree(work, ignore_errors=True)
                write_progress(
                    f'{folder} is already prepared with these settings. Use --restart to prepare '
                    f'it again.\n'
                    f'{train_hint(folder)}'
                )
                return
            open_unfinished(work, source, settings, options.restart)
            meta = _write_tokens(work, source, options, settings)
            _publish(work, folder, meta)
    except OSError as error:
        raise UserError(
            f'The dataset cannot be written to {folder}: {error}. Progress is saved. Fix the '
            'problem and run the same command to continue.'
        ) from None
    write_progress(f'{summary(folder, meta)}\n{train_hint(folder)}')


def _is_prepared_from(folder: Path, settings: dict) -> bool:
    """Whether `folder` contains a complete dataset with these settings."""
    try:
        meta = json.loads((folder / 'meta.json').read_bytes())
        if meta['preparation']['fingerprint'] != _fingerprint(settings) or not is_complete(folder):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    try:
        verify_checksums(folder, read_meta(folder)['splits'], report=write_progress)
    except UserError:
        write_progress(
            f'The tokens in {folder} have changed since they were prepared. Starting over.'
        )
        return False
    return True


def _fingerprint(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _write_tokens(
    work: Path, source: DocumentSource, options: PreparationOptions, settings: dict
) -> dict:
    """Write all token files into `work` and verify them; return meta.json. Raises UserError."""
    workers = 1 if source.is_small else options.workers or available_cores()
    description = _complete_description(options, source, work, workers)
    tokenizer = Tokenizer(description, work)
    if options.is_validation and tokenizer.end_of_text is None:
        raise UserError(
            f'The tokenizer {description} has no end-of-text token. Choose another tokenizer.'
        )
    dtype = next(name for name in DTYPES if tokenizer.vocab_size <= np.iinfo(name).max + 1)
    width = np.dtype(dtype).itemsize
    encoder = Encoder(description, work, DTYPES[dtype], options.is_validation, options.skip_invalid)
    writer = TokenWriter(work, options.shard_tokens * width)
    _encode(source, encoder, writer, workers)
    if problem := _empty_split_problem(source, options, writer.totals):
        shutil.rmtree(work)
        raise UserError(problem)
    write_progress('Verifying the token files ...')
    return {
        'format_version': FORMAT_VERSION,
        'tokenizer': description,
        'vocab_size': tokenizer.vocab_size,
        'end_of_text': tokenizer.end_of_text if options.is_validation else None,
        'dtype': dtype,
        'splits': _split_infos(writer, tokenizer, dtype, options),
        'source': source.identity(),
        'preparation': {
            'fingerprint': _fingerprint(settings),
            'val_fraction': options.val_fraction,
            'empty': writer.totals['empty'],
            'invalid': writer.totals['invalid'],
        },
    }


def _encode(source: DocumentSource, encoder: Encoder, writer: TokenWriter, workers: int) -> None:
    """Encode what `writer` does not have yet; on any error, keep what is done."""
    progress = PreparationProgress(source, writer.position)
    results = map_in_order(encoder, source.batches(writer.position), workers)
    try:
        with contextlib.closing(results):
            for entry, tokens in results:
                for complaint in entry.pop('complaints'):
                    progress.report_invalid(complaint)
                writer.add(entry, tokens)
                progress.show(writer)
    finally:
        progress.close()
        writer.close()
    progress.report_time()


def _complete_description(
    options: PreparationOptions, source: DocumentSource, work: Path, workers: int
) -> dict:
    """The tokenizer, with the part that is built from the corpus, which is saved in `work`."""
    description = options.tokenizer
    if description['kind'] == 'char' and 'characters' not in description:
        return load_or_make_tokenizer(
            work, lambda: {**description, **character_tokenizer(source, workers)}
        )
    if description['kind'] == 'bpe':
        size, rule = description['vocab_size'], options.is_validation
        assert rule is not None  # bpe is never used with known splits
        return load_or_make_tokenizer(
            work, lambda: train_byte_pairs(source, size, rule, work, workers)
        )
    return description


def _split_infos(
    writer: TokenWriter, tokenizer: Tokenizer, dtype: str, options: PreparationOptions
) -> dict[str, dict]:
    """The splits in meta.json, from the verified files."""
    width, splits = np.dtype(dtype).itemsize, {}
    for split, checked in writer.check(tokenizer, DTYPES[dtype]).items():
        totals, paths = writer.totals[split], writer.shards(split)
        names = [f'{split}.bin'] if len(paths) == 1 else [path.name for path in paths]
        splits[split] = {
            'tokens': totals['token_bytes'] // width,
            'bytes': totals['bytes'],
            'documents': totals['documents'] if options.is_validation else None,
            'sha256': checked['sha256'],
            'shards': [
                {'file': name, 'tokens': path.stat().st_size // width, 'sha256': digest}
                for name, path, digest in zip(names, paths, checked['shards'])
            ],
        }
    return splits


def _empty_split_problem(
    source: DocumentSource, options: PreparationOptions, totals: dict
) -> str | None:
    """The problem if a split has no tokens."""
    missing = [split for split in SPLITS if not totals[split]['token_bytes']]
    if not missing:
        return None
    if options.val_fraction is None:
        return f'{source} is too short: the {missing[0]} split would be empty. Use a longer text.'
    count = sum(totals[split]['documents'] for split in SPLITS)
    if not count:
        return (
            f'There is no document to prepare: {totals["empty"]} are empty and '
            f'{totals["invalid"]} invalid. Give other files.'
        )
    return (
        f'There are too few documents ({count}): none of them is in the {missing[0]} split. The '
        f'hash of a document decides its split, and a share of {options.val_fraction} is val. '
        f'{split_hint(source, options.val_fraction)}'
    )


def _publish(work: Path, folder: Path, meta: dict) -> None:
    """Move the files of `work` into place, and remove `work`.

    The first token file is removed first and written last. A folder without it counts as not
    prepared, so readers never see tokens beside a meta.json of other tokens.
    """
    write_json(work / 'meta.json', meta)
    # 1. Remove the old tokens, their first file before everything else.
    for split in SPLITS:
        for path in sorted(folder.glob(f'{split}*.bin')):
            if re.fullmatch(rf'{split}(_\d{{5}})?\.bin', path.name):
                path.unlink()
    (folder / TOKENIZER_FILE).unlink(missing_ok=True)
    if name := meta['tokenizer'].get('file'):  # a copy: an interrupted run needs it again
        shutil.copyfile(work / name, work / 'copy')
        os.replace(work / 'copy', folder / name)
    # 2. Move meta.json into place, then the tokens.
    os.replace(work / 'meta.json', folder / 'meta.json')
    for split in reversed(SPLITS):
        for number, shard in enumerate(meta['splits'][split]['shards']):
            os.replace(work / f'{split}_{number:05d}.bin', folder / shard['file'])
    shutil.rmtree(work)
    record_checksums(folder, meta['splits'])


def write_dataset(folder: Path, tokenizer: dict, texts: dict[str, str], origin: str) -> None:
    """Prepare the dataset `folder` from the `texts` of 'train' and 'val'; `origin` is their source.

    No token marks the end of a text. Raises UserError as `prepare` does.
    """
    options = PreparationOptions(tokenizer, val_fraction=None, workers=1, restart=True)
    prepare(folder, InMemorySource(texts, origin), options)


class InMemoryDocument(NamedTuple):
    """A text with a known split."""

    split: str
    content: str

    def text(self) -> str:
        return self.content


class InMemorySource(DocumentSource):
    """The texts of 'train' and 'val', in chunks that encode to the same tokens as the whole."""

    unit = 'B'

    def __init__(self, texts: dict[str, str], origin: str):
        self.texts, self.origin = texts, origin
        self.total: int | None = None
        self.sha256 = hashlib.sha256(''.join(texts.values()).encode()).hexdigest()

    def __str__(self) -> str:
        return self.origin

    def identity(self) -> dict:
        return {'text': self.origin, 'sha256': self.sha256}

    def batches(self, position: SourcePosition | None = None):
        for split, text in self.texts.items():
            for part in split_text(text):
                yield DocumentBatch([InMemoryDocument(split, part)], SourcePosition())


def split_text(text: str, size: int = CHUNK_CHARACTERS) -> Iterator[str]:
    """`text` in chunks of at least `size` characters, which encode to the tokens of the whole.

    The text is cut only between the end of a line and a letter or digit, where the split patterns
    of all tiktoken encodings separate too.
    """
    start = 0
    boundary = re.compile(r'(?<=\S\n)(?=\w)')
    while start < len(text):
        cut = boundary.search(text, start + size)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end
