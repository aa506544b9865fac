"""Generate text with the model of a checkpoint.

    python sample.py --out_dir=out-llama
    python sample.py --out_dir=out-llama --start='ROMEO:' --num_samples=3 --temperature=0.8
    python sample.py --out_dir=out-llama --start=FILE:prompt.txt --num_samples=1 --stop='JULIET:'

The model is the newest run in --out_dir, or the run or checkpoint given by --run. A single sample
is shown token by token, several when all are done. A model with components from a config file
needs that file:

    python sample.py config/mine.py --out_dir=out-mine
"""

import argparse
import sys

import common.first_import  # noqa: F401

from common import hardware
from common.arguments import DEVICE_ARGUMENTS, Argument, add_arguments, range_problems
from common.console_output import is_terminal, write_error, write_text
from common.errors import UserError, run_script
from common.paths import expanded_path
from common.progress_bar import ProgressBar
from common.text_files import decode
from inference.sampling import prompt_tokens
from inference.text_generator import GENERATION_ARGUMENTS, GenerationOptions, TextGenerator
from inference.text_output import SEPARATOR, GenerationSpeed, write_texts
from training.load import (
    checkpoint_parser,
    find_checkpoint,
    load_architecture,
    load_model,
    load_tokenizer,
    register_components,
)

SAMPLE_ARGUMENTS = {
    'start': Argument(
        "Prompt; FILE:prompt.txt reads it from a file, '-' from standard input "
        "(default '\\n'; empty: the end-of-text token, if the vocabulary has one)",
        default='\n',
    ),
    'num_samples': Argument('Number of samples (default 3)', int, 3, low=1, high=1_000_000),
    'batch_size': Argument('Samples per batch (default: all)', int, low=1, high=1_000_000),
}
ARGUMENTS = {**SAMPLE_ARGUMENTS, **GENERATION_ARGUMENTS, **DEVICE_ARGUMENTS}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options, checked. Raises UserError."""
    parser = checkpoint_parser('sample.py', __doc__)
    add_arguments(parser, ARGUMENTS)
    options = parser.parse(argv)
    problems = range_problems(options, SAMPLE_ARGUMENTS)
    problems += GenerationOptions.of(options).problems()
    register_components(options.config, problems)
    return options


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    # The checkpoint, and the prompt in its vocabulary.
    device = hardware.select_device(options.device)
    dtype = hardware.resolve_dtype(options.dtype, device)
    prompt = read_prompt(options.start)
    checkpoint, state = find_checkpoint(options.out_dir, options.run)
    name = load_architecture(checkpoint).name
    tokenizer, vocab_size = load_tokenizer(checkpoint)
    tokens = prompt_tokens(tokenizer, prompt, '--start')

    # The model.
    model = load_model(checkpoint, state, device).eval()
    generator = TextGenerator(model, tokenizer, vocab_size, dtype, GenerationOptions.of(options))
    write_text(f'{name}, iteration {checkpoint.iter:,}, from {checkpoint.path}')
    if uncacheable := ', '.join(model.uncacheable):
        write_text(
            f'No KV cache: {uncacheable} does not set `cacheable = True`, so every new token '
            f'recomputes the whole context.'
        )

    # The samples, batch by batch.
    context_length = min(len(tokens), model.config.block_size)
    speed, size = GenerationSpeed(), options.batch_size or options.num_samples
    total = options.num_samples * options.max_new_tokens
    bar = ProgressBar('Sampling', total, unit='tokens', stream=sys.stderr)
    try:
        for first in range(0, options.num_samples, size):
            numbers = range(first, min(first + size, options.num_samples))
            drawn, texts = generator.start(tokens, numbers)
            speed.begin(len(texts) * context_length)
            with generator.autocast():
                write_texts(drawn, texts, prompt, speed, bar)
            bar.done = numbers.stop * options.max_new_tokens  # texts may have ended early
    finally:
        bar.close()
        write_text(f'{SEPARATOR}\n{speed}')
    return 0


def read_prompt(start: str) -> str:
    """The prompt: `start` itself, the text of `FILE:path`, or standard input for `-`."""
    if start != '-' and not start.startswith('FILE:'):
        return start
    path = start.removeprefix('FILE:')
    if path == '-' and is_terminal(sys.stdin):
        write_error('Enter the prompt, then press Ctrl-D at the beginning of a line:')
    try:
        return decode(sys.stdin.buffer.read() if path == '-' else expanded_path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f'--start={start}: cannot be read: {error}.') from error


if __name__ == '__main__':
    run_script(main, sys.argv[1:])
