"""Runs and config files of older versions still work.

`runs.zip`, `component.py`: version 0.1.0 (flat layout). `mixed_runs.zip`: the last version before
layers could have any options, with the short forms attention_pattern and dense_layers.

The runs are in archives, so that a comparison of all runs in the checkout does not include them.

The expected losses of the resumed runs, and the sampled tokens, are those of the old version.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from common.architecture_identity import HASH_VERSION, NEUTRAL
from compare_architectures import main as compare
from comparison import load_runs
from inference.generate import generate
from training.load import load_run
from training_logger import read_record

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
RUNS = {  # further options; the losses of iterations 6 to 8; the validation loss at 9
    'run_20261129_094524': (
        [],
        [5.510961532592773, 5.532803058624268, 5.529074668884277],
        5.54123592376709,
    ),
    'run_20261129_094606': (
        ['--optimizer=muon', '--norm_power=2', '--seed=2'],
        [5.508016586303711, 5.538455963134766, 5.528332710266113],
        5.5239057540893555,
    ),
}


@pytest.fixture
def user_project(tmp_path):
    """A folder with the config file, its dataset and its runs."""
    shutil.copy(HERE / 'component.py', tmp_path)
    shutil.copytree(HERE / 'data_small', tmp_path / 'data_small')
    shutil.unpack_archive(HERE / 'runs.zip', tmp_path / 'out')
    return tmp_path


@pytest.mark.parametrize('name', RUNS)
def test_old_checkpoint_resumes_with_original_losses(user_project, run_script, name):
    options, losses, val_loss = RUNS[name]
    resume = ['--init_from=resume', f'--resume_run={name}', '--max_iters=9']
    run_script('train.py', 'component.py', *options, *resume)
    record = read_record(user_project / 'out' / name)
    resumed = [entry['loss'] for entry in record['training_iterations'] if entry['iter'] >= 6]
    assert resumed == pytest.approx(losses, rel=1e-5)
    assert record['eval_steps'][-1]['val_loss'] == pytest.approx(val_loss, rel=1e-5)
    assert record['status'] == 'finished'


def test_config_with_old_import_paths_trains(user_project, run_script):
    """All losses are the same; one note names the new paths."""
    name = 'run_20261129_094524'
    result = run_script('train.py', 'component.py', '--out_dir=new')
    (record,) = (read_record(path) for path in (user_project / 'new').iterdir())
    old_record = json.loads((user_project / 'out' / name / 'record.json').read_text())
    assert [entry['loss'] for entry in record['training_iterations']] == pytest.approx(
        [entry['loss'] for entry in old_record['training_iterations']], rel=1e-5
    )
    assert architecture_of_version_1(record) == old_record['architecture']
    output = result.stdout + result.stderr
    for old, new in (('registry', 'common.registry'), ('components.contract', 'components.base')):
        assert f'the module {old} is now {new}' in output


def architecture_of_version_1(record):
    """The architecture of a record of this version as the old version wrote it."""
    architecture = {**record['architecture']}
    assert (architecture.pop('hash_version'), architecture.pop('layers')) == (HASH_VERSION, None)
    choices = {k: v for k, v in architecture['choices'].items() if k not in NEUTRAL}
    return {**architecture, 'choices': choices}


def test_old_records_are_compared(user_project, capsys):
    assert not compare([str(user_project / 'out'), '--format=json'])
    comparison = json.loads(capsys.readouterr().out)
    assert len(comparison['runs']) == 2


def test_old_checkpoint_is_sampled(user_project, run_script):
    run = f'--run={next(iter(RUNS))}'
    result = run_script(
        'sample.py', 'component.py', run, '--num_samples=1', '--max_new_tokens=5', '--device=cpu'
    )
    assert result.stdout.strip()


# --- Mixed layers, in short forms -----------------------------------------------------------------


class Mixed(NamedTuple):
    """A run of `mixed_runs.zip`, and what the old version gave."""

    name: str
    preset: str
    losses: list[float]  # of iterations 6 to 8
    val_loss: float  # at 9
    tokens: list[int]  # drawn after 1, 2, 3 with seed 1


MIXED = [
    Mixed(
        'run_20261129_203238',
        'gemma2',
        [2.7068099975585938, 2.712921619415283, 2.7048020362854004],
        2.6865134239196777,
        [0, 9, 3, 11, 6, 0, 0, 1, 11, 1, 9, 13],
    ),
    Mixed(
        'run_20261129_203307',
        'deepseek',
        [2.588329792022705, 2.590289831161499, 2.544363021850586],
        2.5497851371765137,
        [0, 1, 3, 11, 6, 0, 0, 1, 11, 1, 9, 13],
    ),
]
MIXED_RUNS = pytest.mark.parametrize('run', MIXED, ids=[run.preset for run in MIXED])


@pytest.fixture
def mixed_project(tmp_path):
    """A folder with both runs in out, and their dataset: that of version 0.1.0 with 16 tokens."""
    shutil.unpack_archive(HERE / 'mixed_runs.zip', tmp_path / 'out')
    data = tmp_path / 'data_tiny'
    data.mkdir()
    meta = json.loads((HERE / 'data_small/meta.json').read_text()) | {'vocab_size': 16}
    for split, values in meta['splits'].items():
        tokens = bytes(token % 16 for token in (HERE / f'data_small/{split}.bin').read_bytes())
        (data / f'{split}.bin').write_bytes(tokens)
        values['sha256'] = hashlib.sha256(tokens).hexdigest()
    (data / 'meta.json').write_text(json.dumps(meta))
    return tmp_path


@MIXED_RUNS
def test_checkpoint_with_short_forms_loads_samples_and_resumes(mixed_project, run_script, run):
    folder = mixed_project / 'out' / run.name
    loaded, generator = load_run(folder), torch.Generator().manual_seed(1)
    sampled = generate(
        loaded.model,
        torch.tensor([[1, 2, 3]]),
        len(run.tokens),
        choose=lambda logits: torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0],
    )
    assert [int(token) for token in sampled] == run.tokens

    resume = ['--init_from=resume', '--out_dir=out', f'--resume_run={run.name}', '--max_iters=9']
    run_script('train.py', *resume, '--log_interval=1')
    record = read_record(folder)
    resumed = [entry['loss'] for entry in record['training_iterations'] if entry['iter'] >= 6]
    assert resumed == pytest.approx(run.losses, rel=1e-6)
    assert record['eval_steps'][-1]['val_loss'] == pytest.approx(run.val_loss, rel=1e-6)
    # The record keeps what the old version wrote, and counts as the architecture of this one.
    (of_record,) = load_runs(folder)
    assert record['architecture']['hash'] != of_record.architecture_hash == loaded.config.hash


def test_record_with_short_forms_is_grouped_with_the_same_layers(mixed_project, run_script):
    """The old run, resumed; and a new run with another seed, written as a layer pattern."""
    run = MIXED[0]
    folder = mixed_project / 'out' / run.name
    command = read_record(folder)['metadata']['command'].split()[2:]
    pattern = {'sliding_window': None, 'layer_pattern': 'LG', 'layer_kinds.L.sliding_window': 4}
    options = {'seed': 2, 'data_seed': 2, 'max_iters': 7, **pattern}
    run_script(
        'train.py',
        *(argument for argument in command if not argument.startswith('--sliding_window')),
        *(f'--{key}={value}' for key, value in options.items()),
    )
    resume = ['--init_from=resume', '--out_dir=out', f'--resume_run={run.name}', '--max_iters=7']
    run_script('train.py', *resume)
    runs = [r for r in load_runs(mixed_project) if r.config['arch_preset'] == run.preset]
    assert [r.config['seed'] for r in runs] == [2, 1337]
    compared = load_runs(*(r.folder for r in runs)).compare()
    (group,) = compared['groups']
    assert len(group['runs']) == 2
    assert compared['options_that_differ'].keys() <= {'init_from'}
    assert compared['loss_warnings'].keys() == {'max_iters'}  # 6, then 7
