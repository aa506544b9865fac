"""Continue a run: find its checkpoint, refuse another architecture, restore, say what changed."""

import argparse
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from common import environment
from common.console_output import write_progress
from common.environment import job, restarts_left
from common.errors import ArgumentParser, UserError, nearest
from common.paths import expand_home
from components.weight_initialization import initialize_buffers
from configurator import COMMAND_LINE, CommandLine, Layer, accept_layer, read_config_file
from data.dataset import TokenDataset, load_dataset
from data.tokenizer import Tokenizer
from model_builder import Transformer, build_model
from model_config import ModelArchitectureConfig
from optim.step import Updater
from parallel import sharded_state
from parallel.strategies import SingleProcess, weights_here
from records import trackers
from records.record import read_record
from records.run_folders import latest_run
from training import checkpointing, stability
from training_config import Settings, schema
from training_logger import TrainingLogger

# Options that say how to start, not what to train: never taken over from the earlier process.
NOT_TAKEN_OVER = ('out_dir', 'init_from', 'resume_run', 'eval_only', 'verify_data', 'debug')


# What is derived for a new run, and stays as it was when that is resumed.
DERIVED_ONCE = ('eval_interval',)

# How the origin of a value begins that nobody chose.
OPEN = ('default', 'derived', 'dataset')


@dataclass
class Progress:
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
    def of(cls, index: dict) -> 'Progress':
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
class Resumed:
    """A run to continue, and the newest of its checkpoints that could be read."""

    run_folder: Path
    checkpoint: checkpointing.Checkpoint
    state: list[dict]
    warnings: list[str]
    same_order: bool = True  # as far as its options have been compared with today's

    @property
    def weights_from(self) -> dict | None:
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

    def restore(self, parallel: SingleProcess, model: Transformer, updater: Updater) -> Progress:
        """Load weights and optimizer, and give the state up, to free its memory."""
        state, self.state = self.state, []
        progress = restore(parallel, model, updater, self.checkpoint, state)
        progress.one_order &= self.same_order
        return progress

    def report(self, logger: TrainingLogger, header: dict, surroundings: dict) -> None:
        """Continue the record, with what changed and what was wrong."""
        index, path = self.checkpoint.index, self.checkpoint.path.relative_to(self.run_folder)
        changed = _differences(index['config'], header['config'])
        changed |= _differences(index['surroundings'], surroundings)
        document = logger.resume(
            self.checkpoint.iter,
            checkpoint=str(path),
            changed={
                key: pair
                for key, pair in changed.items()
                if key not in NOT_TAKEN_OVER and key not in trackers.OPTIONS
            },
            config=header['config'],
            metadata=header['metadata'],
            startup_info=header['startup_info'],
        )
        if document and str(path) not in [entry['path'] for entry in document['checkpoints']]:
            # The process died between publishing it and saying so.
            entry = {'iter': index['iter'], 'val_loss': index['val_loss'], **index['seen']}
            logger.checkpoint({**entry, 'path': str(path), 'time_ms': None, 'write_ms': None})
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


def find(asked: CommandLine) -> Resumed | None:
    """The run that the command line asks to continue; its options join those that are asked for.

    What the run was given on the command line stands above today's config file and beneath today's
    command line; what its file and preset gave stands beneath today's file, which may have been
    edited. Raises UserError if there is nothing to resume and init_from=resume.
    """
    init_from = asked.value('init_from', schema)
    if init_from not in ('resume', 'auto'):
        return None
    out_dir, name = asked.value('out_dir', schema), asked.value('resume_run', schema)
    if init_from == 'auto' and name is None and latest_run(out_dir) is None:
        return None
    folder = run_folder(out_dir, name)
    warnings: list[str] = []
    found = checkpointing.newest(folder / 'checkpoints', warnings.append)
    if found is None:
        if init_from == 'auto':
            return None
        raise UserError(
            f'init_from=resume: {folder} has no checkpoint. Name another run with --resume_run, or '
            f'start a new one with --init_from=scratch.'
        )
    checkpoint, state = found
    origins = {'chosen': f'run {folder.name}', 'commanded': f'run {folder.name}, {COMMAND_LINE}'}
    beneath, above = _accepted(checkpoint, origins)
    once = {key: checkpoint.index['config'].get(key) for key in DERIVED_ONCE}
    lowest = accept_layer(Layer(origins['chosen'], once), schema(), [])
    asked.layers[:] = [lowest, beneath, *asked.layers[:-1], above, asked.layers[-1]]
    return Resumed(folder, checkpoint, state, warnings)


