"""What a run shows: plain dicts in, text for people out.

The blocks are those of the design document; lines in nanoGPT's style are the other choice. A log
file, or a terminal that is not UTF-8, gets the same words, with rules of ASCII and no emoji.
"""

import math
import sys
import textwrap
import time
from collections.abc import Callable
from datetime import timedelta

from common.console_output import is_terminal, plain, visible, write_progress
from common.errors import UserError, nearest

STYLES = ('auto', 'block', 'line')
WIDTH = 80
VALUE_COLUMN = 25
SAMPLE_LINES = 10
THIN, THICK = '─' * WIDTH, '=' * WIDTH

_ACRONYMS = {'ffn': 'FFN', 'rope': 'RoPE', 'gqa': 'GQA', 'qk': 'QK', 'kv': 'KV'}
_SIZES = {'n_layer': 'Layers', 'n_head': 'Heads', 'n_embd': 'Width', 'd_ff': 'FFN Width'}


# ------------------------------------------------------------------------------------------------
# Figures and tables
# ------------------------------------------------------------------------------------------------


def _show(value, form: str) -> str:
    return 'n/a' if value is None else format(value, form)


def _bytes(count: float) -> str:
    """1.50 GB, or MB or kB of what is less."""
    units = ((1e9, 'GB'), (1e6, 'MB'))
    size, unit = next((pair for pair in units if count >= pair[0]), (1e3, 'kB'))
    return f'{count / size:.2f} {unit}'


def _flops(value: float | None, unit: str = 'F') -> str:
    """FLOPs or FLOP/s with the prefix that suits their size: `854.7 MF`, `101.2 TFLOP/s`."""
    if value is None:
        return 'n/a'
    for prefix in ('', 'K', 'M', 'G', 'T', 'P', 'E'):
        if abs(value) < 999.95:
            return f'{value:.1f} {prefix}{unit}'
        value /= 1000
    return f'{value:,.1f} Z{unit}'


def _teraflops(value: float | None) -> str:
    return _flops(None if value is None else value * 1e12)


def _milliseconds(value: float | None) -> str:
    if value is None:
        return 'n/a'
    if value < 10:
        return f'{value:.2f}ms'
    return f'{value:.0f}ms' if value < 10_000 else f'{value / 1000:.1f}s'


def _duration(seconds: float | None) -> str:
    """`0:12:30`, or `2 days, 3:04:05`."""
    return 'n/a' if seconds is None else str(timedelta(seconds=round(seconds)))


def _percent(part: float, whole: float) -> str:
    return f'{100 * part / whole:5.1f} %' if whole else '    n/a'


def _count(number: int, noun: str) -> str:
    return f'{number:,} {noun}' + ('' if number == 1 else 's')


def _label(key: str) -> str:
    """`position_encoding` → `Position Encoding`, `n_layer` → `Layers`."""
    words = (_ACRONYMS.get(word, word.capitalize()) for word in key.split('_'))
    return _SIZES.get(key) or ' '.join(words)


