"""Resume a run: find its checkpoint, check the settings, restore, record what has changed."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.architecture_identity import with_neutral_values
from common.dict_option import leaves
from common.environment import launch_notes, restarts_left, world_size
from common.errors import UserError
from configurator import CALLER_ORIGINS, COMMAND_LINE, CommandLine, Layer, validate_layer
from data.dataset import TokenDataset
from model_builder import Transformer
from optim.step import GuardedOptimizer
from parallel import sharded_state
from parallel.strategies import SingleProcess
from planning.micro_batch import SIZES
from records import trackers
from records.record import read_record
from records.record_types import PartialDataSeen, RecordHeader, WeightsSource
from records.run_folders import latest_run
from training.checkpoint import Checkpoint, find_latest, load_latest
from training.load import checked_layers, find_run, misfit_explained
from training_config import Settings, TrainingConfig, schema
from training_logger import TrainingLogger

# Options of the start, not of the training: never inherited from the earlier process.
NOT_INHERITED = (
    'out_dir',
    'init_from',
    'resume_run',
    'eval_only',
    'verify_data',
    'debug',
    'report',
    'profile',
)


# Options that are derived for a new run and inherited when it is resumed.
DERIVED_ONCE = ('eval_interval',)

# Prefixes of the origins of values that the user did not set.
UNCHOSEN_ORIGINS = ('default', 'derived', 'dataset')


@dataclass
class TrainingProgress:
    """The progress of a run: plain values, stored in the checkpoint's index."""

    iter: int = 0  # iterations done
    evaluated_at: int | None = None  # iterations done at the last evaluation
    val_loss: float | None = None  # of that evaluation
    best_val_loss: float | None = None
    recent_losses: list[float] = field(default_factory=list)  # to detect a spike
    data_shift: int = 0  # iterations whose data rollbacks have skipped
    rollbacks: int = 0
    data_digest: int = 0  # hash of the sequences of all ranks, at the last sync
    own_digest: int = 0  # hash of this rank's sequences since then
    one_order: bool = True  # whether all sequences so far follow a single data order
    tokens: int = 0  # tokens of all iterations

    @classmethod
    def of(cls, index: dict) -> 'TrainingProgress':
        """The progress in a checkpoint's index. Raises TypeError or ValueError if it is invalid."""
        progress = cls(**index['progress'])
        if 'tokens' not in index['progress']:  # of an older version, with a constant batch size
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
            raise ValueError('its progress is invalid')
        return progress

    def note_evaluation(self, val_loss: float) -> bool:
        """Store the result of an evaluation. Returns whether it is finite and the lowest so far."""
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
    """A run to resume, and its newest readable checkpoint."""

    run_folder: Path
    checkpoint: Checkpoint
    state: list[dict] | None  # None: the ranks load it together, in `restore`
    warnings: list[str]
    same_order: bool = True  # whether the current options keep the data order; set by `check`

    @property
    def weights_from(self) -> WeightsSource | None:
        """The pretrained weights that the run started from, according to its record."""
        return read_record(self.run_folder)['metadata'].get('weights_from')

    def check(self, settings: Settings) -> None:
        """Raise UserError if the architecture, the optimizer or the sampling differs."""
        index, optimizer = self.checkpoint.index, settings.run.optimizer
        saved_optimizer = index['config'].get('optimizer', optimizer)
        if saved_optimizer != optimizer:
            raise UserError(
                f'{self.run_folder} cannot be resumed with optimizer={optimizer!r}: its checkpoint '
                f'contains {saved_optimizer!r} optimizer state, which {optimizer!r} cannot load. '
                f'Remove optimizer to continue with {saved_optimizer!r}, or start a new run with '
                f'--init_from=scratch.'
            )
        sampling = index['config'].get('sampling', 'random')
        if sampling != settings.run.sampling:
            raise UserError(
                f'{self.run_folder} cannot be resumed with sampling={settings.run.sampling!r}: its '
                f'first {index["iter"]:,} iterations read their data with sampling={sampling!r}, '
                f'which no other order can continue. Remove sampling to continue with '
                f'{sampling!r}, or start a new run with --init_from=scratch.'
            )
        try:
            saved_order = _order_of(index['config'])
        except (KeyError, TypeError) as error:
            raise UserError(
                f'{self.run_folder} cannot be resumed: the config in the index.json of its '
                f'checkpoint is damaged ({error}). Start a new run with --init_from=scratch.'
            ) from error
        self.same_order = saved_order == _order_of(settings.to_dict())
        saved, current = index['architecture'], settings.architecture.to_dict()
        differing = _differing_options(saved, current)
        if differing:
            pairs = ', '.join(f'{k}={then!r} (now {now!r})' for k, (then, now) in differing.items())
            raise UserError(
                f'{self.run_folder} cannot be resumed with another architecture: it has {pairs}. '
                f'Remove these options to continue the run, or start a new run with '
                f'--init_from=scratch.'
            )

    def restore(
        self, parallel: SingleProcess, model: Transformer, optimizer: GuardedOptimizer
    ) -> TrainingProgress:
        """Load the weights and the optimizer state, and release the memory of the state."""
        state, self.state = self.state or self._load_together(parallel), None
        progress = restore_checkpoint(parallel, model, optimizer, self.checkpoint, state)
        progress.one_order &= self.same_order
        return progress

    def _load_together(self, parallel: SingleProcess) -> list[dict]:
        """The state of the newest readable checkpoint, which becomes that of this source.

        Raises UserError if that is an older one which the current options do not continue.
        """
        warnings: list[str] = []
        latest = load_latest(self.checkpoint.path.parent, warnings.append, parallel)
        if latest is None:
            raise UserError(f'{self.checkpoint.path} was removed while the run was resumed.')
        checkpoint, state = latest
        damaged, self.checkpoint, self.warnings = self.checkpoint, checkpoint, warnings
        settled = ('config', 'chosen', 'commanded', 'architecture')
        if any(damaged.index[key] != checkpoint.index[key] for key in settled):
            raise UserError(
                *warnings,
                f'{checkpoint.path} was saved with other options than {damaged.path}. Remove the '
                'damaged checkpoint, then resume the run again.',
            )
        return state

    def report(self, logger: TrainingLogger, header: RecordHeader, environment: dict) -> None:
        """Continue the record, with the changed options and the warnings."""
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
            # The process died after publishing the checkpoint and before recording it.
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
                'all iterations of this run are done. To train it longer, raise --max_iters; to '
                'start a new run, use --init_from=scratch or another --out_dir.',
            )


