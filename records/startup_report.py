"""The full start-up report (`--report=full`), and the report of a resumed run.

Every table is checked against its total. `records.short_report` has the report on one screen.
"""

import math
from pathlib import Path
from typing import Any

from common.console_output import bold, yellow
from common.formatting import (
    approximate,
    byte_count,
    counted,
    flop_count,
    or_na,
    percent,
    teraflops,
)
from records.kinds_report import kinds_section
from records.record_types import (
    ArchitectureInfo,
    DataInfo,
    FlopsInfo,
    HardwareInfo,
    ModelInfo,
    OptimizerInfo,
    ParallelInfo,
    RecordHeader,
)
from records.report_layout import (
    THICK,
    field_line,
    field_tree,
    label_of,
    report_text,
    total_table,
)

TITLE = '🚀 TRAINING INITIALIZATION'


def startup_report(header: RecordHeader, run_folder: Path | str) -> str:
    """Everything about a run that is known at its start, about 130 lines of at most 80 columns.

    Asserts that every table adds up to its total.
    """
    config, info = header['config'], header['startup_info']
    sections = {
        '📊 MODEL ARCHITECTURE': _architecture_section(header['architecture']),
        **_kinds_sections(header),
        '🧮 PARAMETERS': parameters_section(info['model']),
        '🎯 OPTIMIZER': _optimizer_section(info['optimizer'], info['model']['trainable_params']),
        '📚 DATA': _data_section(info['data'], config['max_iters']),
        '💻 HARDWARE': _hardware_section(info['hardware'], info['parallel']),
        '📈 THEORETICAL PERFORMANCE': performance_section(
            info['flops'], info['hardware']['expected_tokens_per_sec_at_50_mfu']
        ),
    }
    if info['derived']:
        # Keys as they are typed, since readers may want to set them.
        sections['🔧 DERIVED (set a key to override)'] = field_tree(
            {key: str(value) for key, value in info['derived'].items()}
        )
    sections['📁 RUN'] = _run_section(header, run_folder)
    return report_text(TITLE, sections)


def _kinds_sections(header: RecordHeader) -> dict[str, list[str]]:
    """The section on kinds of layers, if the model has several."""
    layers, info = header['architecture'].get('layers'), header['startup_info']
    if layers is None:
        return {}
    return {'🧱 KINDS OF LAYERS': kinds_section(layers, info['model'], info['flops'])}


def _run_section(header: RecordHeader, run_folder: Path | str) -> list[str]:
    config, weights_from = header['config'], header['metadata'].get('weights_from')
    fields = {
        'Folder': str(run_folder),
        'Seeds': f'{config["seed"]} (data order {config["data_seed"]})',
    }
    if config['tensorboard_log']:
        fields['TensorBoard'] = f'tensorboard --logdir={config["out_dir"]}'
    if config['wandb_log']:
        fields['Weights & Biases'] = f'{config["wandb_project"]} / {config["wandb_run_name"]}'
    if weights_from:
        fields['Weights'] = f'{weights_from["source"]} ({weights_from["architecture"]})'
    return [field_line(label, value) for label, value in fields.items()]


def _architecture_section(architecture: ArchitectureInfo) -> list[str]:
    choices = dict(architecture['choices'])
    choices.pop('layer_kinds', None)  # shown in a section of its own
    shown = {
        label_of(key): f'{value:,}' if type(value) is int else str(value)
        for key, value in choices.items()
    }
    return [
        field_line('Architecture Name', architecture['name']),
        field_line('Identity hash', architecture['hash']),
        '',
        *field_tree(shown),
    ]


def parameters_section(model: ModelInfo) -> list[str]:
    total, components = model['total_params'], model['components']
    assert sum(components.values()) == total, (components, total)
    rows = {
        label_of(name): [f'{count:,}', percent(count, total)] for name, count in components.items()
    }
    rows['total'] = [f'{total:,}', percent(total, total)]
    trainable, active = model['trainable_params'], model['active_params']
    idle = [] if active == total else [field_line('Active', f'{active:,} for each token')]
    frozen = [] if trainable == total else [field_line('Trainable', f'{trainable:,}')]
    return [
        *total_table('Component', ['parameters', 'share'], rows),
        '',
        field_line('Non-embedding', f'{model["non_embedding_params"]:,}'),
        *idle,
        *frozen,
    ]


