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
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import common.first_import  # noqa: F401

import torch

from common import hardware
from common.console_output import is_terminal, write_error, write_text
from common.errors import UserError, run_script
from common.paths import expanded_path
from common.text_files import decode
from inference.generate import generate
from inference.sampling import TEMPERATURE, TOP_K, Sampler, TextStream, prompt_tokens, stream
from training.load import (
    checkpoint_parser,
    find_checkpoint,
    load_architecture,
    load_model,
    load_tokenizer,
    register_components,
)

SEPARATOR = '-' * 80
LIMITS = {
    **dict.fromkeys(('num_samples', 'batch_size'), (1, 1_000_000)),
    'max_new_tokens': (1, math.inf),
    **dict.fromkeys(('temperature', 'top_k', 'seed'), (0, math.inf)),
    **dict.fromkeys(('top_p', 'min_p'), (0, 1)),
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = checkpoint_parser('sample.py', __doc__)
    add = parser.add_argument
    add(
        '--start',
        default='\n',
        help="the prompt; FILE:prompt.txt reads it from a file, '-' from standard input "
        "(default '\\n'; empty: an end-of-text token, where the vocabulary has one)",
    )
    add('--num_samples', type=int, default=3, help='texts to write (default 3)')
    add('--batch_size', type=int, help='of them at a time (default: all)')
    add('--max_new_tokens', type=int, default=300, help='tokens in each, at most (default 300)')
    add(
        '--temperature',
        type=float,
        default=TEMPERATURE,
        help=f'0: always the likeliest (default {TEMPERATURE})',
    )
    add(
        '--top_k',
        type=int,
        default=TOP_K,
        help=f'draw from the likeliest k; 0: all (default {TOP_K})',
    )
    add(
        '--top_p',
        type=float,
        default=1.0,
        help='of these from the likeliest that have this probability together (default 1: all)',
    )
    add(
        '--min_p',
        type=float,
        default=0.0,
        help='of these from those at least this part as likely as the likeliest (default 0: all)',
    )
    add(
        '--stop',
        action='append',
        default=[],
        metavar='TEXT',
        help='end a text before this; may be given several times',
    )
    add(
        '--ignore_end_of_text',
        action='store_true',
        help='go on after the token that ends a document',
    )
    add(
        '--seed',
        type=int,
        default=1337,
        help='of the draws: each text has a stream of its own, whatever the batch (default 1337)',
    )
    add('--device', default='auto', help='auto, cpu, cuda, cuda:N or mps (default auto)')
    add('--dtype', default='auto', help='auto, float32, bfloat16 or float16 (default auto)')
    options = parser.parse(argv)
    given = vars(options)
    problems = [
        f'--{key}={given[key]}: takes a number of at least {low}'
        + (f' and at most {high}.' if high < math.inf else '.')
        for key, (low, high) in LIMITS.items()
        if given[key] is not None and not low <= given[key] <= high
    ]
    if '' in options.stop:
        problems.append('--stop is empty: give the text before which to end.')
    register_components(options.config, problems)
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
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

    speed, size = Speed(), options.batch_size or options.num_samples
    filters = options.temperature, options.top_k, options.top_p, options.min_p
    end_of_text = None if options.ignore_end_of_text else tokenizer.end_of_text
    try:
        for first in range(0, options.num_samples, size):
            numbers = range(first, min(first + size, options.num_samples))
            streams = [stream(options.seed, number) for number in numbers]
            choose = Sampler(vocab_size, *filters, streams)
            texts = [TextStream(tokenizer.decode, options.stop, end_of_text) for _ in numbers]
            with hardware.autocast(device, dtype):
                drawn = generate(
                    model, start.expand(len(texts), -1), options.max_new_tokens, choose=choose
                )
                speed.begin(len(texts) * len(start))
                write(drawn, texts, prompt, speed)
    finally:
        write_text(f'{SEPARATOR}\n{speed}')
    return 0


def write(
    drawn: Iterator[torch.Tensor], texts: Sequence[TextStream], prompt: str, speed: 'Speed'
) -> None:
    """Show a batch of texts, one as its tokens are drawn, several when all are done.

    An interruption leaves what was drawn until then.
    """
    alone = len(texts) == 1
    if alone:
        write_text(f'{SEPARATOR}\n{prompt}', end='')
    try:
        for step in drawn:
            tokens = step.tolist()
            speed.step(sum(not text.ended for text in texts))
            for text, token in zip(texts, tokens):
                fresh = text.add(token)
                if alone:
                    write_text(fresh, end='')
            if all(text.ended for text in texts):
                break
    finally:
        for text in texts:
            rest = text.finish()
            write_text(rest if alone else f'{SEPARATOR}\n{prompt}{text.text}')


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


@dataclass
class Speed:
    """Tokens and seconds of the prompts, and of what came after the first new token of each."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0  # of texts that had not ended
    later_tokens: int = 0  # of these, those after the first of each
    later_seconds: float = 0.0
    since: float = 0.0
    at_prompt: bool = False

    def begin(self, tokens: int) -> None:
        """A batch of prompts of so many tokens begins."""
        self.prompt_tokens += tokens
        self.since, self.at_prompt = time.perf_counter(), True

    def step(self, tokens: int) -> None:
        """So many texts have got a token."""
        now = time.perf_counter()
        if self.at_prompt:
            self.prompt_seconds += now - self.since
        else:
            self.later_tokens += tokens
            self.later_seconds += now - self.since
        self.new_tokens += tokens
        self.since, self.at_prompt = now, False

    def __str__(self) -> str:
        def rate(tokens: int, seconds: float) -> str:
            return f', {tokens / seconds:,.1f} tokens/s' if tokens and seconds else ''

        return (
            f'prompt: {self.prompt_tokens:,} tokens{rate(self.prompt_tokens, self.prompt_seconds)}'
            f'; new: {self.new_tokens:,} tokens{rate(self.later_tokens, self.later_seconds)}'
        )


if __name__ == '__main__':
    run_script(main, sys.argv[1:])
