"""Download models from the Hugging Face hub, with the package huggingface_hub.

That package handles the shared cache, resuming, login, proxies and its environment variables
(HF_HUB_CACHE, HF_HOME, HF_ENDPOINT, HF_TOKEN). Only a model's config and weights are downloaded,
and no code is run.
"""

import importlib
import re
from pathlib import Path
from types import ModuleType

from common.console_output import write_progress
from common.errors import UserError
from common.packages import optional_package
from interop.checkpoint_folder import weight_files

ORGANIZATION = 'openai-community/'  # its models may be given without it, as in transformers
CONFIG = 'config.json'
SAFETENSORS = ['model.safetensors', 'model-*-of-*.safetensors', 'model.safetensors.index.json']
# Weights of models without safetensors; they are unpickled as tensors, never as code.
PICKLED = ['pytorch_model.bin', 'pytorch_model-*-of-*.bin', 'pytorch_model.bin.index.json']


def model_folder(source: str, name: str) -> Path:
    """The folder of the model `name`, downloaded if necessary.

    source: the user's value of init_from, for messages. Raises UserError.
    """
    if not re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', name):
        raise UserError(f'{source}: the folder {name} does not exist.')
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
            f'{source}: {name} is neither a folder nor in the cache {constants.HF_HUB_CACHE}, '
            f'and {constants.ENDPOINT}/{name} could not be downloaded ({_reason(error)}). '
            f'Download it elsewhere (hf download {name}), and give the folder of its config.json '
            'and model.safetensors: --init_from=hf:FOLDER.'
        ) from error
    return folder


def find_cached(hub: ModuleType, name: str) -> Path | None:
    """The folder of the model in the cache, if it is complete."""
    for cached_name in (name, name.removeprefix(ORGANIZATION)):
        for weights in (SAFETENSORS, PICKLED):
            try:
                path = hub.snapshot_download(
                    cached_name, allow_patterns=[CONFIG, *weights], local_files_only=True
                )
                folder = Path(path)
                files = weight_files(folder)
            except (OSError, ValueError):  # missing or incomplete
                continue
            if files and all(path.is_file() for path in [folder / CONFIG, *files]):
                return folder
    return None


def _reason(error: Exception) -> str:
    """The reason of a failed download, in a few words."""
    errors = importlib.import_module('huggingface_hub.errors')
    if isinstance(error, errors.GatedRepoError):
        return 'it is restricted: ask for access on that page, then log in by `hf auth login`'
    if isinstance(error, errors.RepositoryNotFoundError):
        return 'there is no such model, or it is private: log in by `hf auth login`'
    if isinstance(error, errors.LocalEntryNotFoundError):
        return 'the hub cannot be reached'
    if isinstance(error, OSError) and error.errno:
        return f'{error.strerror}; HF_HOME=FOLDER sets another folder for the cache'
    return f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ""}'
