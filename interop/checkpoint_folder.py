"""A folder in Hugging Face's form: which of its files hold weights, and what its JSON says."""

import json
from pathlib import Path

MAX_JSON_BYTES = 2**26  # bytes: the longest index of a model's shards is a tenth of that


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: one, or those that an index names; none if there are none.

    Raises OSError, or ValueError for an index that is none.
    """
    for whole in ('model.safetensors', 'pytorch_model.bin'):
        index = folder / f'{whole}.index.json'
        if (folder / whole).is_file():
            return [folder / whole]
        if index.is_file():
            shards = read_json_object(index).get('weight_map')
            names = [*shards.values()] if isinstance(shards, dict) else [None]
            if not all(isinstance(name, str) and Path(name).name for name in names):
                raise ValueError(f'{index.name} has no weight_map of tensors to files')
            # A name and no path: an index is data, and must not reach outside its folder.
            return [folder / name for name in sorted({Path(str(name)).name for name in names})]
    return []


def read_json_object(path: Path) -> dict:
    """The JSON object in a file of somebody's. Raises OSError, or ValueError saying what it is."""
    with open(path, 'rb') as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f'{path.name} is longer than {MAX_JSON_BYTES:,} bytes')
    try:
        values = json.loads(content)
    except RecursionError:
        raise ValueError(f'{path.name} is nested too deeply') from None
    except ValueError as error:
        raise ValueError(f'{path.name} is no JSON ({error})') from error
    if not isinstance(values, dict):
        raise ValueError(f'{path.name} is no JSON object')
    return values