def _field(label: str, value: str, branch: str = '') -> str:
    """One `label: value` line; a long value goes on below itself."""
    head = f'  {branch}{label}:'.ljust(VALUE_COLUMN - 1) + ' '
    rest = ('  │' if branch == '├─ ' else '').ljust(VALUE_COLUMN)
    return '\n'.join(
        textwrap.wrap(
            value,
            max(WIDTH, len(head) + 40),
            initial_indent=head,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
        or [head.rstrip()]
    )


def _tree(fields: dict[str, str]) -> list[str]:
    last = len(fields) - 1
    return [
        _field(label, value, '├─ ' if i < last else '└─ ')
        for i, (label, value) in enumerate(fields.items())
    ]


def _table(
    title: str,
    columns: list[str],
    rows: dict[str, list[str]],
    below: dict[str, list[str]] | None = None,
) -> list[str]:
    """A tree with several right-aligned columns; the last row is their total, below the tree.

    below: rows that stand under the total and are no part of it.
    """
    labels = [f'  {title}', *(f'  ├─ {label}' for label in rows)]
    labels[-1] = labels[-1].replace('├─', '  ')
    labels[-2] = labels[-2].replace('├─', '└─')
    labels += [f'  {label}' for label in below or {}]
    labels = [label.ljust(VALUE_COLUMN - 2) for label in labels]
    cells = [columns, *rows.values(), *(below or {}).values()]
    return _columns([[label, *row] for label, row in zip(labels, cells)])


def _columns(rows: list[list[str]]) -> list[str]:
    """Rows as lines: the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


# ------------------------------------------------------------------------------------------------
# The start
# ------------------------------------------------------------------------------------------------


def startup_report(
    config: dict, architecture: dict, startup_info: dict, run_folder, weights_from=None
) -> str:
    """The TRAINING INITIALIZATION report, some 70 lines of at most 80 columns.

    Asserts that every table adds up to the total that stands beside it.
    """
    data, hardware = startup_info['data'], startup_info['hardware']
    sections = {
        '📊 MODEL ARCHITECTURE': _architecture_section(architecture),
        '🧮 PARAMETERS': _parameters_section(startup_info['model']),
        '🎯 OPTIMIZER': _optimizer_section(
            startup_info['optimizer'], startup_info['model']['trainable_params']
        ),
        '📚 DATA': _data_section(data, config['max_iters']),
        '💻 HARDWARE': _hardware_section(hardware, startup_info['parallel']),
        '📈 THEORETICAL PERFORMANCE': _performance_section(startup_info['flops'], hardware),
    }
    if startup_info['derived']:
        # Keys as they are typed, since this is where one decides to set them.
        sections['🔧 DERIVED (set a key to override)'] = _tree(
            {key: str(value) for key, value in startup_info['derived'].items()}
        )
    sections['📁 RUN'] = [
        _field('Folder', str(run_folder)),
        _field('Seeds', f'{config["seed"]} (data order {config["data_seed"]})'),
    ]
    if config['tensorboard_log']:
        command = f'tensorboard --logdir={config["out_dir"]}'
        sections['📁 RUN'].append(_field('TensorBoard', command))
    if config['wandb_log']:
        place = f'{config["wandb_project"]} / {config["wandb_run_name"]}'
        sections['📁 RUN'].append(_field('Weights & Biases', place))
    if weights_from:
        came_from = f'{weights_from["source"]} ({weights_from["architecture"]})'
        sections['📁 RUN'].append(_field('Weights', came_from))
    lines = [THICK, '🚀 TRAINING INITIALIZATION', THICK]
    for title, body in sections.items():
        lines += ['', f'{title}:', *body]
    return '\n'.join([*lines, ''])


def _architecture_section(architecture: dict) -> list[str]:
    choices = architecture['choices'].items()
    shown = {
        _label(key): f'{value:,}' if type(value) is int else str(value) for key, value in choices
    }
    return [
        _field('Architecture Name', architecture['name']),
        _field('Identity hash', architecture['hash']),
        '',
        *_tree(shown),
    ]


def _parameters_section(model: dict) -> list[str]:
    total, components = model['total_params'], model['components']
    assert sum(components.values()) == total, (components, total)
    rows = {
        _label(name): [f'{count:,}', _percent(count, total)] for name, count in components.items()
    }
    rows['total'] = [f'{total:,}', _percent(total, total)]
    trainable, active = model['trainable_params'], model['active_params']
    idle = [] if active == total else [_field('Active', f'{active:,} for each token')]
    frozen = [] if trainable == total else [_field('Trainable', f'{trainable:,}')]
    return [
        *_table('Component', ['parameters', 'share'], rows),
        '',
        _field('Non-embedding', f'{model["non_embedding_params"]:,}'),
        *idle,
        *frozen,
    ]


def _optimizer_section(optimizer: dict, trainable: int) -> list[str]:
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
    rate, schedule = f'{optimizer["learning_rate"]:.2e}', optimizer['schedule']
    return [
        _field('Optimizer', _choice(optimizer['name'], optimizer['options'])),
        _field('Learning rate', _choice(f'{rate}, {schedule}', optimizer['schedule_options'])),
        _field('Gradient clip', f'{clip}' if clip else 'none'),
        '',
        *_table('Group', ['rule', 'tensors', 'parameters', 'weight decay', 'rate ×'], rows),
    ]


def _choice(name: str, options: dict) -> str:
    """A choice with its options."""
    return ', '.join([name, *(f'{key} {_show_option(value)}' for key, value in options.items())])


def _show_option(value) -> str:
    return f'{value:,}' if type(value) is int else f'{value:g}' if type(value) is float else value


def _data_section(data: dict, max_iters: int) -> list[str]:
    batch, accumulation = data['batch_size'], data['gradient_accumulation_steps']
    block, per_iter = data['block_size'], data['tokens_per_iter']
    assert batch * accumulation * block == per_iter, (batch, accumulation, block, per_iter)
    windows = data['eval_windows']
    tokens = max_iters * per_iter
    return [
        _field('Dataset', f'{data["dataset"]} ({data["tokenizer"]})'),
        _field('Tokens', f'{data["train_tokens"]:,} train │ {data["val_tokens"]:,} validation'),
        *_documents(data),
        _field('Vocabulary', f'{data["vocab_size"]:,} data → {data["model_vocab_size"]:,} model'),
        _field(
            'Tokens/iteration',
            f'{_count(batch, "sequence")} × {accumulation:,} accumulation × '
            f'{block:,} tokens = {per_iter:,}',
        ),
        _field(
            'Whole run',
            f'{_count(max_iters, "iteration")} = {tokens:,} tokens = '
            f'{data["planned_epochs"]:.2f} epochs',
        ),
        _field('Order', _order(data)),
        _field(
            'Evaluation',
            f'{_count(windows["val"], "window")} validation │ {_show(windows["train"], ",")} train '
            f'(of {block:,} tokens)',
        ),
    ]


def _documents(data: dict) -> list[str]:
    train, validation = data['train_documents'], data['val_documents']
    if train is None or validation is None:
        return []
    return [_field('Documents', f'{train:,} train │ {validation:,} validation')]


def _order(data: dict) -> str:
    """How windows are chosen, and how much of the split that shows the run."""
    windows, unique = data['windows_per_epoch'], data['planned_unique_tokens']
    share = f'{unique:,} of the tokens ({_percent(unique, data["train_tokens"]).strip()})'
    if windows is None:
        return f'windows drawn at random, again and again: the run meets about {share}'
    chosen = f'each of {_count(windows, "window")} once an epoch, shuffled and cut anew in each'
    return f'{chosen}: the run meets {share}'


def _hardware_section(hardware: dict, parallel: dict) -> list[str]:
    peak, source = hardware['peak_tflops'], hardware['peak_source']
    sent = f'{_bytes(parallel["bytes_sent_per_update"])} from each process in an update'
    return [
        _field('Device', f'{hardware["device"]} ({hardware["device_name"]})'),
        _field('Processes', f'{hardware["world_size"]:,}'),
        *([_field('Traffic', sent)] if hardware['world_size'] > 1 else []),
        _field('Precision', hardware['dtype']),
        _field(
            'Peak',
            f'unknown ({source})'
            if peak is None
            else f'{_flops(peak * 1e12, "FLOP/s")} ({source})',
        ),
        _field('CPU threads', _show(hardware['threads'], ',')),
        _field('Compile', 'yes' if hardware['compile'] else 'no'),
        *_recomputation(hardware['activation_checkpointing']),
    ]


def _recomputation(checkpointing: str | int) -> list[str]:
    if checkpointing == 'none':
        return []
    blocks = 'every block' if checkpointing == 'full' else f'one block in {checkpointing}'
    return [_field('Recomputation', f'{blocks} (activation_checkpointing={checkpointing})')]


def _performance_section(flops: dict, hardware: dict) -> list[str]:
    full, causal = flops['breakdown'], flops['breakdown_causal']
    for parts, total in ((full, flops['per_token']), (causal, flops['per_token_causal'])):
        assert math.isclose(sum(parts.values()), total, rel_tol=1e-9), (parts, total)

    def row(a, b):
        columns = (a, flops['per_token']), (b, flops['per_token_causal'])
        return [cell for x, total in columns for cell in (_flops(x), _percent(x, total))]

    rows = {_label(name): row(full[name], causal[name]) for name in full}
    rows['total'] = row(flops['per_token'], flops['per_token_causal'])
    again = flops['recomputed_per_token']
    recomputed = [_field('Recomputed', f'{_flops(again, "FLOPs")} per token (in HFU, not in MFU)')]
    ratio = flops['attention_ffn_ratio']
    expected = hardware['expected_tokens_per_sec_at_50_mfu']
    return [
        _field('FLOPs per token', _flops(flops['per_token'], 'FLOPs') + ' (forward + backward)'),
        '',
        *_table('Part', ['full square', 'share', 'causal', 'share'], rows),
        '',
        _field('Attention/FFN ratio', _show(ratio, '.2f') + ' (causal)'),
        _field(
            'Element-wise',
            _show(flops['elementwise_per_token'], ',.0f')
            + ' values written per token, forward; not in MFU',
        ),
        *(recomputed if again else []),
        _field(
            'Expected tokens/s',
            'n/a (no peak)' if expected is None else f'{expected:,.0f} at 50 % MFU',
        ),
    ]


def resume_report(k: int, checkpoint: str, changed: dict, run_folder) -> str:
    """What a resumed run says instead of the start-up report.

    `changed` is key → [old, new], for options and for what lies around them: versions, device.
    """
    lines = [THICK, f'🔁 RESUMED from {checkpoint} at iteration {k:,}', THICK]
    lines.append(_field('Folder', str(run_folder)))
    if changed:
        warning = "Changed since the checkpoint; results may differ from an uninterrupted run's:"
        lines += ['', f'⚠ {warning}']
        lines += _tree({key: f'{old} → {new}' for key, (old, new) in changed.items()})
    return '\n'.join([*lines, ''])


# ------------------------------------------------------------------------------------------------
# The plan
# ------------------------------------------------------------------------------------------------


def plan_report(plan: dict) -> str:
    """What --plan shows, at most 80 columns wide. Asserts that tables add up to their totals."""
    hardware, time = plan['hardware'], plan['time']
    at_50_mfu = time and time['tokens_per_sec'] * 0.5 / time['mfu']
    sections = {
        '📊 MODEL ARCHITECTURE': [
            _field('Architecture Name', plan['architecture']['name']),
            _field('Identity hash', plan['architecture']['hash']),
        ],
        '🧮 PARAMETERS': _parameters_section(plan['model']),
        '📈 FLOPS': _performance_section(
            plan['flops'], {'expected_tokens_per_sec_at_50_mfu': at_50_mfu}
        ),
        '📚 BATCH': _batch_section(plan['batch']),
        '💾 MEMORY OF ONE DEVICE (GB of 10⁹ bytes)': _memory_section(plan),
        '🕓 TIME': _time_section(hardware, time, plan['batch']['max_iters']),
    }
    if plan['derived']:
        sections['🔧 DERIVED (set a key to override)'] = _tree(plan['derived'])
    lines = [THICK, '📐 PLAN: nothing was trained, and no device was used', THICK]
    for title, body in sections.items():
        lines += ['', f'{title}:', *body]
    return '\n'.join([*lines, ''])


def _batch_section(batch: dict) -> list[str]:
    size, steps, block = (
        batch[key] for key in ('batch_size', 'gradient_accumulation_steps', 'block_size')
    )
    per_iter, tokens = batch['tokens_per_iter'], batch['tokens']
    assert size * steps * block == per_iter, batch
    return [
        _field(
            'Tokens/iteration',
            f'{_count(size, "sequence")} × {steps:,} accumulation × {block:,} tokens = '
            f'{per_iter:,}',
        ),
        _field(
            'Micro-batch',
            f'{_count(size, "sequence")} × {block:,} tokens = {size * block:,} tokens, '
            f'{batch["micro_steps_per_rank"]:,} a device and iteration',
        ),
        _field(
            'Whole run',
            f'{_count(batch["max_iters"], "iteration")} = {tokens:,} tokens = '
            f'{batch["tokens_per_parameter"]:.1f} a parameter',
        ),
    ]


def _memory_section(plan: dict) -> list[str]:
    """A column for each strategy with the parts of its fullest moment; then what fits."""
    hardware, columns = plan['hardware'], plan['memory'].values()
    for column in columns:
        assert math.isclose(sum(column['parts'].values()), column['total_gb']), column
    rows = {
        _label(part): [f'{column["parts"][part]:,.1f}' for column in columns]
        for part in next(iter(columns))['parts']
    }
    rows['total'] = [f'{column["total_gb"]:,.1f}' for column in columns]
    below = {'Fullest in': [column['fullest'] for column in columns]}
    usable, of = hardware['usable_gb'], hardware['memory_gb']
    if usable is None:
        limit = 'unknown: name the device, for example --gpu=A100-80GB'
    else:
        limit = f'up to {usable:.1f} GB, {usable / of:.0%} of {of:,} ({hardware["memory_source"]})'
        below['Fits'] = ['yes' if column['fits'] else 'no' for column in columns]
        largest = [column['largest_batch_size'] for column in columns]
        below['Largest batch_size'] = [f'{size:,}' if size else 'none' for size in largest]
    others = (
        [_field('More devices', '--world_size=8 shows ddp, zero1 and fsdp')]
        if hardware['world_size'] == 1
        else ['', '  fsdp*: fsdp_reshard_after_forward=False']
    )
    return [
        _field('Device', f'{hardware["device"]}, {_count(hardware["world_size"], "device")}'),
        _field('Precision', hardware['dtype']),
        *_recomputation(hardware['activation_checkpointing']),
        _field('Fits', limit),
        _field('Strategy', f'{plan["chosen"]}, by the options'),
        '',
        *_table('Part', list(plan['memory']), rows, below),
        *others,
        *(f'{line}' for text in plan['advice'] for line in _item(text)),
        *(f'{line}' for text in plan['notes'] for line in _item(text)),
    ]


def _item(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent='  - ', subsequent_indent='    ', break_on_hyphens=False
    )


def _time_section(hardware: dict, time: dict | None, max_iters: int) -> list[str]:
    peak, source = hardware['peak_tflops'], hardware['peak_source']
    if time is None:
        return [_field('Whole run', f'unknown: no peak ({source})')]
    devices = _count(hardware['world_size'], 'device')
    return [
        _field('Peak', f'{_flops(peak * 1e12, "FLOP/s")} of {devices} ({source})'),
        _field('Speed', f'{time["tokens_per_sec"]:,.0f} tokens/s at {100 * time["mfu"]:g} % MFU'),
        _field('Iteration', _milliseconds(time['seconds_per_iter'] * 1e3)),
        _field(
            'Whole run',
            f'{_duration(time["seconds"])} for {_count(max_iters, "iteration")} = '
            f'{time["device_hours"]:,.1f} device hours, without evaluations',
        ),
    ]


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------


def _hfu(mfu: dict) -> str | None:
    """Hardware FLOPs utilisation, where recomputation sets it apart from MFU."""
    if mfu['hfu_percent'] is None:
        return None
    shown, of_model = (f'{mfu[key]:.2f}%' for key in ('hfu_percent', 'mfu_percent'))
    return shown if shown != of_model else None


def memory_peak(entry: dict) -> float | None:
    """The peak of the memory in use, GB: the device's, else what it tells, else the process's."""
    keys = ('peak_gb', 'reserved_gb', 'allocated_gb', 'rss_gb')
    known = (entry['memory'][key] for key in keys if entry['memory'][key] is not None)
    return next(known, None)


def iteration_line(entry: dict, eta: float | None) -> str:
    """One line in nanoGPT's form, which scripts that read nanoGPT's logs understand."""
    mfu, peak = entry['mfu']['mfu_percent'], memory_peak(entry)
    hfu, scale = _hfu(entry['mfu']), entry['loss_scale']
    parts = {
        'loss': _show(entry['loss'], '.4f'),
        'time': _show(entry['time_ms'], '.2f') + 'ms',
        'mfu': 'n/a' if mfu is None else f'{mfu:.2f}%',
        **({'hfu': hfu} if hfu else {}),
        'lr': _show(entry['lr'], '.2e'),
        'tok/s': _show(entry['tokens_per_sec'], ',.0f'),
        'mem': 'n/a' if peak is None else f'{peak:.1f}GB',
        'grad': _show(entry['gradients']['norm'], '.3f'),
        **({} if scale is None else {'scale': f'{scale:.10g}'}),
        'eta': _duration(eta),
    }
    return f'iter {entry["iter"]}: ' + ', '.join(f'{key} {text}' for key, text in parts.items())


def iteration_block(entry: dict, eta: float | None, no_peak: str | None) -> str:
    """The design's block of an iteration; `no_peak` is why there is no MFU, if so."""
    mfu, memory, gradients = entry['mfu'], entry['memory'], entry['gradients']
    hfu, scale = _hfu(mfu), entry['loss_scale']
    achieved = f'Achieved: {_teraflops(mfu["achieved_tflops"])}'
    rate = (
        f'Tokens/s: {_show(entry["tokens_per_sec"], ",.0f")} │ '
        f'FLOPs/token: {_flops(mfu["flops_per_token"])}'
    )
    if mfu['mfu_percent'] is None:
        speed = [f'⚡ MFU: n/a ({no_peak or "not measured"})', f'   {achieved} │ {rate}']
    else:
        speed = [
            f'⚡ MFU: {mfu["mfu_percent"]:.2f}% (causal {mfu["mfu_causal_percent"]:.2f}%) │ '
            f'{achieved} │ Peak: {_teraflops(mfu["hardware_peak_tflops"])}',
            '   ' + (f'HFU: {hfu} │ ' if hfu else '') + rate,
        ]
    names = {'allocated_gb': 'alloc', 'peak_gb': 'peak', 'reserved_gb': 'reserved'}
    if all(memory[key] is None for key in names):  # no device memory: what the process holds
        names = {'rss_gb': 'resident'}
    sizes = [f'{memory[k]:.2f} GB {name}' for k, name in names.items() if memory[k] is not None]
    return '\n'.join(
        [
            THIN,
            f'📍 Iter {entry["iter"]:>6} │ Loss: {_show(entry["loss"], ".4f")} │ '
            f'Time: {_milliseconds(entry["time_ms"])} │ LR: {_show(entry["lr"], ".2e")} │ '
            f'ETA: {_duration(eta)}',
            THIN,
            *speed,
            f'💾 Memory: {" │ ".join(sizes) or "n/a"}',
            f'📊 Gradients: norm={_show(gradients["norm"], ".4f")} │ '
            f'mean={_show(gradients["mean"], ".2e")} │ std={_show(gradients["std"], ".2e")}'
            + ('' if scale is None else f' │ scale {scale:.10g}'),
            *_readings(entry['readings']),
        ]
    )


def _readings(readings: dict) -> list[str]:
    """What components report, two lines at most for those that come with the project."""
    texts = [f'{_label(name)}={_show(value, ".4g")}' for name, value in readings.items()]
    rows = [texts[i : i + 3] for i in range(0, len(texts), 3)]
    return [('🧭 ' if i == 0 else '   ') + ' │ '.join(row) for i, row in enumerate(rows)]


def evaluation_line(entry: dict) -> str:
    line = (
        f'step {entry["iter"]}: train loss {_show(entry["train_loss"], ".4f")}, '
        f'val loss {_show(entry["val_loss"], ".4f")}'
    )
    bits = entry['val_bits_per_byte']
    return line if bits is None else f'{line}, {bits:.4f} bits per byte'


def evaluation_block(entry: dict, best: dict | None) -> str:
    """A block of its own, which ends with the best validation loss of the run so far."""
    bits = entry['val_bits_per_byte']
    losses = {
        'Train loss': _show(entry['train_loss'], '.4f'),
        'Val loss': _show(entry['val_loss'], '.4f'),
        **({} if bits is None else {'Bits/byte': f'{bits:.4f}'}),
    }
    standing = 'n/a'
    if best:
        is_this = best['iter'] == entry['iter']
        standing = 'this one' if is_this else f'{best["val_loss"]:.4f} at iter {best["iter"]:,}'
    return '\n'.join(
        [
            THICK,
            f'🔍 EVALUATION after {_count(entry["iter"], "iteration")} '
            f'(took {_milliseconds(entry["time_ms"])})',
            '   ' + ' │ '.join(f'{label}: {text}' for label, text in losses.items()),
            f'   Best val loss so far: {standing}',
            THICK,
        ]
    )


def diagnostics_table(diagnostics: dict) -> str:
    """A line a layer, then the size of an update and the loss along the context; indented."""
    lines, layers = [], diagnostics['layers']
    if layers:
        keys = ('activation_rms', 'gradient_norm', 'max_attention_logit')
        title = ['  Layer', 'activation rms', 'gradient norm', 'max attention logit']
        lines += _columns(
            [title]
            + [[f'{row["layer"]:7}', *(_show(row[key], '.3g') for key in keys)] for row in layers]
        )
    if ratios := diagnostics['update_to_weight']:
        texts = (f'{group} {_show(ratio, ".1e")}' for group, ratio in ratios.items())
        lines.append(_field('Update/weight', ' │ '.join(texts)))
    if spans := diagnostics['val_loss_by_position']:
        texts = (f'{_positions(span)}={_show(span["loss"], ".3f")}' for span in spans)
        lines.append(_field('Val loss by position', ', '.join(texts)))
    return '\n'.join(lines)


def sample_block(sample: dict) -> str:
    """The beginning of what the model wrote, the prompt included."""
    head = f'📝 Sample (took {_milliseconds(sample["time_ms"])})'
    if sample['text'] is None:
        return f'{head}: none, since the logits are not finite'
    lines = first_lines(sample['prompt'] + sample['text'], WIDTH - 5)
    return '\n'.join([head, *(f'   │ {line}'.rstrip() for line in lines)])


def first_lines(text: str, width: int) -> list[str]:
    """The first lines of a text that a model wrote, which may hold anything."""
    paragraphs = visible(text).replace('\t', ' ').strip('\n').split('\n')
    lines = [line for whole in paragraphs for line in textwrap.wrap(whole, width) or ['']]
    return lines if len(lines) <= SAMPLE_LINES else [*lines[:SAMPLE_LINES], '…']


def _positions(span: dict) -> str:
    """`0`, or `512-1023`: `to` itself is not part of a span."""
    first, last = span['from'], span['to'] - 1
    return str(first) if first == last else f'{first}-{last}'


def checkpoint_line(entry: dict) -> str:
    took, written = (_milliseconds(entry[key]) for key in ('time_ms', 'write_ms'))
    times = f'{took}; written in {written}'
    return f'💾 checkpoint after iter {entry["iter"]}: {entry["path"]} ({times})'


def event_line(entry: dict) -> str:
    where = '' if entry['iter'] is None else f' at iter {entry["iter"]}'
    message = entry.get('message')
    return f'⚠ {entry["event"]}{where}' + (f': {message}' if message else '')


def _held(startup_info: dict) -> dict[str, str]:
    """What a process of several holds, where that is known."""
    parallel = startup_info['parallel']
    if startup_info['hardware']['world_size'] == 1 or parallel['parameter_bytes'] is None:
        return {}
    names = {'weights': 'parameter', 'gradients': 'gradient', 'optimizer': 'optimizer'}
    parts = [f'{name} {_bytes(parallel[f"{key}_bytes"])}' for name, key in names.items()]
    return {'Each process': ', '.join(parts)}


def _above_peak(mfu: float, source: str | None) -> str:
    if mfu <= 100:
        return ''
    measured = (source or '').startswith('measured')
    why = 'was measured while the machine was busy' if measured else f'is from {source}'
    return f' (more than the peak, which {why})'


def closing_block(document: dict, best: dict | None, record_path) -> str:
    """What the run came to, where its record is and what to type next."""
    summary, status = document['summary'], document['status']
    best_text = 'n/a'
    if best:
        bits = best['val_bits_per_byte']
        best_text = f'{best["val_loss"]:.4f} (iter {best["iter"]:,}'
        best_text += ')' if bits is None else f'; {bits:.4f} bits per byte)'
    mfu, memory = summary['avg_mfu'], summary['peak_memory_gb']
    source = document['startup_info']['hardware'].get('peak_source')
    fields = {
        'Best val loss': best_text,
        'Final val loss': _show(summary['final_val_loss'], '.4f'),
        'Final train loss': _show(summary['final_train_loss'], '.4f'),
        'Average MFU': 'n/a' if mfu is None else f'{mfu:.2f}%{_above_peak(mfu, source)}',
        'Average iteration': _milliseconds(summary['avg_time_ms']),
        'Time': _duration(summary['wall_seconds']),
        'Tokens': _tokens_seen(summary, document['startup_info'].get('data', {})),
        'Compute': _flops(summary['total_flops'], 'FLOPs'),
        'Peak memory': 'n/a' if memory is None else f'{memory:.2f} GB',
        **_held(document['startup_info']),
        'Record': str(record_path),
        'Compare': 'python compare_architectures.py --latest 3',
    }
    if status != 'finished' and document['checkpoints']:
        fields['Continue'] = 'the same command with --init_from=resume'
    mark = '✅' if status == 'finished' else '⛔'
    of = _show(summary['total_iterations'], ',')
    return '\n'.join(
        [
            '',
            THICK,
            f'{mark} TRAINING {status.upper()} after {summary["final_iter"]:,} of {of} iterations',
            THICK,
            *(_field(label, value) for label, value in fields.items()),
            THICK,
        ]
    )


def _tokens_seen(summary: dict, data: dict) -> str:
    total, epochs, unique = (summary[key] for key in ('total_tokens', 'epochs', 'unique_tokens'))
    text = _show(total, ',')
    if epochs is not None:
        text += f' ({epochs:.2f} epochs)'
    if unique is not None:
        about = '' if data['windows_per_epoch'] else 'about '
        text += f', {about}{unique:,} different ones'
    return text


# ------------------------------------------------------------------------------------------------
# The stream
# ------------------------------------------------------------------------------------------------


class Console:
    """Shows a run as it goes on `stream`, standard output unless given.

    `style` is `block` (the design document's form; `auto` means it) or `line` (nanoGPT's form).
    `on_lost` is called, with the reason, when the stream takes no more; the rest is not shown.
    """

    def __init__(
        self,
        style: str = 'auto',
        stream=None,
        *,
        max_iters: int,
        on_lost: Callable[[str], None] = lambda reason: None,
    ):
        if style not in STYLES:
            raise UserError(
                f'log_style={style!r} is not one of {", ".join(STYLES)}.{nearest(style, STYLES)}'
            )
        self.one_line = style == 'line'
        self.stream = stream or sys.stdout
        self.on_lost, self.is_lost = on_lost, False
        self.max_iters = max_iters
        self.no_peak = None  # why there is no MFU
        self.first_logged = None  # (iter, time) where the pace is taken from

    def begin(self, report: str, hardware: dict) -> None:
        """Show how this process starts; `hardware` is the part of startup_info."""
        if hardware['peak_tflops'] is None:
            self.no_peak = hardware['peak_source']
        self.show(report)

    def iteration(self, entry: dict) -> None:
        eta = self._time_left(entry['iter'])
        if self.one_line:
            self.show(iteration_line(entry, eta))
        else:
            self.show(iteration_block(entry, eta, self.no_peak))

    def evaluation(self, entry: dict, best: dict | None) -> None:
        self.show(evaluation_line(entry) if self.one_line else evaluation_block(entry, best))
        if 'diagnostics' in entry:
            self.show(diagnostics_table(entry['diagnostics']))
        if 'sample' in entry:
            self.show(sample_block(entry['sample']))

    def rollback(self, event: dict) -> None:
        self.first_logged = None  # the pace begins anew
        self.show(event_line(event))

    def show(self, text: str) -> None:
        """Print `text` in the letters that the stream has; a stream that is gone ends no run."""
        if self.is_lost:
            return
        if not is_terminal(self.stream):
            text = plain(text)
        reason = write_progress(text, stream=self.stream)
        if reason:
            self.is_lost = True
            self.on_lost(reason)

    def _time_left(self, iter: int) -> float | None:
        """Seconds, from the pace since the first logged iteration, evaluations included.

        That first one is where compilation and warm-up end, so they do not count.
        """
        now = time.monotonic()
        if self.first_logged is None:
            self.first_logged = iter, now
        first_iter, first_time = self.first_logged
        left = self.max_iters - (iter + 1)
        if left <= 0:
            return 0.0
        return (now - first_time) / (iter - first_iter) * left if iter > first_iter else None
