"""Estimate the time of a study before it runs: from its budget, its records or a measurement."""

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from common import hardware
from common.errors import UserError
from common.formatting import counted
from comparison.runs import causal_flops
from model_builder import parameter_groups
from optim.step import GuardedOptimizer
from parallel.strategies import SingleProcess, recomputed_blocks
from studies.grid import merged_settings
from studies.outcome import summary_value
from studies.runner import StudyRunner, iterations_done
from studies.state import StudyState
from studies.trials import TIMING, StudyTrials, Trial
from studies.variants import TuneChoice
from training.memory_check import is_out_of_memory

# Variants with more FLOPs per micro-step are not measured; the limits suffice for models that train
# on such a device within a day.
LARGEST_MEASURED = {'cpu': 2e12}
LARGEST_MEASURED_ELSEWHERE = 1e15
MEASURING_SECONDS = 15.0  # of all measurements together
REPEAT_SECONDS = 0.3  # for which short iterations are repeated


Model = tuple[int | None, str]  # rung and variant


class TimeEstimate(NamedTuple):
    """Estimated seconds that a study still takes, and the basis of the estimate."""

    seconds: float
    source: str
    by_rung: dict[int | None, float]  # seconds by number of the rung
    speed_of: dict[int | None, int | None]  # rung -> the one whose speed it is assumed to have


class RunTime(NamedTuple):
    """Expected seconds of a run on a device of its own."""

    start: float  # of its process, until the run begins; 0 if unknown
    training: float  # with evaluations
    speed_of: int | None  # the rung whose speed it is assumed to have

    def left(self, share: float) -> float:
        """Seconds that remain after a share of the iterations (0 to 1)."""
        return self.start + self.training * (1 - share) if share < 1 else 0.0


class RunTimes:
    """The times of the runs of a study, from its complete runs and from iterations made now."""

    def __init__(self, state: StudyState):
        self.state, self.runner = state, state.runner
        self.recorded: dict[Model, list[float]] = {}  # seconds per FLOP, with evaluations
        self.measured: dict[Model, float] = {}  # seconds per FLOP, without evaluations
        self.starts: list[float] = []  # seconds
        self.evaluation_flops: dict[Trial, float] = {}
        for kind, of_kind in state.by_kind().items():
            for trial in of_kind:
                self.read(kind, trial)

    @property
    def source(self) -> str:
        """What the times are from."""
        runs = sum(map(len, self.recorded.values()))
        sources = []
        if runs:
            sources.append(f'of {counted(runs, "run")} in {self.runner.out_dir}')
        if self.measured:
            sources.append('of a few iterations made now')
        start = '' if self.starts else ', plus the start of each run'
        return f'at the speed {" and ".join(sources)}{start}'

    def read(self, kind: str, trial: Trial) -> None:
        """Use the record of a run, if it is complete."""
        with contextlib.suppress(UserError, KeyError, AttributeError, TypeError):
            outcome, record = self.runner.outcome(kind, trial), self.runner.record(kind, trial)
            if record is None or outcome is None or not outcome.is_final:
                return
            flops, seconds = causal_flops(record), summary_value(record, 'wall_seconds')
            if not flops or not seconds:
                return
            jobs = record['config'].get('concurrent_runs') or 1
            part = _devices(self.runner, jobs) / jobs  # of the time, on a device of its own
            self.recorded.setdefault((trial.rung, trial.variant), []).append(seconds * part / flops)
            start = self.runner.start_seconds(kind, trial)
            if start is not None:
                self.starts.append(start * part)

    def measure(self) -> None:
        """Measure the speed at the rungs without complete runs."""
        known = {rung for rung, _ in self.recorded}
        parts = [part for part in self.state.trials() if part.rung_number not in known]
        self.measured = dict(_measured_speeds(self.runner, parts)) if parts else {}

    def _speeds_by_rung(self) -> dict[int | None, dict[str, float]]:
        """Seconds per FLOP of each variant; measured ones at rungs without complete runs."""
        speeds: dict[int | None, dict[str, float]] = {}
        for (rung, variant), of_model in self.recorded.items():
            speeds.setdefault(rung, {})[variant] = statistics.fmean(of_model)
        recorded = {*speeds}
        for (rung, variant), speed in self.measured.items():
            if rung not in recorded:
                speeds.setdefault(rung, {})[variant] = speed
        return speeds

    def expected(self, trial: Trial) -> RunTime | None:
        """The time of a run; None if no speed is known.

        The speed is that of the nearest rung with a speed. There, it is the mean over variants if
        this one has none.
        """
        speeds = self._speeds_by_rung()
        if not speeds:
            return None
        rungs = sorted(speeds, key=lambda rung: rung or 0)
        nearest = min(rungs, key=lambda rung: abs((rung or 0) - (trial.rung or 0)))
        of_rung = speeds[nearest]
        speed = of_rung.get(trial.variant, statistics.fmean(of_rung.values()))
        flops = trial.flops or 0.0
        if all(rung != nearest for rung, _ in self.recorded):
            if trial not in self.evaluation_flops:
                self.evaluation_flops[trial] = _evaluation_flops(self.runner, trial)
            flops += self.evaluation_flops[trial]
        start = statistics.fmean(self.starts) if self.starts else 0.0
        return RunTime(start, flops * speed, nearest)


