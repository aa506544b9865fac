"""The record of a run: a crash-proof journal, the document made from it, and the console.

A run is a folder `out_dir/run_<date>_<time>/`. While it trains, each thing that happens becomes
one line of `journal.jsonl`, handed to the operating system before the console shows it, so that a
crash loses at most the last line. `assemble` turns those lines into the document that people and
`compare_architectures.py` read; `record.json` is a copy of it, replaced in one step after each
evaluation and at the end. `record_schema.json` says what the document holds.

Plain numbers come in, text and JSON go out: nothing here knows torch, devices or components.
"""

import functools
import json
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

from errors import UserError, nearest

SCHEMA_VERSION = 1
JOURNAL, RECORD = 'journal.jsonl', 'record.json'
STYLES = ('auto', 'block', 'line')
STATUSES = ('running', 'finished', 'interrupted', 'failed')

# The lists of the document, and the kind of journal line that each collects.
LISTS = {
    'training_iterations': 'iteration',
    'eval_steps': 'evaluation',
    'checkpoints': 'checkpoint',
    'events': 'event',
}
# The document's other keys that are objects. They come with the first line of the journal, all but
# the summary, and a resumed process may state them again.
OBJECTS = ('config', 'architecture', 'metadata', 'startup_info', 'summary')

# ------------------------------------------------------------------------------------------------
# Run folders
# ------------------------------------------------------------------------------------------------

_RUN_NAME = re.compile(r'run_(\d{8}_\d{6})(?:_(\d+))?')
# Big folders that hold no runs; hidden ones and virtual environments are left out as well.
_NOT_SEARCHED = {'data', 'node_modules', 'site-packages', '__pycache__'}


def new_run_folder(out_dir, now: datetime | None = None) -> Path:
    """Make `out_dir/run_<date>_<time>/checkpoints/` and return the run's folder, which is new.

    A second run of the same second gets the suffix `_2`, and so on: `mkdir` decides the race.
    Raises UserError where the folder cannot be made.
    """
    name = f'run_{now or datetime.now():%Y%m%d_%H%M%S}'
    try:
        os.makedirs(out_dir, exist_ok=True)
        number = 1
        while True:
            folder = Path(out_dir, name if number == 1 else f'{name}_{number}')
            try:
                os.mkdir(folder)
                break
            except FileExistsError:
                number += 1
        os.mkdir(folder / 'checkpoints')
    except OSError as error:
        raise UserError(
            f'out_dir={str(out_dir)!r}: no run folder can be made there ({error.strerror}). '
            'Choose a folder that you may write to with --out_dir=FOLDER.'
        ) from error
    return folder


def latest_run(out_dir) -> Path | None:
    """The newest run in `out_dir` by its name (`_2` before `_10`), or None.

    A folder without a journal or record belongs to a run that ended before it began: not counted.
    """
    runs = []
    for folder in Path(out_dir).glob('run_*'):
        match = _RUN_NAME.fullmatch(folder.name)
        held = [folder / name for name in (JOURNAL, RECORD) if (folder / name).is_file()]
        if match and any(path.stat().st_size for path in held):
            runs.append((match[1], int(match[2] or 1), folder))
    return max(runs)[-1] if runs else None


def find_records(root) -> list[Path]:
    """The run folders at or below `root`, sorted by path; folders that cannot be read are left out.

    Does not look inside runs, hidden folders, virtual environments or data, nor follow links.
    """
    found, folders = [], [Path(root)]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as listing:
                entries = list(listing)
        except OSError:
            continue
        names = {entry.name for entry in entries}
        if names & {JOURNAL, RECORD}:
            found.append(folder)
        # A lone record.json may be a copy, or another program's: runs can still lie below it.
        is_run = JOURNAL in names or (RECORD in names and _RUN_NAME.fullmatch(folder.name))
        if not is_run and 'pyvenv.cfg' not in names:
            folders += [
                folder / entry.name
                for entry in entries
                if entry.name not in _NOT_SEARCHED
                and not entry.name.startswith('.')
                and entry.is_dir(follow_symlinks=False)
            ]
    return sorted(found)


# ------------------------------------------------------------------------------------------------
# From journal to document
# ------------------------------------------------------------------------------------------------


