"""Evaluate a checkpoint on your own text: bits per byte, and multiple-choice accuracy.

    python evaluate.py --out_dir=out-llama --text=book.txt --text=code.py
    python evaluate.py --out_dir=out-llama --choices=items.jsonl --json=results.json
    python evaluate.py --out_dir=out-llama --make_choices=items.jsonl

--text: every token but the first is scored once, in overlapping windows of --context tokens, with
more than context - stride tokens before it where the text has them.

--choices: each line is an item, {"context": "The capital of France is", "choices": [" Paris",
" Rome"], "answer": 0}. A choice is appended to the context unchanged, so it includes its leading
space. The model's choice has the highest log-likelihood (acc), per character (acc_norm) or per
UTF-8 byte (acc_bytes); lm-evaluation-harness has the same metrics under these names.

--make_choices: writes items made from the validation text of the run's dataset (the correct
continuation against text from elsewhere), and scores them. Runs on the same dataset get the same
items.

The model is the newest run in --out_dir, or the run or checkpoint given by --run. A model with
components from a config file needs that file, as for sample.py.
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
        'Text file, scored in bits per byte; can be repeated', Path, [], settings=FILES
    ),
    'choices': Argument('File of multiple-choice items; can be repeated', Path, [], settings=FILES),
    'make_choices': Argument(
        'New file of items made from the validation text', Path, settings={'metavar': 'FILE'}
    ),
    'num_items': Argument('Number of items of --make_choices (default 200)', int, 200, low=1),
    'context': Argument(
        'Length of the windows of --text in tokens, also beyond block_size (default: block_size)',
        int,
        low=1,
    ),
    'stride': Argument('Tokens scored per window (default: half of the context)', int, low=1),
    'batch_size': Argument('Sequences per batch (default: depends on their length)', int, low=1),
    'json': Argument(
        'File for the results, including those of each item', Path, settings={'metavar': 'FILE'}
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
    """A sentence for each problem with the files to read and to write."""
    if not (options.text or options.choices or options.make_choices):
        yield (
            'nothing to evaluate: use --text=FILE, --choices=FILE.jsonl or '
            '--make_choices=FILE.jsonl.'
        )
    for key, path in (('make_choices', options.make_choices), ('json', options.json)):
        if path is not None and not path.parent.is_dir():
            yield f'--{key}={path}: the folder {path.parent} does not exist.'
    if options.json and options.json.is_dir():
        yield f'--json={options.json} is a folder: give a file name in it.'
    elif options.json and options.json in (*options.text, *options.choices, options.make_choices):
        yield f'--json={options.json} would overwrite a file to evaluate: give another name.'
    if options.make_choices and options.make_choices.exists():
        yield (
            f'--make_choices={options.make_choices} already exists: score it with --choices='
            f'{options.make_choices}.'
        )


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    device = hardware.select_device(options.device)
    dtype = hardware.resolve_dtype(options.dtype, device)
    checkpoint, state = find_checkpoint(options.out_dir, options.run)
    config = load_architecture(checkpoint)
    tokenizer, _ = load_tokenizer(checkpoint)
    context = options.context or config.block_size
    stride = options.stride or max(1, context // 2)
    if stride > context:
        limit = f'--context={context}' if options.context else f'block_size={context}'
        raise UserError(f'--stride={stride}: must be at most {limit}.')
    if options.make_choices:
        make_choices(options.make_choices, checkpoint, tokenizer, options.num_items)
    texts = {path: read_tokens(path, tokenizer) for path in options.text}
    paths = [*([options.make_choices] if options.make_choices else []), *options.choices]
    items = {path: read_items(path, tokenizer, config.block_size) for path in paths}

    model = load_model(checkpoint, state, device).eval()
    if model.max_length is not None and context > model.max_length:
        raise UserError(
            f'--context={context}: the model has positions for {model.max_length} tokens only. Set '
            f'at most --context={model.max_length}.'
        )
    scorer = Scorer(model, device, dtype, options.batch_size)
    text_results = [
        score_text(scorer, path, text, tokenizer, context, stride) for path, text in texts.items()
    ]
    choice_results = [score_items(scorer, path, questions) for path, questions in items.items()]
    results = {
        'architecture': config.name,
        'checkpoint': str(checkpoint.path),
        'iter': checkpoint.iter,
        'dtype': dtype,
        'block_size': config.block_size,
        'context': context,
        'stride': stride,
        'text': [asdict(result) for result in text_results],
        'choices': [asdict(result) for result in choice_results],
    }
    try:  # the file first, since standard output may be closed
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
    """Write items made from the validation text of the run's dataset. Raises UserError."""
    trained = checkpoint.index['config']
    dataset = load_dataset(trained['dataset'], trained['block_size'])
    dataset.verify_checksums(('val',))
    write_output(path, generate_items(dataset, tokenizer, count), 'make_choices')


def read_tokens(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a text file to score. Raises UserError."""
    text = read_text(path, f'--text={path}')
    try:
        tokens = tokenizer.encode_array(text)
    except UserError as error:
        raise UserError(*(f'--text={path}: {problem}' for problem in error.problems)) from error
    if len(tokens) < 2:
        raise UserError(f'--text={path} has {len(tokens)} token(s); at least 2 are needed.')
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
    """Write JSON, with escapes for file names that are not UTF-8. Raises UserError."""
    try:
        replace_file(path, text.encode('utf-8', 'backslashreplace'))
    except OSError as error:
        raise UserError(f'--{option}={path} cannot be written: {error.strerror}.') from error


if __name__ == '__main__':
    run_script(main, sys.argv[1:])
