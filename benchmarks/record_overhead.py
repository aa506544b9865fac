"""Time of a log entry relative to an iteration: `log_interval=1` must be cheap.

    python benchmarks/record_overhead.py [preset …] [--key=value …]

For each 12-layer preset a run is set up as in `train.py`, on random tokens. Three things take turns
in one process: iterations without logging; the sum over the gradient that only log entries need
(the norm is needed anyway, for clipping and the check for finite values); and a whole log entry
(synchronization, memory, journal, console). Times are medians, with quartiles. Options are those of
train.py; names of presets select among them.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import train  # noqa: E402
from common import hardware  # noqa: E402
from data.token_files import DTYPES  # noqa: E402
from optim.step import GradientSums, element_sum  # noqa: E402
from training import iteration_log  # noqa: E402
from training.session import Session  # noqa: E402

PRESETS = ('gpt2', 'llama', 'team', 'hybrid', 'custom')
UPDATES, TURNS = 3, 15


def random_tokens(folder: Path, vocab_size: int = 50257) -> Path:
    """Write a dataset of random tokens; by default with the vocabulary of GPT-2."""
    count, generator = 2**16, np.random.default_rng(0)
    dtype = 'uint16' if vocab_size <= 2**16 else 'uint32'
    for split in ('train', 'val'):
        tokens = generator.integers(vocab_size, size=count).astype(DTYPES[dtype])
        tokens.tofile(folder / f'{split}.bin')
    facts = {'tokens': count}
    meta = {'format_version': 1, 'tokenizer': {'kind': 'gpt2'}, 'vocab_size': vocab_size}
    meta |= {'dtype': dtype, 'splits': {'train': facts, 'val': facts}}
    (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


def timed(device: torch.device, function, *arguments, **keywords) -> float:
    """Milliseconds of one call."""
    hardware.synchronize(device)
    began = time.perf_counter()
    function(*arguments, **keywords)
    hardware.synchronize(device)
    return 1e3 * (time.perf_counter() - began)


def measure(session: Session) -> dict[str, list[float]]:
    """Milliseconds of an iteration, of the gradient's sum and of a log entry."""
    device, optimizer = session.device, session.optimizer
    clock = hardware.StepClock(device)
    session.progress.iter = 1  # the first iteration is always logged
    train.run_iteration(session, clock)  # warm-up: optimizer state, caches
    times = {'update': [], 'sum': [], 'entry': []}
    gradients = [torch.full_like(p, 1e-3) for p in optimizer.parameters]
    loss = torch.ones((), device=device)
    sums = GradientSums(norm=loss, total=loss)

    for turn in range(TURNS):
        if turn % (TURNS // UPDATES) == 0:
            times['update'].append(timed(device, train.run_iteration, session, clock))
        times['sum'].append(timed(device, element_sum, gradients))
        session.progress.iter += 1
        clock.steps += 1
        times['entry'].append(timed(device, log_iteration, session, clock, loss, sums))
    return times


def log_iteration(
    session: Session, clock: hardware.StepClock, loss: torch.Tensor, sums: GradientSums
) -> None:
    measured = iteration_log.measure(session, clock, 1e-3, loss, sums)
    iteration_log.record_due(session, clock, measured)


def spread(values: list[float], unit: str) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive')
    return f'{middle:.2f} [{low:.2f}, {high:.2f}] {unit}'


def main(argv: list[str]) -> None:
    milliseconds = {}
    train.run_training = lambda session: milliseconds.update(measure(session)) or 0
    threads = torch.get_num_threads()
    print(f'torch {torch.__version__}, {hardware.device_name(torch.device("cpu"))}, {threads=}')
    for preset in [name for name in argv if name in PRESETS] or PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            arguments = [
                str(PROJECT / f'config/arch_{preset}.py'),
                f'--dataset={random_tokens(Path(folder))}',
                f'--out_dir={folder}/out',
                '--peak_tflops=1',
                '--max_iters=1000000',
                '--log_interval=1000000',
                *(argument for argument in argv if argument not in PRESETS),
            ]
            with open(Path(folder, 'console'), 'w') as file, contextlib.redirect_stdout(file):
                train.main(arguments)
        step = statistics.median(milliseconds['update'])
        shares = [
            100 * (s + e) / step
            for s, e in zip(milliseconds['sum'], milliseconds['entry'], strict=True)
        ]
        print(
            f'{preset:7} iteration {spread(milliseconds["update"], "ms")}; '
            f'gradient sum {spread(milliseconds["sum"], "ms")}; '
            f'log entry {spread(milliseconds["entry"], "ms")}; '
            f'together {spread(shares, "%")} of an iteration'
        )


if __name__ == '__main__':
    main(sys.argv[1:])
