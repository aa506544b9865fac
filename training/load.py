"""Find a checkpoint and load its model, for sample.py, evaluate.py, export_checkpoint.py.

From Python, `load_run(path)` does both:

    from training.load import load_run

    run = load_run('out')  # the newest run in out/
    print(run.generate('ROMEO:'))
"""

import argparse
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import torch

from common import hardware
from common.console_output import write_progress
from common.dict_option import DictOption
from common.environment import job
from common.errors import ArgumentParser, UserError, did_you_mean
from common.option_merge import merge
from common.paths import expand_home
from components.weight_initialization import initialize_buffers
from configurator import Layer, flatten, read_config_file, validate_layer
from data.dataset import TokenDataset, load_dataset
from data.tokenizer import Tokenizer
from inference.text_generator import DEFAULTS, TextGenerator, checked_options
from model_builder import Transformer, build_model, with_backend_of
from model_config import ModelArchitectureConfig
from parallel import sharded_state
from parallel.strategies import buffer_shards, local_weights
from records.record import read_record
from records.record_types import Record
from records.run_folders import latest_run
from training.checkpoint import Checkpoint, is_checkpoint, load_latest, load_state, read_index
from training.memory_check import check_size
from training_config import OPTION_GROUPS, TrainingConfig, schema

PathLike = str | os.PathLike[str]


# --------------------------------------------------------------------------------------------------
# A run, from Python


class LoadedRun:
    """A trained model with its options, tokenizer and record.

    Attributes: `model` (in eval mode), `config` (its architecture), `training` (its training
    options), `tokenizer`, `record` (the parsed record), `folder`, `iter` (iterations trained),
    `val_loss` (None if not evaluated at that iteration), `device` and `dtype` (of the matrix
    products in `generate`). `training`, `tokenizer` and `record` are read on first use, and raise
    UserError if they cannot be.
    """

    def __init__(self, folder: Path, index: dict, model: Transformer, dtype: str):
        """index: the index of a checkpoint of that model."""
        self.folder, self.model, self.dtype = folder.absolute(), model.eval(), dtype
        self._index = index

    @property
    def config(self) -> ModelArchitectureConfig:
        return self.model.config

    @cached_property
    def training(self) -> TrainingConfig:
        (layer,) = checked_layers(self._index, {'config': str(self.folder)})
        problems: list[str] = []
        merged = merge(flatten(OPTION_GROUPS), [layer], problems)
        if problems:
            raise UserError(*problems)
        return TrainingConfig(*merged)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self._vocabulary[0]

    @cached_property
    def record(self) -> Record:
        return read_record(self.folder)

    @property
    def iter(self) -> int:
        return self._index['iter']

    @property
    def val_loss(self) -> float | None:
        return self._index['val_loss']

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def _vocabulary(self) -> tuple[Tokenizer, int]:
        return find_tokenizer(self._index, self.folder)

    def generate(
        self,
        prompt: str = '\n',
        *,
        max_new_tokens: int = DEFAULTS.max_new_tokens,
        temperature: float = DEFAULTS.temperature,
        top_k: int = DEFAULTS.top_k,
        top_p: float = DEFAULTS.top_p,
        min_p: float = DEFAULTS.min_p,
        stop: str | Sequence[str] = (),
        ignore_end_of_text: bool = DEFAULTS.ignore_end_of_text,
        seed: int = DEFAULTS.seed,
    ) -> str:
        """The prompt and its continuation: the first sample of sample.py with these options.

        Raises UserError for a value outside its limits, and for a prompt that the vocabulary
        cannot encode.
        """
        options = checked_options(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            stop=[stop] if isinstance(stop, str) else stop,
            ignore_end_of_text=ignore_end_of_text,
            seed=seed,
        )
        tokenizer, vocab_size = self._vocabulary
        generator = TextGenerator(self.model, tokenizer, vocab_size, self.dtype, options)
        return prompt + generator.generate_text(prompt)

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        loss = '' if self.val_loss is None else f', val loss {self.val_loss:.4f}'
        return (
            f'<LoadedRun {self.folder}: {self.config.name}, {parameters:,} parameters, '
            f'{self.iter:,} iterations{loss}, on {self.device}>'
        )


