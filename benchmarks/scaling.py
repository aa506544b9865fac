"""Cost against scale: tokens/s, MFU and memory by width, block size and vocabulary.

    python benchmarks/scaling.py [--quick] [--csv=scaling.csv] [--plot=scaling.png]
    python benchmarks/scaling.py --sweeps=block_size --activation_checkpointing=full

One size at a time is varied around a model of 6 layers, width 768, context length 1024, vocabulary
50,304, with 4096 tokens per iteration (or one longer sequence). Each point is train.py in a process
of its own: one or two untimed iterations, then as many as take --seconds. Then the fastest matrix
product is measured, at the shapes of the point and at squares; it is the peak for the MFU.

`× arithmetic` is the time per FLOP divided by that of the best point of the sweep: where it grows,
something grows faster than the FLOPs. Both count attention over the full square; `causal` counts
the half that a causal model needs.

--quick uses 2 narrow layers and three points per sweep. A plot needs matplotlib (pip install
matplotlib). Other options go to train.py.
"""

import argparse
import csv
import itertools
import math
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.race import (  # noqa: E402
    Contestant,
    ContestantLost,
    product_shapes,
    seconds_left,
    shape,
    words,
)
from benchmarks.race_report import padded_table  # noqa: E402
from benchmarks.record_overhead import random_tokens  # noqa: E402
from common import hardware  # noqa: E402
from common.errors import ArgumentParser, UserError, run_script  # noqa: E402

TOKENS = 4096  # per iteration
HEAD = 64  # head dimension
BASE = {'n_layer': 6, 'n_embd': 768, 'block_size': 1024, 'vocab_size': 50304}
SWEEPS = {
    'n_embd': (256, 512, 768, 1024, 1536, 2048),
    'block_size': (256, 512, 1024, 2048, 4096, 8192),
    'vocab_size': (256, 2048, 16384, 50304, 131072),
}
QUICK_BASE = {'n_layer': 2, 'n_embd': 128, 'block_size': 128, 'vocab_size': 512}
QUICK = {
    'n_embd': (64, 128, 256),
    'block_size': (64, 128, 256),
    'vocab_size': (256, 512, 2048),
}
COLUMNS = {
    'sweep': '{}',
    'value': '{:,}',
    'parameters': '{:,}',
    'flops_per_token': '{:.3g}',
    'tokens': '{:,}',
    'ms_an_update': '{:,.0f}',
    'tokens_per_sec': '{:,.0f}',
    'mfu_percent': '{:.1f}',
    'mfu_causal_percent': '{:.1f}',
    'product_tflops': '{:.3f}',
    'peak_gb': '{:.2f}',
    'times_arithmetic': '{:.2f}',
}
# Plotted values, also printed for each point.
SHOWN = {'tokens_per_sec': 'tokens/s', 'mfu_percent': 'MFU %', 'peak_gb': 'peak memory, GB'}


