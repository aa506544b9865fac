"""Token files, their checks, the global order and the evaluation windows."""

import hashlib
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.fuzzing import CASES, fuzzed
from helpers.project import PROJECT

from common.errors import UserError
from data import dataset
from data.dataset import batch_digest, is_prepared, load_dataset, prepare_if_missing
from data.order import ORDERS


def write_folder(folder, train=1000, val=200, *, dtype='uint16', vocab_size=None, kind='byte'):
    """A dataset whose token i is i; returns its meta.json as a dict."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {
        'format_version': 1,
        'tokenizer': {'kind': kind},
        'vocab_size': vocab_size or max(train, val),
        'dtype': dtype,
        'splits': {},
    }
    for split, count in (('train', train), ('val', val)):
        np.arange(count).astype(dtype).tofile(folder / f'{split}.bin')
        meta['splits'][split] = {'tokens': count, 'bytes': 3 * count, 'sha256': f'{split}-hash'}
    (folder / 'meta.json').write_text(json.dumps(meta))
    return meta


@pytest.mark.parametrize('sampling', ORDERS)
def test_batch_contains_windows_of_its_numbers(tmp_path, sampling):
    write_folder(tmp_path)
    data = load_dataset(tmp_path, 16)
    inputs, targets = data.batch(data.order(sampling, 7), first_number=40, count=5)
    starts = ORDERS[sampling](7, 1000, 16).starts(40, 5)
    assert (inputs == starts[:, None] + np.arange(16)).all()  # token i is i
    assert (targets == inputs + 1).all()
    for array in (inputs, targets):
        assert array.dtype == np.int64 and array.shape == (5, 16)
        assert array.flags.c_contiguous


@pytest.mark.parametrize('parts', [[8], [4, 4], [2] * 4, [1] * 8, [3, 5], [1, 6, 1]])
def test_order_is_independent_of_batching(tmp_path, parts):
    write_folder(tmp_path)
    data = load_dataset(tmp_path, 16)
    order = data.order('random', 3)
    whole = data.batch(order, 1000, 8)
    first = np.cumsum([1000, *parts[:-1]])
    divided = [data.batch(order, number, count) for number, count in zip(first, parts)]
    for side in (0, 1):
        assert np.array_equal(np.concatenate([part[side] for part in divided]), whole[side])


def test_all_valid_starts_are_used(tmp_path):
    write_folder(tmp_path, train=12, val=12)
    data = load_dataset(tmp_path, 9)
    inputs, targets = data.batch(data.order('random', 0), 0, 200)
    assert set(inputs[:, 0]) == {0, 1, 2}
    assert targets.max() == 11


@pytest.mark.parametrize('block_size', [1, 7, 64, 98, 99, 100, 199])
@pytest.mark.parametrize('eval_iters', [1, 2, 3, 200])
def test_evaluation_windows(tmp_path, block_size, eval_iters):
    write_folder(tmp_path)
    data = load_dataset(tmp_path, block_size)
    starts = data.windows('val', eval_iters)
    inputs, targets = data.read('val', starts)
    assert len(starts) == data.window_count('val', eval_iters)
    assert len(np.unique(inputs)) == inputs.size  # no token is in two windows
    assert starts[0] == 0
    room = len(range(0, 200 - block_size, block_size))
    assert len(starts) == min(eval_iters, room)
    if len(starts) > 1:
        assert targets.max() == 199
        assert np.ptp(np.diff(starts)) <= 1


@pytest.mark.parametrize(
    'kind, vocab_size, padded',
    [
        ('gpt2', 50257, 50304),
        ('gpt2', 50304, 50304),
        ('tiktoken', 100277, 100288),
        ('bpe', 1000, 1024),
        ('char', 65, 65),
        ('byte', 257, 257),
    ],
)
def test_only_byte_pairs_are_padded(tmp_path, kind, vocab_size, padded):
    write_folder(tmp_path, 60, 60, kind=kind, vocab_size=vocab_size)
    data = load_dataset(tmp_path, 8)
    assert (data.vocab_size, data.padded_vocab_size) == (vocab_size, padded)
    assert data.tokenizer == {'kind': kind}


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'uint32'])
def test_dtype_and_counts_come_from_meta(tmp_path, dtype):
    meta = write_folder(tmp_path, 250, 100, dtype=dtype)
    data = load_dataset(tmp_path, 8)
    assert data.tokens('train') == 250 and data.tokens('val') == 100
    assert data.bytes_per_token('train') == 3
    assert (data.read('val', [91])[1] == np.arange(92, 100)).all()
    assert data.meta['splits']['val']['tokens'] == 100 and data.meta['dtype'] == meta['dtype']
    assert (data.end_of_text, data.documents('val'), data.notes) == (None, None, [])


def test_hashes_come_from_meta_json(tmp_path):
    write_folder(tmp_path)
    data = load_dataset(tmp_path, 8)
    assert data.sha256('val') == 'val-hash'
    before = data.hash
    meta = json.loads((tmp_path / 'meta.json').read_text())
    meta['splits']['train']['sha256'] = 'another'
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    assert load_dataset(tmp_path, 8).hash != before


# --- Shards ---------------------------------------------------------------------------------------


def write_shards(folder, sizes, val=200, *, dtype='uint16', end_of_text=None):
    """The tokens 0, 1, 2, … of 'train' in files of `sizes` tokens; returns the meta.json."""
    meta = write_folder(folder, sum(sizes), val, dtype=dtype)
    meta |= {'format_version': 2, 'end_of_text': end_of_text}
    tokens = np.fromfile(folder / 'train.bin', dtype)
    (folder / 'train.bin').unlink()
    shards = []
    for number, part in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        name = f'train_{number:05d}.bin'
        part.tofile(folder / name)
        sha256 = hashlib.sha256(part.tobytes()).hexdigest()
        shards.append({'file': name, 'tokens': len(part), 'sha256': sha256})
    meta['splits']['train'] |= {'documents': 7, 'shards': shards}
    meta['splits']['val'] |= {'documents': 1, 'shards': [{'file': 'val.bin', 'tokens': val}]}
    (folder / 'meta.json').write_text(json.dumps(meta))
    return meta


@pytest.mark.parametrize('sizes', [[1000], [500, 500], [1] * 20 + [980], [3, 0, 17, 979, 0, 1]])
@pytest.mark.parametrize('dtype', ['uint16', 'uint32'])
def test_shards_equal_single_file(tmp_path, sizes, dtype):
    write_folder(tmp_path / 'one', 1000, 200, dtype=dtype)
    write_shards(tmp_path / 'many', sizes, dtype=dtype, end_of_text=999)
    one, many = load_dataset(tmp_path / 'one', 16), load_dataset(tmp_path / 'many', 16)
    assert (many.tokens('train'), many.end_of_text, many.documents('train')) == (1000, 999, 7)
    starts = np.arange(1000 - 16)
    assert all(map(np.array_equal, many.read('train', starts), one.read('train', starts)))
    assert all(
        map(np.array_equal, *(data.batch(data.order('epoch', 7), 40, 50) for data in (one, many)))
    )
    assert np.array_equal(many.splits['train'].read(0, 1000), np.arange(1000))
    assert np.array_equal(np.concatenate([*many.splits['train'].chunks(333)]), np.arange(1000))


def test_hash_of_shards_covers_all_tokens(tmp_path):
    meta = write_shards(tmp_path, [300, 700])
    meta['splits']['train']['sha256'] = None
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    expected = hashlib.sha256(np.arange(1000, dtype='<u2').tobytes()).hexdigest()
    assert load_dataset(tmp_path, 8).sha256('train') == expected


def test_window_outside_split_is_index_error(tmp_path):
    write_shards(tmp_path, [300, 700])
    split = load_dataset(tmp_path, 8).splits['train']
    assert split.read(999, 1).tolist() == [999] and split.windows([], 5).shape == (0, 5)
    for start, length in ((-1, 1), (1000, 1), (990, 11)):
        with pytest.raises(IndexError):
            split.read(start, length)


def test_sharded_dataset_is_prepared_with_all_shards(tmp_path):
    write_shards(tmp_path / 'toy', [300, 700])
    assert is_prepared('toy', tmp_path)
    (tmp_path / 'toy' / 'train_00001.bin').unlink()
    assert not is_prepared('toy', tmp_path)


def test_truncated_file_is_user_error(tmp_path):
    write_shards(tmp_path, [300, 700])
    data = load_dataset(tmp_path, 16)
    with open(tmp_path / 'train_00001.bin', 'r+b') as file:
        file.truncate(600)
    assert data.read('train', [500])[0][0, -1] == 515
    with pytest.raises(UserError, match=r'train_00001\.bin was truncated during the run'):
        data.read('train', [600])


def shard(number, **values):
    def corrupt(meta):
        meta['splits']['train']['shards'][number] |= values

    return corrupt


def with_split_values(**values):
    return lambda meta: meta['splits']['train'].update(values)


@pytest.mark.parametrize(
    'corrupt, message',
    [
        (shard(1, tokens=701), r'train\.tokens is 1,000, but its shards have 1,001'),
        (shard(1, tokens='x'), r'train\.shards\[1\]\.tokens'),
        (shard(0, file='../train_00000.bin'), r"shards\[0\]\.file is '\.\./train_00000\.bin'"),
        (shard(0, file='/etc/passwd'), r"shards\[0\]\.file is '/etc/passwd'"),
        (shard(0, file='x\0'), r'shards\[0\]\.file'),
        (shard(0, file='train_7.bin'), r'has no train_7\.bin'),
        (shard(0, sha256=7), r'shards\[0\]\.sha256 is 7'),
        (with_split_values(shards=[]), r'train\.shards is missing'),
        (with_split_values(shards=['train_00000.bin']), r'shards\[0\]\.file is None'),
        (with_split_values(documents=-1), r'train\.documents is -1'),
    ],
)
def test_impossible_shards_are_refused(tmp_path, corrupt, message):
    meta = write_shards(tmp_path, [300, 700])
    corrupt(meta)
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    with pytest.raises(UserError, match=message) as error:
        load_dataset(tmp_path, 8)
    assert len(error.value.problems) == 1 and str(tmp_path) in str(error.value)


def test_missing_and_short_shards_are_named(tmp_path):
    write_shards(tmp_path, [100] * 10)
    with open(tmp_path / 'train_00003.bin', 'r+b') as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r'train_00003\.bin has 100 bytes, but 200 are expected'):
        load_dataset(tmp_path, 8)
    for number in range(3, 8):
        (tmp_path / f'train_0000{number}.bin').unlink()
    with pytest.raises(UserError, match=r'no train_00003\.bin .* and 2 more are missing'):
        load_dataset(tmp_path, 8)
    (tmp_path / 'train_00002.bin').unlink()
    (tmp_path / 'train_00002.bin').mkdir()
    for number in range(3, 8):
        np.zeros(100, 'uint16').tofile(tmp_path / f'train_0000{number}.bin')
    with pytest.raises(UserError, match=r'train_00002\.bin cannot be read: Is a directory'):
        load_dataset(tmp_path, 8)


# --- Mismatches -----------------------------------------------------------------------------------


def change(**values):
    def corrupt(folder):
        path = folder / 'meta.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return corrupt


def truncate(folder):
    path = folder / 'train.bin'
    path.write_bytes(path.read_bytes()[:-2])


def append_to_val(folder):
    with open(folder / 'val.bin', 'ab') as file:
        file.write(b'x')


def cut_meta(folder):
    path = folder / 'meta.json'
    path.write_text(path.read_text()[:-20])


@pytest.mark.parametrize(
    'corrupt, message',
    [
        (truncate, r'train\.bin has 1,998 bytes, but 2,000'),
        (append_to_val, r'val\.bin has 401 bytes, but 400'),
        (lambda folder: (folder / 'val.bin').unlink(), r'no val\.bin'),
        (cut_meta, r'meta\.json cannot be used'),
        (lambda folder: (folder / 'meta.json').write_bytes(b'\xff'), r'meta\.json cannot be used'),
        (lambda folder: (folder / 'meta.json').write_text('[]'), 'not a JSON object'),
        (change(format_version=3), 'format_version is 3, not 1 or 2'),
        (change(format_version=2), r'splits\.train\.shards is missing'),
        (change(end_of_text=1000), 'end_of_text is 1000'),
        (change(dtype='float32'), "dtype is 'float32', not one of uint8, uint16, uint32"),
        (change(dtype=None), 'dtype is None'),
        (change(dtype='uint8'), r'train\.bin has 2,000 bytes, but 1,000'),
        (change(vocab_size=0), 'vocab_size is 0'),
        (change(vocab_size=True), 'vocab_size is True'),
        (
            change(vocab_size=999),
            'train split .* has the token 999, but the vocabulary ends at 998',
        ),
        (change(tokenizer='gpt2'), 'tokenizer is not an object'),
        (change(splits=None), r'splits\.train\.tokens'),
        (change(splits={'train': {'tokens': 1000}}), r'splits\.val\.tokens'),
        (change(splits={'train': {'tokens': 1, 'bytes': 'x'}}), r'splits\.train\.bytes'),
        (change(splits={'train': {'tokens': 1, 'sha256': 5}}), r'splits\.train\.sha256'),
    ],
)
def test_mismatches_are_refused(tmp_path, corrupt, message):
    write_folder(tmp_path)
    load_dataset(tmp_path, 8)
    corrupt(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_dataset(tmp_path, 8)
    assert len(error.value.problems) == 1 and str(tmp_path) in str(error.value)


@pytest.mark.parametrize('place', [0, -1])
def test_large_files_are_checked_in_samples(tmp_path, monkeypatch, place):
    write_folder(tmp_path, 300_000, 1000, dtype='uint8', vocab_size=256)
    monkeypatch.setattr(dataset, 'FULL_CHECK_BYTES', 100_000)
    load_dataset(tmp_path, 8)
    tokens = np.zeros(300_000, 'uint8')
    tokens[place] = 200
    tokens.tofile(tmp_path / 'train.bin')
    change(vocab_size=200)(tmp_path)
    np.zeros(1000, 'uint8').tofile(tmp_path / 'val.bin')
    with pytest.raises(UserError, match='has the token 200'):
        load_dataset(tmp_path, 8)


def test_largest_block_size(tmp_path):
    write_folder(tmp_path, 300, 50)
    with pytest.raises(UserError, match=r'block_size 50 .* --block_size=49'):
        load_dataset(tmp_path, 50)
    data = load_dataset(tmp_path, 49)
    assert data.windows('val', 10).tolist() == [0]
    write_folder(tmp_path, 300, 0)
    with pytest.raises(UserError, match=r'val split .* has 0 tokens'):
        load_dataset(tmp_path, 1)


def test_nanogpt_folder_is_read_as_gpt2_tokens(tmp_path):
    write_folder(tmp_path)
    (tmp_path / 'meta.json').unlink()
    data = load_dataset(tmp_path, 8)
    assert data.tokenizer == {'kind': 'gpt2'}
    assert (data.vocab_size, data.padded_vocab_size) == (50257, 50304)
    assert data.bytes_per_token('val') is None
    assert len(data.notes) == 1 and 'meta.json' in data.notes[0]
    expected = hashlib.sha256((tmp_path / 'val.bin').read_bytes()).hexdigest()
    assert data.sha256('val') == expected
    np.array([1, 50257] * 9, 'uint16').tofile(tmp_path / 'val.bin')
    with pytest.raises(UserError, match='token 50257'):
        load_dataset(tmp_path, 8)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_meta_pkl_is_never_unpickled(tmp_path):
    write_folder(tmp_path, 65, 40)
    (tmp_path / 'meta.json').unlink()
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(Bomb(tmp_path / 'exploded')))
    data = load_dataset(tmp_path, 8)
    assert not (tmp_path / 'exploded').exists()
    assert data.vocab_size == data.padded_vocab_size == 65
    assert data.tokenizer == {'kind': 'unknown'}
    assert len(data.notes) == 1 and 'meta.pkl' in data.notes[0]


def test_dataset_name_or_path(tmp_path):
    write_folder(tmp_path / 'books', 300, 100)
    write_folder(tmp_path / 'poems', 200, 100)
    assert load_dataset('books', 8, tmp_path).tokens('train') == 300
    assert load_dataset(str(tmp_path / 'poems'), 8).tokens('train') == 200
    with pytest.raises(
        UserError, match=r"'boks' .* Did you mean books\? Datasets there: books, poems"
    ):
        load_dataset('boks', 8, tmp_path)
    with pytest.raises(UserError, match='shakespeare'):
        load_dataset('', 8)


PREPARE = """
import sys, time
from pathlib import Path
folder = Path(__file__).parent
with open(folder / 'log', 'a') as log:
    log.write('run\\n')