def _optimizer_section(optimizer: OptimizerInfo, trainable: int) -> list[str]:
    groups = optimizer['groups']
    assert sum(group['params'] for group in groups) == trainable, (groups, trainable)
    rows = {
        group['name']: [
            group['rule'],
            f'{group["tensors"]:,}',
            f'{group["params"]:,}',
            f'{group["weight_decay"]}',
            f'{group["lr_scale"]:g}',
        ]
        for group in groups
    }
    tensors = sum(group['tensors'] for group in groups)
    rows['total'] = ['', f'{tensors:,}', f'{trainable:,}', '', '']
    clip = optimizer['grad_clip']
    return [
        field_line('Optimizer', with_options(optimizer['name'], optimizer['options'])),
        field_line('Learning rate', learning_rate_text(optimizer)),
        field_line('Gradient clip', f'{clip}' if clip else 'none'),
        '',
        *total_table('Group', ['rule', 'tensors', 'parameters', 'weight decay', 'rate ×'], rows),
    ]


def learning_rate_text(optimizer: OptimizerInfo) -> str:
    """The peak, the schedule and its options."""
    rate = f'{optimizer["learning_rate"]:.2e}, {optimizer["schedule"]}'
    return with_options(rate, optimizer['schedule_options'])


def with_options(name: str, options: dict[str, Any]) -> str:
    """A choice with its options."""
    return ', '.join([name, *(f'{key} {_option_text(value)}' for key, value in options.items())])


def _option_text(value: Any) -> str:
    return f'{value:,}' if type(value) is int else f'{value:g}' if type(value) is float else value


def _data_section(data: DataInfo, max_iters: int) -> list[str]:
    batch, accumulation = data['batch_size'], data['gradient_accumulation_steps']
    block, per_iter = data['block_size'], data['tokens_per_iter']
    assert batch * accumulation * block == per_iter, (batch, accumulation, block, per_iter)
    windows = data['eval_windows']
    tokens = max_iters * per_iter
    return [
        field_line('Dataset', f'{data["dataset"]} ({data["tokenizer"]})'),
        field_line('Tokens', f'{data["train_tokens"]:,} train │ {data["val_tokens"]:,} validation'),
        *_document_lines(data),
        field_line(
            'Vocabulary', f'{data["vocab_size"]:,} data → {data["model_vocab_size"]:,} model'
        ),
        field_line(
            'Tokens/iteration',
            f'{counted(batch, "sequence")} × {accumulation:,} accumulation × '
            f'{block:,} tokens = {per_iter:,}',
        ),
        field_line(
            'Whole run',
            f'{counted(max_iters, "iteration")} = {tokens:,} tokens = '
            f'{data["planned_epochs"]:.2f} epochs',
        ),
        field_line('Order', _order_text(data)),
        field_line(
            'Evaluation',
            f'{counted(windows["val"] or 0, "window")} validation │ '
            f'{or_na(windows["train"], ",")} train (of {block:,} tokens)',
        ),
    ]


def _document_lines(data: DataInfo) -> list[str]:
    train, validation = data['train_documents'], data['val_documents']
    if train is None or validation is None:
        return []
    return [field_line('Documents', f'{train:,} train │ {validation:,} validation')]


def _order_text(data: DataInfo) -> str:
    """How windows are chosen, and the share of the training split that will be seen."""
    windows, unique = data['windows_per_epoch'], data['planned_unique_tokens']
    share = percent(unique, data['train_tokens']).strip()
    if windows is None:
        seen = f'about {approximate(unique)} distinct tokens ({share}) will be seen'
        return f'random windows (with replacement); {seen}'
    chosen = f'each of {counted(windows, "window")} once per epoch, reshuffled and with new offsets'
    return f'{chosen}; {unique:,} distinct tokens ({share}) will be seen'


