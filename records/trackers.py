"""Experiment trackers: TensorBoard and Weights & Biases, each enabled by an option.

A tracker receives every line of the journal as it was written and logs its `scalars`, with the
record's `iter` as the step. The record stays the source of truth: a tracker that fails is stopped
(`TrainingLogger`), and nothing is read back from one. Their packages are imported when a run with
them begins, on the rank that writes the record.
"""

import abc
import importlib.util
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from common.dict_option import flat_options
from common.errors import UserError
from common.registry import FrozenConfig, Option
from records.record_types import EvaluationEntry, IterationEntry, JournalLine, Record, Summary

OPTIONS = {
    'tensorboard_log': Option(
        bool, False, 'Write event files for TensorBoard into the run folder too'
    ),
    'wandb_log': Option(bool, False, 'Log to Weights & Biases too'),
    'wandb_project': Option(str | None, None, "Project there; None: the dataset's name"),
    'wandb_run_name': Option(str | None, None, "Name of the run there; None: the architecture's"),
}
FINISH_SECONDS = 120  # the longest that the end of a run waits for W&B to upload the rest


# --- Scalars -------------------------------------------------------------------------------------


def scalars(line: JournalLine) -> dict[str, float]:
    """The known figures of a line of the journal, by name."""
    scalars_of = _SCALARS.get(line['kind'])
    if scalars_of is None:
        return {}
    return {name: value for name, value in scalars_of(line).items() if value is not None}


def _iteration_scalars(entry: IterationEntry) -> dict[str, float | None]:
    gradients, mfu, memory = entry['gradients'], entry['mfu'], entry['memory']
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
        'memory/allocated_gb': memory['allocated_gb'],
        'memory/peak_gb': memory['peak_gb'],
        'memory/reserved_gb': memory['reserved_gb'],
        'memory/reserved_peak_gb': memory.get('reserved_peak_gb'),  # older records have neither
        'memory/allocator_retries': memory.get('allocator_retries'),
        'memory/rss_gb': memory['rss_gb'],
        **{f'readings/{key}': value for key, value in entry['readings'].items()},
    }


def _evaluation_scalars(entry: EvaluationEntry) -> dict[str, float | None]:
    figures = {
        'val/loss': entry['val_loss'],
        'val/bits_per_byte': entry['val_bits_per_byte'],
        # The loss of the training split's fixed windows, without dropout.
        'val/train_loss': entry['train_loss'],
        'data/epochs': entry.get('epochs'),  # older records have neither
        'data/unique_tokens': entry.get('unique_tokens'),
        'perf/evaluation_ms': entry['time_ms'],
    }
    diagnostics = entry.get('diagnostics')
    if diagnostics:
        for row in diagnostics['layers']:
            layer = f'{row["layer"]:02}'
            figures[f'layers/activation_rms/{layer}'] = row['activation_rms']
            figures[f'layers/gradient_norm/{layer}'] = row['gradient_norm']
            figures[f'layers/max_attention_logit/{layer}'] = row['max_attention_logit']
        for group, ratio in diagnostics['update_to_weight'].items():
            figures[f'update_to_weight/{group}'] = ratio
        for span in diagnostics['val_loss_by_position']:
            figures[f'val_loss_by_position/{span["from"]:05}'] = span['loss']
    return figures


_SCALARS: dict[str, Callable] = {
    'iteration': _iteration_scalars,
    'evaluation': _evaluation_scalars,
}


def _run_values(record: Record) -> dict[str, bool | int | float | str | None]:
    """Values to filter and sort runs by: every option, and the main results of start-up."""
    info = record['startup_info']
    values: dict[str, Any] = {
        **flat_options(record['config']),
        'architecture_name': record['architecture']['name'],
        'architecture_hash': record['architecture']['hash'],
        'total_params': info['model']['total_params'],
        'flops_per_token': info['flops']['per_token'],
        'device_name': info['hardware']['device_name'],
        'git_commit': record['metadata']['git_commit'],
    }
    plain = bool | int | float | str | None
    return {key: value if isinstance(value, plain) else str(value) for key, value in values.items()}


# --- The trackers ---------------------------------------------------------------------------------


class Tracker(abc.ABC):
    """Mirrors a run's record elsewhere, enabled by `option`."""

    title: str
    option: str
    package: str  # required

    @abc.abstractmethod
    def __init__(self, run: FrozenConfig): ...

    @abc.abstractmethod
    def begin(self, folder: Path, record: Record, iter: int | None) -> dict[str, Any]:
        """Show the run of `record`; if `iter` is not None, continue it after `iter` iterations.

        Returns the arguments of an event to record (`TrainingLogger.event`), or nothing.
        """

    @abc.abstractmethod
    def log(self, line: JournalLine) -> None:
        """Log a line of the journal."""

    @abc.abstractmethod
    def close(self, status: str, summary: Summary | None) -> None:
        """End the tracker's run."""