def _differences(then: dict, now: dict) -> dict[str, list]:
    """key -> [then, now] for values that differ; None for a missing key."""
    return {
        key: [then.get(key), now.get(key)]
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    }


def _differing_options(then: dict, now: dict) -> dict[str, list]:
    """`_differences` of architectures, by dotted name; a kind without a value has the model's.

    Options that only one of them has follow from others, such as those of another mixer; they are
    left out unless there are no others. Backends, no property of the weights, are recorded as a
    change elsewhere.
    """
    stated = [{*leaves(values)} for values in (then, now)]
    both = with_neutral_values(then), with_neutral_values(now)
    named = leaves(both[0]), leaves(both[1])
    differing: dict[str, list] = {}
    of_one: dict[str, list] = {}
    for name in _differences(*named):
        key = name.rpartition('.')[2]
        pair = [own.get(name, values.get(key)) for own, values in zip(named, both)]
        # {}: a kind without values of its own
        if {} in pair or pair[0] == pair[1] or key in ('attention_backend', 'mixer_backend'):
            continue
        has_both = all({name, key} & names for names in stated)
        (differing if has_both else of_one)[name] = pair
    return differing or of_one


def _sequences_per_iter(config: dict) -> int:
    return config['batch_size'] * config['gradient_accumulation_steps']


def _tokens_per_iter(config: dict) -> int:
    return _sequences_per_iter(config) * config['block_size']


def _order_of(config: dict) -> tuple:
    """The options that determine the data of an iteration."""
    return config['dataset'], config['data_seed'], _sequences_per_iter(config)


