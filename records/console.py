"""What a run shows while it goes on, and at its end: entries of its record in, text out.

The blocks are those of the design document; lines in nanoGPT's style are the other choice. A log
file, or a terminal that is not UTF-8, gets the same words, with rules of ASCII and no emoji.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from common.console_output import is_terminal, plain, write_progress
from common.errors import UserError, did_you_mean
from common.formatting import (
    byte_count,
    clock,
    counted,
    first_lines,
    flop_count,
    milliseconds,
    or_na,
    teraflops,
)
from records.record_types import (
    CheckpointEntry,
    DataInfo,
    Diagnostics,
    EvaluationEntry,
    HardwareInfo,
    IterationEntry,
    MemoryInfo,
    MfuInfo,
    PositionLoss,
    Record,
    Sample,
    StartupInfo,
    Summary,
)
from records.report_layout import THICK, THIN, WIDTH, field_line, label_of, numbers_table
from records.summary import memory_peak

STYLES = ('auto', 'block', 'line')

# --- Lines and blocks -----------------------------------------------------------------------------


def _hfu(mfu: MfuInfo) -> str | None:
    """Hardware FLOPs utilization, where recomputation sets it apart from MFU."""
    if mfu['hfu_percent'] is None:
        return None
    hfu, of_model = f'{mfu["hfu_percent"]:.2f}%', f'{mfu["mfu_percent"]:.2f}%'
    return hfu if hfu != of_model else None


def iteration_line(entry: IterationEntry, eta: float | None) -> str:
    """One line in nanoGPT's form, which scripts that read nanoGPT's logs understand."""
    mfu, peak = entry['mfu']['mfu_percent'], memory_peak(entry)
    hfu, scale = _hfu(entry['mfu']), entry['loss_scale']
    parts = {
        'loss': or_na(entry['loss'], '.4f'),
        'time': or_na(entry['time_ms'], '.2f') + 'ms',
        'mfu': 'n/a' if mfu is None else f'{mfu:.2f}%',
        **({'hfu': hfu} if hfu else {}),
        'lr': or_na(entry['lr'], '.2e'),
        'tok/s': or_na(entry['tokens_per_sec'], ',.0f'),
        'mem': 'n/a' if peak is None else f'{peak:.1f}GB',
        'grad': or_na(entry['gradients']['norm'], '.3f'),
        **({} if scale is None else {'scale': f'{scale:.10g}'}),
        'eta': clock(eta),
    }
    return f'iter {entry["iter"]}: ' + ', '.join(f'{key} {text}' for key, text in parts.items())


def iteration_block(entry: IterationEntry, eta: float | None, no_peak: str | None) -> str:
    """The design's block of an iteration; `no_peak` is why there is no MFU, if so."""
    gradients, scale = entry['gradients'], entry['loss_scale']
    return '\n'.join(
        [
            THIN,
            f'📍 Iter {entry["iter"]:>6} │ Loss: {or_na(entry["loss"], ".4f")} │ '
            f'Time: {milliseconds(entry["time_ms"])} │ LR: {or_na(entry["lr"], ".2e")} │ '
            f'ETA: {clock(eta)}',
            THIN,
            *_speed_lines(entry, no_peak),
            f'💾 Memory: {" │ ".join(_memory_sizes(entry["memory"])) or "n/a"}',
            f'📊 Gradients: norm={or_na(gradients["norm"], ".4f")} │ '
            f'mean={or_na(gradients["mean"], ".2e")} │ std={or_na(gradients["std"], ".2e")}'
            + ('' if scale is None else f' │ scale {scale:.10g}'),
            *_aux_metric_lines(entry['readings']),
        ]
    )


def _speed_lines(entry: IterationEntry, no_peak: str | None) -> list[str]:
    """MFU with what it is reckoned from; without a peak, why there is none."""
    mfu, hfu = entry['mfu'], _hfu(entry['mfu'])
    achieved = f'Achieved: {teraflops(mfu["achieved_tflops"])}'
    rate = (
        f'Tokens/s: {or_na(entry["tokens_per_sec"], ",.0f")} │ '
        f'FLOPs/token: {flop_count(mfu["flops_per_token"])}'
    )
    if mfu['mfu_percent'] is None:
        return [f'⚡ MFU: n/a ({no_peak or "not measured"})', f'   {achieved} │ {rate}']
    return [
        f'⚡ MFU: {mfu["mfu_percent"]:.2f}% (causal {mfu["mfu_causal_percent"]:.2f}%) │ '
        f'{achieved} │ Peak: {teraflops(mfu["hardware_peak_tflops"])}',
        '   ' + (f'HFU: {hfu} │ ' if hfu else '') + rate,
    ]


