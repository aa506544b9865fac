"""The files of a corpus: expand files, folders and patterns; open and decompress them."""

import bz2
import fnmatch
import glob
import gzip
import importlib
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from common.errors import UserError, did_you_mean
from common.folders import walk
from common.packages import optional_package
from common.text_files import text_problem

COMPRESSED = ('.gz', '.bz2', '.xz', '.zst')
TEXTS, LINES = ('.txt', '.md'), ('.jsonl', '.ndjson')
JSON = (*LINES, '.json')
SHOWN_SUFFIXES = 5
SNIFFED_BYTES = 2**16  # bytes read to recognize the kind of a file


class Corpus(NamedTuple):
    """The files, each once, and notes on the other files in the given folders."""

    paths: list[str]
    notes: list[str]


def kind_of(path: str) -> str:
    """The suffix of a file without that of its compression: `.json` of `a.json.gz`."""
    return os.path.splitext(stem_of(path))[1]


def stem_of(path: str) -> str:
    """The path in lower case, without the suffix of its compression."""
    stem, suffix = os.path.splitext(path.lower())
    return stem if suffix in COMPRESSED else path.lower()


def is_corpus_file(path: str) -> bool:
    """Whether a file in a given folder is read.

    A plain .json file is not: in a folder of data it usually contains metadata.
    """
    kind = kind_of(path)
    plain = stem_of(path) == path.lower()
    return kind in (*TEXTS, *LINES) or kind == ('.parquet' if plain else '.json')


READABLE = (
    f'{", ".join((*TEXTS, *LINES))} (also with {", ".join(COMPRESSED)}), .json.gz or .parquet'
)


def find_files(names: Iterable[str]) -> Corpus:
    """The files that files, folders and glob patterns expand to, each once, in that order.

    A folder expands to all files in it and its subfolders for which `is_corpus_file` is true, also
    through links, without hidden ones. Each real folder is read once, however many links lead to
    it; a link to a file counts as a file. Raises UserError for a name that expands to nothing.
    """
    paths: dict[str, str] = {}
    notes: list[str] = []
    for name in names:
        matches = [name] if os.path.lexists(name) else sorted(expand_pattern(name))
        files: list[str] = []
        others: list[str] = []
        for match in matches:
            if os.path.isdir(match):
                for file in sorted(files_below(match)):
                    (files if is_corpus_file(file) else others).append(file)
            else:
                files.append(match)
        if not files:
            raise UserError(_no_files_message(name, matches, others))
        if others:
            notes.append(f'Skipped in {name}: {_describe_files(others)}.')
        for file in files:
            folder, base = os.path.split(file)
            paths.setdefault(os.path.join(os.path.realpath(folder), base), file)
    return Corpus(list(paths.values()), notes)


def files_below(folder: str) -> Iterator[str]:
    """The files in a folder and its subfolders, without hidden ones. Raises UserError."""
    for entry in entries_below(folder):
        if not os.path.isdir(entry):
            yield entry


def entries_below(folder: str) -> Iterator[str]:
    """The files and folders below a folder, without hidden ones. Raises UserError."""
    for _, folders, files in walk(folder, _unreadable):
        folders[:] = [entry for entry in folders if not entry.name.startswith('.')]
        yield from (entry.path for entry in folders)
        yield from (entry.path for entry in files if not entry.name.startswith('.'))


def _unreadable(error: OSError) -> None:
    raise UserError(
        f'The folder {error.filename} cannot be read: {error.strerror}. Name the readable paths in '
        'it instead of the folder around it.'
    )


def expand_pattern(pattern: str) -> Iterator[str]:
    """The paths that match a pattern. `**` is any number of folders, each real one once.

    glob.glob would follow links that form a loop until a name gets too long.
    """
    parts = pattern.replace(os.sep, '/').split('/')
    if '**' not in parts:
        yield from glob.glob(pattern)
        return
    first = parts.index('**')
    base, rest = '/'.join(parts[:first]), [part for part in parts[first:] if part]
    root = '/' if pattern.startswith('/') else '.'
    for folder in filter(os.path.isdir, sorted(glob.glob(base)) if base else [root]):
        for path in entries_below(folder):
            relative = os.path.relpath(path, folder)
            if _matches(relative.split(os.sep), rest):
                yield path if folder != '.' else relative


