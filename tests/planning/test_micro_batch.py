"""The micro-batch that is derived from a GPU's memory."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.project import PROJECT

import study
import train
from common import hardware
from configurator import read_command_line
from planning import micro_batch
from planning.memory import MemoryEstimator, strategy_label
from planning.plan import plan_run
from studies import grid, runner, variants
from studies.keys import STUDY_KEYS
from studies.parts import build_parts
from training_config import Settings, load_settings, schema

CUDA = torch.device('cuda')
SMALL = ('--arch_preset=llama', '--n_layer=2', '--n_head=2', '--n_embd=64', '--vocab_size=256')
GB = hardware.GB


def settings_of(*argv: str) -> Settings:
    command_line = read_command_line(['--plan', '--dataset=missing', *SMALL, *argv], schema)
    return load_settings(command_line)


def resolved(*argv: str, memory: float | None) -> Settings:
    return micro_batch.resolve(settings_of(*argv), CUDA, 'bfloat16', None, memory)


def peak(done: Settings, memory: float | None) -> float:
    """The peak of the resolved run on a GPU with `memory` bytes, in bytes."""
    estimator = MemoryEstimator(done, True, memory)
    label = strategy_label(done.run, done.ranks)
    (strategy,) = (s for s in estimator.strategies(done.ranks) if s.label == label)
    return estimator.peak(strategy, done.run.batch_size)


@pytest.mark.parametrize(
    ('argv', 'sizes'),
    [
        (['--block_size=256'], (40, 48)),
        (['--block_size=256', '--use_fsdp=True', '--world_size=4'], (30, 40)),
    ],
)
def test_size_fits_and_next_divisor_does_not(argv, sizes):
    """In memory between what the two need; the sequences are the same."""
    runs = [
        settings_of(*argv, f'--batch_size={size}', f'--gradient_accumulation_steps={480 // size}')
        for size in sizes
    ]
    memory = None
    for _ in range(2):  # the memory decides on the size of a chunk of logits
        needed = [peak(each.resolve(CUDA, 'bfloat16', None), memory) for each in runs]
        assert needed[0] < needed[1]
        memory = (needed[0] + needed[1]) / 2 / micro_batch.USED
    done = resolved(*argv, memory=memory)
    run = done.run
    assert (run.batch_size, run.gradient_accumulation_steps) == (sizes[0], 480 // sizes[0])
    ranks = ' / 4 ranks' if 'fsdp' in str(argv) else ''
    reason = f'for cuda: the largest divisor of 480{ranks} that fits into 80 % of '
    assert run.origins['batch_size'].startswith('derived: ' + reason)
    assert peak(done, memory) <= needed[0]


def test_size_is_limited_by_tokens_and_at_least_one():
    done = resolved('--block_size=1024', memory=1e15)
    assert done.run.batch_size == 60  # 64 of 1024 tokens at most
    assert '65,536 tokens' in done.derived['batch_size']
    assert resolved('--block_size=64', memory=1e15).run.batch_size == 480
    done = resolved('--block_size=64', memory=1e3)
    assert (done.run.batch_size, done.run.gradient_accumulation_steps) == (1, 480)
    assert 'not even one sequence fits' in done.derived['batch_size']


@pytest.mark.parametrize(
    ('argv', 'sizes'),
    [
        (['--batch_size=6'], (6, 80)),
        (['--gradient_accumulation_steps=5'], (12, 5)),
        (['--batch_size=7', '--gradient_accumulation_steps=5'], (7, 5)),
        (['--eval_only=True'], (12, 40)),
    ],
)
def test_set_sizes_are_not_derived_from_memory(argv, sizes, monkeypatch):
    monkeypatch.setattr(micro_batch, 'largest_micro_batch', None)  # not called
    run = resolved(*argv, memory=1e9).run
    assert (run.batch_size, run.gradient_accumulation_steps) == sizes


def test_only_gpus_of_known_memory_derive_from_it(monkeypatch):
    monkeypatch.setattr(micro_batch, 'largest_micro_batch', None)
    assert resolved(memory=None).run.batch_size == 12
    for device, size in (('cpu', 1), ('mps', 12)):
        done = micro_batch.resolve(settings_of(), torch.device(device), 'float32', None, 1e9)
        assert done.run.batch_size == size
        assert micro_batch.device_memory(torch.device(device)) is None


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU of 80 GB, and the sizes of memory that a micro-batch is derived from."""
    memory: list[float] = []

    def largest(settings, size):
        memory.append(size)
        return (20, 'for a test') if settings.architecture.n_layer > 2 else (24, 'for a test')

    monkeypatch.setattr(hardware, 'select_device', lambda name: CUDA)
    monkeypatch.setattr(hardware, 'resolve_dtype', lambda name, device: 'bfloat16')
    monkeypatch.setattr(hardware, 'total_memory', lambda device: 80_000_000_000)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(micro_batch, 'largest_micro_batch', largest)
    return memory