def _memory_sizes(memory: MemoryInfo) -> list[str]:
    """The device's memory; where there is none, what the process holds."""
    sizes = {
        'alloc': memory['allocated_gb'],
        'peak': memory['peak_gb'],
        'reserved': memory['reserved_gb'],
    }
    if not any(size is not None for size in sizes.values()):
        sizes = {'resident': memory['rss_gb']}
    return [f'{size:.2f} GB {name}' for name, size in sizes.items() if size is not None]


def _aux_metric_lines(readings: Mapping[str, float | None]) -> list[str]:
    """What components report, two lines at most for those that come with the project."""
    texts = [f'{label_of(name)}={or_na(value, ".4g")}' for name, value in readings.items()]
    rows = [texts[i : i + 3] for i in range(0, len(texts), 3)]
    return [('🧭 ' if i == 0 else '   ') + ' │ '.join(row) for i, row in enumerate(rows)]


def evaluation_line(entry: EvaluationEntry) -> str:
    line = (
        f'step {entry["iter"]}: train loss {or_na(entry["train_loss"], ".4f")}, '
        f'val loss {or_na(entry["val_loss"], ".4f")}'
    )
    bits = entry['val_bits_per_byte']
    return line if bits is None else f'{line}, {bits:.4f} bits per byte'


def evaluation_block(entry: EvaluationEntry, best: EvaluationEntry | None) -> str:
    """A block of its own, which ends with the best validation loss of the run so far."""
    bits = entry['val_bits_per_byte']
    losses = {
        'Train loss': or_na(entry['train_loss'], '.4f'),
        'Val loss': or_na(entry['val_loss'], '.4f'),
        **({} if bits is None else {'Bits/byte': f'{bits:.4f}'}),
    }
    standing = 'n/a'
    if best:
        is_this = best['iter'] == entry['iter']
        standing = 'this one' if is_this else f'{best["val_loss"]:.4f} at iter {best["iter"]:,}'
    return '\n'.join(
        [
            THICK,
            f'🔍 EVALUATION after {counted(entry["iter"], "iteration")} '
            f'(took {milliseconds(entry["time_ms"])})',
            '   ' + ' │ '.join(f'{label}: {text}' for label, text in losses.items()),
            f'   Best val loss so far: {standing}',
            THICK,
        ]
    )


def diagnostics_table(diagnostics: Diagnostics) -> str:
    """A line a layer, then the size of an update and the loss along the context; indented."""
    lines: list[str] = []
    layers = diagnostics['layers']
    if layers:
        rows = [['  Layer', 'activation rms', 'gradient norm', 'max attention logit']]
        for row in layers:
            figures = row['activation_rms'], row['gradient_norm'], row['max_attention_logit']
            rows.append([f'{row["layer"]:7}', *(or_na(figure, '.3g') for figure in figures)])
        lines += numbers_table(rows)
    if ratios := diagnostics['update_to_weight']:
        texts = (f'{group} {or_na(ratio, ".1e")}' for group, ratio in ratios.items())
        lines.append(field_line('Update/weight', ' │ '.join(texts)))
    if spans := diagnostics['val_loss_by_position']:
        texts = (f'{_position_range(span)}={or_na(span["loss"], ".3f")}' for span in spans)
        lines.append(field_line('Val loss by position', ', '.join(texts)))
    return '\n'.join(lines)


def sample_block(sample: Sample) -> str:
    """The beginning of what the model wrote, the prompt included."""
    head = f'📝 Sample (took {milliseconds(sample["time_ms"])})'
    if sample['text'] is None:
        return f'{head}: none, since the logits are not finite'
    lines = first_lines(sample['prompt'] + sample['text'], WIDTH - 5)
    return '\n'.join([head, *(f'   │ {line}'.rstrip() for line in lines)])


def _position_range(span: PositionLoss) -> str:
    """`0`, or `512-1023`: `to` itself is not part of a span."""
    first, last = span['from'], span['to'] - 1
    return str(first) if first == last else f'{first}-{last}'


def checkpoint_line(entry: CheckpointEntry) -> str:
    took, written = (milliseconds(entry[key]) for key in ('time_ms', 'write_ms'))
    times = f'{took}; written in {written}'
    return f'💾 checkpoint after iter {entry["iter"]}: {entry["path"]} ({times})'


def event_line(kind: str, iter: int | None, message: str | None = None) -> str:
    where = '' if iter is None else f' at iter {iter}'
    return f'⚠ {kind}{where}' + (f': {message}' if message else '')


def _memory_footprint(startup_info: StartupInfo) -> dict[str, str]:
    """What a process of several holds, where that is known."""
    parallel = startup_info['parallel']
    if startup_info['hardware']['world_size'] == 1 or parallel['parameter_bytes'] is None:
        return {}
    sizes = {
        'weights': parallel['parameter_bytes'],
        'gradients': parallel['gradient_bytes'],
        'optimizer': parallel['optimizer_bytes'],
    }
    parts = [f'{name} {byte_count(size or 0)}' for name, size in sizes.items()]
    return {'Each process': ', '.join(parts)}


