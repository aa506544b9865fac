"""Measured memory of training on a CPU, for `tests/planning/test_plan.py`.

    python memory_run.py CASES.json

Each case is a list of options of `train.py`. Its model is trained for two iterations as one rank of
a simulated process group, whose collectives return at once. The output is JSON: for each case the
peak of allocated bytes in the second iteration, according to the profiler of torch.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contestants import form_make_believe_group
from common import hardware
from configurator import read_command_line
from model_builder import parameter_groups
from optim.step import GuardedOptimizer
from parallel import strategies
from parallel.fully_sharded import FullySharded
from planning.plan import completed_settings
from training_config import Settings, load_settings, schema

CPU = torch.device('cpu')


def strategy(run) -> type[strategies.SingleProcess]:
    if run.use_fsdp:
        return FullySharded
    return strategies.ZeRO1 if run.use_zero1 else strategies.DataParallel


class Training:
    """Training of a model as rank 0 of its process group."""

    def __init__(self, settings: Settings):
        self.run, self.architecture = settings.run, settings.architecture
        made = strategy(self.run) if settings.ranks > 1 else strategies.SingleProcess
        self.parallel = made(self.run, CPU)
        recomputed = strategies.recomputed_blocks(
            self.run.activation_checkpointing, self.architecture.n_layer
        )
        raw_model, self.model = self.parallel.build(self.architecture, recomputed, False)
        inner = self.parallel.build_optimizer(parameter_groups(raw_model), self.run)
        self.optimizer = GuardedOptimizer(inner, self.run, CPU, self.parallel)
        self.micro_steps = self.run.gradient_accumulation_steps // settings.ranks

    def update(self) -> None:
        for number in range(self.micro_steps):
            size = self.run.batch_size, self.architecture.block_size
            tokens = torch.zeros(size, dtype=torch.long)
            with self.parallel.micro_step(self.model, last=number + 1 == self.micro_steps):
                with hardware.autocast(CPU, self.run.dtype):
                    loss_sum, _, auxiliary = self.model(tokens, tokens)
                self.optimizer.backward(loss_sum / tokens.numel() + auxiliary.loss)
        self.optimizer.step(1e-3, loss_sum.detach(), measured=True)


def bytes_held(work) -> tuple[int, int]:
    """Peak and final allocated bytes of `work()`, relative to its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, now


def measure(options: list[str]) -> int:
    settings, _ = completed_settings(load_settings(read_command_line(options, schema)), None)
    made = []

    def begin() -> None:
        made.append(Training(settings))
        made[0].update()

    gc.collect()
    gc.disable()  # so that garbage of an earlier case is not freed in this one
    _, permanent = bytes_held(begin)
    most, _ = bytes_held(made[0].update)
    gc.enable()
    return permanent + most


def main(path: str) -> None:
    cases = json.loads(Path(path).read_text())
    (ranks,) = {int(case[-1].partition('world_size=')[2]) for case in cases} - {1}
    group = form_make_believe_group(ranks)
    strategies.init_process_group = lambda device, timeout: group
    print(json.dumps([measure(case) for case in cases]))


if __name__ == '__main__':
    main(sys.argv[1])
