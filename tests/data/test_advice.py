"""The advice in errors of data preparation and token data works when followed.

Each test gets an error, extracts the command or the option from its text, and runs it. Advice on
token files of other programs is in test_import_tokens, advice on fields in test_unfinished.
"""

import json
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
from helpers.in_process import train_here
from helpers.project import PROJECT

import evaluate
from common.errors import UserError
from data import prepare
from data.dataset import load_dataset
from data.preparation.workers import map_in_order
from data.tokenizer import Tokenizer

TEXTS = [f'Document number {i} of a small corpus, {"and so on " * (i % 5)}' for i in range(60)]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    prepare.main(['--workers=1', '--tokenizer=byte', *map(str, arguments)])


def error_of(*arguments, call=run):
    with pytest.raises(UserError) as error:
        call(*arguments)
    return str(error.value)


def option(text, name):
    """The only option of this name in the advice of a message."""
    (advised,) = re.findall(rf'--{name}(?:=[\w./]*\w)?', text)
    return advised


def lines_of(texts):
    return ''.join(json.dumps({'text': text}) + '\n' for text in texts)


def test_missing_out_option_is_suggested(tmp_path):
    (tmp_path / 'a.jsonl').write_text(lines_of(TEXTS))
    advised = option(error_of('a.jsonl'), 'out')
    run('a.jsonl', advised)
    assert load_dataset(advised.partition('=')[2], 8).documents('val')


@pytest.mark.parametrize('count', [2, 3, 9])
@pytest.mark.parametrize('fraction', [1e-9, 1 - 1e-9])
def test_advised_val_fraction_fills_both_splits(tmp_path, count, fraction):
    """The fractions would leave one of the splits empty."""
    (tmp_path / 'a.jsonl').write_text(lines_of(TEXTS[:count]))
    text = error_of('a.jsonl', '--out=mine', f'--val_fraction={fraction}')
    assert f'too few documents ({count})' in text
    run('a.jsonl', '--out=mine', option(text, 'val_fraction'))
    data = load_dataset('mine', 1)
    assert data.documents('train') + data.documents('val') == count


@pytest.mark.parametrize('size', [300, 2_000, 50_000])
def test_advised_cut_fills_both_splits(tmp_path, size):
    text = '\n\n'.join(f'{text}, {i}' for i, text in enumerate(TEXTS * 30))[:size]
    (tmp_path / 'book.txt').write_text(text)
    message = error_of('book.txt', '--out=mine')
    run('book.txt', '--out=mine', *re.findall(r'--(?:cut|val_fraction)=[\d.]*\d', message))
    data = load_dataset('mine', 1)
    assert data.documents('train') and data.documents('val')


def test_indivisible_corpora_get_no_split_option(tmp_path):
    for name, content in (('a.txt', 'hello world'), ('b.jsonl', lines_of(['same'] * 9))):
        (tmp_path / name).write_text(content)
        message = error_of(name, '--out=mine')
        assert 'at least two different documents are needed' in message and '--' not in message


def test_advised_restart_works(tmp_path, capsys):
    (tmp_path / 'a.jsonl').write_text(lines_of(TEXTS))
    (tmp_path / 'b.jsonl').write_text(lines_of(TEXTS[:40]))
    run('a.jsonl', '--out=mine')
    run('a.jsonl', '--out=mine')
    out = capsys.readouterr().out
    before = (tmp_path / 'mine' / 'train.bin').stat().st_ino
    run('a.jsonl', '--out=mine', option(out, 'restart'))
    assert (tmp_path / 'mine' / 'train.bin').stat().st_ino != before

    work = tmp_path / 'mine' / 'unfinished.tmp'
    shutil.copytree(tmp_path / 'mine', tmp_path / 'other')
    (tmp_path / 'b.jsonl').write_text(lines_of(TEXTS[:40]) + '{\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('data.preparation.sources.BATCH_BYTES', 500)
        error_of('b.jsonl', '--out=other')
    assert not work.exists()
    advised = option(error_of('a.jsonl', '--out=other', '--val_fraction=0.3'), 'restart')
    run('a.jsonl', '--out=other', '--val_fraction=0.3', advised)


def test_fixing_or_skipping_invalid_documents(tmp_path):
    (tmp_path / 'a.jsonl').write_text(lines_of(TEXTS) + '{\n')
    run('a.jsonl', '--out=one', option(error_of('a.jsonl', '--out=one'), 'skip_invalid'))
    error_of('a.jsonl', '--out=two')
    (tmp_path / 'a.jsonl').write_text(lines_of(TEXTS))
    run('a.jsonl', '--out=two')
    assert load_dataset('one', 8).hash == load_dataset('two', 8).hash


def test_fewer_processes(tmp_path):
    import os

    (tmp_path / 'a.jsonl').write_text(lines_of(TEXTS))
    with pytest.raises(UserError) as error:
        list(map_in_order(os._exit, [1, 1], 2))
    run('a.jsonl', '--out=mine', option(str(error.value), 'workers'))


@pytest.mark.parametrize(
    'name, content',
    [
        ('code.py', b'x = 1\n' * 9),
        ('sub/table.csv', b'a,b\n'),
        ('data.json', lines_of(TEXTS).encode()),
        ('no_ending', b'text'),
    ],
)
def test_advised_pattern_reads_skipped_files(tmp_path, name, content):
    """The pattern in the message reads the skipped files."""
    for number in range(30):
        path = tmp_path / 'my corpus' / str(number) / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content + (b'' if name == 'data.json' else b'# %d\n' % number))
    message = error_of('my corpus', '--out=mine')
    (pattern,) = re.findall(r"To read these as (?:text|JSON), give this pattern: ('.*')$", message)
    run(*shlex.split(pattern), '--out=mine', '--val_fraction=0.3')
    data = load_dataset('mine', 1)
    count = 30 * 60 if name == 'data.json' else 30
    assert data.documents('train') + data.documents('val') == count


