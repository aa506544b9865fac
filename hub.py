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
import urllib.request
import uuid
from pathlib import Path

from console_output import write_progress
from errors import UserError
from token_data import exclusive

TIMEOUT = 30  # seconds of silence
ORGANISATION = 'openai-community/'  # its models were once called by their names alone
# The weights of a whole model, in one file or several. Not those of other frameworks.
WEIGHTS = r'(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?'


def model_folder(asked: str, name: str) -> Path:
    """The folder that holds the model `name`, downloaded if it must be.

    asked: how the user called it, for messages. Raises UserError saying what was tried.
    """
    cached = find_cached(name)
    if cached:
        return cached
    if not re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', name):
        raise UserError(f'{asked}: there is no folder {name}.')
    home = cache_folder() / _folder_name(name)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f'{asked}: the cache {cache_folder()} has no such model, and cannot be written to '
            f'({error.strerror}): HF_HOME=FOLDER names another.'
        ) from error
    with exclusive(home / 'download.lock.tmp', f'another process downloads {name}: waiting'):
        return find_cached(name) or _download(asked, name, home)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: one, or those that an index names; none if there are none.

    Raises OSError or ValueError for an index that cannot be read.
    """
    for whole in ('model.safetensors', 'pytorch_model.bin'):
        index = folder / f'{whole}.index.json'
        if (folder / whole).is_file():
            return [folder / whole]
        if index.is_file():
            shards = json.loads(index.read_text(encoding='utf-8'))['weight_map'].values()
            # A name and no path: an index is data, and must not reach outside its folder.
            return [folder / Path(shard).name for shard in sorted(set(shards))]
    return []


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
        except (OSError, ValueError, KeyError, AttributeError):  # not there, or not whole
            continue
        if files and all(path.is_file() for path in [folder / 'config.json', *files]):
            return folder
    return None


def _folder_name(name: str) -> str:
    return f'models--{name.replace("/", "--")}'


def _endpoint() -> str:
    return (os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')


def _download(asked: str, name: str, home: Path) -> Path:
    """Fetch config and weights into the cache, each whole before it has its name."""
    try:
        revision = _json(f'{_endpoint()}/api/models/{name}/revision/main')['sha']
        if not re.fullmatch(r'[0-9a-f]{40}', revision):
            raise ValueError(f'{revision!r} is no revision')
        folder = home / 'snapshots' / revision
        folder.mkdir(parents=True, exist_ok=True)
        for file in _wanted(_json(f'{_endpoint()}/api/models/{name}/tree/{revision}')):
            url = f'{_endpoint()}/{name}/resolve/{revision}/{file["path"]}'
            _fetch(url, folder / file['path'], file['size'], file.get('lfs', {}).get('oid'))
        (home / 'refs').mkdir(exist_ok=True)
        (home / 'refs' / 'main').write_text(revision, encoding='utf-8')
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{asked}: no folder here and no model in the cache {cache_folder()} is called '
            f'{name}, and {_endpoint()}/{name} could not be downloaded ({type(error).__name__}: '
            f'{error}). Download it where it can be (pip install huggingface_hub; hf download '
            f'{name}), and give the folder that holds its config.json and model.safetensors: '
            f'--init_from=hf:FOLDER.'
        ) from error
    return folder


def _json(url: str):
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        return json.load(answer)


def _wanted(listing: list[dict]) -> list[dict]:
    """Of a repository's files the config and the weights, preferably not pickled."""
    files = {file['path']: file for file in listing if file['type'] == 'file'}
    weights = [path for path in files if re.fullmatch(WEIGHTS, path)]
    kind = '.safetensors' if any('.safetensors' in path for path in weights) else '.bin'
    return [files['config.json'], *(files[path] for path in weights if kind in path)]


def _fetch(url: str, path: Path, size: int, sha256: str | None) -> None:
    """A file of `size` bytes, checked; one that is there already is not fetched again."""
    if path.is_file() and path.stat().st_size == size:
        return
    write_progress(f'Downloading {url} ({size / 1e9:.2f} GB)')
    temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex[:8]}.incomplete')
    digest, received = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(temporary, 'wb') as file:
            while chunk := answer.read(2**20):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
        if received != size:
            raise OSError(f'{path.name} has {size:,} bytes, and {received:,} came')
        if sha256 not in (None, digest.hexdigest()):
            raise OSError(f'what came as {path.name} has another SHA-256 than {sha256}')
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
