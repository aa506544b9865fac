"""A folder in Hugging Face's format: its weight files and its JSON files."""

import json
from pathlib import Path

MAX_JSON_BYTES = 2**26  # ten times the longest index of a sharded model


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: one, those in an index, or none.

    Raises OSError, or ValueError for an invalid index.
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
            # Names only, no paths: an untrusted index must not refer to other folders.
            return [folder / name for name in sorted({Path(str(name)).name for name in names})]
    return []


def read_json_object(path: Path) -> dict:
    """The JSON object in an untrusted file. Raises OSError, or ValueError with the reason."""
    with open(path, 'rb') as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f'{path.name} is longer than {MAX_JSON_BYTES:,} bytes')
    try:
        values = json.loads(content)
    except RecursionError:
        raise ValueError(f'{path.name} is nested too deeply') from None
    except ValueError as error:
        raise ValueError(f'{path.name} is not JSON ({error})') from error
    if not isinstance(values, dict):
        raise ValueError(f'{path.name} is not a JSON object')
    return values
