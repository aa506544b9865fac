"""Inspect a dataset: its tokens, files and documents, and its text at any position.

    python data/inspect_tokens.py shakespeare
    python data/inspect_tokens.py FOLDER --split=val --at=1000 --length=200
    python data/inspect_tokens.py FOLDER --document=7
    python data/inspect_tokens.py FOLDER --verify

Files are read in chunks, so memory does not depend on their size.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common.first_import  # noqa: F401

import numpy as np

from common.console_output import write_text
from common.errors import ArgumentParser, UserError, run_script
from common.paths import expand_home
from data.dataset import TokenDataset, load_dataset
from data.token_files import SPLITS, Split
from data.tokenizer import Tokenizer

CHUNK = 2**20  # tokens read at a time
BAR = 40  # length of the longest bar of a histogram


class LengthCounts:
    """Exact counts of document lengths."""

    SHORT = 2**20  # shorter lengths are counted in an array, the others in a dict

    def __init__(self):
        self.short, self.long = np.zeros(self.SHORT, np.int64), Counter()

    def add(self, lengths: np.ndarray) -> None:
        is_short = lengths < self.SHORT
        counts = np.bincount(lengths[is_short])
        self.short[: len(counts)] += counts
        self.long.update(lengths[~is_short].tolist())

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """The lengths that occur, in order, and the number of documents of each."""
        short = np.flatnonzero(self.short)
        longer = sorted(self.long)
        counts = [*self.short[short].tolist(), *(self.long[length] for length in longer)]
        return np.array([*short.tolist(), *longer]), np.array(counts)


def document_ends(split: Split, end_of_text: int) -> Iterator[np.ndarray]:
    """Positions of the end-of-text tokens in order, for one chunk of the split at a time."""
    begin = 0
    for chunk in split.chunks(CHUNK):
        yield np.flatnonzero(chunk == end_of_text) + begin
        begin += len(chunk)


def document_lengths(split: Split, end_of_text: int) -> tuple[LengthCounts, int]:
    """The lengths of all documents, without their end-of-text tokens, and the number of tokens
    after the last document."""
    lengths, before = LengthCounts(), -1
    for ends in document_ends(split, end_of_text):
        if len(ends):
            lengths.add(np.diff(ends, prepend=before) - 1)
            before = int(ends[-1])
    return lengths, len(split) - 1 - before


def find_document(split: Split, end_of_text: int, number: int) -> tuple[int, int]:
    """Start and length of document `number` (from 0), without its end. Raises UserError."""
    before, passed = -1, 0
    for ends in document_ends(split, end_of_text):
        if passed + len(ends) > number:
            here = number - passed
            start = int(ends[here - 1] if here else before) + 1
            return start, int(ends[here]) - start
        passed += len(ends)
        before = int(ends[-1]) if len(ends) else before
    raise UserError(f'--document={number}: the split has {passed:,} documents, 0 to {passed - 1}.')


def overview(data: TokenDataset) -> list[str]:
    """The content of meta.json, as lines."""
    end = 'none' if data.end_of_text is None else data.end_of_text
    return [
        f'{data.folder}',
        f'tokenizer {data.tokenizer["kind"]}, vocabulary {data.vocab_size:,}, '
        f'{data.meta["dtype"]}, end of text: {end}',
    ]


def split_lines(data: TokenDataset, split: str) -> list[str]:
    """Tokens, bytes and files of one split, as lines."""
    tokens, per_token = data.tokens(split), data.bytes_per_token(split)
    text = f'{split}: {tokens:,} tokens'
    if per_token is not None:
        text += (
            f' of {data.meta["splits"][split]["bytes"]:,} bytes, {per_token:.3f} bytes per token'
        )
    lines = ['', text]
    begin = 0
    for shard in data.meta['splits'][split]['shards']:
        sha256 = (shard['sha256'] or 'unknown')[:12]
        line = f'  {shard["file"]:<20} {shard["tokens"]:>16,} tokens from {begin:>16,}'
        lines.append(f'{line}  SHA-256 {sha256}')
        begin += shard['tokens']
    return lines


def document_lines(data: TokenDataset, split: str) -> list[str]:
    """Number and lengths of the documents of one split, as lines."""
    if data.end_of_text is None:
        return ['  documents: unknown, as there is no end-of-text token']
    lengths, rest = document_lengths(data.splits[split], data.end_of_text)
    values, counts = lengths.table()
    total, expected = int(counts.sum()), data.documents(split)
    lines = [f'  documents: {total:,}']
    if expected is not None and expected != total:
        lines.append(f'  meta.json has {expected:,}: the files do not match it')
    if rest:
        lines.append(f'  {rest:,} tokens at the end belong to an incomplete document')
    if total:
        lines.append(
            f'  tokens per document, without its end: minimum {values[0]:,}, '
            f'median {median(values, counts):,g}, mean {values @ counts / total:,.1f}, '
            f'maximum {values[-1]:,}'
        )
        lines += histogram(values, counts)
    return lines


def median(values: np.ndarray, counts: np.ndarray) -> float:
    """The median of the sorted `values`, each occurring `counts` times."""
    reached, total = counts.cumsum(), int(counts.sum())
    middle = np.searchsorted(reached, [(total - 1) // 2, total // 2], side='right')
    return float(values[middle].mean())


def histogram(values: np.ndarray, counts: np.ndarray) -> list[str]:
    """A line for each doubling of the length, from the minimum to the maximum."""
    doublings = [int(value).bit_length() for value in values]
    heights = np.bincount(doublings, weights=counts).astype(np.int64)
    lines = []
    for doubling in range(doublings[0], len(heights)):
        low, high = (2 ** (doubling - 1), 2**doubling - 1) if doubling else (0, 0)
        count = int(heights[doubling])
        bar = '#' * -(-BAR * count // int(heights.max()))
        share = 100 * count / int(counts.sum())
        lines.append(f'  {low:>12,} – {high:>12,} {count:>12,} {share:>5.1f} % {bar}'.rstrip())
    return lines


def text_at(data: TokenDataset, split: str, start: int, length: int) -> str:
    """The text of some tokens, with control characters as escapes."""
    tokenizer = Tokenizer(data.tokenizer, data.folder)
    return ''.join(
        character if character.isprintable() or character in '\n\t' else f'\\x{ord(character):02x}'
        for character in tokenizer.decode(data.splits[split].read(start, length))
    )


def range_to_show(data: TokenDataset, options) -> tuple[int, int, str]:
    """Start and length of the range to show, and its description. Raises UserError."""
    split = data.splits[options.split]
    if options.document is None:
        if not 0 <= options.at < len(split):
            raise UserError(
                f'--at={options.at}: the {options.split} split has tokens 0 to {len(split) - 1}.'
            )
        length = min(options.length, len(split) - options.at)
        title = f'tokens {options.at:,} to {options.at + length - 1:,} of {len(split):,}'
        return options.at, length, title
    if data.end_of_text is None:
        raise UserError(f'--document: {data.folder} has no end-of-text token. Use --at.')
    start, whole = find_document(split, data.end_of_text, options.document)
    length = min(options.length, whole)
    shown = '' if length == whole else f', of which the first {length:,} (--length shows more)'
    return start, length, f'document {options.document:,}: {whole:,} tokens from {start:,}{shown}'


def parse_arguments(argv: list[str] | None):
    """The command line. Raises UserError."""
    parser = ArgumentParser(prog='data/inspect_tokens.py', description=__doc__)
    parser.add_argument(
        'dataset', type=expand_home, help='Dataset: the name of a folder in data/, or a path'
    )
    parser.add_argument(
        '--split', choices=SPLITS, help='Split to inspect (default: both; for text, train)'
    )
    parser.add_argument('--at', type=int, metavar='N', help='Show the text from token N on')
    parser.add_argument('--document', type=int, metavar='N', help='Show document N, counted from 0')
    parser.add_argument(
        '--length', type=int, default=500, help='Number of tokens to show (default 500)'
    )
    parser.add_argument('--verify', action='store_true', help='Verify the SHA-256 of the files')
    options = parser.parse(argv)
    if options.at is not None and options.document is not None:
        raise UserError('--at and --document exclude each other. Give one of them.')
    if options.length < 1:
        raise UserError(f'--length={options.length}: takes a whole number of at least 1.')
    if options.document is not None and options.document < 0:
        raise UserError(f'--document={options.document}: documents are counted from 0.')
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    data = load_dataset(options.dataset, block_size=1)
    if options.at is not None or options.document is not None:
        options.split = options.split or 'train'
        start, length, title = range_to_show(data, options)
        write_text(f'{options.split}, {title}:\n')
        write_text(text_at(data, options.split, start, length), literal=True)
        return
    chosen = [options.split] if options.split else SPLITS
    write_text('\n'.join([*overview(data), *data.notes]))
    for split in chosen:
        write_text('\n'.join(split_lines(data, split)))
        if options.verify:
            data.verify_checksums((split,), full=True)
            write_text('  SHA-256: verified')
        else:
            write_text('\n'.join(document_lines(data, split)))


if __name__ == '__main__':
    run_script(main)
