"""scaling/analysis.py: the whole analysis of a ladder."""

import math

import numpy as np
import pytest

from scaling.analysis import analyze
from scaling.results import Ladder

COSTS = [1e15, 3e15, 9e15, 2.7e16, 8.1e16]


def ladder(factor, noise=0.004, seeds=3, rungs=4, number=0):
    """A variant that needs 1 / factor of the baseline's cost; the baseline runs one rung more."""
    draw = np.random.default_rng(number)
    costs = COSTS[: rungs + 1]

    def losses(gain, rung):
        mean = 1.4 + 1.3 * (gain * costs[rung] / costs[0]) ** -0.2
        return {seed: float(mean + noise * draw.standard_normal()) for seed in range(seeds)}

    return Ladder(
        baseline='base',
        costs={'base': costs, 'new': costs[:-1]},
        losses={
            'base': [losses(1.0, rung) for rung in range(rungs + 1)],
            'new': [losses(factor, rung) for rung in range(rungs)],
        },
    )


def test_analysis_puts_all_parts_together_and_is_reproducible():
    analysis = analyze(ladder(1.5), draws=500)
    assert analysis == analyze(ladder(1.5), draws=500)
    assert analysis.draws == 500
    assert [gain.rung for gain in analysis.gains['new']] == [0, 1, 2, 3]
    for gain in analysis.gains['new']:
        assert gain.low.value < gain.value.value < gain.high.value
        assert gain.value.value == pytest.approx(1.5, rel=0.2)
        assert gain.cost == COSTS[gain.rung]
    low, high = analysis.trends['new'].factor[1:]
    assert low < 1 < high
    assert analysis.reversals == {'new': []}
    assert analysis.shared_fit and analysis.own_fit and analysis.forecast
    assert analysis.predictions.keys() == {'base', 'new'}
    assert analysis.noise.deviation(COSTS[1]) == pytest.approx(0.004, rel=0.5)


def test_one_seed_has_no_intervals():
    analysis = analyze(ladder(1.5, seeds=1), draws=500)
    assert analysis.draws == 0
    assert analysis.noise is None
    assert all(math.isnan(gain.low.value + gain.high.value) for gain in analysis.gains['new'])
    assert math.isnan(analysis.trends['new'].factor.low)


def test_three_rungs_have_gains_and_no_forecast():
    analysis = analyze(ladder(1.5, rungs=3), draws=500)
    assert len(analysis.gains['new']) == 3
    assert analysis.forecast is analysis.shared_fit is analysis.own_fit is None
    assert analysis.predictions == {}


def test_trend_is_not_tested_without_the_curvature_of_the_baseline():
    # Linear interpolation makes this constant gain shrink, with any amount of seeds.
    two = ladder(1.5, rungs=2, noise=1e-4)
    costs, losses = ({k: v[:2] for k, v in each.items()} for each in (two.costs, two.losses))
    analysis = analyze(Ladder('base', costs, losses), 500)
    assert analysis.trends['new'].factor.value < 0.97
    assert math.isnan(analysis.trends['new'].factor.low + analysis.trends['new'].factor.high)
    assert math.isfinite(analysis.gains['new'][0].low.value)


def test_trend_is_not_tested_with_a_wrong_curve():
    straight = ladder(1.5)
    losses = {
        name: [
            {seed: loss + 0.02 * (-1) ** rung for seed, loss in each.items()}
            for rung, each in enumerate(rows)
        ]
        for name, rows in straight.losses.items()
    }
    bent = analyze(Ladder('base', straight.costs, losses), 500)
    assert bent.shared_fit.misfit > 2 > analyze(straight, 500).shared_fit.misfit
    _, low, high = bent.trends['new'].factor
    assert math.isnan(low) and math.isnan(high) and bent.trends['new'].factor.value > 0
    assert math.isfinite(bent.gains['new'][0].low.value)


NOTHING = [{}] * 4
SOME = [{1: 3.0, 2: 3.02}, {1: 2.83, 2: 2.8}, {1: 2.6, 2: 2.62}, {1: 2.5, 2: 2.52}]


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
    'costs, base, new, gains',
    [
        ([None] * 4, SOME, SOME, None),  # seconds of runs beside each other
        (COSTS[:4], NOTHING, SOME, None),
        (COSTS[:4], NOTHING, NOTHING, None),
        (COSTS[:4], SOME, NOTHING, 0),
        (COSTS[:4], SOME[::-1], SOME, 4),  # the baseline gets worse with compute
        ([1e15] * 4, SOME, SOME, 4),
        (COSTS[:1], SOME[:1], SOME[:1], 1),
        (COSTS[:4], [SOME[0], {}, {7: 2.6}, {7: 2.5, 8: 2.6}], [{1: 3.0}, *SOME[1:]], 4),
    ],
)
def test_analysis_of_sparse_and_odd_ladders(costs, base, new, gains):
    losses = {'base': base, 'new': new}
    analysis = analyze(Ladder('base', {name: list(costs) for name in losses}, losses), draws=40)
    assert gains is None or len(analysis.gains['new']) == gains
    assert gains is not None or analysis.gains == {}
    for gain in analysis.gains.get('new', []):
        assert 0 < gain.value.value < math.inf
