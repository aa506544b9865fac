"""Cost of reading the data: time relative to an iteration, and memory over an epoch.

    python benchmarks/loader.py [config.py] [--megabytes=1024] [--limit_mb=16] [--key=value …]

Random GPT-2 tokens are written to files of 128 MB. Every window of one epoch is read in training
batches, with sampling=epoch, and as many with sampling=random. The resident memory of the process
is measured after every 2 % of the batches and may grow by `limit_mb`, a small part of the files.
(They are read and not mapped, so the page cache does not count.) Then runs are set up as in
train.py on the same files and trained for some iterations: a 12-layer preset or the given config
file, and a model so small that reading has the largest share. The time for batches is compared with
the whole iteration. Other options are those of train.py. The exit code is 1 if memory grows beyond
the limit or a window is missed.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import train  # noqa: E402
from common import hardware  # noqa: E402
from data.dataset import TokenDataset, load_dataset  # noqa: E402
from data.order import ORDERS  # noqa: E402
from data.token_files import GPT2_VOCAB_SIZE  # noqa: E402
from training.session import Session  # noqa: E402

FILE_TOKENS = 2**26  # 128 MB of uint16
WARM_UP, UPDATES = 2, 10
OPTIONS = {
    'block_size': 256,
    'batch_size': 4,
    'gradient_accumulation_steps': 1,
    'max_iters': 10**6,
    'log_interval': 10**6,
    'peak_tflops': 1,  # otherwise it is measured at the start
    'compile': False,
}
PRESET = str(PROJECT / 'config' / 'arch_llama.py')
SMALL = {'n_layer': 2, 'n_head': 2, 'n_embd': 64, 'vocab_size': 50304}


def write_tokens(folder: Path, tokens: int) -> Path:
    """Write a dataset of random tokens, in shards."""
    draw, shards = np.random.default_rng(0), []
    while left := tokens - sum(shard['tokens'] for shard in shards):
        count, name = min(left, FILE_TOKENS), f'train_{len(shards):05d}.bin'
        with open(folder / name, 'wb') as file:
            for start in range(0, count, 2**22):
                size = min(2**22, count - start)
                draw.integers(GPT2_VOCAB_SIZE, size=size, dtype=np.uint16).tofile(file)
        shards.append({'file': name, 'tokens': count, 'sha256': 'random'})
    val = draw.integers(GPT2_VOCAB_SIZE, size=2**14, dtype=np.uint16)
    val.tofile(folder / 'val.bin')
    splits = {
        'train': {'tokens': tokens, 'sha256': 'random', 'shards': shards},
        'val': {'tokens': len(val), 'shards': [{'file': 'val.bin', 'tokens': len(val)}]},
    }
    meta = {'format_version': 2, 'tokenizer': {'kind': 'gpt2'}, 'vocab_size': GPT2_VOCAB_SIZE}
    (folder / 'meta.json').write_text(json.dumps({**meta, 'dtype': 'uint16', 'splits': splits}))
    return folder


def memory() -> tuple[int, int]:
    """Resident bytes of this process: all, and those not backed by a file."""
    info = psutil.Process().memory_info()
    return info.rss, info.rss - getattr(info, 'shared', 0)


def read_an_epoch(data: TokenDataset, sampling: str, batch_size: int) -> dict:
    """Read as many windows as an epoch has; return rates, memory, and windows read exactly once."""
    windows = data.order('epoch', 0).windows_per_epoch
    order = data.order(sampling, 0)
    visits = np.ones(data.tokens('train') // data.block_size, np.int32)  # resident from the start
    visits.fill(0)
    data.batch(order, 0, batch_size)  # one-time set-up
    before, most, seconds = memory(), (0, 0), 0.0
    firsts = range(0, windows, batch_size)
    for number, first in enumerate(firsts):
        count = min(batch_size, windows - first)
        began = time.perf_counter()
        data.batch(order, first, count)
        seconds += time.perf_counter() - began
        np.add.at(visits, order.starts(first, count) // data.block_size, 1)
        if number % max(1, len(firsts) // 50) == 0 or first + count == windows:
            most = tuple(map(max, most, memory()))
    return {
        'windows': windows,
        'once': int((visits == 1).sum()),  # by index of the window of block_size tokens
        'seconds': seconds,
        'tokens_per_sec': windows * data.block_size / seconds,
        'growth': [after - start for after, start in zip(most, before)],
        'before': before[0],
    }


def timed_updates(session: Session) -> dict:
    """Seconds of several iterations, and of reading their batches."""
    clock, read, spent = hardware.StepClock(session.device), session.training_batch, []

    def timed_read(number: int):
        began = time.perf_counter()
        batch = read(number)
        spent.append(time.perf_counter() - began)
        return batch

    session.training_batch = timed_read
    updates, reads = [], []
    for _ in range(WARM_UP + UPDATES):
        spent.clear()
        hardware.synchronize(session.device)
        began = time.perf_counter()
        train.run_iteration(session, clock)
        hardware.synchronize(session.device)
        updates.append(time.perf_counter() - began)
        reads.append(sum(spent))
    return {
        'name': session.settings.architecture.name,
        'tokens': session.tokens_per_iter,
        'update': statistics.median(updates[WARM_UP:]),
        'read': statistics.median(reads[WARM_UP:]),
    }


def trained(arguments: list[str]) -> dict:
    """`timed_updates` of a run with these options of train.py."""
    measured = {}
    train.run_training = lambda session: measured.update(timed_updates(session)) or 0
    with (
        tempfile.TemporaryDirectory() as folder,
        open(Path(folder, 'console'), 'w') as file,
        contextlib.redirect_stdout(file),
    ):
        train.main([*arguments, f'--out_dir={folder}/out'])
    return measured


def reading_line(measured: dict) -> str:
    rate, (resident, anonymous) = (
        measured['tokens_per_sec'],
        (grown / 1e6 for grown in measured['growth']),
    )
    return (
        f'{measured["windows"]:,} windows, {measured["once"]:,} exactly once, in '
        f'{measured["seconds"]:.1f} s: {rate / 1e6:,.1f} M tokens/s, {2e-6 * rate:,.0f} MB/s; '
        f'resident {measured["before"] / 1e6:,.0f} MB, growth {resident:+.1f} MB (anonymous '
        f'{anonymous:+.1f} MB)'
    )


def training_line(run: dict, rate: float) -> str:
    consumed = run['tokens'] / run['update']
    return (
        f'{run["name"]}: iteration {1e3 * run["update"]:.2f} ms, '
        f'reading {1e3 * run["read"]:.3f} ms = '
        f'{100 * run["read"] / run["update"]:.3f} %; consumes {consumed:,.0f} tokens/s '
        f'({2e-6 * consumed:.3f} MB/s), the loader alone delivers {rate / consumed:,.0f} times that'
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        'config', nargs='?', default=PRESET, help='Config file of the model (default: llama)'
    )
    parser.add_argument(
        '--megabytes', type=int, default=1024, help='Size of the token files (default 1024)'
    )
    parser.add_argument(
        '--limit_mb', type=float, default=16, help='Allowed growth of memory in MB (default 16)'
    )
    options, others = parser.parse_known_args(argv)
    given = dict(argument[2:].split('=', 1) for argument in others)
    settings = {**OPTIONS, **given}
    block_size, batch_size = int(settings['block_size']), int(settings['batch_size'])
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), options.megabytes * 10**6 // 2)
        data = load_dataset(folder, block_size)
        print(
            f'{data.splits["train"].nbytes / 1e6:,.0f} MB in {len(data.splits["train"].paths)} '
            f'files, batches of {batch_size} × {block_size:,} tokens'
        )
        rates = {}
        for sampling in ORDERS:  # before any training, which would leave freed memory to reuse
            measured = read_an_epoch(data, sampling, batch_size)
            print(f'{sampling:6} {reading_line(measured)}', flush=True)
            rates[sampling] = measured['tokens_per_sec']
            failed |= max(measured['growth']) > 1e6 * options.limit_mb
            failed |= sampling == 'epoch' and measured['once'] != measured['windows']
        for sampling, rate in rates.items():
            for size in ({}, SMALL):
                options_of_run = {**settings, **size, 'sampling': sampling, 'dataset': folder}
                run = trained([options.config, *(f'--{k}={v}' for k, v in options_of_run.items())])
                print(f'{sampling:6} {training_line(run, rate)}', flush=True)
    print('FAILED' if failed else f'memory grew by less than {options.limit_mb:g} MB')
    return int(failed)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
