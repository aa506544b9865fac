"""The peak of a CPU: the fastest matrix multiplication ever measured on this machine.

Other load on the machine can only slow a measurement down. So the best of several short
measurements is used, and it is cached: MFUs of two runs are comparable only relative to the same
peak.

The cache is a file of JSON lines in the user's cache folder, one for each new best. Lines are only
appended, in one write each, so processes need no lock. A file that cannot be read or written is
ignored.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from common.gpu_specs import Peak
from common.paths import cache_folder

SIZES = (1024, 2048)
SECONDS = 0.07  # for the multiplications of one size
ROUNDS = 3  # over all sizes, if the cache has no entry; else one round


class Best(NamedTuple):
    """The fastest multiplication of two square matrices, and their size."""

    tflops: float
    size: int


def peak(cpu: str, dtype: str) -> Peak:
    """The peak of this process's threads on the processor `cpu`, multiplying in `dtype`."""
    threads = torch.get_num_threads()
    key = {'cpu': cpu, 'threads': threads, 'dtype': dtype, 'torch': str(torch.__version__)}
    earlier = _recall(key)
    now = measure(dtype, rounds=ROUNDS if earlier is None else 1)
    best = now if earlier is None else max(now, earlier)
    source = (
        f'measured: {best.size:,}-cubed {dtype} matrix multiplication on {threads} '
        f'thread{"s" if threads != 1 else ""}'
    )
    if best == earlier:
        source += f', in an earlier run; now {now.tflops / best.tflops:.0%} of it'
    elif not _remember(key, best):
        source += ', not cached'
    share, why = _share(threads)
    return Peak(share * best.tflops, source + why, measured=True)


def measure(dtype: str, rounds: int) -> Best:
    """The best of `rounds` rounds over all sizes.

    On a busy machine small multiplications are slowed down most, by threads that wait for each
    other, so the sizes are those of a model. Models call `linear`: in float16 `mm` can be ten times
    slower.
    """
    generator = torch.Generator().manual_seed(0)  # does not affect the run's random numbers
    best, operands = Best(0.0, 0), {}
    for _ in range(rounds):
        fastest = 0.0
        for size in SIZES:
            if 8 * fastest > 2 * SECONDS:  # twice the size is eight times the work
                break
            if size not in operands:
                pair = torch.randn(2, size, size, generator=generator).to(getattr(torch, dtype))
                operands[size] = pair
                torch.nn.functional.linear(*pair)  # warm-up
            fastest = _fastest(*operands[size])
            best = max(best, Best(2 * size**3 / fastest / 1e12, size))
    return best


def _fastest(x: torch.Tensor, weight: torch.Tensor) -> float:
    """The time in seconds of the fastest multiplication in `SECONDS`; at least one is made."""
    fastest, now = math.inf, time.perf_counter()
    deadline = now + SECONDS
    while now < deadline:
        start = now
        torch.nn.functional.linear(x, weight)
        now = time.perf_counter()
        fastest = min(fastest, now - start)
    return fastest


def _share(threads: int) -> tuple[float, str]:
    """The fraction of the peak for each process if several share cores, and the reason."""
    processes = _whole_number(os.environ.get('LOCAL_WORLD_SIZE', '')) or 1
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, 'sched_getaffinity'):
        cores = min(cores, len(os.sched_getaffinity(0)))
    if processes == 1 or processes * threads <= cores:
        return 1.0, ''
    share = cores / (processes * threads)
    return share, f'; {share:.0%} of it, as {processes} processes share {cores} cores'


def _whole_number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


# --- The cache ------------------------------------------------------------------------------------


def cache_file() -> Path | None:
    """The path of the cache; None if the user has no home folder."""
    folder = cache_folder()
    return folder / 'cpu_peak.jsonl' if folder else None


def _recall(key: dict) -> Best | None:
    """The best in the cache, or None. Lines in any other format are ignored."""
    file = cache_file()
    try:
        lines = file.read_bytes().splitlines() if file else []
    except OSError:
        return None
    remembered = []
    for line in lines:
        try:
            entry = json.loads(line)
            best = Best(float(entry['tflops']), int(entry['size']))
            if all(entry[name] == value for name, value in key.items()):
                remembered.append(best)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # torn, or written by another version
    return max((b for b in remembered if math.isfinite(b.tflops) and b.tflops > 0), default=None)


def _remember(key: dict, best: Best) -> bool:
    """Append a line; whether that succeeded."""
    file = cache_file()
    if file is None:
        return False
    line = json.dumps({**key, **best._asdict()})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, 'ab', buffering=0) as added:
            added.write(f'\n{line}'.encode())  # the line feed first: it ends a torn line before it
    except OSError:
        return False
    return True