def read_record(path) -> dict:
    """The document of a run: `path` is its folder, its journal or its record.json.

    In a folder the journal comes first, since it is never behind; a torn last line is left out.
    Raises UserError, naming the file, for anything else.
    """
    path = Path(path)
    if path.is_dir():
        held = [path / name for name in (JOURNAL, RECORD) if (path / name).is_file()]
        if not held:
            raise UserError(f'{path}: no run there, since it holds no {JOURNAL} and no {RECORD}.')
        path = held[0]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}).') from error
    try:
        return assemble(_parse(data)) if path.suffix == '.jsonl' else _checked(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{path}: not the record of a run ({type(error).__name__}: {error}). '
            f'Give a run folder, its {JOURNAL} or its {RECORD}.'
        ) from error


def _parse(data: bytes) -> list[dict]:
    """A journal's lines. Only the last may be broken: that is how far a crash reaches."""
    lines = []
    *whole, tail = data.split(b'\n')
    for number, line in enumerate(whole, 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f'line {number} is not JSON') from error
    if _is_whole(tail):
        lines.append(json.loads(tail))
    return lines


def _is_whole(tail: bytes) -> bool:
    """Whether what follows the last line end lacks nothing but its own line end."""
    try:
        return isinstance(json.loads(tail), dict)
    except ValueError:
        return False


def _checked(document) -> dict:
    """The document, if its outline is right. The schema says the rest, and tests hold us to it."""
    if document['schema_version'] != SCHEMA_VERSION:
        raise ValueError(f'schema_version {document["schema_version"]} is not {SCHEMA_VERSION}')
    for keys, kind in ((LISTS, list), (OBJECTS, dict)):
        for key in keys:
            if not isinstance(document[key], kind):
                raise TypeError(f'{key} is no {kind.__name__}')
    return document


def assemble(lines: Iterable[dict]) -> dict:
    """The document of `record.json` from the parsed lines of a journal.

    A resume from iteration k takes back what the lost process did after k; where an `iter` still
    occurs twice, the later line holds. A run without an `end` line counts as `running`, a crashed
    one included. Raises ValueError, KeyError or TypeError for lines that are no journal.
    """
    document = {'schema_version': SCHEMA_VERSION}
    lists = {kind: {} for kind in LISTS.values()}
    began = last = wall_seconds = 0.0
    for line in lines:
        line = dict(line)
        kind = line.pop('kind')
        if 'run_name' not in document and kind != 'start':
            raise ValueError(f'the first line is of kind {kind!r}, not start')
        if kind in ('start', 'resume'):
            wall_seconds += last - began
            began = line['time']
            document |= {key: line[key] for key in OBJECTS if key in line}
            document |= {'end_time': None, 'status': 'running'}
        last = max(began, line['time'])

        if kind == 'start':
            document |= {key: line[key] for key in ('run_name', 'start_time')}
        elif kind == 'end':
            document |= {key: line[key] for key in ('end_time', 'status')}
        elif kind == 'resume':
            _take_back(lists, line['iter'])
            entry = {key: value for key, value in line.items() if key not in OBJECTS}
            lists['event']['resume', line['time']] = {'event': 'resume', **entry}
        elif kind == 'event':
            # What a resumed process meets a second time happened once.
            key = (line['event'], line['iter'], line.get('message'))
            lists[kind].pop(key, None)
            lists[kind][key] = line
        else:
            del line['time']
            lists[kind][line['iter']] = line
    if 'run_name' not in document:
        raise ValueError('it has no start line')
    wall_seconds += last - began

    for key, kind in LISTS.items():
        entries = lists[kind]
        document[key] = [entries[i] for i in (entries if kind == 'event' else sorted(entries))]
    document['summary'] = _summary(document, wall_seconds)
    order = ['schema_version', 'run_name', 'start_time', 'end_time', 'status', *OBJECTS[:-1]]
    return {key: document[key] for key in [*order, *LISTS, 'summary']}


def _take_back(lists: dict, k: int) -> None:
    """Drop what came after the checkpoint of k updates: batch k and later, the rest beyond k."""
    for kind, entries in lists.items():
        kept_below = k if kind == 'iteration' else k + 1
        for key, entry in list(entries.items()):
            if entry['iter'] is not None and entry['iter'] >= kept_below:
                del entries[key]


