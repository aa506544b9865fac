"""What a preparation tells of itself: while it goes on, and when it is done."""

import time
from pathlib import Path

from common.console_output import write_progress
from common.formatting import clock
from data.dataset import DATA_ROOT
from data.preparation.sources import DocumentSource, SourcePosition
from data.preparation.token_writer import TokenWriter
from data.token_files import SPLITS

PROGRESS_SECONDS = 5
NAMED_INVALID = 10  # documents left out that are named


def summary(folder: Path, meta: dict) -> str:
    lines = [
        f'{folder}: {meta["tokenizer"]["kind"]} tokens, vocabulary {meta["vocab_size"]:,}, '
        f'{meta["dtype"]}; read back and checked'
    ]
    for split, info in meta['splits'].items():
        documents = '' if info['documents'] is None else f', {info["documents"]:,} documents'
        files = f', {len(info["shards"])} files' * (len(info['shards']) > 1)
        lines.append(
            f'{split}: {info["tokens"]:,} tokens of {info["bytes"]:,} bytes{documents}{files}, '
            f'SHA-256 {info["sha256"][:12]}…'
        )
    left_out = {key: meta['preparation'][key] for key in ('empty', 'invalid')}
    if any(left_out.values()):
        lines.append(
            f'left out: {left_out["empty"]:,} empty documents, {left_out["invalid"]:,} that could '
            'not be used'
        )
    return '\n'.join(lines)


def train_hint(folder: Path) -> str:
    ours = folder.resolve().parent == DATA_ROOT.resolve()
    return f'To train on it: python train.py --dataset={folder.name if ours else folder}'


class PreparationProgress:
    """A line every few seconds: how much is done, how fast, and the time left."""

    def __init__(self, source: DocumentSource, position: SourcePosition | None):
        self.source, self.began = source, time.monotonic()
        self.before = (position or SourcePosition()).done
        self.last, self.named = self.began, 0
        if position:
            write_progress(f'Going on after {self._amount(self.before)}')

    def show(self, writer: TokenWriter) -> None:
        now = time.monotonic()
        if now - self.last < PROGRESS_SECONDS:
            return
        self.last, done = now, (writer.position or SourcePosition()).done
        rate = (done - self.before) / (now - self.began)
        documents = sum(writer.totals[split]['documents'] for split in SPLITS)
        line = f'{self._amount(done)}, {documents:,} documents, {self._size(rate)}/s'
        if self.source.total and rate:
            left = max(self.source.total - done, 0) / rate
            line += f', {clock(left)} left'
        write_progress(line)

    def report_invalid(self, complaint: str) -> None:
        """Name the first few documents that are left out."""
        self.named += 1
        if self.named <= NAMED_INVALID:
            write_progress(f'Left out: {complaint}')

    def end(self) -> None:
        seconds = time.monotonic() - self.began
        write_progress(f'Encoded in {seconds:,.1f} s')

    def _amount(self, done: float) -> str:
        total = self.source.total
        if not total:
            return self._size(done)
        return f'{done / total:4.0%} of {self._size(total)}'

    def _size(self, amount: float) -> str:
        if self.source.unit == 'B':
            return f'{amount / 1e6:,.1f} MB'
        return f'{amount:,.0f} {self.source.unit}'