def load_run(
    path: PathLike = 'out',
    *,
    config: PathLike | Iterable[PathLike] = (),
    device: str = 'auto',
    dtype: str = 'auto',
) -> LoadedRun:
    """Load a run for use in Python: its newest checkpoint that can be read.

    path: a run folder; a folder of runs, of which the newest is loaded; or a checkpoint folder.
    config: config files that register components of the model. device, dtype: as for sample.py;
    by default the best that the machine has.

    Raises UserError if there is no run or checkpoint, if it cannot be read, or if the model needs
    a component that is not registered.
    """
    register_components(paths_of(config), problems=[])
    chosen_device = hardware.select_device(device)
    chosen_dtype = hardware.resolve_dtype(dtype, chosen_device)
    folder = Path(expand_home(os.fspath(path)))
    if not folder.is_dir():
        raise UserError(f'{folder} is not a folder. Give a run, a checkpoint or a folder of runs.')
    newest = None if is_checkpoint(folder) else latest_run(folder, job())
    if newest is None and not is_checkpoint(folder) and not (folder / 'checkpoints').is_dir():
        raise UserError(f'{folder} contains no run. Give a run, a checkpoint or a folder of runs.')
    checkpoint, state = find_checkpoint(str(folder.parent), str(newest or folder))
    model = load_model(checkpoint, state, chosen_device)
    return LoadedRun(run_folder_of(checkpoint), checkpoint.index, model, chosen_dtype)


def paths_of(paths: PathLike | Iterable[PathLike]) -> list[str]:
    """One path or several, as strings."""
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    return [os.fspath(path) for path in several]


# --------------------------------------------------------------------------------------------------
# A checkpoint, on the command line


def find_run(out_dir: str, name: str | None) -> Path:
    """The run `name`, a path or a folder name in `out_dir`; by default the newest in `out_dir`.

    After a restart by torchrun it is the newest run of the same job. Raises UserError if there is
    none.
    """
    if name is None:
        newest = latest_run(out_dir, job())
        if newest is None:
            raise UserError(
                f'out_dir={out_dir!r} contains no run. Give the folder of runs with '
                f'--out_dir=FOLDER, or start a run there with train.py --init_from=scratch.'
            )
        return newest
    for path in (Path(name), Path(out_dir) / name):
        if path.is_dir():
            return path
    known = [path.parent.name for path in Path(out_dir).glob('run_*/checkpoints')]
    raise UserError(
        f'{name!r} is not a run: neither {name} nor {Path(out_dir) / name} is a folder.'
        f'{did_you_mean(name, known)} Runs in {out_dir}: {", ".join(sorted(known)) or "none"}.'
    )


def checkpoint_parser(prog: str, description: str) -> ArgumentParser:
    """A parser with the arguments that select a checkpoint and its config files."""
    parser = ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        'config',
        nargs='*',
        type=expand_home,
        help='Config files that register components of the model',
    )
    add('--out_dir', type=expand_home, default='out', help='Folder of runs (default out)')
    add(
        '--run',
        type=expand_home,
        help='Run folder, its name in out_dir, or a checkpoint folder (default: the newest run)',
    )
    return parser


def register_components(config_files: list[str], problems: list[str]) -> None:
    """Run the config files, which register components. Raises UserError with all problems."""
    for path in config_files:
        read_config_file(path, problems)
    if problems:
        raise UserError(*problems)


def find_checkpoint(out_dir: str, name: str | None) -> tuple[Checkpoint, list[dict]]:
    """A checkpoint and its state: the folder `name`, or the newest checkpoint of the run `name`.

    Raises UserError if no checkpoint can be read.
    """
    if name is not None and is_checkpoint(Path(name)):
        checkpoint = read_index(Path(name))
        return checkpoint, load_state(checkpoint)
    folder = find_run(out_dir, name)
    latest = load_latest(folder / 'checkpoints', warn=write_progress)
    if latest is None:
        raise UserError(f'{folder} has no checkpoint. Choose another run with --run.')
    return latest


