"""The start-up report on one screen: the main choices, sizes, data, device and speed of a run."""

import textwrap
from pathlib import Path
from typing import Any

from common.console_output import bold
from common.formatting import approximate, counted, flop_count, join_names, or_na, teraflops
from records.record_types import (
    ArchitectureInfo,
    DataInfo,
    FlopsInfo,
    HardwareInfo,
    ModelInfo,
    OptimizerInfo,
    RecordHeader,
)
from records.report_layout import THICK, VALUE_COLUMN, WIDTH, field_line, field_tree
from records.startup_report import TITLE, learning_rate_text, with_options

# Options that the report shows in a line of their own.
_SHOWN = {
    *(
        'arch_preset',
        'like',
        'dataset',
        'out_dir',
        'max_iters',
        'seed',
        'data_seed',
        'learning_rate',
    ),
    *('optimizer', 'lr_schedule', 'device', 'dtype', 'compile', 'weight_decay', 'grad_clip'),
    *('n_layer', 'n_head', 'n_embd', 'report', 'layer_pattern', 'layer_kinds'),
}


def short_report(header: RecordHeader, run_folder: Path | str) -> str:
    """The TRAINING INITIALIZATION report in at most 24 lines of 80 columns, 26 for mixed layers."""
    config, info = header['config'], header['startup_info']
    architecture, weights_from = header['architecture'], header['metadata'].get('weights_from')
    family = f'family {config["like"]}' if config.get('like') else ''
    origin = f'{family or "preset " + config["arch_preset"]}, hash {architecture["hash"]}'
    seeds = f'{config["seed"]} (data order {config["data_seed"]})'
    lines = [
        THICK,
        bold(TITLE),
        THICK,
        bold(f'📊 MODEL ARCHITECTURE ({origin}):'),
        _name_line(architecture['name']),
        *field_tree(_choices(architecture)),
        *_options_line(config, info.get('chosen', {})),
        field_line('Parameters', _parameters_text(info['model'])),
        *([field_line('Weights', weights_from['source'])] if weights_from else []),
        *_training_lines(info['data'], info['optimizer'], config['max_iters']),
        *_device_lines(info['hardware']),
        bold('📈 THEORETICAL PERFORMANCE:'),
        *_speed_lines(info['flops'], info['hardware']['expected_tokens_per_sec_at_50_mfu']),
        field_line('Run folder', str(run_folder)),
        field_line('Seeds', f'{seeds} │ full report: --report=full'),
    ]
    return '\n'.join(lines) + '\n'


def _name_line(name: str) -> str:
    """The name of the architecture; a long one continues on a second line after a hyphen."""
    return field_line('Architecture Name', ' '.join(textwrap.wrap(name, WIDTH - VALUE_COLUMN)))


def _choices(architecture: ArchitectureInfo) -> dict[str, str]:
    """The choices that define an architecture, in four lines: those of all layers, then of kinds.

    The name of the architecture has the pattern.
    """
    layers = architecture.get('layers')
    kinds = {'': architecture['choices']} if layers is None else layers['kinds']
    # Records from before the option have attention.
    has_mixers = any(choices.get('mixer', 'attention') != 'attention' for choices in kinds.values())
    by_kind = {kind: _choices_of_layers(choices, has_mixers) for kind, choices in kinds.items()}
    lines = {}
    for label, first in next(iter(by_kind.values())).items():
        common = [part for part in first if all(part in own[label] for own in by_kind.values())]
        own: dict[str, list[str]] = {}  # the kinds of each text
        for kind, parts in by_kind.items():
            text = ', '.join(part for part in parts[label] if part not in common)
            own.setdefault(text, []).append(kind)
        of_kinds = [f'{", ".join(of)}: {text}' for text, of in own.items() if text]
        lines[label] = '; '.join(filter(None, [', '.join(common), *of_kinds]))
    return {label: text for label, text in lines.items() if text}


