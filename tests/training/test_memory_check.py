"""The error of a run that is out of memory; its numbers equal measured ones."""

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.project import PROJECT, TINY_RUN
from torch.profiler import ProfilerActivity, profile

import train
from common.errors import run_script
from components import linear_cross_entropy as loss
from configurator import read_command_line
from model_builder import build_model
from optim.step import GuardedOptimizer
from parallel.strategies import prepare_blocks
from records.record import read_record
from records.run_folders import latest_run
from training import memory_check
from training_config import load_settings, schema

pytestmark = pytest.mark.slow

CPU = {'device': 'cpu', 'dtype': 'float32'}
SHAPE = {'n_layer': 6, 'n_head': 2, 'n_embd': 64, 'block_size': 128, 'vocab_size': 65}
ARCHITECTURES = [
    {'arch_preset': 'legacy'},
    {'arch_preset': 'llama', 'dropout': 0.1, 'attention_backend': 'manual'},
    {'arch_preset': 'gpt2', 'use_gqa': True, 'num_kv_heads': 1, 'dropout': 0.1},
]


def settings(**options):
    arguments = [f'--{key}={value}' for key, value in {**SHAPE, **CPU, **options}.items()]
    run_settings = load_settings(read_command_line(arguments, schema))
    return run_settings.resolve(torch.device('cpu'), run_settings.run.dtype, dataset=None)


def message(**options):
    return str(memory_check.out_of_memory_error(settings(**options), 'the device'))


def micro_batch(architecture, batch_size, recomputed=()):
    """A model on the CPU, and a micro-batch for it."""
    model = build_model(architecture, 'cpu', 0)
    tokens = torch.zeros((batch_size, architecture.block_size), dtype=torch.long)
    prepare_blocks(model, list(recomputed), compiled=False)
    return model, tokens


