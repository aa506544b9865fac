"""The table of docs/performance.md on what to expect of GPUs, calculated again."""

from types import SimpleNamespace

import pytest
from helpers.project import PROJECT

from common import hardware
from configurator import read_command_line
from model_builder import build_model
from parallel.fully_sharded import FullySharded
from parallel.shard_units import shard_units
from parallel.strategies import DataParallel
from planning.plan import completed_settings, plan_run
from training_config import load_settings, schema

pytestmark = pytest.mark.slow

NVLINK = 900e9  # bytes per second in each direction, as the table says
GPT2 = ['config/arch_gpt2.py']
LLAMA3_8B = [
    *('config/arch_llama3.py', '--use_fsdp=True', '--n_layer=32', '--n_head=32', '--n_embd=4096'),
    *('--num_kv_heads=8', '--d_ff=14336', '--block_size=8192', '--vocab_size=128256'),
]
COLUMNS = [(GPT2, 1, 'single'), (GPT2, 8, 'ddp'), (LLAMA3_8B, 8, 'fsdp')]


def bytes_sent(settings, ranks: int) -> float:
    """Bytes that a rank sends per iteration."""
    settings, _ = completed_settings(settings, None)
    run, model = settings.run, build_model(settings.architecture)
    micro_steps = run.gradient_accumulation_steps // ranks
    mesh = SimpleNamespace(ndim=1, size=lambda dim: ranks)
    strategy = SimpleNamespace(run=run, world_size=ranks, mesh=mesh)
    if not run.use_fsdp:
        return DataParallel.bytes_sent(strategy, model, micro_steps)
    strategy.run = SimpleNamespace(reduce_dtype='float32', fsdp_reduce_every_micro_step=True)
    strategy.units = shard_units(model, 'bfloat16', reshard_after_forward=True)
    return FullySharded.bytes_sent(strategy, model, micro_steps)


def expected_column(argv: list[str], ranks: int, label: str) -> list[str]:
    planning = ['--plan', '--gpu=B200', f'--world_size={ranks}', '--dataset=missing']
    settings = load_settings(read_command_line([*argv, *planning], schema))
    plan = plan_run(settings)
    assert plan['chosen'] == label
    if label == 'fsdp':  # as in `bytes_sent`
        assert plan['derived']['fsdp_param_dtype'].startswith('bfloat16')
        assert plan['derived']['fsdp_reduce_every_micro_step'].startswith('True')
    batch, time = plan['batch'], plan['time']
    sizes = [f'--{key}={batch[key]}' for key in ('batch_size', 'gradient_accumulation_steps')]
    with_sizes = load_settings(read_command_line([*argv, *planning, *sizes], schema))
    sent = bytes_sent(with_sizes, ranks) if ranks > 1 else 0.0
    return [
        f'{batch["batch_size"]} × {batch["micro_steps_per_rank"]}',
        f'{plan["memory"][label]["total_gb"]:.1f} GB',
        f'{sent / hardware.GB:.1f} GB',
        f'{1e3 * sent / NVLINK:,.0f} ms',
        f'{1e3 * time["seconds_per_iter"]:,.0f} ms',
        f'{time["tokens_per_sec"]:,.0f}',
    ]


def test_documented_expectations():
    page = (PROJECT / 'docs/performance.md').read_text(encoding='utf-8')
    section = page.partition('\n## What to expect of GPUs\n')[2].partition('\n## ')[0]
    table = [line.split('|') for line in section.splitlines() if line.startswith('|')]
    rows = [[cell.strip() for cell in line[2:-1]] for line in table[2:]]
    for number, column in enumerate(COLUMNS):
        assert [row[number] for row in rows] == expected_column(*column)
