"""Continue a run: find its checkpoint, refuse another architecture, restore, say what changed."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import checkpointing
from configurator import CommandLine, Layer, accept_layer
from errors import UserError
from training_config import Settings, schema
from training_logger import TrainingLogger, latest_run

# Options that say how to start, not what to train: never taken over from the earlier process.
NOT_TAKEN_OVER = ('out_dir', 'init_from', 'resume_run', 'eval_only', 'debug')


@dataclass
class Progress:
    """How far a run has come. Plain numbers, kept in the checkpoint's index."""

    iter: int = 0  # updates made
    evaluated_at: int | None = None  # updates made when it was last evaluated
    val_loss: float | None = None  # found by that evaluation
    best_val_loss: float | None = None

    def note_evaluation(self, val_loss: float) -> bool:
        """Whether `val_loss` is the lowest so far. NaN never is."""
        self.evaluated_at, self.val_loss = self.iter, val_loss
        improved = val_loss < (float('inf') if self.best_val_loss is None else self.best_val_loss)
        if improved:
            self.best_val_loss = val_loss
        return improved


@dataclass
class Resumed:
    """A run to continue, and the newest of its checkpoints that could be read."""

    run_folder: Path
    checkpoint: checkpointing.Checkpoint
    state: dict
    warnings: list[str]
    changed: dict | None = None  # key -> [then, now], once `check` has compared the settings

    @property
    def progress(self) -> Progress:
        return Progress(**self.checkpoint.index['progress'])

    def check(self, settings: Settings) -> None:
        """Refuse another architecture; note the training options that differ.

        Raises UserError naming the keys.
        """
        then, now = self.checkpoint.index['architecture'], settings.architecture.to_dict()
        differing = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        if differing:
            pairs = ', '.join(f'{k}={then.get(k)!r} (now {now.get(k)!r})' for k in differing)
            raise UserError(
                f'{self.run_folder} cannot be resumed with another architecture: it has {pairs}. '
                f'Leave these keys out to go on with it, or start a new run with '
                f'--init_from=scratch.'
            )
        then, now = self.checkpoint.index['config'], settings.to_dict()
        self.changed = {
            key: [then.get(key), value]
            for key, value in now.items()
            if then.get(key) != value and key not in NOT_TAKEN_OVER
        }

    def restore(self, model: torch.nn.Module, updater) -> None:
        """Load weights and optimizer; the state is given up, to free its memory.

        Raises UserError if the checkpoint does not fit.
        """
        try:
            model.load_state_dict(self.state['model'])
            updater.load_state_dict(self.state)
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f'{self.checkpoint.path} does not fit this model: {str(error).splitlines()[0]}'
            ) from error
        self.state = {}

    def report(self, logger: TrainingLogger, header: dict) -> None:
        """Continue the record, with what changed and what was wrong."""
        logger.resume(
            self.checkpoint.iter,
            checkpoint=str(self.checkpoint.path.relative_to(self.run_folder)),
            changed=self.changed,
            config=header['config'],
            metadata=header['metadata'],
            startup_info=header['startup_info'],
        )
        for warning in self.warnings:
            logger.event('broken_checkpoint', self.checkpoint.iter, warning)


def find(asked: CommandLine) -> Resumed | None:
    """The run that the command line asks to continue; its options join beneath what was given.

    Raises UserError if there is nothing to resume and init_from=resume.
    """
    init_from = asked.value('init_from', schema)
    if init_from == 'scratch':
        return None
    out_dir, name = asked.value('out_dir', schema), asked.value('resume_run', schema)
    run_folder = _named_run(name, out_dir) if name else latest_run(out_dir)
    warnings: list[str] = []
    found = run_folder and checkpointing.newest(run_folder / 'checkpoints', warnings.append)
    if not found:
        if init_from == 'auto':
            return None
        there = f'{run_folder} has no checkpoint' if run_folder else f'no run in {out_dir}'
        raise UserError(
            f'init_from=resume: {there}. Give the run by --out_dir or --resume_run, or start a '
            f'new one with --init_from=scratch.'
        )
    checkpoint, state = found
    problems: list[str] = []
    layer = Layer(f'run {run_folder.name}', checkpoint.index['chosen'])
    layer = accept_layer(layer, schema(), problems)
    if problems:
        files = ', '.join(checkpoint.index['config_files']) or 'the one that registers them'
        raise UserError(
            *problems,
            f'A checkpoint carries no code: if a config file registered what is unknown here, '
            f'give it again ({files}).',
        )
    asked.layers.insert(0, layer)
    return Resumed(run_folder, checkpoint, state, warnings)


def _named_run(name: str, out_dir: str) -> Path:
    for path in (Path(name), Path(out_dir) / name):
        if path.is_dir():
            return path
    raise UserError(f'resume_run={name!r}: neither {name} nor {Path(out_dir) / name} is a folder.')


def checkpoint_index(settings: Settings, progress: Progress) -> dict:
    """What a checkpoint says of itself, beside its tensors: plain values only."""
    config = settings.to_dict()
    origins = {**settings.run.origins, **settings.architecture.origins}
    chosen = {
        key: value
        for key, value in config.items()
        if origins.get(key) not in ('default', 'derived', 'dataset', None) and key not in NOT_TAKEN_OVER
    }
    evaluated = progress.evaluated_at == progress.iter
    return {
        'iter': progress.iter,
        'val_loss': progress.val_loss if evaluated else None,
        'progress': asdict(progress),
        'config': config,
        'chosen': {'arch_preset': settings.architecture.preset, **chosen},
        'architecture': settings.architecture.to_dict(),
        'architecture_name': settings.architecture.name,
        'config_files': [file['path'] for file in settings.asked.config_files],
    }