def peak_bytes(model, tokens):
    """Peak of the allocated bytes in a forward and backward pass."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(tokens, tokens)[0].backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(np.cumsum(changes))


@pytest.mark.parametrize('choices', ARCHITECTURES, ids=lambda choices: choices['arch_preset'])
def test_activations_equal_allocator_peak(choices, monkeypatch):
    """A batch 1000 times as large is expected to need 1000 times the measured memory."""
    architecture = settings(**choices).architecture
    measured, text = {}, {}
    for option, blocks in {'none': (), '2': (1, 3, 5), 'full': range(6)}.items():
        with monkeypatch.context() as patch:
            method = loss.CPU_METHOD
            chunk_bytes, scratch_bytes = method.chunk_bytes // 1000, method.scratch_bytes // 1000
            small = method._replace(chunk_bytes=chunk_bytes, scratch_bytes=scratch_bytes)
            patch.setattr(loss, 'CPU_METHOD', small)
            peak = peak_bytes(*micro_batch(architecture, 8, blocks))
        measured[option] = peak * 1000 / 1e9
        text[option] = message(**choices, batch_size=8000, activation_checkpointing=option)
        stated = float(re.search(r'activations (\S+) GB', text[option])[1])
        assert stated == pytest.approx(measured[option], rel=0.02)
    for option in ('none', '2'):
        saved = float(re.search(r'full saves about (\S+) of', text[option])[1])
        assert saved == pytest.approx(measured[option] - measured['full'], rel=0.02)


def test_advice_halves_micro_batch():
    text = message(batch_size=12, gradient_accumulation_steps=40, dtype='bfloat16')
    assert 'batch_size=12, gradient_accumulation_steps=40, block_size=128' in text
    typed = {key: int(value) for key, value in re.findall(r'--(\w+)=(\d+)', text)}
    assert typed == {'batch_size': 6, 'gradient_accumulation_steps': 80}
    tokens = int(re.search(r'keeps (\S+) tokens', text)[1].replace(',', ''))
    assert tokens == 12 * 40 * 128 == 6 * 80 * 128
    assert '--activation_checkpointing=full' in text


def test_error_gives_only_applicable_advice():
    assert '--batch_size' not in message(batch_size=1)
    assert '--batch_size' not in message(batch_size=7)
    text = message(batch_size=1, activation_checkpointing='full')
    assert '--activation_checkpointing' not in text and '--block_size below 128' in text


@pytest.mark.parametrize(
    ('options', 'ranks', 'state_values'),
    [
        ({'optimizer': 'adamw'}, 1, 2),  # two moments per weight
        ({'optimizer': 'lion'}, 1, 1),  # one moment per weight
        ({'optimizer': 'adamw', 'use_zero1': True}, 2, 1),  # two per weight, on half of the weights
    ],
    ids=['adamw', 'lion', 'zero1'],
)
def test_state_bytes_by_optimizer_and_strategy(options, ranks, state_values):
    large = {'n_embd': 1024, 'd_ff': 4096, 'vocab_size': 30000, 'batch_size': 1}
    run_settings = replace(settings(**large, **options), ranks=ranks)
    parameters = sum(p.numel() for p in build_model(run_settings.architecture).parameters())
    size = 4 * (2 + state_values) * parameters / 1e9
    text = str(memory_check.out_of_memory_error(run_settings, 'the device'))
    stated = float(re.search(r'take (\S+) GB', text)[1])
    assert stated == pytest.approx(size, abs=0.006) and size > 1
    assert f'state of {options["optimizer"]}' in text and (' on each rank' in text) == (ranks > 1)


def raising(error):
    def fail(*arguments):
        raise error

    return fail


def run_train(monkeypatch, capsys, dataset, out_dir, **options):
    """Run train.py in this process; returns its exit code and stderr."""
    values = {**TINY_RUN, 'dataset': dataset, 'out_dir': out_dir, **options}
    monkeypatch.setattr(sys, 'argv', ['train.py'] + [f'--{k}={v}' for k, v in values.items()])
    with pytest.raises(SystemExit) as ended:
        run_script(train.main)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    'error',
    [
        torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'),
        MemoryError(),
    ],
)
def test_out_of_memory_is_reported_once(error, monkeypatch, capsys, tiny_dataset, tmp_path):
    monkeypatch.setattr(GuardedOptimizer, 'backward', raising(error))
    code, stderr = run_train(monkeypatch, capsys, tiny_dataset, tmp_path)
    assert code == 2
    assert stderr.startswith('train.py: out of memory on ') and stderr.count('\n') == 1
    assert '--batch_size=1 --gradient_accumulation_steps=4' in stderr
    record = read_record(latest_run(tmp_path))
    assert record['status'] == 'failed' and record['end_time']
    assert [entry['iter'] for entry in record['eval_steps']] == [0]


def test_other_errors_keep_their_traceback(monkeypatch, tiny_dataset, tmp_path):
    monkeypatch.setattr(GuardedOptimizer, 'backward', raising(RuntimeError('a programming error')))
    values = {**TINY_RUN, 'dataset': tiny_dataset, 'out_dir': tmp_path}
    with pytest.raises(RuntimeError, match='a programming error'):
        run_script(train.main, [f'--{key}={value}' for key, value in values.items()])
    assert read_record(latest_run(tmp_path))['status'] == 'failed'


# Free memory in MB when the first model is built, and an option that needs more: for the weights,
# or for the activations of a micro-batch.
LIMITS = {'weights': (300, '--n_embd=4096'), 'activations': (600, '--batch_size=4096')}


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs /proc and RLIMIT_AS')
@pytest.mark.parametrize('cause', LIMITS)
def test_real_memory_limit_is_reported(cause, tiny_dataset, tmp_path):
    free, option = LIMITS[cause]
    driver = f"""
import os, resource, sys
sys.path.insert(0, {str(PROJECT)!r})
import torch, train
from parallel import strategies as parallelism
from common.errors import run_script

build = parallelism.build_model

def build_with_limit(*arguments):
    pages = int(open('/proc/self/statm').read().split()[0])
    limit = pages * os.sysconf('SC_PAGESIZE') + {free} * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return build(*arguments)

parallelism.build_model = build_with_limit
torch.set_num_threads(1)
run_script(train.main)
"""
    values = {**TINY_RUN, 'dataset': tiny_dataset, 'out_dir': tmp_path / 'out'}
    arguments = [*(f'--{key}={value}' for key, value in values.items()), option]
    done = subprocess.run(
        [sys.executable, '-c', driver, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert 'out of memory on' in done.stderr and 'Traceback' not in done.stderr
    if cause == 'weights':
        assert not (tmp_path / 'out').exists()
    else:
        assert read_record(latest_run(tmp_path / 'out'))['status'] == 'failed'
