"""Check that the token files of a dataset are unchanged since they were prepared.

Hashing 20 GB at every start would take minutes. The size and time of each file are therefore
stored, with the hash, in a small file in the dataset's folder. The files are hashed only if one of
these differs, if that file does not exist, or on request. It may be deleted; in a read-only folder
it is not written.
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
LONG = 2**30  # bytes from which the hashing is announced


def verify_checksums(
    folder: Path,
    split_infos: dict[str, dict],
    splits: Sequence[str] = SPLITS,
    *,
    full: bool = False,
    report: Callable[[str], object] = lambda text: None,
) -> dict[str, str]:
    """The SHA-256 of each of the `splits`, which `split_infos` of meta.json describe.

    full: hash all files, also unchanged ones. Raises UserError for a difference from meta.json.
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
                f'Verifying the SHA-256 of the {split} split of {folder}: {size / 1e9:,.1f} GB ...'
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
    """Store that the files have just been hashed, with the result in `split_infos` of meta.json."""
    files = {split: _sizes_and_times(folder, split_infos[split]) for split in SPLITS}
    _write(folder, {s: {'sha256': split_infos[s]['sha256'], 'files': files[s]} for s in SPLITS})


def _recovery_hint(folder: Path) -> str:
    again = prepare_hint(folder)
    if not (folder / 'prepare.py').exists():
        again = 'To prepare it again, run the command that made it, such as data/prepare.py'
    return (
        f'The tokens in {folder} do not match its meta.json: they were changed later or are '
        f'damaged. {again}. To use them as they are: {import_hint(folder)}'
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
