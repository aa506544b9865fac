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


def estimate_time(
    state: StudyState, left: dict[str, list[Trial]], measure: bool
) -> TimeEstimate | None:
    """The time of the remaining trials; None if it is unknown.

    From the runs in out_dir; without any, if `measure` is set, from a few iterations made now.
    """
    runner = state.runner
    devices = _devices(runner, runner.jobs)
    if 'seconds' in runner.study.budget:
        runs = sum(len(of_kind) for kind, of_kind in left.items() if kind != TIMING)
        seconds = runner.study.budget['seconds'] * runs / devices
        return TimeEstimate(seconds, 'from the budget, plus evaluations', {None: seconds}, {})
    speeds: dict[Model, list[float]] = {}
    recorded = 0
    for model, speed in _recorded_speeds(runner, state.by_kind()):
        speeds.setdefault(model, []).append(speed)
        recorded += 1
    source = f'at the speed of {counted(recorded, "run")} in {runner.out_dir}'
    if not recorded and measure:
        speeds = {model: [speed] for model, speed in _measured_speeds(runner, state.trials())}
        source = 'at the speed of a few iterations made now, plus the start of each run'
    if not speeds:
        return None
    by_model = {model: statistics.fmean(values) for model, values in speeds.items()}
    by_rung: dict[int | None, float] = {}
    speed_of: dict[int | None, int | None] = {}
    for kind, of_kind in left.items():
        for trial in of_kind:
            share = trial.share(iterations_done(runner.folder(kind, trial)))
            # A recorded speed includes evaluations.
            extra = 0.0 if recorded else _evaluation_flops(runner, trial)
            flops = ((trial.flops or 0.0) + extra) * (1 - share)
            speed, speed_of[trial.rung] = _nearest_speed(by_model, trial)
            by_rung[trial.rung] = by_rung.get(trial.rung, 0.0) + flops * speed / devices
    return TimeEstimate(sum(by_rung.values()), source, by_rung, speed_of)


def _nearest_speed(by_model: dict[Model, float], trial: Trial) -> tuple[float, int | None]:
    """Seconds per FLOP of a trial, and the rung that they are from: the nearest with a speed.

    The mean over its variants, if this one has no speed there.
    """
    rungs = sorted({rung for rung, _ in by_model}, key=lambda rung: rung or 0)
    nearest = min(rungs, key=lambda rung: abs((rung or 0) - (trial.rung or 0)))
    of_rung = {variant: speed for (rung, variant), speed in by_model.items() if rung == nearest}
    return of_rung.get(trial.variant, statistics.fmean(of_rung.values())), nearest


def _devices(runner: StudyRunner, jobs: int) -> int:
    """Number of runs with their own device; runs on a CPU share its cores."""
    on_gpu = runner.context.device.type == 'cuda'
    return max(1, min(jobs, torch.cuda.device_count())) if on_gpu else 1


def _recorded_speeds(
    runner: StudyRunner, by_kind: dict[str, list[Trial]]
) -> Iterator[tuple[Model, float]]:
    """Model and seconds per FLOP, on its own device, of each recorded run."""
    for kind, of_kind in by_kind.items():
        for trial in of_kind:
            with contextlib.suppress(UserError, KeyError, AttributeError, TypeError):
                record = runner.record(kind, trial)
                if record is None:
                    continue
                flops, seconds = causal_flops(record), summary_value(record, 'wall_seconds')
                if not flops or not seconds:
                    continue
                jobs = record['config'].get('concurrent_runs') or 1
                model = trial.rung, trial.variant
                yield model, seconds * _devices(runner, jobs) / jobs / flops


def _measured_speeds(
    runner: StudyRunner, parts: list[StudyTrials]
) -> Iterator[tuple[Model, float]]:
    """Model and seconds per FLOP, measured now; slow variants are left out.

    One variant is measured at every rung before the next one.
    """
    began, device = time.perf_counter(), runner.context.device
    largest = LARGEST_MEASURED.get(device.type, LARGEST_MEASURED_ELSEWHERE)
    models = (
        (part.rung and part.rung.number, part.variants[index])
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
