"""Preparation with changed files reuses finished work; its output equals that of a fresh start."""

import gzip
import json
import os
import random
import re

import pyarrow
import pytest
from pyarrow import parquet

from common.errors import UserError
from data import prepare
from data.preparation import pipeline, sources, token_writer, unfinished

pytestmark = [pytest.mark.optional, pytest.mark.slow]

choose = random.Random(1).choice
WORDS = ['the', 'quick', 'naïve', 'fox', '日本', 'over', 'a', 'dog.\n\n']
TEXTS = [' '.join(choose(WORDS) for _ in range(choose(range(9, 60)))) + f' {i}' for i in range(240)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(sources, 'BATCH_BYTES', 1500)
    monkeypatch.setattr(token_writer, 'COMMIT_SECONDS', 0)


@pytest.fixture
def encoded(monkeypatch):
    """The list of encoded pieces."""
    pieces, real = [], pipeline.Encoder.__call__

    def watched(self, piece):
        pieces.append(piece)
        return real(self, piece)

    monkeypatch.setattr(pipeline.Encoder, '__call__', watched)
    return pieces


def run(*arguments):
    prepare.main(['--workers=1', *map(str, arguments)])


def contents(folder):
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in ('.bin', '.json')}
    del files['checked.json']
    return files


def lines_of(texts):
    return ''.join(json.dumps({'text': text}) + '\n' for text in texts)


def write_lines(path, texts):
    path.write_text(lines_of(texts))


def write_gzip(path, texts):
    path.write_bytes(gzip.compress(lines_of(texts).encode()))


def write_array(path, texts):
    path.write_text(json.dumps([{'text': text} for text in texts], indent=1))


def write_parquet(path, texts):
    parquet.write_table(pyarrow.table({'text': texts}), path, row_group_size=7)


def write_text(path, texts):
    path.write_text('\n\n'.join(map(str, texts)))


WRITERS = {
    'a.jsonl': write_lines,
    'a.jsonl.gz': write_gzip,
    'a.json': write_array,
    'a.parquet': write_parquet,
}


@pytest.fixture
def corpus(tmp_path):
    """Five files; the third has a line that is not JSON."""
    folder = tmp_path / 'corpus'
    folder.mkdir()
    for number in range(5):
        write_lines(folder / f'{number}.jsonl', TEXTS[number * 48 :][:48])
    bad = folder / '2.jsonl'
    lines = bad.read_text().splitlines(keepends=True)
    bad.write_text(''.join([*lines[:30], '{broken\n', *lines[30:]]))
    return folder


def fix(corpus):
    write_lines(corpus / '2.jsonl', TEXTS[96:144])


def remove(corpus):
    (corpus / '2.jsonl').unlink()


def add_after(corpus):
    fix(corpus)
    write_lines(corpus / '9.jsonl', ['something new', 'and more of it'])


def add_before(corpus):
    fix(corpus)
    write_lines(corpus / '0a.jsonl', ['something new', 'and more of it'])


def add_first(corpus):
    fix(corpus)
    write_lines(corpus / '#.jsonl', ['something new', 'and more of it'])


def touch_all(corpus):
    fix(corpus)
    for path in corpus.iterdir():
        os.utime(path, (1, 1))


def rewrite_first(corpus):
    fix(corpus)
    write_lines(corpus / '0.jsonl', ['other text'] * 40)


def change_early_in_the_bad_file(corpus):
    write_lines(corpus / '2.jsonl', ['other text', *TEXTS[97:144]])