def notes(run) -> list[str]:
    """What a person may not have thought of, a sentence or two each."""
    if run.init_from != 'scratch' or restarts_left() <= 0:
        return environment.notes()
    return [
        *environment.notes(),
        'torchrun may start this job again, which with init_from=scratch begins a new run each '
        'time: --init_from=auto goes on with this one.',
    ]


def run_folder(out_dir: str, name: str | None) -> Path:
    """The run called `name`, a path or a name below `out_dir`; without a name the newest there.

    A job that torchrun starts again goes on with its own, whatever else has begun there since.
    Raises UserError if there is none.
    """
    if name is None:
        newest = latest_run(out_dir, job())
        if newest is None:
            raise UserError(
                f'out_dir={out_dir!r} holds no run. Give the folder that does by --out_dir=FOLDER, '
                f'or start one there with train.py --init_from=scratch.'
            )
        return newest
    for path in (Path(name), Path(out_dir) / name):
        if path.is_dir():
            return path
    known = [path.parent.name for path in Path(out_dir).glob('run_*/checkpoints')]
    raise UserError(
        f'{name!r} is no run: neither {name} nor {Path(out_dir) / name} is a folder.'
        f'{nearest(name, known)} Runs in {out_dir}: {", ".join(sorted(known)) or "none"}.'
    )


def checkpoint_parser(prog: str, description: str) -> ArgumentParser:
    """For a script that begins with a checkpoint: which one, and what its components need."""
    parser = ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        'config',
        nargs='*',
        type=expand_home,
        help='config files, for the components that they register',
    )
    add('--out_dir', type=expand_home, default='out', help='the folder of runs (default out)')
    add(
        '--run',
        type=expand_home,
        help='a run folder, or its name in out_dir, or a checkpoint folder '
        '(default: the newest run)',
    )
    return parser


def read_components(config_files: list[str], problems: list[str]) -> None:
    """Let the files register their components. Raises UserError with all problems, if any."""
    for path in config_files:
        read_config_file(path, problems)
    if problems:
        raise UserError(*problems)


def find_checkpoint(out_dir: str, name: str | None) -> tuple[checkpointing.Checkpoint, list[dict]]:
    """The checkpoint in folder `name`, or the newest of the run of that name; and its state.

    Raises UserError if there is none that can be used.
    """
    if name is not None and checkpointing.is_checkpoint(Path(name)):
        checkpoint = checkpointing.read_index(Path(name))
        return checkpoint, checkpointing.load_state(checkpoint)
    folder = run_folder(out_dir, name)
    found = checkpointing.newest(folder / 'checkpoints', warn=write_progress)
    if found is None:
        raise UserError(f'{folder} has no checkpoint. Name another run with --run.')
    return found


def load_model(
    checkpoint: checkpointing.Checkpoint, state: list[dict], device: torch.device
) -> Transformer:
    """The model that a checkpoint was taken of. Raises UserError."""
    model = build_model(architecture_of(checkpoint))
    stability.check_size(model, device)
    model.to_empty(device=device)
    model.tie_weights()
    initialize_buffers(model)
    with _fitting(checkpoint):
        sharded_state.load_weights(sharded_state.StoredState(state), weights_here(model))
    return model


