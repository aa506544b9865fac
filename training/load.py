"""Find a checkpoint and load its model, as sample.py, evaluate.py and export_checkpoint.py do."""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from common.console_output import write_progress
from common.environment import job
from common.errors import ArgumentParser, UserError, did_you_mean
from common.paths import expand_home
from components.weight_initialization import initialize_buffers
from configurator import Layer, read_config_file, validate_layer
from data.dataset import TokenDataset, load_dataset
from data.tokenizer import Tokenizer
from model_builder import Transformer, build_model
from model_config import ModelArchitectureConfig
from parallel import sharded_state
from parallel.strategies import local_weights
from records.run_folders import latest_run
from training.checkpoint import Checkpoint, is_checkpoint, load_latest, load_state, read_index
from training.memory_check import check_size
from training_config import schema


def find_run(out_dir: str, name: str | None) -> Path:
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
        f'{did_you_mean(name, known)} Runs in {out_dir}: {", ".join(sorted(known)) or "none"}.'
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


def register_components(config_files: list[str], problems: list[str]) -> None:
    """Let the files register their components. Raises UserError with all problems, if any."""
    for path in config_files:
        read_config_file(path, problems)
    if problems:
        raise UserError(*problems)


def find_checkpoint(out_dir: str, name: str | None) -> tuple[Checkpoint, list[dict]]:
    """The checkpoint in folder `name`, or the newest of the run of that name; and its state.

    Raises UserError if there is none that can be used.
    """
    if name is not None and is_checkpoint(Path(name)):
        checkpoint = read_index(Path(name))
        return checkpoint, load_state(checkpoint)
    folder = find_run(out_dir, name)
    latest = load_latest(folder / 'checkpoints', warn=write_progress)
    if latest is None:
        raise UserError(f'{folder} has no checkpoint. Name another run with --run.')
    return latest


def load_model(checkpoint: Checkpoint, state: list[dict], device: torch.device) -> Transformer:
    """The model that a checkpoint was taken of. Raises UserError."""
    model = build_model(load_architecture(checkpoint))
    check_size(model, device)
    model.to_empty(device=device)
    model.tie_weights()
    initialize_buffers(model)
    with misfit_explained(checkpoint):
        sharded_state.load_weights(sharded_state.StoredState(state), local_weights(model))
    return model


def load_architecture(checkpoint: Checkpoint) -> ModelArchitectureConfig:
    """The architecture that the checkpoint was trained with. Raises UserError."""
    (layer,) = checked_layers(checkpoint, {'architecture': str(checkpoint.path)})
    return ModelArchitectureConfig.from_dict(layer.values)


def load_tokenizer(checkpoint: Checkpoint) -> tuple[Tokenizer, int]:
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


def copy_tokenizer_file(dataset: TokenDataset, run_folder: Path) -> None:
    """Copy the file that the tokenizer is in, if it is in one, to where `load_tokenizer` looks."""
    name = dataset.tokenizer.get('file')
    if isinstance(name, str):
        with suppress(OSError):  # training does without
            shutil.copyfile(dataset.folder / Path(name).name, run_folder / Path(name).name)


def checked_layers(checkpoint: Checkpoint, origins: dict[str, str]) -> list[Layer]:
    """The values that the checkpoint's index has under each key, checked like a user's."""
    layers: list[Layer] = []
    unknown: dict[str, object] = {}
    options = schema()
    for name, origin in origins.items():
        values = checkpoint.index[name]
        layers.append(validate_layer(Layer(origin, values), options, []))
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


@contextmanager
def misfit_explained(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise UserError(f'{checkpoint.path} does not fit this model: it has no {error}.') from error
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f'{checkpoint.path} does not fit this model: {reason}') from error
