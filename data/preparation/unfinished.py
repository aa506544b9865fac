"""The folder of an unfinished preparation: check its settings and keep the part that is valid.

`settings.json` has the settings and `files.json` the input files. If some of these have changed,
because a bad file was fixed, removed or added, the work continues after the last batch that is
unaffected by the change.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.console_output import write_progress
from common.errors import UserError
from common.files import replace_file
from data.preparation.sources import DocumentSource
from data.preparation.token_writer import read_positions, truncate_journal

SETTINGS, FILES, TOKENIZER = 'settings.json', 'files.json', 'made_tokenizer.json'
FORMER_TOKENIZER = 'former_tokenizer.json'  # built from the files before the change
CONTENT = ('files', 'bytes', 'listing')  # keys of a source's identity that describe its files


def open_unfinished(work: Path, source: DocumentSource, settings: dict, restart: bool) -> None:
    """Make `work` a folder with these settings, and keep the batches in it that are still valid.

    Raises UserError if it contains a preparation with other settings.
    """
    before = None if restart else _read(work / SETTINGS)
    positions = read_positions(work) if before else []
    settings = json.loads(json.dumps(settings))
    if before is None or not positions:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    elif _without_content(before) != _without_content(settings):
        raise UserError(
            f'{work} contains an unfinished preparation with other settings: '
            f'{"; ".join(_differences(before, settings))}. Run the earlier command to continue it, '
            'or add --restart to delete it.'
        )
    elif before == settings:
        return
    else:
        unchanged = source.count_unchanged(_read(work / FILES) or [], positions)
        truncate_journal(work, unchanged)
        write_progress(
            f'The files have changed. Of {len(positions):,} batches done, {unchanged:,} precede '
            'the change and are kept.'
        )
        if (work / TOKENIZER).exists():
            os.replace(work / TOKENIZER, work / FORMER_TOKENIZER)
    write_json(work / FILES, source.files())
    write_json(work / SETTINGS, settings)


def load_or_make_tokenizer(work: Path, make) -> dict:
    """The tokenizer built from the corpus: the saved one, else the result of `make()`.

    If the files have changed and the tokenizer with them, all batches are discarded.
    """
    if made := _read(work / TOKENIZER):
        return made
    tokenizer, former = make(), _read(work / FORMER_TOKENIZER)
    if former not in (None, tokenizer):
        write_progress('The tokenizer built from the files has changed too. Starting over.')
        truncate_journal(work, 0)
    write_json(work / TOKENIZER, tokenizer)
    (work / FORMER_TOKENIZER).unlink(missing_ok=True)
    return tokenizer


def write_json(path: Path, value) -> None:
    """Write a JSON file atomically."""
    replace_file(path, (json.dumps(value, indent=1) + '\n').encode())


def _read(path: Path):
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def _without_content(settings: dict) -> dict:
    source = {key: value for key, value in settings['source'].items() if key not in CONTENT}
    return {**settings, 'source': source}


def _differences(before: dict, now: dict) -> Iterator[str]:
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new and key == 'listing':
            yield 'the files, their sizes or their times have changed'
        elif old != new:
            yield f'{key} was {old!r}, now {new!r}'
