"""The start-up report on one screen: the main choices, sizes, data, device and speed of a run."""

from pathlib import Path
from typing import Any

from common.console_output import bold
from common.formatting import counted, flop_count, join_names, or_na
from records.record_types import DataInfo, HardwareInfo, ModelInfo, OptimizerInfo, RecordHeader
from records.report_layout import THICK, field_line, field_tree
from records.startup_report import (
    TITLE,
    expected_text,
    learning_rate_text,
    peak_text,
    with_options,
)

# Options that the report shows in a line of their own.
_SHOWN = {
    *('arch_preset', 'dataset', 'out_dir', 'max_iters', 'seed', 'data_seed', 'learning_rate'),
    *('optimizer', 'lr_schedule', 'device', 'dtype', 'compile', 'weight_decay', 'grad_clip'),
    *('n_layer', 'n_head', 'n_embd', 'report'),
}


def short_report(header: RecordHeader, run_folder: Path | str) -> str:
    """The TRAINING INITIALIZATION report in about 20 lines of 80 columns."""
    config, info = header['config'], header['startup_info']
    architecture, flops, hardware = header['architecture'], info['flops'], info['hardware']
    weights_from = header['metadata'].get('weights_from')
    costs = (
        f'{flop_count(flops["per_token"], "FLOPs")} (full square) │ '
        f'{flop_count(flops["per_token_causal"], "FLOPs")} (causal)'
    )
    run = {
        'Run folder': str(run_folder),
        'Seeds': f'{config["seed"]} (data order {config["data_seed"]})',
        **({'Weights': weights_from['source']} if weights_from else {}),
        'More': '--report=full, or record.json in the run folder',
    }
    lines = [
        THICK,
        bold(TITLE),
        THICK,
        bold('📊 MODEL ARCHITECTURE:'),
        field_line('Architecture Name', architecture['name']),
        field_line('Identity hash', f'{architecture["hash"]} (preset {config["arch_preset"]})'),
        *field_tree(_choices(architecture['choices'])),
        *_options_line(config, info.get('chosen', {})),
        field_line('Parameters', _parameters_text(info['model'])),
        *_training_lines(info['data'], info['optimizer'], config['max_iters']),
        *_device_lines(hardware),
        bold('📈 THEORETICAL PERFORMANCE:'),
        field_line('FLOPs per token', costs),
        field_line('Attention/FFN ratio', or_na(flops['attention_ffn_ratio'], '.2f') + ' (causal)'),
        field_line(
            'Expected tokens/s', expected_text(hardware['expected_tokens_per_sec_at_50_mfu'])
        ),
        *(field_line(label, value) for label, value in run.items()),
    ]
    return '\n'.join(lines) + '\n'


def _choices(choices: dict[str, Any]) -> dict[str, str]:
    """The choices that define an architecture, in four lines."""

    def value(key: str, form: str) -> str | None:
        return None if choices.get(key) is None else form.format(choices[key])

    heads = 'num_kv_heads' if choices.get('use_gqa') else ''
    parts = {
        'Normalization': (value('normalization', '{}'), value('norm_position', '{}')),
        'Position Encoding': (value('position_encoding', '{}'), value('rope_theta', 'theta {:g}')),
        'Attention': (
            value('attention_type', '{}'),
            value(heads, '{} key/value heads'),
            value('sliding_window', 'window {:,}'),
        ),
        'FFN Type': (
            value('ffn_type', '{}'),
            value('expert_ffn', '{}'),
            value('num_experts', '{} experts'),
            value('experts_per_token', '{} per token'),
            value('activation', '{}'),
            value('d_ff', 'width {:,}') if 'num_experts' not in choices else None,
            value('expert_d_ff', 'width {:,}'),
        ),
    }
    texts = {label: ', '.join(filter(None, values)) for label, values in parts.items()}
    return {label: text for label, text in texts.items() if text}


def _options_line(config: dict[str, Any], chosen: dict[str, str]) -> list[str]:
    """The options that differ from the preset and the defaults."""
    unusual = [f'{key}={config[key]}' for key in chosen if key not in _SHOWN]
    return [field_line('Non-default options', join_names(unusual))] if unusual else []


def _parameters_text(model: ModelInfo) -> str:
    total, active = model['total_params'], model['active_params']
    text = f'{total:,} ({model["non_embedding_params"]:,} non-embedding)'
    return text if active == total else f'{text}, {active:,} per token'


def _training_lines(data: DataInfo, optimizer: OptimizerInfo, max_iters: int) -> list[str]:
    tokens = max_iters * data['tokens_per_iter']
    decay, clip = optimizer['weight_decay'], optimizer['grad_clip'] or 'none'
    name = with_options(optimizer['name'], optimizer['options'])
    return [
        field_line(
            'Dataset',
            f'{data["dataset"]} ({data["tokenizer"]}), {data["train_tokens"]:,} training tokens',
        ),
        field_line(
            'Whole run',
            f'{counted(max_iters, "iteration")} × {data["tokens_per_iter"]:,} tokens = '
            f'{tokens:,} tokens = {data["planned_epochs"]:.2f} epochs',
        ),
        field_line('Optimizer', f'{name}, weight decay {decay:g}, gradient clip {clip}'),
        field_line('Learning rate', learning_rate_text(optimizer)),
    ]


def _device_lines(hardware: HardwareInfo) -> list[str]:
    size = hardware['world_size']
    compiled = 'compiled' if hardware['compile'] else 'not compiled'
    processes = '1 process' if size == 1 else f'{size:,} processes'
    device = f'{hardware["device"]} ({hardware["device_name"]})'
    return [
        field_line('Device', f'{device}, {hardware["dtype"]}, {compiled}, {processes}'),
        field_line('Peak', peak_text(hardware)),
    ]
