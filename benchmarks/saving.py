"""Time that saving a checkpoint takes from training, with and without async_save.

    python benchmarks/saving.py [strategy …] [--turns=5] [--ranks=2] [--key=value …]

A model of 124 M parameters (1.5 GB with AdamW's state) is trained on random tokens, by default with
one sequence of 128 tokens per iteration and process. These alternate in one process: some
iterations, a save with async_save=False, some iterations, a save with async_save=True. The time of
a save runs from its start until the checkpoint is published, older ones are removed, and the
current iteration is complete, minus the time of the iterations in between (by the median of those
right before and after). So it includes any slowdown of iterations by the writing thread.

Strategies: single (the default); ddp, zero1 and fsdp with --ranks processes. Other options are
those of train.py. The first save of each kind is reported separately, because it allocates the host
copy. Each strategy takes about 3 minutes on two slow cores, and up to 5 GB of disk.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import torch  # noqa: E402

import train  # noqa: E402
from benchmarks.record_overhead import random_tokens  # noqa: E402
from common import hardware  # noqa: E402
from common.formatting import table  # noqa: E402
from records.record import read_record  # noqa: E402
from records.run_folders import latest_run  # noqa: E402
from training.checkpoint_writer import CheckpointManager  # noqa: E402
from training.session import Session  # noqa: E402
from training_config import TrainingConfig  # noqa: E402

STRATEGIES = {
    'single': [],
    'ddp': [],
    'zero1': ['--use_zero1=True'],
    'fsdp': ['--use_fsdp=True'],
}
MODES = {'at once': False, 'beside': True}
UPDATES = 5  # iterations between saves
OPTIONS = {
    'block_size': 128,
    'batch_size': 1,
    'max_iters': 10**6,
    'log_interval': 10**6,
    'peak_tflops': 1,  # otherwise it is measured at the start
    'compile': False,
}


# --- One rank -------------------------------------------------------------------------------------


def measure(session: Session, turns: int) -> dict[str, list[dict]]:
    """Mode -> one entry per save, including the first."""
    clock = hardware.StepClock(session.device)
    run, device = session.settings.run, session.device

    def update() -> None:
        train.run_iteration(session, clock)
        hardware.synchronize(device)

    def plain() -> list[float]:
        seconds = []
        for _ in range(UPDATES):
            began = time.perf_counter()
            update()
            seconds.append(time.perf_counter() - began)
        return seconds

    def save() -> tuple[float, int]:
        """Seconds until the save is complete, and the number of iterations meanwhile."""
        began, made = time.perf_counter(), 0
        train.save(session)
        while session.checkpoints.in_progress:
            update()
            made += 1
            session.signals.sync(session.parallel, session.checkpoints.writing)
            if session.checkpoints.in_progress and not session.signals.checkpoint_writing:
                session.checkpoints.publish()
        session.checkpoints.finish()
        return time.perf_counter() - began, made

    savers = {
        mode: CheckpointManager(
            TrainingConfig({**run.to_dict(), 'async_save': asynchronous}, run.origins),
            device,
            session.parallel,
            session.logger,
        )
        for mode, asynchronous in MODES.items()
    }
    update()  # warm-up: optimizer state, caches
    measured_saves = {mode: [] for mode in MODES}
    began, before = time.perf_counter(), plain()
    for turn in range(turns + 1):
        for mode, checkpoints in savers.items():
            session.checkpoints = checkpoints
            seconds, made = save()
            after = plain()
            usual = statistics.median(before + after)
            entry = {'seconds': seconds, 'updates': made, 'update': usual}
            measured_saves[mode].append({**entry, 'taken': seconds - made * usual})
            before = after
        if session.parallel.is_main:
            left = (time.perf_counter() - began) / (turn + 1) * (turns - turn)
            print(f'  turn {turn} of {turns} | {left:.0f} s left', file=sys.stderr, flush=True)
    return measured_saves


def work(turns: int, result: str, arguments: list[str]) -> None:
    """Set up a run as in train.py, measure it, and write the results to a file."""

    def run(session: Session) -> int:
        measured_saves = measure(session, turns)
        if session.parallel.is_main:
            Path(result).write_text(json.dumps(measured_saves))
        return 0

    train.run_training = run
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        train.main(arguments)


# --- Results --------------------------------------------------------------------------------------


def measured(strategy: str, ranks: int, turns: int, given: list[str]) -> dict[str, list[dict]]:
    """The results of `work` in separate processes, together with the values in the record."""
    size = 1 if strategy == 'single' else ranks
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={size}']
    with tempfile.TemporaryDirectory(prefix='saving_') as folder:
        options = {**OPTIONS, 'gradient_accumulation_steps': size, 'out_dir': f'{folder}/out'}
        options['dataset'] = random_tokens(Path(folder))
        arguments = [
            str(PROJECT / 'config/arch_gpt2.py'),
            *(f'--{key}={value}' for key, value in options.items()),
            *STRATEGIES[strategy],
            *given,
        ]
        result = f'{folder}/result.json'
        command = [sys.executable, *(launcher if size > 1 else []), __file__]
        command += ['--worker', result, f'--turns={turns}', *arguments]
        threads = str(max(1, torch.get_num_threads() // size))
        subprocess.run(command, env={'OMP_NUM_THREADS': threads, **os.environ}, check=True)
        measured_saves = json.loads(Path(result).read_text())
        saves = iter(read_record(latest_run(f'{folder}/out'))['checkpoints'])
    for entry in (entry for both in zip(*measured_saves.values()) for entry in both):
        saved = next(saves)
        entry |= {key: saved[key] / 1e3 for key in ('time_ms', 'write_ms')}
    return measured_saves


def results_table(measured_saves: dict[str, dict[str, list[dict]]]) -> str:
    titles = ('', '', 'taken from training', 'first', 'waited', 'writing', 'beside', 'an update')
    rows = [titles]
    for strategy, by_mode in measured_saves.items():
        for mode, (first, *entries) in by_mode.items():
            values = {key: [entry[key] for entry in entries] for key in first}
            middle = {key: statistics.median(column) for key, column in values.items()}
            rows.append(
                (
                    strategy,
                    mode,
                    f'{middle["taken"]:.2f} [{min(values["taken"]):.2f}, '
                    f'{max(values["taken"]):.2f}]',
                    f'{first["taken"]:.2f}',
                    f'{middle["time_ms"]:.2f}',
                    f'{middle["write_ms"]:.2f}',
                    f'{middle["updates"]:.0f}',
                    f'{middle["update"]:.2f}',
                )
            )
    return table(rows, '<' * len(titles))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--turns', type=int, default=5, help='Saves of each kind (default 5)')
    parser.add_argument(
        '--ranks', type=int, default=2, help='Processes of ddp, zero1 and fsdp (default 2)'
    )
    parser.add_argument('--worker', help=argparse.SUPPRESS)  # file for the results of a rank
    options, given = parser.parse_known_args(argv)
    if options.worker:
        work(options.turns, options.worker, given)
        return
    strategies = [name for name in given if name in STRATEGIES] or ['single']
    given = [name for name in given if name not in STRATEGIES]
    measured_saves = {}
    for number, strategy in enumerate(strategies, 1):
        print(f'{strategy}, {number} of {len(strategies)}', file=sys.stderr, flush=True)
        measured_saves[strategy] = measured(strategy, options.ranks, options.turns, given)
    device = hardware.device_name(hardware.select_device('auto'))
    print(f'torch {torch.__version__}, {device}, {torch.get_num_threads()} threads')
    print(
        f'Medians [minimum, maximum] of {options.turns} saves, in seconds. first: the first save; '
        f'waited: time_ms\nof the record; writing: write_ms of the slowest rank; beside: '
        f'iterations meanwhile.\n'
    )
    print(results_table(measured_saves))


if __name__ == '__main__':
    main(sys.argv[1:])
