"""Coverage of the intervals of a ladder's fits and forecasts, by simulation with known curves.

    python benchmarks/ladder_forecasts.py --trials=1000 --jobs=2

A ladder has a baseline with one rung more, and a variant with another exponent. Each rung has twice
the parameters of the one below and four times the FLOPs; losses fall from 2.9 to about 2.1. Rows:

  correct          both curves are E + A · C^-α with the same E; noise of 0.006 per run
  noise estimated  the same, with the noise estimated from the seeds as in a real comparison; in
                   the other rows the draws have the true noise
  noise x3         the same, three times the noise
  noise halves     the same, with noise that halves from rung to rung
  E = 0            the same, with E at its bound
  E differs        by 0.05 between the variants, but the fit shares it
  two power laws   the sum of two, with different exponents
  bend             log-periodic deviations of 0.012 from the curve

The output is Markdown tables: the share of the ladders in which an interval of 95 % contains the
true value (of the top rung: the measured mean), and the median width of these intervals. `misfit`
is the median of the residuals relative to the noise, `error` the median of the error of the top
rung's prediction, relative to that of a straight line in logarithms. `own E` is the gain by the
fits with own E.
"""

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from scaling import forecast
from scaling.resampling import LossDraws, draw_losses
from scaling.results import Estimate, Ladder

NAMES = ('baseline', 'variant')
EXPONENTS = (0.15, 0.155)
NOISE = 0.006  # standard deviation of a loss
DRAWS = 500
SHOWN = (1, 3)  # of forecast.FACTORS: 3 and 10 times the top rung


def power_law(log_costs: np.ndarray, variant: int, irreducible: float = 1.5) -> np.ndarray:
    """2.9 at the smallest rung, with E = 1.5."""
    return irreducible + 1.4 * np.exp(-EXPONENTS[variant] * log_costs)


def two_powers(log_costs: np.ndarray, variant: int) -> np.ndarray:
    fast = 0.7 * np.exp(-0.25 * log_costs)
    return 1.2 + fast + (0.9, 0.88)[variant] * np.exp(-0.07 * log_costs)


def bend(log_costs: np.ndarray, variant: int) -> np.ndarray:
    return power_law(log_costs, variant) + 0.012 * np.sin(1.5 * log_costs + variant)


class Case(NamedTuple):
    """A row of the tables."""

    name: str
    rungs: int
    seeds: int
    curve: Callable[[np.ndarray, int], np.ndarray]  # of ln(cost / smallest cost), and variant
    irreducible: float | None = None  # the true E; None if the fitted curve is wrong
    noise: float = NOISE
    decay: float = 1.0  # of the noise, from rung to rung
    estimated: bool = False


CASES = [
    *(Case('correct', r, s, power_law, 1.5) for r in (4, 5, 6) for s in (3, 5)),
    *(Case('noise estimated', r, 3, power_law, 1.5, estimated=True) for r in (4, 6)),
    Case('noise x3', 4, 3, power_law, 1.5, noise=3 * NOISE),
    Case('noise halves', 5, 3, power_law, 1.5, noise=2 * NOISE, decay=0.5),
    Case('E = 0', 5, 3, lambda x, v: power_law(x, v, 0.0), 0.0),
    *(
        Case(name, r, 3, curve)
        for name, curve in (
            ('E differs', lambda x, v: power_law(x, v, 1.5 + 0.05 * v)),
            ('two power laws', two_powers),
            ('bend', bend),
        )
        for r in (4, 6)
    ),
]


def simulate(case: Case, random: np.random.Generator) -> tuple[Ladder, LossDraws]:
    """A ladder of normal losses, and draws of its mean losses."""
    costs = np.tile(1e12 * 4.0 ** np.arange(case.rungs + 1), (2, 1))
    costs[1, case.rungs :] = np.nan
    deviations = case.noise * case.decay ** np.arange(case.rungs + 1)
    expected = np.stack([case.curve(np.log(costs[v] / 1e12), v) for v in range(2)])
    runs = expected + deviations * random.standard_normal((case.seeds, *costs.shape))
    ladder = Ladder(
        baseline=NAMES[0],
        costs={
            name: [None if np.isnan(cost) else float(cost) for cost in row]
            for name, row in zip(NAMES, costs)
        },
        losses={
            name: [
                {} if np.isnan(of_rung).any() else {s: float(x) for s, x in enumerate(of_rung)}
                for of_rung in runs[:, v].T
            ]
            for v, name in enumerate(NAMES)
        },
    )
    if case.estimated:
        return ladder, draw_losses(ladder, DRAWS, random)
    means = runs.mean(axis=0)
    errors = deviations / np.sqrt(case.seeds)
    return ladder, LossDraws(means, means + errors * random.standard_normal((DRAWS, *means.shape)))


