"""Tokens per second of generation: with KV cache, without, and with `generate` of transformers.

    python benchmarks/generation.py [preset …] [--n_layer=12 --n_embd=768 …] [--rounds=5]

Each preset has random weights. They are exported and loaded by AutoModelForCausalLM with its
default attention. All three continue the same random prompts greedily, in turns, in fp32, in one
process. A first round warms up and checks that the texts are equal. Rates count all sequences of
the batch: medians over rounds, with quartiles, and the median of the ratios in the same round.

Needs transformers and safetensors: pip install transformers safetensors
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import interop
from common import hardware
from inference.generate import generate
from model_builder import Transformer, build_model
from model_config import ModelArchitectureConfig

PRESETS = ('legacy', 'llama')
SIZES = {'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'block_size': 256, 'vocab_size': 50304}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('presets', nargs='*', help='Presets (default: legacy and llama)')
    for key, size in SIZES.items():
        add(f'--{key}', type=int, default=size, help=f'default {size}')
    add(
        '--batch_size',
        type=int,
        nargs='+',
        default=[1, 8],
        help='Sequences per batch (default: 1 and 8)',
    )
    add('--prompt', type=int, default=64, help='Tokens per prompt (default 64)')
    add('--new_tokens', type=int, default=128, help='Tokens to generate (default 128)')
    add('--rounds', type=int, default=5, help='Number of rounds (default 5)')
    add('--device', default='auto')
    options = parser.parse_args(argv)
    if options.prompt + options.new_tokens > options.block_size:
        parser.error(
            'prompt + new_tokens must fit into block_size: transformers has no answer else'
        )
    return options


@torch.no_grad()
def steep(model: Transformer) -> Transformer:
    """Random weights with clearly separated logits, so that rounding never decides a token."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3.0)
    return model.eval()


def as_transformers_has_it(model: Transformer):
    """The same weights in the class of transformers, without an end-of-text token."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / 'model'
        interop.export(model.config, dict(model.named_parameters()), folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return theirs


def writers(
    model: Transformer, theirs, prompts: torch.Tensor, count: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """The function of each that continues prompts (B, T) by `count` tokens: (B, count)."""

    def ours(cache: bool) -> torch.Tensor:
        def likeliest(logits: torch.Tensor) -> torch.Tensor:
            return logits.argmax(dim=-1)

        return torch.stack(list(generate(model, prompts, count, choose=likeliest, cache=cache)), 1)

    def by_transformers() -> torch.Tensor:
        mask = torch.ones_like(prompts)
        text = theirs.generate(
            prompts, attention_mask=mask, max_new_tokens=count, do_sample=False, use_cache=True
        )
        return text[:, prompts.size(1) :]

    return {
        'cached': lambda: ours(True),
        'uncached': lambda: ours(False),
        'transformers': by_transformers,
    }


def rates(write: dict, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each, by round. Raises AssertionError if the texts differ."""
    texts = {name: call() for name, call in write.items()}
    for name, text in texts.items():
        same = (text == texts['cached']).float().mean().item()
        assert same == 1, f'{name} generates other text: {100 * same:.1f} % of the tokens are equal'
    measured: dict[str, list[float]] = {name: [] for name in write}
    for _ in range(rounds):
        for name, call in write.items():
            hardware.synchronize(device)
            began = time.perf_counter()
            text = call()
            hardware.synchronize(device)
            measured[name].append(text.numel() / (time.perf_counter() - began))
    return measured


def main(argv: list[str]) -> int:
    options = parse(argv)
    device = hardware.select_device(options.device)
    sizes = {key: getattr(options, key) for key in SIZES}
    print(f'{hardware.device_name(device)}, {torch.get_num_threads()} threads; {sizes}')
    for preset in options.presets or PRESETS:
        config = ModelArchitectureConfig(arch_preset=preset, **sizes)
        model = steep(build_model(config, device, seed=1))
        theirs = as_transformers_has_it(model).to(device)
        for batch_size in options.batch_size:
            shape = batch_size, options.prompt
            generator = torch.Generator().manual_seed(0)
            prompts = torch.randint(config.vocab_size, shape, generator=generator).to(device)
            write = writers(model, theirs, prompts, options.new_tokens)
            measured = rates(write, device, options.rounds)
            print(f'\n{config.name}, batch {batch_size}: {options.prompt} + {options.new_tokens}')
            for name, speeds in measured.items():
                low, middle, high = statistics.quantiles(speeds, n=4)
                ratios = [ours / one for ours, one in zip(measured['cached'], speeds)]
                against = (
                    '' if name == 'cached' else f'  cached is {statistics.median(ratios):.2f} ×'
                )
                print(f'  {name:<13}{middle:>10,.1f} tokens/s  ({low:,.1f} … {high:,.1f}){against}')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
