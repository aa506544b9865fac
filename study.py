"""Run a study: the grid of runs that a config file asks for, then the comparison.

    python study.py config/studies/gated_ffn.py
    python study.py config/studies/gated_ffn.py --jobs=2 --n_layer=4

The file is a config file of train.py with a grid beside the usual keys, for example

    sweep = {'ffn_type': ['standard', 'swiglu'], 'seed': [1, 2, 3]}

Each point is a process of its own: train.py with the options of the point, in a folder of its own
below out_dir. Points that are complete are skipped, interrupted ones resumed, failed ones reported
and tried again the next time. Ctrl-C stops after the update in progress, with everything saved.
What stands behind the file on the command line is handed to every run. Keys of a study:

    question    what it is to answer, a line for the report
    sweep       {option: [values]}: every combination; 'seed' varies the data's seed with it
    ablate      {option: [values]}: the base, and each single change of it
    exclude     [{option: value}, …]: points of the grid to leave out
    match       'params' or 'flops': make the variants equal to the `reference` (a dict of options,
                by default the base) by changing `match_by` ('d_ff', or another size) in steps of
                `match_step` (8)
    baseline    the variant that the others are compared with, a dict of options (by default the
                `reference`, else the first of the grid)
    budget      {'iterations' | 'tokens' | 'flops' | 'seconds': amount} for each run
    tune        {option: [values]}: each variant first chooses its own best, at `tune_seed` (0),
                which is no seed of the sweep
"""

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

import compare_architectures
import hardware
from comparison_text import duration, table
from configurator import CommandLine, format_help, read_command_line
from console_output import is_terminal, overwrite_line, write_progress, write_text
from errors import UserError, run_script
from registry import Option, at_least
from report import write
from study_points import (
    STUDY_KEYS,
    Point,
    Study,
    Variant,
    baseline_of,
    iterations,
    points_of,
    read_study,
    seeds_of,
    settings_of,
    tuning_points,
    variants,
)
from token_data import load_dataset, prepare_if_missing
from training_config import schema as training_schema
from training_logger import latest_run, read_record

TRAIN = Path(__file__).with_name('train.py')
OPTIONS = {
    'jobs': Option(
        int,
        1,
        'Runs at a time, on the GPUs that there are or sharing the cores; '
        'times are then not compared',
        check=at_least(1),
    ),
    'plan_only': Option(bool, False, 'Show the runs and start none'),
}
RUNS, TUNING, TIMING = 'runs', 'tuning', 'timing'  # folders below out_dir
TIMED_UPDATES = 10  # to learn the seconds of an update; the record leaves the first out
# Options that say where a run goes and how it reports: two runs that differ in them are one.
IMMATERIAL = compare_architectures.REPORTING | {'init_from', 'resume_run', 'debug'}


def schema() -> dict:
    return {'Study': OPTIONS, **training_schema()}


def main(argv: list[str]) -> int:
    asked = read_command_line(argv, schema, aside=STUDY_KEYS)
    if asked.help and not asked.problems:
        write_text(format_help(__doc__, schema()))
        return 0
    study = read_study(asked)
    settings = settings_of(study, {})
    base = settings.run
    device = hardware.select_device(base.device)
    dtype = hardware.resolve_dtype(base.dtype, device)
    prepare_if_missing(base.dataset)
    dataset = load_dataset(base.dataset, settings.architecture.block_size)
    found = variants(study, device, dtype, dataset)
    baseline = baseline_of(study, found)
    write_progress(describe(study, found))
    if asked.value('plan_only', schema):
        return 0
    runner = Runner(study, asked, Path(base.out_dir), (device, dtype, dataset))
    with runner:
        return conduct(study, found, baseline, runner)


def describe(study: Study, found: list[Variant]) -> str:
    """The variants, what was changed to make them equal, and the number of runs."""
    seeds = len(seeds_of(study))
    matching = study.match != 'none'
    rows = [['variant', *[study.match_by, f'{study.match} off by'] * matching, 'architecture']]
    for variant in found:
        row = [variant.label]
        if matching:
            value, was, mismatch = variant.matched.values()
            row += [f'{value:,}' + (f' (was {was:,})' if was != value else ''), f'{mismatch:+.3%}']
        rows.append([*row, variant.settings.architecture.name])
    return '\n'.join(
        [
            *([study.question] if study.question else []),
            f'{study.path}: {len(found)} variants, {seeds} seed{"s" if seeds > 1 else ""} of each',
            table(rows, '<' + '>>' * matching + '<'),
        ]
    )


