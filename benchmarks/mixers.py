"""Training speed and memory of each mixer beside attention, by sequence length.

    python benchmarks/mixers.py [--mixers gated_deltanet mamba2] [--lengths 512 2048 8192]

A contestant is one layer of width 256 without a feed-forward network, from hidden states to hidden
states, with the mixer's default options. Every pass, forward and backward, has the tokens of one
longest sequence, in as many sequences as fit. All contestants are in one process; each makes a
pass per round, in random order, until the time is over.

`× attention` is the time of attention (RoPE, the backend of this machine) in the same round
divided by the mixer's: above 1, the mixer is faster. The median over rounds, with quartiles.
`memory` is the peak of what a pass allocates. `params` and `flops` are those of the layer,
relative to attention; FLOPs are of the forward pass as it runs.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from common import hardware  # noqa: E402
from common.errors import UserError  # noqa: E402
from components.base import module_flops  # noqa: E402
from model_builder import Transformer, build_model  # noqa: E402
from model_config import MIXER_REGISTRY, ModelArchitectureConfig  # noqa: E402
from parallel.strategies import prepare_blocks  # noqa: E402

LAYER = {'arch_preset': 'llama', 'n_layer': 1, 'ffn_type': 'none', 'vocab_size': 64}
WIDTH, HEADS = 256, 4
ROUNDS = 5  # minimum


class Contestant:
    """A layer at one sequence length, on hidden states that are the same for all."""

    def __init__(self, mixer: str, length: int, tokens: int, options: argparse.Namespace):
        config = ModelArchitectureConfig(
            **LAYER, mixer=mixer, n_embd=options.width, n_head=options.heads, block_size=length
        )
        self.device = torch.device(options.device)
        self.mixer, self.length, self.tokens = mixer, length, tokens
        self.model = build_model(config, options.device, 1).train()
        prepare_blocks(self.model, [], options.compile)
        batch = max(1, tokens // length)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn((batch, length, options.width), generator=generator)
        self.x = self.x.to(self.device).requires_grad_()
        self.dtype = options.dtype

    def run(self) -> float:
        """Seconds of a forward and backward pass."""
        hardware.synchronize(self.device)
        began = time.perf_counter()
        with hardware.autocast(self.device, self.dtype):
            positions = torch.arange(self.length, device=self.device)
            inputs = self.model.attention_inputs(positions)
            y, _ = self.model.blocks[0](self.x, inputs[0])
        y.float().square().mean().backward()
        hardware.synchronize(self.device)
        seconds = time.perf_counter() - began
        self.model.zero_grad()
        self.x.grad = None
        return seconds

    def peak_bytes(self) -> int:
        """The largest number of bytes allocated at once by a pass."""
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(profile_memory=True) as profile:
            self.run()
        events = profile.profiler.kineto_results.events()
        now = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == '[memory]':
                now += event.nbytes()
                peak = max(peak, now)
        return peak


def layer_params(model: Transformer) -> int:
    return sum(parameter.numel() for parameter in model.blocks.parameters())


def layer_flops(contestant: Contestant) -> float:
    flops = module_flops(contestant.model.blocks, contestant.length, False, 'other')
    return sum(flops.values())


def measure(contestants: list[Contestant], seconds: float) -> dict[str, list[float]]:
    """Seconds of each pass by mixer, round by round."""
    for contestant in contestants:
        contestant.run()  # warm-up
    times: dict[str, list[float]] = {each.mixer: [] for each in contestants}
    shuffle, began = random.Random(0).shuffle, time.monotonic()
    while len(times['attention']) < ROUNDS or time.monotonic() - began < seconds:
        turn = list(contestants)
        shuffle(turn)
        for contestant in turn:
            times[contestant.mixer].append(contestant.run())
    return times


def report(contestants: list[Contestant], times: dict[str, list[float]]) -> None:
    """Print one line per mixer at one length."""
    first = contestants[0]
    memory = {each.mixer: each.peak_bytes() for each in contestants}
    params = {each.mixer: layer_params(each.model) for each in contestants}
    flops = {each.mixer: layer_flops(each) for each in contestants}
    print(f'\n{first.length:,} tokens, {len(first.x)} sequences, {len(times["attention"])} rounds')
    print(
        f'{"mixer":<18} {"tokens/s":>10} {"× attention":>22} {"memory MB":>10} {"ratio":>6} '
        f'{"params":>7} {"flops":>6}'
    )
    for each in contestants:
        mine, name = times[each.mixer], each.mixer
        ratios = [other / one for one, other in zip(mine, times['attention'], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method='inclusive')
        print(
            f'{name:<18} {each.x[..., 0].numel() / statistics.median(mine):10,.0f} '
            f'{middle:7.2f} [{low:.2f}, {high:.2f}] {memory[name] / 1e6:12,.0f} '
            f'{memory[name] / memory["attention"]:6.2f} '
            f'{params[name] / params["attention"]:7.2f} {flops[name] / flops["attention"]:6.2f}',
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--mixers', nargs='+', help='Mixers beside attention (default: all)')
    parser.add_argument('--lengths', nargs='+', type=int, default=[512, 2048, 8192])
    parser.add_argument('--tokens', type=int, help='Tokens of a pass (default: longest length)')
    parser.add_argument('--width', type=int, default=WIDTH, help=f'n_embd (default {WIDTH})')
    parser.add_argument('--heads', type=int, default=HEADS, help=f'n_head (default {HEADS})')
    parser.add_argument('--seconds', type=float, default=60.0, help='Time per length (default 60)')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32', help='Dtype of matrix multiplications')
    parser.add_argument('--compile', action='store_true', help='Compile the layer')
    options = parser.parse_args()
    listed = [name for name in MIXER_REGISTRY if name not in ('attention', 'none')]
    mixers = ['attention', *(options.mixers or listed)]
    tokens = options.tokens or max(options.lengths)
    print(
        f'torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, '
        f'{options.dtype}, width {options.width}, compiled: {options.compile}'
    )
    for length in options.lengths:
        try:
            contestants = [Contestant(mixer, length, tokens, options) for mixer in mixers]
        except UserError as error:
            parser.error(str(error))
        report(contestants, measure(contestants, options.seconds))


if __name__ == '__main__':
    main()
