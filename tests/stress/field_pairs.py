"""Fields of config.json files set to other legal values, checked against transformers.

    python tests/stress/field_pairs.py [--configs=10] [--pairs=50] [--every=1] [--values=N] [FAMILY]

In tiny models of every family, or of those named: every value of every field alone, then random
pairs of the fields that are not refused alone. Further configs are drawn at random (sizes, heads,
layers, two other fields); in each of them every field alone is set to one other value, and a tenth
of the pairs is tried. With --every=4 a random config changes every fourth field, the next config
the fields after those. With --values=1 the first config has one value of each field that affects
logits. Each change must give the same logits as transformers, be refused by name, or be illegal in
transformers. Any other outcome is printed, and sets the exit code to 1. The result is a row of a
table for each family.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from helpers.field_changes import Flips, field_changes  # noqa: E402
from helpers.foreign_configs import BASES  # noqa: E402
from helpers.random_configs import random_config  # noqa: E402

KNOWN = ('equal', 'refused', 'illegal')
DRAWS = 60  # attempts for each random config, of which many are illegal


class FamilyTrial:
    """The changes of one family's configs, with their outcomes counted."""

    def __init__(self, family: str, flips: Flips, seed: int):
        self.family, self.flips = family, flips
        self.rng = random.Random(f'{seed} {family}')
        self.configs, self.outcomes = 0, Counter()

    def outcome(self, change: dict, base: dict) -> str:
        outcome = self.flips.outcome(self.family, change, base)
        self.outcomes[outcome if outcome in KNOWN else 'different'] += 1
        if outcome not in KNOWN:
            beside = {k: v for k, v in base.items() if self.base.get(k, ...) != v}
            print(f'{self.family}: {change} with {beside}: {outcome}', file=sys.stderr, flush=True)
        return outcome

    @property
    def base(self) -> dict:
        return BASES[self.family]

    def change_fields(self, base: dict, changes: list[dict], pairs: int) -> list[dict]:
        """Tries the changes alone and random pairs of them -> those that are not refused."""
        self.configs += 1
        read = [change for change in changes if self.outcome(change, base) != 'refused']
        for _ in range(pairs if len(read) > 1 else 0):
            one, other = self.rng.sample(read, 2)
            self.outcome({**one, **other}, base)
        return read

    def random_configs(self, changes: list[dict]) -> Iterator[dict]:
        """Different legal configs."""
        seen = [self.base]
        while True:
            for _ in range(DRAWS):
                config = random_config(self.family, self.rng, changes)
                if config in seen:
                    continue
                seen.append(config)
                if self.outcome({}, config) == 'equal':
                    break
            else:
                return
            yield config

    def run(self, configs: int, pairs: int, every: int, values: int | None) -> None:
        first = field_changes(self.family, values, irrelevant=values is None)
        read = self.change_fields(self.base, first, pairs)
        drawn = self.random_configs(read)
        for number, base in zip(range(configs), drawn, strict=False):
            changes = field_changes(self.family, irrelevant=False, base=base)
            by_fields: dict = {}
            for change in changes:
                by_fields.setdefault(tuple(change), []).append(change)
            fields = list(by_fields.values())[number % every :: every]
            alone = [self.rng.choice(same) for same in fields]
            self.change_fields(base, alone, pairs // 10)

    def row(self) -> str:
        counts = [self.outcomes[outcome] for outcome in (*KNOWN, 'different')]
        return table_row(self.family, self.configs, sum(counts), *counts)


def table_row(*cells: object) -> str:
    return f'| {" | ".join(map(str, cells))} |'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--configs', type=int, default=10, help='random configs of each family')
    parser.add_argument('--pairs', type=int, default=50, help='pairs in the first config')
    parser.add_argument('--every', type=int, default=1, help='distance of changed fields')
    parser.add_argument('--values', type=int, help='values of each field in the first config')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('families', nargs='*', default=list(BASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(table_row('family', 'configs', 'changes', *KNOWN, 'different'))
    print(table_row(*['---'] * 7), flush=True)
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        flips = Flips(Path(folder) / 'model')
        for family in arguments.families:
            trial = FamilyTrial(family, flips, arguments.seed)
            trial.run(arguments.configs, arguments.pairs, arguments.every, arguments.values)
            print(trial.row(), flush=True)
            different += trial.outcomes['different']
    return bool(different)


if __name__ == '__main__':
    sys.exit(main())