def _above_peak_note(mfu: float, source: str | None) -> str:
    if mfu <= 100:
        return ''
    measured = (source or '').startswith('measured')
    why = 'was measured while the machine was busy' if measured else f'is from {source}'
    return f' (more than the peak, which {why})'


def closing_block(record: Record, best: EvaluationEntry | None, record_path: Path | str) -> str:
    """What the run came to, where its record is and what to type next."""
    summary, status = record['summary'], record['status']
    best_text = 'n/a'
    if best:
        bits = best['val_bits_per_byte']
        best_text = f'{best["val_loss"]:.4f} (iter {best["iter"]:,}'
        best_text += ')' if bits is None else f'; {bits:.4f} bits per byte)'
    mfu, memory = summary['avg_mfu'], summary['peak_memory_gb']
    source = record['startup_info']['hardware'].get('peak_source')
    fields = {
        'Best val loss': best_text,
        'Final val loss': or_na(summary['final_val_loss'], '.4f'),
        'Final train loss': or_na(summary['final_train_loss'], '.4f'),
        'Average MFU': 'n/a' if mfu is None else f'{mfu:.2f}%{_above_peak_note(mfu, source)}',
        'Average iteration': milliseconds(summary['avg_time_ms']),
        'Time': clock(summary['wall_seconds']),
        'Tokens': _tokens_text(summary, record['startup_info'].get('data', {})),
        'Compute': flop_count(summary['total_flops'], 'FLOPs'),
        'Peak memory': 'n/a' if memory is None else f'{memory:.2f} GB',
        **_memory_footprint(record['startup_info']),
        'Record': str(record_path),
        'Compare': 'python compare_architectures.py --latest 3',
    }
    if status != 'finished' and record['checkpoints']:
        fields['Continue'] = 'the same command with --init_from=resume'
    mark = '✅' if status == 'finished' else '⛔'
    of = or_na(summary['total_iterations'], ',')
    return '\n'.join(
        [
            '',
            THICK,
            f'{mark} TRAINING {status.upper()} after {summary["final_iter"]:,} of {of} iterations',
            THICK,
            *(field_line(label, value) for label, value in fields.items()),
            THICK,
        ]
    )


def _tokens_text(summary: Summary, data: DataInfo) -> str:
    total, epochs, unique = (summary[key] for key in ('total_tokens', 'epochs', 'unique_tokens'))
    text = or_na(total, ',')
    if epochs is not None:
        text += f' ({epochs:.2f} epochs)'
    if unique is not None:
        about = '' if data['windows_per_epoch'] else 'about '
        text += f', {about}{unique:,} different ones'
    return text


# --- The stream -----------------------------------------------------------------------------------


class Console:
    """Shows a run as it goes on `stream`, standard output unless given.

    `style` is `block` (the design document's form; `auto` means it) or `line` (nanoGPT's form).
    `on_lost` is called, with the reason, when the stream takes no more; the rest is not shown.
    """

    def __init__(
        self,
        style: str = 'auto',
        stream: TextIO | None = None,
        *,
        max_iters: int,
        on_lost: Callable[[str], None] = lambda reason: None,
    ):
        if style not in STYLES:
            raise UserError(
                f'log_style={style!r} is not one of {", ".join(STYLES)}.'
                f'{did_you_mean(style, STYLES)}'
            )
        self.one_line = style == 'line'
        self.stream = stream or sys.stdout
        self.on_lost, self.is_lost = on_lost, False
        self.max_iters = max_iters
        self.no_peak: str | None = None  # why there is no MFU
        self.first_logged: tuple[int, float] | None = (
            None  # (iter, time) where the pace is taken from
        )

    def begin(self, report: str, hardware: HardwareInfo) -> None:
        """Show how this process starts; `hardware` is the part of startup_info."""
        if hardware['peak_tflops'] is None:
            self.no_peak = hardware['peak_source']
        self.show(report)

    def iteration(self, entry: IterationEntry) -> None:
        eta = self._time_left(entry['iter'])
        if self.one_line:
            self.show(iteration_line(entry, eta))
        else:
            self.show(iteration_block(entry, eta, self.no_peak))

    def evaluation(self, entry: EvaluationEntry, best: EvaluationEntry | None) -> None:
        self.show(evaluation_line(entry) if self.one_line else evaluation_block(entry, best))
        if 'diagnostics' in entry:
            self.show(diagnostics_table(entry['diagnostics']))
        if 'sample' in entry:
            self.show(sample_block(entry['sample']))

    def rollback(self, iter: int, message: str) -> None:
        self.first_logged = None  # the pace begins anew
        self.show(event_line('rollback', iter, message))

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
