"""Data preparation: speed compared with tiktoken, memory, and two kills.

    python benchmarks/data_preparation.py [--megabytes=300] [--turns=3] [--workers=N] [--json=FILE]

The corpus is real text of this machine: source files, headers and documents in the folders of the
Python installation and the system (or --folders), without duplicates. One run measures:

- Speed: data/prepare.py (GPT-2's BPE) in turns with `encode_ordinary_batch` of tiktoken, on the
  same texts with the same number of threads. `command` is the whole command with reading,
  splitting, writing and verification; `encoding` excludes start-up and verification.
- Memory: the peak over all processes for the whole corpus and for a third of it (RSS, and PSS,
  which counts shared memory once).
- Kills: the preparation is killed with kill -9 after about one and two thirds, and resumed. The
  SHA-256 of the files must equal those of the uninterrupted preparation.

It takes about 4 minutes and 2 GB of disk on two slow cores.
"""

import argparse
import hashlib
import json
import re
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import psutil  # noqa: E402

from common.errors import ArgumentParser, UserError, run_script  # noqa: E402
from data.preparation.workers import available_cores  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402

SUFFIXES = ('.py', '.pyi', '.md', '.txt', '.rst', '.h', '.hpp', '.pm', '.js')
LARGEST = 2**22  # bytes; larger files are mostly data tables
PARTS = 12  # files of the corpus
BATCH_BYTES = 2**23  # of text per tiktoken call, so that its lists of ids fit into memory
SAMPLE_SECONDS = 0.1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    paths = sysconfig.get_paths()
    system = ['/usr/include', '/usr/share/doc', '/usr/share/perl', '/usr/lib']
    parser.add_argument(
        '--folders', nargs='+', default=[paths['purelib'], paths['stdlib'], *system]
    )
    parser.add_argument(
        '--megabytes', type=int, default=300, help='Size of the corpus (default 300)'
    )
    parser.add_argument(
        '--turns', type=int, default=3, help='Turns of the speed comparison (default 3)'
    )
    parser.add_argument(
        '--workers',
        type=int,
        default=available_cores(),
        help='Worker processes (default: all cores)',
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='Write the results to this file')
    return parser.parse(argv)


def real_texts(folders: list[str]) -> Iterator[str]:
    """The UTF-8 texts of files below the folders, in order, without duplicates."""
    seen = set()
    for folder in folders:
        for path in sorted(Path(folder).rglob('*')):
            try:
                if path.suffix not in SUFFIXES or not 0 < path.stat().st_size < LARGEST:
                    continue
                content = path.read_bytes()
                text = content.decode()
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.sha256(content).digest()
            if digest not in seen:
                seen.add(digest)
                yield text


def write_corpus(folder: Path, folders: list[str], size: int) -> list[Path]:
    """Write `size` bytes of text as JSON lines, distributed over PARTS files. Raises UserError."""
    paths = [folder / f'{number:02d}.jsonl' for number in range(PARTS)]
    files = [open(path, 'w', encoding='utf-8') for path in paths]  # noqa: SIM115 closed below
    for number, text in enumerate(real_texts(folders)):
        files[number % PARTS].write(json.dumps({'text': text}, ensure_ascii=False) + '\n')
        size -= len(text.encode())
        if size <= 0:
            break
    for file in files:
        file.close()
    if size > 0:
        raise UserError(f'{size:,} bytes of text are missing. Lower --megabytes, or add --folders')
    return paths


