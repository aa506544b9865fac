"""Every user error: exit code 2, a message that says what to do, and nothing written."""

import hashlib
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.project import PROJECT, TINY_RUN

from common.errors import run_script
from training.checkpoint import index_sha256

pytestmark = pytest.mark.slow

LETTERS = 'abcdefgh \n'  # the vocabulary of the dataset
TOKENS = {'train': 3000, 'val': 500}
TINY = [f'--{key}={value}' for key, value in TINY_RUN.items()]


# --- Files for the mistakes ----------------------------------------------------------------------


def write_dataset(folder, **changes):
    """Letters as tokens, with `changes` to the files: bytes, or a function of the valid content."""
    folder.mkdir()
    files, splits = {}, {}
    for split, count in TOKENS.items():
        content = bytes(i * i % len(LETTERS) for i in range(count))
        files[f'{split}.bin'] = content
        digest = hashlib.sha256(content).hexdigest()
        splits[split] = {'tokens': count, 'bytes': count, 'sha256': digest}
    meta = {
        'format_version': 1,
        'tokenizer': {'kind': 'char', 'characters': list(LETTERS)},
        'vocab_size': len(LETTERS),
        'dtype': 'uint8',
        'splits': splits,
    }
    files['meta.json'] = json.dumps(meta).encode()
    for name, change in changes.items():
        name = name.replace('_', '.')
        files[name] = change(files[name]) if callable(change) else change
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)


DATASETS = {
    'letters': {},
    'short_file': {'train_bin': lambda content: content[:-7]},
    'foreign_file': {'train_bin': b'PK\3\4' * 750},
    'over_range': {'val_bin': lambda content: content[:-1] + bytes([len(LETTERS)])},
    'no_val': {'val_bin': None},
    'broken_meta': {'meta_json': b'{"format_version": 1,'},
    'list_meta': {'meta_json': b'[]'},
    'odd_dtype': {'meta_json': lambda content: content.replace(b'"uint8"', b'"float32"')},
}

CONFIGS = {
    'typo.py': 'n_layers = 3',
    'types.py': "n_layer = '3'\nn_head = 2.0\nmax_iters = True\ndropout = [0.1]\ndevice = None",
    'nan.py': "learning_rate = float('nan')",
    'syntax.py': 'n_layer = 3\nn_head = = 2',
    'raises.py': 'n_layer = 3\n\nn_head = 1 / 0',
    'exits.py': 'import sys\n\nsys.exit(0)',
    'imports.py': 'import no_such_module',
    'binary.py': b'\x7fELF\xff\xfe',
    'folder.py': None,
    'several.py': 'n_layers = 3\ndropout = 1.5\nnormalization = "rms"',
}


class Exploit:
    def __reduce__(self):
        return Path.touch, (Path('executed'),)


def sealed(folder):
    """Correct the checksums of a modified checkpoint, as an attacker would."""
    index = json.loads((folder / 'index.json').read_text())
    content = (folder / 'state.pt').read_bytes()
    index['files']['state.pt'] = {
        'bytes': len(content),
        'sha256': hashlib.sha256(content).hexdigest(),
    }
    index['sha256'] = index_sha256(index)
    (folder / 'index.json').write_text(json.dumps(index))


def truncated(folder):
    os.truncate(folder / 'state.pt', 1000)


