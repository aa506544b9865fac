"""Error rates of the comparison's verdicts, by simulation with known true losses.

    python benchmarks/verdicts.py --trials=5000 --jobs=2

Each experiment draws losses of several variants and seeds (all variants share the effect of a seed)
and passes them to `comparison.analysis.test_against_baseline`, the function that
compare_architectures.py uses. For comparison, `separate` is the paired t-test of each variant alone
with Holm's correction, on the runs that finished. The output is Markdown tables:

  false positives  experiments with a significant difference, but no true one
  power            experiments that find the true difference of one variant
  lost seeds       "better" and "worse" without a true difference, when the worst 40 % of the seeds
                   of the variant, of the baseline or of both diverge
  shared seeds     false positives when variants share only some of their seeds
  evaluations      A/A comparisons on a plateau, when one side is evaluated ten times as often
  main effects     false positives for an option without effect in a grid of 2 x 4 cells
  intervals        coverage of the true difference, for each interval and for all of an experiment
  equivalence      "equivalent" for a variant whose true difference is the margin
"""

import argparse
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comparison.analysis import test_against_baseline
from comparison.effects import main_effects
from comparison.groups import Group
from comparison.significance import ALPHA, holm, paired_difference

SEEDS = (3, 5)
VARIANTS = (2, 3, 4, 6, 8)
EFFECT = 2.5  # of one variant, in standard deviations of the noise of a run
SEED_DEVIATION = 1.0  # of the effect of a seed on all variants, in the same unit


def skewed(draw: random.Random) -> float:
    """A draw from a log-normal distribution with mean zero: most values low, few high."""
    return draw.lognormvariate(0, 1) - math.exp(0.5)


# Noise of a run of variant v of n; variant 0 is the baseline.
NOISE: dict[str, Callable[[random.Random, int, int], float]] = {
    'normal': lambda draw, v, n: draw.gauss(0, 1),
    't5': lambda draw, v, n: draw.gauss(0, 1) / math.sqrt(draw.gammavariate(2.5, 2) / 5),
    'variant x3': lambda draw, v, n: draw.gauss(0, 3 if v == n - 1 else 1),
    'baseline x3': lambda draw, v, n: draw.gauss(0, 3 if v == 0 else 1),
    'variant x10': lambda draw, v, n: draw.gauss(0, 10 if v == n - 1 else 1),
    'baseline x10': lambda draw, v, n: draw.gauss(0, 10 if v == 0 else 1),
    'skewed': lambda draw, v, n: skewed(draw),
    'skewed variant': lambda draw, v, n: skewed(draw) if v == n - 1 else draw.gauss(0, 1),
    'skewed baseline': lambda draw, v, n: skewed(draw) if v == 0 else draw.gauss(0, 1),
}


def run(seed: int, loss: float | None) -> SimpleNamespace:
    lost = loss is None
    outcome = 'diverged' if lost else 'finished'
    config = {'seed': seed, 'data_seed': seed}
    return SimpleNamespace(config=config, val_loss=loss, outcome=outcome, blown_up=lost)


def experiment(
    draw: random.Random,
    variants: int,
    seeds: int,
    noise: str = 'normal',
    effects: dict[int, float] | None = None,
    seed_sets: list[Iterable[int]] | None = None,
) -> list[dict[int, float]]:
    """The losses of each variant by seed."""
    seed_sets = seed_sets or [range(seeds)] * variants
    luck = {s: draw.gauss(3, SEED_DEVIATION) for seed_set in seed_sets for s in seed_set}
    effects = effects or {}
    return [
        {s: luck[s] + effects.get(v, 0.0) + NOISE[noise](draw, v, variants) for s in variant_seeds}
        for v, variant_seeds in enumerate(seed_sets)
    ]


def verdicts_of(tables: list[dict[int, float | None]], margin: float | None = None) -> list:
    """The verdicts on all variants except the baseline."""
    groups = [Group([run(seed, loss) for seed, loss in table.items()]) for table in tables]
    return test_against_baseline(groups, groups[0], margin)[1:]


