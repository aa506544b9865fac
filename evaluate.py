"""Measure a checkpoint on text of your own: bits per byte, and multiple choice by likelihood.

    python evaluate.py --out_dir=out-llama --text=book.txt --text=code.py
    python evaluate.py --out_dir=out-llama --choices=items.jsonl --json=results.json
    python evaluate.py --out_dir=out-llama --make_choices=items.jsonl

--text: each token but the first is scored once, by windows of block_size tokens that overlap, so
that it has more than block_size - stride tokens before it wherever the text has. --choices: each
line an item, {"context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0};
a choice follows the context as it stands, so it brings its own space. The likeliest is chosen
(acc), the likeliest by the character (acc_norm) and by the byte of UTF-8 (acc_bytes): the measures
that lm-evaluation-harness has by these names. --make_choices writes such items from the validation
text of the run's dataset, what really follows against what stands elsewhere, and scores them; every
run on that dataset gets the same.

The newest run in --out_dir is used, or the run or the checkpoint that --run names. A model with
components from a config file needs that file again, as for sample.py.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import common.first_import  # noqa: F401

import numpy as np

from common import hardware
from common.arguments import DEVICE_ARGUMENTS, Argument, add_arguments, range_problems
from common.console_output import write_text
from common.errors import UserError, run_script
from common.files import replace_file
from common.formatting import table
from common.text_files import read_text
from comparison.significance import CONFIDENCE
from data.dataset import load_dataset
from data.tokenizer import Tokenizer
from inference.multiple_choice import generate_items, read_items
from inference.scoring import ChoiceResult, Scorer, TextResult, score_items, score_text
from training.checkpoint import Checkpoint
from training.load import (
    checkpoint_parser,
    find_checkpoint,
    load_architecture,
    load_model,
    load_tokenizer,
    register_components,
)

FILES = {'action': 'append', 'metavar': 'FILE'}
ARGUMENTS = {
    'text': Argument(
        'text to find the bits per byte of; may be given several times', Path, [], settings=FILES
    ),
    'choices': Argument('items to choose in; may be given several times', Path, [], settings=FILES),
    'make_choices': Argument(
        'items to write first, and to score', Path, settings={'metavar': 'FILE'}
    ),
    'num_items': Argument('of --make_choices (default 200)', int, 200, low=1),
    'stride': Argument('tokens scored in a window (default: half of block_size)', int, low=1),
    'batch_size': Argument('sequences at a time (default: what takes little memory)', int, low=1),
    'json': Argument(
        'write the results here, with those of each item', Path, settings={'metavar': 'FILE'}
    ),
    **DEVICE_ARGUMENTS,
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options, checked. Raises UserError."""
    parser = checkpoint_parser('evaluate.py', __doc__)
    add_arguments(parser, ARGUMENTS)
    options = parser.parse(argv)
    problems = [*range_problems(options, ARGUMENTS), *file_problems(options)]
    register_components(options.config, problems)
    return options


