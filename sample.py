"""Write text from a checkpoint.

    python sample.py --out_dir=out-llama
    python sample.py --out_dir=out-llama --start='ROMEO:' --num_samples=3 --temperature=0.8

The newest run in --out_dir is used, or the run or the checkpoint that --run names. A model with
components from a config file needs that file again:

    python sample.py config/mine.py --out_dir=out-mine
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import hardware
import resumption
from configurator import read_config_file
from errors import ArgumentParser, UserError, run_script
from model_builder import generate
from sampling import Sampler
from text_codec import GPT2_END_OF_TEXT, Codec
from token_data import load_dataset

SEPARATOR = '-' * 80


def parse(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog='sample.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('config', nargs='*', help='config files, for the components that they register')
    add('--out_dir', default='out', help='the folder of runs (default out)')
    add('--run', help=resumption.RUN_HELP)
    add('--start', default='\n', help="the prompt, or FILE:prompt.txt (default '\\n')")
    add('--num_samples', type=int, default=3, help='texts to write (default 3)')
    add('--max_new_tokens', type=int, default=300, help='tokens in each (default 300)')
    add('--temperature', type=float, default=0.8, help='0: always the likeliest (default 0.8)')
    add('--top_k', type=int, default=200, help='draw from the likeliest k; 0: all (default 200)')
    add('--seed', type=int, default=1337, help='of the draws (default 1337)')
    add('--device', default='auto', help='auto, cpu, cuda, cuda:N or mps (default auto)')
    add('--dtype', default='auto', help='auto, float32, bfloat16 or float16 (default auto)')
    options = parser.parse(argv)
    least = {'num_samples': 1, 'max_new_tokens': 1, 'temperature': 0, 'top_k': 0, 'seed': 0}
    problems = [
        f'--{key}={getattr(options, key)}: takes a number of at least {low}.'
        for key, low in least.items()
        if not getattr(options, key) >= low
    ]
    for path in options.config:
        read_config_file(path, problems)
    if problems:
        raise UserError(*problems)
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    device = hardware.select_device(options.device)
    dtype = hardware.resolve_dtype(options.dtype, device)
    prompt = read_prompt(options.start)
    checkpoint, state = resumption.find_checkpoint(options.out_dir, options.run)
    config = resumption.architecture_of(checkpoint)
    dataset = load_dataset(checkpoint.index['config']['dataset'], config.block_size)
    codec = Codec(dataset.tokenizer)
    start = codec.encode(prompt) or [GPT2_END_OF_TEXT]
    model = resumption.load_model(checkpoint, state, device).eval()
    print(f'{config.name}, {checkpoint.iter:,} updates, from {checkpoint.path}')

    generator = torch.Generator().manual_seed(options.seed % 2**63)
    choose = Sampler(dataset.vocab_size, options.temperature, options.top_k, generator=generator)
    began = time.perf_counter()
    for _ in range(options.num_samples):
        print(SEPARATOR)
        with hardware.autocast(device, dtype):
            drawn = generate(
                model,
                torch.tensor([start], device=device),
                options.max_new_tokens,
                choose=choose,
            )
            tokens = start + [token.item() for token in drawn]
        text = codec.decode(tokens)
        encoding = sys.stdout.encoding or 'utf-8'
        print(text.encode(encoding, 'replace').decode(encoding), flush=True)
    print(SEPARATOR)
    total = options.num_samples * options.max_new_tokens
    print(f'{total:,} tokens, {total / (time.perf_counter() - began):,.1f} tokens/s')
    return 0


def read_prompt(start: str) -> str:
    """The prompt itself, or the text of the file that `FILE:path` names."""
    if not start.startswith('FILE:'):
        return start
    try:
        return Path(start[5:]).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'--start={start}: the file cannot be read: {error}.') from error


if __name__ == '__main__':
    run_script(main, sys.argv[1:])