def _matches(names: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not names
    first, *rest = patterns
    if first == '**':
        return any(_matches(names[skipped:], rest) for skipped in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], first) and _matches(names[1:], rest)


def _no_files_message(name: str, matches: list[str], others: list[str]) -> str:
    if not matches:
        parent = os.path.dirname(name) or '.'
        beside = os.listdir(parent) if os.path.isdir(parent) else []
        return f'There is no file or folder {name}.{did_you_mean(os.path.basename(name), beside)}'
    message = f'{name} has no file that ends in {READABLE}'
    if not others:
        return f'{message}. It is empty.'
    ((suffix, count),) = Counter(map(_ending, others)).most_common(1)
    message += f', but {count:,} files that end in {suffix!r}'
    example = next(path for path in others if _ending(path) == suffix)
    if problem := file_text_problem(example):
        return f'{message}. {example} is {problem}.'
    pattern = os.path.join(matches[0], '**', f'*{suffix}')
    what = 'JSON' if kind_of(example) == '.json' else 'text'
    return f"{message}. To read these as {what}, give this pattern: '{pattern}'"


def _ending(path: str) -> str:
    """The suffix of a name: .csv, .tar.gz."""
    return path[len(os.path.splitext(stem_of(path))[0]) :]


def _describe_files(paths: list[str]) -> str:
    """The suffixes of files, how many files have each, and an example."""
    dangling = [path for path in paths if not os.path.exists(path)]
    ended = Counter(_ending(path) for path in paths)
    parts = [
        f'{count:,} that end in {suffix!r}' if suffix else f'{count:,} without a suffix'
        for suffix, count in ended.most_common(SHOWN_SUFFIXES)
    ]
    if len(ended) > SHOWN_SUFFIXES:
        parts.append(
            f'{sum(ended.values()) - sum(n for _, n in ended.most_common(SHOWN_SUFFIXES)):,} others'
        )
    text = f'{len(paths):,} files, {", ".join(parts)} (such as {paths[0]})'
    if dangling:
        text += f'; {len(dangling):,} of them broken links (such as {dangling[0]})'
    return text


# --------------------------------------------------------------------------------------------------
# Reading


def zstandard():
    """Python's module for Zstandard, or its backport. Raises UserError."""
    try:
        return importlib.import_module('compression.zstd')  # from Python 3.14 on
    except ImportError:
        return optional_package('backports.zstd', 'Zstandard files (.zst)')


@contextmanager
def open_decompressed(path: str):
    """(The decompressed file, the file itself). Raises OSError for every problem with it."""
    suffix = os.path.splitext(path.lower())[1]
    unpack: dict[str, Callable] = {
        '.gz': lambda raw: gzip.GzipFile(fileobj=raw),
        '.bz2': bz2.BZ2File,
        '.xz': lzma.LZMAFile,
        '.zst': lambda raw: zstandard().ZstdFile(raw),
    }
    errors: list[type[Exception]] = [EOFError, zlib.error, lzma.LZMAError]
    if suffix == '.zst':
        errors.append(zstandard().ZstdError)
    with open(path, 'rb') as raw:
        try:
            yield unpack[suffix](raw) if suffix in unpack else raw, raw
        except tuple(errors) as error:
            raise OSError(str(error)) from error


def file_text_problem(path: str) -> str | None:
    """Why a file is not text, by its first bytes, to complete 'FILE is …'; None: it may be."""
    try:
        with open_decompressed(path) as (file, _):
            begin = file.read(SNIFFED_BYTES)
    except OSError as error:
        return f'not readable: {error.strerror or error}'
    return text_problem(begin)