def find_resume_source(command_line: CommandLine) -> ResumeSource | None:
    """The run that the command line resumes, if any. Its options are added to `command_line`.

    Options of the run's own command line take precedence over today's config file, but not over
    today's command line. Options of its config file and preset yield to today's config file, which
    may have been edited. Raises UserError if init_from=resume and there is nothing to resume.
    """
    init_from = command_line.value('init_from', schema)
    if init_from not in ('resume', 'auto'):
        return None
    out_dir, name = command_line.value('out_dir', schema), command_line.value('resume_run', schema)
    if init_from == 'auto' and name is None and latest_run(out_dir) is None:
        return None
    folder = find_run(out_dir, name)
    warnings: list[str] = []
    checkpoints, state = folder / 'checkpoints', None
    if world_size() > 1:  # the ranks verify the files together, once they are connected
        checkpoint = find_latest(checkpoints, warnings.append)
    else:
        checkpoint, state = load_latest(checkpoints, warnings.append) or (None, None)
    if checkpoint is None:
        if init_from == 'auto':
            return None
        raise UserError(
            f'init_from=resume: {folder} has no checkpoint. Choose another run with --resume_run, '
            f'or start a new run with --init_from=scratch.'
        )
    origins = {'chosen': f'run {folder.name}', 'commanded': f'run {folder.name}, {COMMAND_LINE}'}
    below, above = checked_layers(checkpoint.index, origins)
    once = {key: checkpoint.index['config'].get(key) for key in DERIVED_ONCE}
    lowest = validate_layer(Layer(origins['chosen'], once), schema(), [])
    command_line.layers[:] = [
        _recorded_sizes(checkpoint.index['config'], [below, *command_line.layers, above], folder),
        lowest,
        below,
        *command_line.layers[:-1],
        above,
        command_line.layers[-1],
    ]
    return ResumeSource(folder, checkpoint, state, warnings)


def _recorded_sizes(config: dict, layers: list[Layer], folder: Path) -> Layer:
    """The derived sizes of the run, which it keeps on other devices too, unless an option sets one
    of them or they cannot be divided between the ranks."""
    name = f'derived: in run {folder.name}'
    sizes = {key: config.get(key) for key in SIZES}
    if any(key in layer.values for key in sizes for layer in layers):
        return Layer(name, {})
    accumulation = sizes['gradient_accumulation_steps']
    if type(accumulation) is not int or accumulation % world_size() != 0:
        return Layer(name, {})
    return validate_layer(Layer(name, sizes), schema(), [])


def restart_notes(run: TrainingConfig) -> list[str]:
    """Notes on how the job was launched and what a restart would do."""
    if run.init_from != 'scratch' or restarts_left() <= 0:
        return launch_notes()
    return [
        *launch_notes(),
        'torchrun may restart this job, and init_from=scratch starts a new run each time; '
        '--init_from=auto continues this one.',
    ]


def restore_checkpoint(
    parallel: SingleProcess,
    model: Transformer,
    optimizer: GuardedOptimizer,
    checkpoint: Checkpoint,
    state: list[dict],
) -> TrainingProgress:
    """Load the weights and the optimizer state. Returns the progress; UserError on a mismatch."""
    with misfit_explained(checkpoint):
        sharded_state.restore(sharded_state.StoredState(state), parallel, model, optimizer)
        return TrainingProgress.of(checkpoint.index)


def checkpoint_index(
    settings: Settings, progress: TrainingProgress, environment: dict, dataset: TokenDataset
) -> dict:
    """The index of a checkpoint: everything except its tensors, as plain values."""
    config = settings.to_dict()
    origins = {**settings.run.origins, **settings.architecture.origins}
    chosen: dict[str, object] = {}
    commanded: dict[str, object] = {}
    for key, value in config.items():
        if key not in NOT_INHERITED and not origins[key].startswith(UNCHOSEN_ORIGINS):
            (commanded if origins[key].endswith(CALLER_ORIGINS) else chosen)[key] = value
    for options in (chosen, commanded):
        if 'layer_kinds' in options:
            options['layer_kinds'] = _kinds_to_merge(settings)
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


def _kinds_to_merge(settings: Settings) -> dict[str, dict | None]:
    """`layer_kinds` that gives the same layers above the preset, from which it may remove some."""
    kinds: dict[str, dict | None] = {}
    for letter, entries in settings.architecture.kinds_over_preset().items():
        kinds[letter] = None if entries is None else {k: value for k, (value, _) in entries.items()}
    return kinds