def corrupt(folder):
    content = bytearray((folder / 'state.pt').read_bytes())
    content[len(content) // 2] ^= 1
    (folder / 'state.pt').write_bytes(content)


def malicious(folder):
    (folder / 'state.pt').write_bytes(pickle.dumps({'model': Exploit()}, protocol=2))
    sealed(folder)


def foreign(folder):
    torch.save({'state_dict': {'weight': torch.ones(3)}}, folder / 'state.pt')
    sealed(folder)


def no_index(folder):
    (folder / 'index.json').unlink()


BROKEN = {broken.__name__: broken for broken in (truncated, corrupt, malicious, foreign, no_index)}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with all files that the mistakes below refer to."""
    place = tmp_path_factory.mktemp('place')
    for name, changes in DATASETS.items():
        write_dataset(place / name, **changes)
    for name, text in CONFIGS.items():
        if text is None:
            (place / name).mkdir()
        else:
            (place / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (place / 'plain.txt').write_text('text')
    (place / 'latin.txt').write_bytes(b'caf\xe9')
    (place / 'empty').mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train = importlib.import_module('train').main
        assert train([*TINY, '--dataset=letters']) == 0
    for name, broken in BROKEN.items():
        shutil.copytree(place / 'out', place / name)
        (checkpoint,) = place.glob(f'{name}/run_*/checkpoints/*')
        broken(checkpoint)
    return place


def contents(folder):
    """Every file and folder, and the bytes of the files."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob('*')}


def command(line):
    """The script and arguments of a command line, with a tiny run for train.py."""
    script, *arguments = line.split()
    if script == 'train.py':
        arguments = [*TINY, '--dataset=letters', *arguments]
    return script, arguments


# --- The mistakes ---------------------------------------------------------------------------------

# Command line -> parts of the message: the key or file, the value, and what to do.
MISTAKES = {
    # keys
    'train.py --n_layers=3': ['--n_layers', 'Did you mean n_layer?', '--help'],
    'train.py --learning-rte=1': ['--learning_rte', 'Did you mean learning_rate?'],
    'train.py --zzz=1': ['--zzz', '--help'],
    'train.py typo.py': ['typo.py', "'n_layers'", 'Did you mean n_layer?'],
    'train.py llama': ["'llama'", '--key=value', '*.py'],
    'train.py typo': ["'typo'", 'Did you mean typo.py?'],
    'train.py -n_layer=3': ["'-n_layer=3'", 'Did you mean --n_layer?'],
    'train.py --n_layer': ['--n_layer', 'needs a value', 'int, at least 1'],
    'train.py --dataset': ['--dataset', 'needs a value', 'str'],
    'train.py --no-n_layer': ['--no-n_layer', 'flags only', 'n_layer takes int, at least 1'],
    'train.py --no-bias=True': ['--no-bias=True', 'no value', 'bias takes bool'],
    # types
    'train.py --n_layer=two': ['n_layer=two', 'int, at least 1'],
    'train.py --n_layer=2.5': ['n_layer=2.5', 'int, at least 1'],
    'train.py --n_layer=True': ['n_layer=True', 'int, at least 1'],
    'train.py --n_layer=None': ['n_layer=None', 'int, at least 1'],
    'train.py --n_layer=': ['n_layer=:', 'int, at least 1'],
    'train.py --learning_rate=fast': ['learning_rate=fast', 'float, above 0'],
    'train.py --bias=maybe': ['bias=maybe', 'bool'],
    'train.py types.py': [
        *('types.py', "n_layer='3': str given", 'n_head=2.0: float given', 'int, at least 1'),
        *('max_iters=True: bool given', 'dropout=[0.1]: list given', 'device=None', 'takes str'),
        '5 problems',
    ],
    # ranges
    'train.py --n_layer=0': ['n_layer=0', 'at least 1'],
    'train.py --n_embd=-8': ['n_embd=-8', 'at least 1'],
    'train.py --block_size=0': ['block_size=0', 'at least 1'],
    'train.py --batch_size=0': ['batch_size=0', 'at least 1'],
    'train.py --max_iters=-1': ['max_iters=-1', 'at least 1'],
    'train.py --dropout=1': ['dropout=1.0', '0', 'not including, 1'],
    'train.py --dropout=1.5': ['dropout=1.5', 'not including, 1'],
    'train.py --attention_dropout=-0.1': ['attention_dropout=-0.1', 'from 0'],
    'train.py --learning_rate=nan': ['learning_rate=nan', 'not a finite number', 'above 0'],
    'train.py --learning_rate=inf': ['learning_rate=inf', 'not a finite number', 'above 0'],
    'train.py nan.py': ['nan.py', 'learning_rate=nan', 'not a finite number', 'above 0'],
    'train.py --learning_rate=0': ['learning_rate=0', 'above 0'],
    'train.py --beta2=1': ['beta2=1', 'from 0 to 0.999999'],
    'train.py --min_lr=0.1': ['min_lr=0.1', 'learning_rate=0.0006', 'Lower min_lr'],
    'train.py --activation_checkpointing=some': [
        *('activation_checkpointing', "'some'", 'none, full or a whole number of at least 1'),
    ],
    # sizes beyond any machine, refused at once
    'train.py --max_iters=1e26': ['max_iters=1000000000', 'above 9,223,372,036,854,775,807'],
    'train.py --max_iters=1e15': [
        'max_iters=1,000,000,000,000,000',
        'tokens in total',
        'Reduce one',
    ],
    'train.py --n_layer=1000000': ['n_layer=1000000', 'at most 10,000'],
    'train.py --n_head=1000000000': ['n_head=1000000000', 'at most 10,000'],
    'train.py --vocab_size=1000000000000': ['too large', 'GB of memory', 'Lower', 'vocab_size'],
    'train.py --vocab_size=1000000000000000000': ['no tensor', 'vocab_size=1,000,000,000,000'],
    'train.py --n_embd=1000000000': ['no tensor', 'n_embd=1,000,000,000'],
    'train.py --n_embd=1000000': ['too large', '192,0', 'GB', '--plan'],
    'train.py --batch_size=1000000000': ['too large', 'inputs of the blocks', 'batch_size'],
    'train.py --plan --batch_size=1000000000': [
        'batch_size=1,000,000,000',
        'micro-batch',
        'at most',
    ],
    'train.py --optimizer=muon --muon_ns_steps=1e9': ['muon_ns_steps', 'at most 100'],
    'train.py --sample_interval=2000 --sample_tokens=1e9': ['sample_tokens', 'at most 1,000,000'],
    'sample.py --num_samples=4611686018427387904': ['--num_samples', 'at most 1000000'],
    'train.py --distributed_timeout=1e15': ['distributed_timeout', 'at most 10,000,000'],
    # names
    'train.py --device=gpu': ["device='gpu'", 'auto', 'cpu'],
    'train.py --dtype=bf16': ["dtype='bf16'", "'float32'", 'Did you mean bfloat16?'],
    'train.py --init_from=gpt3': ["init_from='gpt3'", "'scratch', 'resume', 'auto'"],
    'train.py --arch_preset=lama': ["arch_preset='lama'", "'gpt2'", 'Did you mean llama?'],
    'train.py --normalization=rms': ["normalization='rms'", 'Did you mean rmsnorm?'],
    'train.py --activation=gelus': ["activation='gelus'", "'relu'", 'Did you mean gelu?'],
    'train.py --position_encoding=ropes': ["position_encoding='ropes'", 'Did you mean rope?'],
    'train.py --attention_type=linear': ["attention_type='linear'", "'standard'"],
    'train.py --attention_backend=sdp': ["attention_backend='sdp'", 'Did you mean sdpa?'],
    'train.py --ffn_type=swigu': ["ffn_type='swigu'", "'standard'", 'Did you mean swiglu?'],
    'train.py --norm_position=prenorm': ["norm_position='prenorm'", "'pre'", "'post'"],
    # combinations
    'train.py --n_head=3': ['n_head=3', 'n_embd=32', '--n_head=2'],
    'train.py --n_embd=99999999999999999': ['n_head=2', 'n_embd=99999999999999999', '--n_head=1'],
    'train.py --position_encoding=rope --n_embd=18': ["'rope'", 'n_embd=18', 'n_head', 'even'],
    'train.py --use_gqa': ['num_kv_heads=None', 'use_gqa=True', 'one of 1, 2'],
    'train.py --use_gqa --num_kv_heads=3': ['num_kv_heads=3', 'n_head=2', 'one of 1, 2'],
    'train.py --num_kv_heads=1': ['num_kv_heads=1', 'use_gqa=True', 'Remove num_kv_heads'],
    'train.py --rope_theta=5': ['rope_theta=5', "position_encoding='rope'", 'Remove rope_theta'],
    'train.py --ffn_type=swiglu --activation=relu': ["activation='relu'", "ffn_type='standard'"],
    # config files
    'train.py typos.py': ['typos.py', 'does not exist', 'Did you mean typo.py?'],
    'train.py folder.py': ['folder.py', 'is a folder', 'a Python file in it'],
    'train.py syntax.py': ['syntax.py, line 2', 'invalid syntax'],
    'train.py raises.py': ['raises.py, line 3', 'division by zero'],
    'train.py exits.py': ['exits.py, line 3', 'SystemExit'],
    'train.py imports.py': ['imports.py, line 1', "No module named 'no_such_module'"],
    'train.py binary.py': ['binary.py', 'cannot be read', 'UTF-8'],
    # data
    'train.py --dataset=shakespeer': ["'shakespeer'", 'Did you mean shakespeare?', 'python_stdlib'],
    'train.py --dataset=empty': ['empty has no train.bin', 'Write train.bin, val.bin'],
    'train.py --dataset=no_val': ['no_val has no val.bin', 'Write train.bin, val.bin'],
    'train.py --dataset=short_file': [
        *('short_file/train.bin', '2,993 bytes', '3,000', 'truncated', 'Write train.bin'),
    ],
    'train.py --dataset=foreign_file': [
        *('train split', 'foreign_file', 'token 80', 'ends at 9', 'another tokenizer'),
    ],
    'train.py --dataset=over_range': ['val split', 'over_range', 'token 10', 'ends at 9'],
    'train.py --dataset=broken_meta': ['broken_meta/meta.json', 'line 1', 'Write train.bin'],
    'train.py --dataset=list_meta': ['list_meta/meta.json', 'not a JSON object'],
    'train.py --dataset=odd_dtype': ['odd_dtype/meta.json', "'float32'", 'uint8, uint16, uint32'],
    'train.py --block_size=500': ['block_size 500', 'val', '500 tokens', '--block_size=499'],
    'train.py --vocab_size=9': ['vocab_size=9', "'letters'", 'at least 10', '--vocab_size=10'],
    # output folder and resume
    'train.py --out_dir=plain.txt': ["out_dir='plain.txt'", 'File exists', '--out_dir=FOLDER'],
    'train.py --out_dir=plain.txt/out': ['plain.txt/out', 'Not a directory', '--out_dir=FOLDER'],
    'train.py --init_from=resume --out_dir=empty': ["out_dir='empty'", 'no run', '--out_dir='],
    'train.py --init_from=resume --resume_run=run_1': ["'run_1'", 'out/run_1', 'Runs in out: run_'],
    'train.py --init_from=resume --resume_run=empty': ['empty has no checkpoint', '--resume_run'],
    'train.py --resume_run=run_1': ["resume_run='run_1'", 'scratch', '--init_from=resume'],
    'train.py --init_from=resume --n_layer=3': ['n_layer=2 (now 3)', 'Remove', 'scratch'],
    **{
        f'train.py --init_from={init_from} --out_dir={name}': [f'{name}/run_', *words]
        for name, words in {
            'truncated': ['state.pt is damaged', '1,000 bytes', 'scratch'],
            'corrupt': ['state.pt is damaged', 'SHA-256', 'scratch'],
            'malicious': ['state.pt', 'No code in it was run', 'scratch'],
            'foreign': ['does not fit this model', "lacks 'model'"],
            'no_index': ['index.json cannot be read', 'No such file', 'scratch'],
        }.items()
        for init_from in ('resume', 'auto')
    },
    # several at once
    'train.py several.py --max_itres=5 --n_head=3 --device=gpu --dataset=none --no-seed': [
        *('8 problems', "'n_layers'", 'dropout=1.5', "normalization='rms'", '--max_itres'),
        *('n_head=3', "device='gpu'", "'none'", '--no-seed'),
    ],
    # other scripts
    'sample.py --temprature=1': ['--temprature=1', 'Did you mean --temperature?', '--help'],
    'sample.py --num_samples=-1': ['--num_samples=-1', 'at least 1'],
    'sample.py --max_new_tokens=0 --top_k=-1': ['--max_new_tokens=0', '--top_k=-1', '2 problems'],
    'sample.py --temperature=nan': ['--temperature=nan', 'at least 0'],
    'sample.py --top_p=1.5 --min_p=-1 --batch_size=0 --stop=': [
        *('--top_p=1.5', 'at most 1', '--min_p=-1', '--batch_size=0', '--stop is empty', '4 prob'),
    ],
    'sample.py --start=': ['--start is empty', 'no end-of-text token', '--start='],
    'sample.py --seed=x': ['--seed', "'x'", 'int'],
    'sample.py --run': ['--run', 'expected one argument'],
    'sample.py --out_dir=empty': ["out_dir='empty'", 'no run', '--out_dir='],
    'sample.py --run=run_1': ["'run_1'", 'out/run_1', 'Runs in out: run_'],
    'sample.py --start=FILE:none.txt': ['--start=FILE:none.txt', 'No such file'],
    'sample.py --start=FILE:latin.txt': ['--start=FILE:latin.txt', 'not UTF-8 text'],
    'sample.py --start=xyz': ['10 characters', "'x' 'y' 'z'", "'abcdefgh \\n'"],
    'sample.py --device=gpu': ["device='gpu'", 'auto', 'cpu'],
    'sample.py --dtype=bf16': ["dtype='bf16'", 'float32', 'Did you mean bfloat16?'],
    'sample.py raises.py': ['raises.py, line 3', 'division by zero'],
    'sample.py --out_dir=malicious': ['state.pt', 'No code in it was run'],
    'sample.py --out_dir=truncated': ['state.pt is damaged', '1,000 bytes'],
    'compare_architectures.py empty': ['no run', 'empty', 'python train.py'],
    'compare_architectures.py outt': ['outt', 'no such file or folder'],
    'compare_architectures.py plain.txt': ['plain.txt', 'not the record of a run'],
    'compare_architectures.py out --baseline=zzz': ['--baseline zzz', 'Architectures: 2L-2H'],
    'compare_architectures.py out --latest=0': ['--latest', '0 is not a positive whole number'],
    'compare_architectures.py out --latset=3': ['--latset=3', 'Did you mean --latest?'],
    'data/shakespeare/prepare.py --source=none.txt': ['--source=none.txt', 'No such file'],
    'data/shakespeare_char/prepare.py --source=latin.txt': ['--source=latin.txt', 'not UTF-8 text'],
    'data/shakespeare_char/prepare.py --sorce=a': ['--sorce=a', 'Did you mean --source?'],
    'data/python_stdlib/prepare.py more': ['more', '--help'],
}


def run_here(line, *more):
    """Run a command line in this process, in the working folder; its exit code."""
    script, arguments = command(line)
    main = importlib.import_module(script.removesuffix('.py').replace('/', '.')).main
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, 'argv', [script, *arguments, *more])
        run_script(main)
    return ended.value.code


