"""The folder of an unfinished preparation: whether it is of the same thing, and what of it holds.

`settings.json` says what is prepared, and `files.json` of which files. Where some of them are no
longer what they were, because a bad one was mended, removed or added, the work goes on after the
last piece that no change reaches.
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
FORMER_TOKENIZER = 'former_tokenizer.json'  # made of the files as they were before
CONTENT = ('files', 'bytes', 'listing')  # what a source says of its files


def open_unfinished(work: Path, source: DocumentSource, settings: dict, restart: bool) -> None:
    """See to it that `work` is a folder of these settings, with what of its work holds.

    Raises UserError if it holds work of other settings.
    """
    before = None if restart else _read(work / SETTINGS)
    positions = read_positions(work) if before else []
    settings = json.loads(json.dumps(settings))
    if before is None or not positions:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    elif _without_content(before) != _without_content(settings):
        raise UserError(
            f'{work} holds an unfinished preparation of something else: '
            f'{"; ".join(_differences(before, settings))}. Give the same command as then to go '
            'on with it, or --restart to throw it away.'
        )
    elif before == settings:
        return
    else:
        unchanged = source.count_unchanged(_read(work / FILES) or [], positions)
        truncate_journal(work, unchanged)
        write_progress(
            f'The files have changed since. Of {len(positions):,} pieces that were done, '
            f'{unchanged:,} come before the change and are kept.'
        )
        if (work / TOKENIZER).exists():
            os.replace(work / TOKENIZER, work / FORMER_TOKENIZER)
    write_json(work / FILES, source.files())
    write_json(work / SETTINGS, settings)


def load_or_make_tokenizer(work: Path, make) -> dict:
    """The tokenizer that is made of the corpus by `make()`, or that was before.

    Where the files have changed and with them the tokenizer, no token of before holds.
    """
    if made := _read(work / TOKENIZER):
        return made
    tokenizer, former = make(), _read(work / FORMER_TOKENIZER)
    if former not in (None, tokenizer):
        write_progress('The tokenizer that is made of the files has changed too: all is done anew.')
        truncate_journal(work, 0)
    write_json(work / TOKENIZER, tokenizer)
    (work / FORMER_TOKENIZER).unlink(missing_ok=True)
    return tokenizer


def write_json(path: Path, value) -> None:
    """Write a JSON file whole or not at all."""
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
            yield 'the files, their sizes or their times have changed since'
        elif old != new:
            yield f'{key} was {old!r}, now {new!r}'