def file_problems(options: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the files to read and to write."""
    if not (options.text or options.choices or options.make_choices):
        yield (
            'nothing to evaluate: give --text=FILE, --choices=FILE.jsonl or '
            '--make_choices=FILE.jsonl.'
        )
    for key, path in (('make_choices', options.make_choices), ('json', options.json)):
        if path is not None and not path.parent.is_dir():
            yield f'--{key}={path}: there is no folder {path.parent}.'
    if options.json and options.json.is_dir():
        yield f'--json={options.json} is a folder: give the name of a file in it.'
    elif options.json and options.json in (*options.text, *options.choices, options.make_choices):
        yield f'--json={options.json} would overwrite what is to be evaluated.'
    if options.make_choices and options.make_choices.exists():
        yield (
            f'--make_choices={options.make_choices} is there already: --choices='
            f'{options.make_choices} scores it.'
        )


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    device = hardware.select_device(options.device)
    dtype = hardware.resolve_dtype(options.dtype, device)
    checkpoint, state = find_checkpoint(options.out_dir, options.run)
    config = load_architecture(checkpoint)
    tokenizer, _ = load_tokenizer(checkpoint)
    stride = options.stride or max(1, config.block_size // 2)
    if stride > config.block_size:
        raise UserError(f'--stride={stride}: at most block_size={config.block_size} are scored.')
    if options.make_choices:
        make_choices(options.make_choices, checkpoint, tokenizer, options.num_items)
    texts = {path: read_tokens(path, tokenizer) for path in options.text}
    paths = [*([options.make_choices] if options.make_choices else []), *options.choices]
    items = {path: read_items(path, tokenizer, config.block_size) for path in paths}

    model = load_model(checkpoint, state, device).eval()
    scorer = Scorer(model, device, dtype, options.batch_size)
    text_results = [
        score_text(scorer, path, text, tokenizer, stride) for path, text in texts.items()
    ]
    choice_results = [score_items(scorer, path, questions) for path, questions in items.items()]
    results = {
        'architecture': config.name,
        'checkpoint': str(checkpoint.path),
        'iter': checkpoint.iter,
        'dtype': dtype,
        'block_size': config.block_size,
        'stride': stride,
        'text': [asdict(result) for result in text_results],
        'choices': [asdict(result) for result in choice_results],
    }
    try:  # the file first: what follows may fail with the terminal that it is shown on
        if options.json:
            write_json(options.json, results)
    finally:
        write_text(
            f'{config.name}, iteration {checkpoint.iter:,}, from {checkpoint.path}, in {dtype}'
        )
        tables = text_table(text_results), choice_table(choice_results)
        write_text('\n\n'.join(filter(None, tables)))
    return 0


def make_choices(path: Path, checkpoint: Checkpoint, tokenizer: Tokenizer, count: int) -> None:
    """Write items of the validation text that the run was judged by. Raises UserError."""
    trained = checkpoint.index['config']
    dataset = load_dataset(trained['dataset'], trained['block_size'])
    dataset.verify_checksums(('val',))
    write_output(path, generate_items(dataset, tokenizer, count), 'make_choices')


def read_tokens(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a text to score. Raises UserError."""
    text = read_text(path, f'--text={path}')
    try:
        tokens = tokenizer.encode_array(text)
    except UserError as error:
        raise UserError(*(f'--text={path}: {problem}' for problem in error.problems)) from error
    if len(tokens) < 2:
        raise UserError(f'--text={path} has {len(tokens)} token(s), and two are the least.')
    return tokens


def text_table(results: Sequence[TextResult]) -> str:
    if not results:
        return ''
    header = ('text', 'bits/byte', f'± {CONFIDENCE:.0%}', 'perplexity', 'tokens', 'bytes')
    rows = [
        (
            result.file,
            f'{result.bits_per_byte:.4f}',
            '-' if result.half_interval is None else f'{result.half_interval:.4f}',
            '-' if result.perplexity is None else f'{result.perplexity:,.2f}',
            f'{result.tokens:,}',
            f'{result.bytes:,}',
        )
        for result in results
    ]
    return table([header, *rows], '<>>>>>')


def choice_table(results: Sequence[ChoiceResult]) -> str:
    if not results:
        return ''
    measures = ('acc', 'acc_norm', 'acc_bytes')
    header = ['choices', *(text for key in measures for text in (key, '± error'))]
    rows = []
    for result in results:
        row = [result.file]
        for key in measures:
            error = getattr(result, f'{key}_stderr')
            row += [f'{getattr(result, key):.4f}', '-' if error is None else f'{error:.4f}']
        rows.append([*row, f'{result.chance:.4f}', f'{result.items:,}'])
    return table([[*header, 'chance', 'items'], *rows], '<>>>>>>>>')


def write_json(path: Path, results: dict) -> None:
    write_output(path, json.dumps(results, indent=2, ensure_ascii=False) + '\n', 'json')


def write_output(path: Path, text: str, option: str) -> None:
    """Write JSON, where a name that is not UTF-8 has escapes. Raises UserError."""
    try:
        replace_file(path, text.encode('utf-8', 'backslashreplace'))
    except OSError as error:
        raise UserError(f'--{option}={path} cannot be written: {error.strerror}.') from error


if __name__ == '__main__':
    run_script(main, sys.argv[1:])
