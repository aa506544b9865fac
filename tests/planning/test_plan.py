"""Estimates of --plan, compared with measurements, torch's memory tracker and hand calculations."""

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from helpers.project import PROJECT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from common import gpu_specs, hardware
from common.errors import UserError
from components import linear_cross_entropy as loss
from components.element_counter import WORKING_MEMORY
from configurator import read_command_line
from model_builder import Transformer, build_model, count_parameters, training_flops
from model_config import ModelArchitectureConfig
from parallel.strategies import prepare_blocks, recomputed_blocks
from planning import simulation
from planning.memory import MemoryEstimator
from planning.plan import completed_settings, plan_run
from planning.report import plan_report
from planning.simulation import MemorySnapshot
from training_config import Settings, load_settings, schema

pytestmark = pytest.mark.slow

SMALL = {
    'arch_preset': 'llama',
    'n_layer': 4,
    'n_head': 4,
    'n_embd': 128,
    'block_size': 64,
    'vocab_size': 1024,
    'batch_size': 2,
}
LLAMA_7B = {'arch_preset': 'llama', 'n_layer': 32, 'n_head': 32, 'n_embd': 4096}
GB = hardware.GB


def arguments(options: dict) -> list[str]:
    # A dataset that does not exist: a prepared one must not change the results.
    options = {'dataset': 'missing', **options}
    return ['--plan', *(f'--{key}={value}' for key, value in options.items())]


def settings_of(**options) -> Settings:
    return load_settings(read_command_line(arguments(options), schema))


@cache
def _plan(options: tuple) -> dict:
    return plan_run(settings_of(**dict(options)))


def sizes(snapshots: list[MemorySnapshot]) -> list[tuple]:
    return [(s.phase, s.block, s.bytes_by_category.tolist()) for s in snapshots]


def plan(**options) -> dict:
    return _plan(tuple(options.items()))


# --- Compared with training -----------------------------------------------------------------------

# Blocks of different sizes, mixers, and a position encoding with parameters in some of them.
MIXED = {
    'layer_pattern': 'LG* H',
    'layer_kinds.L.sliding_window': 16,
    'layer_kinds.L.d_ff': 96,
    'layer_kinds.G.position_encoding': 't5_relative',
    'layer_kinds.G.mixer': 'attention+gated_deltanet',
    'layer_kinds.H.mixer': 'attention+mamba2',
    'layer_kinds.H.n_head': 8,
    'layer_kinds.H.ffn_type': 'standard',
    'layer_kinds.H.activation': 'gelu',
}
CASES = [
    {'weight_tying': tied, 'dtype': dtype, 'activation_checkpointing': checkpointing, **layers}
    for tied, dtype, checkpointing, layers in (
        (False, 'bfloat16', 'none', {}),
        (True, 'float32', 'full', {}),
        (False, 'bfloat16', '2', MIXED),
    )
]
FLAGS = {
    'single': {},
    'ddp': {},
    'zero1': {'use_zero1': True},
    'fsdp': {'use_fsdp': True},
    'fsdp*': {'use_fsdp': True, 'fsdp_reshard_after_forward': False},
}
IN_BFLOAT16 = {'use_fsdp': True, 'dtype': 'bfloat16', 'fsdp_param_dtype': 'bfloat16'}
OF_FSDP = [
    IN_BFLOAT16,
    {**IN_BFLOAT16, 'weight_tying': True},
    {**IN_BFLOAT16, 'fsdp_reduce_every_micro_step': True, 'activation_checkpointing': 'full'},
    {**IN_BFLOAT16, 'fsdp_param_dtype': 'float32', 'fsdp_reduce_every_micro_step': True},
]


