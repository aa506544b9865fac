"""One reader for all text and JSON lines: marks, encodings, line ends, half surrogate pairs."""

import codecs
import gzip
import json
import re

import pytest
from helpers.project import PROJECT
from hypothesis import given
from hypothesis import strategies as st

import configurator
import sample
from common.errors import UserError
from common.text_files import decode, parse_json, read_lines, read_text, valid_text
from data.dataset import load_dataset
from data.preparation import shakespeare
from data.preparation.sources import FileSource

MARK = codecs.BOM_UTF8


@given(st.text(st.characters(exclude_categories=['Cs'])))
def test_a_byte_order_mark_is_no_part_of_a_text(text):
    assert decode(MARK + text.encode()) == text
    assert text.startswith('\ufeff') or decode(text.encode()) == text


@given(st.text(st.characters()))
def test_json_gives_valid_text_however_it_is_written(text):
    """Escaped or as it is, as a value and as a key: what `valid_text` makes of it."""
    for ascii in (True, False):
        line = json.dumps({text: [text]}, ensure_ascii=ascii)
        got = parse_json(MARK + line.encode('utf-8', 'surrogatepass'))
        ((key, (value,)),) = got.items()
        assert key == value == valid_text(json.loads(line)[text][0])
        value.encode()


@given(st.lists(st.text(st.characters(exclude_categories=['Cs']), min_size=1)))
def test_lines_end_at_line_feeds_alone(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp('lines') / 'a.jsonl'
    for end in ('\n', '\r\n'):
        lines = [json.dumps(text, ensure_ascii=False) for text in texts]
        path.write_bytes(MARK + end.join(lines).encode())
        assert [parse_json(line) for _, line in read_lines(path, 'x')] == texts
        assert [number for number, _ in read_lines(path, 'x')] == list(range(1, len(texts) + 1))


@pytest.mark.parametrize(
    'content, problem',
    [
        (b'caf\xe9', 'not UTF-8 text: unexpected end of data at byte 3'),
        (MARK + b'\xff', 'not UTF-8 text: invalid start byte at byte 3'),
        ('a'.encode('utf-16'), 'not UTF-8 text but UTF-16: .*iconv -f UTF-16 -t UTF-8'),
        (gzip.compress(b'a', mtime=0), 'not UTF-8 text but compressed by gzip: unpack it first'),
        (b'PK\x03\x04\xff', 'not UTF-8 text but a zip archive: unpack it first'),
    ],
)
def test_non_text_files_are_named(tmp_path, content, problem):
    (tmp_path / 'a').write_bytes(content)
    with pytest.raises(UserError, match=f'^--x=a is {problem}'):
        read_text(tmp_path / 'a', '--x=a')
    with pytest.raises(UserError, match=r'^--x=b cannot be read: No such file'):
        read_text(tmp_path / 'b', '--x=b')


def test_byte_order_marks_are_skipped_everywhere(tmp_path, tiny_dataset):
    """Each kind of input with a mark, beside the same without."""
    path = tmp_path / 'input.py'

    def with_mark(content: bytes):
        path.write_bytes(MARK + content)
        return path

    problems = []
    options, text = configurator.read_config_file(str(with_mark(b'n_layer = 2\n')), problems)
    assert (options, text, problems) == ({'n_layer': 2}, 'n_layer = 2\n', [])
    assert sample.read_prompt(f'FILE:{with_mark(b"hello")}') == 'hello'
    assert shakespeare.read_source(with_mark(b'hello'))[0] == 'hello'
    for name, content in (('a.txt', b'hello'), ('a.jsonl', b'{"text": "hello"}\n')):
        (tmp_path / name).write_bytes(MARK + content)
        (batch,) = FileSource([str(tmp_path / name)], 'text', 2**20).batches()
        assert [record.text() for record in batch.documents] == ['hello']
    meta = (tiny_dataset / 'meta.json').read_bytes()
    for name in ('train.bin', 'val.bin'):
        (tmp_path / name).write_bytes((tiny_dataset / name).read_bytes())
    (tmp_path / 'meta.json').write_bytes(MARK + meta)
    assert load_dataset(tmp_path, 8).vocab_size == 256


def test_separators_within_a_line(tmp_path):
    text = 'a\u2028b\x85c\x0cd\x1ee'
    line = json.dumps({'text': text}, ensure_ascii=False)
    (tmp_path / 'a.jsonl').write_text(f'{line}\r\n{line}\n', encoding='utf-8', newline='')
    (batch,) = FileSource([str(tmp_path / 'a.jsonl')], 'text', 2**20).batches()
    assert [record.text() for record in batch.documents] == [text, text]


def test_input_is_read_by_text_files():
    modules = [
        PROJECT / f'{name}.py'
        for name in ('inference/multiple_choice', 'configurator', 'evaluate', 'sample')
    ]
    modules += PROJECT.glob('data/**/*.py')
    own = re.compile(r"\.read_text\(encoding|\.decode\('utf-8'\)|text\.splitlines\(\)")
    assert [str(path) for path in modules if own.search(path.read_text(encoding='utf-8'))] == []