def test_plan_and_printed_config_derive_it_too(gpu, tiny_dataset):
    assert plan_run(settings_of('--gpu=B200', '--block_size=32'))['batch']['batch_size'] == 24
    assert gpu == [180 * GB]
    options = [f'--dataset={tiny_dataset}', *SMALL[1:4], '--block_size=32']
    command_line = read_command_line(options, schema)
    text = train.explain_settings(load_settings(command_line))
    assert 'derived: for a test' in text and gpu[1:] == [80 * GB]


def test_study_has_one_micro_batch(gpu, tiny_dataset):
    """The smallest of its variants, of which two share each of the two GPUs."""
    path = str(PROJECT / 'config/studies/gated_ffn.py')
    options = [path, f'--dataset={tiny_dataset}', *SMALL[1:4], '--block_size=32']
    command_line = read_command_line(options, study.study_schema, extra=STUDY_KEYS)
    for layer in command_line.layers:  # the study's own sizes
        for key in micro_batch.SIZES:
            layer.values.pop(key, None)
    read = grid.read_study(command_line)
    data = study.load_dataset(str(tiny_dataset), 32)
    context = variants.RunContext(CUDA, 'bfloat16', data)
    (part,) = build_parts(read, context, jobs=4)
    assert part.study.micro_batch == {'batch_size': 24, 'gradient_accumulation_steps': 20}
    assert set(gpu) == {40 * GB}
    assert {variant.settings.run.batch_size for variant in part.variants} == {24}
    (on_cpu,) = build_parts(read, context._replace(device=torch.device('cpu')), jobs=4)
    assert not on_cpu.study.micro_batch
    of_study = study.StudyRunner(read, Path('out'), context, 4, set())
    trial = study.StudyState(read, [part], of_study).trials()[0].runs[0]
    assert '--batch_size=24' in of_study.arguments('runs', trial)


def test_runs_of_a_study_share_a_compile_cache(tmp_path, monkeypatch):
    """In a folder in which no runs are searched; another one if the user sets it."""
    environments: list[dict] = []

    def start(command, output, environment, lock):
        environments.append(environment)

    monkeypatch.setattr(runner, 'start_process', start)
    monkeypatch.delenv('TORCHINDUCTOR_CACHE_DIR', raising=False)
    monkeypatch.chdir(tmp_path)
    trial = SimpleNamespace(folder='a', variant='b', rung=None)
    running = object.__new__(runner.StudyRunner)
    running.arguments = lambda kind, trial, jobs: []
    running.out_dir, running.jobs, running.lock = Path('out'), 1, []
    running.context = SimpleNamespace(device=torch.device('cpu'))
    running._start('runs', trial, 0, 1)
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', '/other')
    running._start('tuning', trial, 0, 1)
    folders = [Path(each['TORCHINDUCTOR_CACHE_DIR']) for each in environments]
    assert folders == [tmp_path / 'out/.compile_cache', Path('/other')]
