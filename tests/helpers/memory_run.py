"""Memory that training really takes on a CPU, for `tests/planning/test_plan.py`.

    python memory_run.py CASES.json

Each case is a list of options of `train.py`. Its model is trained for two updates as one of so many
ranks, the others being make-believe: collectives return at once. What torch's profiler saw of the
allocator in the second update is printed as JSON: the most bytes that were held, of each case.
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
from planning.plan import completed_settings
from training_config import Settings, load_settings, schema

CPU = torch.device('cpu')


def strategy(run) -> type[strategies.SingleProcess]:
    if run.use_fsdp:
        return strategies.FullySharded
    return strategies.ZeRO1 if run.use_zero1 else strategies.DataParallel


class Training:
    """Of the model of some settings, as the first of their ranks."""

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
    """The most bytes held while `work()` runs, and those at its end, against the beginning."""
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
    gc.disable()  # what an earlier case left is not to be freed in this one
    _, kept = bytes_held(begin)
    most, _ = bytes_held(made[0].update)
    gc.enable()
    return kept + most


def main(path: str) -> None:
    cases = json.loads(Path(path).read_text())
    (ranks,) = {int(case[-1].partition('world_size=')[2]) for case in cases} - {1}
    group = form_make_believe_group(ranks)
    strategies.init_process_group = lambda device, timeout: group
    print(json.dumps([measure(case) for case in cases]))


if __name__ == '__main__':
    main(sys.argv[1])
