"""Training speed of models whose layers differ, relative to one of alike layers.

    python benchmarks/mixed_layers.py [--seconds=60] [--compile]

Every model has the same FLOPs per token, with attention over the full square. Each line adds one
difference to the model of the line above. All are in one process; each makes a forward and backward
pass per round, in random order, until the time is over.

`× uniform` is the processor time divided by that of the uniform model in the same round: the median
over rounds, with quartiles. `first` is the first pass, relative to an ordinary one of the uniform
model: with --compile, mostly compilation.
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

from model_builder import Transformer, build_model, training_flops  # noqa: E402
from model_config import ModelArchitectureConfig  # noqa: E402
from parallel.strategies import prepare_blocks  # noqa: E402

MODEL = {
    'arch_preset': 'llama',
    'n_layer': 4,
    'n_head': 4,
    'n_embd': 256,
    'd_ff': 768,
    'block_size': 128,
    'vocab_size': 1024,
}
BATCH_SIZE = 2
LOCAL = {'sliding_window': 64}
NO_POSITIONS, HEADS = {'position_encoding': 'none'}, {'n_head': 8}
KINDS: dict[str, dict[str, dict]] = {  # of the layers of 'LLLG'
    'two kinds of layers': {'G': {'rope_theta': 50000.0}},
    'windows': {'L': LOCAL},
    '+ no position encoding': {'L': LOCAL, 'G': NO_POSITIONS},
    '+ heads': {'L': LOCAL, 'G': NO_POSITIONS | HEADS},
    '+ widths': {'L': LOCAL | {'d_ff': 640}, 'G': NO_POSITIONS | HEADS | {'d_ff': 1152}},
}
ROUNDS = 5  # minimum


def models() -> dict[str, ModelArchitectureConfig]:
    """The architectures by name; '' is the uniform one."""
    uniform = ModelArchitectureConfig(**MODEL)
    mixed = {
        name: uniform.replace(layer_pattern='LLLG', layer_kinds=kinds)
        for name, kinds in KINDS.items()
    }
    return {'': uniform, 'uniform, windows': uniform.replace(**LOCAL), **mixed}


def seconds_of_pass(model: Transformer) -> float:
    """Processor time of a forward and backward pass."""
    tokens = torch.zeros((BATCH_SIZE, MODEL['block_size']), dtype=torch.long)
    began = time.process_time()
    loss, count, _ = model(tokens, tokens)
    (loss / count).backward()
    model.zero_grad()
    return time.process_time() - began


def measure(built: dict[str, Transformer], seconds: float) -> dict[str, list[float]]:
    """Seconds of a pass of each model, by round."""
    times: dict[str, list[float]] = {name: [] for name in built}
    shuffle, began = random.Random(0).shuffle, time.monotonic()
    while len(times['']) < ROUNDS or time.monotonic() - began < seconds:
        turn = list(built)
        shuffle(turn)
        for name in turn:
            times[name].append(seconds_of_pass(built[name]))
    return times


def report(times: dict[str, list[float]], first: dict[str, float]) -> None:
    """Print one line per model."""
    print(f'{"model":<28} {"ms":>8} {"× uniform":>20} {"first":>8}')
    usual = statistics.median(times[''])
    for name, mine in times.items():
        ratios = [one / other for one, other in zip(mine, times[''], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method='inclusive')
        print(
            f'{name or "uniform":<28} {1e3 * statistics.median(mine):8.1f} '
            f'{middle:6.3f} [{low:.3f}, {high:.3f}] {first[name] / usual:7.1f}×'
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--seconds', type=float, default=60.0, help='Time to measure (default 60)')
    parser.add_argument('--compile', action='store_true', help='Compile the blocks')
    options = parser.parse_args()
    built = {name: build_model(config, 'cpu', 1).train() for name, config in models().items()}
    flops = {training_flops(model)['per_token'] for model in built.values()}
    assert len(flops) == 1, flops
    for model in built.values():
        prepare_blocks(model, [], options.compile)
    first = {name: seconds_of_pass(model) for name, model in built.items()}
    times = measure(built, options.seconds)
    print(
        f'torch {torch.__version__}, {torch.get_num_threads()} threads, {len(times[""])} rounds; '
        f'{built[""].config.name}, compiled: {options.compile}'
    )
    report(times, first)


if __name__ == '__main__':
    main()
