"""The Python API: `train(config, **options)` and `load_run(path)`, compared with the commands."""

import shlex
import signal
import sys
import threading

import pytest
import torch
from helpers.in_process import train_here
from helpers.project import TINY_RUN

import sample
import train as train_module
from common.console_output import visible
from common.errors import UserError
from model_config import ACTIVATION_REGISTRY
from train import train
from training.checkpoint import list_checkpoints
from training.load import load_run
from training.signals import SignalHandler, interrupt_at_once

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def options(tiny_dataset, tmp_path):
    """Keyword arguments of a tiny run with output in tmp_path/out."""
    return {**TINY_RUN, 'dataset': tiny_dataset, 'out_dir': tmp_path / 'out', 'log_style': 'line'}


@pytest.fixture(scope='module')
def trained(tiny_dataset, tmp_path_factory):
    """A run that the command line trained."""
    return train_here(tiny_dataset, tmp_path_factory.mktemp('api') / 'out', dropout=0.1)


def losses(run):
    return [entry['loss'] for entry in run.record['training_iterations']]


def interrupt_at(monkeypatch, number, requests=('SIGINT',)):
    """Send the signals to this process at the start of an iteration."""
    run_iteration = train_module.run_iteration

    def interrupted(session, clock):
        if session.progress.iter == number:
            for name in requests:
                signal.raise_signal(getattr(signal, name))
        run_iteration(session, clock)

    monkeypatch.setattr(train_module, 'run_iteration', interrupted)


# --------------------------------------------------------------------------------------------------
# train()


def test_losses_equal_those_of_the_command_line(options, trained):
    first = train(**options, dropout=0.1)
    other = train(**options, dropout=0.0, seed=7, deterministic=True)
    again = train(**options, dropout=0.1)
    assert losses(first) == trained.losses == losses(again) != losses(other)
    assert not torch.are_deterministic_algorithms_enabled()
    assert len({run.folder for run in (first, other, again)}) == 3


def test_options_win_over_the_config_file(options, tmp_path):
    config = tmp_path / 'mine.py'
    config.write_text("arch_preset = 'llama'\nrope_theta = 700.0\nlearning_rate = 0.5\n")
    run = train(config, **options, learning_rate=1e-3, eval_interval=None, diagnostics=True)
    assert run.config.preset == 'llama' and run.config.rope_theta == 700
    assert run.training.learning_rate == 1e-3 and run.training.diagnostics
    # The record contains an equivalent command.
    command = shlex.split(run.record['metadata']['command'])
    assert command[:3] == ['python', 'train.py', str(config)]
    assert {'--learning_rate=0.001', '--eval_interval=None', '--diagnostics=True'} < {*command}


def test_returned_run_has_the_saved_weights(options):
    run = train(**options)
    loaded = load_run(options['out_dir'], device='cpu', dtype=run.training.dtype)
    assert run.folder == loaded.folder and run.iter == loaded.iter == 4
    assert run.val_loss == loaded.val_loss == run.record['eval_steps'][-1]['val_loss']
    assert run.config == loaded.config and run.training == loaded.training
    weights, saved = run.model.state_dict(), loaded.model.state_dict()
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    assert not run.model.training and all(p.grad is None for p in run.model.parameters())
    assert run.generate('the', max_new_tokens=9) == loaded.generate('the', max_new_tokens=9)
    assert str(run.folder) in repr(run) and run.config.name in repr(run)


def test_run_without_checkpoint_is_returned(options):
    run = train(**options, eval_only=True)
    assert run.iter == 0 and list_checkpoints(run.folder / 'checkpoints') == []
    assert len(run.record['eval_steps']) == 1
    assert run.generate('a', max_new_tokens=2).startswith('a')


@pytest.mark.parametrize(
    ('mistake', 'words'),
    [
        ({'max_itrs': 3}, ["train(): unknown option 'max_itrs'", 'Did you mean max_iters?']),
        ({'max_iters': '3'}, ["max_iters='3'", 'str given', 'int, at least 1']),
        ({'max_iters': True}, ['max_iters=True', 'bool given']),
        ({'max_iters': 0}, ['max_iters=0', 'at least 1']),
        ({'normalization': 'rmsnrm'}, ['Did you mean rmsnorm?']),
        ({'rope_theta': 5e5, 'position_encoding': 'none'}, ['rope_theta', 'train()']),
        ({'dataset': 'nowhere'}, ['nowhere']),
        ({'plan': True}, ['plan=True', 'train.py --plan']),
        ({'config': 'missing.py'}, ['missing.py', 'does not exist']),
    ],
)
def test_mistake_raises_user_error(mistake, words, options, capsys):
    with pytest.raises(UserError) as error:
        train(**{**options, **mistake})
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not options['out_dir'].exists() and capsys.readouterr().out == ''


def test_mistakes_are_reported_together(options):
    with pytest.raises(UserError) as error:
        train(**{**options, 'max_itrs': 3, 'n_layer': 'two'})
    assert len(error.value.problems) == 2