def architecture_of(checkpoint: checkpointing.Checkpoint) -> ModelArchitectureConfig:
    """The architecture that the checkpoint was trained with. Raises UserError."""
    (layer,) = _accepted(checkpoint, {'architecture': str(checkpoint.path)})
    return ModelArchitectureConfig.from_dict(layer.values)


def vocabulary_of(checkpoint: checkpointing.Checkpoint) -> tuple[Tokenizer, int]:
    """The tokenizer whose tokens the model was trained on, and how many of them there are.

    The dataset itself is asked only where the checkpoint does not say. Raises UserError.
    """
    data = checkpoint.index['data']
    if data is not None:
        run_folder = checkpoint.path.absolute().parent.parent
        return Tokenizer(data['tokenizer'], run_folder), data['vocab_size']
    try:
        config = checkpoint.index['config']
        dataset = load_dataset(config['dataset'], config['block_size'])
    except UserError as error:
        raise UserError(
            *error.problems,
            f'{checkpoint.path} is of the time when checkpoints did not tell their tokenizer, so '
            'the dataset is needed.',
        ) from error
    return Tokenizer(dataset.tokenizer, dataset.folder), dataset.vocab_size


def keep_tokenizer(dataset: TokenDataset, run_folder: Path) -> None:
    """Copy the file that the tokenizer is in, if it is in one, to where `vocabulary_of` looks."""
    name = dataset.tokenizer.get('file')
    if isinstance(name, str):
        with suppress(OSError):  # training does without
            shutil.copyfile(dataset.folder / Path(name).name, run_folder / Path(name).name)


def _accepted(checkpoint: checkpointing.Checkpoint, origins: dict[str, str]) -> list[Layer]:
    """The values that the checkpoint's index has under each key, checked like a user's."""
    layers, unknown, options = [], {}, schema()
    for name, origin in origins.items():
        values = checkpoint.index[name]
        layers.append(accept_layer(Layer(origin, values), options, []))
        unknown |= {key: value for key, value in values.items() if key not in layers[-1].values}
    if unknown:
        files = ' '.join(checkpoint.index['config_files'])
        way = (
            f'A checkpoint carries no code: give the config file again that registered it: {files}'
            if files
            else 'No config file registered it: another version of this program wrote it.'
        )
        shown = ', '.join(f'{key}={value!r:.60}' for key, value in unknown.items())
        raise UserError(f'{checkpoint.path} has what is unknown here: {shown}. {way}')
    return layers


def restore(
    parallel: SingleProcess,
    model: Transformer,
    updater: Updater,
    checkpoint: checkpointing.Checkpoint,
    state: list[dict],
) -> Progress:
    """Load weights and optimizer; how far the run had come. Raises UserError if they do not fit."""
    with _fitting(checkpoint):
        sharded_state.restore(sharded_state.StoredState(state), parallel, model, updater)
        return Progress.of(checkpoint.index)


@contextmanager
def _fitting(checkpoint: checkpointing.Checkpoint) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise UserError(f'{checkpoint.path} does not fit this model: it has no {error}.') from error
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f'{checkpoint.path} does not fit this model: {reason}') from error


def checkpoint_index(
    settings: Settings, progress: Progress, surroundings: dict, dataset: TokenDataset
) -> dict:
    """What a checkpoint says of itself, beside its tensors: plain values only."""
    config = settings.to_dict()
    origins = {**settings.run.origins, **settings.architecture.origins}
    chosen, commanded = {}, {}
    for key, value in config.items():
        if key not in NOT_TAKEN_OVER and not origins[key].startswith(OPEN):
            (commanded if origins[key].endswith(COMMAND_LINE) else chosen)[key] = value
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
        'surroundings': surroundings,
        'config_files': [file['path'] for file in settings.asked.config_files],
        'data': {'tokenizer': dataset.tokenizer, 'vocab_size': dataset.vocab_size},
    }
