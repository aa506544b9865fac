"""The files of a dataset: meta.json, and the tokens of each split in one file or several.

A dataset is a folder with `meta.json`, which describes it, and token files (token ids, little
endian, nothing else): `train.bin` and `val.bin`, or `train_00000.bin`, `train_00001.bin`, … for a
split in shards. A split is one sequence of tokens, regardless of the number of files. nanoGPT's
folders, which have no meta.json, can be read too. Independent of models and tokenizers.
"""

import hashlib
import re
import shlex
import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import file_chunks
from common.text_files import is_count, parse_json
from data.token_formats import IdFormat, recognize_format

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
SPLITS = ('train', 'val')
DTYPES = {'uint8': '<u1', 'uint16': '<u2', 'uint32': '<u4'}
GPT2_VOCAB_SIZE = 50257
SHOWN_MISSING = 3  # missing files that a message names


class Split:
    """The tokens of one split: a single sequence, in one file or several.

    Files are read, not memory-mapped: memory use does not grow during a run, and a file that is
    truncated meanwhile is an error, not a crash. Several threads may read at once. Raises UserError
    for a file that is missing, unreadable or of another size than in `split_info`.
    """

    def __init__(self, folder: Path, split_info: dict, dtype: str):
        self.dtype = np.dtype(DTYPES[dtype])
        self.paths = [folder / shard['file'] for shard in split_info['shards']]
        sizes = [shard['tokens'] for shard in split_info['shards']]
        self._ends = list(accumulate(sizes))
        self._files = [self._open(*file) for file in zip(self.paths, sizes)]
        self._lock = threading.Lock()  # of the position in the files

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def nbytes(self) -> int:
        return len(self) * self.dtype.itemsize

    def read(self, start: int, length: int) -> np.ndarray:
        """The `length` tokens from `start` on: (length,) of the files' dtype."""
        return self.windows([start], length)[0]

    def windows(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """The windows of `length` tokens at `starts`: (len(starts), length) of the files' dtype.

        Raises IndexError for a window outside the split.
        """
        begins = np.asarray(starts, dtype=np.int64)
        if len(begins) and not 0 <= begins.min() <= begins.max() <= len(self) - length:
            raise IndexError(f'no window of {length} tokens at {begins.min()} … {begins.max()}')
        tokens = np.empty((len(begins), length), self.dtype)
        for row, start in zip(tokens, begins.tolist()):
            self._fill(row, start)
        return tokens

    def chunks(self, length: int) -> Iterator[np.ndarray]:
        """The whole split in order, `length` tokens at a time; the last chunk may be shorter."""
        for start in range(0, len(self), length):
            yield self.read(start, min(length, len(self) - start))

    def _fill(self, tokens: np.ndarray, start: int) -> None:
        shard = bisect_right(self._ends, start)
        while len(tokens):
            end = self._ends[shard]
            segment = tokens[: end - start]
            begin = self._ends[shard - 1] if shard else 0
            with self._lock:
                self._files[shard].seek((start - begin) * self.dtype.itemsize)
                bytes_read = self._files[shard].readinto(segment)
            if bytes_read != segment.nbytes:
                raise UserError(
                    f'{self.paths[shard]} was truncated during the run. Prepare it again.'
                )
            tokens, start, shard = tokens[len(segment) :], end, shard + 1

    def _open(self, path: Path, tokens: int):
        expected = tokens * self.dtype.itemsize
        try:
            size = path.stat().st_size
            file = open(path, 'rb', buffering=0)  # noqa: SIM115 closed with the split
        except OSError as error:
            raise UserError(
                f'{path} cannot be read: {error.strerror}. {prepare_hint(path.parent)}'
            ) from None
        weakref.finalize(self, file.close)
        if size != expected:
            raise UserError(
                f'{path} has {size:,} bytes, but {expected:,} are expected ({tokens:,} tokens of '
                f'{self.dtype.name}): it is truncated or from another dataset. '
                f'{prepare_hint(path.parent)}'
            )
        return file


def is_complete(folder: Path) -> bool:
    """Whether all token files in meta.json exist; without meta.json, train.bin and val.bin.

    A program that replaces a dataset removes a token file first and writes it last, so that a
    complete folder never has token files that do not match its meta.json.
    """
    try:
        names = _file_names(_read_meta_file(folder)) if has_meta(folder) else _bare_names()
    except UserError:  # reported when the dataset is loaded
        names = _bare_names()
    return all((folder / name).exists() for name in names)


def has_meta(folder: Path) -> bool:
    return (folder / 'meta.json').exists()


def read_meta(folder: Path) -> dict:
    """meta.json in the form of version 2, checked; its replacement for a folder without one.

    Raises UserError, also if token files are missing.
    """
    if has_meta(folder):
        meta = _read_meta_file(folder)
        _require(folder, _file_names(meta))
        return meta
    _require(folder, _bare_names())
    return _meta_of_bare_folder(folder)


def hash_split(folder: Path, split_info: dict) -> tuple[str, list[str]]:
    """The SHA-256 of a split, and a sentence for each file with another hash than expected.

    `split_info`: the entry of the split in meta.json; hashes missing there are not compared. Raises
    UserError for a file that cannot be read.
    """
    problems, whole = [], hashlib.sha256()

    def compare(what: str, expected: str | None, actual: str) -> None:
        if expected not in (None, actual):
            problems.append(f'{what} has the SHA-256 {actual}, but {expected} is expected.')

    for shard in split_info['shards']:
        path, shard_hash = folder / shard['file'], hashlib.sha256()
        try:
            for chunk in file_chunks(path):
                shard_hash.update(chunk)
                if len(split_info['shards']) > 1:
                    whole.update(chunk)
        except OSError as error:
            raise UserError(f'{path} cannot be read: {error.strerror}.') from None
        compare(str(path), shard['sha256'], shard_hash.hexdigest())
    if len(split_info['shards']) == 1:
        if split_info['sha256'] != split_info['shards'][0]['sha256']:
            compare(str(path), split_info['sha256'], shard_hash.hexdigest())
        return shard_hash.hexdigest(), problems
    first, last = split_info['shards'][0]['file'], split_info['shards'][-1]['file']
    compare(f'{folder}, {first} to {last} together', split_info['sha256'], whole.hexdigest())
    return whole.hexdigest(), problems


def prepare_hint(folder: Path) -> str:
    """Advice for a dataset that cannot be used."""
    script = folder / 'prepare.py'
    if script.exists():
        return f'To prepare it: python {script}'
    return f'Write {SPLITS[0]}.bin, {SPLITS[1]}.bin and meta.json there, as data/prepare.py does.'


def import_hint(folder: Path) -> str:
    """The command that makes a new dataset from the token ids in a folder."""
    quoted = [shlex.quote(str(path)) for path in (folder, f'{folder}-ids')]
    return f'python data/import_tokens.py {quoted[0]} --out={quoted[1]}'


def _require(folder: Path, names: list[str]) -> None:
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        more = len(missing) - SHOWN_MISSING
        raise UserError(
            f'The dataset {folder} has no {" and no ".join(missing[:SHOWN_MISSING])}'
            f'{f" and {more} more are missing" if more > 0 else ""}. {prepare_hint(folder)}'
        )


def _bare_names() -> list[str]:
    return [f'{split}.bin' for split in SPLITS]


def _file_names(meta: dict) -> list[str]:
    return [shard['file'] for split in SPLITS for shard in meta['splits'][split]['shards']]


def _single_file_info(split: str, tokens: int, byte_count: int | None, sha256: str | None) -> dict:
    """The entry in meta.json (version 2) of a split in one file."""
    shard = {'file': f'{split}.bin', 'tokens': tokens, 'sha256': sha256}
    split_info = {'tokens': tokens, 'bytes': byte_count, 'documents': None, 'sha256': sha256}
    return {**split_info, 'shards': [shard]}


def _meta_of_bare_folder(folder: Path) -> dict:
    """The replacement for meta.json in a folder of nanoGPT: GPT-2 tokens in uint16.

    With a meta.pkl beside them, the tokens are others. It is not unpickled, because that can run
    code: the tokenizer is 'unknown' and vocab_size None.
    """
    is_gpt2 = not (folder / 'meta.pkl').exists()
    size = {split: _size_of_uint16(folder / f'{split}.bin') for split in SPLITS}
    return {
        'tokenizer': {'kind': 'gpt2' if is_gpt2 else 'unknown'},
        'vocab_size': GPT2_VOCAB_SIZE if is_gpt2 else None,
        'end_of_text': None,
        'dtype': 'uint16',
        'splits': {
            split: _single_file_info(split, size[split] // 2, None, None) for split in SPLITS
        },
    }


def _size_of_uint16(path: Path) -> int:
    """The size of a token file without meta.json. Raises UserError if it is not uint16."""
    try:
        size, ids = path.stat().st_size, recognize_format(path)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}.') from None
    if isinstance(ids, str):
        raise UserError(f'{path} does not contain token ids: it is {ids}.')
    if ids == IdFormat() and size % 2:
        raise UserError(
            f'{path} has {size:,} bytes, an odd number: it is truncated or not uint16. If each '
            f'byte is an id: {import_hint(path.parent)} --dtype=uint8'
        )
    if ids != IdFormat():
        raise UserError(
            f'{path} looks like {ids}, but without a meta.json only uint16 is read. To make a '
            f'dataset from it: {import_hint(path.parent)}'
        )
    return size


def _read_meta_file(folder: Path) -> dict:
    path = folder / 'meta.json'
    try:
        meta = parse_json(path.read_bytes())
        problem = _problem_of_meta(meta)
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem:
        raise UserError(f'{path} cannot be used: {problem}. {prepare_hint(folder)}')
    return meta


def _problem_of_meta(meta) -> str | None:
    """The problem of a meta.json, which is converted to the form of version 2 at the same time."""
    if not isinstance(meta, dict):
        return 'it is not a JSON object'
    if meta.get('format_version') not in READABLE_VERSIONS:
        known = ' or '.join(map(str, READABLE_VERSIONS))
        return f'format_version is {meta.get("format_version")!r}, not {known}'
    if meta.get('dtype') not in list(DTYPES):  # a list also accepts unhashable values
        return f'dtype is {meta.get("dtype")!r}, not one of {", ".join(DTYPES)}'
    if not is_count(meta.get('vocab_size')) or meta['vocab_size'] == 0:
        return f'vocab_size is {meta.get("vocab_size")!r}, not a positive whole number'
    end = meta.setdefault('end_of_text', None)
    if end is not None and not (is_count(end) and end < meta['vocab_size']):
        return f'end_of_text is {end!r}, not a token below vocab_size or null'
    tokenizer = meta.get('tokenizer')
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get('kind'), str):
        return 'tokenizer is not an object with a "kind"'
    for split in SPLITS:
        split_info = meta['splits'].get(split) if isinstance(meta.get('splits'), dict) else None
        if not isinstance(split_info, dict) or not is_count(split_info.get('tokens')):
            return f'splits.{split}.tokens is missing or not a whole number'
        for key in ('bytes', 'documents'):
            if split_info.setdefault(key, None) is not None and not is_count(split_info[key]):
                return f'splits.{split}.{key} is {split_info[key]!r}, not a whole number or null'
        if not isinstance(split_info.setdefault('sha256', None), str | None):
            return f'splits.{split}.sha256 is {split_info["sha256"]!r}, not a string or null'
        if meta['format_version'] == 1:
            split_info['shards'] = _single_file_info(
                split, split_info['tokens'], None, split_info['sha256']
            )['shards']
        if problem := _problem_of_shards(split_info):
            return f'splits.{split}.{problem}'
    return None


def _problem_of_shards(split_info: dict) -> str | None:
    shards = split_info.get('shards')
    if not isinstance(shards, list) or not shards:
        return 'shards is missing or not a list of files'
    for number, shard in enumerate(shards):
        name = shard.get('file') if isinstance(shard, dict) else None
        # A dataset may come from elsewhere: it may name only files in its own folder.
        if not isinstance(name, str) or not re.fullmatch(r'\w[\w.-]{0,199}', name, re.ASCII):
            return f'shards[{number}].file is {name!r}, not a plain file name'
        if not is_count(shard.get('tokens')):
            return f'shards[{number}].tokens is missing or not a whole number'
        if not isinstance(shard.setdefault('sha256', None), str | None):
            return f'shards[{number}].sha256 is {shard["sha256"]!r}, not a string or null'
    total = sum(shard['tokens'] for shard in shards)
    if total != split_info['tokens']:
        return f'tokens is {split_info["tokens"]:,}, but its shards have {total:,}'
    return None