# --- What is run, and in which order -------------------------------------------------------------


def conduct(study: Study, found: list[Variant], baseline: Variant, runner: 'Runner') -> int:
    """Time and tune where the study asks for it, run every point, compare. The exit code."""
    chosen: dict[str, dict] = {variant.label: {} for variant in found}
    tuning: dict[str, Tuned] = {}
    seconds: dict[str, float] = {}
    try:
        if 'seconds' in study.budget:
            seconds = seconds_of_updates(found, runner)
        for variant in found:
            updates = iterations(study, variant, seconds.get(variant.label))
            if updates is not None:
                chosen[variant.label]['max_iters'] = updates
        if study.tune:
            tuning = tuned(study, found, chosen, runner)
            for label, best in tuning.items():
                chosen[label] |= best.values
        points = points_of(study, found, chosen)
        write_plan(study, found, baseline, tuning, points, runner)
        failed = runner.run(RUNS, points)
    except Stopped as stop:
        write_progress(f'\nstopped, with everything saved. To go on: {runner.command}')
        return 128 + stop.signal
    if len(failed) < len(points):
        write_progress('')
        compare_architectures.main([str(runner.out_dir / RUNS)])
    for point in failed:
        console = runner.folder(RUNS, point) / 'console.txt'
        write_progress(
            f'failed: {point.folder}: {console} says why; the same command tries it again'
        )
    return 1 if failed else 0


def seconds_of_updates(found: list[Variant], runner: 'Runner') -> dict[str, float]:
    """Each variant's seconds an update, from a few updates of it alone on the machine."""
    points = [
        Point(v.label.replace('/', '_'), v.label, {**v.overrides, 'max_iters': TIMED_UPDATES})
        for v in found
    ]
    records = runner.records(TIMING, points, jobs=1)
    return {p.variant: records[p]['summary']['avg_time_ms'] / 1000 for p in points}


class Tuned(NamedTuple):
    """What tuning chose for a variant, and which of the values are the first or last of a list."""

    values: dict
    at_edge: list[str]


def tuned(
    study: Study, found: list[Variant], chosen: dict[str, dict], runner: 'Runner'
) -> dict[str, Tuned]:
    """Each variant's best setting of the keys of `tune`, by validation loss."""
    points = tuning_points(study, found, chosen)
    records = runner.records(TUNING, points)
    best: dict[str, tuple[float, Point]] = {}
    for point in points:
        loss = records[point]['summary']['best_val_loss']
        if loss is not None and loss < best.get(point.variant, (float('inf'),))[0]:
            best[point.variant] = loss, point
    result = {}
    for variant in found:
        if variant.label not in best:
            raise UserError(f'{study.path}: no run that tuned {variant.label} has a loss.')
        loss, point = best[variant.label]
        values = {key: point.overrides[key] for key in study.tune}
        at_edge = [key for key, choices in study.tune.items() if is_at_edge(values[key], choices)]
        result[variant.label] = Tuned(values, at_edge)
        shown = ', '.join(f'{k}={v}' for k, v in values.items())
        beyond = f'; {", ".join(at_edge)} is at the end of its list: try beyond' if at_edge else ''
        write_progress(f'tuned {variant.label}: {shown} (validation loss {loss:.4f}{beyond})')
    return result


def is_at_edge(value, choices: list) -> bool:
    """Whether a larger or smaller value than any of the list might be better still."""
    numbers = all(type(choice) in (int, float) for choice in choices)
    return numbers and len(choices) > 1 and value in (min(choices), max(choices))


def write_plan(
    study: Study,
    found: list[Variant],
    baseline: Variant,
    tuning: dict[str, Tuned],
    points: list[Point],
    runner: 'Runner',
) -> None:
    """`study.json` beside the runs: the question, what was made equal, every command."""
    plan = {
        'question': study.question,
        'command': runner.command,
        'study_file': study.asked.config_files[0],
        'match': study.match,
        'match_by': study.match_by,
        'budget': study.budget,
        'tuned': list(study.tune),
        'baseline': baseline.label,
        'variants': [
            {
                'label': v.label,
                'asked': v.asked,
                'matched': v.matched or None,
                'tuned': tuning[v.label].values if v.label in tuning else {},
                'tuned_at_edge': tuning[v.label].at_edge if v.label in tuning else [],
            }
            for v in found
        ],
        'points': [
            {
                'folder': f'{RUNS}/{point.folder}',
                'variant': point.variant,
                'command': shlex.join(runner.arguments(RUNS, point)),
            }
            for point in points
        ],
    }
    runner.out_dir.mkdir(parents=True, exist_ok=True)
    write(runner.out_dir / 'study.json', json.dumps(plan, indent=1).encode())