def _hardware_section(hardware: HardwareInfo, parallel: ParallelInfo) -> list[str]:
    sent = f'{byte_count(parallel["bytes_sent_per_update"])} sent per process and iteration'
    return [
        field_line('Device', f'{hardware["device"]} ({hardware["device_name"]})'),
        field_line('Processes', f'{hardware["world_size"]:,}'),
        *([field_line('Traffic', sent)] if hardware['world_size'] > 1 else []),
        field_line('Precision', hardware['dtype']),
        field_line('Peak', peak_text(hardware)),
        field_line('CPU threads', or_na(hardware['threads'], ',')),
        field_line('Compile', 'yes' if hardware['compile'] else 'no'),
        *recomputation_lines(hardware['activation_checkpointing']),
    ]


def peak_text(hardware: HardwareInfo) -> str:
    peak, source = hardware['peak_tflops'], hardware['peak_source']
    return f'unknown ({source})' if peak is None else f'{teraflops(peak, "FLOP/s")} ({source})'


def recomputation_lines(checkpointing: str | int) -> list[str]:
    if checkpointing == 'none':
        return []
    blocks = 'every block' if checkpointing == 'full' else f'one block in {checkpointing}'
    return [field_line('Recomputation', f'{blocks} (activation_checkpointing={checkpointing})')]


def performance_section(flops: FlopsInfo, expected_tokens_per_sec: float | None) -> list[str]:
    full, causal = flops['breakdown'], flops['breakdown_causal']
    for parts, total in ((full, flops['per_token']), (causal, flops['per_token_causal'])):
        assert math.isclose(sum(parts.values()), total, rel_tol=1e-9), (parts, total)

    def row(a, b):
        columns = (a, flops['per_token']), (b, flops['per_token_causal'])
        return [cell for x, total in columns for cell in (flop_count(x), percent(x, total))]

    rows = {label_of(name): row(full[name], causal[name]) for name in full}
    rows['total'] = row(flops['per_token'], flops['per_token_causal'])
    again = flops['recomputed_per_token']
    recomputed = f'{flop_count(again, "FLOPs")} per token (in HFU, not in MFU)'
    ratio = flops['attention_ffn_ratio']
    return [
        field_line(
            'FLOPs per token', flop_count(flops['per_token'], 'FLOPs') + ' (forward + backward)'
        ),
        '',
        *total_table('Part', ['full square', 'share', 'causal', 'share'], rows),
        '',
        field_line('Attention/FFN ratio', or_na(ratio, '.2f') + ' (causal)'),
        field_line(
            'Element-wise',
            or_na(flops['elementwise_per_token'], ',.0f')
            + ' values written per token, forward; not in MFU',
        ),
        *([field_line('Recomputed', recomputed)] if again else []),
        field_line('Expected tokens/s', expected_text(expected_tokens_per_sec)),
    ]


def expected_text(tokens_per_sec: float | None) -> str:
    return 'n/a (no peak)' if tokens_per_sec is None else f'{tokens_per_sec:,.0f} at 50 % MFU'


def resume_report(
    iter: int, checkpoint: str, changed: dict[str, list], run_folder: Path | str
) -> str:
    """The report of a resumed run, instead of the start-up report.

    changed: key → [old, new], for options and for the environment (versions, device).
    """
    lines = [THICK, bold(f'🔁 RESUMED from {checkpoint} at iteration {iter:,}'), THICK]
    lines.append(field_line('Folder', str(run_folder)))
    if changed:
        warning = "Changed since the checkpoint; results may differ from an uninterrupted run's:"
        lines += ['', yellow(f'⚠ {warning}')]
        lines += field_tree({key: f'{old} → {new}' for key, (old, new) in changed.items()})
    return '\n'.join([*lines, ''])
