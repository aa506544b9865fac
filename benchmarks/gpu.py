"""One GPU in five minutes: whether it computes what a CPU does, without waiting, and how fast.

    python benchmarks/gpu.py [--json=gpu.json] [--seconds=300] [section …]
    python benchmarks/gpu.py --dry        # every section at tiny size on a CPU: does it run?

| section    | what it measures |
| parity     | losses of ten updates in fp32 on the CPU and on the GPU, for several models |
| syncs      | operations of an update that wait for the GPU, for every preset and mixed layers |
| graphs     | graphs of compiled blocks, and whether a later evaluation or update adds any |
| loss       | output head and loss, beside a plain one that torch compiles |
| attention  | a layer of 8192 tokens, by mask and backend: time, memory, longest kernel |
| optimizers | one optimizer step of a 124M model: time and launches |
| logging    | tokens/s of the training loop with each iteration logged, and with every tenth |
| batches    | tokens/s, MFU and memory of GPT-2 124M by micro-batch |
| plain      | a plain GPT-2 124M as in nanoGPT, compiled as a whole, beside the fastest of these |

Sections for which no time is left are skipped. `ok` and `BAD` are checks; the exit code is 1 if one
is BAD or fails. Further checks: python -m pytest tests/gpu.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import common.first_import  # noqa: E402, F401

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from benchmarks.gpu_workloads import (  # noqa: E402
    GPT2,
    MODELS,
    TINY,
    PlainGPT,
    Updates,
    cost_of,
    fp32_products,
    kernels_of,
    loop_seconds,
    plain_training,
    recorded_waits,
    settings_of,
    start_session,
)
from benchmarks.record_overhead import random_tokens  # noqa: E402
from common import hardware  # noqa: E402
from common.errors import ArgumentParser, UserError, run_script  # noqa: E402
from components.document_mask import Documents  # noqa: E402
from components.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from model_builder import build_model  # noqa: E402

CPU = torch.device('cpu')
OPTIMIZERS = ('adamw', 'muon', 'lion')


@dataclass
class Row:
    """A line of the table. good: whether a check passed; None: a measurement only."""

    section: str
    what: str
    good: bool | None
    figures: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        mark = {True: 'ok', False: 'BAD', None: ''}[self.good]
        shown = [
            f'{key} {value:,.4g}' if isinstance(value, float) else f'{key} {value}'
            for key, value in self.figures.items()
        ]
        return f'{self.section:10} {mark:3} {self.what:44} {", ".join(shown)}'


@dataclass
class Bench:
    """The device, the sizes, and the results so far."""

    device: torch.device
    dry: bool
    folder: Path  # for data and runs
    deadline: float  # on the clock of time.monotonic
    tokens_per_second: dict[int, float] = field(default_factory=dict)  # by micro-batch

    def size(self, real: Any, dry: Any) -> Any:
        return dry if self.dry else real

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def gpt2(self) -> dict:
        """Options of the model whose speed is measured."""
        return self.size(GPT2, {**TINY, 'arch_preset': 'legacy'})


# --------------------------------------------------------------------------------------------------
# Checks


def parity(bench: Bench) -> Iterator[Row]:
    checked = ('legacy', 'llama', 'gemma2', 'mixtral', 'deepseek', 'mixed')
    for name in bench.size(checked, ('mixed',)):
        options = {**TINY, **MODELS[name]}
        curves, backends = [], []
        for device in (CPU, bench.device):
            release_memory(device)
            with fp32_products():
                updates = Updates(device, dtype='float32', **options)
                curves.append(updates.losses(10))
            backends.append(updates.config.attention_backend)
        largest = max(abs(ours / cpu - 1) for cpu, ours in zip(*curves))
        yield Row(
            'parity',
            f'{name}, attention by {" and ".join(backends)}',
            largest < 1e-4,
            {'largest relative difference': largest, 'last loss': curves[1][-1]},
        )


def syncs(bench: Bench) -> Iterator[Row]:
    for number, name in enumerate(bench.size(MODELS, ('llama', 'mixed'))):
        options = {**TINY, **MODELS[name]}
        optimizer = OPTIMIZERS[number % len(OPTIMIZERS)]
        release_memory(bench.device)
        updates = Updates(bench.device, optimizer=optimizer, **options)
        updates.update(), updates.update(measured=True)
        hardware.synchronize(bench.device)
        with recorded_waits(bench.device) as waits:
            updates.update(measured=True)
        figures = {'waits': len(waits)} | ({'at': ' '.join(sorted({*waits}))} if waits else {})
        yield Row('syncs', f'{name}, {optimizer}', not waits, figures)


def graphs(bench: Bench) -> Iterator[Row]:
    for name in ('llama', 'gemma2', 'mixed'):
        release_memory(bench.device)
        counters.clear()
        # Inductor needs a minute of a CPU: a dry run only goes through the calls.
        updates = Updates(bench.device, 4, compiled=not bench.dry, **TINY, **MODELS[name])
        updates.evaluate(), updates.evaluate(ignored=1)
        updates.update()
        first = counters['stats']['unique_graphs']
        updates.evaluate(ignored=1), updates.update(), updates.update()
        added = counters['stats']['unique_graphs'] - first
        breaks = sum(counters['graph_break'].values())
        yield Row(
            'graphs',
            f'{name}, {updates.config.n_layer} layers',
            not added and not breaks and (bench.dry or first > 0),
            {'graphs': first, 'added later': added, 'graph breaks': breaks},
        )


# --------------------------------------------------------------------------------------------------
# Parts of an update


def loss(bench: Bench) -> Iterator[Row]:
    device = bench.device
    rows, vocabulary, width = bench.size((12 * 1024, 50304, 768), (64, 512, 64))
    hidden = torch.randn(rows, width, device=device, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) * 0.02).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device=device)

    def ours() -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, targets, None, -100, compiled=True)

    def plain() -> torch.Tensor:
        logits = F.linear(hidden, weight)
        return F.cross_entropy(logits.float(), targets, reduction='sum')

    compiled = plain if bench.dry else torch.compile(plain, dynamic=False)
    results, costs = [], {}
    for name, function in (('ours', ours), ('cross_entropy', plain), ('compiled', compiled)):

        def step(function=function) -> torch.Tensor:
            hidden.grad = weight.grad = None
            with torch.autocast(device.type, torch.bfloat16):
                total = function()
            total.backward()
            return total

        total = step()
        results.append([total.detach(), hidden.grad.clone(), weight.grad.clone()])
        costs[name] = cost_of(device, step, calls=bench.size(5, 1))
        figures = {'ms': costs[name].milliseconds, 'GB': costs[name].peak_gb}
        figures['launches'] = kernels_of(device, step).launches
        yield Row('loss', f'{rows} × {vocabulary}, {name}', None, figures)
    of_loss, of_hidden, of_weight = (
        ((value - expected).norm() / expected.norm()).item()
        for value, expected in zip(*results[:2])
    )
    differences = {'loss': of_loss, 'd hidden': of_hidden, 'd weight': of_weight}
    good = of_loss < 1e-3 and max(of_hidden, of_weight) < 2e-2
    yield Row('loss', 'relative difference to cross_entropy', good, differences)
    if not bench.dry:
        ratio = costs['ours'].milliseconds / costs['compiled'].milliseconds
        yield Row('loss', 'time against the compiled one', ratio < 1.3, {'ratio': ratio})


ATTENTION_CASES: tuple[tuple[str, dict], ...] = (
    ('causal', {}),
    ('causal, grouped', {'num_kv_heads': 4, 'use_gqa': True}),
    ('window of 1024', {'sliding_window': 1024}),
    ('documents', {'document_mask': True, 'end_of_text': 0}),
    ('softcap', {'attention_softcap': 50.0}),
)


def attention(bench: Bench) -> Iterator[Row]:
    length = bench.size(8192, 64)
    sizes = bench.size({'n_embd': 1024, 'n_head': 16}, {'n_embd': 64, 'n_head': 4})
    sizes |= {'arch_preset': 'llama', 'n_layer': 1, 'block_size': length, 'vocab_size': 64}
    causal = None
    for name, options in ATTENTION_CASES:
        derived = settings_of(bench.device, **sizes, **options).architecture.attention_backend
        others = () if 'attention_softcap' in options else ('sdpa',)
        for backend in dict.fromkeys((derived, *others)):
            release_memory(bench.device)
            choice = {'attention_backend': backend}
            config = settings_of(bench.device, **sizes, **options, **choice).architecture
            step = attention_step(bench, build_model(config, bench.device, 1), length)
            cost = cost_of(bench.device, step, calls=bench.size(3, 1))
            causal = causal or cost.milliseconds
            figures = {'ms': cost.milliseconds, 'of causal': cost.milliseconds / causal}
            figures |= {'GB': cost.peak_gb, 'kernel': kernels_of(bench.device, step).names[0][:60]}
            what = f'{name}: {backend}{" (derived)" if backend == derived else ""}'
            yield Row('attention', what, None, figures)


def attention_step(bench: Bench, model: torch.nn.Module, length: int) -> Callable[[], None]:
    """The masks of a forward pass, and its attention layer forward and backward."""
    device, size = bench.device, 2
    layer = model.blocks[0].attention
    if not bench.dry:
        layer.compile(dynamic=False)
    positions = torch.arange(length, device=device)
    documents = None
    if model.end_of_text is not None:  # eight of equal length
        part = length // 8
        ids, of_document = (
            x.expand(size, -1).contiguous() for x in (positions // part, positions % part)
        )
        documents = Documents(ids, of_document)
    width = model.config.n_embd
    x = torch.randn(size, length, width, device=device, requires_grad=True)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            (inputs,) = model.attention_inputs(positions, documents)
            y = layer(x, inputs)
        y.float().sum().backward()

    return step


def optimizers(bench: Bench) -> Iterator[Row]:
    for optimizer in OPTIMIZERS:
        updates = Updates(bench.device, 1, optimizer=optimizer, **bench.gpt2)
        gradients = [torch.randn_like(p) for p in updates.raw_model.parameters()]
        value = torch.ones((), device=bench.device)

        def step(updates=updates, gradients=gradients, value=value) -> None:
            for parameter, gradient in zip(updates.raw_model.parameters(), gradients):
                parameter.grad = gradient
            updates.optimizer.step(1e-5, value, measured=False)

        cost = cost_of(bench.device, step, calls=bench.size(10, 1))
        figures = {'ms': cost.milliseconds, 'launches': kernels_of(bench.device, step).launches}
        yield Row('optimizers', optimizer, None, {**figures, 'GB': cost.peak_gb})


# --------------------------------------------------------------------------------------------------
# The training loop


def loop_figures(bench: Bench, batch_size: int, micro_steps: int, log_interval: int) -> dict:
    """tokens/s, MFU and memory of the training loop, compiled as by default."""
    release_memory(bench.device)
    warm_up, iterations = bench.size((5, 25), (3, 5))
    session = start_session(
        random_tokens(bench.folder, bench.size(50257, 256)),
        bench.folder / 'runs',
        **bench.gpt2,
        device=bench.device,
        batch_size=batch_size,
        gradient_accumulation_steps=micro_steps,
        log_interval=log_interval,
        max_iters=iterations,
        eval_interval=10**6,
        compile=not bench.dry,
        peak_tflops=0.01 if bench.dry else None,
    )
    seconds = loop_seconds(session, warm_up)
    tokens_per_second, mfu = session.throughput(seconds)
    memory = hardware.memory_usage(bench.device)
    figures = {'tokens/s': tokens_per_second, 'ms': 1e3 * seconds, 'MFU %': mfu['mfu_percent']}
    session.logger.finish('finished')
    return {**figures, 'peak GB': memory['peak_gb'], 'reserved GB': memory['reserved_gb']}


def logging(bench: Bench) -> Iterator[Row]:
    speeds = []
    for interval in (10, 1):
        figures = loop_figures(bench, bench.size(12, 2), 1, interval)
        speeds.append(figures['tokens/s'])
        yield Row('logging', f'log_interval={interval}', None, figures)
    cost = 100 * (speeds[0] / speeds[1] - 1)
    good = cost < 5 or bench.dry
    yield Row('logging', 'cost of logging each iteration', good, {'%': cost})


def batches(bench: Bench) -> Iterator[Row]:
    for batch_size in bench.size((12, 32, 64), (1, 2)):
        if bench.seconds_left < 40:
            yield Row('batches', f'batch_size={batch_size}: no time left', None)
            continue
        figures = loop_figures(bench, batch_size, 1, 10)
        bench.tokens_per_second[batch_size] = figures['tokens/s']
        yield Row('batches', f'batch_size={batch_size}', None, figures)


def plain(bench: Bench) -> Iterator[Row]:
    batch_size, length, vocabulary = bench.size((12, 1024, 50304), (2, 64, 256))
    shape = bench.size((12, 12, 768), (2, 4, 64))
    with bench.device:
        model = PlainGPT(*shape, length, vocabulary)
        tokens = torch.randint(0, vocabulary, (2, batch_size, length))
    step = plain_training(model, tokens, compiled=not bench.dry)
    cost = cost_of(bench.device, step, calls=bench.size(20, 2))
    speed = batch_size * length / cost.milliseconds * 1e3
    yield Row('plain', f'batch_size={batch_size}', None, {'tokens/s': speed, 'GB': cost.peak_gb})
    if ours := bench.tokens_per_second.get(batch_size):
        ratio = ours / speed
        good = ratio > 1 or bench.dry
        yield Row('plain', 'our tokens/s against it', good, {'ratio': ratio})


# --------------------------------------------------------------------------------------------------

# The section, and the seconds that it takes on a GPU at most.
SECTIONS: tuple[tuple[Callable[[Bench], Iterator[Row]], float], ...] = (
    (parity, 20),
    (syncs, 20),
    (loss, 20),
    (batches, 60),
    (plain, 60),
    (logging, 40),
    (optimizers, 15),
    (attention, 60),
    (graphs, 40),
)


def run_sections(bench: Bench, names: list[str], show: Callable[[str], None]) -> list[Row]:
    rows = []
    for section, seconds in SECTIONS:
        name = section.__name__
        if names and name not in names:
            continue
        if bench.seconds_left < seconds:
            rows.append(Row(name, 'skipped: no time left', None))
            show(rows[-1].line())
            continue
        try:
            for row in section(bench):
                rows.append(row)
                show(row.line())
        except Exception as error:  # out of memory, a missing kernel: the others go on
            message = str(error).partition('\n')[0]
            rows.append(Row(name, f'failed: {type(error).__name__}: {message}', False))
            show(rows[-1].line())
        release_memory(bench.device)
    return rows


def release_memory(device: torch.device) -> None:
    """Release what earlier measurements have left: memory, and compiled functions, whose number is
    limited."""
    torch.compiler.reset()
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog='gpu.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [section.__name__ for section, _ in SECTIONS]
    parser.add_argument('sections', nargs='*', metavar='section', help='Sections; default: all')
    parser.add_argument('--seconds', type=float, default=300.0, help='Time limit (default 300)')
    parser.add_argument('--json', type=Path, help='Write all rows to this file')
    parser.add_argument('--dry', action='store_true', help='Tiny sizes, on a CPU')
    options = parser.parse_args(argv)
    if unknown := [name for name in options.sections if name not in names]:
        raise UserError(f'{unknown[0]!r} is no section: choose from {", ".join(names)}.')
    if not options.dry and not torch.cuda.is_available():
        raise UserError(
            'no CUDA device: gpu.py measures a GPU. --dry goes through it on a CPU, at tiny size.'
        )
    return options


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    device = CPU if options.dry else hardware.select_device('cuda')
    hardware.tune(device, deterministic=False)
    began = time.monotonic()
    name = f'{hardware.device_name(device)}, torch {torch.__version__}'
    print(f'{name}; at most {options.seconds:.0f} seconds', flush=True)

    def show(line: str) -> None:
        print(f'{time.monotonic() - began:6.1f} s  {line}', flush=True)

    with tempfile.TemporaryDirectory(prefix='gpu_', ignore_cleanup_errors=True) as folder:
        bench = Bench(device, options.dry, Path(folder), began + options.seconds)
        rows = run_sections(bench, options.sections, show)
    if options.json:
        values = {'device': name, 'dry': options.dry, 'rows': [vars(row) for row in rows]}
        options.json.write_text(json.dumps(values, indent=1) + '\n')
    bad = [row for row in rows if row.good is False]
    checks = [row for row in rows if row.good is not None]
    print(f'{len(checks) - len(bad)} of {len(checks)} checks passed')
    for row in bad:
        print(row.line())
    return int(bool(bad))


if __name__ == '__main__':
    run_script(main)
