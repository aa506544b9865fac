"""Write the weights of a checkpoint to one file, or a Hugging Face folder, for other programs.

    python export_checkpoint.py --out_dir=out-llama --output=llama.safetensors
    python export_checkpoint.py --run=out/run_20260101_000000/checkpoints/iter_00005000
    python export_checkpoint.py --out_dir=out-llama --format=hf --output=my-llama

The newest checkpoint of the newest run in --out_dir is used, or of the run that --run names, or the
checkpoint that it names; whatever strategy wrote it, on any number of ranks. A .pt file is
{'model': {name: tensor}, 'config': {...}} for torch.load(..., weights_only=True); 'model' is for
model.load_state_dict, where a tied table has both of its names. A .safetensors file has each tensor
once, as safetensors.torch.load_model expects, and the config as JSON in its metadata. --format=hf
writes a folder for transformers' AutoModelForCausalLM.from_pretrained, in the architecture there
that computes the same; what transformers cannot express is refused by name. Where transformers is
installed, it loads the folder before success is reported. The tokenizer is there
too, for AutoTokenizer.from_pretrained (pip install tokenizers). A model with components from a
config file needs that file again, as for sample.py.
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
    """What there is to write: the model, what the file says of it, and where it comes from."""

    model: Transformer
    config: dict
    checkpoint: Checkpoint


def write_pt(exported: Exported, path: Path) -> None:
    torch.save({'model': exported.model.state_dict(), 'config': exported.config}, path)


def write_safetensors(exported: Exported, path: Path) -> None:
    metadata = {'config': json.dumps(exported.config)}
    interop.save_tensors(dict(exported.model.named_parameters()), path, metadata)


def write_hugging_face(exported: Exported, path: Path) -> None:
    model = exported.model
    interop.export(model.config, dict(model.named_parameters()), path)
    write_progress(f'Check: {interop.check_export(model, path)}.')
    try:
        tokenizer, vocab_size = load_tokenizer(exported.checkpoint)
        interop.write_generation_config(
            path, tokenizer.end_of_text, range(vocab_size, model.config.vocab_size)
        )
        hf_tokenizer.write_tokenizer(tokenizer, path, model.config.block_size)
    except UserError as error:
        write_progress(f'note: no tokenizer is written: {" ".join(error.problems)}')


class Format(NamedTuple):
    """How a model is written to a path of that suffix; without one, to a folder."""

    suffix: str
    write: Callable[[Exported, Path], None]
    package: str | None = None  # that this needs, beside what training does


FORMATS = {
    'pt': Format('.pt', write_pt),
    'safetensors': Format('.safetensors', write_safetensors, 'safetensors'),
    'hf': Format('', write_hugging_face, 'safetensors'),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, with the chosen Format and an output that can be written."""
    parser = checkpoint_parser('export_checkpoint.py', __doc__)
    add = parser.add_argument
    add('--output', type=Path, help='what to write (default model.pt; with --format=hf model/)')
    add('--format', choices=FORMATS, help="default: what --output's suffix says, or pt")
    add('--dtype', choices=DTYPES, default='float32', help='of the weights (default float32)')
    add('--overwrite', action='store_true', help='replace --output if it is there')
    options = parser.parse(argv)
    problems: list[str] = []
    register_components(options.config, problems)
    options.format = choose_format(options.format, options.output)
    options.output = options.output or Path(f'model{options.format.suffix}')
    check_output(options.format, options.output, options.overwrite)
    return options


def choose_format(name: str | None, output: Path | None) -> Format:
    """The format called `name`, or that of the output's suffix. Raises UserError."""
    suffix = FORMATS[name or 'pt'].suffix if output is None else output.suffix
    possible = [FORMATS[name]] if name else [f for f in FORMATS.values() if f.suffix]
    fitting = [f for f in possible if f.suffix in ('', suffix)]
    if not fitting:
        suffixes = [f.suffix for f in possible]
        with_format = f' with --format={name}' if name else ''
        raise UserError(
            f'--output={output}: its name must end in {" or ".join(suffixes)}{with_format}.'
        )
    (chosen,) = fitting
    if chosen.package and importlib.util.find_spec(chosen.package) is None:
        raise UserError(
            f'This format needs the package {chosen.package}: pip install {chosen.package}. Or '
            f'write a .pt file.'
        )
    return chosen


def check_output(file_format: Format, output: Path, overwrite: bool) -> None:
    """Raises UserError for what would fail only once everything is read."""
    if not output.parent.is_dir():
        raise UserError(f'--output={output}: there is no folder {output.parent}.')
    if output.is_dir() and file_format.suffix:
        raise UserError(f'--output={output} is a folder.')
    if output.is_file() and not file_format.suffix:
        raise UserError(f'--output={output} is a file, and this format is a folder.')
    if output.exists() and not overwrite:
        raise UserError(f'--output={output} is there already: --overwrite replaces it.')


def main(argv: list[str]) -> int:
    options = parse(argv)
    checkpoint, state = find_checkpoint(options.out_dir, options.run)
    model = load_model(checkpoint, state, torch.device('cpu'))
    to_dtype(model, getattr(torch, options.dtype))
    config = {
        'architecture': checkpoint.index['architecture'],
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
    """Round the weights in place, a parameter at a time. Raises UserError if one is too large."""
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f'{name} has values beyond the range of --dtype={str(dtype)[6:]}.')


def write(file_format: Format, exported: Exported, output: Path) -> None:
    """Write to a temporary place and rename it: each file is whole, or as it was before.

    Of a folder that is there already, what is not written anew stays.
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
    except (OSError, RuntimeError) as error:  # torch's zip writer makes the latter of the former
        reason = write_failure(error)
        raise UserError(f'--output={output} cannot be written: {reason}.') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if temporary.is_file():
            temporary.unlink()


def files_of(path: Path) -> list[Path]:
    """The file itself, or those of a folder."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


if __name__ == '__main__':
    run_script(main, sys.argv[1:])