@pytest.mark.parametrize('line', MISTAKES)
def test_user_error_is_explained_and_writes_nothing(line, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = contents(place)
    code = run_here(line)
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.startswith(f'{Path(line.split()[0]).name}: ')
    assert [words for words in MISTAKES[line] if words not in message] == [], message
    assert 'Traceback' not in message and 'usage:' not in message
    assert contents(place) == before


ONE_OF_EACH_SCRIPT = [
    'train.py several.py --n_head=3',
    'train.py --init_from=resume --out_dir=malicious',
    'sample.py --start=xyz',
    'compare_architectures.py out --baseline=zzz',
    'data/shakespeare_char/prepare.py --source=none.txt',
]


@pytest.mark.parametrize('line', ONE_OF_EACH_SCRIPT)
def test_debug_shows_traceback_before_message(line, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert run_here(line) == 2
    message = capsys.readouterr().err
    assert run_here(line, '--debug') == 2
    shown = capsys.readouterr().err
    assert shown.startswith('Traceback') and shown.endswith(message)


@pytest.mark.parametrize('line', ONE_OF_EACH_SCRIPT)
def test_user_error_in_subprocess(line, place):
    script, arguments = command(line)
    before = contents(place)
    done = subprocess.run(
        [sys.executable, str(PROJECT / script), *arguments],
        cwd=place,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert f'\n{Path(script).name}: ' in f'\n{done.stderr}'
    assert contents(place) == before