def _summary(document: dict, wall_seconds: float) -> dict:
    """What the run came to; None where nothing tells."""
    iterations, evaluations = document['training_iterations'], document['eval_steps']
    done = [entry['iter'] + 1 for entry in iterations]
    done += [entry['iter'] for entry in evaluations + document['checkpoints']]
    best = _best(evaluations)
    final = iterations[-1] if iterations else {}
    tokens = final.get('tokens_seen')
    per_token = document['startup_info']['flops']['per_token']

    # A process warms up (compilation, caches) in its first logged step: no part of an average.
    starts = [0, *(event['iter'] for event in document['events'] if event['event'] == 'resume')]
    warm_up = {next((e['iter'] for e in iterations if e['iter'] >= k), None) for k in starts}
    steady = [entry for entry in iterations if entry['iter'] not in warm_up] or iterations
    memory = [entry['memory'] for entry in iterations]
    peaks = [m['rss_gb'] if m['peak_gb'] is None else m['peak_gb'] for m in memory]

    return {
        'total_iterations': document['config'].get('max_iters'),
        'final_iter': max(done, default=0),
        'final_train_loss': final.get('loss'),
        'best_val_loss': best and best['val_loss'],
        'final_val_loss': evaluations[-1]['val_loss'] if evaluations else None,
        'val_bits_per_byte': best and best['val_bits_per_byte'],
        'avg_mfu': _mean_per_step((e['mfu']['mfu_percent'], e['steps']) for e in steady),
        'avg_time_ms': _mean_per_step((e['time_ms'], e['steps']) for e in steady),
        'total_tokens': tokens,
        'total_flops': None if tokens is None or per_token is None else tokens * per_token,
        'wall_seconds': round(wall_seconds, 3),
        'peak_memory_gb': max((peak for peak in peaks if peak is not None), default=None),
    }


def _best(evaluations: list[dict]) -> dict | None:
    measured = [entry for entry in evaluations if entry['val_loss'] is not None]
    return min(measured, key=lambda entry: entry['val_loss'], default=None)


def _mean_per_step(values: Iterable[tuple[float | None, int]]) -> float | None:
    known = [(value, steps) for value, steps in values if value is not None]
    total = sum(steps for _, steps in known)
    return sum(value * steps for value, steps in known) / total if total else None


# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------


def _strict(value):
    """`value` as strict JSON has it: a float that is not finite is unknown, a tuple is a list."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


class _Journal:
    """A file to which whole lines are added, one `write` each, so that none waits in a buffer."""

    def __init__(self, path: Path, *, new: bool):
        self.path = path
        flags = os.O_WRONLY | os.O_APPEND | (os.O_CREAT | os.O_EXCL if new else 0)
        try:
            if not new:
                self._mend()
            self.fd = os.open(path, flags, 0o666)
        except OSError as error:
            raise UserError(f'{path}: cannot be opened for writing ({error.strerror}).') from error

    def _mend(self) -> None:
        """Give a torn last line its line end if that is all it lacks, and cut it off otherwise."""
        data = self.path.read_bytes()
        tail = data[data.rfind(b'\n') + 1 :]
        if _is_whole(tail):
            with open(self.path, 'ab') as file:
                file.write(b'\n')
        elif tail:
            os.truncate(self.path, len(data) - len(tail))

    def append(self, kind: str, entry: dict) -> None:
        """Write one line. One that does not fit on the disk leaves no trace."""
        line = _strict({'kind': kind, 'time': round(time.time(), 3), **entry})
        data = (json.dumps(line, allow_nan=False) + '\n').encode()
        size = os.fstat(self.fd).st_size
        try:
            while data:
                data = data[os.write(self.fd, data) :]
        except OSError as error:
            os.ftruncate(self.fd, size)
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        os.close(self.fd)


def _write_record(path: Path, document: dict) -> None:
    """Replace `path` in one step: whatever goes wrong, the file there is whole, old or new."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'w', encoding='utf-8') as file:
            file.write(_to_json(document))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _to_json(document: dict) -> str:
    """Indented where people look, one line an entry where there are thousands."""
    parts = []
    for key, value in document.items():
        if key in LISTS:
            rows = ',\n  '.join(json.dumps(entry, allow_nan=False) for entry in value)
            text = f'[\n  {rows}\n ]' if rows else '[]'
        else:
            text = json.dumps(value, indent=1, allow_nan=False).replace('\n', '\n ')
        parts.append(f' {json.dumps(key)}: {text}')
    return '{\n' + ',\n'.join(parts) + '\n}\n'


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f'{path}: cannot be written ({error.strerror}). What was recorded before is intact. '
        'Make room, then continue the run with --init_from=resume.'
    )


