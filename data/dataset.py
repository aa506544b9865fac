"""A dataset: its meta.json, and the windows that training and evaluation read from it.

`data.token_files` reads the files and `data.order` determines the order of the windows. Independent
of models and tokenizers.
"""

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from common.console_output import write_progress
from common.errors import UserError, did_you_mean
from common.files import file_lock, files_sha256
from data.order import ORDERS, EpochOrder, RandomOrder, splitmix64
from data.token_check import verify_checksums
from data.token_files import (
    SPLITS,
    Split,
    has_meta,
    import_hint,
    is_complete,
    prepare_hint,
    read_meta,
)

DATA_ROOT = Path(__file__).resolve().parent
BYTE_PAIRS = ('gpt2', 'tiktoken', 'bpe')  # kinds of tokenizers with byte pairs
FULL_CHECK_BYTES = 64 * 2**20  # of larger files only samples are checked, for a fast start


def load_dataset(name: str, block_size: int, data_root: Path | str = DATA_ROOT) -> 'TokenDataset':
    """The dataset `name`: a folder in `data_root`, or a path.

    Raises UserError if it does not exist, if it does not match its meta.json, or if a split is
    shorter than the block_size + 1 tokens of one window.
    """
    return TokenDataset(_find_folder(name, Path(data_root)), block_size)


def is_prepared(name: str, data_root: Path | str = DATA_ROOT) -> bool:
    """Whether the dataset's token files exist. Raises UserError if there is no such dataset."""
    return is_complete(_find_folder(name, Path(data_root)))


def prepare_if_missing(name: str, data_root: Path | str = DATA_ROOT) -> None:
    """Run `data/<name>/prepare.py` if the dataset has one and its token files are missing.

    Only in `data_root`: the name may come from a checkpoint, which must not run code elsewhere.
    Several processes may call this at once: one prepares and the others wait. Raises UserError if
    the script fails, which prints the reason.
    """
    folder = _find_folder(name, Path(data_root))
    script = folder / 'prepare.py'
    ours = folder.resolve().is_relative_to(Path(data_root).resolve())
    if is_complete(folder) or not (ours and script.exists()):
        return
    with file_lock(folder / 'prepare.lock.tmp', f'another process is preparing {name}: waiting'):
        if is_complete(folder):
            return
        write_progress(f'Dataset {name} is not prepared yet. Running {script}')
        code = subprocess.run([sys.executable, str(script)]).returncode
    if code != 0:
        raise UserError(
            f'Preparing the dataset {name} failed with exit code {code} (see the messages above). '
            f'To prepare it separately: python {script}'
        )