def separate(tables: list[dict[int, float | None]]) -> list[str]:
    """The verdicts of a paired t-test of each variant alone, on the finished runs."""
    baseline, *others = tables
    tests = [
        paired_difference(
            [
                (loss, baseline[seed])
                for seed, loss in table.items()
                if loss is not None and baseline.get(seed) is not None
            ]
        )
        for table in others
    ]
    p_values = iter(holm([test.p_value for test in tests if test]))
    corrected = [(test, next(p_values)) if test else (None, 1.0) for test in tests]
    return [
        ('better' if test.mean < 0 else 'worse') if p_value < ALPHA else 'not significant'
        for test, p_value in corrected
    ]


def is_significant(text: str) -> bool:
    return text in ('better', 'worse')


# --- Experiments; each returns counts by name ----------------------------------------------------


def false_positives(draw, variants, seeds, noise):
    tables = experiment(draw, variants, seeds, noise)
    return {
        'this': any(is_significant(v.text) for v in verdicts_of(tables)),
        'separate': any(map(is_significant, separate(tables))),
    }


def power(draw, variants, seeds):
    tables = experiment(draw, variants, seeds, effects={1: -EFFECT})
    return {
        'this': verdicts_of(tables)[0].text == 'better',
        'separate': separate(tables)[0] == 'better',
    }


def lost_seeds(draw, variants, seeds, where):
    tables = experiment(draw, variants, seeds)
    for number in where:
        table = tables[number]
        for seed in sorted(table, key=table.get)[-math.floor(0.4 * seeds) :]:
            table[seed] = None
    text, alone = verdicts_of(tables)[0].text, separate(tables)[0]
    return {
        'better': text == 'better',
        'worse': text == 'worse',
        'blocked': text == 'blocked',
        'separate better': alone == 'better',
        'separate worse': alone == 'worse',
    }


def shared_seeds(draw, *sets):
    tables = experiment(draw, len(sets), 0, seed_sets=sets)
    return {'this': any(is_significant(v.text) for v in verdicts_of(tables))}


def evaluations(draw, seeds):
    """Both sides are equal, but one is evaluated ten times as often."""
    by_score = {'final': [], 'best': []}
    for count in (10, 100):
        final, best = {}, {}
        for seed in range(seeds):
            level = 3 + draw.gauss(0, 0.01)
            measured = [level + draw.gauss(0, 0.01) for _ in range(count)]
            final[seed], best[seed] = measured[-1], min(measured)
        by_score['final'].append(final)
        by_score['best'].append(best)
    return {
        score: is_significant(verdicts_of(tables)[0].text) for score, tables in by_score.items()
    }


def effects(draw, seeds):
    """60 % of the variance is an effect of value and seed that all cells share."""
    luck = [[draw.gauss(0, 0.6**0.5) for _ in range(seeds)] for _ in (0, 1)]
    grid = []
    for b, a in itertools.product(range(4), (0, 1)):
        losses = {s: luck[a][s] + draw.gauss(0, 0.4**0.5) for s in range(seeds)}
        grid.append(({'A': a, 'B': b}, Group([run(s, loss) for s, loss in losses.items()])))
    effect = next(each for each in main_effects(grid) if each.option == 'A')
    return {'significant': effect.difference.p_value < ALPHA}


