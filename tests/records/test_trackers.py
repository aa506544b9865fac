"""TensorBoard and Weights & Biases get what the record has, and can do the run no harm."""

import importlib
import io
import sys
from types import SimpleNamespace

import pytest
from helpers.event_files import assert_holds, read, shown_of
from helpers.in_process import train_here
from helpers.sample_run import (
    ARCHITECTURE,
    CONFIG,
    MAX_ITERS,
    METADATA,
    STARTUP_INFO,
    checkpoint,
    evaluation,
    iteration,
)

import study
import train
from common.errors import UserError
from configurator import read_command_line
from records import trackers
from records.record import read_record
from records.run_folders import new_run_folder
from studies.grid import merged_settings, read_study
from studies.keys import STUDY_KEYS
from studies.runner import StudyRunner
from studies.trials import Trial
from studies.variants import TuneChoice
from training_logger import TrainingLogger

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]

EACH_TRACKER = pytest.mark.parametrize(
    'tracker', trackers.TRACKERS, ids=lambda tracker: tracker.package
)
RICH = {'ffn_type': 'moe', 'num_experts': 3, 'experts_per_token': 2, 'diagnostics': True}


@pytest.fixture
def crash(monkeypatch):
    """crash(n): the next run ends before its update n."""

    def at(iter):
        update = train.run_iteration

        def dying(session, clock):
            if session.progress.iter == iter:
                monkeypatch.setattr(train, 'run_iteration', update)
                raise RuntimeError('crashed')
            update(session, clock)

        monkeypatch.setattr(train, 'run_iteration', dying)

    return at


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: `runs` are the arguments of `init`, with what was done to each.

    As in the real one, every call names what the arguments are called there, and `log` without a
    step adds a row.
    """
    module = SimpleNamespace(runs=[], broken=None, __spec__=SimpleNamespace(origin='wandb'))
    module.errors = SimpleNamespace(UsageError=type('UsageError', (Exception,), {}))

    class Run:
        def __init__(self, project, name, config, allow_val_change, dir, id, resume):
            if project == 'without a key':
                raise module.errors.UsageError('No API key configured.')
            self.project, self.name, self.config, self.dir = project, name, config, dir
            self.id, self.resume = id or f'id{len(module.runs)}', resume
            self.offline, self.url = False, f'https://wandb.example/{project}/runs/{self.id}'
            self.rows, self.metrics, self.summary, self.exit_code = [], {}, {}, None
            module.runs.append(self)

        def define_metric(self, name, step_metric=None):
            self.metrics[name] = step_metric

        def log(self, data):
            if module.broken and len(self.rows) == module.broken:
                raise ConnectionError('the service is gone')
            self.rows.append(data)

        def finish(self, exit_code=None):
            self.exit_code = exit_code

    module.init = Run
    monkeypatch.setitem(sys.modules, 'wandb', module)
    return module


def make_logger(folder, **options):
    options = SimpleNamespace(**{'wandb_project': 'p', 'wandb_run_name': 'n', **options})
    options.get = lambda key: getattr(options, key, False)
    return TrainingLogger(
        folder,
        stream=io.StringIO(),
        max_iters=MAX_ITERS,
        trackers=trackers.enabled_trackers(options),
    )


def log_with_a_rollback(logger):
    """A run that goes back from 7 to the evaluation and checkpoint of 4, and sees other data."""
    logger.start(CONFIG, ARCHITECTURE, METADATA, STARTUP_INFO)
    for i in range(4):
        logger.iteration(iteration(i, loss=9.0 - i))
    logger.evaluation(evaluation(4, 5.5))
    logger.checkpoint(checkpoint(4))
    for i in range(4, 7):
        logger.iteration(iteration(i, loss=8.0 - i))
    logger.event('nonfinite', 6, 'a bad batch', count=1)
    logger.rollback(4, from_iter=7, checkpoint='checkpoints/4', message='went back')
    for i in range(4, 8):
        logger.iteration(iteration(i, loss=7.5 - i, peak_gb=None))
    logger.iteration(iteration(8, loss=float('nan')))
    sample = {'prompt': 'To be', 'text': ' or not', 'time_ms': 1.0}
    logger.evaluation({**evaluation(9, 4.5, bits=None), 'sample': sample})
    logger.finish()


# --- TensorBoard ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboard_has_all_numbers_after_crash(tiny_dataset, tmp_path, crash):
    options = {**RICH, 'max_iters': 9, 'eval_interval': 4, 'tensorboard_log': True}
    crash(6)
    with pytest.raises(RuntimeError):
        train_here(tiny_dataset, tmp_path / 'out', **options)
    (run,) = (tmp_path / 'out').iterdir()
    before = read(run).Scalars('train/loss')
    assert [event.step for event in before] == list(range(6))
    resumed = train_here(tiny_dataset, tmp_path / 'out', **options, init_from='resume')
    assert resumed.code == 0 and resumed.folder == run
    assert_holds(run, resumed.record)

    # Being watched changes nothing.
    alone = train_here(tiny_dataset, tmp_path / 'alone', **{**options, 'tensorboard_log': False})
    assert alone.losses == resumed.losses
    assert not list(alone.folder.glob('events*'))


def test_tensorboard_hides_rolled_back_steps(tmp_path):
    logger = make_logger(new_run_folder(tmp_path), tensorboard_log=True)
    log_with_a_rollback(logger)
    record = read_record(logger.run_folder)
    assert_holds(logger.run_folder, record)
    assert [e['loss'] for e in record['training_iterations']][4:] == [3.5, 2.5, 1.5, 0.5, None]


def test_tensorboard_has_options_and_events(tmp_path):
    logger = make_logger(new_run_folder(tmp_path), tensorboard_log=True)
    log_with_a_rollback(logger)
    reader = read(logger.run_folder)
    texts = [
        tensor.tensor_proto.string_val[0].decode()
        for tag in ('config', 'events', 'sample')
        for tensor in reader.Tensors(f'{tag}/text_summary')
    ]
    assert 'To be or not' in texts[-1]
    assert '| `arch_preset` | llama |' in texts[0] and '| `architecture_hash` | 3f9c' in texts[0]
    for text in (
        '**nonfinite** a bad batch',
        '**rollback** went back',
        '**nonfinite** loss is nan',
    ):
        assert any(text in event for event in texts[1:])
    from tensorboard.plugins.hparams import metadata

    start = metadata.parse_session_start_info_plugin_data(
        reader.SummaryMetadata('_hparams_/session_start_info').plugin_data.content
    )
    assert start.hparams['arch_preset'].string_value == 'llama'
    assert start.hparams['max_iters'].number_value == MAX_ITERS
    assert '_hparams_/session_end_info' in reader.summary_metadata


def test_tensorboard_shows_eval_only_run(tiny_dataset, tmp_path):
    run = train_here(tiny_dataset, tmp_path, eval_only=True, tensorboard_log=True)
    assert run.code == 0
    assert_holds(run.folder, run.record)
    assert read(run.folder).Scalars('val/loss')[0].step == 0


# --- Weights & Biases ----------------------------------------------------------------------------


def logged_rows(run):
    """Name -> step -> value, of the rows of a stand-in's run; the last one of a step holds."""
    shown = {}
    for row in run.rows:
        for name, value in row.items():
            if name != 'iter':
                shown.setdefault(name, {})[row['iter']] = value
    return shown


