"""Where a run shows beside its record: TensorBoard and Weights & Biases, each only if asked for.

A sink is handed every line of the journal just as it was written, and makes scalars of it under the
names of `scalars`, with the record's `iter` as the step. The record stays the truth: a sink that
fails is given up (`TrainingLogger`), and nothing is ever read back from one. What they need is
imported when a run with them begins, on the rank that writes the record.
"""

import importlib.util
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from common.errors import UserError
from common.registry import Option

OPTIONS = {
    'tensorboard_log': Option(
        bool, False, 'Write event files for TensorBoard into the run folder too'
    ),
    'wandb_log': Option(bool, False, 'Log to Weights & Biases too'),
    'wandb_project': Option(str | None, None, "Project there; None: the dataset's name"),
    'wandb_run_name': Option(str | None, None, "Name of the run there; None: the architecture's"),
}
FINISH_SECONDS = 120  # that the end of a run waits for W&B to take what is left


def check(run) -> None:
    """Raise UserError if a sink is asked for whose package is not installed."""
    problems = [
        f'{sink.option}=True needs the package {sink.package}, which is not installed: '
        f'pip install {sink.package}, or go without by --{sink.option}=False.'
        for sink in SINKS
        if run.get(sink.option) and not _is_installed(sink.package)
    ]
    if problems:
        raise UserError(*problems)


