"""Coverage of a ladder's intervals, by simulation with known true gains.

    python benchmarks/ladder_coverage.py --trials=1000 --jobs=2

Each trial draws the losses of a baseline and a variant from true curves L(C) = E + A · C^-α, with
an effect of the seed that both share, and passes them to `scaling.analysis.gains_and_trends`, which
compare_architectures.py uses. Rungs differ by a factor of 2 to 4, losses are 1.6 to 3 nats, α is
0.1 to 0.3, the deviation over seeds 0.003 to 0.01. The baseline has one rung more. A gain is that
of the true curves, 0.5 to 2. The output is Markdown tables, in percent:

  gain          intervals of gains that contain the true gain (of A/A ladders: 1)
  worst rung    the same at the rung with the lowest coverage
  known noise   the same for intervals that know the noise instead of estimating it
  width         median width of log intervals, relative to those with known noise
  trend         intervals of trends that contain the true trend (of A/A ladders: none)
  reversals     ladders with a significant reversal
  power         the same by the power of Student's tests at the second and the third rung, with the
                noise pooled over the rungs
"""

import argparse
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.student import student_quantile
from comparison.significance import power
from scaling.analysis import gains_and_trends
from scaling.resampling import LossDraws, draw_losses, mean_losses
from scaling.results import Gain, Ladder
from scaling.trend import reversals

START = 1e15  # cost of the first rung
KNOWN_EVERY = 3  # of so many ladders, one is also analyzed with known noise, to save time


class Case(NamedTuple):
    """A row of a table."""

    name: str
    rungs: int = 4  # of the variant
    seeds: int = 3
    share: float = 0.5  # of the seed's effect in the variance of a loss
    gain: str = 'any'  # or 'none': an A/A ladder
    crossing: float | None = None  # the gain at the upper rungs; its inverse at the lower two
    noise: str = 'constant'
    curve: str = 'power law'


class Trial(NamedTuple):
    """A ladder and what is true of it."""

    ladder: Ladder
    gains: np.ndarray  # [rungs]
    trend: float  # factor for each tenfold increase of the cost
    known: Callable[[int], LossDraws]  # draws of mean losses with the true noise
    power: float  # probability that the differences at the second and third rung are significant


# The deviation at each rung, relative to the first. rungs: 0, 1, ...; step: factor of the cost.
NOISE: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    'constant': lambda rungs, step: np.ones(len(rungs)),
    'halves at each rung': lambda rungs, step: 0.5**rungs,
    'doubled at the second rung': lambda rungs, step: np.where(rungs == 1, 2.0, 1.0),
    'doubled at the top rung': lambda rungs, step: np.where(rungs == len(rungs) - 2, 2.0, 1.0),
    'doubled of the variant': lambda rungs, step: np.ones(len(rungs)),
    'share 0.1 and 0.8 in turn': lambda rungs, step: np.ones(len(rungs)),
}


def true_curve(
    case: Case, draw: np.random.Generator, step: float
) -> Callable[[np.ndarray], np.ndarray]:
    exponent, irreducible, first = (
        draw.uniform(0.1, 0.3),
        draw.uniform(1, 1.6),
        draw.uniform(2.4, 3),
    )
    if case.curve == 'power law':
        return lambda costs: irreducible + (first - irreducible) * (costs / START) ** -exponent
    kink = START * step ** (case.rungs / 2)
    return lambda costs: (
        irreducible
        + (first - irreducible)
        * (
            (np.minimum(costs, kink) / START) ** -exponent
            * (np.maximum(costs, kink) / kink) ** (-exponent / 2)
        )
    )


def true_gains(
    case: Case, draw: np.random.Generator, costs: np.ndarray
) -> tuple[np.ndarray, float]:
    """The gain at each cost, and the exponent of its trend."""
    if case.gain == 'none':
        return np.ones(len(costs)), 0.0
    if case.crossing:
        return np.where(np.arange(len(costs)) < 2, 1 / case.crossing, case.crossing), math.nan
    first, slope = math.exp(draw.uniform(math.log(0.7), math.log(1.6))), draw.uniform(-0.08, 0.08)
    return first * (costs / START) ** slope, slope


def trial(case: Case, draw: np.random.Generator) -> Trial:
    step = math.exp(draw.uniform(math.log(2), math.log(4)))
    rungs = np.arange(case.rungs + 1)
    costs = START * step**rungs
    own_costs = costs * (
        draw.uniform(0.9, 1.1) if case.gain == 'any' and not case.crossing else 1.0
    )
    curve = true_curve(case, draw, step)
    gains, slope = true_gains(case, draw, own_costs)
    means = np.stack([curve(costs), curve(gains * own_costs)])
    deviation = math.exp(draw.uniform(math.log(0.003), math.log(0.01)))
    deviations = deviation * NOISE[case.noise](rungs, step)
    shares = np.full(len(rungs), case.share)
    if case.noise == 'share 0.1 and 0.8 in turn':
        shares = np.where(rungs % 2 == 0, 0.1, 0.8)
    of_variants = np.array([1.0, 2.0 if case.noise == 'doubled of the variant' else 1.0])

    def noise(count: int) -> np.ndarray:
        """[count, variants, rungs]"""
        of_seed = np.sqrt(shares) * draw.standard_normal((count, 1, len(rungs)))
        own = np.sqrt(1 - shares) * draw.standard_normal((count, 2, len(rungs)))
        return deviations * (of_seed + of_variants[:, None] * own)

    losses = means + noise(case.seeds)  # [seeds, variants, rungs]
    ladder = Ladder(
        'base',
        {'base': costs.tolist(), 'variant': own_costs[:-1].tolist()},
        {
            name: [dict(enumerate(losses[:, v, r].tolist())) for r in range(count)]
            for v, (name, count) in enumerate((('base', len(rungs)), ('variant', case.rungs)))
        },
    )

    def known(draws: int) -> LossDraws:
        measured = mean_losses(ladder)
        return LossDraws(measured, measured + noise(draws) / math.sqrt(case.seeds))

    errors = deviations * np.sqrt(2 * (1 - shares) / case.seeds)
    freedom = case.rungs * (case.seeds - 1)
    critical = student_quantile(0.975, freedom)
    powers = [
        power(ratio, freedom, critical) for ratio in np.abs(means[0] - means[1])[1:3] / errors[1:3]
    ]
    return Trial(ladder, gains[:-1], 10**slope, known, math.prod(powers))


