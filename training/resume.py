"""Continue a run: find its checkpoint, refuse another architecture, restore, say what changed."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.environment import launch_notes, restarts_left
from common.errors import UserError
from configurator import CALLER_ORIGINS, COMMAND_LINE, CommandLine, Layer, validate_layer
from data.dataset import TokenDataset
from model_builder import Transformer
from optim.step import GuardedOptimizer
from parallel import sharded_state
from parallel.strategies import SingleProcess
from records import trackers
from records.record import read_record
from records.record_types import PartialDataSeen, RecordHeader, WeightsSource
from records.run_folders import latest_run
from training.checkpoint import Checkpoint, load_latest
from training.load import checked_layers, find_run, misfit_explained
from training_config import Settings, TrainingConfig, schema
from training_logger import TrainingLogger

# Options that say how to start, not what to train: never taken over from the earlier process.
NOT_INHERITED = (
    'out_dir',
    'init_from',
    'resume_run',
    'eval_only',
    'verify_data',
    'debug',
    'report',
)


# What is derived for a new run, and stays as it was when that is resumed.
DERIVED_ONCE = ('eval_interval',)

# How the origin of a value begins that nobody chose.
UNCHOSEN_ORIGINS = ('default', 'derived', 'dataset')


@dataclass
class TrainingProgress:
    """How far a run has come. Plain numbers, kept in the checkpoint's index."""

    iter: int = 0  # updates made
    evaluated_at: int | None = None  # updates made when it was last evaluated
    val_loss: float | None = None  # found by that evaluation
    best_val_loss: float | None = None
    recent_losses: list[float] = field(default_factory=list)  # what a spike is held against
    data_shift: int = 0  # updates' worth of data left out by rollbacks
    rollbacks: int = 0
    data_digest: int = 0  # of the sequences trained on, as the ranks last agreed
    own_digest: int = 0  # of this rank's since then
    one_order: bool = True  # whether its sequences so far are the first ones of a single order
    tokens: int = 0  # in the sequences of all its updates

    @classmethod
    def of(cls, index: dict) -> 'TrainingProgress':
        """What a checkpoint's index says. Raises TypeError or ValueError if that makes no sense."""
        progress = cls(**index['progress'])
        if 'tokens' not in index['progress']:  # an older version's: of one batch size throughout
            progress.tokens = progress.iter * _tokens_per_iter(index['config'])
        counts = [progress.iter, progress.tokens, progress.data_shift, progress.rollbacks]
        digests = [progress.data_digest, progress.own_digest]
        losses = [progress.val_loss, progress.best_val_loss, *progress.recent_losses]
        if not (
            all(type(n) is int and 0 <= n < 2**48 for n in [*counts, progress.evaluated_at or 0])
            and all(type(n) is int and 0 <= n < 2**64 for n in digests)
            and all(type(x) is float and math.isfinite(x) for x in losses if x is not None)
            and None not in progress.recent_losses
            and type(progress.one_order) is bool
            and progress.iter == index['iter']
        ):
            raise ValueError('its progress is not that of a run')
        return progress

    def note_evaluation(self, val_loss: float) -> bool:
        """Whether `val_loss` is the lowest so far. One that is not finite never is."""
        self.evaluated_at = self.iter
        self.val_loss = val_loss if math.isfinite(val_loss) else None
        if self.val_loss is None or (
            self.best_val_loss is not None and self.best_val_loss <= val_loss
        ):
            return False
        self.best_val_loss = val_loss
        return True


@dataclass
class ResumeSource:
    """A run to continue, and the newest of its checkpoints that could be read."""

    run_folder: Path
    checkpoint: Checkpoint
    state: list[dict]
    warnings: list[str]
    same_order: bool = True  # as far as its options have been compared with today's

    @property
    def weights_from(self) -> WeightsSource | None:
        """What the run once began from, as its record tells."""
        return read_record(self.run_folder)['metadata'].get('weights_from')

    def check(self, settings: Settings) -> None:
        """Refuse another architecture, optimizer or sampling. Raises UserError naming both."""
        index, optimizer = self.checkpoint.index, settings.run.optimizer
        trained_by = index['config'].get('optimizer', optimizer)
        if trained_by != optimizer:
            raise UserError(
                f'{self.run_folder} cannot be resumed with optimizer={optimizer!r}: its checkpoint '
                f'holds what {trained_by!r} keeps of the gradients, and no other optimizer can go '
                f'on from that. Leave optimizer out to go on with {trained_by!r}, or start a new '
                f'run with --init_from=scratch.'
            )
        sampled = index['config'].get('sampling', 'random')
        if sampled != settings.run.sampling:
            raise UserError(
                f'{self.run_folder} cannot be resumed with sampling={settings.run.sampling!r}: its '
                f'first {index["iter"]:,} updates took their data by {sampled!r}, and the numbers '
                f'that come next mean other windows in another order. Leave sampling out to go on '
                f'with {sampled!r}, or start a new run with --init_from=scratch.'
            )
        self.same_order = _order_of(index['config']) == _order_of(settings.to_dict())
        differing = _differences(index['architecture'], settings.architecture.to_dict())
        if differing:
            pairs = ', '.join(f'{k}={then!r} (now {now!r})' for k, (then, now) in differing.items())
            raise UserError(
                f'{self.run_folder} cannot be resumed with another architecture: it has {pairs}. '
                f'Leave these keys out to go on with it, or start a new run with '
                f'--init_from=scratch.'
            )

    def restore(
        self, parallel: SingleProcess, model: Transformer, optimizer: GuardedOptimizer
    ) -> TrainingProgress:
        """Load weights and optimizer, and give the state up, to free its memory."""
        state, self.state = self.state, []
        progress = restore_checkpoint(parallel, model, optimizer, self.checkpoint, state)
        progress.one_order &= self.same_order
        return progress

    def report(self, logger: TrainingLogger, header: RecordHeader, environment: dict) -> None:
        """Continue the record, with what changed and what was wrong."""
        index, path = self.checkpoint.index, self.checkpoint.path.relative_to(self.run_folder)
        changed = _differences(index['config'], header['config'])
        changed |= _differences(index['surroundings'], environment)
        record = logger.resume(
            self.checkpoint.iter,
            checkpoint=str(path),
            changed={
                key: pair
                for key, pair in changed.items()
                if key not in NOT_INHERITED and key not in trackers.OPTIONS
            },
            config=header['config'],
            metadata=header['metadata'],
            startup_info=header['startup_info'],
        )
        if record and str(path) not in [entry['path'] for entry in record['checkpoints']]:
            # The process died between publishing it and saying so.
            seen: PartialDataSeen = index['seen']
            logger.checkpoint(
                {
                    'iter': index['iter'],
                    'val_loss': index['val_loss'],
                    **seen,
                    'path': str(path),
                    'time_ms': None,
                    'write_ms': None,
                }
            )
        for warning in self.warnings:
            logger.event('broken_checkpoint', self.checkpoint.iter, warning)
        if self.checkpoint.iter >= header['config']['max_iters']:
            logger.event(
                'note',
                self.checkpoint.iter,
                'all updates of this run are made. To train it longer raise --max_iters; to start '
                'another give --init_from=scratch, or a --out_dir of its own.',
            )


