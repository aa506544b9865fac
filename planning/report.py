"""The report of --plan, from the result of `plan.plan_run`; at most 80 columns wide."""

import math
import textwrap

from common.formatting import clock, counted, milliseconds, teraflops
from records.kinds_report import kinds_table
from records.report_layout import (
    WIDTH,
    field_line,
    field_tree,
    label_of,
    report_text,
    total_table,
)
from records.startup_report import (
    parameters_section,
    performance_section,
    recomputation_lines,
)


def plan_report(plan: dict) -> str:
    """The plan as text. Asserts that the tables add up to their totals."""
    hardware, time = plan['hardware'], plan['time']
    at_50_mfu = time and time['tokens_per_sec'] * 0.5 / time['mfu']
    sections = {
        '📊 MODEL ARCHITECTURE': [
            field_line('Architecture Name', plan['architecture']['name']),
            field_line('Identity hash', plan['architecture']['hash']),
        ],
        **_kinds_sections(plan),
        '🧮 PARAMETERS': parameters_section(plan['model']),
        '📈 FLOPS': performance_section(plan['flops'], at_50_mfu),
        '📚 BATCH': _batch_section(plan['batch']),
        '💾 MEMORY OF ONE DEVICE (GB of 10⁹ bytes)': _memory_section(plan),
        '🕓 TIME': _time_section(hardware, time, plan['batch']['max_iters']),
    }
    if plan['derived']:
        sections['🔧 DERIVED (set a key to override)'] = field_tree(plan['derived'])
    return report_text('📐 PLAN: nothing was trained, and no device was used', sections)


def _kinds_sections(plan: dict) -> dict[str, list[str]]:
    """Parameters and FLOPs by kind of layers, if the model has several."""
    model, flops = plan['model'], plan['flops']
    several = len(model['by_kind']) > 1
    return {'🧱 KINDS OF LAYERS': kinds_table(model, flops)} if several else {}


def _batch_section(batch: dict) -> list[str]:
    size, steps, block = (
        batch[key] for key in ('batch_size', 'gradient_accumulation_steps', 'block_size')
    )
    per_iter, tokens = batch['tokens_per_iter'], batch['tokens']
    assert size * steps * block == per_iter, batch
    return [
        field_line(
            'Tokens/iteration',
            f'{counted(size, "sequence")} × {steps:,} accumulation × {block:,} tokens = '
            f'{per_iter:,}',
        ),
        field_line(
            'Micro-batch',
            f'{counted(size, "sequence")} × {block:,} tokens = {size * block:,} tokens, '
            f'{batch["micro_steps_per_rank"]:,} per device and iteration',
        ),
        field_line(
            'Whole run',
            f'{counted(batch["max_iters"], "iteration")} = {tokens:,} tokens = '
            f'{batch["tokens_per_parameter"]:.1f} per parameter',
        ),
    ]


def _memory_section(plan: dict) -> list[str]:
    """A column for each strategy with its peak memory by part; then what fits."""
    hardware, columns = plan['hardware'], plan['memory'].values()
    for column in columns:
        assert math.isclose(sum(column['parts'].values()), column['total_gb']), column
    rows = {
        label_of(part): [f'{column["parts"][part]:,.1f}' for column in columns]
        for part in next(iter(columns))['parts']
    }
    rows['total'] = [f'{column["total_gb"]:,.1f}' for column in columns]
    below = {'Fullest in': [column['fullest'] for column in columns]}
    usable, total_gb = hardware['usable_gb'], hardware['memory_gb']
    if usable is None:
        limit = 'unknown: set the device, for example --gpu=A100-80GB'
    else:
        source = hardware['memory_source']
        limit = f'up to {usable:.1f} GB, {usable / total_gb:.0%} of {total_gb:,} ({source})'
        below['Fits'] = ['yes' if column['fits'] else 'no' for column in columns]
        largest = [column['largest_batch_size'] for column in columns]
        below['Largest batch_size'] = [f'{size:,}' if size else 'none' for size in largest]
    others = (
        [field_line('More devices', '--world_size=8 shows ddp, zero1 and fsdp')]
        if hardware['world_size'] == 1
        else ['', '  fsdp*: fsdp_reshard_after_forward=False']
    )
    return [
        field_line('Device', f'{hardware["device"]}, {counted(hardware["world_size"], "device")}'),
        field_line('Precision', hardware['dtype']),
        *recomputation_lines(hardware['activation_checkpointing']),
        field_line('Fits', limit),
        field_line('Strategy', f'{plan["chosen"]}, set by the options'),
        '',
        *total_table('Part', list(plan['memory']), rows, below),
        *others,
        *(f'{line}' for text in plan['advice'] for line in _bullet(text)),
        *(f'{line}' for text in plan['notes'] for line in _bullet(text)),
    ]


def _bullet(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent='  - ', subsequent_indent='    ', break_on_hyphens=False
    )


def _time_section(hardware: dict, time: dict | None, max_iters: int) -> list[str]:
    peak, source = hardware['peak_tflops'], hardware['peak_source']
    if time is None:
        return [field_line('Whole run', f'unknown: no peak ({source})')]
    devices = counted(hardware['world_size'], 'device')
    return [
        field_line('Peak', f'{teraflops(peak, "FLOP/s")} of {devices} ({source})'),
        field_line(
            'Speed', f'{time["tokens_per_sec"]:,.0f} tokens/s at {100 * time["mfu"]:g} % MFU'
        ),
        field_line('Iteration', milliseconds(time['seconds_per_iter'] * 1e3)),
        field_line(
            'Whole run',
            f'{clock(time["seconds"])} for {counted(max_iters, "iteration")} = '
            f'{time["device_hours"]:,.1f} device hours, without evaluations',
        ),
    ]
