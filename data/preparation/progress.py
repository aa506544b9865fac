"""Console output of a preparation: the progress bar and the summary."""

import time
from pathlib import Path

from common.console_output import write_progress
from common.progress_bar import ProgressBar, done_text
from data.dataset import DATA_ROOT
from data.preparation.sources import DocumentSource, SourcePosition
from data.preparation.token_writer import TokenWriter
from data.token_files import SPLITS

NAMED_INVALID = 10  # skipped documents that are named


def summary(folder: Path, meta: dict) -> str:
    lines = [
        f'{folder}: {meta["tokenizer"]["kind"]} tokens, vocabulary {meta["vocab_size"]:,}, '
        f'{meta["dtype"]}, verified'
    ]
    for split, info in meta['splits'].items():
        documents = '' if info['documents'] is None else f', {info["documents"]:,} documents'
        files = f', {len(info["shards"])} files' * (len(info['shards']) > 1)
        lines.append(
            f'{split}: {info["tokens"]:,} tokens of {info["bytes"]:,} bytes{documents}{files}, '
            f'SHA-256 {info["sha256"][:12]}…'
        )
    skipped = {key: meta['preparation'][key] for key in ('empty', 'invalid')}
    if any(skipped.values()):
        lines.append(
            f'skipped: {skipped["empty"]:,} empty documents, {skipped["invalid"]:,} invalid ones'
        )
    return '\n'.join(lines)


def train_hint(folder: Path) -> str:
    in_data = folder.resolve().parent == DATA_ROOT.resolve()
    return f'To train on it: python train.py --dataset={folder.name if in_data else folder}'


class PreparationProgress:
    """The progress bar of the encoding, and messages on skipped documents."""

    def __init__(self, source: DocumentSource, position: SourcePosition | None):
        done = (position or SourcePosition()).done
        self.named_invalid, self.began = 0, time.monotonic()
        if position:
            write_progress(f'Continuing after {done_text(done, source.total, source.unit)}')
        self.bar = ProgressBar('Encoding', source.total, unit=source.unit, done=done)

    def show(self, writer: TokenWriter) -> None:
        documents = sum(writer.totals[split]['documents'] for split in SPLITS)
        done = (writer.position or SourcePosition()).done
        self.bar.update(done, note=f'{documents:,} documents' * (self.bar.unit == 'B'))

    def report_invalid(self, complaint: str) -> None:
        """Name the first few documents that are skipped."""
        self.named_invalid += 1
        if self.named_invalid <= NAMED_INVALID:
            write_progress(f'Skipped: {complaint}')

    def close(self) -> None:
        self.bar.close()

    def report_time(self) -> None:
        write_progress(f'Encoded in {time.monotonic() - self.began:,.1f} s')
