"""Pairs of fields of a config.json set to other legal values, checked against transformers.

    python tests/stress/field_pairs.py [pairs of each family] [seed] [family …]

First every value of every field alone, then random pairs, in tiny models of every family. Each must
give the same logits as transformers, be refused by name, or be illegal in transformers. Any other
outcome is printed, and sets the exit code to 1.
"""

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from helpers import foreign_configs  # noqa: E402


def main(pairs: int = 100, seed: int = 0, *families: str) -> int:
    torch.set_num_threads(1)
    rng, totals = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        flips = foreign_configs.Flips(Path(folder) / 'model')
        for family in families or foreign_configs.BASES:
            alone = foreign_configs.flips(family)
            outcomes = [(change, flips.outcome(family, change)) for change in alone]
            # A field that is refused alone is refused in every pair: skip it.
            read = [change for change, outcome in outcomes if outcome != 'refused']
            for _ in range(pairs):
                one, other = rng.sample(read, 2)
                outcomes.append(({**one, **other}, flips.outcome(family, {**one, **other})))
            counts = Counter()
            for change, outcome in outcomes:
                known = outcome in ('equal', 'refused', 'illegal')
                counts[outcome if known else 'different'] += 1
                if not known:
                    print(f'{family}: {change}: {outcome}', flush=True)
            totals += counts
            print(f'{family}: {len(alone)} alone and {pairs} pairs: {dict(counts)}', flush=True)
    print(f'all: {dict(totals)}')
    return bool(totals['different'])


if __name__ == '__main__':
    numbers, families = sys.argv[1:3], sys.argv[3:]
    sys.exit(main(*map(int, numbers), *families))
