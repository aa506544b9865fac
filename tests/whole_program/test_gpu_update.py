"""Whole updates of the training loop, as a GPU would see them, on machines without one: an update
never waits for the device, also if it is logged, and no operation runs once per token."""

from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from helpers.device_waits import Operations
from helpers.fake_ranks import fake_ranks
from helpers.in_process import session_here

import train
from benchmarks.gpu_workloads import MIXED, MODELS, settings_of
from common import hardware
from components import cpu_attention
from model_builder import build_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

RANKS = 8
STRATEGIES = {'ddp': {}, 'zero1': {'use_zero1': True}, 'fsdp': {'use_fsdp': True}}
OPTIMIZERS = ('adamw', 'muon', 'lion')
MORE_OPTIONS = {
    'adamw': {'document_mask': True, 'end_of_text': 0},
    'muon': {'arch_preset': 'llama', 'dtype': 'float16'},
    'lion': {'position_encoding': 't5_relative', 'activation_checkpointing': 'full'},
}
# Operations per layer in the forward and backward pass of a micro-step under autocast, not
# compiled: the number counted, and a tenth more.
LAUNCHES = {
    'gpt2': 46,
    'legacy': 60,
    'custom': 60,
    'hybrid': 101,
    'pythia': 115,
    'granite': 150,
    'cohere2': 79,
    'smollm3': 118,
    'llama3': 145,
    'llama': 146,
    'team': 146,
    'mistral': 149,
    'lfm2': 158,
    'qwen2': 150,
    'qwen3': 189,
    'speedrun': 189,
    'olmo2': 191,
    'olmo3': 191,
    'gemma2': 219,
    'mixtral': 233,
    'gemma3': 240,
    'deepseek': 293,
    'mamba': 132,
    'mamba2': 202,
    'granite4': 366,
    'falcon_h1': 325,
    'jamba': 303,
    'qwen3_moe': 274,
    'glm4_moe': 262,
    'deepseek_v3': 345,
    'gpt_oss': 294,
    'llama4': 248,
    'kimi_linear': 518,
    'qwen3_next': 472,
    'mixed': 161,
}
# Recurrences launch operations for each chunk, whose size depends on the number of tokens.
IN_CHUNKS = ('qwen3_next', 'kimi_linear')


@pytest.fixture
def operations(tiny_dataset, tmp_path):
    """`operations(ranks=1, **options)`: the operations of an update, and of a logged update."""
    with ExitStack() as stack:

        def run(ranks: int = 1, **options) -> list[Operations]:
            if ranks > 1:
                stack.enter_context(fake_ranks(ranks))
            # Values that a fake group gathers may not be finite.
            options = {'dropout': 0.1, 'dtype': 'bfloat16', 'on_nonfinite': 'skip', **options}
            options |= {'gradient_accumulation_steps': 2 * ranks, 'log_interval': 1000}
            session = session_here(tiny_dataset, tmp_path, max_iters=2000, **options)
            clock = hardware.StepClock(session.device)
            session.progress.iter = 1
            train.run_iteration(session, clock)  # allocates the optimizer state
            with Operations() as plain:
                train.run_iteration(session, clock)
            session.progress.iter = 1000
            session.pending_log.deferred = True  # as on CUDA
            with Operations() as logged:
                train.run_iteration(session, clock)
            return [plain, logged]

        yield run


def check_waits(plain: Operations, logged: Operations) -> None:
    assert plain.kernels and logged.kernels
    assert not plain.waits and not logged.waits


@pytest.mark.parametrize('name', MODELS)
def test_update_of_each_model_does_not_wait(name, operations):
    optimizer = OPTIMIZERS[list(MODELS).index(name) % len(OPTIMIZERS)]
    check_waits(*operations(optimizer=optimizer, **MODELS[name]))


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('strategy', STRATEGIES)
def test_update_of_each_strategy_does_not_wait(strategy, optimizer, operations):
    """As the first of eight ranks, with collectives that return at once."""
    options = {**MIXED, **STRATEGIES[strategy], 'optimizer': optimizer}
    check_waits(*operations(ranks=RANKS, **options))
    assert dist.get_world_size() == RANKS


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_update_with_other_options_does_not_wait(optimizer, operations):
    check_waits(*operations(optimizer=optimizer, **MORE_OPTIONS[optimizer]))


@pytest.mark.parametrize(
    'call',
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 0).cpu(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: torch.tensor(3.0, device=x.device) * x,
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
    ],
)
def test_waits_are_seen(call):
    """The guard itself: each of these makes the host wait for a GPU."""
    with Operations() as counted:
        call(torch.ones(4))
    assert counted.waits


@pytest.mark.parametrize('name', MODELS)
def test_launches_grow_with_layers_alone(name, monkeypatch):
    """Not with the number of tokens; and no layer launches more than it did."""
    monkeypatch.setattr(cpu_attention, 'supports', lambda q, k: False)

    def launches(n_layer: int, block_size: int) -> int:
        sizes = {'n_head': 4, 'n_embd': 32, 'vocab_size': 64}
        sizes |= {'n_layer': n_layer, 'block_size': block_size}
        config = settings_of(torch.device('cpu'), **sizes, **MODELS[name]).architecture
        model = build_model(config, torch.device('cpu'), 1).train()
        tokens = torch.zeros(2, block_size, dtype=torch.long)
        with Operations() as counted:
            with torch.autocast('cpu', torch.bfloat16):
                loss, _, aux = model(tokens, tokens)
            (loss + aux.loss).backward()
        return sum(counted.kernels.values())

    short, long = (5, 6) if name in IN_CHUNKS else (8, 24)
    count = launches(2, short)
    assert launches(2, long) == count
    per_layer = (launches(4, short) - count) / 2
    assert 0.5 * LAUNCHES[name] < per_layer <= LAUNCHES[name]