def valid_texts(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        with open(path, encoding='utf-8') as file:
            yield from (json.loads(line)['text'] for line in file)


def tiktoken_rate(paths: list[Path], threads: int) -> float:
    """Bytes of text per second of tiktoken's batch encoder, without reading."""
    encoding = Tokenizer({'kind': 'gpt2'})._backend.encoding
    seconds = total = size = 0
    batch = []
    for text in [*valid_texts(paths), None]:
        if text is not None:
            batch.append(text)
            size += len(text.encode())
        if text is None or size >= BATCH_BYTES:
            began = time.perf_counter()
            encoding.encode_ordinary_batch(batch, num_threads=threads)
            seconds += time.perf_counter() - began
            total, size, batch = total + size, 0, []
    return total / seconds


class Preparation:
    """data/prepare.py as a process, monitored until it ends or reaches the share `kill_at`."""

    def __init__(self, paths: list[Path], out: Path, workers: int, kill_at: float = 2):
        self.peak_rss = self.peak_pss = 0
        command = [sys.executable, str(PROJECT / 'data' / 'prepare.py'), *map(str, paths)]
        command += [f'--out={out}', f'--workers={workers}']
        total = sum(path.stat().st_size for path in paths)
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                self._sample(psutil.Process(process.pid))
                if done(out) >= kill_at * total:
                    process.kill()
                time.sleep(SAMPLE_SECONDS)
            self.printed = process.stdout.read()
        self.seconds = time.perf_counter() - began
        self.killed = process.returncode == -signal.SIGKILL
        if process.returncode and not self.killed:
            raise UserError(f'data/prepare.py failed: {self.printed}')

    def _sample(self, process: psutil.Process) -> None:
        try:
            memory = [p.memory_full_info() for p in (process, *process.children(recursive=True))]
        except psutil.Error:  # it has just ended
            return
        self.peak_rss = max(self.peak_rss, sum(one.rss for one in memory))
        self.peak_pss = max(self.peak_pss, sum(getattr(one, 'pss', 0) for one in memory))

    @property
    def encoding_seconds(self) -> float:
        return float(re.search(r'Encoded in ([\d,.]+) s', self.printed)[1].replace(',', ''))


def done(out: Path) -> int:
    """Bytes of the corpus that an unfinished preparation has written."""
    try:
        *_, last = (out / 'unfinished.tmp' / 'journal.jsonl').read_text().splitlines()
        return json.loads(last)['position'][1]
    except (OSError, ValueError):
        return 0


def splits_of(out: Path) -> dict:
    return json.loads((out / 'meta.json').read_text())['splits']


def text_bytes(out: Path) -> int:
    return sum(facts['bytes'] for facts in splits_of(out).values())


def file_hashes(out: Path) -> dict[str, str]:
    """SHA-256 of the token files, computed from the files."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob('*.bin'))}


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = write_corpus(folder, options.folders, options.megabytes * 10**6)
        figures = measure(folder, whole, options)
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + '\n')
    if not figures['same_files']:
        raise UserError(
            'the files after two kills differ from those of the uninterrupted preparation'
        )


def measure(folder: Path, whole: list[Path], options: argparse.Namespace) -> dict:
    workers, turns = options.workers, []
    for turn in range(options.turns):
        out = folder / f'turn_{turn}'
        ours = Preparation(whole, out, workers)
        size, theirs = text_bytes(out), tiktoken_rate(whole, workers)
        turns.append(
            {
                'command_mb_per_s': size / ours.seconds / 1e6,
                'encoding_mb_per_s': size / ours.encoding_seconds / 1e6,
                'tiktoken_mb_per_s': theirs / 1e6,
                'command_against_tiktoken': size / ours.seconds / theirs,
                'encoding_against_tiktoken': size / ours.encoding_seconds / theirs,
                'peak_rss_mb': ours.peak_rss / 1e6,
                'peak_pss_mb': ours.peak_pss / 1e6,
            }
        )
        shown = {key: round(value, 2) for key, value in turns[-1].items()}
        print(f'turn {turn + 1}: {shown}', flush=True)
    third = Preparation(whole[: PARTS // 3], folder / 'third', workers)
    kills = [Preparation(whole, folder / 'killed', workers, at) for at in (1 / 3, 2 / 3, 2)]
    killed = [run.killed for run in kills]
    alone = folder / 'turn_0'
    return {
        'workers': workers,
        'text_bytes': text_bytes(alone),
        'median': {key: statistics.median(turn[key] for turn in turns) for key in turns[0]},
        'turns': turns,
        'third': {
            'text_bytes': text_bytes(folder / 'third'),
            'peak_rss_mb': third.peak_rss / 1e6,
            'peak_pss_mb': third.peak_pss / 1e6,
        },
        'killed': killed,
        'seconds_to_each_end': [run.seconds for run in kills],
        'splits': {
            split: {key: facts[key] for key in ('tokens', 'documents', 'sha256')}
            for split, facts in splits_of(alone).items()
        },
        'same_files': killed == [True, True, False]
        and file_hashes(alone) == file_hashes(folder / 'killed'),
    }


if __name__ == '__main__':
    run_script(main)