def load_model(checkpoint: Checkpoint, state: list[dict], device: torch.device) -> Transformer:
    """The model of a checkpoint, with its weights. Raises UserError."""
    model = build_model(with_backend_of(device, load_architecture(checkpoint)))
    check_size(model, device)
    model.to_empty(device=device)
    model.tie_weights()
    initialize_buffers(model)
    with misfit_explained(checkpoint):
        weights = local_weights(model) | buffer_shards(model)
        sharded_state.load_weights(sharded_state.StoredState(state), weights)
    return model


def load_architecture(checkpoint: Checkpoint) -> ModelArchitectureConfig:
    """The architecture of a checkpoint, without an attention backend that depended on the device.

    Raises UserError.
    """
    index = checkpoint.index
    (layer,) = checked_layers(index, {'architecture': str(checkpoint.path)})
    if 'attention_backend' not in index['chosen'] | index['commanded']:
        layer.values.pop('attention_backend', None)
    return ModelArchitectureConfig.from_dict(layer.values)


def load_tokenizer(checkpoint: Checkpoint) -> tuple[Tokenizer, int]:
    """The tokenizer that the model was trained with, and its number of tokens. Raises UserError."""
    return find_tokenizer(checkpoint.index, run_folder_of(checkpoint))


def find_tokenizer(index: dict, run_folder: Path) -> tuple[Tokenizer, int]:
    """The tokenizer that a checkpoint's index describes, and its number of tokens.

    The dataset is read only if the checkpoint is too old to describe it. Raises UserError.
    """
    data = index['data']
    if data is not None:
        return Tokenizer(data['tokenizer'], run_folder), data['vocab_size']
    try:
        config = index['config']
        dataset = load_dataset(config['dataset'], config['block_size'])
    except UserError as error:
        raise UserError(
            *error.problems,
            f'{run_folder} was written by an older version that did not store the tokenizer; '
            f'the dataset is needed.',
        ) from error
    return Tokenizer(dataset.tokenizer, dataset.folder), dataset.vocab_size


def run_folder_of(checkpoint: Checkpoint) -> Path:
    """The folder of the run that wrote the checkpoint."""
    return checkpoint.path.absolute().parent.parent


def copy_tokenizer_file(dataset: TokenDataset, run_folder: Path) -> None:
    """Copy the tokenizer's file, if it has one, to the run, where `load_tokenizer` reads it."""
    name = dataset.tokenizer.get('file')
    if isinstance(name, str):
        with suppress(OSError):  # training does not need it
            shutil.copyfile(dataset.folder / Path(name).name, run_folder / Path(name).name)


def checked_layers(index: dict, origins: dict[str, str]) -> list[Layer]:
    """The options under each key of a checkpoint's index, checked like a user's.

    origins: key -> origin of its options. Raises UserError for unknown options.
    """
    layers: list[Layer] = []
    unknown: dict[str, object] = {}
    options = schema()
    declared = flatten(options)
    for name, origin in origins.items():
        values = index[name]
        layers.append(validate_layer(Layer(origin, values), options, []))
        for key, value in values.items():
            option = declared.get(key)
            if isinstance(option, DictOption) and isinstance(value, dict):
                unknown |= option.refused(key, value)
            elif key not in layers[-1].values:
                unknown[key] = value
    if unknown:
        files = ' '.join(index['config_files'])
        shown = ', '.join(f'{key}={value!r:.60}' for key, value in unknown.items())
        advice = (
            f'A checkpoint contains no code. Pass the config file that registers them: {files}'
            if files
            else 'No config file registered them: another version of this program wrote them.'
        )
        (where, *_) = origins.values()
        raise UserError(f'{where}: unknown options or components: {shown}. {advice}')
    return layers


@contextmanager
def misfit_explained(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise a UserError if loading fails since the checkpoint does not fit the model."""
    try:
        yield
    except KeyError as error:
        raise UserError(f'{checkpoint.path} does not fit this model: it lacks {error}.') from error
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f'{checkpoint.path} does not fit this model: {reason}') from error
