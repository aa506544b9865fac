"""Several processes with one thread each against one process with as many threads.

    python benchmarks/process_speed.py [--shape=char] [--processes=2] [--turns=5] [--json=FILE]

The same training (model, sequences, precision) with one process, and with several under DDP, ZeRO-1
and FSDP, on the CPU of this machine with gloo. All stay alive and take turns, as in
training_speed.py; only measurements of the same turn are compared.

`efficiency` is the tokens/s of the processes divided by those of the single process with as many
threads. `communication` is the share of an iteration spent in collectives: each strategy also runs
with collectives that return at once (and thus give wrong results). `memory` is the total over all
processes. `sent` is the traffic per process and iteration, from the record.

Other options go to train.py: --reduce_dtype=bfloat16.
"""

import argparse
import json
import math
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.race import SHAPES, Contestant, ContestantLost, seconds_left  # noqa: E402
from benchmarks.race_report import padded_table, ratios, spread, spread_text  # noqa: E402
from benchmarks.record_overhead import random_tokens  # noqa: E402
from common import hardware  # noqa: E402
from common.errors import ArgumentParser, UserError, run_script  # noqa: E402

STRATEGIES = {
    'ddp': [],
    'zero1': ['--use_zero1=True'],
    'fsdp': ['--use_fsdp=True'],
}
ALONE = 'single'


@dataclass
class Team:
    """The processes of one contestant, which start and end a turn together."""

    members: list[Contestant]
    facts: dict = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # per iteration, for each turn
    peak_gb: float = 0.0

    def answers(self) -> list[dict]:
        answers = [member.answer() for member in self.members]
        self.peak_gb = max(self.peak_gb, sum(answer['peak_gb'] for answer in answers))
        return answers

    def turn(self, steps: int) -> float:
        """Seconds per iteration of the slowest process."""
        for member in self.members:
            member.tell(steps=steps)
        return max(answer['seconds'] for answer in self.answers()) / steps

    def end(self) -> None:
        for member in self.members:
            member.end()


# --- Contestants ----------------------------------------------------------------------------------


