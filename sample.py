"""Write text from a checkpoint.

    python sample.py --out_dir=out-llama
    python sample.py --out_dir=out-llama --start='ROMEO:' --num_samples=3 --temperature=0.8
    python sample.py --out_dir=out-llama --start=FILE:prompt.txt --num_samples=1 --stop='JULIET:'

The newest run in --out_dir is used, or the run or the checkpoint that --run names. A single sample
appears as it is written, several when all are done. A model with components from a config file
needs that file again:

    python sample.py config/mine.py --out_dir=out-mine
"""

import argparse
import sys

import common.first_import  # noqa: F401

import torch

from common import hardware
from common.arguments import DEVICE_ARGUMENTS, Argument, add_arguments, range_problems
from common.console_output import is_terminal, write_error, write_text
from common.errors import UserError, run_script
from common.paths import expanded_path
from common.text_files import decode
from inference.generate import generate
from inference.sampling import (
    TEMPERATURE,
    TOP_K,
    Sampler,
    TextStream,
    prompt_tokens,
    sample_generator,
)
from inference.text_output import SEPARATOR, GenerationSpeed, write_texts
from training.load import (
    checkpoint_parser,
    find_checkpoint,
    load_architecture,
    load_model,
    load_tokenizer,
    register_components,
)

ARGUMENTS = {
    'start': Argument(
        "the prompt; FILE:prompt.txt reads it from a file, '-' from standard input "
        "(default '\\n'; empty: an end-of-text token, where the vocabulary has one)",
        default='\n',
    ),
    'num_samples': Argument('texts to write (default 3)', int, 3, low=1, high=1_000_000),
    'batch_size': Argument('of them at a time (default: all)', int, low=1, high=1_000_000),
    'max_new_tokens': Argument('tokens in each, at most (default 300)', int, 300, low=1),
    'temperature': Argument(
        f'0: always the likeliest (default {TEMPERATURE})', float, TEMPERATURE, low=0
    ),
    'top_k': Argument(f'draw from the likeliest k; 0: all (default {TOP_K})', int, TOP_K, low=0),
    'top_p': Argument(
        'of these from the likeliest that have this probability together (default 1: all)',
        float,
        1.0,
        low=0,
        high=1,
    ),
    'min_p': Argument(
        'of these from those at least this part as likely as the likeliest (default 0: all)',
        float,
        0.0,
        low=0,
        high=1,
    ),
    'stop': Argument(
        'end a text before this; may be given several times',
        default=[],
        settings={'action': 'append', 'metavar': 'TEXT'},
    ),
    'ignore_end_of_text': Argument(
        'go on after the token that ends a document',
        default=False,
        settings={'action': 'store_true'},
    ),
    'seed': Argument(
        'of the draws: each text has a stream of its own, whatever the batch (default 1337)',
        int,
        1337,
        low=0,
    ),
    **DEVICE_ARGUMENTS,
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options, checked. Raises UserError."""
    parser = checkpoint_parser('sample.py', __doc__)
    add_arguments(parser, ARGUMENTS)
    options = parser.parse(argv)
    problems = range_problems(options, ARGUMENTS)
    if '' in options.stop:
        problems.append('--stop is empty: give the text before which to end.')
    register_components(options.config, problems)
    return options


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    device = hardware.select_device(options.device)
    dtype = hardware.resolve_dtype(options.dtype, device)
    prompt = read_prompt(options.start)
    checkpoint, state = find_checkpoint(options.out_dir, options.run)
    name = load_architecture(checkpoint).name
    tokenizer, vocab_size = load_tokenizer(checkpoint)
    tokens = prompt_tokens(tokenizer, prompt, 'start')
    model = load_model(checkpoint, state, device).eval()
    start = torch.tensor(tokens[-model.config.block_size :], device=device)
    write_text(f'{name}, {checkpoint.iter:,} updates, from {checkpoint.path}')
    if slow := ', '.join(model.uncacheable):
        write_text(f'Without a cache, every token anew: {slow} does not say `cacheable = True`.')

    filters = options.temperature, options.top_k, options.top_p, options.min_p
    end_of_text = None if options.ignore_end_of_text else tokenizer.end_of_text
    speed, size = GenerationSpeed(), options.batch_size or options.num_samples
    try:
        for first in range(0, options.num_samples, size):
            numbers = range(first, min(first + size, options.num_samples))
            generators = [sample_generator(options.seed, number) for number in numbers]
            choose = Sampler(vocab_size, *filters, generators)
            texts = [TextStream(tokenizer.decode, options.stop, end_of_text) for _ in numbers]
            with hardware.autocast(device, dtype):
                prompts = start.expand(len(texts), -1)
                drawn = generate(model, prompts, options.max_new_tokens, choose=choose)
                speed.begin(prompts.numel())
                write_texts(drawn, texts, prompt, speed)
    finally:
        write_text(f'{SEPARATOR}\n{speed}')
    return 0


def read_prompt(start: str) -> str:
    """The prompt itself, or the text of the file that `FILE:path` names; `-` is standard input."""
    if start != '-' and not start.startswith('FILE:'):
        return start
    path = start.removeprefix('FILE:')
    if path == '-' and is_terminal(sys.stdin):
        write_error('The prompt, ended by Ctrl-D at the beginning of a line:')
    try:
        return decode(sys.stdin.buffer.read() if path == '-' else expanded_path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f'--start={start}: the text cannot be read: {error}.') from error


if __name__ == '__main__':
    run_script(main, sys.argv[1:])