# ------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------

WIDTH = 80
VALUE_COLUMN = 25
THIN, THICK = '─' * WIDTH, '=' * WIDTH

# The same text for a log file or a terminal that is not UTF-8.
_ASCII = str.maketrans({'─': '-', '│': '|', '├': '|', '└': '`', '×': 'x', '→': '->'})
_EMOJI = re.compile('^[\u2600-\u27bf\U0001f300-\U0001faff] ', re.MULTILINE)

_ACRONYMS = {'ffn': 'FFN', 'rope': 'RoPE', 'gqa': 'GQA', 'qk': 'QK', 'kv': 'KV'}
_SIZES = {'n_layer': 'Layers', 'n_head': 'Heads', 'n_embd': 'Width', 'd_ff': 'FFN Width'}


def _plain(text: str) -> str:
    return _EMOJI.sub('', text).translate(_ASCII)


def _show(value, form: str) -> str:
    return 'n/a' if value is None else format(value, form)


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


def _table(title: str, columns: list[str], rows: dict[str, list[str]]) -> list[str]:
    """A tree with several right-aligned columns; the last row is their total, below the tree."""
    labels = [f'  {title}', *(f'  ├─ {label}' for label in rows)]
    labels[-1] = labels[-1].replace('├─', '  ')
    labels[-2] = labels[-2].replace('├─', '└─')
    cells = [labels, *zip(columns, *rows.values())]
    widths = [max(map(len, column)) for column in cells]
    widths[0] = max(widths[0], VALUE_COLUMN - 2)
    return [
        '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in zip(*cells)
    ]


def startup_report(config: dict, architecture: dict, startup_info: dict, run_folder) -> str:
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
        '💻 HARDWARE': _hardware_section(hardware),
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
    trainable = model['trainable_params']
    frozen = [] if trainable == total else [_field('Trainable', f'{trainable:,}')]
    return [
        *_table('Component', ['parameters', 'share'], rows),
        '',
        _field('Non-embedding', f'{model["non_embedding_params"]:,}'),
        *frozen,
    ]


def _optimizer_section(optimizer: dict, trainable: int) -> list[str]:
    groups = optimizer['groups']
    assert sum(group['params'] for group in groups) == trainable, (groups, trainable)
    rows = {
        group['name']: [f'{group["tensors"]:,}', f'{group["params"]:,}', f'{group["weight_decay"]}']
        for group in groups
    }
    tensors = sum(group['tensors'] for group in groups)
    rows['total'] = [f'{tensors:,}', f'{trainable:,}', '']
    settings = [optimizer['name'] + (' (fused)' if optimizer['fused'] else '')]
    if optimizer['betas']:
        settings.append('betas ' + ', '.join(str(beta) for beta in optimizer['betas']))
    clip = optimizer['grad_clip']
    settings.append(f'gradient clip {clip}' if clip else 'no gradient clip')
    return [
        _field('Optimizer', ', '.join(settings)),
        _field(
            'Learning rate',
            f'{optimizer["learning_rate"]:.2e} → {optimizer["min_lr"]:.2e}, '
            f'warm-up {optimizer["warmup_iters"]:,}, decay until {optimizer["lr_decay_iters"]:,}',
        ),
        '',
        *_table('Group', ['tensors', 'parameters', 'weight decay'], rows),
    ]