def contains(gain: Gain, true: float) -> bool:
    """An end outside the baseline's rungs leaves its side open, or is a bound of all values."""
    above = gain.low.relation == '<' or gain.low.value <= true
    return above and (gain.high.relation == '>' or true <= gain.high.value)


def outcomes(case: Case, number: int, draws: int, base: int) -> dict[str, list[float]]:
    """What a row averages, of one trial: lists by rung, or of a single value."""
    draw = np.random.default_rng([base, number])
    drawn = trial(case, draw)
    gains, trends = gains_and_trends(drawn.ladder, draw_losses(drawn.ladder, draws, draw))
    of_variant, trend = gains['variant'], trends['variant']
    result = {
        'gain': [contains(each, drawn.gains[each.rung]) for each in of_variant],
        'trend': [trend.factor.low <= drawn.trend <= trend.factor.high] if trend else [],
        'reversals': [any(each.significant for each in reversals(of_variant))],
        'power': [drawn.power],
    }
    if number % KNOWN_EVERY == 0:
        known = gains_and_trends(drawn.ladder, drawn.known(draws))[0]['variant']
        result['known noise'] = [contains(each, drawn.gains[each.rung]) for each in known]
        result['reversals, known noise'] = [any(each.significant for each in reversals(known))]
        result['width'] = [
            math.log(one.high.value / one.low.value) / math.log(other.high.value / other.low.value)
            for one, other in zip(of_variant, known)
            if not any(end.relation for end in (one.low, one.high, other.low, other.high))
        ]
    return result


def row(case: Case, trials: int, draws: int, base: int) -> dict[str, float]:
    results = [outcomes(case, number, draws, base) for number in range(trials)]
    totals = {
        key: [*chain.from_iterable(each.get(key, []) for each in results)] for key in results[0]
    }
    by_rung = np.mean([result['gain'] for result in results], axis=0)
    shares = {key: 100 * float(np.mean(values)) for key, values in totals.items() if values}
    shares['width'] = float(np.median(totals['width']))
    shares['worst rung'] = 100 * float(by_rung.min())
    return shares


COVERAGE = ('gain', 'worst rung', 'known noise', 'width', 'trend')
TABLES: dict[str, tuple[tuple[str, ...], list[Case]]] = {
    'Gains of 0.5 to 2': (
        COVERAGE,
        [
            *(Case('', rungs, seeds) for rungs in (4, 5) for seeds in (3, 5)),
            *(Case('', share=share) for share in (0.0, 0.8)),
        ],
    ),
    'A/A ladders': (
        (*COVERAGE, 'reversals'),
        [
            *(Case('', seeds=seeds, gain='none') for seeds in (3, 5)),
            *(Case('', share=share, gain='none') for share in (0.0, 0.8)),
        ],
    ),
    'Other noise, and a wrong curve': (
        COVERAGE,
        [
            *(Case(name, noise=name) for name in list(NOISE)[1:]),
            Case('exponent halves at the middle', curve='kinked'),
        ],
    ),
    'A crossing': (
        ('reversals', 'reversals, known noise', 'power'),
        [
            Case(f'from a gain of 1 / {factor} to {factor}', seeds=seeds, crossing=factor)
            for factor in (1.03, 1.06)
            for seeds in (3, 5)
        ],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--trials', type=int, default=1000, help='Ladders per row (default 1000)')
    parser.add_argument('--draws', type=int, default=300, help='Draws per ladder (default 300)')
    parser.add_argument('--jobs', type=int, default=1, help='Number of processes (default 1)')
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs) as pool:
        tables = {
            title: [
                pool.submit(row, case, options.trials, options.draws, options.seed)
                for case in cases
            ]
            for title, (_, cases) in TABLES.items()
        }
        for title, (columns, cases) in TABLES.items():
            print(f'\n**{title}** ({options.trials} ladders per row)\n')
            print(f'| case | rungs | seeds | share | {" | ".join(columns)} |')
            print(f'|{"---|" * (4 + len(columns))}', flush=True)
            for case, future in zip(cases, tables[title]):
                values = future.result()
                cells = [f'{values[key]:.{2 if key == "width" else 1}f}' for key in columns]
                settings = [case.name, str(case.rungs), str(case.seeds), str(case.share)]
                print(f'| {" | ".join([*settings, *cells])} |', flush=True)


if __name__ == '__main__':
    main()
