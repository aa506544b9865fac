"""Write the weights of a checkpoint to one file, for other programs to load.

    python export_checkpoint.py --out_dir=out-llama --output=llama.safetensors
    python export_checkpoint.py --run=out/run_20260101_000000/checkpoints/iter_00005000

The newest checkpoint of the newest run in --out_dir is used, or of the run that --run names, or the
checkpoint that it names; whatever strategy wrote it, on any number of ranks. A .pt file is
{'model': {name: tensor}, 'config': {...}} for torch.load(..., weights_only=True); 'model' is for
model.load_state_dict, where a tied table has both of its names. A .safetensors file has each tensor
once, as safetensors.torch.load_model expects, and the config as JSON in its metadata. A model with
components from a config file needs that file again, as for sample.py.
"""

import argparse
import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import checkpointing
import resumption
from configurator import read_config_file
from errors import ArgumentParser, UserError, run_script
from model_builder import Transformer

DTYPES = ('float32', 'bfloat16', 'float16')


def write_pt(model: Transformer, config: dict, path: Path) -> None:
    torch.save({'model': model.state_dict(), 'config': config}, path)


def write_safetensors(model: Transformer, config: dict, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    try:
        save_file(weights, path, metadata={'format': 'pt', 'config': json.dumps(config)})
    except SafetensorError as error:  # so a full disk is told
        raise OSError(str(error)) from error


class Format(NamedTuple):
    """How a model is written to a path of that suffix."""

    suffix: str
    write: Callable[[Transformer, dict, Path], None]
    package: str | None = None  # that this needs, beside what training does


FORMATS = {
    'pt': Format('.pt', write_pt),
    'safetensors': Format('.safetensors', write_safetensors, 'safetensors'),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, with the chosen Format and an output that can be written."""
    parser = ArgumentParser(
        prog='export_checkpoint.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('config', nargs='*', help='config files, for the components that they register')
    add('--out_dir', default='out', help='the folder of runs (default out)')
    add('--run', help=resumption.RUN_HELP)
    add('--output', type=Path, help='the file to write (default model.pt)')
    add('--format', choices=FORMATS, help="default: what --output's suffix says, or pt")
    add('--dtype', choices=DTYPES, default='float32', help='of the weights (default float32)')
    add('--overwrite', action='store_true', help='replace --output if it is there')
    options = parser.parse(argv)
    problems: list[str] = []
    for path in options.config:
        read_config_file(path, problems)
    if problems:
        raise UserError(*problems)
    options.format = choose_format(options.format, options.output)
    options.output = options.output or Path(f'model{options.format.suffix}')
    check_output(options.output, options.overwrite)
    return options


def choose_format(name: str | None, output: Path | None) -> Format:
    """The format called `name`, or that of the output's suffix. Raises UserError."""
    suffix = FORMATS[name or 'pt'].suffix if output is None else output.suffix
    fitting = [f for key, f in FORMATS.items() if f.suffix == suffix and name in (None, key)]
    if not fitting:
        suffixes = [FORMATS[name].suffix] if name else [f.suffix for f in FORMATS.values()]
        with_format = f' with --format={name}' if name else ''
        raise UserError(
            f'--output={output}: its name must end in {" or ".join(suffixes)}{with_format}.'
        )
    (chosen,) = fitting
    if chosen.package and importlib.util.find_spec(chosen.package) is None:
        raise UserError(
            f'{chosen.suffix} files need the package {chosen.package}: pip install '
            f'{chosen.package}. Or write a .pt file.'
        )
    return chosen


def check_output(output: Path, overwrite: bool) -> None:
    """Raises UserError for what would fail only once everything is read."""
    if not output.parent.is_dir():
        raise UserError(f'--output={output}: there is no folder {output.parent}.')
    if output.is_dir():
        raise UserError(f'--output={output} is a folder.')
    if output.exists() and not overwrite:
        raise UserError(f'--output={output} is there already: --overwrite replaces it.')


def main(argv: list[str]) -> int:
    options = parse(argv)
    checkpoint, state = resumption.find_checkpoint(options.out_dir, options.run)
    model = resumption.load_model(checkpoint, state, torch.device('cpu'))
    to_dtype(model, getattr(torch, options.dtype))
    config = {
        'architecture': checkpoint.index['architecture'],
        'architecture_name': model.config.name,
        'dataset': checkpoint.index['config'].get('dataset'),
        'iter': checkpoint.iter,
        'val_loss': checkpoint.val_loss,
        'dtype': options.dtype,
    }
    write(options.format, model, config, options.output)
    print(
        f'{model.config.name}, {checkpoint.iter:,} updates, from {checkpoint.path}\n'
        f'{sum(p.numel() for p in model.parameters()):,} parameters in {options.dtype} → '
        f'{options.output} ({options.output.stat().st_size / 1e9:.2f} GB)'
    )
    return 0


def to_dtype(model: Transformer, dtype: torch.dtype) -> None:
    """Round the weights in place, a parameter at a time. Raises UserError if one is too large."""
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f'{name} has values beyond the range of --dtype={str(dtype)[6:]}.')


def write(file_format: Format, model: Transformer, config: dict, output: Path) -> None:
    """Write to a temporary file and rename it: the output is whole, or as it was before."""
    temporary = output.with_name(f'.{output.name}-{uuid.uuid4().hex[:8]}')
    try:
        file_format.write(model, config, temporary)
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(temporary, output)
    except (OSError, RuntimeError) as error:  # torch's zip writer makes the latter of the former
        reason = checkpointing.write_failure(error)
        raise UserError(f'--output={output} cannot be written: {reason}.') from error
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == '__main__':
    run_script(main, sys.argv[1:])
