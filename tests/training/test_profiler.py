"""`--profile`: the files, the event, and what a run that stops early writes."""

import gzip
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.in_process import train_here

from comparison.conditions import run_conditions
from training import profiler
from training.profiler import WARM_UP, IterationProfiler


def iterations_in(path: Path) -> list[int]:
    """The iterations that a trace labels, and that it contains matrix products with shapes."""
    with gzip.open(path) as file:
        events = json.load(file)['traceEvents']
    shapes = [e['args']['Input Dims'] for e in events if e['name'] == 'aten::mm']
    assert shapes and all(shapes)
    return sorted({int(e['name'][10:]) for e in events if e['name'].startswith('iteration ')})


class Loop:
    """A loop over `count` iterations of one product, and the events that it logs."""

    def __init__(self, folder: Path, iterations: int, device: str = 'cpu'):
        self.events: list[tuple] = []
        logger = SimpleNamespace(run_folder=folder, event=lambda *event: self.events.append(event))
        self.profiler = IterationProfiler(iterations, torch.device(device), logger)

    def run(self, count: int, error_at: int | None = None) -> None:
        clock = SimpleNamespace(paused=nullcontext)
        with self.profiler:
            for iter in range(count):
                with self.profiler.iteration(iter, clock):
                    torch.ones(2, 2) @ torch.ones(2, 2)
                    if iter == error_at:
                        raise ValueError


@pytest.mark.slow
def test_trace_has_the_iterations_after_warm_up(tiny_dataset, tmp_path):
    plain = train_here(tiny_dataset, tmp_path / 'plain', max_iters=6, eval_interval=6)
    run = train_here(tiny_dataset, tmp_path / 'out', max_iters=6, eval_interval=6, profile=2)
    (path,) = (run.folder / 'profile').iterdir()
    assert iterations_in(path) == [WARM_UP, WARM_UP + 1]
    (event,) = run.events('profile')
    assert event['iter'] == WARM_UP + 2 and str(path) in event['message']
    assert 'iterations 3 to 4 profiled' in event['message']
    assert run.losses == plain.losses
    # Its times are a condition of comparisons of speed, and a resumed run has no profile.
    values = [run_conditions(r.record, 1)['profile'] for r in (plain, run)]
    assert values == [(0,), (2,)]
    more = train_here(tiny_dataset, tmp_path / 'out', max_iters=12, init_from='resume')
    assert len(more.events('profile')) == 1 and more.record['config']['profile'] == 0


def test_stopped_run_writes_a_part(tmp_path):
    loop = Loop(tmp_path, 5)
    loop.run(WARM_UP + 2)
    assert iterations_in(tmp_path / 'profile/iter0000003.json.gz') == [3, 4]
    assert [event[:2] for event in loop.events] == [('profile', 5)]


def test_failed_iteration_is_in_the_trace(tmp_path):
    loop = Loop(tmp_path, 5)
    with pytest.raises(ValueError):
        loop.run(WARM_UP + 2, error_at=WARM_UP)
    assert iterations_in(tmp_path / 'profile/iter0000003.json.gz') == [3]


def test_run_without_enough_iterations_says_so(tmp_path):
    loop = Loop(tmp_path, 5)
    loop.run(WARM_UP)
    assert 'after 3 iterations of a process, and this one ran 3' in loop.events[0][2]
    silent = Loop(tmp_path, 0)
    silent.run(WARM_UP + 1)
    assert not silent.events and not list(tmp_path.iterdir())


def test_unwritable_folder_ends_no_run(tmp_path):
    (tmp_path / 'profile').write_text('')
    loop = Loop(tmp_path, 1)
    loop.run(WARM_UP + 2)
    assert loop.profiler.begun == WARM_UP + 2
    assert 'could not be written' in loop.events[0][2]


def test_cuda_run_has_a_memory_snapshot(tmp_path, monkeypatch):
    calls = []
    memory = torch.cuda.memory
    monkeypatch.setattr(
        memory, '_record_memory_history', lambda *a, **options: calls.append(options)
    )
    monkeypatch.setattr(memory, '_dump_snapshot', lambda name: Path(name).write_text('snapshot'))
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: None)
    loop = Loop(tmp_path, 1, 'cuda')
    loop.run(WARM_UP + 3)
    assert sorted(path.name for path in (tmp_path / 'profile').iterdir()) == [
        'iter0000003.json.gz',
        'iter0000003_memory.pickle',
    ]
    assert [call.get('enabled', 'all') for call in calls] == ['all', None]
    assert calls[0]['max_entries'] == profiler.SNAPSHOT_ENTRIES
    assert 'memory_viz' in loop.events[0][2]


def test_arguments_of_the_memory_history_exist():
    """Private functions of torch: their names and arguments may change."""
    import inspect

    parameters = inspect.signature(torch.cuda.memory._record_memory_history_impl).parameters
    assert {'enabled', 'stacks', 'max_entries', 'device'} <= parameters.keys()
    assert inspect.signature(torch.cuda.memory._dump_snapshot).parameters['filename']
