"""How long a study takes: how far it is while it runs, and an estimate before."""

import contextlib
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from common import hardware
from common.console_output import is_terminal, overwrite_line, write_progress
from common.errors import UserError
from common.formatting import duration
from comparison.runs import causal_flops
from model_builder import parameter_groups
from optim.step import Updater
from parallel.strategies import SingleProcess, recomputed_blocks
from records.run_folders import latest_run
from studies.grid import settings_of
from studies.runner import Job, Outcome, Runner, figure
from studies.variants import RUNS, TIMING, Choice, Layout, Point
from training.stability import is_out_of_memory

# A measurement of a variant takes as long as this many FLOPs at most, and of all of them so many
# seconds: enough for models that train on such a device within a day.
LARGEST_MEASURED = {'cpu': 2e12}
LARGEST_MEASURED_ELSEWHERE = 1e15
MEASURING_SECONDS = 15.0
UPDATE_SECONDS = 0.3  # of repetitions, where they are short


def updates_made(folder: Path) -> int:
    """Updates that the newest run in a folder has made, by the last whole line of its journal."""
    run = latest_run(folder)
    if run is None:
        return 0
    with (
        contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError),
        open(run / 'journal.jsonl', 'rb') as journal,
    ):
        journal.seek(max(0, journal.seek(0, os.SEEK_END) - 8192))
        for line in reversed(journal.read().split(b'\n')[:-1]):
            if line.startswith(b'{"kind": "iteration"'):
                return json.loads(line)['iter'] + 1
    return 0


# --- While it runs -------------------------------------------------------------------------------


