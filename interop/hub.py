"""Models of the Hugging Face hub: from its cache on this machine, else over HTTPS.

The cache is the one that Hugging Face's own programs share, so what any of them has downloaded is
found here, and what is downloaded here is found there. Files are fetched and nothing is run. As for
them, HF_HUB_CACHE, HF_HOME and HF_ENDPOINT say where the cache and the hub are.
"""

import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.request
import uuid
from pathlib import Path
from typing import NamedTuple

from common.console_output import write_progress
from common.errors import UserError
from common.files import file_lock

TIMEOUT = 30  # seconds of silence
MOST_JSON = 2**26  # bytes: the longest index of a model's shards is a tenth of that
ORGANISATION = 'openai-community/'  # its models were once called by their names alone
# The weights of a whole model, in one file or several. Not those of other frameworks.
WEIGHTS = r'(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?'


def model_folder(source: str, name: str) -> Path:
    """The folder that holds the model `name`, downloaded if it must be.

    source: how the user called it, for messages. Raises UserError saying what was tried.
    """
    cached = find_cached(name)
    if cached:
        return cached
    if not re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', name):
        raise UserError(f'{source}: there is no folder {name}.')
    home = cache_folder() / _folder_name(name)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f'{source}: the cache {cache_folder()} has no such model, and cannot be written to '
            f'({error.strerror}): HF_HOME=FOLDER names another.'
        ) from error
    with file_lock(home / 'download.lock.tmp', f'another process downloads {name}: waiting'):
        return find_cached(name) or _download(source, name, home)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: one, or those that an index names; none if there are none.

    Raises OSError, or ValueError for an index that is none.
    """
    for whole in ('model.safetensors', 'pytorch_model.bin'):
        index = folder / f'{whole}.index.json'
        if (folder / whole).is_file():
            return [folder / whole]
        if index.is_file():
            shards = read_object(index).get('weight_map')
            names = shards.values() if isinstance(shards, dict) else (None,)
            if not all(isinstance(name, str) and Path(name).name for name in names):
                raise ValueError(f'{index.name} has no weight_map of tensors to files')
            # A name and no path: an index is data, and must not reach outside its folder.
            return [folder / name for name in sorted({Path(name).name for name in names})]
    return []


def read_object(path: Path) -> dict:
    """The JSON object in a file of somebody's. Raises OSError, or ValueError saying what it is."""
    with open(path, 'rb') as file:
        return _object(file.read(MOST_JSON + 1), path.name)


def _object(content: bytes, name: str) -> dict:
    values = _parse(content, name)
    if not isinstance(values, dict):
        raise ValueError(f'{name} is no JSON object')
    return values


def _parse(content: bytes, name: str):
    """JSON from outside: of every size and depth. Raises ValueError."""
    if len(content) > MOST_JSON:
        raise ValueError(f'{name} is longer than {MOST_JSON:,} bytes')
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f'{name} is nested too deeply') from None
    except ValueError as error:
        raise ValueError(f'{name} is no JSON ({error})') from error


def cache_folder() -> Path:
    """Where Hugging Face's programs keep what they downloaded."""
    below = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    home = Path(os.environ.get('HF_HOME') or Path(below) / 'huggingface')
    return Path(os.environ.get('HF_HUB_CACHE') or home / 'hub').expanduser()


def find_cached(name: str) -> Path | None:
    """The folder of the model in the cache, if all of it is there."""
    for called in (name, name.removeprefix(ORGANISATION)):
        home = cache_folder() / _folder_name(called)
        try:
            revision = (home / 'refs' / 'main').read_text(encoding='utf-8').strip()
            folder = home / 'snapshots' / Path(revision).name
            files = weight_files(folder)
        except (OSError, ValueError):  # not there, or not whole
            continue
        if files and all(path.is_file() for path in [folder / 'config.json', *files]):
            return folder
    return None


def _folder_name(name: str) -> str:
    return f'models--{name.replace("/", "--")}'