def point(base: dict, sweep: str, value: int, tokens: int) -> dict:
    """The shape of a point: the base with one size changed."""
    sizes = {**base, sweep: value}
    vocab_size, block_size = sizes.pop('vocab_size'), sizes.pop('block_size')
    sizes['n_head'] = max(1, sizes['n_embd'] // HEAD)
    return shape('gpt2', vocab_size, block_size, max(1, tokens // block_size), **sizes)


def measure(request: dict, seconds: float, name: str) -> dict:
    """Measure one point. Raises ContestantLost."""
    with tempfile.TemporaryDirectory(prefix='scaling_') as folder:
        request, sizes, running = {**request, 'folder': folder}, request['shape']['options'], []

        def start(kind: str, **more) -> tuple[Contestant, dict]:
            log = Path(folder, f'{kind}.log')
            running.append(Contestant(f'{name}, {kind}', {**request, **more, 'kind': kind}, log))
            return running[-1], running[-1].answer()

        try:
            Path(folder, 'data').mkdir()
            random_tokens(Path(folder, 'data'), request['shape']['vocab_size'])
            contestant, first = start('ours')
            once = contestant.ask(steps=1)
            steps = max(1, math.ceil(seconds / once['seconds']))
            answer = contestant.ask(steps=steps)
            dtype, shapes = request['dtype'], product_shapes(request['shape'], 4 * sizes['n_embd'])
            probe, _ = start('products', products=shapes, dtypes=[dtype])
            product = probe.ask()[dtype]['tflops']
        finally:
            for process in running:
                process.end()
    speed = first['tokens'] * steps / answer['seconds']
    flops = first['flops']
    return {
        'parameters': first['parameters'],
        'flops_per_token': flops['per_token'],
        'tokens': first['tokens'],
        'ms_an_update': 1e3 * answer['seconds'] / steps,
        'tokens_per_sec': speed,
        'mfu_percent': 100 * speed * flops['per_token'] / product / 1e12,
        'mfu_causal_percent': 100 * speed * flops['per_token_causal'] / product / 1e12,
        'product_tflops': product,
        'peak_gb': max(first['peak_gb'], answer['peak_gb']),
    }


def times_arithmetic(rows: list[dict]) -> list[float]:
    """The time per FLOP of each point of a sweep, relative to the best."""
    times = [1.0 / (row['tokens_per_sec'] * row['flops_per_token']) for row in rows]
    return [time / min(times) for time in times]


def plot(rows: list[dict], path: Path) -> None:
    """Plot tokens/s, MFU and memory over each sweep."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    by_sweep = {k: list(g) for k, g in itertools.groupby(rows, key=lambda row: row['sweep'])}
    figure, axes = plt.subplots(
        len(SHOWN), len(by_sweep), squeeze=False, figsize=(4 * len(by_sweep), 8), sharex='col'
    )
    for column, (sweep, points) in enumerate(by_sweep.items()):
        values = [row['value'] for row in points]
        for axis, (key, label) in zip(axes[:, column], SHOWN.items()):
            figures = [row[key] for row in points]
            axis.plot(values, figures, marker='o')
            axis.set_xscale('log', base=2)
            axis.set_xticks(values, [f'{value:,}' for value in values], rotation=30)
            axis.set_xticks([], minor=True)
            axis.set_ylim(0, 1.1 * max(figures))
            axis.grid(alpha=0.3)
            axis.set_ylabel(label)
        axes[-1, column].set_xlabel(sweep)
    figure.tight_layout()
    figure.savefig(path)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; those for train.py are in `given`. Raises UserError."""
    parser = ArgumentParser(
        prog='scaling.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        '--sweeps',
        type=words,
        default=[*SWEEPS],
        help=f'Sizes to vary (default {",".join(SWEEPS)})',
    )
    add('--quick', action='store_true', help='Small model, three points per sweep')
    add('--seconds', type=float, default=10.0, help='Minimum time per point (default 10)')
    add('--device', default='auto', help='Device: auto, cpu, cuda or cuda:N')
    add(
        '--dtype',
        choices=('bfloat16', 'float32'),
        default='bfloat16',
        help='Precision (default bfloat16)',
    )
    add('--compile', action='store_true', help='Use torch.compile')
    add('--csv', type=Path, help='Write the table to this file')
    add('--plot', type=Path, help='Write a plot to this file: .png, .svg or .pdf')
    options, options.given = parser.parse_known_args(argv)
    unknown = [sweep for sweep in options.sweeps if sweep not in SWEEPS]
    if unknown:
        raise UserError(f'--sweeps={",".join(unknown)}: choose from {", ".join(SWEEPS)}.')
    if options.plot and find_spec('matplotlib') is None:
        raise UserError('--plot needs the package matplotlib: pip install matplotlib.')
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    device = hardware.select_device(options.device)
    base, sweeps, tokens = (QUICK_BASE, QUICK, 512) if options.quick else (BASE, SWEEPS, TOKENS)
    points = [(sweep, value) for sweep in options.sweeps for value in sweeps[sweep]]
    request = {
        'device': str(device),
        'dtype': options.dtype,
        'compile': options.compile,
        'given': options.given,
    }
    cache = tempfile.mkdtemp(prefix='scaling_cache_')
    rows, lost, began = [], [], time.monotonic()
    try:
        for number, (sweep, value) in enumerate(points, start=1):
            name = f'{sweep}={value}'
            left = f'{seconds_left(began, number - 1, len(points)):.0f} s' if rows else 'unknown'
            print(f'{number}/{len(points)} {name} | left: {left}', file=sys.stderr, flush=True)
            its_shape = point(base, sweep, value, tokens)
            try:
                measured = measure(
                    {**request, 'shape': its_shape, 'cache': cache}, options.seconds, name
                )
            except ContestantLost as error:
                lost.append(str(error))
            else:
                rows.append({'sweep': sweep, 'value': value, **measured})
                shown_values = (f'{key} {COLUMNS[key].format(measured[key])}' for key in SHOWN)
                print('   ', ', '.join(shown_values), file=sys.stderr, flush=True)
    except KeyboardInterrupt:  # print the results so far
        lost.append(f'{name} and all later points: interrupted')
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    for sweep in options.sweeps:
        of_sweep = [row for row in rows if row['sweep'] == sweep]
        for row, times in zip(of_sweep, times_arithmetic(of_sweep) if of_sweep else []):
            row['times_arithmetic'] = times
    versions = hardware.versions()
    print(
        f'{hardware.device_name(device)}; torch {versions["torch"]}; {options.dtype}, '
        f'{"compiled" if options.compile else "not compiled"}; base '
        + ', '.join(f'{key}={value}' for key, value in base.items())
    )
    print(padded_table([tuple(COLUMNS), *(cells(row) for row in rows)]))
    for problem in lost:
        print(f'not measured: {problem}')
    if options.csv:
        with open(options.csv, 'w', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    if options.plot and rows:
        plot(rows, options.plot)
    return int(bool(lost))


def cells(row: dict) -> tuple[str, ...]:
    return tuple(form.format(row[key]) for key, form in COLUMNS.items())


if __name__ == '__main__':
    run_script(main)
