"""data/prepare.py: datasets from any corpus, with interruptions and invalid documents."""

import hashlib
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import psutil
import pytest
import tokenizers
from helpers.project import PROJECT, TINY_RUN
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.progress_bar import done_text
from data import prepare
from data.dataset import load_dataset
from data.preparation import pipeline, sources, token_writer, train_tokenizer
from data.preparation.pipeline import HashSplitRule
from data.preparation.workers import map_in_order
from data.token_files import SPLITS
from data.tokenizer import Tokenizer

pytestmark = pytest.mark.optional

WORDS = [
    'the',
    'quick',
    'naïve',
    'fox',
    'jumps',
    '\n',
    'over',
    '日本',
    'a',
    '<|endoftext|>',
    'dog.',
]
choose = random.Random(0).choice
TEXTS = [' '.join(choose(WORDS) for _ in range(choose(range(1, 90)))) + f' {i}' for i in range(400)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Make about thirty pieces, and write a journal line for each."""
    monkeypatch.setattr(sources, 'BATCH_BYTES', 3000)
    monkeypatch.setattr(token_writer, 'COMMIT_SECONDS', 0)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    for number, start in enumerate(range(0, len(TEXTS), 100)):
        lines = (json.dumps({'text': text}) + '\n' for text in TEXTS[start : start + 100])
        (folder / f'{number}.jsonl').write_text(''.join(lines))
    return folder


def run(*arguments):
    """Run the script in this process, without workers unless --workers is set."""
    prepare.main(['--workers=1', *map(str, arguments)])


def contents(folder):
    """The files of a dataset without the lock, and meta.json without its source."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != '.tmp'}
    assert set(json.loads(files.pop('checked.json'))) == set(SPLITS)
    meta = json.loads(files.pop('meta.json'))
    return files, {key: meta[key] for key in ('splits', 'tokenizer', 'vocab_size', 'dtype')}


def is_validation(text, fraction=0.1):
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16 < fraction


def documents_of(folder):
    """The documents of each split, decoded from the token files."""
    data = load_dataset(folder, 8)
    tokenizer = Tokenizer(data.tokenizer, folder)
    documents = {}
    for split in SPLITS:
        tokens = data.splits[split].read(0, data.tokens(split)).astype(np.int64)
        ends = np.flatnonzero(tokens == data.end_of_text)
        assert ends[-1] == len(tokens) - 1 and len(ends) == data.documents(split)
        assert tokenizer.end_of_text == data.end_of_text
        documents[split] = [tokenizer.decode(part[:-1]) for part in np.split(tokens, ends + 1)[:-1]]
        assert (
            sum(len(text.encode()) for text in documents[split])
            == data.meta['splits'][split]['bytes']
        )
    return documents


# --- Output ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('tokenizer', ['gpt2', 'byte', 'char', 'bpe --vocab_size=300'])
def test_documents_are_split_by_hash(corpus, tmp_path, tokenizer):
    run(corpus, f'--out={tmp_path}/mine', *f'--tokenizer={tokenizer}'.split())
    assert documents_of(tmp_path / 'mine') == {
        'train': [text for text in TEXTS if not is_validation(text)],
        'val': [text for text in TEXTS if is_validation(text)],
    }
    data = load_dataset(tmp_path / 'mine', 8)
    sizes = {'gpt2': 50257, 'byte': 257, 'char': len(set(''.join(TEXTS))) + 1, 'bpe': 300}
    assert data.vocab_size == sizes[tokenizer.split()[0]]
    assert data.meta['dtype'] == ('uint8' if tokenizer == 'char' else 'uint16')


@pytest.mark.slow
@given(
    st.lists(st.text(max_size=5), max_size=40),
    st.lists(st.text(max_size=5), max_size=40),
    st.floats(0.01, 0.99),
    st.floats(0.01, 0.99),
)
@settings(max_examples=50, deadline=None)
def test_split_is_independent_of_other_documents(few, more, fraction, larger):
    def validation(texts, share):
        rule = HashSplitRule(share)
        return {text for text in texts if rule(hashlib.sha256(text.encode('utf-8')).digest())}

    validation_texts = validation(few, fraction)
    assert validation_texts == validation(few + more, fraction) & set(few)
    assert validation_texts == {text for text in few if is_validation(text, fraction)}
    assert validation_texts <= validation(few, max(fraction, larger))


def test_adding_files_keeps_splits(corpus, tmp_path):
    run(corpus / '0.jsonl', corpus / '2.jsonl', f'--out={tmp_path}/few', '--tokenizer=byte')
    run(corpus, corpus / '0.jsonl', f'--out={tmp_path}/all', '--tokenizer=byte')
    few, all_ = documents_of(tmp_path / 'few'), documents_of(tmp_path / 'all')
    for split in SPLITS:
        assert few[split] and set(few[split]) == set(all_[split]) & set(
            TEXTS[:100] + TEXTS[200:300]
        )


def test_validation_share_matches_option(tmp_path):
    (tmp_path / 'a.jsonl').write_text(''.join(f'{{"text": "{i}"}}\n' for i in range(4000)))
    run(tmp_path / 'a.jsonl', f'--out={tmp_path}/mine', '--tokenizer=byte', '--val_fraction=0.05')
    # Four standard deviations of a binomial.
    assert abs(len(documents_of(tmp_path / 'mine')['val']) - 200) < 4 * (4000 * 0.05 * 0.95) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize('tokenizer', ['gpt2', 'bpe', 'char'])
def test_output_is_independent_of_workers(corpus, tmp_path, monkeypatch, tokenizer):
    outcomes = []
    for count in (1, 3):
        monkeypatch.setenv('RAYON_NUM_THREADS', str(count))
        out = tmp_path / str(count)
        run(corpus, f'--out={out}', f'--workers={count}', f'--tokenizer={tokenizer}')
        outcomes.append(contents(out))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize('shard_tokens', [1, 100, 4096])
def test_shards_concatenate_to_single_file(corpus, tmp_path, shard_tokens):
    texts = corpus / '0.jsonl'
    run(texts, f'--out={tmp_path}/one', '--tokenizer=byte')
    if shard_tokens == 1:
        texts = tmp_path / 'short.jsonl'
        texts.write_text(''.join(f'{{"text": "number {i}"}}\n' for i in range(30)))
        run(texts, f'--out={tmp_path}/one', '--tokenizer=byte')
    run(texts, f'--out={tmp_path}/many', '--tokenizer=byte', f'--shard_tokens={shard_tokens}')
    one, many = load_dataset(tmp_path / 'one', 8), load_dataset(tmp_path / 'many', 8)
    for split in SPLITS:
        whole = (tmp_path / 'one' / f'{split}.bin').read_bytes()
        shards = many.meta['splits'][split]['shards']
        parts = [(tmp_path / 'many' / shard['file']).read_bytes() for shard in shards]
        assert b''.join(parts) == whole
        assert all(len(part) == 2 * shard_tokens for part in parts[:-1])
        for part, shard in zip(parts, shards, strict=True):
            assert shard['sha256'] == hashlib.sha256(part).hexdigest()
            assert shard['tokens'] * 2 == len(part)
        assert one.sha256(split) == many.sha256(split) == hashlib.sha256(whole).hexdigest()
    assert len(many.meta['splits']['train']['shards']) > 1
    assert not (tmp_path / 'many' / 'train.bin').exists()
    run(texts, f'--out={tmp_path}/many', '--tokenizer=byte')  # in one file instead of many
    assert contents(tmp_path / 'many') == contents(tmp_path / 'one')


def test_trained_byte_pairs_match_tokenizers(corpus, tmp_path):
    run(corpus, f'--out={tmp_path}', '--tokenizer=bpe', '--vocab_size=400')
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    data = load_dataset(tmp_path, 8)
    tokenizer = Tokenizer(data.tokenizer, tmp_path)
    ordinary = [text for text in TEXTS if '<|endoftext|>' not in text]
    assert len(ordinary) > 20
    for text in ordinary:
        assert tokenizer.encode(text) == theirs.encode(text).ids
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.token_to_id('<|endoftext|>') == tokenizer.end_of_text == 399
    assert theirs.get_vocab_size() == tokenizer.vocab_size == 400
    # Only the training split is used: another text in the validation split changes nothing.
    assert data.padded_vocab_size == 448
    (tmp_path / 'tokenizer.json').write_bytes(b'{}')
    with pytest.raises(UserError, match=r'tokenizer\.json cannot be used: its SHA-256'):
        Tokenizer(data.tokenizer, tmp_path)


def test_byte_pairs_are_trained_without_validation_text(tmp_path):
    held_out = next(f'zqzq {i} ' * 50 for i in range(999) if is_validation(f'zqzq {i} ' * 50))
    texts = [f'zq common words {i}' for i in range(50)]
    vocabularies = []
    for name, corpus_texts in (('without', texts), ('with', [*texts, held_out])):
        (tmp_path / f'{name}.jsonl').write_text(
            ''.join(json.dumps({'text': t}) + '\n' for t in corpus_texts)
        )
        run(tmp_path / f'{name}.jsonl', f'--out={tmp_path}/{name}', '--tokenizer=bpe')
        vocabularies.append((tmp_path / name / 'tokenizer.json').read_bytes())
    assert vocabularies[0] == vocabularies[1]
    assert load_dataset(tmp_path / 'with', 8).vocab_size < 8192  # limited by the text


def test_byte_pairs_are_trained_on_a_sample(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_tokenizer, 'TRAINING_BYTES', 20_000)
    run(corpus, f'--out={tmp_path}', '--tokenizer=bpe')
    share = 20_000 / sum(path.stat().st_size for path in corpus.iterdir())
    assert f'on {share:.1%} of the training documents' in capsys.readouterr().out


def test_summary_describes_dataset(corpus, tmp_path, capsys):
    run(corpus, f'--out={tmp_path}/mine', '--tokenizer=byte')
    out = capsys.readouterr().out
    for split, texts in documents_of(tmp_path / 'mine').items():
        size = sum(len(text.encode()) for text in texts)
        assert f'{split}: {size + len(texts):,} tokens of {size:,} bytes, {len(texts)} docu' in out
    assert out.endswith(f'To train on it: python train.py --dataset={tmp_path}/mine\n')


def test_progress_lines_have_time_left(corpus, tmp_path, monkeypatch, capsys):
    now = [1000.0]

    def clock():
        now[0] += 1
        return now[0]

    monkeypatch.setattr(time, 'monotonic', clock)
    run(corpus, f'--out={tmp_path}/mine', '--tokenizer=byte')
    lines = [line for line in capsys.readouterr().out.splitlines() if ' left' in line]
    assert len(lines) > 3
    total = sum(path.stat().st_size for path in corpus.iterdir())
    for line in lines:
        match = re.fullmatch(
            r'Encoding: \d+ %, [\d.]+/([\d.]+) kB, [\d.]+ kB/s, (\d+:\d\d:\d\d) left, '
            r'[\d,]+ documents',
            line,
        )
        assert match, line
        assert match[1] == f'{total / 1e3:.1f}'
    left = [
        sum(int(n) * s for n, s in zip(text.split(':'), (3600, 60, 1)))
        for text in re.findall(r'([\d:]+) left', '\n'.join(lines))
    ]
    assert left == sorted(left, reverse=True)


# --- Interruptions --------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from data import prepare
from data.preparation import sources, token_writer
sources.BATCH_BYTES, token_writer.COMMIT_SECONDS = 3000, 0
name, count = sys.argv.pop(1).split(':')
real, calls = getattr(os, name), []

def deadly(*arguments):
    calls.append(1)
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

setattr(os, name, deadly)
prepare.main(['--workers=1', *sys.argv[1:]])
"""


def killed(call, *arguments):
    """Run the script, which kills itself at the call `name:number`; return whether it did."""
    code = subprocess.run(
        [sys.executable, '-c', KILLED, call, *map(str, arguments)],
        cwd=PROJECT,
        stdout=subprocess.DEVNULL,
        timeout=120,
    ).returncode
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.slow
@pytest.mark.parametrize('tokenizer, shard_tokens', [('byte', 10**9), ('bpe', 20_000)])
def test_killed_preparation_resumes_to_the_same_files(corpus, tmp_path, tokenizer, shard_tokens):
    """The process is killed between any two writes to the disk, also while publishing."""
    options = f'--tokenizer={tokenizer}', f'--shard_tokens={shard_tokens}'
    run(corpus, f'--out={tmp_path}/alone', *options)
    mine = tmp_path / 'mine'
    for call in ('fsync:2', 'fsync:8', 'fsync:23', 'truncate:1'):
        assert killed(call, corpus, f'--out={mine}', *options) or call == 'truncate:1'
        assert not (mine / 'meta.json').exists()
    for number in range(1, 12):  # at each file that is published, until none is left
        if not killed(f'replace:{number}', corpus, f'--out={mine}', *options):
            break
    assert 3 < number < 11
    assert contents(mine) == contents(tmp_path / 'alone')
    assert not (mine / 'unfinished.tmp').exists()


def test_finished_work_is_not_repeated(corpus, tmp_path, capsys, monkeypatch):
    assert killed('fsync:40', corpus, f'--out={tmp_path}', '--tokenizer=byte')
    lines = (tmp_path / 'unfinished.tmp' / 'journal.jsonl').read_text().splitlines()
    done = json.loads(lines[-1])['position'][1]
    encoded = []
    real = pipeline.Encoder.__call__

    def watched(self, piece):
        encoded.append(piece)
        return real(self, piece)

    monkeypatch.setattr(pipeline.Encoder, '__call__', watched)
    run(corpus, f'--out={tmp_path}', '--tokenizer=byte')
    total = sum(path.stat().st_size for path in corpus.iterdir())
    assert 0 < done < total
    assert f'Continuing after {done_text(done, total, "B")}' in capsys.readouterr().out
    journal_pieces = len(lines) + len(encoded)
    encoded.clear()
    run(corpus, f'--out={tmp_path}', '--tokenizer=byte', '--restart')
    assert len(encoded) == journal_pieces


SLOW = """
import sys, time
from data import prepare
from data.preparation import sources, token_writer

if __name__ == '__main__':
    sources.BATCH_BYTES, token_writer.COMMIT_SECONDS = 3000, 0
    real = token_writer.TokenWriter.add
    token_writer.TokenWriter.add = lambda *a: (time.sleep(0.05), real(*a))
    prepare.main(['--workers=2', *sys.argv[1:]])
"""


@pytest.mark.slow
def test_workers_end_with_main_process(corpus, tmp_path):
    """After kill -9 no process is left running, and none holds the lock."""
    run(corpus, f'--out={tmp_path}/alone', '--tokenizer=byte')
    (tmp_path / 'slow.py').write_text(SLOW)
    command = [sys.executable, tmp_path / 'slow.py', corpus]
    process = subprocess.Popen(
        [*map(str, command), f'--out={tmp_path}/mine', '--tokenizer=byte'],
        env={**os.environ, 'PYTHONPATH': str(PROJECT)},
        stdout=subprocess.DEVNULL,
    )
    journal = tmp_path / 'mine' / 'unfinished.tmp' / 'journal.jsonl'
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    assert process.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    run(corpus, f'--out={tmp_path}/mine', '--tokenizer=byte')
    assert contents(tmp_path / 'mine') == contents(tmp_path / 'alone')


def test_unfinished_preparation_with_other_settings_is_refused(corpus, tmp_path):
    assert killed('fsync:20', corpus, f'--out={tmp_path}', '--tokenizer=byte')
    with pytest.raises(
        UserError,
        match=r"unfinished preparation with other settings: kind was 'byte', now 'gpt2'.*--restart",
    ):
        run(corpus, f'--out={tmp_path}')
    with pytest.raises(UserError, match=r'val_fraction was 0\.1, now 0\.2'):
        run(corpus, f'--out={tmp_path}', '--tokenizer=byte', '--val_fraction=0.2')
    with pytest.raises(UserError, match=r'files was 4, now 1.*their sizes or their times'):
        run(corpus / '0.jsonl', f'--out={tmp_path}', '--tokenizer=byte')
    run(corpus / '0.jsonl', f'--out={tmp_path}', '--tokenizer=byte', '--restart')
    assert len(documents_of(tmp_path)['train']) < 100


def test_finished_dataset_is_not_prepared_again(corpus, tmp_path, capsys):
    arguments = corpus, f'--out={tmp_path}', '--tokenizer=byte'
    run(*arguments)
    before = (tmp_path / 'train.bin').stat().st_mtime_ns
    run(*arguments)
    assert 'already prepared with these settings' in capsys.readouterr().out
    assert (tmp_path / 'train.bin').stat().st_mtime_ns == before
    (tmp_path / 'val.bin').unlink()
    run(*arguments)
    assert (tmp_path / 'val.bin').exists()


def test_corrupted_tokens_are_detected(corpus, tmp_path, monkeypatch):
    real = token_writer.TokenWriter.close

    def spoil(self):
        real(self)
        with open(self.folder / 'train_00000.bin', 'r+b') as file:
            file.seek(1000)
            file.write(b'x')

    monkeypatch.setattr(token_writer.TokenWriter, 'close', spoil)
    with pytest.raises(UserError, match=r'train tokens.*SHA-256 differs.*--restart'):
        run(corpus, f'--out={tmp_path}', '--tokenizer=byte')
    assert not (tmp_path / 'meta.json').exists()


def test_undecodable_tokens_are_detected(corpus, tmp_path, monkeypatch):
    encode = Tokenizer.encode_array
    monkeypatch.setattr(Tokenizer, 'encode_array', lambda self, text: encode(self, text.lower()))
    (tmp_path / 'a.jsonl').write_text(''.join(f'{{"text": "ABC{i}"}}\n' for i in range(99)))
    with pytest.raises(UserError, match='does not decode to its text: '):
        run(tmp_path / 'a.jsonl', f'--out={tmp_path}/mine', '--tokenizer=byte')


def test_full_disk_keeps_progress(corpus, tmp_path):
    resource = pytest.importorskip('resource')
    limit = (30_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    try:
        with pytest.raises(UserError, match=r'cannot be written to .*Progress is saved'):
            run(corpus, f'--out={tmp_path}/mine', '--tokenizer=byte')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / 'mine' / 'unfinished.tmp' / 'journal.jsonl').stat().st_size
    run(corpus, f'--out={tmp_path}/mine', '--tokenizer=byte')
    run(corpus, f'--out={tmp_path}/alone', '--tokenizer=byte')
    assert contents(tmp_path / 'mine') == contents(tmp_path / 'alone')


def test_killed_worker_is_user_error():
    with pytest.raises(UserError, match=r'was killed.*to continue.*--workers=1'):
        list(map_in_order(os._exit, [1, 1], 2))


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['a.txt'], 'No folder is given.*--out=data/mine'),
        (['--out=mine'], 'either PATHS'),
        (['a.txt', '--hf=x', '--out=mine'], 'either PATHS'),
        (['a.txt', '--out=mine', '--tokenizer=gtp2'], 'gtp2 is unknown. Did you mean gpt2?'),
        (['a.txt', '--out=mine', '--tokenizer=cl100k'], 'Did you mean cl100k_base?'),
        (
            ['a.txt', '--out=mine', '--tokenizer=zzz'],
            'Tokenizers: gpt2, byte, char, bpe, cl100k_bas',
        ),
        (['a.txt', '--out=mine', '--vocab_size=900'], '--vocab_size needs --tokenizer=bpe'),
        (['a.txt', '--out=mine', '--vocab_size=256'], 'at least 257'),
        (['a.txt', '--out=mine', '--val_fraction=1'], 'between 0 and 1'),
        (['a.txt', '--out=mine', '--workers=0'], 'at least 1'),
        (['a.text', '--out=mine'], 'no file or folder a.text. Did you mean a.txt?'),
        (['a.txt', '--out=mine'], 'too few documents (1): none of them is in the val split'),
        (['empty.txt', '--out=mine'], 'no document to prepare: 1 are empty'),
        (['bad.txt', '--out=mine'], 'bad.txt is not UTF-8 text: invalid start byte at byte 3'),
        (['rows.jsonl', '--out=mine'], "rows.jsonl, line 2 has no field 'text'. Its fields: 'txt'"),
        (['a.txt', '--out=a.txt'], 'cannot be written to a.txt'),
        (['a.txt', '--out=mine', '--tokeniser=byte'], 'Did you mean --tokenizer?'),
    ],
)
def test_mistakes_are_user_errors(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text('hello world')
    (tmp_path / 'empty.txt').write_text(' \n')
    (tmp_path / 'bad.txt').write_bytes(b'bad\xff')
    (tmp_path / 'rows.jsonl').write_text('{"text": "a"}\n{"txt": "a"}\n')
    with pytest.raises(UserError, match=re.escape(message).replace(r'\.\*', '.*')):
        run(*arguments)
    assert not (tmp_path / 'mine' / 'meta.json').exists()


def test_single_text_is_cut_as_advised(tmp_path):
    (tmp_path / 'book.txt').write_text('\n\n'.join(TEXTS))
    with pytest.raises(UserError, match=r'too few documents \(1\)') as error:
        run(tmp_path / 'book.txt', f'--out={tmp_path}/mine')
    (advised,) = re.findall(r'--cut=\d+', str(error.value))
    run(tmp_path / 'book.txt', f'--out={tmp_path}/mine', advised, '--tokenizer=byte')
    documents = documents_of(tmp_path / 'mine')
    assert documents['train'] and documents['val']
    assert sum(map(len, [*documents['train'], *documents['val']])) == len('\n\n'.join(TEXTS))


def test_skip_invalid(tmp_path, capsys):
    lines = [json.dumps({'text': text}) + '\n' for text in TEXTS]
    lines[300:300] = ['{"txt": "a"}\n', '{"text": " "}\n', '{\n']
    (tmp_path / 'a.jsonl').write_text(''.join(lines))
    arguments = tmp_path / 'a.jsonl', f'--out={tmp_path}/mine', '--tokenizer=byte'
    with pytest.raises(UserError, match=r'a\.jsonl, line 301 has no field.*--skip_invalid to skip'):
        run(*arguments)
    run(*arguments, '--skip_invalid')  # continues
    out = capsys.readouterr().out
    assert 'Continuing after' in out and 'line 301 has no field' in out and 'line 303 is not' in out
    assert 'skipped: 1 empty documents, 2 invalid ones' in out
    documents = documents_of(tmp_path / 'mine')
    assert sorted([*documents['train'], *documents['val']]) == sorted(TEXTS)
    meta = json.loads((tmp_path / 'mine' / 'meta.json').read_text())
    assert (meta['preparation']['empty'], meta['preparation']['invalid']) == (1, 2)


def test_byte_pairs_need_package_tokenizers(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(UserError, match='pip install tokenizers'):
        run(corpus, f'--out={tmp_path}', '--tokenizer=bpe')


@pytest.mark.parametrize('name', ['openwebtext', 'fineweb'])
def test_openwebtext_and_fineweb_scripts(tmp_path, monkeypatch, name):
    """The scripts use a local dataset and a temporary folder in place of the hub's."""
    script = f'data/{name}/prepare.py'
    spec = importlib.util.spec_from_file_location(name, PROJECT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.__file__ = str(tmp_path / 'prepare.py')
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        lines = ''.join(json.dumps({'text': text}) + '\n' for text in TEXTS)
        (tmp_path / 'rows').mkdir(exist_ok=True)
        (tmp_path / 'rows' / 'train.jsonl').write_text(lines)
        return real(str(tmp_path / 'rows'), **options)

    real = datasets.load_dataset
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    module.main(['--val_fraction=0.3', '--max_documents=200', '--tokenizer=byte', '--workers=1'])
    (repository, subset), options = calls[0]
    assert (repository, subset) == {
        'openwebtext': ('Skylion007/openwebtext', None),
        'fineweb': ('HuggingFaceFW/fineweb', 'sample-10BT'),
    }[name]
    assert options == {'split': 'train', 'streaming': True}
    assert documents_of(tmp_path) == {
        'train': [text for text in TEXTS[:200] if not is_validation(text, 0.3)],
        'val': [text for text in TEXTS[:200] if is_validation(text, 0.3)],
    }


@pytest.mark.slow
def test_training_on_prepared_corpus(corpus, tmp_path, run_script):
    """The command lines work with trained byte pairs and a dataset in shards."""
    out = tmp_path / 'mine'
    bpe = '--tokenizer=bpe', '--vocab_size=300', '--shard_tokens=2000'
    run_script('data/prepare.py', corpus, f'--out={out}', *bpe)
    assert (out / 'train_00001.bin').exists()
    tiny = [f'--{key}={value}' for key, value in {**TINY_RUN, 'max_iters': 2}.items()]
    assert load_dataset(str(out), 8).vocab_size == 300
    run_script('train.py', f'--dataset={out}', *tiny)
    samples = run_script('sample.py', '--num_samples=1', '--max_new_tokens=5', '--start=the fox')
    assert 'the fox' in samples.stdout
