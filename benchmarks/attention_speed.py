"""Speed of causal attention on a CPU: torch's kernel against blocked matrix products.

    python benchmarks/attention_speed.py [--turns=7] [--dtype=bfloat16]

The forward pass, and forward with backward, on slices of a fused QKV projection. Both take turns in
one process. Times are medians; the ratio is the median over turns, with minimum and maximum.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from common import hardware  # noqa: E402
from common.errors import ArgumentParser, run_script  # noqa: E402
from components.cpu_attention import blocked_attention  # noqa: E402

# Sequences, heads, tokens, head dimension: the shapes of training_speed.py, and the longest of
# scaling.py.
SHAPES = [(4, 12, 1024, 64), (64, 6, 256, 64), (1, 12, 4096, 64), (1, 12, 8192, 64)]


def torch_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_blocks(q, k, v):
    return blocked_attention(q, k, v, q.size(-1) ** -0.5)


def seconds(attention, tensors: list[torch.Tensor], upstream: torch.Tensor) -> tuple[float, float]:
    """Seconds of a forward pass, and of forward and backward together."""
    began = time.perf_counter()
    output = attention(*tensors)
    forward = time.perf_counter() - began
    output.backward(upstream)
    return forward, time.perf_counter() - began


def measure(shape: tuple[int, ...], dtype: torch.dtype, turns: int) -> None:
    batch, heads, length, width = shape
    fused = torch.randn(batch, length, 3, heads, width, dtype=dtype)
    tensors = [x.detach().requires_grad_() for x in fused.permute(2, 0, 3, 1, 4)]
    upstream = torch.randn(batch, length, heads, width, dtype=dtype).transpose(1, 2)
    ways = {'torch': torch_attention, 'blocks': by_blocks}
    for way in ways.values():
        seconds(way, tensors, upstream)
    times_by_way = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            times_by_way[name].append(seconds(way, tensors, upstream))
    for number, what in enumerate(('forward', 'forward and backward')):
        times = {name: [both[number] for both in times_by_way[name]] for name in ways}
        ratios = [a / b for a, b in zip(times['torch'], times['blocks'])]
        medians = [f'{name} {statistics.median(t) * 1e3:6.1f} ms' for name, t in times.items()]
        print(
            f'{batch} x {heads} x {length} x {width}  {what:20}  {"  ".join(medians)}  '
            f'{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] times as fast'
        )


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--turns', type=int, default=7)
    parser.add_argument('--dtype', choices=hardware.DTYPES, default='bfloat16')
    options = parser.parse_args(argv)
    hardware.tune(torch.device('cpu'), deterministic=False)
    print(f'{hardware.device_name(torch.device("cpu"))}, torch {torch.__version__}')
    for shape in SHAPES:
        measure(shape, getattr(torch, options.dtype), options.turns)
    return 0


if __name__ == '__main__':
    run_script(main)