# --- Processes -----------------------------------------------------------------------------------


class Stopped(Exception):
    """The study was asked to stop, and its runs have ended."""

    def __init__(self, number: int):
        self.signal = number


@dataclass
class Job:
    """A run in progress."""

    point: Point
    process: subprocess.Popen
    began: float = field(default_factory=time.monotonic)


class Runner:
    """Runs points as processes. While entered, SIGINT and SIGTERM stop them, and then the study."""

    def __init__(self, study: Study, asked: CommandLine, out_dir: Path, surroundings: tuple):
        self.study, self.out_dir, self.surroundings = study, out_dir, surroundings
        self.jobs = asked.value('jobs', schema)
        own = asked.layers[-1].values  # the command line's
        self.passed = [f'--{key}={value}' for key, value in own.items() if key not in OPTIONS]
        options = [f'--{key}={value}' for key, value in own.items()]
        self.command = shlex.join(['python', 'study.py', study.path, *options])
        self.wandb = asked.value('wandb_log', schema)
        self.stop_signal: int | None = None
        self.running: list[Job] = []

    def __enter__(self) -> 'Runner':
        self._before = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for job in self.running:
            job.process.terminate()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame) -> None:
        self.stop_signal = number
        os.write(2, b'\nstopping: each run saves after its update; once more to stop at once\n')
        for job in self.running:
            job.process.terminate()

    def folder(self, kind: str, point: Point) -> Path:
        return self.out_dir / kind / point.folder

    def arguments(self, kind: str, point: Point, jobs: int | None = None) -> list[str]:
        """The command that makes the point's run, or goes on with it."""
        return [
            *('python', 'train.py', self.study.path, *self.passed, *point.arguments()),
            *('--init_from=auto', f'--out_dir={self.folder(kind, point)}', '--log_style=line'),
            f'--concurrent_runs={jobs or self.jobs}',
            *([f'--wandb_run_name={point.folder}'] if self.wandb else []),
        ]

    def records(self, kind: str, points: list[Point], jobs: int | None = None) -> dict:
        """The record of each point, all of which must succeed. Raises UserError."""
        failed = self.run(kind, points, jobs)
        if failed:
            consoles = ', '.join(str(self.folder(kind, p) / 'console.txt') for p in failed)
            raise UserError(f'{len(failed)} runs that the study builds on failed: see {consoles}')
        return {point: read_record(latest_run(self.folder(kind, point))) for point in points}

    def run(self, kind: str, points: list[Point], jobs: int | None = None) -> list[Point]:
        """Run what is not complete; the points that failed. Raises Stopped."""
        jobs = jobs or self.jobs
        waiting = [point for point in points if not self.complete(kind, point)]
        progress = Progress(kind, points, waiting, self)
        failed: list[Point] = []
        free = list(range(jobs))  # places, so that runs at a time have a GPU or cores each
        places: dict[int, int] = {}
        while waiting or self.running:
            while waiting and free and self.stop_signal is None:
                job = self._start(kind, waiting.pop(0), free[0], jobs)
                places[job.process.pid] = free.pop(0)
                self.running.append(job)
            for job in [job for job in self.running if job.process.poll() is not None]:
                self.running.remove(job)
                free.append(places.pop(job.process.pid))
                if job.process.returncode and self.stop_signal is None:
                    failed.append(job.point)
                progress.ended(job)
            if self.stop_signal is not None and not self.running:
                raise Stopped(self.stop_signal)
            progress.show()
            time.sleep(0.2)
        return failed

    def complete(self, kind: str, point: Point) -> bool:
        """Whether the point's run is finished. Raises UserError if it was another study's."""
        folder = latest_run(self.folder(kind, point))
        if folder is None:
            return False
        record = read_record(folder)
        if record['status'] != 'finished':
            return False
        wanted = settings_of(self.study, point.overrides).complete(*self.surroundings).to_dict()
        found = record['config']
        differing = [
            f'{key}={found[key]!r} (now {value!r})'
            for key, value in wanted.items()
            if key in found and found[key] != value and key not in IMMATERIAL
        ]
        if differing:
            raise UserError(
                f'{folder} was run with {", ".join(differing)}: the study has changed since. Give '
                f'it another folder by --out_dir=FOLDER, or remove {self.out_dir}.'
            )
        return True

    def _start(self, kind: str, point: Point, place: int, jobs: int) -> Job:
        folder = self.folder(kind, point)
        folder.mkdir(parents=True, exist_ok=True)
        device, environment = self.surroundings[0], dict(os.environ)
        environment.setdefault('WANDB_RUN_GROUP', point.variant)  # has no effect without W&B
        if jobs > 1 and device.type == 'cuda':
            environment['CUDA_VISIBLE_DEVICES'] = str(place % torch.cuda.device_count())
        elif jobs > 1:
            environment.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // jobs)))
        with open(folder / 'console.txt', 'ab') as console:
            process = subprocess.Popen(
                [sys.executable, str(TRAIN), *self.arguments(kind, point, jobs)[2:]],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches it through us, once
                preexec_fn=_end_with_parent(),
            )
        return Job(point, process)