@pytest.mark.parametrize('name, begin', [('a.pdf', b'%PDF-\xff'), ('a.npz', b'PK\x03\x04\xff')])
def test_unreadable_files_are_named_without_a_pattern(tmp_path, name, begin):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / name).write_bytes(begin)
    message = error_of('mine', '--out=out')
    assert 'To read these' not in message and 'not UTF-8 text but a' in message
    assert 'first' in message  # "Unpack it first", "Extract its text first"


def test_advised_utf16_conversion_works(tmp_path):
    if not shutil.which('iconv'):
        pytest.skip('no iconv here')
    (tmp_path / 'a.txt').write_bytes('\n\n'.join(TEXTS).encode('utf-16'))
    (command,) = re.findall(r'iconv .* > NEW', error_of('a.txt', '--out=mine'))
    command = command.replace('OLD', 'a.txt').replace('NEW', 'b.txt')
    subprocess.run(command, shell=True, check=True)
    assert (tmp_path / 'b.txt').read_text('utf-8').lstrip('\ufeff') == '\n\n'.join(TEXTS)


def test_advised_block_size_works(tmp_path):
    (tmp_path / 'a.jsonl').write_text(lines_of(TEXTS))
    run('a.jsonl', '--out=mine')
    message = error_of('mine', 10**6, call=load_dataset)
    load_dataset('mine', int(option(message, 'block_size').partition('=')[2]))


def test_packages_to_install_are_declared():
    known = (PROJECT / 'pyproject.toml').read_text() + (PROJECT / 'requirements.txt').read_text()
    for path in [*PROJECT.glob('data/**/*.py'), *PROJECT.glob('interop/**/*.py')]:
        text = path.read_text(encoding='utf-8')
        for name in re.findall(r"pip install (\w[\w.]*\w)|optional_package\(\s*'([\w.]+)'", text):
            assert ''.join(name) in known, f'{path}: {name}'


@pytest.mark.slow
def test_choices_and_item_counts_are_checked(tmp_path, tiny_dataset):
    out = train_here(tiny_dataset, tmp_path / 'out', max_iters=1).folder.parent
    arguments = [f'--out_dir={out}', '--device=cpu', '--dtype=float32']

    def call(*more):
        evaluate.main([*arguments, *more])

    message = error_of('--make_choices=a.jsonl', '--num_items=99999', call=call)
    call('--make_choices=a.jsonl', option(message, 'num_items'))
    call(option(error_of('--make_choices=a.jsonl', call=call), r'choices'))


def test_unknown_characters_and_tokenizers():
    message = error_of({'kind': 'tiktoken', 'name': 'gpt3'}, call=Tokenizer)
    assert Tokenizer({'kind': 'tiktoken', 'name': 'gpt2'}).vocab_size == 50257 and 'gpt2' in message


def test_changed_dataset_is_prepared_again(tmp_path, capsys):
    (tmp_path / 'a.jsonl').write_text(lines_of(TEXTS))
    run('a.jsonl', '--out=mine')
    before = (tmp_path / 'mine' / 'val.bin').read_bytes()
    np.zeros(len(before) // 2, '<u2').tofile(tmp_path / 'mine' / 'val.bin')
    message = error_of(call=load_dataset('mine', 8).verify_checksums)
    assert 'the command that made it' in message
    run('a.jsonl', '--out=mine')
    assert 'Starting over' in capsys.readouterr().out
    assert (tmp_path / 'mine' / 'val.bin').read_bytes() == before
