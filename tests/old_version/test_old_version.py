"""Runs and a config file that the flat layout, version 0.1.0, wrote: `runs.zip`, `component.py`.

The runs are in an archive: as folders, a comparison of all runs in the checkout would have them.

The losses of the resumed runs are those with which version 0.1.0 itself resumed them.
"""

import json
import shutil
from pathlib import Path

import pytest

from compare_architectures import main as compare
from training_logger import read_record

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
RUNS = {  # options beside component.py's; the losses of iterations 6 to 8; the validation loss at 9
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
def project_of_the_user(tmp_path):
    shutil.copy(HERE / 'component.py', tmp_path)
    shutil.copytree(HERE / 'data_small', tmp_path / 'data_small')
    shutil.unpack_archive(HERE / 'runs.zip', tmp_path / 'out')
    return tmp_path


@pytest.mark.parametrize('name', RUNS)
def test_checkpoint_resumes_with_the_losses_of_its_own_version(
    project_of_the_user, run_script, name
):
    options, losses, val_loss = RUNS[name]
    resume = ['--init_from=resume', f'--resume_run={name}', '--max_iters=9']
    run_script('train.py', 'component.py', *options, *resume)
    record = read_record(project_of_the_user / 'out' / name)
    resumed = [entry['loss'] for entry in record['training_iterations'] if entry['iter'] >= 6]
    assert resumed == pytest.approx(losses, rel=1e-5)
    assert record['eval_steps'][-1]['val_loss'] == pytest.approx(val_loss, rel=1e-5)
    assert record['status'] == 'finished'


def test_config_file_with_old_import_paths_trains(project_of_the_user, run_script):
    """The same losses again, from the first iteration on; one note names the new paths."""
    name = 'run_20261129_094524'
    result = run_script('train.py', 'component.py', '--out_dir=new')
    (record,) = (read_record(path) for path in (project_of_the_user / 'new').iterdir())
    before = json.loads((project_of_the_user / 'out' / name / 'record.json').read_text())
    assert [entry['loss'] for entry in record['training_iterations']] == pytest.approx(
        [entry['loss'] for entry in before['training_iterations']], rel=1e-5
    )
    assert record['architecture'] == before['architecture']
    printed = result.stdout + result.stderr
    for old, new in (('registry', 'common.registry'), ('components.contract', 'components.base')):
        assert f'the module {old} is now {new}' in printed


def test_old_records_are_compared(project_of_the_user, capsys):
    assert not compare([str(project_of_the_user / 'out'), '--format=json'])
    compared = json.loads(capsys.readouterr().out)
    assert len(compared['runs']) == 2


def test_old_checkpoint_is_sampled(project_of_the_user, run_script):
    run = f'--run={next(iter(RUNS))}'
    result = run_script(
        'sample.py', 'component.py', run, '--num_samples=1', '--max_new_tokens=5', '--device=cpu'
    )
    assert result.stdout.strip()