def _endpoint() -> str:
    return (os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')


def _download(source: str, name: str, home: Path) -> Path:
    """Fetch config and weights into the cache, each whole before it has its name."""
    try:
        answer = _object(_get(f'{_endpoint()}/api/models/{name}/revision/main'), 'the answer')
        revision = answer.get('sha')
        if not isinstance(revision, str) or not re.fullmatch(r'[0-9a-f]{40}', revision):
            raise ValueError(f'{revision!r} is no revision')
        folder = home / 'snapshots' / revision
        folder.mkdir(parents=True, exist_ok=True)
        files = _files(_get(f'{_endpoint()}/api/models/{name}/tree/{revision}'))
        _check_room(folder, sum(f.size for f in files if not _is_there(folder / f.path, f.size)))
        for file in files:
            _fetch(f'{_endpoint()}/{name}/resolve/{revision}/{file.path}', folder, file)
        (home / 'refs').mkdir(exist_ok=True)
        (home / 'refs' / 'main').write_text(revision, encoding='utf-8')
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(
            f'{source}: no folder here and no model in the cache {cache_folder()} is called '
            f'{name}, and {_endpoint()}/{name} could not be downloaded ({type(error).__name__}: '
            f'{error}). Download it where it can be (pip install huggingface_hub; hf download '
            f'{name}), and give the folder that holds its config.json and model.safetensors: '
            f'--init_from=hf:FOLDER.'
        ) from error
    return folder


class _File(NamedTuple):
    """A file of a repository, as the hub announces it."""

    path: str
    size: int
    sha256: str | None


def _get(url: str) -> bytes:
    """What is answered, or the beginning of what is too long to be JSON."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        return answer.read(MOST_JSON + 1)


def _files(listing: bytes) -> list[_File]:
    """Of a repository's files the config and the weights, preferably not pickled.

    Raises ValueError for what is no such listing.
    """
    entries = _parse(listing, 'the list of files')
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError('the list of files is none')
    sizes, sums = {}, {}
    for entry in entries:
        path, size, lfs = entry.get('path'), entry.get('size'), entry.get('lfs')
        if entry.get('type') == 'file' and isinstance(path, str):
            sizes[path], sums[path] = size, lfs.get('oid') if isinstance(lfs, dict) else None
    weights = [path for path in sizes if re.fullmatch(WEIGHTS, path)]
    kind = '.safetensors' if any('.safetensors' in path for path in weights) else '.bin'
    paths = ['config.json', *(path for path in weights if kind in path)]
    for path in paths:
        if type(sizes.get(path)) is not int or sizes[path] < 0:
            raise ValueError(f'the list of files has no size of {path}')
        if path.endswith('.json') and sizes[path] > MOST_JSON:
            raise ValueError(f'{path} is longer than {MOST_JSON:,} bytes')
    return [_File(path, sizes[path], sums[path]) for path in paths]


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check_room(folder: Path, size: int) -> None:
    """Raises OSError before anything is fetched that the disk has no room for."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f'it has {size / 1e9:,.1f} GB, and {folder} has {free / 1e9:,.1f} GB free')


def _fetch(url: str, folder: Path, file: _File) -> None:
    """A file, checked; one that is there already is not fetched again, and no byte more is read."""
    path = folder / file.path
    if _is_there(path, file.size):
        return
    write_progress(f'Downloading {url} ({file.size / 1e9:.2f} GB)')
    temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex[:8]}.incomplete')
    digest, received = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(temporary, 'wb') as out:
            while chunk := answer.read(min(2**20, file.size + 1 - received)):
                received += len(chunk)
                if received > file.size:
                    raise OSError(f'{path.name} has {file.size:,} bytes, and more came')
                out.write(chunk)
                digest.update(chunk)
        if received != file.size:
            raise OSError(f'{path.name} has {file.size:,} bytes, and {received:,} came')
        if file.sha256 not in (None, digest.hexdigest()):
            raise OSError(f'what came as {path.name} has another SHA-256 than {file.sha256}')
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