def _choices_of_layers(choices: dict[str, Any], has_mixers: bool) -> dict[str, list[str]]:
    """The choices that define layers that are all alike, by line.

    has_mixers: whether some layer of the model has a mixer other than attention.
    """

    def value(key: str, form: str = '{}') -> str | None:
        return None if choices.get(key) is None else form.format(choices[key])

    is_grouped, kv_heads = choices.get('use_gqa'), choices.get('num_kv_heads')
    has_experts = 'num_experts' in choices
    parts = {
        'Normalization': [value('normalization'), value('norm_position')],
        'Position Encoding': [value('position_encoding'), value('rope_theta', 'theta {:,.0f}')],
        'Mixer' if has_mixers else 'Attention': [
            value('mixer') if has_mixers else None,
            value('attention_type'),
            counted(kv_heads, 'key/value head') if is_grouped and kv_heads else None,
            value('sliding_window', 'window {:,}'),
            value('attention_chunk', 'chunks of {:,}'),
        ],
        'FFN Type': [
            value('ffn_type'),
            value('expert_ffn'),
            value('num_experts', '{} experts'),
            value('experts_per_token', '{} per token'),
            value('activation'),
            value('expert_d_ff' if has_experts else 'd_ff', 'width {:,}'),
        ],
    }
    return {label: [value for value in values if value] for label, values in parts.items()}


def _options_line(config: dict[str, Any], chosen: dict[str, str]) -> list[str]:
    """The options that differ from the preset and the defaults."""
    unusual = [f'{key}={config[key]}' for key in chosen if key not in _SHOWN]
    return [field_line('Non-default options', join_names(unusual))] if unusual else []


def _parameters_text(model: ModelInfo) -> str:
    total, active = model['total_params'], model['active_params']
    of_token = '' if active == total else f'; {approximate(active)} active'
    return f'{total:,} ({model["non_embedding_params"]:,} non-embedding{of_token})'


def _training_lines(data: DataInfo, optimizer: OptimizerInfo, max_iters: int) -> list[str]:
    tokens = max_iters * data['tokens_per_iter']
    name = with_options(optimizer['name'], optimizer['options'])
    decay, clip = optimizer['weight_decay'], optimizer['grad_clip']
    return [
        field_line(
            'Dataset',
            f'{data["dataset"]} ({data["tokenizer"]}), {data["train_tokens"]:,} training tokens',
        ),
        field_line(
            'Iterations',
            f'{max_iters:,} × {data["tokens_per_iter"]:,} tokens = {tokens:,} = '
            f'{data["planned_epochs"]:.2f} epochs',
        ),
        field_line('Optimizer', f'{name}, decay {decay:g}, clip {clip or "none"}'),
        field_line('Learning rate', learning_rate_text(optimizer)),
    ]


def _device_lines(hardware: HardwareInfo) -> list[str]:
    size, compiled = hardware['world_size'], 'compiled' if hardware['compile'] else 'not compiled'
    device = f'{hardware["device"]} ({hardware["device_name"]})'
    peak, source = hardware['peak_tflops'], (hardware['peak_source'] or '').partition(': ')[0]
    peak_text = f'{teraflops(peak, "FLOP/s")} ({source})'
    return [
        field_line('Device', f'{device}, {hardware["dtype"]}, {compiled}'),
        *([field_line('Processes', f'{size:,}')] if size > 1 else []),
        field_line('Peak', 'unknown (set --peak_tflops)' if peak is None else peak_text),
    ]


def _speed_lines(flops: FlopsInfo, expected_tokens_per_sec: float | None) -> list[str]:
    full, causal = flops['per_token'], flops['per_token_causal']
    ratio = or_na(flops['attention_ffn_ratio'], '.2f') + ' (causal)'
    if expected_tokens_per_sec is not None:
        ratio += f' │ {expected_tokens_per_sec:,.0f} tokens/s expected at 50 % MFU'
    return [
        field_line(
            'FLOPs per token',
            f'{flop_count(full, "FLOPs")} (full square) │ {flop_count(causal, "FLOPs")} (causal)',
        ),
        field_line('Attention/FFN ratio', ratio),
    ]
