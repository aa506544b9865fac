"""Sources of documents: their content, resumption from any position, errors for bad files."""

import bz2
import glob
import gzip
import json
import lzma
import os
import re
import sys

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from common import text_files
from common.errors import UserError
from data.preparation import corpus_files, file_readers, sources
from data.preparation.corpus_files import find_files
from data.preparation.documents import InvalidDocument
from data.preparation.sources import FileSource, HuggingFaceSource, SourcePosition

pytestmark = pytest.mark.optional

TEXTS = [f'Document {i} — naïve\n' * (1 + i % 7) for i in range(60)]


def lines_of(texts):
    return ''.join(json.dumps({'id': i, 'text': text}) + '\n' for i, text in enumerate(texts))


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """A folder with a file of each kind, which together contain TEXTS in order."""
    folder = tmp_path_factory.mktemp('corpus')
    (folder / 'a.txt').write_text(TEXTS[0], encoding='utf-8')
    (folder / 'b.jsonl').write_text(lines_of(TEXTS[1:20]).replace('\n', '\n\n', 3))
    with gzip.open(folder / 'c.jsonl.gz', 'wt') as file:
        file.write(lines_of(TEXTS[20:40]))
    table = pyarrow.table({'id': list(range(19)), 'text': TEXTS[40:59]})
    parquet.write_table(table, folder / 'd.parquet', row_group_size=7)
    (folder / 'sub').mkdir()
    (folder / 'sub' / 'e.md').write_text('\ufeff' + TEXTS[59], encoding='utf-8')
    for name in ('image.png', '.hidden.txt', '.git/x.txt'):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b'\xff')
    return folder


def files(*names, field='text', cut=2**24, max_documents=None):
    return FileSource(list(map(str, names)), field, cut, max_documents)


def valid_texts(source, position=None):
    return [document.text() for batch in source.batches(position) for document in batch.documents]


def through_json(position):
    return SourcePosition(*json.loads(json.dumps(position)))


def test_documents_of_every_file_kind(corpus):
    source = files(corpus)
    assert valid_texts(source) == TEXTS
    assert source.total == sum(os.path.getsize(path) for path in source.paths)
    assert len(source.paths) == 5


@pytest.mark.parametrize('size', [1, 300, 2000])
def test_source_continues_from_any_position(corpus, monkeypatch, size):
    monkeypatch.setattr(sources, 'BATCH_BYTES', size)
    monkeypatch.setattr(file_readers, 'ROWS', 4)
    batches = list(files(corpus).batches())
    done = [batch.position.done for batch in batches]
    assert done == sorted(done) and done[-1] == files(corpus).total
    given_so_far = 0
    for number, batch in enumerate(batches):
        given_so_far += len(batch.documents)
        assert batch.position.given == given_so_far
        assert list(files(corpus).batches(through_json(batch.position))) == batches[number + 1 :]