@pytest.mark.slow
def test_wandb_has_all_numbers_and_resumes_by_id(wandb, tiny_dataset, tmp_path, crash):
    options = {**RICH, 'max_iters': 9, 'eval_interval': 4, 'wandb_log': True}
    crash(6)
    with pytest.raises(RuntimeError):
        train_here(tiny_dataset, tmp_path / 'out', **options)
    options |= {'init_from': 'resume', 'wandb_run_name': 'mine'}
    run = train_here(tiny_dataset, tmp_path / 'out', **options)
    first, second = wandb.runs
    record = run.record
    assert (run.code, first.exit_code, second.exit_code) == (0, 1, 0)
    assert first.id == second.id and second.resume == 'allow'
    assert {event['id'] for event in record['events'] if event['event'] == 'wandb_run'} == {
        first.id
    }
    assert first.project == tiny_dataset.name and first.name == record['architecture']['name']
    assert second.name == 'mine' and second.dir == str(run.folder)
    assert first.metrics['*'] == 'iter'
    first.rows += second.rows
    assert logged_rows(first) == shown_of(record)
    assert second.summary == record['summary']
    assert {**second.config, **record['config']} == second.config
    assert second.config['total_params'] == record['startup_info']['model']['total_params']
    assert 'wandb' not in {key for e in record['events'] for key in e.get('changed', {})}


def test_wandb_usage_error_is_user_error(wandb, tiny_dataset, tmp_path, capsys):
    options = {'wandb_log': True, 'wandb_project': 'without a key'}
    with pytest.raises(AttributeError):  # train_here looks for a session
        train_here(tiny_dataset, tmp_path, **options)
    out, message = capsys.readouterr()
    assert 'No API key configured. Set WANDB_MODE=offline' in message and message.count('\n') == 1
    assert 'logging stopped' not in out
    (folder,) = tmp_path.iterdir()
    assert read_record(folder)['status'] == 'failed'