def test_planned_memory_matches_training(tmp_path):
    """The plan is correct for all strategies on 4 ranks, with and without gradient accumulation."""
    cases = [
        (label, {**SMALL, 'device': 'cpu', **case, **flags}, micro_steps)
        for number, case in enumerate(CASES)
        for label, flags in FLAGS.items()
        for micro_steps in ((1, 2), (1,), (2,))[number]
    ]
    cases += [('ddp', {**SMALL, 'device': 'cpu', 'reduce_dtype': 'bfloat16'}, 1)]
    cases += [('fsdp', {**SMALL, 'device': 'cpu', **case}, 2) for case in OF_FSDP]
    cases += [('fsdp*', {**SMALL, 'device': 'cpu', **OF_FSDP[0], **FLAGS['fsdp*']}, 1)]
    scans = ('mamba', 'rg_lru')  # custom operators with working memory of their own
    cases += [('single', {**SMALL, 'device': 'cpu', 'mixer': mixer}, 1) for mixer in scans]
    full_options = []
    for label, options, micro_steps in cases:
        ranks = 1 if label == 'single' else 4
        steps = {'gradient_accumulation_steps': micro_steps * ranks}
        full_options.append({**options, **steps, 'world_size': ranks})
    (tmp_path / 'cases.json').write_text(json.dumps([arguments(case) for case in full_options]))
    result = subprocess.run(
        [
            sys.executable,
            str(PROJECT / 'tests/helpers/memory_run.py'),
            str(tmp_path / 'cases.json'),
        ],
        env={**os.environ, 'PYTHONPATH': str(PROJECT), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    for (label, *_), options, peak in zip(cases, full_options, measured, strict=True):
        if 'fsdp_param_dtype' not in options:  # the columns of the plan are for any strategy
            options = {k: value for k, value in options.items() if k[:3] not in ('use', 'fsd')}
        planned = plan(**options)['memory'][label]['total_gb'] * GB
        assert 0.97 < planned / peak < 1.05, (label, options, planned, peak)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('checkpointing', ['none', 'full'])
@pytest.mark.parametrize('tied', [False, True])
def test_micro_step_matches_torch_mem_tracker(dtype, checkpointing, tied):
    options = {**SMALL, 'weight_tying': tied, 'dtype': dtype, 'device': 'cpu'}
    settings = settings_of(**options, gradient_accumulation_steps=1)
    completed, _ = completed_settings(settings, None)
    recomputed = recomputed_blocks(checkpointing, 4)
    simulated = simulation.Simulation(completed.run, completed.architecture, on_gpu=False)
    snapshots = simulated.micro_step(2, recomputed, accumulates=False)
    peak_bytes = max(snapshot.bytes_by_category.sum() for snapshot in snapshots)
    with FakeTensorMode():
        model, tracker = Transformer(completed.architecture), MemTracker()
        prepare_blocks(model, recomputed, compiled=False)
        tracker.track_external(model)
        with tracker:
            tokens = torch.zeros((2, 64), dtype=torch.long)
            with hardware.autocast(torch.device('cpu'), dtype):
                loss_sum, _, _ = model(tokens, tokens)
            (loss_sum / tokens.numel()).backward()
        (peak,) = tracker.get_tracker_snapshot('peak').values()
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    # The tracker rounds every tensor up to the 512 bytes of CUDA's allocator.
    assert peak_bytes == pytest.approx(peak['Total'] - parameters, rel=0.02)


# Blocks that differ in nothing but the rotation, which only the last one needs.
SAME_BLOCKS = {
    'normalization': 'layernorm',
    'ffn_type': 'standard',
    'layer_pattern': 'G* R',
    'layer_kinds.R.rope_theta': 500.0,
}


@pytest.mark.parametrize('accumulates', [False, True])
@pytest.mark.parametrize(
    ('checkpointing', 'options', 'omitted'),
    [
        ('none', {'dtype': 'bfloat16'}, 6),
        ('full', {'dtype': 'bfloat16', **SAME_BLOCKS}, 5),
        ('2', {'dtype': 'float32', 'dropout': 0.1}, 2),
        ('none', {'dtype': 'bfloat16', **MIXED, 'attention_backend': 'manual'}, 2),
    ],
)
def test_simulation_skips_equal_blocks(monkeypatch, checkpointing, options, omitted, accumulates):
    settings = settings_of(**{**SMALL, 'n_layer': 9}, **options, device='cpu')
    completed, _ = completed_settings(settings, None)
    simulated = simulation.Simulation(completed.run, completed.architecture, on_gpu=True)
    recomputed, lengths = recomputed_blocks(checkpointing, 9), []
    forward = Transformer.forward

    def counting(model, *arguments):
        lengths.append(len(model.blocks))
        return forward(model, *arguments)

    monkeypatch.setattr(Transformer, 'forward', counting)
    short = simulated.micro_step(2, recomputed, accumulates)
    everything = simulation.Repetition(0, 9, 0)
    monkeypatch.setattr(simulation, '_repetition', lambda *_: everything)
    long = simulated.micro_step(2, recomputed, accumulates)
    assert sizes(short) == sizes(long)
    assert lengths == [9 - omitted, 9]


def test_omitted_blocks_are_copies_of_others():
    """Against a search of all repetitions, for random patterns of three kinds."""
    block, draw = torch.nn.Linear(1, 1), random.Random(0)
    for _ in range(100):
        parts = [draw.choices('ABC', k=draw.randint(0, 4)) * draw.randint(1, 5) for _ in range(3)]
        kinds = [kind for part in parts for kind in part]
        found = simulation._repetition([block] * len(kinds), kinds)
        kept = found.shortened(kinds)
        assert found.restored(kept) == kinds
        most = 0
        for period, begin in itertools.product(range(1, len(kinds)), range(len(kinds))):
            repeats = 1
            while kinds[begin:][: period * (repeats + 1)] == kinds[begin:][:period] * (repeats + 1):
                repeats += 1
            most = max(most, (repeats - 3) * period)
        assert len(kinds) - len(kept) == most


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_simulation_skips_equal_loss_chunks(monkeypatch, dtype):
    monkeypatch.setattr(loss, 'CPU_METHOD', loss.CPU_METHOD._replace(chunk_bytes=2**16))
    chunks, chunk_starts = [], loss.chunk_starts
    settings = settings_of(**{**SMALL, 'dtype': dtype, 'device': 'cpu'})
    completed, _ = completed_settings(settings, None)
    simulated = simulation.Simulation(completed.run, completed.architecture, on_gpu=False)

    def all_starts(length, size):
        starts = chunk_starts(length, size)
        chunks.append(len(starts))
        return starts

    monkeypatch.setattr(loss, 'chunk_starts', all_starts)
    few = simulated.micro_step(5, [], False)
    assert chunks[0] > 3
    monkeypatch.setattr(simulation, 'few_chunks', contextlib.nullcontext)
    every = simulated.micro_step(5, [], False)
    assert sizes(few) == sizes(every)


def test_scans_use_the_blocks_of_a_gpu():
    """A sequence of 64 tokens is two blocks on a CPU, and one on a GPU."""
    x, decay = torch.empty(2, 64, 256), torch.empty(16, 256)
    working = WORKING_MEMORY[torch.ops.components.selective_scan]
    with simulation.gpu_kernels(loss.OTHER_METHOD):
        on_gpu = working(x, x, decay)
    assert on_gpu == 2 * working(x, x, decay) == 3 * 4 * x.numel() * 16


def test_simulation_runs_all_different_blocks():
    simulated = simulation.Simulation(
        settings_of(**SMALL).run, ModelArchitectureConfig(**SMALL_ARCHITECTURE), on_gpu=False
    )
    assert simulation._repetition(simulated.blocks, [()] * 4).omitted == 1
    simulated.blocks[2].ffn.down.in_features += 1
    assert simulation._repetition(simulated.blocks, [()] * 4).omitted == 0


SMALL_ARCHITECTURE = {key: value for key, value in SMALL.items() if key != 'batch_size'}


# --- Compared with hand calculations --------------------------------------------------------------


def test_7b_memory_matches_hand_calculation():
    """llama with width 4096, 32 layers, 4096 tokens, in bf16; bytes per hidden value (B·T·C)."""
    planned = plan(**LLAMA_7B, block_size=4096, gpu='H100', batch_size=1, world_size=8)
    number = planned['model']['total_params']
    single, zero1, fsdp = (
        planned['memory'][label]['parts'] for label in ('single', 'zero1', 'fsdp')
    )
    # fp32 weights, gradients and AdamW's two moments.
    states = sum(single[part] for part in ('parameters', 'gradients', 'optimizer'))
    assert states * GB == pytest.approx(16 * number, rel=1e-6)
    assert zero1['optimizer'] * GB == pytest.approx(number, rel=1e-6)
    assert fsdp['parameters'] * GB == pytest.approx(4 * number / 8, rel=1e-3)
    # Per block: two norms with fp32 inputs, 4 each, and two linear layers with bf16 inputs, 2 each;
    # rotated q and k 4, v 2, attention's output 2; gate and up 2 · 2 · 8/3. The other activations
    # of the FFN are recomputed.
    values = 32 * 4096 * 4096
    bytes_per_value = 2 * (4 + 2) + 4 + 2 + 2 + 2 * 2 * 10920 / 4096
    assert single['activations'] * GB == pytest.approx(bytes_per_value * values, rel=0.01)
    # Korthikanti et al. 2022 with recomputed scores: 34, for GELU at 4 times the width, of which 8
    # are the output of GELU.
    assert 1 < bytes_per_value / (34 - 8) < 1.5
    # Autocast copies every matrix except the token embedding, at 2 bytes per value.
    counted = planned['model']['components']
    cast = counted['attention'] + counted['ffn']
    assert single['weight_copies'] * GB == pytest.approx(2 * cast, rel=0.05)
    # bf16: the logits (overwritten by their gradient), the input and its gradient; fp32: the
    # gradient of the matrix, and the input before the cast. Nothing else, since it is compiled.
    assert loss.cuda_method(80e9, None).chunk_bytes > 4096 * 50304 * 2
    head = 2 * (4096 * 50304 + 2 * 4096 * 4096) + 4 * (50304 * 4096 + 4096 * 4096)
    assert single['logits'] * GB == pytest.approx(head, rel=0.01)
    uncompiled = plan(
        **LLAMA_7B, block_size=4096, gpu='H100', batch_size=1, world_size=8, compile=False
    )
    head += loss.cuda_method(80e9, None).scratch_bytes
    assert uncompiled['memory']['single']['parts']['logits'] * GB == pytest.approx(head, rel=0.01)


RECOMPUTED = {'activation_checkpointing': 'full', 'weight_tying': True}


@pytest.mark.parametrize('options', [{}, RECOMPUTED])
def test_counts_match_model(options):
    planned = plan(**SMALL, **options)
    architecture = {**SMALL_ARCHITECTURE, **{k: v for k, v in options.items() if k[0] == 'w'}}
    model = build_model(ModelArchitectureConfig(**architecture))
    assert planned['model'] == count_parameters(model)
    recomputed = list(range(4)) if options else []
    assert planned['flops'] == training_flops(model, recomputed)


def test_time_is_flops_over_speed():
    planned = plan(**SMALL, gpu='B200', world_size=8, max_iters=7, plan_mfu=0.5)
    tokens = 2 * 240 * 64  # micro-batches of two of the 480 sequences
    assert planned['batch']['tokens_per_iter'] == tokens
    flops = 7 * tokens * planned['flops']['per_token']
    assert planned['time']['seconds'] == pytest.approx(flops / (8 * 2250e12 * 0.5))
    assert planned['time']['device_hours'] == pytest.approx(planned['time']['seconds'] * 8 / 3600)
    assert plan(**SMALL, gpu='L4', peak_tflops=100.0)['hardware']['peak_tflops'] == 100
    for gpu, tflops in (('L4', 60), ('T4', 8.1), ('MI250X', 47.85)):  # TF32 where available
        planned = plan(**SMALL, gpu=gpu, dtype='float32')
        assert planned['hardware']['peak_tflops'] == tflops


# --- Largest batch and advice ---------------------------------------------------------------------


@pytest.mark.parametrize('checkpointing', ['none', 'full'])
def test_largest_batch_fits_and_next_does_not(checkpointing):
    options = {**SMALL, 'n_embd': 1024, 'block_size': 1024, 'gradient_accumulation_steps': 8}
    options |= {'device': 'cuda', 'dtype': 'float16', 'activation_checkpointing': checkpointing}
    completed, _ = completed_settings(settings_of(**options, world_size=4), None)
    searched, simulated = (MemoryEstimator(completed, on_gpu=True) for _ in range(2))
    for strategy in searched.strategies(4):
        largest = searched.largest_batch(strategy, limit=14.4 * GB)
        peaks = [simulated.peak(strategy, size) for size in (largest, largest + 1)]
        assert peaks[0] <= 14.4 * GB < peaks[1], (strategy.label, largest, peaks)


@pytest.mark.parametrize(
    ('limit', 'largest'), [(100, 0), (109, 0), (110, 1), (139.9, 3), (1e6, 99_990)]
)
def test_search_for_largest_batch(monkeypatch, limit, largest):
    """Against memory that is exactly linear in the batch, with few simulations."""
    memory = object.__new__(MemoryEstimator)
    memory.run = settings_of(**SMALL).run
    memory._sizes = defaultdict(set)
    simulated = set()

    def totals(self, strategy, size, checkpointing):
        simulated.add(size)
        return [90, 100 + 10 * size]

    monkeypatch.setattr(MemoryEstimator, 'totals', totals)
    strategy = SimpleNamespace(accumulates=True, converted=False)
    assert memory.largest_batch(strategy, limit) == largest
    assert len(simulated) <= 6, simulated


def test_advice_matches_plan_with_its_options():
    options = {**LLAMA_7B, 'n_layer': 9, 'block_size': 4096, 'batch_size': 16}
    options |= {'gpu': 'H100', 'world_size': 8}
    planned = plan(**options)
    assert not any(memory['fits'] for memory in planned['memory'].values())
    assert len(planned['advice']) == 3
    for advice in planned['advice']:
        if advice.startswith('--'):
            options_text, _, rest = advice.partition(': ')
            changes = dict(option.split('=') for option in options_text.replace('--', '').split())
            label, amount = rest.split()[0], float(rest.split()[2])
            memory = plan(**{**options, **changes})['memory'][label]
            assert memory['total_gb'] == pytest.approx(amount, abs=0.051)
            assert memory['fits'] is (not rest.endswith('does not fit.'))


def test_plan_without_gpu_has_no_verdict():
    planned = plan(**SMALL)
    assert planned['time'] is None
    assert {memory['fits'] for memory in planned['memory'].values()} == {None}
    report = plan_report(plan_run(settings_of(**SMALL)))
    assert '--gpu=' in report and 'Largest batch_size' not in report


# --- GPUs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('typed', 'name', 'memory'),
    [
        ('B200', 'B200', 180),
        ('a100-80gb', 'A100 SXM4', 80),
        ('NVIDIA A100-SXM4-40GB', 'A100 SXM4', 40),
        ('rtx4090', 'RTX 4090', 24),
        ('NVIDIA H100 80GB HBM3', 'H100', 80),
        ('V100-PCIE-16GB', 'V100 PCIE', 16),
    ],
)
def test_find_gpu_by_common_names(typed, name, memory):
    gpu = gpu_specs.find_gpu(typed)
    assert (gpu.name, gpu.memory_gb) == (name, memory)
    assert gpu.memory_source and gpu.peak('float16').tflops > 0


@pytest.mark.parametrize(
    ('typed', 'message'),
    [
        ('B20', 'Did you mean'),
        ('A100', '--gpu=A100-40GB or --gpu=A100-80GB'),
        ('V100', 'ambiguous: use one of'),
        ('H100-40GB', '80 GB'),
        ('80GB', 'is unknown'),
    ],
)
def test_find_gpu_rejects_unknown_or_ambiguous_name(typed, message):
    with pytest.raises(UserError, match=message):
        gpu_specs.find_gpu(typed)


def test_every_gpu_with_peak_has_memory():
    assert gpu_specs._MEMORY_OF.keys() == gpu_specs._BY_NAME.keys()


def test_gpu_determines_dtype():
    assert plan(**SMALL, gpu='T4')['hardware']['dtype'] == 'float16'
    assert plan(**SMALL, gpu='L4')['hardware']['dtype'] == 'bfloat16'
    with pytest.raises(UserError, match='T4 has no bfloat16'):
        plan(**SMALL, gpu='T4', dtype='bfloat16')
    with pytest.raises(UserError, match='Remove one of them'):
        plan(**SMALL, gpu='L4', device='cpu')


# --- The command ----------------------------------------------------------------------------------

COMPONENT = """
from components.norms import Norm
from model_config import NORM_REGISTRY

@NORM_REGISTRY.register('doubled')
class Doubled(Norm):
    tag = 'Twice'

    def forward(self, x):
        return 2 * x.float() * self.weight

arch_preset = 'llama'
normalization = 'doubled'
dataset = 'on_the_cluster'
"""


def test_plan_command_needs_no_data_and_writes_nothing(run_script, tmp_path):
    (tmp_path / 'mine.py').write_text(COMPONENT)
    flags = ('--use_fsdp', '--n_layer=4', '--world_size=8', '--gpu=B200')
    out = run_script('train.py', 'mine.py', '--plan', *flags).stdout
    assert '4L-12H-768D-RoPE-Twice-SwiGLU-PreNorm' in out
    assert 'fsdp, set by the options' in out and '50,304' in out and 'device hours' in out
    assert max(map(len, out.splitlines())) <= 80
    assert [path.name for path in tmp_path.iterdir()] == ['mine.py']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--gpu=B200'], "gpu='B200' (command line) has no effect: it needs plan=True"),
        (['--plan', '--gpu=B2000'], 'Did you mean B200?'),
        (['--plan', '--plan_mfu=40'], 'plan_mfu takes'),
        (
            ['--plan', '--world_size=8', '--gradient_accumulation_steps=12'],
            '--gradient_accumulation_steps=16',
        ),
        (['--plan', '--use_fsdp', '--world_size=8', '--fsdp_shard_size=3'], 'fsdp_shard_size=3'),
    ],
)
def test_plan_reports_mistakes(arguments, message):
    with pytest.raises(UserError) as error:
        plan_report(plan_run(load_settings(read_command_line(arguments, schema))))
    assert message in str(error.value)
