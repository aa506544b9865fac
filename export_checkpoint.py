"""Export the weights of a checkpoint to a file, or to a Hugging Face folder.

    python export_checkpoint.py --out_dir=out-llama --output=llama.safetensors
    python export_checkpoint.py --run=out/run_20260101_000000/checkpoints/iter_00005000
    python export_checkpoint.py --out_dir=out-llama --format=hf --output=my-llama

The checkpoint is the newest one of the newest run in --out_dir, or the run or checkpoint given by
--run; any strategy and number of ranks may have written it.

A .pt file is {'model': {name: tensor}, 'config': {...}}, for torch.load(..., weights_only=True) and
model.load_state_dict; a tied embedding is in it under both of its names. A .safetensors file has
each tensor once, as safetensors.torch.load_model expects, and the config as JSON in its metadata.

--format=hf writes a folder for transformers' AutoModelForCausalLM.from_pretrained, as an
architecture of transformers that computes the same function. If there is none, an error names the
options that transformers cannot express. If transformers is installed, it must load the folder
before success is reported. The folder includes the tokenizer, for AutoTokenizer.from_pretrained
(pip install tokenizers).

A model with components from a config file needs that file, as for sample.py.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import common.first_import  # noqa: F401

import torch

import interop
from common.console_output import write_progress
from common.errors import UserError, run_script
from components.base import saved_buffers, saved_tensors
from interop import hf_tokenizer
from model_builder import Transformer
from training.checkpoint import Checkpoint, write_failure
from training.load import (
    checkpoint_parser,
    find_checkpoint,
    load_model,
    load_tokenizer,
    register_components,
)

DTYPES = ('float32', 'bfloat16', 'float16')


class Exported(NamedTuple):
    """The model to export, the config for the file, and the checkpoint."""

    model: Transformer
    config: dict
    checkpoint: Checkpoint


def write_pt(exported: Exported, path: Path) -> None:
    torch.save({'model': exported.model.state_dict(), 'config': exported.config}, path)


def write_safetensors(exported: Exported, path: Path) -> None:
    metadata = {'config': json.dumps(exported.config)}
    interop.save_tensors(saved_tensors(exported.model), path, metadata)


def write_hugging_face(exported: Exported, path: Path) -> None:
    model = exported.model
    interop.export(model.config, saved_tensors(model), path)
    write_progress(f'Check: {interop.check_export(model, path)}.')
    try:
        tokenizer, vocab_size = load_tokenizer(exported.checkpoint)
        interop.write_generation_config(
            path, tokenizer.end_of_text, range(vocab_size, model.config.vocab_size)
        )
        hf_tokenizer.write_tokenizer(tokenizer, path, model.config.block_size)
    except UserError as error:
        write_progress(f'note: the tokenizer was not written: {" ".join(error.problems)}')


class Format(NamedTuple):
    """A function that writes a model to a file with the suffix; without a suffix, to a folder."""

    suffix: str
    write: Callable[[Exported, Path], None]
    package: str | None = None  # optional package that it needs


FORMATS = {
    'pt': Format('.pt', write_pt),
    'safetensors': Format('.safetensors', write_safetensors, 'safetensors'),
    'hf': Format('', write_hugging_face, 'safetensors'),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, with the chosen Format and an output that can be written."""
    parser = checkpoint_parser('export_checkpoint.py', __doc__)
    add = parser.add_argument
    add('--output', type=Path, help='File or folder to write (default model.pt; for hf: model)')
    add('--format', choices=FORMATS, help="File format (default: from --output's suffix, or pt)")
    add('--dtype', choices=DTYPES, default='float32', help='Dtype of the weights (default float32)')
    add('--overwrite', action='store_true', help='Replace --output if it exists')
    options = parser.parse(argv)
    problems: list[str] = []
    register_components(options.config, problems)
    options.format = choose_format(options.format, options.output)
    options.output = options.output or Path(f'model{options.format.suffix}')
    check_output(options.format, options.output, options.overwrite)
    return options