class TensorBoard(Tracker):
    """Event files in the run folder. A resume or a rollback hides the dropped steps there too."""

    title, option, package = 'TensorBoard', 'tensorboard_log', 'tensorboard'

    def __init__(self, run: FrozenConfig):
        pass

    def begin(self, folder: Path, record: Record, iter: int | None) -> dict[str, Any]:
        from torch.utils.tensorboard.summary import hparams

        self.folder = folder
        self._open(iter)
        values = _run_values(record)
        *start, self.ended = hparams(values, {'val/loss': None})
        for summary in start:
            self._add_summary(summary)
        table = '\n'.join(f'| `{key}` | {value} |' for key, value in values.items())
        self.writer.add_text('config', f'| | |\n| --- | --- |\n{table}', iter or 0)
        self.writer.flush()
        return {}

    def log(self, line: JournalLine) -> None:
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
        # A crash loses no more than of the record, and a full disk is noticed here.
        self.writer.flush()

    def close(self, status: str, summary: Summary | None) -> None:
        if status == 'finished':
            self._add_summary(self.ended)
        self.writer.close()

    def _add_summary(self, summary) -> None:
        assert self.writer.file_writer is not None  # while the writer is open
        self.writer.file_writer.add_summary(summary)

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=purge_step)


class WeightsAndBiases(Tracker):
    """A run at Weights & Biases, continued under its id. `iter` is the x axis of every figure.

    W&B's own step cannot decrease, as it would have to after a resume or a rollback.
    """

    title, option, package = 'Weights & Biases', 'wandb_log', 'wandb'

    def __init__(self, run: FrozenConfig):
        self.project, self.name = run.wandb_project, run.wandb_run_name

    def begin(self, folder: Path, record: Record, iter: int | None) -> dict[str, Any]:
        """See `Tracker`. The id of the run is in the record's events.

        Raises UserError for usage errors that W&B reports.
        """
        # Otherwise the end of a run would wait without limit for a lost network.
        os.environ.setdefault('WANDB_FINISH_TIMEOUT', str(FINISH_SECONDS))
        import wandb

        ids = [event['id'] for event in record['events'] if event['event'] == 'wandb_run']
        try:
            self.run = wandb.init(
                project=self.project,
                name=self.name,
                config={**_run_values(record), 'run_folder': str(folder)},
                allow_val_change=True,
                dir=str(folder),
                id=ids[-1] if ids else None,
                resume='allow',
            )
        except wandb.errors.UsageError as error:  # no key, an invalid name of a project, …
            raise UserError(
                f'wandb_log=True: {error} Set WANDB_MODE=offline to log into the run folder only, '
                f'or --wandb_log=False to log without W&B.'
            ) from error
        self.run.define_metric('*', step_metric='iter')
        where = self.run.url
        if self.run.offline:
            where = f'offline: wandb sync {Path(self.run.dir).parent} uploads it'
        return {'kind': 'wandb_run', 'iter': None, 'message': where, 'id': self.run.id}

    def log(self, line: JournalLine) -> None:
        if figures := scalars(line):
            self.run.log({'iter': line['iter'], **figures})

    def close(self, status: str, summary: Summary | None) -> None:
        """End the run at W&B, with the record's summary in its own."""
        self.run.summary.update(summary or {})
        self.run.finish(exit_code=int(status != 'finished'))


def _sentence(line: dict) -> str:
    """An event as a line of Markdown."""
    when = datetime.fromtimestamp(line['time']).isoformat(' ', 'seconds')
    name, message = line.get('event', line['kind']), line.get('message', '')
    return f'{when} **{name}** {message}'.rstrip()


TRACKERS: tuple[type[Tracker], ...] = (TensorBoard, WeightsAndBiases)


def check_packages(run: FrozenConfig) -> None:
    """Raise UserError if the package of an enabled tracker is not installed."""
    problems = [
        f'{tracker.option}=True needs the package {tracker.package}, which is not installed: '
        f'run pip install {tracker.package}, or set --{tracker.option}=False.'
        for tracker in TRACKERS
        if run.get(tracker.option) and not _is_installed(tracker.package)
    ]
    if problems:
        raise UserError(*problems)


def _is_installed(package: str) -> bool:
    """Whether it can be imported; a plain folder of that name, as W&B creates, does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def enabled_trackers(run: FrozenConfig) -> list[Tracker]:
    """The trackers that the options of a run enable, not yet begun."""
    return [tracker(run) for tracker in TRACKERS if run.get(tracker.option)]