@pytest.mark.parametrize('limit', [1, 25, 59, 60, 61])
def test_max_documents(corpus, monkeypatch, limit):
    monkeypatch.setattr(sources, 'BATCH_BYTES', 300)
    source = files(corpus, max_documents=limit)
    assert valid_texts(source) == TEXTS[:limit]
    batches = list(source.batches())
    assert valid_texts(source, batches[-1].position) == []


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('ab \n\ré日😀'), max_size=400), st.integers(4, 60))
def test_parts_of_long_text_join_to_whole(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / f'cut_{os.getpid()}.txt'
    path.write_bytes(text.encode())
    documents = [
        document for batch in files(path, cut=size).batches() for document in batch.documents
    ]
    parts = [document.text() for document in documents]
    assert ''.join(parts) == text
    sizes = [len(part.encode()) for part in parts]
    assert all(size - 3 <= part <= 2 * size for part in sizes[:-1])
    assert not sizes or sizes[-1] <= 2 * size
    assert [document.place for document in documents] == (
        [str(path)] if len(parts) == 1 else [f'{path}, part {i + 1}' for i in range(len(parts))]
    )


def test_texts_are_cut_at_blank_lines(tmp_path):
    (tmp_path / 'a.txt').write_text(''.join(f'line {i}\nline\n\n' for i in range(100)))
    parts = valid_texts(files(tmp_path, cut=100))
    assert len(parts) > 5 and all(part.endswith('line\n\n') for part in parts)
    assert len(valid_texts(files(tmp_path, cut=100_000))) == 1
    (tmp_path / 'a.txt').write_bytes(b'\x80' * 1000)
    with pytest.raises(InvalidDocument, match='part 1 is not UTF-8'):
        valid_texts(files(tmp_path, cut=100))


ROWS = {
    'not valid JSON': b'{"text": "a"}\n{"text": \n',
    'not a JSON object': b'{"text": "a"}\n["text"]\n',
    "no field 'text'. Its fields: 'txt', 'url'. Did you mean txt\\? .*--field=txt": (
        b'{"text": "a"}\n{"txt": "b", "url": 1}\n'
    ),
    'not text but NoneType': b'{"text": "a"}\n{"text": null}\n',
    'not valid JSON: .*utf-8': b'{"text": "a"}\n{"text": "\xff"}\n',
}


@pytest.mark.parametrize('message', ROWS)
def test_invalid_line_is_named(tmp_path, message):
    path = tmp_path / 'rows.jsonl'
    path.write_bytes(ROWS[message])
    first, second = (document for batch in files(path).batches() for document in batch.documents)
    assert first.text() == 'a'
    with pytest.raises(InvalidDocument, match=rf'rows\.jsonl, line 2.*{message}'):
        second.text()


def damaged(tmp_path, kind):
    path = tmp_path / f'damaged.{kind}'
    if kind == 'jsonl.gz':
        whole = gzip.compress(lines_of(TEXTS).encode())
        path.write_bytes(whole[:-20])
    elif kind == 'txt':
        path.write_bytes(b'text\xff')
    elif kind == 'md':
        path.symlink_to('nowhere')
    else:
        path.write_bytes(b'junk' * 100)
    return path


@pytest.mark.parametrize(
    'kind, message',
    [
        ('jsonl.gz', 'cannot be read: .*end-of-stream'),
        ('txt', 'not UTF-8 text: invalid start byte at byte 4'),
        ('md', 'cannot be read: No such file'),
        ('parquet', 'cannot be read: .*[Pp]arquet'),
        ('jsonl', 'line 1 is not valid JSON'),
    ],
)
def test_damaged_file_is_named_and_skipped(tmp_path, kind, message):
    path = damaged(tmp_path, kind)
    (tmp_path / 'next.txt').write_text('fine')
    source = files(path, tmp_path / 'next.txt')
    *_, bad, last = (document for batch in source.batches() for document in batch.documents)
    with pytest.raises(InvalidDocument, match=rf'damaged\.{kind}.*{message}'):
        bad.text()
    assert last.text() == 'fine'


def test_overlong_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(file_readers, 'LINE_LIMIT', 1000)
    (tmp_path / 'a.jsonl').write_bytes(lines_of(TEXTS[:3]).encode() + b'x' * 5000)
    *good, bad = (document for batch in files(tmp_path).batches() for document in batch.documents)
    assert [document.text() for document in good] == TEXTS[:3]
    with pytest.raises(InvalidDocument, match=r'a\.jsonl cannot be read: line 4 is longer'):
        bad.text()


def test_parquet_without_the_field(corpus):
    with pytest.raises(
        InvalidDocument, match=r"d\.parquet, row 1 has no field 'txt'\. Its fields: 'id', 'text'"
    ):
        valid_texts(files(corpus / 'd.parquet', field='txt'))
    with pytest.raises(InvalidDocument, match=r"the field 'id' is not text but int"):
        valid_texts(files(corpus / 'd.parquet', field='id'))


def test_files_folders_and_patterns(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    everything = ['a.txt', 'b.jsonl', 'c.jsonl.gz', 'd.parquet', 'sub/e.md']
    assert find_files(['.']).paths == [f'./{name}' for name in everything]
    assert find_files(['sub', str(corpus), 'a.txt']).paths[0] == 'sub/e.md'
    assert len(find_files(['sub', str(corpus), 'a.txt']).paths) == 5  # each file once
    assert find_files(['*.txt', '**/*.md']) == (['a.txt', 'sub/e.md'], [])
    assert find_files(['image.png']).paths == ['image.png']  # the user names it: read as text


PATTERNS = ['**', '**/*', '**/*.txt', 'a/**/*.txt', 'a/**/b/*', '*/**/*.t?t', '**/b/**', 'a/*.txt']


@pytest.mark.parametrize('pattern', PATTERNS)
def test_pattern_expands_like_glob(tmp_path, monkeypatch, pattern):
    for name in (
        'x.txt',
        'a/x.txt',
        'a/b/x.txt',
        'a/b/c/y.tat',
        'b/b/z',
        '.hidden/x.txt',
        'c[1]/x.txt',
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for base in ('', f'{tmp_path}/', './'):
        theirs = {
            os.path.normpath(path)
            for path in glob.glob(base + pattern, recursive=True)
            if os.path.normpath(path) not in ('.', str(tmp_path), 'a')
        }
        ours = {os.path.normpath(path) for path in corpus_files.expand_pattern(base + pattern)}
        assert ours - {'a'} == theirs and ours


@pytest.fixture
def linked(tmp_path):
    """A corpus with links of every kind to another disk, and its names of the files."""
    corpus, disk = tmp_path / 'corpus', tmp_path / 'disk'
    for folder in (corpus / 'own', disk / 'deep'):
        folder.mkdir(parents=True)
    for name in ('corpus/a.txt', 'corpus/own/b.txt', 'disk/c.txt', 'disk/deep/d.txt', 'e.txt'):
        (tmp_path / name).write_text(name)
    (corpus / 'away').symlink_to(disk)
    (corpus / 'away_too').symlink_to(disk / 'deep')  # a second link to the same folder
    (corpus / 'an_own').symlink_to(corpus / 'own')  # its real name counts, though it comes later
    (corpus / 'f.txt').symlink_to(tmp_path / 'e.txt')
    (corpus / 'g.txt').symlink_to(corpus / 'a.txt')  # a file under two names is two documents
    for loop in (corpus / 'loop', disk / 'deep' / 'loop', disk / 'up'):
        loop.symlink_to(corpus)
    (corpus / 'self').symlink_to('self')
    return corpus, ['a.txt', 'away/c.txt', 'away/deep/d.txt', 'f.txt', 'g.txt', 'own/b.txt']


def test_linked_folders_are_read_once(linked):
    corpus, names = linked
    expected = [str(corpus / name) for name in names]
    paths, (note,) = find_files([str(corpus)])
    assert paths == expected
    assert 'Skipped in' in note and '1 of them broken links' in note and 'self' in note
    for other in (
        [f'{corpus}/**/*.txt'],
        [str(corpus), str(corpus / 'away')],
        [f'{corpus}/*', str(corpus)],
    ):
        targets = [path for path in find_files(other).paths if not path.endswith('self')]
        assert sorted(map(os.path.realpath, targets)) == sorted(map(os.path.realpath, expected))


def test_skipped_files_of_folder_are_named(tmp_path):
    for name in ('a.txt', 'b.py', 'c.py', 'd.json', 'e', 'f.tar.gz', '.hidden.py'):
        (tmp_path / name).touch()
    paths, (note,) = find_files([str(tmp_path)])
    assert paths == [str(tmp_path / 'a.txt')]
    assert "5 files, 2 that end in '.py'" in note and "1 that end in '.json'" in note
    assert "1 that end in '.tar.gz'" in note and '1 without a suffix' in note


def test_unreadable_folder_is_an_error(linked, monkeypatch):
    corpus, _ = linked
    scandir = os.scandir

    def denied(path):
        if str(path).endswith('deep'):
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', denied)
    with pytest.raises(UserError, match=r'away/deep cannot be read: Permission denied'):
        find_files([str(corpus)])


# --- Forms of JSON --------------------------------------------------------------------------------


COMPRESS = {
    '': bytes,
    '.gz': gzip.compress,
    '.bz2': bz2.compress,
    '.xz': lzma.compress,
    '.zst': corpus_files.zstandard().compress,
}
FORMS = {
    'a.jsonl': lines_of(TEXTS),
    'a.ndjson': lines_of(TEXTS),
    'lines.json': lines_of(TEXTS),
    'array.json': json.dumps([{'text': text} for text in TEXTS]),
    'pretty.json': json.dumps([{'text': text} for text in TEXTS], indent=2),
    'array.jsonl': '[\n' + lines_of(TEXTS).replace('\n', ',\n')[:-2] + '\n]\n',
    'objects.json': ''.join(json.dumps({'text': text}, indent=1) for text in TEXTS),
    'windows.json': '\ufeff' + json.dumps([{'text': text} for text in TEXTS], ensure_ascii=False),
}


@pytest.mark.parametrize('compression', COMPRESS)
@pytest.mark.parametrize('form', FORMS)
def test_all_forms_of_json_are_read(tmp_path, monkeypatch, form, compression):
    monkeypatch.setattr(sources, 'BATCH_BYTES', 300)
    monkeypatch.setattr(text_files, 'CHUNK', 64)
    path = tmp_path / (form + compression)
    path.write_bytes(COMPRESS[compression](FORMS[form].encode()))
    batches = list(files(path).batches())
    assert [document.text() for batch in batches for document in batch.documents] == TEXTS
    for batch in batches[::5]:
        rest = valid_texts(files(path), through_json(batch.position))
        assert rest == TEXTS[batch.position.given :]
    if compression or not form.endswith('.json'):  # otherwise a pattern has to name the file
        assert find_files([str(tmp_path)]).paths == [str(path)]


def test_compressed_texts_are_cut(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text(''.join(TEXTS))
    plain = [
        r.content for batch in files(tmp_path / 'a.txt', cut=500).batches() for r in batch.documents
    ]
    assert len(plain) > 5
    for compression, compress in COMPRESS.items():
        path = tmp_path / f'b.txt{compression}'
        path.write_bytes(compress(''.join(TEXTS).encode()))
        cut = [r.content for batch in files(path, cut=500).batches() for r in batch.documents]
        assert cut == plain
        assert valid_texts(files(path)) == [''.join(TEXTS)]


@pytest.mark.parametrize(
    'name, content, message',
    [
        (
            'a.json',
            '[{"text": "a"}, {"text": "b"} {"text": "c"}]',
            'row 3 is not valid JSON: .* , or ] is',
        ),
        ('a.json', '[{"text": "a"}, {"text": "b"', 'row 2 is not valid JSON: it is cut off'),
        ('a.json', '[{"text": "a"}, {"text": nul}]', 'row 2 is not valid JSON: Expecting value'),
        ('a.json', '[{"text": "a"}', 'row 2 is not valid JSON: it is cut off'),
        ('a.json', '[{"text": "a"}, "b"]', 'row 2 is not a JSON object'),
        (
            'a.json',
            '[{"text": "a"}, {"text": "' + 'x' * 9999,
            'row 2 is not valid JSON: it is longer',
        ),
        ('a.tar', 'a' * 257 + 'ustar', 'a tar archive; unpack it first'),
        ('a.jsonl', '{"text": "a"}\n{"id": 1}\n', "'id'. None of its fields is text"),
    ],
)
def test_invalid_json_is_named(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(file_readers, 'LINE_LIMIT', 1000)
    monkeypatch.setattr(text_files, 'CHUNK', 64)
    (tmp_path / name).write_text(content)
    *good, bad = (r for batch in files(tmp_path / name).batches() for r in batch.documents)
    assert [document.text() for document in good] in (['a'], ['a', 'b'], [])
    with pytest.raises(InvalidDocument, match=re.escape(str(tmp_path / name)) + f'.*{message}'):
        bad.text()


@pytest.mark.parametrize('suffix', ['.gz', '.bz2', '.xz', '.zst'])
def test_damaged_compressed_files_are_named(tmp_path, suffix):
    whole = COMPRESS[suffix](lines_of(TEXTS * 20).encode())
    for content in (whole[: len(whole) // 2], b'junk' * 50):
        (tmp_path / f'a.jsonl{suffix}').write_bytes(content)
        (tmp_path / f'b.txt{suffix}').write_bytes(content)
        for name in (f'a.jsonl{suffix}', f'b.txt{suffix}'):
            *_, bad = (r for batch in files(tmp_path / name).batches() for r in batch.documents)
            with pytest.raises(InvalidDocument, match=rf'{name} cannot be read: '):
                bad.text()


def test_missing_zstandard_package(tmp_path, monkeypatch):
    for name in ('compression', 'compression.zstd', 'backports', 'backports.zstd'):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / 'a.jsonl.zst').touch()
    with pytest.raises(
        UserError, match=r'\(\.zst\) need the package .*: pip install backports\.zstd$'
    ):
        files(tmp_path)


@pytest.mark.parametrize(
    'name, message',
    [
        ('b.json', r'no file or folder b\.json\. Did you mean b\.jsonl\?'),
        ('*.csv', r'no file or folder \*\.csv'),
        ('code', r"code has no file .* 2 files that end in '\.py'.*'code/\*\*/\*\.py'"),
        ('empty', 'empty has no file .* It is empty'),
    ],
)
def test_name_without_files_is_user_error(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for folder in ('code', 'empty'):
        (tmp_path / folder).mkdir()
    for file in ('b.jsonl', 'code/x.py', 'code/y.py', 'code/z.c'):
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=message):
        find_files([name])


def test_hugging_face_dataset_is_streamed(corpus, tmp_path, monkeypatch):
    """The package streams a folder; only the origin of the bytes differs for the hub."""
    monkeypatch.setattr(sources, 'BATCH_BYTES', 300)
    (tmp_path / 'train.jsonl').write_text(lines_of(TEXTS))
    batches = list(HuggingFaceSource(str(tmp_path), None, 'train', 'text', None).batches())
    assert len(batches) > 3
    assert [document.text() for batch in batches for document in batch.documents] == TEXTS
    for number, batch in enumerate(batches):
        again = HuggingFaceSource(str(tmp_path), None, 'train', 'text', None)
        rest = [other.documents for other in again.batches(through_json(batch.position))]
        assert rest == [other.documents for other in batches[number + 1 :]]
    few = HuggingFaceSource(str(tmp_path), None, 'train', 'text', 5)
    assert valid_texts(few) == TEXTS[:5] and few.total == 5
    with pytest.raises(InvalidDocument, match=r"row 1 has no field 'txt'.*'text'"):
        valid_texts(HuggingFaceSource(str(tmp_path), None, 'train', 'txt', None))
    with pytest.raises(UserError, match=r'--hf=.* cannot be opened: .*tset'):
        HuggingFaceSource(str(tmp_path), None, 'tset', 'text', None)


def test_interrupted_download_is_user_error(tmp_path, monkeypatch):
    (tmp_path / 'train.jsonl').write_text(lines_of(TEXTS))
    source = HuggingFaceSource(str(tmp_path), None, 'train', 'text', None)

    def broken(self):
        yield {'text': 'a'}
        raise ConnectionError('no network\nand more')

    monkeypatch.setattr(datasets.IterableDataset, '__iter__', broken)
    with pytest.raises(UserError, match=r'after row 1: ConnectionError: no network$'):
        valid_texts(source)


def test_missing_package_is_named(corpus, monkeypatch):
    for name in ('pyarrow', 'datasets'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match='Parquet files need the package pyarrow: pip install pya'):
        files(corpus)
    with pytest.raises(UserError, match='pip install datasets'):
        HuggingFaceSource('openwebtext', None, 'train', 'text', None)
    assert valid_texts(files(corpus / 'a.txt')) == TEXTS[:1]
