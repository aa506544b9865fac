"""Progress of long work: a bar that is redrawn on a terminal, occasional lines elsewhere.

    with ProgressBar('Encoding', total=file_size, unit='B') as bar:
        for block in blocks:
            encode(block)
            bar.advance(len(block), note=f'{documents:,} documents')

On a terminal the bar stays at the bottom, and other output scrolls above it. A log file gets plain
lines, at intervals that grow with the duration of the work.
"""

import time
from typing import TextIO

from common.formatting import clock
from common.live_region import LiveRegion

BAR_COLUMNS = (8, 20)  # minimum and maximum length of the bar itself
LINE_COLUMNS = 79  # maximum length of a line, as long as the bar has its minimum
LINE_SHARE = 0.05  # minimum interval between two lines of a log, as a share of the elapsed time


class ProgressBar:
    """The amount of work done, its rate and the time left.

    total: the amount of all work; None if it is unknown. unit: `B` for bytes, or a plural noun.
    done: the amount that was done before this process; it does not count in the rate.
    line_seconds: the minimum interval between lines if the stream is not a terminal.
    show_rate: whether to show the amount per second.
    stream: standard output by default.
    """

    def __init__(
        self,
        title: str,
        total: float | None = None,
        *,
        unit: str = '',
        done: float = 0,
        line_seconds: float = 10.0,
        show_rate: bool = True,
        stream: TextIO | None = None,
    ):
        self.title, self.total, self.unit = title, total, unit
        self.done = self.start = done
        self.line_seconds, self.show_rate = line_seconds, show_rate
        self.began = self.last_line = time.monotonic()
        self._region = LiveRegion(stream)

    def __enter__(self) -> 'ProgressBar':
        self.update(self.done)
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def advance(self, amount: float = 1, note: str = '') -> None:
        """Add `amount` to the work done."""
        self.update(self.done + amount, note)

    def update(self, done: float, note: str = '', seconds_left: float | None = None) -> None:
        """Set the amount done. `seconds_left` replaces the estimate from the rate."""
        self.done, now = done, time.monotonic()
        if self._region.available:
            if self._region.due:
                self._region.update([self.text(note, seconds_left)])
            return
        interval = max(self.line_seconds, LINE_SHARE * (now - self.began))
        if now - self.last_line >= interval:
            self.last_line = now
            self._region.write_line(self.text(note, seconds_left, bar=False))

    def close(self) -> None:
        """Remove the bar; the output above it stays."""
        self._region.close()

    @property
    def rate(self) -> float | None:
        """The amount per second since the start of this process; None at the start."""
        seconds = time.monotonic() - self.began
        return (
            (self.done - self.start) / seconds if seconds > 0 and self.done > self.start else None
        )

    def text(self, note: str = '', seconds_left: float | None = None, bar: bool = True) -> str:
        """The line that is shown."""
        rate = self.rate
        if seconds_left is None and rate and self.total is not None:
            seconds_left = max(self.total - self.done, 0) / rate
        speed = f'{amount_text(rate, self.unit, digits=1)}/s' if rate and self.show_rate else None
        left = None if seconds_left is None else f'{clock(seconds_left)} left'
        parts = [done_text(self.done, self.total, self.unit), speed, left, note]
        return bar_line(self.title, self.done, self.total, [p for p in parts if p], bar)


def bar_line(
    title: str, done: float, total: float | None, parts: list[str], bar: bool = True
) -> str:
    """One line: the title, a bar if `total` is known, the percentage, and the other parts.

    The bar takes the rest of LINE_COLUMNS. bar: False for a line of a log.
    """
    if total:
        share = min(max(done / total, 0.0), 1.0)
        parts = [f'{int(100 * share):{3 if bar else 1}} %', *parts]
    if not bar:
        return f'{title}: {", ".join(parts)}'
    text, title = '  '.join(parts), title and f'{title} '
    if not total:
        return title + text
    least, most = BAR_COLUMNS
    columns = min(max(LINE_COLUMNS - len(title) - 1 - len(text), least), most)
    filled = int(columns * share)
    return f'{title}{"━" * filled}{"─" * (columns - filled)} {text}'


def done_text(done: float, total: float | None, unit: str) -> str:
    """`412/5,000 iterations`, `1.2/3.0 GB`, `35.1 MB`."""
    if total is None:
        return amount_text(done, unit)
    if unit == 'B':
        scale, prefix = _byte_scale(total)
        return f'{done / scale:,.1f}/{total / scale:,.1f} {prefix}B'
    return f'{done:,.0f}/{total:,.0f} {unit}'.rstrip()


def amount_text(amount: float, unit: str, digits: int = 0) -> str:
    """`35.1 MB`, `1,234 documents`."""
    if unit == 'B':
        scale, prefix = _byte_scale(amount)
        return f'{amount / scale:,.1f} {prefix}B'
    return f'{amount:,.{digits}f} {unit}'.rstrip()


def _byte_scale(amount: float) -> tuple[float, str]:
    return next(((s, p) for s, p in ((1e9, 'G'), (1e6, 'M')) if amount >= s), (1e3, 'k'))