def _data_section(data: dict, max_iters: int) -> list[str]:
    batch, accumulation = data['batch_size'], data['gradient_accumulation_steps']
    block, per_iter = data['block_size'], data['tokens_per_iter']
    assert batch * accumulation * block == per_iter, (batch, accumulation, block, per_iter)
    windows = data['eval_windows']
    tokens = max_iters * per_iter
    return [
        _field('Dataset', f'{data["dataset"]} ({data["tokenizer"]})'),
        _field('Tokens', f'{data["train_tokens"]:,} train │ {data["val_tokens"]:,} validation'),
        _field('Vocabulary', f'{data["vocab_size"]:,} data → {data["model_vocab_size"]:,} model'),
        _field(
            'Tokens/iteration',
            f'{_count(batch, "sequence")} × {accumulation:,} accumulation × '
            f'{block:,} tokens = {per_iter:,}',
        ),
        _field(
            'Whole run',
            f'{_count(max_iters, "iteration")} = {tokens:,} tokens = '
            f'{tokens / data["train_tokens"]:.2f} epochs',
        ),
        _field(
            'Evaluation',
            f'{_count(windows["val"], "window")} validation │ {_show(windows["train"], ",")} train '
            f'(of {block:,} tokens)',
        ),
    ]


def _hardware_section(hardware: dict) -> list[str]:
    peak, source = hardware['peak_tflops'], hardware['peak_source']
    return [
        _field('Device', f'{hardware["device"]} ({hardware["device_name"]})'),
        _field('Processes', f'{hardware["world_size"]:,}'),
        _field('Precision', hardware['dtype']),
        _field(
            'Peak',
            f'unknown ({source})'
            if peak is None
            else f'{_flops(peak * 1e12, "FLOP/s")} ({source})',
        ),
        _field('CPU threads', _show(hardware['threads'], ',')),
        _field('Compile', 'yes' if hardware['compile'] else 'no'),
    ]


def _performance_section(flops: dict, hardware: dict) -> list[str]:
    full, causal = flops['breakdown'], flops['breakdown_causal']
    for parts, total in ((full, flops['per_token']), (causal, flops['per_token_causal'])):
        assert math.isclose(sum(parts.values()), total, rel_tol=1e-9), (parts, total)

    def row(a, b):
        columns = (a, flops['per_token']), (b, flops['per_token_causal'])
        return [cell for x, total in columns for cell in (_flops(x), _percent(x, total))]

    rows = {_label(name): row(full[name], causal[name]) for name in full}
    rows['total'] = row(flops['per_token'], flops['per_token_causal'])
    ratio = flops['attention_ffn_ratio']
    expected = hardware['expected_tokens_per_sec_at_50_mfu']
    return [
        _field('FLOPs per token', _flops(flops['per_token'], 'FLOPs') + ' (forward + backward)'),
        '',
        *_table('Part', ['full square', 'share', 'causal half', 'share'], rows),
        '',
        _field('Attention/FFN ratio', _show(ratio, '.2f') + ' (causal half)'),
        _field(
            'Element-wise',
            _flops(flops['elementwise_per_token'], 'FLOPs') + ' per token (not part of MFU)',
        ),
        _field(
            'Expected tokens/s',
            'n/a (no peak)' if expected is None else f'{expected:,.0f} at 50 % MFU',
        ),
    ]


def resume_report(k: int, checkpoint: str, changed: dict, run_folder) -> str:
    """What a resumed run says instead of the start-up report; `changed` is key → [old, new]."""
    lines = [THICK, f'🔁 RESUMED from {checkpoint} at iteration {k:,}', THICK]
    lines.append(_field('Folder', str(run_folder)))
    if changed:
        lines += ['', '  Changed options:']
        lines += _tree({key: f'{old} → {new}' for key, (old, new) in changed.items()})
    return '\n'.join([*lines, ''])


def iteration_line(entry: dict, eta: float | None) -> str:
    """One line in nanoGPT's form, which scripts that read nanoGPT's logs understand."""
    mfu, memory = entry['mfu']['mfu_percent'], entry['memory']
    peak = memory['rss_gb'] if memory['peak_gb'] is None else memory['peak_gb']
    parts = {
        'loss': _show(entry['loss'], '.4f'),
        'time': _show(entry['time_ms'], '.2f') + 'ms',
        'mfu': 'n/a' if mfu is None else f'{mfu:.2f}%',
        'lr': _show(entry['lr'], '.2e'),
        'tok/s': _show(entry['tokens_per_sec'], ',.0f'),
        'mem': 'n/a' if peak is None else f'{peak:.1f}GB',
        'grad': _show(entry['gradients']['norm'], '.3f'),
        'eta': _duration(eta),
    }
    return f'iter {entry["iter"]}: ' + ', '.join(f'{key} {text}' for key, text in parts.items())