def _is_installed(package: str) -> bool:
    """Whether it can be imported; a mere folder of that name, such as W&B leaves, is no package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def asked_for(run) -> list['TensorBoard | WeightsAndBiases']:
    """The sinks that the options of a run ask for, not yet begun."""
    return [sink(run) for sink in SINKS if run.get(sink.option)]


# --- What is shown -------------------------------------------------------------------------------


def scalars(line: dict) -> dict[str, float]:
    """The figures of a line of the journal by name; without those that are unknown."""
    named = _SCALARS.get(line['kind'])
    return (
        {name: value for name, value in named(line).items() if value is not None} if named else {}
    )


def _of_iteration(entry: dict) -> dict[str, float | None]:
    gradients, mfu = entry['gradients'], entry['mfu']
    return {
        'train/loss': entry['loss'],
        'train/lr': entry['lr'],
        'train/grad_norm': gradients['norm'],
        'train/grad_mean': gradients['mean'],
        'train/grad_std': gradients['std'],
        'train/loss_scale': entry['loss_scale'],
        'data/tokens': entry['tokens_seen'],
        'perf/iter_ms': entry['time_ms'],
        'perf/tokens_per_second': entry['tokens_per_sec'],
        'perf/mfu': mfu['mfu_percent'],
        'perf/mfu_causal': mfu['mfu_causal_percent'],
        'perf/hfu': mfu['hfu_percent'],
        'perf/achieved_tflops': mfu['achieved_tflops'],
        **{f'memory/{key}': value for key, value in entry['memory'].items()},
        **{f'readings/{key}': value for key, value in entry['readings'].items()},
    }


def _of_evaluation(entry: dict) -> dict[str, float | None]:
    figures = {
        'val/loss': entry['val_loss'],
        'val/bits_per_byte': entry['val_bits_per_byte'],
        'val/train_loss': entry[
            'train_loss'
        ],  # of the train split's fixed windows, without dropout
        'data/epochs': entry.get('epochs'),  # records of before have neither
        'data/unique_tokens': entry.get('unique_tokens'),
        'perf/evaluation_ms': entry['time_ms'],
    }
    diagnostics = entry.get('diagnostics')
    if diagnostics:
        for row in diagnostics['layers']:
            for key in row.keys() - {'layer'}:
                figures[f'layers/{key}/{row["layer"]:02}'] = row[key]
        for group, ratio in diagnostics['update_to_weight'].items():
            figures[f'update_to_weight/{group}'] = ratio
        for span in diagnostics['val_loss_by_position']:
            figures[f'val_loss_by_position/{span["from"]:05}'] = span['loss']
    return figures


_SCALARS: dict[str, Callable] = {'iteration': _of_iteration, 'evaluation': _of_evaluation}


def _facts(document: dict) -> dict[str, bool | int | float | str | None]:
    """What runs are told apart and sorted by: every option, and what came of them."""
    info = document['startup_info']
    facts = {
        **document['config'],
        'architecture_name': document['architecture']['name'],
        'architecture_hash': document['architecture']['hash'],
        'total_params': info['model']['total_params'],
        'flops_per_token': info['flops']['per_token'],
        'device_name': info['hardware']['device_name'],
        'git_commit': document['metadata']['git_commit'],
    }
    plain = bool | int | float | str | None
    return {key: value if isinstance(value, plain) else str(value) for key, value in facts.items()}


# --- The sinks -----------------------------------------------------------------------------------


class TensorBoard:
    """Event files in the run folder. What a resume or a rollback takes back is hidden there too."""

    title, option, package = 'TensorBoard', 'tensorboard_log', 'tensorboard'

    def __init__(self, run):
        pass

    def begin(self, folder: Path, document: dict, iter: int | None) -> dict:
        """Show the run of `document`; go on with it after `iter` updates if that is no None.

        Returns what is to be recorded of it: the arguments of `TrainingLogger.event`, or nothing.
        """
        from torch.utils.tensorboard.summary import hparams

        self.folder = folder
        self._open(iter)
        facts = _facts(document)
        *start, self.ended = hparams(facts, {'val/loss': None})
        for summary in start:
            self.writer.file_writer.add_summary(summary)
        table = '\n'.join(f'| `{key}` | {value} |' for key, value in facts.items())
        self.writer.add_text('config', f'| | |\n| --- | --- |\n{table}', iter or 0)
        self.writer.flush()
        return {}

    def take(self, line: dict) -> None:
        """Show a line of the journal."""
        iter = line.get('iter')
        if line['kind'] == 'rollback':
            self.writer.close()
            self._open(iter)
        for name, value in scalars(line).items():
            self.writer.add_scalar(name, value, iter, walltime=line.get('time'))
        if line['kind'] in ('event', 'rollback'):
            self.writer.add_text('events', _sentence(line), iter or 0, walltime=line['time'])
        if (sample := line.get('sample')) and sample['text'] is not None:
            text = f'```\n{sample["prompt"]}{sample["text"]}\n```'
            self.writer.add_text('sample', text, iter, walltime=line.get('time'))
        # As little is lost in a crash as of the record; and a full disk is noticed here.
        self.writer.flush()

    def end(self, status: str, summary: dict | None) -> None:
        """Close what was begun."""
        if status == 'finished':
            self.writer.file_writer.add_summary(self.ended)
        self.writer.close()

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=purge_step)


class WeightsAndBiases:
    """A run at Weights & Biases, gone on with under its id. `iter` is the x axis of every figure.

    W&B's own step cannot go back, as it would have to after a resume or a rollback.
    """

    title, option, package = 'Weights & Biases', 'wandb_log', 'wandb'

    def __init__(self, run):
        self.project, self.name = run.wandb_project, run.wandb_run_name

    def begin(self, folder: Path, document: dict, iter: int | None) -> dict:
        """See `TensorBoard.begin`. The id of the run is known from the record.

        Raises UserError for what W&B calls one.
        """
        # Else the end of a run would wait without limit for a network that is gone.
        os.environ.setdefault('WANDB_FINISH_TIMEOUT', str(FINISH_SECONDS))
        import wandb

        ids = [event['id'] for event in document['events'] if event['event'] == 'wandb_run']
        try:
            self.run = wandb.init(
                project=self.project,
                name=self.name,
                config={**_facts(document), 'run_folder': str(folder)},
                allow_val_change=True,
                dir=str(folder),
                id=ids[-1] if ids else None,
                resume='allow',
            )
        except wandb.errors.UsageError as error:  # no key, a project's name that cannot be, …
            raise UserError(
                f'wandb_log=True: {error} WANDB_MODE=offline keeps what is logged in the run '
                f'folder; --wandb_log=False goes without.'
            ) from error
        self.run.define_metric('*', step_metric='iter')
        kept = Path(self.run.dir).parent
        where = f'offline: wandb sync {kept} uploads it' if self.run.offline else self.run.url
        return {'kind': 'wandb_run', 'iter': None, 'message': where, 'id': self.run.id}

    def take(self, line: dict) -> None:
        """Show a line of the journal."""
        if figures := scalars(line):
            self.run.log({'iter': line['iter'], **figures})

    def end(self, status: str, summary: dict | None) -> None:
        """Close what was begun; the record's summary joins W&B's."""
        self.run.summary.update(summary or {})
        self.run.finish(exit_code=int(status != 'finished'))


def _sentence(line: dict) -> str:
    """An event in a line of Markdown."""
    when = datetime.fromtimestamp(line['time']).isoformat(' ', 'seconds')
    name, message = line.get('event', line['kind']), line.get('message', '')
    return f'{when} **{name}** {message}'.rstrip()


SINKS = (TensorBoard, WeightsAndBiases)
