"""Loss spikes, and what a run says that has run out of memory: its numbers measured another way."""

import re
import subprocess
import sys

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
from training import memory_check, stability
from training_config import load_settings, schema


def test_a_spike_is_six_deviations_above_the_last_32_finite_losses():
    generator = np.random.default_rng(0)
    losses, recent, spikes = [], [], 0
    for step in range(400):
        before = np.array([loss for loss in losses if np.isfinite(loss)][-32:])
        loss, expected = generator.normal(4, 0.1), False
        if len(before) == 32:
            limit = before.mean() + 6 * before.std()
            # As close to the limit as matters, on either side of it, and values that are lost.
            loss = {0: limit + 1e-6, 20: limit - 1e-6, 40: np.nan}.get(step % 60, loss)
            expected = loss > limit
        losses.append(float(loss))
        assert stability.is_spike(losses[-1], recent) == expected
        spikes += expected
    assert spikes == 6 and not stability.is_spike(-np.inf, recent)
    assert stability.is_spike(np.inf, recent)
    assert recent == [loss for loss in losses if np.isfinite(loss)][-32:]


# --- Out of memory --------------------------------------------------------------------------------

CPU = {'device': 'cpu', 'dtype': 'float32'}
SHAPE = {'n_layer': 6, 'n_head': 2, 'n_embd': 64, 'block_size': 128, 'vocab_size': 65}
ARCHITECTURES = [
    {'arch_preset': 'legacy'},
    {'arch_preset': 'llama', 'dropout': 0.1, 'attention_backend': 'manual'},
    {'arch_preset': 'gpt2', 'use_gqa': True, 'num_kv_heads': 1, 'dropout': 0.1},
]


def settings(**options):
    arguments = [f'--{key}={value}' for key, value in {**SHAPE, **CPU, **options}.items()]
    asked = load_settings(read_command_line(arguments, schema))
    return asked.resolve(torch.device('cpu'), asked.run.dtype, dataset=None)


def message(**options):
    return str(memory_check.out_of_memory_error(settings(**options), 'the device'))


def micro_batch(architecture, batch_size, recomputed=()):
    """A model on the CPU, and a micro-batch for it."""
    model = build_model(architecture, 'cpu', 0)
    tokens = torch.zeros((batch_size, architecture.block_size), dtype=torch.long)
    prepare_blocks(model, list(recomputed), compiled=False)
    return model, tokens


