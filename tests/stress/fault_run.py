"""Kill a training run repeatedly, and compare its result with that of an uninterrupted run.

    python tests/stress/fault_run.py [--kills=50] [--updates=800] [--seed=0] [--folder=FOLDER]
    python tests/stress/fault_run.py --strategy=fsdp [--ranks=2] [--kills=20] [--updates=400]

A small model is trained once without interruption. The same training is then killed repeatedly with
`kill -9`, and restarted with --init_from=auto each time: one fifth of the kills during start-up,
two fifths at random moments of training, two fifths during a save (when a `.saving-` folder exists,
plus up to half the duration of a save). The kills are spread over the whole training. After each
one, every published checkpoint is read. At the end, weights, optimizer and record must be
bit-identical. The exit code is 0 if nothing differs and every checkpoint was readable. With one
thread, 50 kills take about 7 minutes on two slow cores.

With --strategy, each kill hits a random one of `--ranks` processes, and torchrun restarts the job
by --max-restarts, which is exactly the number of kills.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / 'tests')]

from helpers.bit_equality import bit_differences, without_measurements  # noqa: E402

from records.record import read_record  # noqa: E402
from records.run_folders import latest_run  # noqa: E402
from training.checkpoint import (  # noqa: E402
    BrokenCheckpoint,
    list_checkpoints,
    load_latest,
    load_state,
    read_index,
)

OPTIONS = {
    'n_layer': 4,
    'n_head': 4,
    'n_embd': 128,
    'block_size': 64,
    'batch_size': 4,
    'gradient_accumulation_steps': 2,
    'dropout': 0.1,
    'eval_interval': 10,
    'eval_iters': 8,
    'keep_last': 2,
    'device': 'cpu',
    'dtype': 'float32',
    'peak_tflops': 1.0,  # otherwise each start would measure it
    'log_style': 'line',
    'init_from': 'auto',
}
STRATEGIES = {'single': {}, 'ddp': {}, 'zero1': {'use_zero1': True}, 'fsdp': {'use_fsdp': True}}
KINDS = ('training', 'saving', 'start', 'saving', 'training')
GRACE_SECONDS = 300  # timeout in seconds for steps that take a few


def write_dataset(folder: Path) -> None:
    """Write text of random words."""
    folder.mkdir()
    choose = random.Random(0).choice
    words = ['the', 'quick', 'brown', 'fox', 'jumps', 'over', 'a', 'lazy', 'dog.\n']
    splits = {}
    for split, length in (('train', 200_000), ('val', 20_000)):
        text = ' '.join(choose(words) for _ in range(length))[:length]
        (folder / f'{split}.bin').write_bytes(text.encode())
        splits[split] = {'tokens': length, 'bytes': length}
    meta = {'format_version': 1, 'tokenizer': {'kind': 'byte'}, 'vocab_size': 256, 'dtype': 'uint8'}
    (folder / 'meta.json').write_text(json.dumps({**meta, 'splits': splits}))


class Training:
    """A training run in one folder, in as many processes as needed."""

    def __init__(self, folder: Path, name: str, iterations: int, strategy: str, ranks: int):
        self.out, self.log = folder / name, folder / f'{name}.log'
        self.ranks = 1 if strategy == 'single' else ranks
        options = {**OPTIONS, **STRATEGIES[strategy], 'max_iters': iterations}
        options |= {'dataset': folder / 'dataset', 'out_dir': self.out}
        options['gradient_accumulation_steps'] *= self.ranks
        self.options = [f'--{key}={value}' for key, value in options.items()]
        self.process: subprocess.Popen | None = None
        self.killed: set[int] = set()  # ranks that were killed

    @property
    def run(self) -> Path | None:
        return latest_run(self.out)

    @property
    def checkpoints(self) -> list[Path]:
        return list_checkpoints(self.run / 'checkpoints') if self.run else []

    def start(self, restarts: int = 0) -> None:
        """Start the training, or wait until torchrun has restarted it."""
        script = [str(PROJECT / 'train.py'), *self.options]
        if self.ranks == 1:
            self._start([sys.executable, *script])
            return
        if self.process is None:
            torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
            torchrun += [f'--nproc_per_node={self.ranks}', f'--max-restarts={restarts}']
            self._start(torchrun + script)
        wait_until(lambda: len(self.workers()) == self.ranks, self.process)

    def _start(self, command: list[str]) -> None:
        with open(self.log, 'a') as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, 'OMP_NUM_THREADS': '1'},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def workers(self) -> list[int]:
        """The training processes, without those that were killed."""
        if self.ranks == 1:
            return [self.process.pid]
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return [child.pid for child in children if child.pid not in self.killed]

    def kill(self, rng: random.Random) -> bool:
        """Kill a random process; return whether one was running."""
        workers = self.workers()
        self.killed.update(workers)
        if self.process.poll() is not None or not workers:
            return False
        try:
            os.kill(rng.choice(workers), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return self.ranks > 1 or self.process.wait() < 0

    def wait(self) -> None:
        if code := self.process.wait():
            sys.exit(f'the training ended with code {code}; its output is in {self.log}')

    def finish(self) -> float:
        """Train to the end, and return the duration in seconds."""
        began = time.perf_counter()
        self.start()
        self.wait()
        return time.perf_counter() - began

    def journal_end(self) -> tuple[Path | None, int]:
        run = self.run
        return run, (run / 'journal.jsonl').stat().st_size if run else 0

    def iterations_since(self, run: Path | None, size: int) -> int:
        """Iterations in the journal after a position; -1 if there are none."""
        if self.run is None:
            return -1
        with open(self.run / 'journal.jsonl', 'rb') as file:
            file.seek(size if self.run == run else 0)
            numbers = re.findall(rb'"kind": "iteration".*?"iter": (\d+)', file.read())
        return int(numbers[-1]) + 1 if numbers else -1

    def leftovers(self) -> set[str]:
        """Temporary folders of saves in progress or interrupted."""
        folder = self.run and self.run / 'checkpoints'
        names = os.listdir(folder) if folder else []
        return {name for name in names if name.startswith('.saving-')}

    def unreadable(self) -> list[str]:
        problems = []
        for path in self.checkpoints:
            try:
                load_state(read_index(path))
            except BrokenCheckpoint as error:
                problems.append(str(error))
        return problems


def wait_until(condition, process: subprocess.Popen) -> None:
    """Wait until the condition holds or the process has ended."""
    deadline = time.perf_counter() + GRACE_SECONDS
    while process.poll() is None and not condition():
        if time.perf_counter() > deadline:
            process.kill()
            sys.exit(f'train.py made no progress for {GRACE_SECONDS} seconds')
        time.sleep(0.001)


def kill_once(
    training: Training, kind: str, until: float, seconds: dict[str, float], rng: random.Random
) -> bool | None:
    """Kill at a moment of this kind, and return whether it was during a save.

    until: completed iterations at the kill, unless it is during start-up. seconds: duration of a
    start, an iteration and a save. None if the training ended before.
    """
    end, before = training.journal_end(), training.leftovers()
    if kind == 'start':
        time.sleep(rng.uniform(0, seconds['start']))
    else:
        wait_until(lambda: training.iterations_since(*end) >= until, training.process)
        time.sleep(rng.uniform(0, seconds['update']))
        if kind == 'saving':
            wait_until(lambda: training.leftovers() - before, training.process)
            time.sleep(rng.uniform(0, seconds['save'] / 2))
    if not training.kill(rng):
        training.wait()
        return None
    return bool(training.leftovers() - before)


def clock(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


@contextlib.contextmanager
def empty_folder(parser: argparse.ArgumentParser, name: str | None) -> Iterator[Path]:
    """The folder given by `--folder`, or a temporary one that is removed at the end."""
    folder = Path(name or tempfile.mkdtemp(prefix=f'{Path(parser.prog).stem}_'))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f'--folder={folder} is not empty')
    try:
        yield folder
    finally:
        if not name:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kills', type=int, default=50, help='Number of kills (default 50)')
    parser.add_argument(
        '--updates', type=int, default=800, help='Iterations of the training (default 800)'
    )
    parser.add_argument('--seed', type=int, default=0, help='Seed of the moments (default 0)')
    parser.add_argument(
        '--strategy',
        choices=STRATEGIES,
        default='single',
        help='Parallel strategy (default single)',
    )
    parser.add_argument('--ranks', type=int, default=2, help='Processes of a strategy (default 2)')
    parser.add_argument(
        '--folder', help='Folder in which to keep the runs (default: a temporary one)'
    )
    options = parser.parse_args()
    with empty_folder(parser, options.folder) as folder:
        rng = random.Random(options.seed)
        how = options.strategy, options.ranks
        return fault_run(folder, options.kills, options.updates, how, rng)


def fault_run(
    folder: Path, kills: int, iterations: int, how: tuple[str, int], rng: random.Random
) -> int:
    """Run both trainings and the kills, print the result; return 0 if nothing differs."""
    write_dataset(folder / 'dataset')
    reference = Training(folder, 'uninterrupted', iterations, *how)
    seconds = train_alone(reference, iterations)
    began = time.perf_counter()
    training = Training(folder, 'killed', iterations, *how)
    outcome = kill_repeatedly(training, kills, iterations, seconds, rng)
    different = compare_trainings(training, reference)
    resumes = sum(event['event'] == 'resume' for event in read_record(training.run)['events'])
    total = sum(outcome.kinds.values())
    kinds = ', '.join(f'{n} {kind}' for kind, n in outcome.kinds.items())
    print(f'\nkills                    {total} ({kinds})')
    print(f'  during a save          {outcome.in_saves}')
    print(f'resumes in the record    {resumes}')
    print(f'unreadable checkpoints   {len(outcome.unreadable)}')
    for problem in outcome.unreadable:
        print(f'  {problem}')
    for part, keys in different.items():
        verdict = f'DIFFERENT: {", ".join(keys[:5])}' if keys else 'bit-identical'
        print(f'{part:<24} {verdict}')
    print(f'time                     {clock(time.perf_counter() - began)} for the killed training')
    return int(bool(outcome.unreadable or any(different.values()) or total < kills))


def train_alone(reference: Training, iterations: int) -> dict[str, float]:
    """Train without interruption; return the seconds of a start, an iteration and a save."""
    print(f'training {iterations} iterations without interruption', flush=True)
    took = reference.finish()
    record = read_record(reference.run)
    seconds = {
        'start': took - record['summary']['wall_seconds'],
        'update': record['summary']['avg_time_ms'] / 1e3,
        'save': statistics.median(entry['time_ms'] for entry in record['checkpoints']) / 1e3,
    }
    print(
        f'{took:.0f} s, of which {seconds["start"]:.1f} s to start; {len(record["checkpoints"])} '
        f'saves of {1e3 * seconds["save"]:.0f} ms',
        flush=True,
    )
    return seconds


class Kills(NamedTuple):
    """The kills by kind, those during a save, and unreadable checkpoints."""

    kinds: Counter
    in_saves: int
    unreadable: list[str]


def kill_repeatedly(
    training: Training,
    kills: int,
    iterations: int,
    seconds: dict[str, float],
    rng: random.Random,
) -> Kills:
    """Kill and restart the training `kills` times, then train to the end."""
    training.start(restarts=kills)
    kinds, in_saves, unreadable, began = Counter(), 0, [], time.perf_counter()
    for number in range(kills):
        done = read_index(training.checkpoints[0]).iter if training.checkpoints else 0
        until = done + rng.uniform(0, 2) * (iterations - done) / (kills - number + 1)
        kind = KINDS[number % len(KINDS)]
        in_save = kill_once(training, kind, until, seconds, rng)
        if in_save is None:
            print('the training ended before all kills were done: raise --updates')
            break
        kinds[kind] += 1
        in_saves += in_save
        training.start()
        unreadable += training.unreadable()
        elapsed = time.perf_counter() - began
        left = elapsed / (number + 1) * (kills - number - 1) + seconds['start']
        print(
            f'kill {number + 1}/{kills} ({kind}{", in a save" if in_save else ""}) with {done} of '
            f'{iterations} iterations saved | {clock(left)} left',
            flush=True,
        )
    training.wait()
    return Kills(kinds, in_saves, unreadable)


def compare_trainings(training: Training, reference: Training) -> dict[str, list[str]]:
    """The keys that differ, by part of the last checkpoint and of the record."""
    (_, states), (_, expected) = (
        load_latest(t.run / 'checkpoints', print) for t in (training, reference)
    )
    different = {
        part: bit_differences([s[part] for s in states], [s[part] for s in expected], part)
        for part in expected[0]
    }
    record, expected_record = read_record(training.run), read_record(reference.run)
    for key in ('training_iterations', 'eval_steps', 'checkpoints'):
        same = without_measurements(record[key]) == without_measurements(expected_record[key])
        different[key] = [] if same else [key]
    return different


if __name__ == '__main__':
    sys.exit(main())