def _differences(then: dict, now: dict) -> dict[str, list]:
    """key -> [then, now] where they differ; None where one side has no such key."""
    return {
        key: [then.get(key), now.get(key)]
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    }


def _sequences_per_iter(config: dict) -> int:
    return config['batch_size'] * config['gradient_accumulation_steps']


def _tokens_per_iter(config: dict) -> int:
    return _sequences_per_iter(config) * config['block_size']


def _order_of(config: dict) -> tuple:
    """What decides which data an update gets."""
    return config['dataset'], config['data_seed'], _sequences_per_iter(config)


def find_resume_source(command_line: CommandLine) -> ResumeSource | None:
    """The run that the command line asks to continue; its options join those of the command line.

    What the run was given on the command line stands above today's config file and beneath today's
    command line; what its file and preset gave stands beneath today's file, which may have been
    edited. Raises UserError if there is nothing to resume and init_from=resume.
    """
    init_from = command_line.value('init_from', schema)
    if init_from not in ('resume', 'auto'):
        return None
    out_dir, name = command_line.value('out_dir', schema), command_line.value('resume_run', schema)
    if init_from == 'auto' and name is None and latest_run(out_dir) is None:
        return None
    folder = find_run(out_dir, name)
    warnings: list[str] = []
    latest = load_latest(folder / 'checkpoints', warnings.append)
    if latest is None:
        if init_from == 'auto':
            return None
        raise UserError(
            f'init_from=resume: {folder} has no checkpoint. Name another run with --resume_run, or '
            f'start a new one with --init_from=scratch.'
        )
    checkpoint, state = latest
    origins = {'chosen': f'run {folder.name}', 'commanded': f'run {folder.name}, {COMMAND_LINE}'}
    below, above = checked_layers(checkpoint.index, origins)
    once = {key: checkpoint.index['config'].get(key) for key in DERIVED_ONCE}
    lowest = validate_layer(Layer(origins['chosen'], once), schema(), [])
    command_line.layers[:] = [
        lowest,
        below,
        *command_line.layers[:-1],
        above,
        command_line.layers[-1],
    ]
    return ResumeSource(folder, checkpoint, state, warnings)


def restart_notes(run: TrainingConfig) -> list[str]:
    """What a person may not have thought of, a sentence or two each."""
    if run.init_from != 'scratch' or restarts_left() <= 0:
        return launch_notes()
    return [
        *launch_notes(),
        'torchrun may start this job again, which with init_from=scratch begins a new run each '
        'time: --init_from=auto goes on with this one.',
    ]


def restore_checkpoint(
    parallel: SingleProcess,
    model: Transformer,
    optimizer: GuardedOptimizer,
    checkpoint: Checkpoint,
    state: list[dict],
) -> TrainingProgress:
    """Load weights and optimizer; how far the run had come. Raises UserError if they do not fit."""
    with misfit_explained(checkpoint):
        sharded_state.restore(sharded_state.StoredState(state), parallel, model, optimizer)
        return TrainingProgress.of(checkpoint.index)


def checkpoint_index(
    settings: Settings, progress: TrainingProgress, environment: dict, dataset: TokenDataset
) -> dict:
    """What a checkpoint says of itself, beside its tensors: plain values only."""
    config = settings.to_dict()
    origins = {**settings.run.origins, **settings.architecture.origins}
    chosen: dict[str, object] = {}
    commanded: dict[str, object] = {}
    for key, value in config.items():
        if key not in NOT_INHERITED and not origins[key].startswith(UNCHOSEN_ORIGINS):
            (commanded if origins[key].endswith(CALLER_ORIGINS) else chosen)[key] = value
    evaluated = progress.evaluated_at == progress.iter
    return {
        'iter': progress.iter,
        'val_loss': progress.val_loss if evaluated else None,
        'progress': asdict(progress),
        'config': config,
        'chosen': chosen,
        'commanded': commanded,
        'architecture': settings.architecture.to_dict(),
        'architecture_name': settings.architecture.name,
        'surroundings': environment,
        'config_files': [file['path'] for file in settings.command_line.config_files],
        'data': {'tokenizer': dataset.tokenizer, 'vocab_size': dataset.vocab_size},
    }