def test_wandb_rows_after_rollback(wandb, tmp_path):
    logger = make_logger(new_run_folder(tmp_path), wandb_log=True)
    log_with_a_rollback(logger)
    (run,) = wandb.runs
    shown, expected = logged_rows(run), shown_of(read_record(logger.run_folder))
    assert shown.pop('train/loss') == {**expected.pop('train/loss')}
    assert shown.pop('memory/peak_gb').keys() >= expected.pop('memory/peak_gb').keys()
    assert shown == expected


def test_study_names_wandb_runs(tiny_dataset, tmp_path, wandb):
    path = tmp_path / 'study.py'
    path.write_text(f"dataset = {str(tiny_dataset)!r}\nsweep = {{'bias': [True, False]}}")
    for given, named in ((['--wandb_log'], True), ([], False)):
        command_line = read_command_line([str(path), *given], study.study_schema, extra=STUDY_KEYS)
        read = read_study(command_line)
        choice = TuneChoice({}, merged_settings(read, {}), tokens_per_iter=1, flops_per_iter=1.0)
        trial = Trial('bias=True', 'bias=True', {'bias': True}, choice, None, read)
        runner = StudyRunner(read, tmp_path, (), jobs=1, study_options=set())
        assert ('--wandb_run_name=bias=True' in runner.arguments('runs', trial)) == named


# --- What goes wrong -----------------------------------------------------------------------------


@pytest.mark.slow
@EACH_TRACKER
@pytest.mark.parametrize('there', [None, SimpleNamespace(origin=None)], ids=['nothing', 'a folder'])
def test_missing_package_is_reported_before_run_starts(
    tracker, there, tiny_dataset, tmp_path, monkeypatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: there if name == tracker.package else find(name)
    )
    arguments = [
        f'--dataset={tiny_dataset}',
        f'--out_dir={tmp_path / "out"}',
        f'--{tracker.option}',
    ]
    with pytest.raises(UserError, match=f'{tracker.option}=True .* pip install {tracker.package}'):
        train.main(arguments)
    assert not (tmp_path / 'out').exists()
    assert train.main([*arguments, '--plan', '--block_size=8']) == 0


def test_failing_tracker_is_dropped_and_run_continues(
    tiny_dataset, tmp_path, monkeypatch, wandb, capsys
):
    from torch.utils.tensorboard import SummaryWriter

    flush, lines = SummaryWriter.flush, []

    def full(writer):
        lines.append(1)
        if len(lines) == 5:
            raise OSError('No space left on device')
        flush(writer)

    monkeypatch.setattr(SummaryWriter, 'flush', full)
    wandb.broken = 3
    run = train_here(
        tiny_dataset, tmp_path, max_iters=8, tensorboard_log=True, wandb_log=True, log_style='line'
    )
    assert run.code == 0 and run.record['status'] == 'finished'
    assert [entry['iter'] for entry in run.record['training_iterations']] == list(range(8))
    board, weights = (event['message'] for event in run.events('sink_failed'))
    assert 'TensorBoard' in board and 'No space left' in board
    assert 'Weights & Biases' in weights and 'the service is gone' in weights
    assert capsys.readouterr().out.count('logging stopped') == 2
    assert len(lines) == 5 and len(wandb.runs[0].rows) == 3


@pytest.mark.parametrize('action', ['begin', 'close'])
def test_tracker_failing_at_begin_or_close(tmp_path, action):
    class Fails:
        title = 'A tracker'

        def __getattr__(self, name):
            def answer(*arguments):
                if name == action:
                    raise ValueError
                return {}

            return answer

    logger = TrainingLogger(
        new_run_folder(tmp_path), stream=io.StringIO(), max_iters=MAX_ITERS, trackers=[Fails()]
    )
    log_with_a_rollback(logger)
    assert 'A tracker logging stopped: ValueError' in logger.console.stream.getvalue()
    record = read_record(logger.run_folder)
    assert record['status'] == 'finished'
    assert ('sink_failed' in {e['event'] for e in record['events']}) == (action == 'begin')


def test_other_ranks_have_no_trackers(tmp_path):
    class Untouched:
        """Has no methods."""

    logger = TrainingLogger(tmp_path, is_main=False, max_iters=MAX_ITERS, trackers=[Untouched()])
    log_with_a_rollback(logger)


def test_disabled_trackers_are_not_imported(tiny_dataset, tmp_path, monkeypatch):
    for name in ('wandb', 'tensorboard', 'torch.utils.tensorboard'):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    assert not train_here(tiny_dataset, tmp_path / 'without').events('sink_failed')
    monkeypatch.setattr(trackers, '_is_installed', lambda package: True)
    run = train_here(tiny_dataset, tmp_path / 'with', tensorboard_log=True, wandb_log=True)
    assert run.code == 0 and len(run.events('sink_failed')) == 2
