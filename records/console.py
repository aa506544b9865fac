"""The console of a run: what is shown while it trains and at its end, made of record entries.

An iteration is shown as a block, or as a line in nanoGPT's form (`--log_style`). On a terminal the
block is redrawn in place, above a progress bar; everything else scrolls above it.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from common.console_output import bold, is_terminal, red, write_progress, yellow
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
from common.live_region import LiveRegion
from common.progress_bar import bar_line, done_text
from records.record_types import (
    CheckpointEntry,
    DataInfo,
    Diagnostics,
    EvaluationEntry,
    HardwareInfo,
    IterationEntry,
    LayerChoices,
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
DISPLAY_ROWS = 10  # the least for a block in place, auxiliary metrics and progress bar included

# --- Lines and blocks -----------------------------------------------------------------------------


def _hfu(mfu: MfuInfo) -> str | None:
    """Hardware FLOPs utilization, where recomputation makes it differ from MFU."""
    if mfu['hfu_percent'] is None:
        return None
    hfu, of_model = f'{mfu["hfu_percent"]:.2f}%', f'{mfu["mfu_percent"]:.2f}%'
    return hfu if hfu != of_model else None


def iteration_line(entry: IterationEntry, eta: float | None) -> str:
    """One line in nanoGPT's form, for scripts that parse nanoGPT's logs."""
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
    """The block of an iteration; `no_peak` is the reason if there is no MFU."""
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
    """MFU and the figures it is computed from; without a peak, the reason."""
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
    """The memory in use on the device, or else the resident memory of the process."""
    sizes = {
        'alloc': memory['allocated_gb'],
        'peak': memory['peak_gb'],
        'reserved': memory['reserved_gb'],
    }
    if not any(size is not None for size in sizes.values()):
        sizes = {'resident': memory['rss_gb']}
    return [f'{size:.2f} GB {name}' for name, size in sizes.items() if size is not None]


def _aux_metric_lines(readings: Mapping[str, float | None]) -> list[str]:
    """Auxiliary metrics of components, three per line."""
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
    """The block of an evaluation, with the best validation loss of the run so far."""
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


def diagnostics_table(diagnostics: Diagnostics, letters: Sequence[str] = ()) -> str:
    """One line per layer, then the relative size of an update and the loss by position.

    letters: the kind of each layer; empty if all are alike.
    """
    lines: list[str] = []
    layers = diagnostics['layers']
    if layers:
        head = ['activation rms', 'gradient norm', 'max attention logit']
        rows = [['  Layer', *(['kind'] if letters else []), *head]]
        for row in layers:
            figures = row['activation_rms'], row['gradient_norm'], row['max_attention_logit']
            kind = [letters[row['layer']]] if letters else []
            rows.append([f'{row["layer"]:7}', *kind, *(or_na(figure, '.3g') for figure in figures)])
        lines += numbers_table(rows)
    if ratios := diagnostics['update_to_weight']:
        texts = (f'{group} {or_na(ratio, ".1e")}' for group, ratio in ratios.items())
        lines.append(field_line('Update/weight', ' │ '.join(texts)))
    if spans := diagnostics['val_loss_by_position']:
        texts = (f'{_position_range(span)}={or_na(span["loss"], ".3f")}' for span in spans)
        lines.append(field_line('Val loss by position', ', '.join(texts)))
    return '\n'.join(lines)


def sample_block(sample: Sample) -> str:
    """The beginning of a sample, with its prompt."""
    head = f'📝 Sample (took {milliseconds(sample["time_ms"])})'
    if sample['text'] is None:
        return f'{head}: none, because the logits are not finite'
    lines = first_lines(sample['prompt'] + sample['text'], WIDTH - 5)
    return '\n'.join([head, *(f'   │ {line}'.rstrip() for line in lines)])


def _position_range(span: PositionLoss) -> str:
    """`0`, or `512-1023`: a span excludes its `to`."""
    first, last = span['from'], span['to'] - 1
    return str(first) if first == last else f'{first}-{last}'


def checkpoint_line(entry: CheckpointEntry) -> str:
    took, written = (milliseconds(entry[key]) for key in ('time_ms', 'write_ms'))
    times = f'{took}; written in {written}'
    return f'💾 checkpoint after iter {entry["iter"]}: {entry["path"]} ({times})'


def event_line(kind: str, iter: int | None, message: str | None = None) -> str:
    where = '' if iter is None else f' at iter {iter}'
    name = f'⚠ {kind}{where}'
    return (name if kind == 'note' else yellow(name)) + (f': {message}' if message else '')


def _memory_footprint(startup_info: StartupInfo) -> dict[str, str]:
    """The memory per process, if there are several and it is known."""
    parallel = startup_info['parallel']
    if startup_info['hardware']['world_size'] == 1 or parallel['parameter_bytes'] is None:
        return {}
    sizes = {
        'weights': parallel['parameter_bytes'],
        'gradients': parallel['gradient_bytes'],
        'optimizer': parallel['optimizer_bytes'],
    }
    parts = [f'{name} {byte_count(size or 0)}' for name, size in sizes.items()]
    return {'Memory per process': ', '.join(parts)}


def _above_peak_note(mfu: float, source: str | None) -> str:
    if mfu <= 100:
        return ''
    measured = (source or '').startswith('measured')
    why = 'was measured while the machine was busy' if measured else f'comes from {source}'
    return f' (above 100 %: the peak {why})'


def closing_block(record: Record, best: EvaluationEntry | None, record_path: Path | str) -> str:
    """The results of the run, the path of its record, and the next commands."""
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
        **_final_losses(record),
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
        fields['Continue'] = 'run the same command with --init_from=resume'
    mark, emphasis = ('✅', bold) if status == 'finished' else ('⛔', red)
    progress = f'{summary["final_iter"]:,} of {or_na(summary["total_iterations"], ",")} iterations'
    return '\n'.join(
        [
            '',
            THICK,
            emphasis(f'{mark} TRAINING {status.upper()} after {progress}'),
            THICK,
            *(field_line(label, value) for label, value in fields.items()),
            THICK,
        ]
    )


def _final_losses(record: Record) -> dict[str, str]:
    """The last losses measured; the iteration of the evaluation where it is an earlier one."""
    summary, evaluations = record['summary'], record.get('eval_steps')
    val_loss = or_na(summary['final_val_loss'], '.4f')
    if evaluations and evaluations[-1]['iter'] != summary['final_iter']:
        val_loss += f' (iter {evaluations[-1]["iter"]:,})'
    return {
        'Final val loss': val_loss,
        'Final train loss': or_na(summary['final_train_loss'], '.4f'),
    }


def _tokens_text(summary: Summary, data: DataInfo) -> str:
    total, epochs, unique = (summary[key] for key in ('total_tokens', 'epochs', 'unique_tokens'))
    text = or_na(total, ',')
    if epochs is not None:
        text += f' ({epochs:.2f} epochs)'
    if unique is not None:
        about = '' if data['windows_per_epoch'] else 'about '
        text += f', {about}{unique:,} of them distinct'
    return text


# --- The stream -----------------------------------------------------------------------------------


class Console:
    """Shows a run while it trains, on `stream` (standard output by default).

    style: `line` prints a line for each logged iteration, in nanoGPT's form; `block` prints a
    block for each; `auto` redraws the block in place on a terminal, above a progress bar, and
    prints blocks elsewhere. A terminal with too few rows for the block gets lines.
    on_lost: called with the reason when the stream cannot be written any more.
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
        self.style = style
        self.stream = stream or sys.stdout
        self.on_lost, self.is_lost = on_lost, False
        self.max_iters = max_iters
        self.no_peak: str | None = None  # why there is no MFU
        self.layer_letters: Sequence[str] = ()  # the kind of each layer, if they differ
        self.began = time.monotonic()
        self.first_logged: tuple[int, float] | None = None  # (iter, time), where the pace starts
        self.display = LiveRegion(self.stream)
        self.block = ''  # the one that is shown in place

    def begin(
        self, report: str, hardware: HardwareInfo, layers: LayerChoices | None = None
    ) -> None:
        """Show the start-up report; `hardware` and `layers` are parts of the record."""
        self.layer_letters = layers['letters'] if layers else ()
        if hardware['peak_tflops'] is None:
            self.no_peak = hardware['peak_source']
        self.show(report)

    def iteration(self, entry: IterationEntry) -> None:
        eta = self._time_left(entry['iter'])
        block = iteration_block(entry, eta, self.no_peak)
        if self._prints_lines(block.count('\n') + 2):
            self.close()
            self.show(iteration_line(entry, eta))
        elif not self._redraws():
            self.show(block)
        elif not self.is_lost:
            self.block = block
            self._note_lost(self.display.update([block, self._progress(entry['iter'] + 1, eta)]))

    def evaluation(self, entry: EvaluationEntry, best: EvaluationEntry | None) -> None:
        brief = self._prints_lines()
        self.show(evaluation_line(entry) if brief else evaluation_block(entry, best))
        if 'diagnostics' in entry:
            self.show(diagnostics_table(entry['diagnostics'], self.layer_letters))
        if 'sample' in entry:
            self.show(sample_block(entry['sample']))

    def rollback(self, iter: int, message: str) -> None:
        self.first_logged = None  # the pace is measured again
        self.show(event_line('rollback', iter, message))

    def close(self) -> None:
        """End the display in place; its last block stays, as ordinary text."""
        self.display.close()
        block, self.block = self.block, ''
        if block:
            self.show(block)

    def show(self, text: str) -> None:
        """Print `text`, above a block that is shown in place. A lost stream ends no run."""
        if self.is_lost:
            return
        if is_terminal(self.stream):
            columns = self.display.columns
            text = text.replace(THICK, THICK[:columns]).replace(THIN, THIN[:columns])
        self._note_lost(write_progress(text, stream=self.stream))

    def _note_lost(self, reason: str | None) -> None:
        if reason:
            self.is_lost, self.block = True, ''
            self.on_lost(reason)

    def _redraws(self) -> bool:
        return self.style == 'auto' and self.display.available

    def _prints_lines(self, rows: int = DISPLAY_ROWS) -> bool:
        """Whether an iteration is a line. rows: those that a block in place takes."""
        too_low = self._redraws() and not self.display.fits(max(rows, DISPLAY_ROWS))
        return self.style == 'line' or too_low

    def _progress(self, done: int, eta: float | None) -> str:
        """The bar below the block."""
        parts = [
            done_text(done, self.max_iters, 'iterations'),
            f'{clock(time.monotonic() - self.began)} elapsed',
            'time left n/a' if eta is None else f'{clock(eta)} left',
        ]
        return bar_line('', done, self.max_iters, parts)

    def _time_left(self, iter: int) -> float | None:
        """Seconds, from the pace since the first logged iteration, evaluations included.

        Compilation and warm-up are over at the first logged iteration, so they do not count.
        """
        now = time.monotonic()
        if self.first_logged is None:
            self.first_logged = iter, now
        first_iter, first_time = self.first_logged
        left = self.max_iters - (iter + 1)
        if left <= 0:
            return 0.0
        return (now - first_time) / (iter - first_iter) * left if iter > first_iter else None
