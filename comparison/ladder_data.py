"""The comparison of a ladder as plain values, for JSON, CSV and Python."""

import math
from typing import Any

from comparison.formats import comparison_data, verdict_data
from comparison.ladder import LadderComparison, LadderRung
from comparison.runs import run_data
from scaling.results import CONFIDENCE, CurveFit, Estimate, Gain, LadderAnalysis, NoiseModel


def ladder_data(comparison: LadderComparison) -> dict[str, Any]:
    """Everything: the answer, the analysis, each rung's comparison, and the runs."""
    return {
        'baseline': comparison.baseline,
        'score': comparison.score,
        'margin': comparison.margin,
        'verdict': _answer(comparison),
        'ladder': {
            'horizon': comparison.plan.horizon,
            'transfer': comparison.plan.transfer,
            'variants': comparison.variants,
            'rungs': [_rung_data(comparison, rung) for rung in comparison.rungs],
            **_analysis_data(comparison.analysis),
            'time_gains': comparison.time_gains and _by_variant(comparison.time_gains),
            'pair_noise': _noise_data(comparison.pair_noise),
            'concurrent_runs': comparison.concurrent,
        },
        'loss_warnings': comparison.loss_warnings,
        'speed_warnings': comparison.speed_warnings,
        'code_warning': comparison.code_warning,
        'skipped': comparison.skipped,
        'runs': ladder_runs(comparison),
    }


def ladder_runs(comparison: LadderComparison) -> list[dict[str, Any]]:
    """One row per run: its rung, its rank there, and its values."""
    rows = []
    for rung in comparison.rungs:
        if rung.comparison is None:
            continue
        groups = zip(rung.comparison.groups, rung.comparison.labels)
        rows += [
            {
                'rung': rung.number,
                'rung_label': rung.label,
                'rung_params': rung.params,
                'rank': rank,
                'label': label,
                **run_data(run),
            }
            for rank, (group, label) in enumerate(groups, 1)
            for run in group.runs
        ]
    return rows


def _answer(comparison: LadderComparison) -> dict[str, Any] | None:
    """The verdict at the top rung, for scripts."""
    verdict = comparison.main_verdict
    if verdict is None or comparison.top.comparison is None:
        return None
    return {'rung': comparison.top.number, **verdict_data(comparison.top.comparison, verdict)}


def _rung_data(comparison: LadderComparison, rung: LadderRung) -> dict[str, Any]:
    at_rung = None
    if rung.comparison is not None:
        at_rung = comparison_data(rung.comparison)
        del at_rung['runs'], at_rung['skipped']  # those of all rungs are listed once
    return {
        'rung': rung.number,
        'label': rung.label,
        'options': rung.options,
        'params': rung.params,
        'extra': rung.extra,
        'tokens': rung.tokens,
        'outcomes': {label: dict(rung.outcomes(label)) for label in comparison.variants},
        'comparison': at_rung,
    }


# --- Analysis ------------------------------------------------------------------------------------


def _analysis_data(analysis: LadderAnalysis) -> dict[str, Any]:
    """The losses and costs that were analyzed, and all results. Rungs are counted from 1."""
    ladder = analysis.ladder
    return {
        'confidence': CONFIDENCE,
        'draws': analysis.draws,
        'flops': ladder.costs,
        'losses': {
            label: [
                [{'seeds': _seeds(key), 'loss': loss} for key, loss in losses.items()]
                for losses in of_variant
            ]
            for label, of_variant in ladder.losses.items()
        },
        'gains': _by_variant(analysis.gains),
        'trends': {
            label: trend
            and {'factor': _estimate(trend.factor), 'rungs': [rung + 1 for rung in trend.rungs]}
            for label, trend in analysis.trends.items()
        },
        'reversals': {
            label: [{'rung': each.rung + 1, 'significant': each.significant} for each in reversals]
            for label, reversals in analysis.reversals.items()
        },
        'shared_fit': _fit_data(analysis.shared_fit),
        'own_fit': _fit_data(analysis.own_fit),
        'predictions': {
            label: {
                'rung': each.rung + 1,
                'predicted': _estimate(each.predicted),
                'measured': each.measured,
                'log_linear': _finite(each.log_linear),
                'hit': each.hit if analysis.draws else None,
            }
            for label, each in analysis.predictions.items()
        },
        'forecast': analysis.forecast
        and {
            'flops': analysis.forecast.costs,
            'losses': _estimates(analysis.forecast.losses),
            'gains': _estimates(analysis.forecast.gains),
            'own_gains': _estimates(analysis.forecast.own_gains),
        },
        'noise': _noise_data(analysis.noise),
    }


def _seeds(key: Any) -> Any:
    return list(key) if isinstance(key, tuple) else key


def _by_variant(gains: dict[str, list[Gain]]) -> dict[str, list[dict[str, Any]]]:
    return {
        label: [
            {
                'rung': gain.rung + 1,
                'cost': gain.cost,
                **{
                    key: {'value': _finite(bound.value), 'relation': bound.relation}
                    for key, bound in (
                        ('gain', gain.value),
                        ('low', gain.low),
                        ('high', gain.high),
                    )
                },
            }
            for gain in of_variant
        ]
        for label, of_variant in gains.items()
    }


def _estimates(estimates: dict[str, list[Estimate]]) -> dict[str, list[dict[str, Any]]]:
    return {label: [_estimate(each) for each in row] for label, row in estimates.items()}


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {key: _finite(value) for key, value in estimate._asdict().items()}


def _finite(value: float) -> float | None:
    """None for what JSON cannot hold: an interval without draws, or without an end."""
    return float(value) if math.isfinite(value) else None


def _fit_data(fit: CurveFit | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    parameters = ('irreducible', 'scale', 'exponent')
    return {
        'shared': fit.shared,
        **{
            name: {label: _estimate(each) for label, each in getattr(fit, name).items()}
            for name in parameters
        },
        'residuals': fit.residuals,
        'misfit': fit.misfit,
    }


def _noise_data(noise: NoiseModel | None) -> dict[str, Any] | None:
    return noise and noise._asdict()
