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
from data.token_files import SPLITS, hash_split, import_hint, way_to_prepare

CHECKED = 'checked.json'
LONG = 2**30  # bytes from which on it is worth saying that they are hashed


def check_content(
    folder: Path,
    facts: dict[str, dict],
    splits: Sequence[str] = SPLITS,
    *,
    full: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, str]:
    """The SHA-256 of each of the `splits`, which `facts`, of meta.json, describe.

    full: hash everything, whatever is known. Raises UserError for what is not as meta.json says.
    """
    known, fresh, problems = _read(folder), {}, []
    for split in splits:
        files = _stamps(folder, facts[split])
        checked = known.get(split, {})
        expected = facts[split]['sha256'] or checked.get('sha256')
        if not full and checked == {'sha256': expected, 'files': files}:
            fresh[split] = checked
            continue
        size = sum(size for size, _ in files.values())
        if size >= LONG:
            say(f'Checking the {split} split of {folder} by its SHA-256: {size / 1e9:,.1f} GB ...')
        sha256, differences = hash_split(folder, facts[split])
        problems += differences
        fresh[split] = {'sha256': sha256, 'files': files}
    if problems:
        raise UserError(*problems, _way_on(folder))
    if any(known.get(split) != checked for split, checked in fresh.items()):
        _write(folder, {**known, **fresh})
    return {split: checked['sha256'] for split, checked in fresh.items()}


def remember(folder: Path, facts: dict[str, dict]) -> None:
    """Note that the files have just been read and hashed, as `facts`, of meta.json, say."""
    files = {split: _stamps(folder, facts[split]) for split in SPLITS}
    _write(folder, {s: {'sha256': facts[s]['sha256'], 'files': files[s]} for s in SPLITS})


def _way_on(folder: Path) -> str:
    again = way_to_prepare(folder)
    if not (folder / 'prepare.py').exists():
        again = 'To prepare it again: the command that made it, such as data/prepare.py'
    return (
        f'The tokens in {folder} are not those that its meta.json describes: they were changed '
        f'afterwards, or are damaged. {again}. To use them as they are: {import_hint(folder)}'
    )


def _stamps(folder: Path, facts: dict) -> dict[str, list[int]]:
    """Size and time of each file of a split. Raises UserError."""
    stamps = {}
    for shard in facts['shards']:
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
    return {split: checked for split, checked in known.items() if isinstance(checked, dict)}


def _write(folder: Path, known: dict[str, dict]) -> None:
    with contextlib.suppress(OSError):
        replace_file(folder / CHECKED, (json.dumps(known, indent=1) + '\n').encode())