def _end_with_parent() -> Callable[[], None] | None:
    """For the child to call: be told to save and stop should the study itself be killed."""
    if not sys.platform.startswith('linux'):
        return None
    prctl, set_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_signal, signal.SIGTERM)


class Progress:
    """One line over the whole study: points done, what runs now, the time that is left."""

    EVERY = 60.0  # seconds between lines where nobody watches; a terminal is kept up to date

    def __init__(self, kind: str, points: list[Point], waiting: list[Point], runner: Runner):
        self.kind, self.points, self.runner = kind, points, runner
        self.todo = {point: self._updates(point) for point in waiting}
        self.at_start = {point: self._done(point) for point in waiting}
        self.began, self.shown = time.monotonic(), 0.0
        self.ended_points: set[Point] = set()
        done = len(points) - len(waiting)
        if done:
            write_progress(f'{kind}: {done} of {len(points)} runs are complete already')

    def _updates(self, point: Point) -> int:
        return settings_of(self.runner.study, point.overrides).run.max_iters

    def _done(self, point: Point) -> int:
        """Updates that the point's run has made, by the last whole line of its journal."""
        run = latest_run(self.runner.folder(self.kind, point))
        if run is None:
            return 0
        with (
            contextlib.suppress(OSError, ValueError, AttributeError),
            open(run / 'journal.jsonl', 'rb') as journal,
        ):
            journal.seek(max(0, journal.seek(0, os.SEEK_END) - 8192))
            for line in reversed(journal.read().split(b'\n')[:-1]):
                if line.startswith(b'{"kind": "iteration"'):
                    return json.loads(line)['iter'] + 1
        return 0

    def ended(self, job: Job) -> None:
        self.ended_points.add(job.point)
        seconds = duration(time.monotonic() - job.began)
        code = job.process.returncode
        loss = None
        run = latest_run(self.runner.folder(self.kind, job.point))
        if code == 0 and run is not None:
            loss = read_record(run)['summary']['best_val_loss']
        result = f'validation loss {loss:.4f}' if loss is not None else f'exit code {code}'
        number = len(self.points) - len(self.todo) + len(self.ended_points)
        self._print(f'[{number}/{len(self.points)}] {job.point.folder}: {result}, {seconds}')

    def show(self) -> None:
        now = time.monotonic()
        if not self.runner.running or now - self.shown < (
            1.0 if is_terminal(sys.stdout) else self.EVERY
        ):
            return
        self.shown = now
        made = {
            point: self._done(point) if point not in self.ended_points else total
            for point, total in self.todo.items()
        }
        new = sum(made.values()) - sum(self.at_start.values())
        left = sum(self.todo.values()) - sum(made.values())
        seconds = left * (now - self.began) / new if new > 0 else None
        remaining = duration(seconds) if seconds is not None else 'unknown'
        current = ', '.join(
            f'{job.point.folder} {made[job.point]}/{self.todo[job.point]}'
            for job in self.runner.running
        )
        self._print(f'{current}; time left {remaining}', passing=True)

    def _print(self, text: str, passing: bool = False) -> None:
        if not is_terminal(sys.stdout):
            write_progress(text)
        else:  # a passing line is written over by the next
            overwrite_line(text)
            if not passing:
                write_progress('')


if __name__ == '__main__':
    run_script(main)
