"""Whether the token files of a dataset still hold what was hashed when they were made.

Reading 20 GB at every start would take minutes. So the size and the time of each file are kept,
with the hash, in a small file in the dataset's folder. Only where one of them differs, where there
is no such file yet, or where it is asked for, everything is hashed. The file may be deleted, and a
folder that cannot be written does without.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import UserError
from common.files import replace_file
from common.text_files import parse_json
from data.token_files import SPLITS, hash_split, import_hint, prepare_hint

CHECKED = 'checked.json'
LONG = 2**30  # bytes from which on it is worth saying that they are hashed


def verify_checksums(
    folder: Path,
    split_infos: dict[str, dict],
    splits: Sequence[str] = SPLITS,
    *,
    full: bool = False,
    report: Callable[[str], object] = lambda text: None,
) -> dict[str, str]:
    """The SHA-256 of each of the `splits`, which `split_infos`, of meta.json, describe.

    full: hash everything, whatever is known. Raises UserError for what is not as meta.json says.
    """
    known, current, problems = _read(folder), {}, []
    for split in splits:
        files = _sizes_and_times(folder, split_infos[split])
        entry = known.get(split, {})
        expected = split_infos[split]['sha256'] or entry.get('sha256')
        if not full and entry == {'sha256': expected, 'files': files}:
            current[split] = entry
            continue
        size = sum(size for size, _ in files.values())
        if size >= LONG:
            report(
                f'Checking the {split} split of {folder} by its SHA-256: {size / 1e9:,.1f} GB ...'
            )
        sha256, differences = hash_split(folder, split_infos[split])
        problems += differences
        current[split] = {'sha256': sha256, 'files': files}
    if problems:
        raise UserError(*problems, _recovery_hint(folder))
    if any(known.get(split) != entry for split, entry in current.items()):
        _write(folder, {**known, **current})
    return {split: entry['sha256'] for split, entry in current.items()}


def record_checksums(folder: Path, split_infos: dict[str, dict]) -> None:
    """Note that the files have just been read and hashed, as `split_infos`, of meta.json, say."""
    files = {split: _sizes_and_times(folder, split_infos[split]) for split in SPLITS}
    _write(folder, {s: {'sha256': split_infos[s]['sha256'], 'files': files[s]} for s in SPLITS})


def _recovery_hint(folder: Path) -> str:
    again = prepare_hint(folder)
    if not (folder / 'prepare.py').exists():
        again = 'To prepare it again: the command that made it, such as data/prepare.py'
    return (
        f'The tokens in {folder} are not those that its meta.json describes: they were changed '
        f'afterwards, or are damaged. {again}. To use them as they are: {import_hint(folder)}'
    )


def _sizes_and_times(folder: Path, split_info: dict) -> dict[str, list[int]]:
    """Size and time of each file of a split. Raises UserError."""
    stamps = {}
    for shard in split_info['shards']:
        path = folder / shard['file']
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f'{path} cannot be read: {error.strerror}.') from None
        stamps[shard['file']] = [stat.st_size, stat.st_mtime_ns]
    return stamps


def _read(folder: Path) -> dict[str, dict]:
    try:
        known = parse_json((folder / CHECKED).read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {split: entry for split, entry in known.items() if isinstance(entry, dict)}


def _write(folder: Path, known: dict[str, dict]) -> None:
    with contextlib.suppress(OSError):
        replace_file(folder / CHECKED, (json.dumps(known, indent=1) + '\n').encode())