class TokenDataset:
    """The two splits of one dataset, read in windows of `block_size` tokens.

    `vocab_size` is the number of token ids, without padding; `tokenizer` describes the tokenizer
    (kind 'unknown' if it is not known); `end_of_text` is the token that ends every document, or
    None; `meta` is meta.json, or its replacement, in the form of version 2; `splits` are the
    tokens; `notes` are sentences for the start-up report.
    """

    def __init__(self, folder: Path, block_size: int):
        self.folder = folder
        self.block_size = block_size
        self.notes: list[str] = []
        self._sha256: dict[str, str] = {}
        self.meta = read_meta(folder)
        self.splits = {
            split: Split(folder, self.meta['splits'][split], self.meta['dtype']) for split in SPLITS
        }
        self._check_length()
        if self.meta['vocab_size'] is None:
            chunks = (chunk for data in self.splits.values() for chunk in data.chunks(2**20))
            self.meta['vocab_size'] = 1 + max(int(chunk.max()) for chunk in chunks)
        for split in SPLITS:
            self._check_ids(split)
        self.vocab_size: int = self.meta['vocab_size']
        self.tokenizer: dict = self.meta['tokenizer']
        self.end_of_text: int | None = self.meta['end_of_text']
        if self.tokenizer['kind'] == 'unknown' and not has_meta(folder):
            self.notes.append(
                f'{folder} has a meta.pkl, which is not read because a pickle can run code. The '
                f'vocabulary is the largest token + 1 = {self.vocab_size} and the tokenizer is '
                'unknown, so there are no bits per byte and no text samples.'
            )
        elif not has_meta(folder):
            self.notes.append(
                f'{folder} has no meta.json. It is read as GPT-2 tokens of nanoGPT (uint16, '
                f'vocabulary {self.vocab_size}). The byte count is unknown, so there are no bits '
                'per byte.'
            )

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary size of a model for this data.

        Byte pairs are padded to a multiple of 64, for faster matrix multiplications; characters
        and bytes are not padded.
        """
        if self.tokenizer['kind'] in BYTE_PAIRS:
            return -(-self.vocab_size // 64) * 64
        return self.vocab_size

    def tokens(self, split: str) -> int:
        """Number of tokens in `split`."""
        return len(self.splits[split])

    def documents(self, split: str) -> int | None:
        """Number of documents in `split`; None if their ends are not marked."""
        return self.meta['splits'][split]['documents']

    def bytes_per_token(self, split: str) -> float | None:
        """UTF-8 bytes of text per token of `split`; None if the byte count is unknown."""
        count = self.meta['splits'][split]['bytes']
        return None if count is None else count / self.tokens(split)

    def sha256(self, split: str) -> str:
        """SHA-256 of all tokens: as verified, else from meta.json, else computed now."""
        if split not in self._sha256:
            split_info = self.meta['splits'][split]
            self._sha256[split] = split_info['sha256'] or files_sha256(self.splits[split].paths)
        return self._sha256[split]

    def verify_checksums(
        self,
        splits: Sequence[str] = SPLITS,
        *,
        full: bool = False,
        from_main: Callable = lambda make: make(),
    ) -> None:
        """Verify that the files have the expected SHA-256. Raises UserError.

        full: hash all files, also those with unchanged size and time. from_main: a function that
        runs another one in the main process and returns the result in all processes.
        """
        self._sha256 |= from_main(
            lambda: verify_checksums(
                self.folder, self.meta['splits'], splits, full=full, report=write_progress
            )
        )

    @cached_property
    def hash(self) -> str:
        """Twelve hex digits that identify the content of both splits."""
        digests = ''.join(self.sha256(split) for split in SPLITS)
        return hashlib.sha256(digests.encode()).hexdigest()[:12]

    def order(self, sampling: str, data_seed: int) -> RandomOrder | EpochOrder:
        """The order of the training sequences that `sampling` and `data_seed` choose."""
        return ORDERS[sampling](data_seed, self.tokens('train'), self.block_size)

    def batch(self, order: RandomOrder | EpochOrder, first_number: int, count: int):
        """Training sequences number first_number … first_number + count - 1 of the `order`.

        Returns (inputs, targets), each int64 (count, block_size).
        """
        return self.read('train', order.starts(first_number, count))

    def window_count(self, split: str, eval_iters: int) -> int:
        """`eval_iters`, or the number of windows without overlap in the split if that is less."""
        return min(eval_iters, (self.tokens(split) - 1) // self.block_size)

    def windows(self, split: str, eval_iters: int) -> np.ndarray:
        """Starts of the evaluation windows: evenly spaced over the whole split, none overlapping.

        The same whatever the batch size, the number of ranks or the architecture.
        """
        count = self.window_count(split, eval_iters)
        last = self.tokens(split) - self.block_size - 1
        return np.arange(count) * last // max(count - 1, 1)

    def read(self, split: str, starts):
        """The windows of `split` at `starts`: (inputs, targets), int64 (len(starts), block_size).

        Targets are the inputs one token later.
        """
        window = self.splits[split].windows(starts, self.block_size + 1)  # (N, T + 1)
        return window[:, :-1].astype(np.int64), window[:, 1:].astype(np.int64)

    def _check_length(self) -> None:
        shortest = min(SPLITS, key=self.tokens)
        length = self.tokens(shortest)
        if length < 2:
            raise UserError(
                f'The {shortest} split of {self.folder} has {length} tokens, too few for any '
                f'block_size. {prepare_hint(self.folder)}'
            )
        if length < self.block_size + 1:
            raise UserError(
                f'block_size {self.block_size} is too large for the dataset {self.folder}: its '
                f'{shortest} split has {length:,} tokens, and a window needs block_size + 1. '
                f'Use at most --block_size={length - 1}'
            )

    def _check_ids(self, split: str) -> None:
        data = self.splits[split]
        if data.nbytes > FULL_CHECK_BYTES:
            # 64 ranges of 64 Ki tokens, evenly spaced over the split.
            length = 2**16
            starts = np.arange(64) * (len(data) - length) // 63
            chunks: Iterator[np.ndarray] = (data.read(start, length) for start in starts)
        else:
            chunks = data.chunks(2**20)
        largest = max(int(chunk.max()) for chunk in chunks)
        vocab_size = self.meta['vocab_size']
        if largest >= vocab_size:
            raise UserError(
                f'The {split} split of {self.folder} has the token {largest}, but the vocabulary '
                f'ends at {vocab_size - 1}: the files have another tokenizer or another dtype. '
                f'{prepare_hint(self.folder)} To use the ids as they are: '
                f'{import_hint(self.folder)} --tokenizer=unknown'
            )


def batch_digest(first_number: int, tokens: np.ndarray) -> int:
    """A 64-bit digest of the sequences from first_number on, with tokens (count, block_size).

    The digests of several batches add up, modulo 2^64, to that of all, in any order.
    """
    positions = np.arange(tokens.shape[1], dtype=np.uint64)
    numbers = int(first_number) + np.arange(len(tokens), dtype=np.uint64)
    rows = ((tokens.astype(np.uint64) + np.uint64(1)) * splitmix64(0, positions)).sum(axis=1)
    return int(splitmix64(rows, numbers).sum())


def _find_folder(name: str, data_root: Path) -> Path:
    for folder in (data_root / name, Path(name)):
        if name and folder.is_dir():
            return folder
    known = sorted(
        folder.name
        for folder in (data_root.iterdir() if data_root.is_dir() else ())
        if any((folder / file).exists() for file in ('prepare.py', 'meta.json', 'train.bin'))
    )
    raise UserError(
        f'dataset {name!r} is neither a folder in {data_root} nor a path to a folder.'
        f'{did_you_mean(name, known)} Datasets there: {", ".join(known) or "none"}'
    )
