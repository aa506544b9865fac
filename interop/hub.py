"""Models of the Hugging Face hub, by the package huggingface_hub.

Its cache is the one that Hugging Face's own programs share; resuming, logging in, proxies and what
its environment variables say (HF_HUB_CACHE, HF_HOME, HF_ENDPOINT, HF_TOKEN) are its own. Only a
model's config and weights are fetched, and nothing is run.
"""

import importlib
import re
from pathlib import Path
from types import ModuleType

from common.console_output import write_progress
from common.errors import UserError
from common.packages import optional_package
from interop.checkpoint_folder import weight_files

ORGANIZATION = 'openai-community/'  # its models were once called by their names alone
CONFIG = 'config.json'
SAFETENSORS = ['model.safetensors', 'model-*-of-*.safetensors', 'model.safetensors.index.json']
# Of models that have no others; they are unpickled as tensors, never as code.
PICKLED = ['pytorch_model.bin', 'pytorch_model-*-of-*.bin', 'pytorch_model.bin.index.json']


def model_folder(source: str, name: str) -> Path:
    """The folder that holds the model `name`, downloaded if it must be.

    source: how the user called it, for messages. Raises UserError saying what was tried.
    """
    if not re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', name):
        raise UserError(f'{source}: there is no folder {name}.')
    hub = optional_package(
        'huggingface_hub', f'{source}: there is no such folder, and models on the hub'
    )
    cached = find_cached(hub, name)
    if cached:
        return cached
    constants = importlib.import_module('huggingface_hub.constants')
    write_progress(f'Downloading {constants.ENDPOINT}/{name}')
    try:
        for weights in (SAFETENSORS, PICKLED):
            folder = Path(hub.snapshot_download(name, allow_patterns=[CONFIG, *weights]))
            if weight_files(folder):
                break
    except Exception as error:  # of the network, the hub, the disk, or a package's own
        raise UserError(
            f'{source}: no folder here and no model in the cache {constants.HF_HUB_CACHE} is '
            f'called {name}, and {constants.ENDPOINT}/{name} could not be downloaded '
            f'({_reason(error)}). Download it where it can be (hf download {name}), and give '
            'the folder that holds its config.json and model.safetensors: --init_from=hf:FOLDER.'
        ) from error
    return folder


def find_cached(hub: ModuleType, name: str) -> Path | None:
    """The folder of the model in the cache, if all of it is there."""
    for cached_name in (name, name.removeprefix(ORGANIZATION)):
        for weights in (SAFETENSORS, PICKLED):
            try:
                path = hub.snapshot_download(
                    cached_name, allow_patterns=[CONFIG, *weights], local_files_only=True
                )
                folder = Path(path)
                files = weight_files(folder)
            except (OSError, ValueError):  # not there, or not whole
                continue
            if files and all(path.is_file() for path in [folder / CONFIG, *files]):
                return folder
    return None


def _reason(error: Exception) -> str:
    """What went wrong, in a few words."""
    errors = importlib.import_module('huggingface_hub.errors')
    if isinstance(error, errors.GatedRepoError):
        return 'it is restricted: ask for access on that page, then log in by `hf auth login`'
    if isinstance(error, errors.RepositoryNotFoundError):
        return 'there is no such model, or it is private: log in by `hf auth login`'
    if isinstance(error, errors.LocalEntryNotFoundError):
        return 'the hub cannot be reached'
    if isinstance(error, OSError) and error.errno:
        return f'{error.strerror}; HF_HOME=FOLDER names another folder for the cache'
    return f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ""}'