def choose_format(name: str | None, output: Path | None) -> Format:
    """The format `name`, or the one of the output's suffix. Raises UserError."""
    suffix = FORMATS[name or 'pt'].suffix if output is None else output.suffix
    possible = [FORMATS[name]] if name else [f for f in FORMATS.values() if f.suffix]
    fitting = [f for f in possible if f.suffix in ('', suffix)]
    if not fitting:
        suffixes = [f.suffix for f in possible]
        with_format = f' with --format={name}' if name else ''
        raise UserError(
            f'--output={output}: the name must end in {" or ".join(suffixes)}{with_format}.'
        )
    (chosen,) = fitting
    if chosen.package and importlib.util.find_spec(chosen.package) is None:
        raise UserError(
            f'this format needs the package {chosen.package}. Install it (pip install '
            f'{chosen.package}), or write a .pt file.'
        )
    return chosen


def check_output(file_format: Format, output: Path, overwrite: bool) -> None:
    """Raise UserError for an output that cannot be written, before the checkpoint is read."""
    if not output.parent.is_dir():
        raise UserError(f'--output={output}: the folder {output.parent} does not exist.')
    if output.is_dir() and file_format.suffix:
        raise UserError(f'--output={output} is a folder.')
    if output.is_file() and not file_format.suffix:
        raise UserError(f'--output={output} is a file, but --format=hf writes a folder.')
    if output.exists() and not overwrite:
        raise UserError(f'--output={output} already exists: replace it with --overwrite.')


def main(argv: list[str]) -> int:
    options = parse(argv)
    checkpoint, state = find_checkpoint(options.out_dir, options.run)
    model = load_model(checkpoint, state, torch.device('cpu'))
    to_dtype(model, getattr(torch, options.dtype))
    config = {
        'architecture': model.config.to_dict(),
        'architecture_name': model.config.name,
        'dataset': checkpoint.index['config'].get('dataset'),
        'iter': checkpoint.iter,
        'val_loss': checkpoint.val_loss,
        'dtype': options.dtype,
    }
    write(options.format, Exported(model, config, checkpoint), options.output)
    size = sum(file.stat().st_size for file in files_of(options.output))
    write_progress(
        f'{model.config.name}, iteration {checkpoint.iter:,}, from {checkpoint.path}\n'
        f'{sum(p.numel() for p in model.parameters()):,} parameters in {options.dtype} → '
        f'{options.output} ({size / 1e9:.2f} GB)'
    )
    return 0


def to_dtype(model: Transformer, dtype: torch.dtype) -> None:
    """Convert the weights in place; buffers stay in fp32. Raises UserError for values beyond the
    dtype's range."""
    buffers = {name: buffer.clone() for name, buffer in saved_buffers(model).items()}
    model.to(dtype)
    for name, buffer in buffers.items():
        model.get_submodule(name.rpartition('.')[0]).register_buffer(
            name.rpartition('.')[2], buffer
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f'{name} has values beyond the range of --dtype={str(dtype)[6:]}.')


def write(file_format: Format, exported: Exported, output: Path) -> None:
    """Write to a temporary path and rename it, so that each file is complete or unchanged.

    Other files in an existing folder stay.
    """
    temporary = output.with_name(f'.{output.name}-{uuid.uuid4().hex[:8]}')
    try:
        file_format.write(exported, temporary)
        for path in files_of(temporary):
            with open(path, 'rb+') as file:
                os.fsync(file.fileno())
        if output.is_dir():
            for path in files_of(temporary):
                os.replace(path, output / path.name)
        else:
            os.replace(temporary, output)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError for OSError
        reason = write_failure(error)
        raise UserError(f'--output={output} cannot be written: {reason}.') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if temporary.is_file():
            temporary.unlink()


def files_of(path: Path) -> list[Path]:
    """The file, or the files of a folder."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


if __name__ == '__main__':
    run_script(main, sys.argv[1:])
