"""Runs and a config file of version 0.1.0 (flat layout) still work: `runs.zip`, `component.py`.

The runs are in an archive, so that a comparison of all runs in the checkout does not include them.

The expected losses of the resumed runs are those of a resume with version 0.1.0.
"""

import json
import shutil
from pathlib import Path

import pytest

from compare_architectures import main as compare
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
    assert record['architecture'] == old_record['architecture']
    output = result.stdout + result.stderr
    for old, new in (('registry', 'common.registry'), ('components.contract', 'components.base')):
        assert f'the module {old} is now {new}' in output


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
