"""Profile of a few iterations (`--profile`): a trace of operations and kernels, and on CUDA a
snapshot of the memory allocations."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, record_function

from common.hardware import StepClock, synchronize
from training_logger import TrainingLogger

# Iterations of a process before the first profiled one. They compile, allocate the optimizer state
# and fill caches.
WARM_UP = 3
FOLDER = 'profile'  # in the run folder
ACTIVITIES = {ProfilerActivity.CPU, ProfilerActivity.CUDA}
# Allocations and releases in a snapshot; older ones are dropped.
SNAPSHOT_ENTRIES = 200_000


class IterationProfiler:
    """Profiles a number of iterations of this process, after WARM_UP others.

    A context of the whole loop, so that a run that stops early still writes what it has measured.
    """

    def __init__(self, iterations: int, device: torch.device, logger: TrainingLogger):
        """iterations: number of iterations to profile; 0: none."""
        self.iterations, self.device, self.logger = iterations, device, logger
        self.begun = 0  # iterations of this process
        self.profiled: list[int] = []  # numbers of the iterations in the trace
        self.trace: torch.profiler.profile | None = None  # while it is recorded

    def __enter__(self) -> None:
        pass

    def __exit__(self, error_type: type | None, *_) -> None:
        if self.trace is not None:
            self._finish()
        elif self.iterations and not self.profiled and error_type is None:
            self.logger.event(
                'profile',
                None,
                f'no iteration was profiled: the profile begins after {WARM_UP} iterations of a '
                f'process, and this one ran {self.begun}',
            )

    @contextmanager
    def iteration(self, iter: int, clock: StepClock) -> Iterator[None]:
        """Context of one iteration. The clock excludes the start and the end of the profile."""
        if self.iterations and self.begun == WARM_UP:
            with clock.paused():
                synchronize(self.device)  # of the earlier iterations nothing is in the trace
                self._start()
        self.begun += 1
        if self.trace is None:
            yield
            return
        self.profiled.append(iter)
        with record_function(f'iteration {iter}'):
            yield
        if len(self.profiled) == self.iterations:
            with clock.paused():
                self._finish()

    def _start(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.memory._record_memory_history(
                stacks='python', max_entries=SNAPSHOT_ENTRIES, device=self.device
            )
        activities = ACTIVITIES & torch.profiler.supported_activities()
        self.trace = torch.profiler.profile(activities=activities, record_shapes=True)
        self.trace.start()

    def _finish(self) -> None:
        """Write the files and record where they are. A failure to write them ends no run."""
        trace, self.trace = self.trace, None
        assert trace is not None
        first, last = self.profiled[0], self.profiled[-1]
        folder = self.logger.run_folder / FOLDER
        results = []
        try:
            trace.stop()
            folder.mkdir(exist_ok=True)
            path = folder / f'iter{first:07d}.json.gz'
            trace.export_chrome_trace(str(path))
            results.append(f'{path} (open it at https://ui.perfetto.dev)')
            if self.device.type == 'cuda':
                path = folder / f'iter{first:07d}_memory.pickle'
                torch.cuda.memory._dump_snapshot(str(path))
                torch.cuda.memory._record_memory_history(enabled=None, device=self.device)
                results.append(f'{path} (open it at https://pytorch.org/memory_viz)')
        except (OSError, RuntimeError) as error:
            results.append(f'but a file could not be written: {error}')
        numbers = f'iterations {first} to {last}' if last > first else f'iteration {first}'
        self.logger.event(
            'profile',
            last + 1,
            f'{numbers} profiled, with times that are not comparable: {", ".join(results)}',
        )