def estimate_time(
    state: StudyState, left: dict[str, list[Trial]], measure: bool
) -> TimeEstimate | None:
    """The time of the remaining trials; None if it is unknown.

    From the complete runs in out_dir; if `measure` is set, at rungs without any, from a few
    iterations made now.
    """
    runner = state.runner
    devices = _devices(runner, runner.jobs)
    if 'seconds' in runner.study.budget:
        runs = sum(len(of_kind) for kind, of_kind in left.items() if kind != TIMING)
        seconds = runner.study.budget['seconds'] * runs / devices
        return TimeEstimate(seconds, 'from the budget, plus evaluations', {None: seconds}, {})
    times = RunTimes(state)
    if measure:
        times.measure()
    by_rung: dict[int | None, float] = {}
    speed_of: dict[int | None, int | None] = {}
    for kind, of_kind in left.items():
        for trial in of_kind:
            time_of_run = times.expected(trial)
            if time_of_run is None:
                return None
            share = trial.share(iterations_done(runner.folder(kind, trial)))
            speed_of[trial.rung] = time_of_run.speed_of
            seconds = time_of_run.left(share) / devices
            by_rung[trial.rung] = by_rung.get(trial.rung, 0.0) + seconds
    return TimeEstimate(sum(by_rung.values()), times.source, by_rung, speed_of)


def _devices(runner: StudyRunner, jobs: int) -> int:
    """Number of runs with their own device; runs on a CPU share its cores."""
    on_gpu = runner.context.device.type == 'cuda'
    return max(1, min(jobs, torch.cuda.device_count())) if on_gpu else 1


def _measured_speeds(
    runner: StudyRunner, parts: list[StudyTrials]
) -> Iterator[tuple[Model, float]]:
    """Model and seconds per FLOP, measured now; slow variants are left out.

    One variant is measured at every rung before the next one.
    """
    began, device = time.perf_counter(), runner.context.device
    largest = LARGEST_MEASURED.get(device.type, LARGEST_MEASURED_ELSEWHERE)
    models = (
        (part.rung_number, part.variants[index])
        for index in range(max(len(part.variants) for part in parts))
        for part in parts
        if index < len(part.variants)
    )
    for rung, variant in models:
        choice = variant.choices[0]
        steps = choice.settings.run.gradient_accumulation_steps
        if (
            choice.flops_per_iter / steps > largest
            or time.perf_counter() - began > MEASURING_SECONDS
        ):
            continue
        with contextlib.suppress(UserError):
            yield (
                (rung, variant.label),
                measure_seconds_per_iter(choice, runner.context.device) / choice.flops_per_iter,
            )
        if device.type == 'cuda':
            torch.cuda.empty_cache()  # for the runs, while this process lasts


def measure_seconds_per_iter(choice: TuneChoice, device: torch.device) -> float:
    """Seconds per iteration without compilation: the mean over a few, one micro-step each.

    Raises UserError if memory does not suffice.
    """
    run, architecture = choice.settings.run, choice.settings.architecture
    parallel = SingleProcess(run, device)
    shape = run.batch_size, architecture.block_size
    tokens = torch.randint(architecture.vocab_size, shape, device=device)
    micro_step_times: list[float] = []
    update_times: list[float] = []
    until = 0.0
    try:
        recomputed = recomputed_blocks(run.activation_checkpointing, architecture.n_layer)
        model, _ = parallel.build(architecture, recomputed, compiled=False)
        inner = parallel.build_optimizer(parameter_groups(model), run)
        optimizer = GuardedOptimizer(inner, run, device, parallel)
        while len(update_times) < 3 or time.perf_counter() < until:
            hardware.synchronize(device)
            start = time.perf_counter()
            with hardware.autocast(device, run.dtype):
                loss_sum, _, auxiliary = model(tokens, tokens)
            loss = loss_sum / tokens.numel()
            optimizer.backward(loss + auxiliary.loss)
            hardware.synchronize(device)
            middle = time.perf_counter()
            optimizer.step(run.learning_rate, loss.detach(), measured=False)
            hardware.synchronize(device)
            micro_step_times.append(middle - start)
            update_times.append(time.perf_counter() - middle)
            if len(update_times) == 1:  # the warm-up
                until = time.perf_counter() + REPEAT_SECONDS
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError('not enough memory to measure an iteration') from error
        raise
    micro_step, update = (statistics.fmean(times[1:]) for times in (micro_step_times, update_times))
    return micro_step * run.gradient_accumulation_steps + update


def _evaluation_flops(runner: StudyRunner, trial: Trial) -> float:
    """FLOPs of a run's evaluations: forward passes, a third of the training FLOPs per token."""
    settings = merged_settings(trial.study, trial.overrides).resolve(*runner.context)
    run, block_size = settings.run, settings.architecture.block_size
    evaluations = 1 + math.ceil((trial.iterations or 0) / run.eval_interval)
    tokens = 2 * run.eval_iters * block_size  # of both splits
    return evaluations * tokens * trial.choice.flops_per_iter / trial.choice.tokens_per_iter / 3