class Progress:
    """One counter over the whole study: runs that have ended, those in progress, the time left.

    Time is estimated by FLOPs: those left, at the rate of those made since the start. With a budget
    in seconds, by that budget.
    """

    EVERY = 60.0  # seconds between lines where nobody watches; a terminal is kept up to date

    def __init__(self, runner: Runner, points: dict[str, list[Point]]):
        """points: all of the study by kind, as far as their options are known."""
        self.runner, self.points = runner, dict(points)
        self.over: set[Point] = set()  # ended, in whichever way
        self.kind = ''
        self.made_before: dict[Point, float] = {}
        self.began = self.shown = time.monotonic()

    def begin(self, kind: str, points: list[Point], waiting: list[Point]) -> None:
        """Of these points, now that all of their options are known, some are still to be run."""
        if not self.made_before:
            self.began = time.monotonic()
        self.kind, self.points[kind] = kind, points
        for point in waiting:
            self.made_before[point] = self._work(kind, point) * self._share(point)
        self.over |= set(points) - set(waiting)
        complete = len(points) - len(waiting)
        if complete:
            write_progress(f'{kind}: {complete} of {len(points)} runs are complete already')

    def _work(self, kind: str, point: Point) -> float:
        """What a run costs, in one unit throughout the study."""
        seconds = self.runner.study.budget.get('seconds')
        if seconds is None:
            return point.flops
        return 0.0 if kind == TIMING else seconds

    def _share(self, point: Point) -> float:
        """Which part of its updates the point's run has made."""
        made = updates_made(self.runner.folder(self.kind, point))
        return min(1.0, made / point.updates)

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Say what became of a run."""
        self.over.add(job.point)
        loss = None
        if outcome.kind == 'finished':
            with contextlib.suppress(UserError, KeyError, AttributeError):
                loss = figure(self.runner.record(self.kind, job.point), 'final_val_loss')
        reason = f' ({outcome.reason})' if outcome.reason else ''
        result = f'{outcome.kind}{reason}' if loss is None else f'validation loss {loss:.4f}'
        seconds = duration(time.monotonic() - job.began)
        kind = '' if self.kind == RUNS else f'{self.kind} '
        self._print(f'{self._count()} {kind}{job.point.folder}: {result}, {seconds}')

    def _count(self) -> str:
        return f'[{len(self.over)}/{sum(map(len, self.points.values()))}]'

    def seconds_left(self) -> float | None:
        """Of the whole study; None while nothing tells."""
        running = {job.point: self._share(job.point) for job in self.runner.running}
        left = made = 0.0
        for kind, points in self.points.items():
            for point in points:
                work = self._work(kind, point)
                share = 1.0 if point in self.over else running.get(point, 0.0)
                left += work * (1 - share)
                if point in self.made_before:
                    made += max(0.0, work * share - self.made_before[point])
        return left * (time.monotonic() - self.began) / made if made else None

    def show(self) -> None:
        """Where it is, now and then."""
        now = time.monotonic()
        every = 1.0 if is_terminal(sys.stdout) else self.EVERY
        if not self.runner.running or now - self.shown < every:
            return
        self.shown = now
        current = ', '.join(
            f'{job.point.folder} {updates_made(self.runner.folder(self.kind, job.point))}'
            f'/{job.point.updates}'
            for job in self.runner.running
        )
        seconds = self.seconds_left()
        left = 'unknown' if seconds is None else duration(seconds)
        self._print(f'{self._count()} {current}; time left {left}', passing=True)

    def _print(self, text: str, passing: bool = False) -> None:
        if not is_terminal(sys.stdout):
            write_progress(text)
        elif passing:  # it is written over by the next, so it has to fit on one line
            overwrite_line(text[: shutil.get_terminal_size().columns - 1])
        else:
            overwrite_line(text)
            write_progress('')


# --- Before it runs ------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """Seconds of what is left of a study, and what they are known from."""

    seconds: float
    source: str


def estimate(
    runner: Runner, layout: Layout, left: dict[str, list[Point]], measure: bool
) -> Estimate | None:
    """The time of the points that are left; None if nothing tells.

    From the runs in out_dir; without any, where `measure` is set, from a few updates made now.
    """
    at_once = _at_once(runner, runner.jobs)
    if 'seconds' in runner.study.budget:
        runs = sum(len(points) for kind, points in left.items() if kind != TIMING)
        seconds = runner.study.budget['seconds'] * runs / at_once
        return Estimate(seconds, 'by its budget, and some more for evaluations')
    speeds: dict[str, list[float]] = {}
    number = 0
    for variant, speed in _recorded_speeds(runner, layout):
        speeds.setdefault(variant, []).append(speed)
        number += 1
    source = f'at the speed of {number} run{"s" * (number > 1)} in {runner.out_dir}'
    if not number and measure:
        speeds = {variant: [speed] for variant, speed in _measured_speeds(runner, layout)}
        source = 'at the speed of a few updates made now, and some more for the start of each run'
    if not speeds:
        return None
    by_variant = {variant: statistics.fmean(values) for variant, values in speeds.items()}
    typical = statistics.fmean(by_variant.values())
    seconds = 0.0
    for kind, points in left.items():
        for point in points:
            done = updates_made(runner.folder(kind, point)) / point.updates
            # A recorded speed is that of a whole run.
            extra = 0.0 if number else _evaluation_flops(runner, point)
            flops = (point.flops + extra) * max(0.0, 1 - done)
            seconds += flops * by_variant.get(point.variant, typical)
    return Estimate(seconds / at_once, source)


def _at_once(runner: Runner, jobs: int) -> int:
    """How many runs get a device of their own; on a CPU they share its cores."""
    on_gpu = runner.where[0].type == 'cuda'
    return max(1, min(jobs, torch.cuda.device_count())) if on_gpu else 1


def _recorded_speeds(runner: Runner, layout: Layout) -> Iterator[tuple[str, float]]:
    """Variant and seconds a FLOP, on a device of its own, of each run that has made some."""
    for kind, points in layout.points().items():
        for point in points:
            with contextlib.suppress(UserError, KeyError, AttributeError, TypeError):
                record = runner.record(kind, point)
                flops, seconds = causal_flops(record), figure(record, 'wall_seconds')
                if not flops or not seconds:
                    continue
                jobs = record['config'].get('concurrent_runs') or 1
                yield point.variant, seconds * _at_once(runner, jobs) / jobs / flops


def _measured_speeds(runner: Runner, layout: Layout) -> Iterator[tuple[str, float]]:
    """Variant and seconds a FLOP, measured now, as far as that takes no longer than seconds."""
    began, device = time.perf_counter(), runner.where[0]
    largest = LARGEST_MEASURED.get(device.type, LARGEST_MEASURED_ELSEWHERE)
    for variant in layout.variants:
        choice = variant.choices[0]
        steps = choice.settings.run.gradient_accumulation_steps
        if choice.flops / steps > largest or time.perf_counter() - began > MEASURING_SECONDS:
            continue
        with contextlib.suppress(UserError):
            yield variant.label, seconds_of_update(choice, runner.where[0]) / choice.flops


def seconds_of_update(choice: Choice, device: torch.device) -> float:
    """How long an update takes now, without compilation: the mean of a few, one micro-step each.

    Raises UserError where the memory does not suffice.
    """
    run, architecture = choice.settings.run, choice.settings.architecture
    parallel = SingleProcess(run, device)
    shape = run.batch_size, architecture.block_size
    tokens = torch.randint(architecture.vocab_size, shape, device=device)
    micro_steps, updates = [], []
    until = 0.0
    try:
        recomputed = recomputed_blocks(run.activation_checkpointing, architecture.n_layer)
        model, _ = parallel.build(architecture, recomputed, compiled=False)
        optimizer = parallel.build_optimizer(parameter_groups(model), run)
        updater = Updater(optimizer, run, device, parallel)
        while len(updates) < 3 or time.perf_counter() < until:
            hardware.synchronize(device)
            began = time.perf_counter()
            with hardware.autocast(device, run.dtype):
                loss_sum, _, auxiliary = model(tokens, tokens)
            loss = loss_sum / tokens.numel()
            updater.backward(loss + auxiliary.loss)
            hardware.synchronize(device)
            middle = time.perf_counter()
            updater.update(run.learning_rate, loss.detach(), measured=False)
            hardware.synchronize(device)
            micro_steps.append(middle - began)
            updates.append(time.perf_counter() - middle)
            if len(updates) == 1:  # which warmed up
                until = time.perf_counter() + UPDATE_SECONDS
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError('not enough memory to measure an update') from error
        raise
    steps, update = statistics.fmean(micro_steps[1:]), statistics.fmean(updates[1:])
    return steps * run.gradient_accumulation_steps + update


def _evaluation_flops(runner: Runner, point: Point) -> float:
    """Of a run's evaluations: forward passes, which are a third of training's FLOPs."""
    settings = settings_of(runner.study, point.overrides).complete(*runner.where)
    run, block_size = settings.run, settings.architecture.block_size
    evaluations = 1 + math.ceil(point.updates / run.eval_interval)
    tokens = 2 * run.eval_iters * block_size  # of both splits
    return evaluations * tokens * point.choice.flops / point.choice.tokens / 3