def intervals(draw, variants, seeds):
    """The first half of the variants has true differences of different sizes."""
    true = {v: -EFFECT * v for v in range(1, (variants + 1) // 2)}
    covered, agreeing = [], []
    for v, verdict in enumerate(verdicts_of(experiment(draw, variants, seeds, effects=true)), 1):
        low, high, _ = verdict.test.interval
        covered.append(low <= true.get(v, 0.0) <= high)
        agreeing.append(is_significant(verdict.text) == (not low <= 0 <= high))
    return {
        'each': sum(covered) / len(covered),
        'all': all(covered),
        'agrees with the verdict': all(agreeing),
    }


def equivalence(draw, seeds, margin):
    """margin: in standard deviations of a run; the variant is worse by exactly this much."""
    tables = experiment(draw, 2, seeds, effects={1: margin})
    equal = experiment(draw, 2, seeds)
    return {
        'at the margin': verdicts_of(tables, margin)[0].text == 'equivalent',
        'truly equal': verdicts_of(equal, margin)[0].text == 'equivalent',
    }


Case = tuple[str, Callable, tuple]  # a row's name, its experiment, arguments

TABLES: dict[str, list[Case]] = {
    'False positives, %': [
        (f'{noise} | {n} | {k}', false_positives, (k, n, noise))
        for noise in NOISE
        for n in SEEDS
        for k in VARIANTS
    ],
    f'Power for a difference of {EFFECT} deviations, %': [
        (f'normal | {n} | {k}', power, (k, n)) for n in SEEDS for k in VARIANTS
    ],
    'Lost seeds, %': [
        (f'{name} | 5 | 2', lost_seeds, (2, 5, where))
        for name, where in (
            ('none', ()),
            ('of the variant', (1,)),
            ('of the baseline', (0,)),
            ('of both', (0, 1)),
        )
    ],
    'Partly shared seeds: false positives, %': [
        ('1-5 against 4-8 | | 2', shared_seeds, (range(1, 6), range(4, 9))),
        ('1-5 against 2-6 | | 2', shared_seeds, (range(1, 6), range(2, 7))),
        ('1-5 against 1-4 | | 2', shared_seeds, (range(1, 6), range(1, 5))),
        ('1-8 against 5-12 | | 2', shared_seeds, (range(1, 9), range(5, 13))),
        ('1-3 against 4-6 | | 2', shared_seeds, (range(1, 4), range(4, 7))),
        ('1-5, 4-8, 1-5 | | 3', shared_seeds, (range(1, 6), range(4, 9), range(1, 6))),
    ],
    'Ten times as many evaluations: false positives, %': [
        (f'A/A | {n} | 2', evaluations, (n,)) for n in SEEDS
    ],
    'Main effects: false positives, %': [(f'2 x 4 grid | {n} | 8', effects, (n,)) for n in SEEDS],
    'Coverage of the intervals, %': [
        (f'normal | {n} | {k}', intervals, (k, n)) for n in SEEDS for k in VARIANTS
    ],
    'Called equivalent, %': [
        (f'margin {margin} deviations | {n} | 2', equivalence, (n, margin))
        for margin in (1.0, 4.0)
        for n in SEEDS
    ],
}


def shares(case: Case, trials: int, base: int) -> dict[str, float]:
    """The share of each count over the trials, in percent."""
    name, function, arguments = case
    totals: dict[str, float] = {}
    for trial in range(trials):
        draw = random.Random(f'{base} {name} {trial}')
        for key, value in function(draw, *arguments).items():
            totals[key] = totals.get(key, 0.0) + value
    return {key: 100 * total / trials for key, total in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--trials', type=int, default=1000, help='Experiments per row (default 1000)'
    )
    parser.add_argument('--jobs', type=int, default=1, help='Number of processes (default 1)')
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    cases = [(title, case) for title, rows in TABLES.items() for case in rows]
    began, results = time.monotonic(), []
    with ProcessPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(shares, case, options.trials, options.seed) for _, case in cases]
        for done, future in enumerate(futures, 1):
            results.append(future.result())
            left = (time.monotonic() - began) * (len(cases) - done) / done
            print(f'\r{done}/{len(cases)} rows, {left:.0f} s left   ', end='', file=sys.stderr)
    print(file=sys.stderr)
    title = None
    for (table, (name, *_)), values in zip(cases, results):
        if table != title:
            title = table
            print(f'\n**{title}** ({options.trials} experiments per row)\n')
            columns = ['case', 'seeds', 'variants', *values]
            print(f'| {" | ".join(columns)} |\n|{"---|" * len(columns)}')
        print(f'| {name} | {" | ".join(f"{value:.1f}" for value in values.values())} |')


if __name__ == '__main__':
    main()