# Changes of the corpus, and how many files of finished work must be reused.
CHANGES = {
    fix: 2.3,
    remove: 1.7,
    add_after: 2.3,
    add_before: 0.7,
    add_first: 0,
    touch_all: 0.7,
    rewrite_first: 0,
    change_early_in_the_bad_file: 1.7,
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('shard_tokens', [10**9, 3000])
def test_work_continues_after_a_change(corpus, tmp_path, encoded, capsys, change, shard_tokens):
    options = '--tokenizer=byte', f'--shard_tokens={shard_tokens}'
    with pytest.raises(
        UserError,
        match=r'2\.jsonl, line 31 is not valid JSON.*Fix the document',
    ):
        run(corpus, f'--out={tmp_path}/mine', *options)
    change(corpus)
    encoded.clear()
    run(corpus, f'--out={tmp_path}/mine', *options)
    assert 'The files have changed.' in capsys.readouterr().out
    done = len(encoded)
    encoded.clear()
    run(corpus, f'--out={tmp_path}/fresh', *options)
    assert contents(tmp_path / 'mine') == contents(tmp_path / 'fresh')
    reused = (len(encoded) - done) / len(encoded) * len(list(corpus.iterdir()))
    assert CHANGES[change] <= reused + 0.2
    assert reused > 0 or not CHANGES[change]


@pytest.mark.parametrize('name', WRITERS)
def test_fixed_large_file_is_continued(tmp_path, encoded, name):
    """In every format the beginning of the file is compared, and only the rest is encoded."""
    path, write = tmp_path / name, WRITERS[name]
    arguments = path, f'--out={tmp_path}/mine', '--tokenizer=byte'
    write(path, [*TEXTS[:200], None, *TEXTS[200:]])
    with pytest.raises(UserError, match="the field 'text' is not text"):
        run(*arguments)
    write(path, [*TEXTS[:200], 'mended', *TEXTS[200:]])
    encoded.clear()
    run(*arguments)
    done = len(encoded)
    encoded.clear()
    run(path, f'--out={tmp_path}/fresh', '--tokenizer=byte')
    assert contents(tmp_path / 'mine') == contents(tmp_path / 'fresh')
    assert done < len(encoded) / 3


def test_fixed_long_text_is_continued(tmp_path, encoded):
    path = tmp_path / 'a.txt'
    arguments = path, '--tokenizer=byte', '--cut=300'
    write_text(path, TEXTS)
    good = path.read_bytes()
    at = good.index(TEXTS[200].encode())
    path.write_bytes(good[:at] + b'\xff' + good[at:])
    with pytest.raises(UserError, match='not UTF-8 text'):
        run(*arguments, f'--out={tmp_path}/mine')
    path.write_bytes(good)
    encoded.clear()
    run(*arguments, f'--out={tmp_path}/mine')
    done = len(encoded)
    encoded.clear()
    run(*arguments, f'--out={tmp_path}/fresh')
    assert contents(tmp_path / 'mine') == contents(tmp_path / 'fresh')
    assert done < len(encoded) / 3


@pytest.mark.parametrize('tokenizer', ['char', 'bpe'])
@pytest.mark.parametrize('new', ['x', 'the Ω quick' * 20])
def test_corpus_tokenizer_is_rebuilt(corpus, tmp_path, tokenizer, new):
    """If the tokenizer changes, all tokens are encoded again."""
    options = (
        f'--tokenizer={tokenizer}',
        '--vocab_size=400' if tokenizer == 'bpe' else '--workers=1',
    )
    with pytest.raises(UserError, match='Fix the document'):
        run(corpus, f'--out={tmp_path}/mine', *options)
    fix(corpus)
    write_lines(corpus / '9.jsonl', [new])
    run(corpus, f'--out={tmp_path}/mine', *options)
    run(corpus, f'--out={tmp_path}/fresh', *options)
    assert contents(tmp_path / 'mine') == contents(tmp_path / 'fresh')


def test_killed_during_change(corpus, tmp_path, monkeypatch):
    with pytest.raises(UserError, match='Fix the document'):
        run(corpus, f'--out={tmp_path}/mine', '--tokenizer=char')
    fix(corpus)
    write_lines(corpus / '0.jsonl', ['Ω', *TEXTS[1:48]])
    real = os.replace
    for count in range(1, 5):
        calls = []

        def deadly(*arguments, calls=calls, count=count):
            calls.append(1)
            if len(calls) == count:
                raise KeyboardInterrupt
            real(*arguments)

        monkeypatch.setattr(os, 'replace', deadly)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, f'--out={tmp_path}/mine', '--tokenizer=char')
    monkeypatch.setattr(os, 'replace', real)
    run(corpus, f'--out={tmp_path}/mine', '--tokenizer=char')
    run(corpus, f'--out={tmp_path}/fresh', '--tokenizer=char')
    assert contents(tmp_path / 'mine') == contents(tmp_path / 'fresh')


def test_other_options_are_refused(corpus, tmp_path):
    with pytest.raises(UserError, match='Fix the document'):
        run(corpus, f'--out={tmp_path}/mine', '--tokenizer=byte')
    fix(corpus)
    for option, message in (('--val_fraction=0.2', 'val_fraction was'), ('--cut=99', 'cut was')):
        with pytest.raises(
            UserError, match=f'unfinished preparation with other settings.*{message}'
        ):
            run(corpus, f'--out={tmp_path}/mine', '--tokenizer=byte', option)


def test_empty_work_folder_is_reused(tmp_path):
    (tmp_path / 'a.jsonl').write_text(lines_of(TEXTS).replace('"text"', '"content"'))
    arguments = tmp_path / 'a.jsonl', f'--out={tmp_path}/mine', '--tokenizer=byte'
    with pytest.raises(UserError, match="has no field 'text'") as error:
        run(*arguments)
    run(*arguments, *re.findall(r'--field=\w+', str(error.value)))
    assert (tmp_path / 'mine' / 'train.bin').exists()


def test_journal_of_an_earlier_version_is_restarted(corpus, tmp_path):
    with pytest.raises(UserError, match='Fix the document'):
        run(corpus, f'--out={tmp_path}/mine', '--tokenizer=byte')
    work = tmp_path / 'mine' / 'unfinished.tmp'
    (work / unfinished.FILES).unlink()
    journal = work / token_writer.JOURNAL
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    for entry in entries:
        entry['position'][2] = entry['position'][2][:3]
    journal.write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    fix(corpus)
    run(corpus, f'--out={tmp_path}/mine', '--tokenizer=byte')
    run(corpus, f'--out={tmp_path}/fresh', '--tokenizer=byte')
    assert contents(tmp_path / 'mine') == contents(tmp_path / 'fresh')