def peak_bytes(model, tokens):
    """Most bytes that the allocator had given out at once in a forward and backward pass."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(tokens, tokens)[0].backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(np.cumsum(changes))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('choices', ARCHITECTURES, ids=lambda choices: choices['arch_preset'])
def test_activations_are_what_a_real_forward_pass_keeps(choices, dtype):
    asked = settings(**choices, dtype=dtype, batch_size=3)
    model, tokens = micro_batch(asked.architecture, 3)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()  # held, so that no address is used twice
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    dtype = getattr(torch, dtype)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast('cpu', dtype, enabled=dtype != torch.float32),
    ):
        model(tokens, tokens)
    outside, per_block = memory_check.activation_bytes(asked.architecture, 3, dtype)
    measured = sum(storage.nbytes() for storage in kept.values())
    assert outside + SHAPE['n_layer'] * per_block == measured


@pytest.mark.parametrize('choices', ARCHITECTURES, ids=lambda choices: choices['arch_preset'])
def test_the_gigabytes_are_those_that_the_allocator_measures(choices, monkeypatch):
    """Activations grow with the batch: a thousand times the batch that fits here is the oracle."""
    architecture = settings(**choices).architecture
    measured, told = {}, {}
    for option, blocks in {'none': (), '2': (1, 3, 5), 'full': range(6)}.items():
        with monkeypatch.context() as a_thousandth:
            for bounds in (loss.CHUNK_BYTES, loss.SCRATCH_BYTES):
                a_thousandth.setitem(bounds, 'cpu', bounds['cpu'] // 1000)
            peak = peak_bytes(*micro_batch(architecture, 8, blocks))
        measured[option] = peak * 1000 / 1e9
        told[option] = message(**choices, batch_size=8000, activation_checkpointing=option)
        needed = float(re.search(r'activations (\S+) GB', told[option])[1])
        # Beside what is kept, the backward pass needs some of its own, in fp32: what is inside the
        # FFN, computed again, and its gradient, (B, T, 4C) each; and the stream's, (B, T, C).
        own = 4 * 8000 * SHAPE['block_size'] * (4 + 4 + 1) * SHAPE['n_embd'] / 1e9
        assert 0.98 * needed <= measured[option] <= needed + own
    for option in ('none', '2'):
        saved = float(re.search(r'full saves about (\S+) of', told[option])[1])
        assert saved == pytest.approx(measured[option] - measured['full'], rel=0.06)


def test_the_advice_halves_the_micro_batch_and_keeps_the_tokens():
    text = message(batch_size=12, gradient_accumulation_steps=40, dtype='bfloat16')
    assert 'batch_size=12, gradient_accumulation_steps=40, block_size=128' in text
    typed = {key: int(value) for key, value in re.findall(r'--(\w+)=(\d+)', text)}
    assert typed == {'batch_size': 6, 'gradient_accumulation_steps': 80}
    tokens = int(re.search(r'keeps the (\S+) tokens', text)[1].replace(',', ''))
    assert tokens == 12 * 40 * 128 == 6 * 80 * 128
    assert '--activation_checkpointing=full' in text


def test_no_advice_that_cannot_be_taken():
    assert '--batch_size' not in message(batch_size=1)
    assert '--batch_size' not in message(batch_size=7)
    text = message(batch_size=1, activation_checkpointing='full')
    assert '--activation_checkpointing' not in text and '--block_size below 128' in text


def test_weights_gradients_and_moments_are_counted():
    asked = settings(n_embd=1024, d_ff=4096, vocab_size=30000, batch_size=1)
    model = build_model(asked.architecture)
    optimizer = 2 * sum(p.numel() for p in model.parameters())  # AdamW's moments
    size = 4 * (2 * sum(p.numel() for p in model.parameters()) + optimizer) / 1e9
    text = str(memory_check.out_of_memory_error(asked, 'the device'))
    assert f'take {size:.2f} GB' in text and size > 1


def raising(error):
    def fail(*arguments):
        raise error

    return fail


def run_short(monkeypatch, capsys, dataset, out_dir, **options):
    """train.py in this process: its exit code, and what it said on stderr."""
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
def test_a_run_that_has_no_memory_left_says_so_once_and_fails(
    error, monkeypatch, capsys, tiny_dataset, tmp_path
):
    monkeypatch.setattr(GuardedOptimizer, 'backward', raising(error))
    code, said = run_short(monkeypatch, capsys, tiny_dataset, tmp_path)
    assert code == 2 and said.startswith('train.py: out of memory on ') and said.count('\n') == 1
    assert '--batch_size=1 --gradient_accumulation_steps=4' in said
    record = read_record(latest_run(tmp_path))
    assert record['status'] == 'failed' and record['end_time']
    assert [entry['iter'] for entry in record['eval_steps']] == [0]


def test_another_error_keeps_its_traceback_and_fails_the_run(monkeypatch, tiny_dataset, tmp_path):
    monkeypatch.setattr(
        GuardedOptimizer, 'backward', raising(RuntimeError('a fault of the program'))
    )
    values = {**TINY_RUN, 'dataset': tiny_dataset, 'out_dir': tmp_path}
    with pytest.raises(RuntimeError, match='a fault of the program'):
        run_script(train.main, [f'--{key}={value}' for key, value in values.items()])
    assert read_record(latest_run(tmp_path))['status'] == 'failed'


# What is free when the first model is built, in MB, and the options: a model that does not fit,
# and a micro-batch that does not.
REAL = {'weights': (300, '--n_embd=4096'), 'activations': (600, '--batch_size=4096')}


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc, limits the address')
@pytest.mark.parametrize('what', REAL)
def test_memory_that_really_does_not_suffice(what, tiny_dataset, tmp_path):
    free, option = REAL[what]
    driver = f"""
import os, resource, sys
sys.path.insert(0, {str(PROJECT)!r})
import torch, train
from parallel import strategies as parallelism
from common.errors import run_script

build = parallelism.build_model

def build_in_little(*arguments):
    pages = int(open('/proc/self/statm').read().split()[0])
    limit = pages * os.sysconf('SC_PAGESIZE') + {free} * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return build(*arguments)

parallelism.build_model = build_in_little
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
    if what == 'weights':
        assert not (tmp_path / 'out').exists()
    else:
        assert read_record(latest_run(tmp_path / 'out'))['status'] == 'failed'