def iteration_block(entry: dict, eta: float | None, no_peak: str | None) -> str:
    """The design's block of an iteration; `no_peak` is why there is no MFU, if so."""
    mfu, memory, gradients = entry['mfu'], entry['memory'], entry['gradients']
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
            f'   {rate}',
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
            f'mean={_show(gradients["mean"], ".2e")} │ std={_show(gradients["std"], ".2e")}',
        ]
    )


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


def closing_block(document: dict, run_folder) -> str:
    """What the run came to, where its record is and what to type next."""
    summary, status = document['summary'], document['status']
    best = _best(document['eval_steps'])
    best_text = 'n/a'
    if best:
        bits = best['val_bits_per_byte']
        best_text = f'{best["val_loss"]:.4f} (iter {best["iter"]:,}'
        best_text += ')' if bits is None else f'; {bits:.4f} bits per byte)'
    mfu, memory = summary['avg_mfu'], summary['peak_memory_gb']
    fields = {
        'Best val loss': best_text,
        'Final val loss': _show(summary['final_val_loss'], '.4f'),
        'Final train loss': _show(summary['final_train_loss'], '.4f'),
        'Average MFU': 'n/a' if mfu is None else f'{mfu:.2f}%',
        'Average iteration': _milliseconds(summary['avg_time_ms']),
        'Time': _duration(summary['wall_seconds']),
        'Tokens': _show(summary['total_tokens'], ','),
        'Compute': _flops(summary['total_flops'], 'FLOPs'),
        'Peak memory': 'n/a' if memory is None else f'{memory:.2f} GB',
        'Record': str(Path(run_folder, RECORD)),
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


# ------------------------------------------------------------------------------------------------
# The logger
# ------------------------------------------------------------------------------------------------


def _on_main(method):
    """Every rank calls every method; only the main one has anything to write."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        return method(self, *args, **kwargs) if self.is_main else None

    return guarded


class TrainingLogger:
    """Writes one run's journal and record.json, and shows the run on the console.

    `style` is `block` (the design document's form; `auto` means it) or `line` (nanoGPT's form).
    `stream` is where to show it, standard output unless given. Entries are those of
    `record_schema.json`; any float in them that is not finite is recorded as null. Every method
    raises UserError when the disk takes no more, and leaves what was recorded before as it was.
    """

    def __init__(self, run_folder, *, is_main=True, style='auto', stream=None, max_iters: int):
        if style not in STYLES:
            raise UserError(
                f'log_style={style!r} is not one of {", ".join(STYLES)}.{nearest(style, STYLES)}'
            )
        self.is_main = is_main
        self.run_folder = run_folder and Path(run_folder)  # other ranks may have none
        self.one_line = style == 'line'
        self.stream = stream or sys.stdout
        self.max_iters = max_iters
        self.journal = None
        self.no_peak = None  # why there is no MFU
        self.first_logged = None  # (iter, time) of this process's first logged iteration

    @_on_main
    def start(self, config: dict, architecture: dict, metadata: dict, startup_info: dict) -> None:
        """Begin a new run's journal and show the start-up report."""
        report = startup_report(config, architecture, startup_info, self.run_folder)
        self.journal = _Journal(self.run_folder / JOURNAL, new=True)
        self.journal.append(
            'start',
            {
                'run_name': self.run_folder.name,
                'start_time': _now(),
                'config': config,
                'architecture': architecture,
                'metadata': metadata,
                'startup_info': startup_info,
            },
        )
        self._begin(startup_info, report)

    @_on_main
    def resume(
        self,
        iter: int,
        *,
        checkpoint: str,
        changed: dict,
        config: dict,
        metadata: dict,
        startup_info: dict,
    ) -> None:
        """Continue the folder's journal from the `checkpoint` of `iter` updates.

        `changed` is key → [old, new] for the options that differ from the earlier process's.
        Raises UserError where the folder holds no journal to continue.
        """
        read_record(self.run_folder / JOURNAL)
        self.journal = _Journal(self.run_folder / JOURNAL, new=False)
        self.journal.append(
            'resume',
            {
                'iter': iter,
                'checkpoint': checkpoint,
                'command': metadata['command'],
                'changed': changed,
                'config': config,
                'metadata': metadata,
                'startup_info': startup_info,
            },
        )
        self._begin(startup_info, resume_report(iter, checkpoint, changed, self.run_folder))

    def _begin(self, startup_info: dict, report: str) -> None:
        hardware = startup_info['hardware']
        if hardware['peak_tflops'] is None:
            self.no_peak = hardware['peak_source']
        self._write_record()
        self._print(report)

    @_on_main
    def iteration(self, entry: dict) -> None:
        """Record and show an entry of `training_iterations`. A lost loss becomes an event too."""
        self.journal.append('iteration', entry)
        eta = self._time_left(entry['iter'])
        if self.one_line:
            self._print(iteration_line(entry, eta))
        else:
            self._print(iteration_block(entry, eta, self.no_peak))
        self._note_nonfinite(entry, 'loss')

    @_on_main
    def evaluation(self, entry: dict) -> None:
        """Record and show an entry of `eval_steps`, and bring record.json up to date."""
        self.journal.append('evaluation', entry)
        document = self._write_record()
        if self.one_line:
            self._print(evaluation_line(entry))
        else:
            self._print(evaluation_block(entry, _best(document['eval_steps'])))
        self._note_nonfinite(entry, 'train_loss', 'val_loss')

    @_on_main
    def checkpoint(self, entry: dict) -> None:
        """Record and show an entry of `checkpoints`."""
        self.journal.append('checkpoint', entry)
        took = _milliseconds(entry['time_ms'])
        self._print(f'💾 checkpoint after iter {entry["iter"]}: {entry["path"]} ({took})')

    @_on_main
    def event(self, kind: str, iter: int | None, message: str | None = None, **extra) -> None:
        """Record and show that something out of the ordinary happened after `iter` updates."""
        entry = {'event': kind, 'iter': iter, **extra}
        if message is not None:
            entry['message'] = message
        self.journal.append('event', entry)
        where = '' if iter is None else f' at iter {iter}'
        self._print(f'⚠ {kind}{where}' + (f': {message}' if message else ''))

    @_on_main
    def finish(self, status: str = 'finished') -> dict | None:
        """End the run as `finished`, `interrupted` or `failed`: record.json, closing summary.

        Returns the summary, which is computed from the journal alone. Does nothing, and returns
        None, before `start` and on ranks that are not main.
        """
        assert status in STATUSES[1:], status
        if self.journal is None:
            return None
        end = {'status': status, 'end_time': _now(), 'time': round(time.time(), 3)}
        lines = _parse(self.journal.path.read_bytes())
        summary = assemble([*lines, {'kind': 'end', **end}])['summary']
        self.journal.append('end', {**end, 'summary': summary})
        document = self._write_record()
        self.journal.close()
        self.journal = None
        self._print(closing_block(document, self.run_folder))
        return document['summary']

    def _note_nonfinite(self, entry: dict, *keys: str) -> None:
        """The record has null for such a loss; an event says that it was measured, and what."""
        for key in keys:
            if entry[key] is not None and not math.isfinite(entry[key]):
                self.event('nonfinite', entry['iter'], f'{key} is {entry[key]}')

    def _write_record(self) -> dict:
        document = read_record(self.journal.path)
        _write_record(self.run_folder / RECORD, document)
        return document

    def _time_left(self, iter: int) -> float | None:
        """Seconds from the pace since this process's first logged iteration, evaluations included.

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

    def _print(self, text: str) -> None:
        encoding = getattr(self.stream, 'encoding', None) or 'utf-8'
        is_utf8 = encoding.lower().replace('-', '') == 'utf8'
        if not (self.stream.isatty() and is_utf8):
            text = _plain(text)
        # A path may hold letters that the stream cannot show; that must not end the run.
        print(text.encode(encoding, 'replace').decode(encoding), file=self.stream, flush=True)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec='seconds')
