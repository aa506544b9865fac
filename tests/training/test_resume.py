"""A resumed run ends with the same weights, optimizer state and record as an uninterrupted run.

Each process is one start of train.py on one thread: 8 iterations of 2 micro-batches with dropout,
with an evaluation and a checkpoint after every second iteration.
"""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
from helpers.bit_equality import bit_differences, without_measurements
from helpers.in_process import joined, session_here, train_here
from helpers.project import PROJECT, TINY_RUN

from common.errors import UserError
from configurator import Layer
from records.record import read_record
from records.run_folders import latest_run
from training import resume
from training.checkpoint import list_checkpoints, load_latest, load_state, read_index

pytestmark = pytest.mark.slow

OPTIONS = {
    **TINY_RUN,
    'dropout': 0.1,
    'max_iters': 8,
    'eval_interval': 2,
    'keep_last': 2,
    'log_style': 'line',
    'init_from': 'auto',
}
SCHEMA = json.loads((PROJECT / 'records/record_schema.json').read_text())


def start(cwd: Path, dataset: Path, *, fault=None, code=0, threads=1, **options) -> str:
    """Run train.py to its end and return its output; the run folder is in cwd/out."""
    script = [PROJECT / 'train.py']
    if fault:
        script = [PROJECT / 'tests/helpers/faulty_train.py', json.dumps(fault)]
    values = {**OPTIONS, 'dataset': dataset, 'out_dir': 'out', **options}
    result = subprocess.run(
        [sys.executable, *script, *(f'--{key}={value}' for key, value in values.items())],
        cwd=cwd,
        env={**os.environ, 'OMP_NUM_THREADS': str(threads)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == code, f'{result.stdout}\n{result.stderr}'
    return result.stdout + result.stderr


def the_run(cwd: Path) -> Path:
    return latest_run(cwd / 'out')


def assert_same_end(run: Path, reference: Path, extra_checkpoints: tuple = ()) -> None:
    """Compare weights, optimizer, scaler, progress and record, except times and resumes."""
    (ours, state), (theirs, expected) = (
        load_latest(folder / 'checkpoints', pytest.fail) for folder in (run, reference)
    )
    assert {*state[0]} == {*expected[0]} == {'model', 'optimizer', 'offsets', 'scaler'}
    assert bit_differences(state, expected) == []
    assert ours.iter == theirs.iter and ours.index['progress'] == theirs.index['progress']

    record, expected_record = read_record(run), read_record(reference)
    for key in ('training_iterations', 'eval_steps', 'architecture'):
        actual, reference_value = record[key], expected_record[key]
        if isinstance(actual, list):
            actual = without_measurements(actual)
            reference_value = without_measurements(reference_value)
        assert actual == reference_value
    saved = without_measurements(record['checkpoints'])
    assert [e for e in saved if e['iter'] not in extra_checkpoints] == without_measurements(
        expected_record['checkpoints']
    )
    assert [e['iter'] for e in saved] == sorted({e['iter'] for e in saved})  # each once
    assert record['status'] == expected_record['status'] == 'finished'
    assert record == read_record(run / 'record.json')
    jsonschema.validate(record, SCHEMA)


def resumed_at(run: Path) -> list[int]:
    return [event['iter'] for event in read_record(run)['events'] if event['event'] == 'resume']


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory, tiny_dataset) -> Path:
    """The reference run. There was no run to resume, so it started from scratch."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    start(folder, tiny_dataset)
    run = the_run(folder)
    record = read_record(run)
    assert [entry['iter'] for entry in record['training_iterations']] == list(range(8))
    assert [entry['iter'] for entry in record['eval_steps']] == [0, 2, 4, 6, 8]
    assert record['events'] == []
    return run


@pytest.fixture
def copy(uninterrupted, tmp_path) -> Path:
    """A copy of the uninterrupted run, to resume."""
    return Path(shutil.copytree(uninterrupted, tmp_path / 'out' / uninterrupted.name))


def test_resume_after_stop_and_kill(tmp_path, tiny_dataset, uninterrupted):
    """SIGTERM saves after 3 iterations; kill -9 then loses the iteration after the save at 4."""
    start(tmp_path, tiny_dataset, fault={'iter': 2, 'signal': 'SIGTERM'}, code=143)
    assert read_record(the_run(tmp_path))['status'] == 'interrupted'
    start(tmp_path, tiny_dataset, fault={'iter': 4, 'signal': 'SIGKILL'}, code=-9)
    assert read_record(the_run(tmp_path))['status'] == 'running'
    start(tmp_path, tiny_dataset)
    assert resumed_at(the_run(tmp_path)) == [3, 4]
    assert_same_end(the_run(tmp_path), uninterrupted, extra_checkpoints=(3,))


def test_resume_after_kill_during_save(tmp_path, tiny_dataset, uninterrupted):
    start(tmp_path, tiny_dataset, fault={'save': 2, 'call': 'rename', 'nth': 1}, code=-9)
    lost = the_run(tmp_path)  # no checkpoint is published yet, so the next process starts a run
    faults = [
        ({'save': 4, 'call': 'fsync', 'nth': 1}, 2),  # while state.pt is written
        ({'save': 4, 'call': 'fsync', 'nth': 4}, 4),  # published, but not recorded
        ({'save': 6, 'call': 'rename', 'nth': 2}, 6),  # while an older one is removed
    ]
    for number, (fault, newest) in enumerate(faults):
        start(tmp_path, tiny_dataset, fault=fault, code=-9)
        published = list_checkpoints(the_run(tmp_path) / 'checkpoints')
        assert published[0].name == f'iter_{newest:08d}'
        for path in published:  # all are readable
            load_state(read_index(path))
        assert len(resumed_at(the_run(tmp_path))) == number
    start(tmp_path, tiny_dataset)
    run = the_run(tmp_path)
    assert set((tmp_path / 'out').iterdir()) == {lost, run}
    assert resumed_at(run) == [2, 4, 6]
    assert_same_end(run, uninterrupted)
    names = sorted(path.name for path in (run / 'checkpoints').iterdir())
    assert names == ['iter_00000006', 'iter_00000008']  # no leftovers


def test_resume_after_kill_during_async_save(tmp_path, tiny_dataset, uninterrupted):
    fault = {'save': 4, 'call': 'fsync', 'nth': 1}  # at the latest that of state.pt
    start(tmp_path, tiny_dataset, fault=fault, code=-9, async_save=True)
    published = list_checkpoints(the_run(tmp_path) / 'checkpoints')
    assert [path.name for path in published] == ['iter_00000002']
    start(tmp_path, tiny_dataset, async_save=True)
    assert resumed_at(the_run(tmp_path)) == [2]
    assert_same_end(the_run(tmp_path), uninterrupted)


def test_fp16_scaler_resumes(tmp_path, tiny_dataset):
    options = {'dtype': 'float16', 'log_interval': 2}
    start(tmp_path, tiny_dataset, out_dir='whole', **options)
    (whole,) = (tmp_path / 'whole').iterdir()
    _, (state,) = load_latest(whole / 'checkpoints', pytest.fail)
    scaler = state['scaler']
    assert scaler['_growth_tracker'] > 3 or scaler['scale'] != 65536  # it has a history
    start(tmp_path, tiny_dataset, fault={'iter': 2, 'signal': 'SIGTERM'}, code=143, **options)
    start(tmp_path, tiny_dataset, **options)
    assert resumed_at(the_run(tmp_path)) == [3]
    assert_same_end(the_run(tmp_path), whole, extra_checkpoints=(3,))


def test_epoch_sampling_resumes(tmp_path):
    """A run killed in epoch 2 and stopped in epoch 3 still uses each window once per epoch.

    The text is random bytes, so that its windows differ.
    """
    folder = tmp_path / 'noise'
    folder.mkdir()
    splits = {}
    for split, length in (('train', 13 * 32 + 32 + 5), ('val', 200)):
        (folder / f'{split}.bin').write_bytes(random.Random(length).randbytes(length))
        splits[split] = {'tokens': length, 'bytes': length}
    train = (folder / 'train.bin').read_bytes()
    meta = {'format_version': 1, 'tokenizer': {'kind': 'byte'}, 'vocab_size': 256, 'dtype': 'uint8'}
    (folder / 'meta.json').write_text(json.dumps({**meta, 'splits': splits}))

    options = {**OPTIONS, 'sampling': 'epoch', 'init_from': 'scratch'}
    whole = train_here(folder, tmp_path / 'whole', **options)
    start(tmp_path, folder, fault={'iter': 4, 'signal': 'SIGKILL'}, code=-9, sampling='epoch')
    start(
        tmp_path, folder, fault={'iter': 6, 'signal': 'SIGTERM'}, code=143
    )  # sampling is inherited
    start(tmp_path, folder)
    record = read_record(the_run(tmp_path))
    assert resumed_at(the_run(tmp_path)) == [4, 7]
    keys = ('iter', 'val_loss', 'data_hash', 'epochs', 'unique_tokens')
    assert [[step[key] for key in keys] for step in record['eval_steps']] == [
        [step[key] for key in keys] for step in whole.record['eval_steps']
    ]

    inputs, _ = joined(whole.trained_on).numpy()  # (32, T): two epochs and a part of the third
    starts = [train.index(window.astype('uint8').tobytes()) for window in inputs]
    assert len(starts) == 32
    covered = set()
    for epoch in (starts[:13], starts[13:26], starts[26:]):
        windows = sorted(epoch)
        assert len(set(windows)) == len(epoch) and epoch != windows
        assert {(b - a) % 32 for a, b in pairwise(windows)} == {0}
        covered |= {token for first in epoch for token in range(first, first + 32)}
    last = record['eval_steps'][-1]
    assert last['unique_tokens'] == record['summary']['unique_tokens'] == len(covered)
    assert last['epochs'] == record['summary']['epochs'] == 32 / 13
    data = record['startup_info']['data']
    assert (data['windows_per_epoch'], data['planned_epochs']) == (13, 32 / 13)
    assert data['planned_unique_tokens'] == len(covered)
    jsonschema.validate(record, SCHEMA)


def test_resume_refuses_other_sampling(copy, tmp_path, tiny_dataset):
    output = start(tmp_path, tiny_dataset, code=2, sampling='epoch')
    assert "cannot be resumed with sampling='epoch'" in output and "sampling='random'" in output
    assert 'Remove sampling to continue' in output and 'Traceback' not in output
    assert the_run(tmp_path) == copy and resumed_at(copy) == []


def test_epochs_unknown_after_order_changes(copy, tmp_path, tiny_dataset):
    start(tmp_path, tiny_dataset, max_iters=9, data_seed=7)
    steps = read_record(copy)['eval_steps']
    assert [step['epochs'] is None for step in steps] == [False] * 5 + [True]
    assert steps[-2]['unique_tokens'] > 0 and steps[-1]['unique_tokens'] is None
    start(tmp_path, tiny_dataset, max_iters=10)  # and they stay unknown
    assert read_record(copy)['summary']['unique_tokens'] is None


def test_resume_refuses_other_architecture(copy, tmp_path, tiny_dataset):
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()}

    before = contents()
    output = start(tmp_path, tiny_dataset, code=2, n_layer=3, normalization='rmsnorm')
    assert 'n_layer=2 (now 3)' in output
    assert "normalization='layernorm' (now 'rmsnorm')" in output
    assert 'dropout' not in output and 'Traceback' not in output
    assert contents() == before and the_run(tmp_path) == copy


def test_layers_of_a_pattern_resume_bit_equal(tmp_path, tiny_dataset):
    """Without their options, which the checkpoint has; a kind of the preset stays removed."""
    start_options = {'decay_lr': False, 'eval_interval': 2, 'eval_iters': 1}
    kinds = {
        'arch_preset': 'smollm3',
        'layer_pattern': 'RN',
        'layer_kinds.N': None,
        'layer_kinds.R.sliding_window': 8,
        'layer_kinds.R.dropout': 0.1,
    }
    whole = train_here(tiny_dataset, tmp_path / 'whole', **start_options, **kinds)
    first = train_here(tiny_dataset, tmp_path / 'out', **start_options, **kinds, max_iters=2)
    again = train_here(tiny_dataset, tmp_path / 'out', init_from='resume', decay_lr=False)
    assert again.folder == first.folder and again.session.raw_model.config == (
        whole.session.raw_model.config
    )
    assert again.session.raw_model.config.kinds['N'].position_encoding == 'rope'
    assert bit_differences(again.saved_weights(), whole.saved_weights()) == []
    assert again.losses == whole.losses
    with pytest.raises(UserError) as refused:
        session_here(
            tiny_dataset,
            tmp_path / 'out',
            init_from='resume',
            **{'layer_kinds.R.residual_dropout': 0.2, 'layer_kinds.N.n_head': 1},
        )
    (problem,) = refused.value.problems
    assert 'cannot be resumed with another architecture' in problem
    assert 'layer_kinds.R.residual_dropout=0.1 (now 0.2)' in problem
    assert 'layer_kinds.N.n_head=2 (now 1)' in problem
    named = set(re.findall(r'[\w.]+(?==)', problem))
    assert not named & {'layer_kinds.R.dropout', 'layer_kinds.R.sliding_window', 'layer_kinds.N'}
    with pytest.raises(UserError, match="layer_pattern='RN' \\(now 'NR'\\)"):
        session_here(tiny_dataset, tmp_path / 'out', init_from='resume', layer_pattern='NR')


def test_other_mixer_of_a_hybrid_is_refused_by_its_name(tmp_path, tiny_dataset):
    """Neither options that follow from the mixer are named, nor those that stay as they were."""
    kinds = {'layer_pattern': 'MA', 'layer_kinds.M.mixer': 'mamba2'}
    train_here(tiny_dataset, tmp_path / 'out', **kinds, max_iters=2, eval_interval=2, eval_iters=1)
    with pytest.raises(UserError) as refused:
        session_here(tiny_dataset, tmp_path / 'out', init_from='resume', mixer='rg_lru')
    (problem,) = refused.value.problems
    assert "it has mixer='attention' (now 'rg_lru'). Remove these" in problem


def test_finished_run_has_nothing_to_resume(copy, tmp_path, tiny_dataset, uninterrupted):
    assert 'all iterations of this run are done' in start(tmp_path, tiny_dataset)
    assert resumed_at(the_run(tmp_path)) == [8]
    assert_same_end(copy, uninterrupted)


def test_resume_moved_run_with_broken_checkpoint(copy, tmp_path, tiny_dataset, uninterrupted):
    moved = copy.rename(tmp_path / 'another name')
    broken = moved / 'checkpoints' / 'iter_00000008' / 'state.pt'
    broken.write_bytes(broken.read_bytes()[:-100])
    output = start(tmp_path, tiny_dataset, init_from='resume', resume_run=moved)
    assert 'iter_00000008' in output and 'damaged' in output and 'iter_00000006' in output
    assert resumed_at(moved) == [6]
    (event,) = [e for e in read_record(moved)['events'] if e['event'] == 'broken_checkpoint']
    assert 'state.pt' in event['message']
    # The new checkpoint has a suffix, because the broken one still had the name.
    rewritten = moved / 'checkpoints' / 'iter_00000008_2'
    assert rewritten.is_dir() and not broken.exists()
    assert list((tmp_path / 'out').iterdir()) == []
    rewritten.rename(broken.parent)
    for name in ('journal.jsonl', 'record.json'):
        text = (moved / name).read_text()
        (moved / name).write_text(text.replace('iter_00000008_2"', 'iter_00000008"'))
    assert_same_end(moved, uninterrupted)


def test_resume_with_other_options(copy, tmp_path, tiny_dataset):
    changes = {'max_iters': 12, 'learning_rate': 3e-4, 'weight_decay': 0.3, 'beta2': 0.99}
    second_out = tmp_path / 'second'
    shutil.copytree(copy, second_out / copy.name)
    output = start(tmp_path, tiny_dataset, threads=2, **changes)
    record = read_record(copy)
    (event,) = record['events']
    assert event['event'] == 'resume' and event['iter'] == 8
    expected = {
        'max_iters': [8, 12],
        'learning_rate': [6e-4, 3e-4],
        'weight_decay': [0.1, 0.3],
        'beta2': [0.95, 0.99],
        'threads': [1, 2],
    }
    assert event['changed'].items() >= expected.items()
    assert 'dropout' not in event['changed']
    for key in expected:
        assert key in output
    assert record['config']['max_iters'] == record['summary']['final_iter'] == 12
    assert [entry['iter'] for entry in record['training_iterations']] == list(range(12))
    assert [entry['iter'] for entry in record['eval_steps']] == [0, 2, 4, 6, 8, 10, 12]
    # They take effect: a cosine from 3e-4 to a tenth of it over 12 iterations, AdamW's options.
    cosine = [3e-5 + 2.7e-4 * (1 + math.cos(math.pi * i / 12)) / 2 for i in range(8, 12)]
    assert [e['lr'] for e in record['training_iterations'][8:]] == pytest.approx(cosine)
    optimizer = train_here(
        tiny_dataset, second_out, **{**OPTIONS, **changes}
    ).session.optimizer.inner
    assert {group['weight_decay'] for group in optimizer.param_groups} == {0.3, 0.0}
    assert {group['betas'] for group in optimizer.param_groups} == {(0.9, 0.99)}
    assert {group['fused'] for group in optimizer.param_groups} == {True}


def test_resume_refuses_other_optimizer(copy, tmp_path, tiny_dataset):
    before = sorted(copy.rglob('*'))
    output = start(tmp_path, tiny_dataset, code=2, max_iters=12, optimizer='lion')
    assert "cannot be resumed with optimizer='lion'" in output and "'adamw'" in output
    assert 'Traceback' not in output and sorted(copy.rglob('*')) == before


@pytest.mark.parametrize('optimizer', ['muon', 'lion'])
def test_resume_extends_stable_phase_bit_equal(tmp_path, tiny_dataset, optimizer):
    """wsd: a run stopped before its decay and extended equals a run of the full length."""
    options = {
        **{key: OPTIONS[key] for key in OPTIONS if key not in ('init_from', 'max_iters')},
        'optimizer': optimizer,
        'lr_schedule': 'wsd',
        'decay_fraction': 0.5,
        'warmup_iters': 1,
    }
    long, short = {'max_iters': 8}, {'max_iters': 4, 'lr_decay_iters': 8}
    whole = train_here(tiny_dataset, tmp_path / 'whole', **options, **long)
    train_here(tiny_dataset, tmp_path / 'cut', **options, **short)
    resumed = train_here(tiny_dataset, tmp_path / 'cut', init_from='resume', **long)
    rates = [entry['lr'] for entry in resumed.record['training_iterations']]
    assert rates[0] == 3e-4 and rates[1:5] == [6e-4] * 4 and rates[5:] == sorted(rates[5:])[::-1]
    assert rates[-1] < 3e-4
    assert resumed.losses == whole.losses
    for name, weight in whole.weights().items():
        assert (resumed.weights()[name] == weight).all(), name
    optimizer_info = resumed.record['startup_info']['optimizer']
    assert (optimizer_info['name'], optimizer_info['schedule']) == (optimizer, 'wsd')
    jsonschema.validate(resumed.record, SCHEMA)


def test_resume_keeps_eval_interval(tiny_dataset, tmp_path):
    options = {'n_layer': 1, 'eval_iters': 1, 'log_interval': 100}
    first = train_here(tiny_dataset, tmp_path, max_iters=4, **options)
    assert first.record['config']['eval_interval'] == 20
    assert first.record['startup_info']['derived']['eval_interval'].startswith('20 (max_iters / 10')
    # A new run of 220 iterations would be evaluated every 22.
    train_here(tiny_dataset, tmp_path, max_iters=220, init_from='resume', **options)
    record = read_record(first.folder)
    assert [entry['iter'] for entry in record['eval_steps']] == [0, 4, *range(20, 221, 20)]
    assert 'eval_interval' not in record['events'][0]['changed']


def test_resume_keeps_derived_sizes(tmp_path, monkeypatch):
    """On other devices too, unless an option sets one or the ranks do not divide them."""
    recorded = {'batch_size': 40, 'gradient_accumulation_steps': 12}

    def sizes(ranks: int, *layers: Layer) -> dict:
        monkeypatch.setattr(resume, 'world_size', lambda: ranks)
        return resume._recorded_sizes(recorded, list(layers), tmp_path).values

    assert sizes(1, Layer('run', {'n_layer': 2})) == sizes(4) == recorded
    assert sizes(8) == sizes(1, Layer('command line', {'batch_size': 12})) == {}
    origin = resume._recorded_sizes(recorded, [], tmp_path).origin
    assert origin.startswith(resume.UNCHOSEN_ORIGINS)  # derived in the next checkpoint too