def launch(name: str, options: argparse.Namespace, folder: Path) -> Team:
    """Start a contestant: 'single', a strategy, or one 'without' its collectives.

    Raises ContestantLost.
    """
    strategy, _, without = name.partition(' ')
    processes = 1 if strategy == ALONE else options.processes
    sizes = options.shape_told['options']
    own = {
        'kind': 'ours',
        'shape': options.shape_told,
        'folder': str(folder),
        'device': 'cpu',
        'dtype': options.dtype,
        'without_collectives': bool(without),
        'given': [
            f'--gradient_accumulation_steps={options.processes}',
            f'--batch_size={sizes["batch_size"] // options.processes}',
            *STRATEGIES.get(strategy, []),
            *options.given,
        ],
    }
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    members = []
    for rank in range(processes):
        environment = {'OMP_NUM_THREADS': str(options.processes // processes)}
        if processes > 1:
            environment |= {'RANK': str(rank), 'LOCAL_RANK': str(rank)}
            environment |= {'WORLD_SIZE': str(processes), 'LOCAL_WORLD_SIZE': str(processes)}
            environment |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
        log = folder / f'{name.replace(" ", "-")}-{rank}.log'
        members.append(Contestant(f'{name}, rank {rank}', own, log, environment))
    team = Team(members)
    team.facts = team.answers()[0]
    team.turn(1)  # the first iteration differs from all others
    return team


def race(options: argparse.Namespace, folder: Path) -> dict[str, Team]:
    """Start all contestants and run the turns. Raises ContestantLost."""
    names = [ALONE, *(f'{s}{end}' for s in STRATEGIES for end in ('', ' without'))]
    teams: dict[str, Team] = {}
    began = time.monotonic()

    def say(text: str) -> None:
        print(f'{time.monotonic() - began:6.0f} s  {text}', file=sys.stderr, flush=True)

    try:
        for name in names:
            say(f'starting {name}')
            teams[name] = launch(name, options, folder)
        steps = max(1, math.ceil(options.seconds / teams[ALONE].turn(1)))
        begun, done = time.monotonic(), 0
        for turn in range(1, options.turns + 1):
            for name, team in teams.items():
                team.seconds.append(team.turn(steps))
                done += 1
                left = seconds_left(begun, done, options.turns * len(teams))
                say(
                    f'turn {turn}/{options.turns} {name}: {1e3 * team.seconds[-1]:,.0f} '
                    f'ms/iter | about {left:.0f} s left'
                )
    finally:
        for team in teams.values():
            team.end()
    return teams


# --- Results --------------------------------------------------------------------------------------


def team_summary(teams: dict[str, Team]) -> list[dict]:
    """One row for the single process, then one per strategy."""
    alone = teams[ALONE]
    rows = []
    for name in (ALONE, *STRATEGIES):
        team = teams[name]
        row = {
            'strategy': name,
            'tokens_per_sec': spread([alone.facts['tokens'] / s for s in team.seconds]),
            'efficiency': ratios(alone.seconds, team.seconds),
            'memory_gb': team.peak_gb,
            'bytes_sent': team.facts['bytes_sent'],
        }
        if name != ALONE:
            without = teams[f'{name} without'].seconds
            shares = [1 - short / whole for short, whole in zip(without, team.seconds)]
            row['communication_percent'] = spread([100 * share for share in shares])
        rows.append(row)
    return rows


def report_table(rows: list[dict], options: argparse.Namespace) -> str:
    threads = options.processes
    lines = [
        ('strategy', 'tokens/s', 'efficiency', 'communication %', 'memory GB', 'sent MB'),
    ]
    for row in rows:
        communication = row.get('communication_percent')
        lines.append(
            (
                row['strategy'],
                spread_text(row['tokens_per_sec'], 0),
                spread_text(row['efficiency'], 2),
                spread_text(communication, 1) if communication else '',
                f'{row["memory_gb"]:.2f}',
                f'{row["bytes_sent"] / 1e6:,.1f}',
            )
        )
    return '\n'.join(
        [
            f'{hardware.device_name(torch.device("cpu"))}; torch {torch.__version__}; '
            f'{options.shape}, {options.dtype}; {threads} processes with one thread each against '
            f'one with {threads}; medians of {options.turns} turns [minimum, maximum]',
            padded_table(lines),
        ]
    )


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options; those for train.py are in `given`. Raises UserError."""
    parser = ArgumentParser(
        prog='process_speed.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        '--shape',
        choices=list(SHAPES),
        default='char',
        help='Shape, as in training_speed.py (default char)',
    )
    add(
        '--processes',
        type=int,
        default=2,
        help='Number of processes, and threads of the single process (default 2)',
    )
    add('--turns', type=int, default=5, help='Number of turns (default 5)')
    add('--seconds', type=float, default=4.0, help='Minimum length of a turn (default 4)')
    add(
        '--dtype',
        choices=('bfloat16', 'float32'),
        default='bfloat16',
        help='Precision (default bfloat16)',
    )
    add('--json', type=Path, help='Write all results to this file')
    options, options.given = parser.parse_known_args(argv)
    options.shape_told = SHAPES[options.shape]
    sequences = options.shape_told['options']['batch_size']
    if options.processes < 2 or sequences % options.processes:
        raise UserError(
            f'--processes={options.processes}: at least 2, and a divisor of the {sequences} '
            f'sequences per iteration of --shape={options.shape}.'
        )
    return options


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    with tempfile.TemporaryDirectory(prefix='process_speed_') as name:
        folder = Path(name)
        (folder / 'data').mkdir()
        random_tokens(folder / 'data', options.shape_told['vocab_size'])
        try:
            rows = team_summary(race(options, folder))
        except ContestantLost as lost:
            raise UserError(str(lost)) from lost
    print(report_table(rows, options))
    if options.json:
        options.json.write_text(json.dumps({'shape': options.shape, 'rows': rows}, indent=1))
    return 0


if __name__ == '__main__':
    run_script(main)