time.sleep(0.5)
for split in ('val', 'train'):
    (folder / f'{split}.bin').write_bytes(bytes(100))
"""


@pytest.mark.slow
def test_concurrent_processes_prepare_once(tmp_path):
    (tmp_path / 'toy').mkdir()
    (tmp_path / 'toy' / 'prepare.py').write_text(PREPARE)
    code = 'import sys; from data import dataset; dataset.prepare_if_missing("toy", sys.argv[1])'
    command = [sys.executable, '-c', code, str(tmp_path)]
    processes = [
        subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert (tmp_path / 'toy' / 'log').read_text() == 'run\n'
    assert sum('not prepared yet' in text for text in printed) == 1
    prepare_if_missing('toy', tmp_path)  # the dataset is prepared
    assert (tmp_path / 'toy' / 'log').read_text() == 'run\n'
    assert load_dataset('toy', 8, tmp_path).tokens('train') == 50


def test_failed_preparation_is_user_error(tmp_path):
    (tmp_path / 'toy').mkdir()
    (tmp_path / 'toy' / 'prepare.py').write_text('import sys; sys.exit(3)')
    with pytest.raises(UserError, match=r'toy failed with exit code 3'):
        prepare_if_missing('toy', tmp_path)
    with pytest.raises(UserError, match=r'no train\.bin and no val\.bin\. To prepare it: python '):
        load_dataset('toy', 8, tmp_path)


def test_folder_without_script_is_not_prepared(tmp_path):
    write_folder(tmp_path / 'toy')
    (tmp_path / 'toy' / 'val.bin').unlink()
    before = sorted(tmp_path.rglob('*'))
    prepare_if_missing('toy', tmp_path)
    assert sorted(tmp_path.rglob('*')) == before


def test_script_outside_data_root_is_not_run(tmp_path):
    """A checkpoint of unknown origin may contain the path of the dataset."""
    script = tmp_path / 'elsewhere' / 'prepare.py'
    script.parent.mkdir()
    script.write_text('open("executed", "w")')
    (tmp_path / 'data').mkdir()
    for name in (str(script.parent), '../elsewhere'):
        prepare_if_missing(name, tmp_path / 'data')
        with pytest.raises(UserError, match=r'To prepare it: python .*prepare\.py'):
            load_dataset(name, 16, tmp_path / 'data')
    assert not list(tmp_path.rglob('executed'))


# --- Hostile files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'text',
    [
        '[' * 100_000,
        '{"format_version": 1, "dtype": ["uint16"]}',
        '{"format_version": 1, "dtype": {}}',
        '{"format_version": ' + '9' * 5000 + '}',
        '\ud800',
        '7',
        '',
    ],
)
def test_invalid_meta_json_is_named(tmp_path, text):
    write_folder(tmp_path)
    (tmp_path / 'meta.json').write_text(text, errors='surrogatepass')
    with pytest.raises(UserError, match=r'meta\.json'):
        load_dataset(tmp_path, 16)


@pytest.mark.parametrize('name', ['meta.json', 'train.bin', 'val.bin'])
def test_fuzzed_dataset_loads_or_is_user_error(tmp_path, name):
    write_folder(tmp_path)
    file, rng = tmp_path / name, random.Random(name)
    original, refused = file.read_bytes(), 0
    for _ in range(CASES):
        file.unlink()  # the previous case may still have the file mapped
        file.write_bytes(fuzzed(original, rng))
        try:
            data = load_dataset(tmp_path, 16)
        except UserError as error:
            refused += 1
            assert str(tmp_path) in str(error)
            continue
        for split in ('train', 'val'):
            windows = data.read(split, data.windows(split, 10))
            assert np.max(windows) < data.vocab_size
            assert isinstance(data.sha256(split), str)
            assert (data.bytes_per_token(split) or 0) >= 0
        inputs, _ = data.batch(data.order('epoch', 1), first_number=0, count=4)
        assert inputs.shape == (4, 16)
    assert refused > 0


def test_dataset_imports_no_torch_and_no_tokenizer():
    code = 'import sys, data.dataset; print({"torch", "tiktoken"} & set(sys.modules))'
    run = subprocess.run(
        [sys.executable, '-c', code], cwd=PROJECT, capture_output=True, text=True, timeout=120
    )
    assert run.stdout == 'set()\n'


def test_batch_digests_add_up():
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 60000, (12, 33))
    whole = batch_digest(40, tokens)
    parts = [(40, tokens[:5]), (45, tokens[5:6]), (46, tokens[6:])]
    draw.shuffle(parts)
    assert sum(batch_digest(first, part) for first, part in parts) % 2**64 == whole
    changed = tokens.copy()
    changed[7, 3] += 1
    swapped = tokens.copy()
    swapped[7, [3, 4]] = swapped[7, [4, 3]]
    others = [batch_digest(41, tokens), batch_digest(40, tokens[::-1]), batch_digest(40, changed)]
    assert len({whole, batch_digest(40, swapped), *others}) == 5