def test_interrupt_saves_and_raises(options, monkeypatch, capfd):
    before = [signal.getsignal(number) for number in SIGNALS]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt, match='stopped after 3 iterations; the run is in'):
            train(**options)
    assert 'SIGINT: saving a checkpoint after this iteration' in capfd.readouterr().err
    assert [signal.getsignal(number) for number in SIGNALS] == before
    stopped = load_run(options['out_dir'])
    assert stopped.iter == 3 and stopped.record['status'] == 'interrupted'
    # The run continues where it stopped, with the same losses.
    resumed = train(dataset=options['dataset'], out_dir=options['out_dir'], init_from='resume')
    assert resumed.folder == stopped.folder and resumed.iter == 4
    whole = train(**{**options, 'out_dir': options['out_dir'].with_name('whole')})
    assert losses(resumed) == losses(whole)


def test_second_interrupt_raises_at_once(monkeypatch):
    monkeypatch.setattr('training.signals.os._exit', sys.exit)
    now = iter([100.0, 102.0])
    monkeypatch.setattr('training.signals.time.monotonic', lambda: next(now))
    signals = SignalHandler(verbose=False)
    signals.on_second_stop = interrupt_at_once
    with signals:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_terminate_reaches_the_previous_handler(options, monkeypatch):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        interrupt_at(monkeypatch, 1, ['SIGTERM'])
        assert train(**options).iter == 2
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_train_in_another_thread(options, trained):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(train(**options, dropout=0.1)))
    thread.start()
    thread.join()
    assert losses(runs[0]) == trained.losses


def test_torchrun_is_refused(options, monkeypatch):
    for key, value in {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '1'}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=r'train\(\) trains in one process.*torchrun'):
        train(**options)


def test_importing_train_keeps_the_excepthook():
    assert sys.excepthook.__module__ != 'common.first_import'


# --------------------------------------------------------------------------------------------------
# load_run()


@pytest.mark.parametrize('place', ['run', 'folder of runs', 'checkpoint'])
def test_load_run_generates_same_text_as_sample(place, trained, capsys):
    path = {
        'run': trained.folder,
        'folder of runs': trained.folder.parent,
        'checkpoint': list_checkpoints(trained.folder / 'checkpoints')[0],
    }[place]
    run = load_run(path, device='cpu', dtype='float32')
    assert run.folder == trained.folder and run.iter == 4 and run.record == trained.record
    assert not run.model.training and run.config == trained.session.settings.architecture
    options = {'max_new_tokens': 30, 'temperature': 1.5, 'top_k': 50, 'seed': 3}
    command = {'run': trained.folder, 'start': 'the', 'num_samples': 1, **options}
    command |= {'device': 'cpu', 'dtype': 'float32'}
    sample.main([f'--{key}={value}' for key, value in command.items()])
    printed = capsys.readouterr().out.split('-' * 80 + '\n')[1]
    text = run.generate('the', **options)
    assert printed.removesuffix('\n') == visible(text)
    assert text == run.generate('the', **options) != run.generate('the', **{**options, 'seed': 4})
    assert run.generate('the', stop='the') == run.generate('the', stop=['the'])


def test_load_run_reads_training_options(trained):
    run, settings = load_run(trained.folder, device='cpu'), trained.session.settings
    assert run.training == settings.run
    assert {**run.training.to_dict(), **run.config.to_dict()}.items() <= run.record[
        'config'
    ].items()


def test_load_run_needs_the_file_of_a_custom_component(options, tmp_path, monkeypatch):
    config = tmp_path / 'mine.py'
    config.write_text(
        'from model_components import Activation, ACTIVATION_REGISTRY\n'
        "@ACTIVATION_REGISTRY.register('squared')\n"
        'class Squared(Activation):\n'
        '    def forward(self, x):\n'
        '        return x.relu().square()\n'
        "activation = 'squared'\n"
    )
    built_in = {name: ACTIVATION_REGISTRY[name] for name in ACTIVATION_REGISTRY}
    with monkeypatch.context() as patch:
        patch.setattr(ACTIVATION_REGISTRY, '_components', dict(built_in))
        run = train(config, **options)
    monkeypatch.setattr(ACTIVATION_REGISTRY, '_components', dict(built_in))
    with pytest.raises(UserError, match=rf"activation='squared'.*no code.*{config}"):
        load_run(run.folder)
    assert load_run(run.folder, config=config).config == run.config


@pytest.mark.parametrize(
    ('mistake', 'words'),
    [
        ({'temperature': -1}, 'temperature=-1: takes a number of at least 0'),
        ({'max_new_tokens': 0}, 'max_new_tokens=0: takes a number of at least 1'),
        ({'top_p': 2}, 'top_p=2: takes a number of at least 0 and at most 1'),
        ({'stop': ''}, 'stop is empty'),
        ({'prompt': ''}, "prompt is empty.*such as prompt='The '"),
    ],
)
def test_generate_refuses_bad_options(mistake, words, trained):
    with pytest.raises(UserError, match=words):
        load_run(trained.folder, device='cpu').generate(**mistake)


def test_load_run_refuses_invalid_path_or_device(tmp_path, trained):
    with pytest.raises(UserError, match='nowhere is not a folder'):
        load_run(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='contains no run'):
        load_run(tmp_path)
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(UserError, match='has no checkpoint'):
        load_run(tmp_path)
    with pytest.raises(UserError, match="device='tpu'"):
        load_run(trained.folder, device='tpu')