def true_values(case: Case) -> dict[str, list[float]]:
    """The quantities of which there are intervals; two values for those of both variants."""
    log_costs = np.log(4.0 ** (case.rungs - 1) * np.array(forecast.FACTORS))
    losses = np.stack([case.curve(log_costs, v) for v in range(2)])
    line = np.linspace(0, log_costs[-1] + 5, 100_001)
    at_equal_loss = np.interp(-losses[1], -case.curve(line, 0), line)  # losses fall
    gains = np.exp(at_equal_loss - log_costs)
    values = {f'loss {forecast.FACTORS[i]:g}x': losses[:, i].tolist() for i in SHOWN}
    values |= {f'gain {forecast.FACTORS[i]:g}x': [float(gains[i])] for i in SHOWN}
    values[f'own E {forecast.FACTORS[SHOWN[-1]]:g}x'] = [float(gains[SHOWN[-1]])]
    if case.irreducible is not None:
        scales = [1.4 * 1e12**exponent for exponent in EXPONENTS]
        values = {'E': [case.irreducible], 'A': scales, 'α': [*EXPONENTS]} | values
    return values


def intervals(ladder: Ladder, losses: LossDraws) -> tuple[dict[str, list[Estimate]], float]:
    """Estimates by quantity, in the order of `true_values`; and the misfit."""
    fit, own = (forecast.fit_ladder(ladder, losses, shared) for shared in (True, False))
    parameters, beyond = forecast.curve_fit(fit), forecast.forecast(fit, own)
    values = {
        'E': [parameters.irreducible[NAMES[0]]],
        'A': [*parameters.scale.values()],
        'α': [*parameters.exponent.values()],
    }
    for i in SHOWN:
        values[f'loss {forecast.FACTORS[i]:g}x'] = [beyond.losses[name][i] for name in NAMES]
    for i in SHOWN:
        values[f'gain {forecast.FACTORS[i]:g}x'] = [beyond.gains[NAMES[1]][i]]
    values[f'own E {forecast.FACTORS[SHOWN[-1]]:g}x'] = [beyond.own_gains[NAMES[1]][SHOWN[-1]]]
    return values, fit.misfit


def run_case(number: int, trials: int, base: int) -> dict[str, dict[str, float]]:
    """By table and column: the numbers of a row."""
    case = CASES[number]
    truth = true_values(case)
    hits: dict[str, list[bool]] = {key: [] for key in (*truth, 'top rung')}
    widths: dict[str, list[float]] = {key: [] for key in hits}
    misfits, errors, line_errors = [], [], []
    for trial in range(trials):
        random = np.random.default_rng([base, number, trial])
        ladder, losses = simulate(case, random)
        estimates, misfit = intervals(ladder, losses)
        misfits.append(misfit)
        for key, values in truth.items():
            for value, estimate in zip(values, estimates[key]):
                hits[key].append(estimate.low <= value <= estimate.high)
                widths[key].append(estimate.high - estimate.low)
        for prediction in forecast.top_predictions(ladder, losses).values():
            hits['top rung'].append(prediction.hit)
            widths['top rung'].append(prediction.predicted.high - prediction.predicted.low)
            errors.append(abs(prediction.predicted.value - prediction.measured))
            line_errors.append(abs(prediction.log_linear - prediction.measured))
    median_widths = {key: float(np.median(each)) for key, each in widths.items() if key != 'A'}
    return {
        'Coverage, %': {key: 100 * float(np.mean(each)) for key, each in hits.items()},
        'Median width of the interval': {
            **median_widths,
            'misfit': float(np.median(misfits)),
            'error': float(np.median(errors) / np.median(line_errors)),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--trials', type=int, default=200, help='Ladders per row (default 200)')
    parser.add_argument('--jobs', type=int, default=1, help='Number of processes (default 1)')
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    began, rows = time.monotonic(), []
    with ProcessPoolExecutor(options.jobs) as pool:
        futures = [
            pool.submit(run_case, number, options.trials, options.seed)
            for number in range(len(CASES))
        ]
        for done, future in enumerate(futures, 1):
            rows.append(future.result())
            left = (time.monotonic() - began) * (len(CASES) - done) / done
            print(f'\r{done}/{len(CASES)} rows, {left:.0f} s left   ', end='', file=sys.stderr)
    print(file=sys.stderr)
    for table, digits in (('Coverage, %', 1), ('Median width of the interval', 3)):
        columns = [*rows[0][table]]
        print(f'\n**{table}** ({options.trials} ladders per row)\n')
        print(f'| case | rungs | seeds | {" | ".join(columns)} |\n|{"---|" * (len(columns) + 3)}')
        for case, row in zip(CASES, rows):
            cells = [
                f'{row[table][key]:.{digits}f}' if key in row[table] else '–' for key in columns
            ]
            print(f'| {case.name} | {case.rungs} | {case.seeds} | {" | ".join(cells)} |')


if __name__ == '__main__':
    main()
