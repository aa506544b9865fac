"""Make a dataset from token ids that another program wrote or that were edited.

    python data/import_tokens.py FOLDER --out=data/mine
    python data/import_tokens.py FOLDER --out=data/mine --dtype=uint32 --tokenizer=cl100k_base

FOLDER has the ids for training and validation: the files named in its meta.json, or train.bin and
val.bin, or train.npy and val.npy. Supported are integers of any width and byte order, floats with
integer values, and the files of numpy.save and llm.c. Without --dtype the format is recognized from
the content. FOLDER is not changed.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common.first_import  # noqa: F401

import numpy as np

from common.console_output import write_progress
from common.errors import ArgumentParser, UserError, did_you_mean, run_script
from data.prepare import TOKENIZER_DESCRIPTIONS
from data.token_check import record_checksums
from data.token_files import DTYPES, FORMAT_VERSION, GPT2_VOCAB_SIZE, SPLITS, has_meta, read_meta
from data.token_formats import IdFormat, recognize_format
from data.tokenizer import Tokenizer, tiktoken_names

CHUNK = 2**20  # ids read at a time
KINDS = ('uint8', 'uint16', 'uint32', 'uint64', 'int16', 'int32', 'int64')
LARGEST_ID = 2**32 - 1


def parse_arguments(argv: list[str] | None):
    parser = ArgumentParser(prog='data/import_tokens.py', description=__doc__)
    add = parser.add_argument
    add('folder', metavar='FOLDER', type=Path, help='Folder with the token ids')
    add(
        '--out',
        metavar='FOLDER',
        type=Path,
        required=True,
        help='Folder of the new dataset, such as data/mine',
    )
    add('--dtype', choices=KINDS, help='Type of the ids (default: recognized from the files)')
    add('--big_endian', action='store_true', help='Read the most significant byte of an id first')
    add(
        '--tokenizer',
        metavar='NAME',
        help='Tokenizer of the ids: gpt2, byte, an encoding of tiktoken, or unknown (default: that '
        'of meta.json; without one, gpt2 if all ids are below 50257 and there is no meta.pkl)',
    )
    options = parser.parse(argv)
    if options.big_endian and not options.dtype:
        raise UserError('--big_endian needs --dtype. Add it, for example --dtype=uint32.')
    is_empty = options.out.is_dir() and not any(options.out.iterdir())
    if options.out.exists() and not is_empty:
        raise UserError(f'--out={options.out} exists already. Give a new folder.')
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    paths, meta = token_files_of(options.folder)
    given = IdFormat(options.dtype, options.big_endian) if options.dtype else None
    if given is None and meta:
        given = IdFormat(meta['dtype'])
    formats = {path: detect_format(path, given) for split in SPLITS for path in paths[split]}
    largest = max(
        int(chunk.max()) for path, ids in formats.items() for chunk in read_chunks(path, ids)
    )
    if largest > LARGEST_ID:
        raise UserError(f'The id {largest} is too large: at most {LARGEST_ID} is supported.')
    described = describe_dataset(options, meta, largest)
    options.out.mkdir(parents=True, exist_ok=True)
    if name := described['tokenizer'].get('file'):
        shutil.copyfile(options.folder / name, options.out / name)
    write_files(options.out, paths, formats, described)
    for split in SPLITS:
        kinds = ', '.join(dict.fromkeys(str(formats[path]) for path in paths[split]))
        tokens = described['splits'][split]['tokens']
        write_progress(f'{split}: {tokens:,} ids, read as {kinds}')
    write_progress(
        f'{options.out}: {described["dtype"]}, tokenizer {described["tokenizer"]["kind"]}, '
        f'vocabulary {described["vocab_size"]:,}\n'
        f'To train on it: python train.py --dataset={options.out}'
    )


def token_files_of(folder: Path) -> tuple[dict[str, list[Path]], dict | None]:
    """The files of each split, and meta.json, if it exists. Raises UserError."""
    if has_meta(folder):
        meta = read_meta(folder)
        shards = {split: meta['splits'][split]['shards'] for split in SPLITS}
        return {s: [folder / shard['file'] for shard in shards[s]] for s in SPLITS}, meta
    for ending in ('.bin', '.npy'):
        files = {split: [folder / f'{split}{ending}'] for split in SPLITS}
        if all(path.is_file() for (path,) in files.values()):
            return files, None
    raise UserError(
        f'{folder} has neither train.bin and val.bin nor train.npy and val.npy. Add both files of '
        'one kind.'
    )


def detect_format(path: Path, given: IdFormat | None) -> IdFormat:
    """The format of the ids in a file. Raises UserError."""
    try:
        ids, size = recognize_format(path), path.stat().st_size
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}.') from None
    if isinstance(ids, str):
        raise UserError(f'{path} does not contain token ids: it is {ids}.')
    if given is not None and not ids.program:
        ids = given
    elif given is not None:
        ids = replace(ids, dtype=given.dtype, big_endian=given.big_endian)
    width = ids.numpy_dtype.itemsize
    if (size - ids.skip) % width:
        raise UserError(
            f'{path} has {size - ids.skip:,} bytes, not a multiple of the {width} of {ids.dtype}: '
            'it is truncated or has another type. Give the type, for example --dtype=uint8'
        )
    if size == ids.skip:
        raise UserError(f'{path} is empty.')
    return ids


def read_chunks(path: Path, ids: IdFormat) -> Iterator[np.ndarray]:
    """The ids of a file in chunks, int64 or uint64. Raises UserError for an invalid id."""
    dtype = ids.numpy_dtype
    with open(path, 'rb') as file:
        file.seek(ids.skip)
        begin = 0
        while content := file.read(CHUNK * dtype.itemsize):
            values = np.frombuffer(content, dtype)
            with np.errstate(invalid='ignore'):  # detected by the comparison below
                whole = values.astype(np.uint64 if dtype.kind == 'u' else np.int64)
            wrong = np.flatnonzero((whole != values) | (values < 0))
            if len(wrong):
                raise UserError(
                    f'{path}: number {begin + int(wrong[0]):,} is {values[wrong[0]]}, which is not '
                    'a token id. If the files have another type, give it: --dtype=uint32 or another'
                )
            yield whole
            begin += len(whole)


def describe_dataset(options, meta: dict | None, largest: int) -> dict:
    """meta.json without the splits. Raises UserError."""
    name = options.tokenizer
    if name is None and meta:
        tokenizer = meta['tokenizer']
    elif name is None:
        is_gpt2 = largest < GPT2_VOCAB_SIZE and not (options.folder / 'meta.pkl').exists()
        tokenizer = {'kind': 'gpt2' if is_gpt2 else 'unknown'}
    else:
        tokenizer = tokenizer_description(name)
    if tokenizer['kind'] == 'unknown':
        vocab_size = max(largest + 1, meta['vocab_size'] if meta and name is None else 0)
    else:
        vocab_size = Tokenizer(tokenizer, options.folder).vocab_size
    if largest >= vocab_size:
        raise UserError(
            f'The largest id is {largest}, but the tokenizer {tokenizer["kind"]} has only '
            f'{vocab_size} tokens. Give the right one with --tokenizer=NAME, or --tokenizer=unknown'
        )
    dtype = next(name for name in DTYPES if vocab_size <= np.iinfo(name).max + 1)
    return {
        'format_version': FORMAT_VERSION,
        'tokenizer': tokenizer,
        'vocab_size': vocab_size,
        'end_of_text': meta['end_of_text'] if meta else None,
        'dtype': dtype,
        'source': {'ids': str(options.folder.resolve())},
    }


def tokenizer_description(name: str) -> dict:
    """The description in meta.json of the tokenizer that --tokenizer names. Raises UserError."""
    if name in ('gpt2', 'unknown'):
        return {'kind': name}
    if name == 'byte':
        return TOKENIZER_DESCRIPTIONS['byte']
    known = ['gpt2', 'byte', 'unknown', *tiktoken_names()]
    if name not in known:
        raise UserError(
            f'--tokenizer={name} is unknown.{did_you_mean(name, known)} Tokenizers: '
            f'{", ".join(known)}'
        )
    return {'kind': 'tiktoken', 'name': name}


def write_files(out: Path, paths: dict, formats: dict[Path, IdFormat], meta: dict) -> None:
    """Write the token files, then meta.json with its splits. Raises UserError."""
    meta['splits'] = {}
    try:
        for split in SPLITS:
            digest, tokens = hashlib.sha256(), 0
            with open(out / f'{split}.tmp', 'wb') as file:
                for path in paths[split]:
                    for chunk in read_chunks(path, formats[path]):
                        content = chunk.astype(DTYPES[meta['dtype']]).tobytes()
                        file.write(content)
                        digest.update(content)
                        tokens += len(chunk)
            shard = {'file': f'{split}.bin', 'tokens': tokens, 'sha256': digest.hexdigest()}
            counts = {'tokens': tokens, 'bytes': None, 'documents': None}
            meta['splits'][split] = {**counts, 'sha256': digest.hexdigest(), 'shards': [shard]}
        text = json.dumps(meta, indent=1) + '\n'
        (out / 'meta.json').write_text(text, encoding='utf-8')
        for split in SPLITS:
            os.replace(out / f'{split}.tmp', out / f'{split}.bin')
    except OSError as error:
        raise UserError(f'The dataset cannot be written to {out}: {error.strerror}.') from None
    record_checksums(out, meta['splits'])


if __name__ == '__main__':
    run_script(main)
