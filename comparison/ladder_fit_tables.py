"""The tables of a ladder's fitted curves, predictions, forecast and noise."""

import math

from common.formatting import join_names, nats, or_dash, wrapped
from comparison.ladder import LadderComparison
from comparison.ladder_headline import LEVEL, factor_interval, factor_text, flops_text
from comparison.section import Section
from scaling.forecast import MIN_RUNGS, UNKNOWN_GAIN, flat_variants
from scaling.noise import seeds_needed
from scaling.results import CurveFit, Estimate

CURVE = 'L(C) = E + A * C^-alpha'
PRECISIONS = (0.05, 0.1, 0.2)  # of a gain, for which the number of seeds is shown
MANY = 999  # seeds: the largest number shown


def _interval(estimate: Estimate, form: str) -> str:
    """The interval in a format such as `.4f`; a dash without draws."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return '-'
    return f'{estimate.low:{form}} to {estimate.high:{form}}'


# --- Fits ----------------------------------------------------------------------------------------


def fit_section(comparison: LadderComparison) -> Section | None:
    fit = comparison.analysis.shared_fit
    if fit is None:
        return None
    notes = [
        'Least squares of the mean losses (L, nats per token) against training FLOPs (C), with one '
        'irreducible loss E for all. E, A and alpha are correlated: read them together.'
    ]
    return _fit_section(f'FITS of {CURVE}', notes, fit)


def own_fit_section(comparison: LadderComparison) -> Section | None:
    fit = comparison.analysis.own_fit
    if fit is None:
        return None
    notes = ['The same with an E for each, as a check: the gains and the forecast use a shared E.']
    return _fit_section('FITS WITH OWN E', notes, fit)


def _fit_section(title: str, notes: list[str], fit: CurveFit) -> Section:
    if fit.misfit is not None:
        notes = [*notes, _misfit_note(fit.misfit)]
    parameters = ((fit.irreducible, '.4f'), (fit.scale, '.4g'), (fit.exponent, '.4f'))
    rows = []
    for label in fit.irreducible:
        cells = []
        for estimates, form in parameters:
            estimate = estimates[label]
            cells += [f'{estimate.value:{form}}', _interval(estimate, form)]
        rows.append([*cells, label])
    header = ['E', LEVEL, 'A', LEVEL, 'alpha', LEVEL, 'architecture']
    return Section(title, notes, header, rows, '>>>>>><')


def _misfit_note(misfit: float) -> str:
    """How the residuals compare with the noise, from `scaling.results.CurveFit.misfit`."""
    if misfit <= 1:
        return 'The noise of seeds explains the residuals.'
    return (
        f'The residuals are {misfit:.2f} times as large as the noise of seeds explains; the '
        'intervals are wider by this factor.'
    )


def residuals_section(comparison: LadderComparison) -> Section | None:
    fit = comparison.analysis.shared_fit
    if fit is None:
        return None
    numbers = [f'rung {rung.number}' for rung in comparison.rungs]
    rows = [
        [*(or_dash(value, '{:+.4f}'.format) for value in _padded(values, len(numbers))), label]
        for label, values in fit.residuals.items()
    ]
    notes = [
        'Mean loss minus the fit with a shared E, in nats per token. A pattern over rungs shows '
        'that the curve does not describe the losses.'
    ]
    align = '>' * len(numbers) + '<'
    return Section('RESIDUALS', notes, [*numbers, 'architecture'], rows, align)


def _padded(values: list[float | None], length: int) -> list[float | None]:
    return [*values, *[None] * (length - len(values))]


def prediction_section(comparison: LadderComparison) -> Section | None:
    predictions = comparison.analysis.predictions
    if not predictions:
        return None
    rows = []
    for label, each in predictions.items():
        low, high = each.predicted.low, each.predicted.high
        unknown = math.isnan(low) or math.isnan(high)
        rows.append(
            [
                str(comparison.rungs[each.rung].number),
                nats(each.predicted.value),
                _interval(each.predicted, '.4f'),
                '-' if unknown else nats(high - low),
                nats(each.measured),
                '-' if unknown else 'hit' if each.hit else 'miss',
                f'{each.predicted.value - each.measured:+.4f}',
                '-' if math.isnan(each.log_linear) else f'{each.log_linear - each.measured:+.4f}',
                label,
            ]
        )
    notes = [
        'The loss at the top rung, predicted by the fit to the rungs below it: a test of the fit. '
        'hit: the measured mean lies in the interval. log-linear: error of a straight line of '
        'ln L against ln C.'
    ]
    header = ['rung', 'predicted', LEVEL, 'width', 'measured', 'hit', 'error', 'log-linear']
    return Section('TOP RUNG PREDICTED', notes, [*header, 'architecture'], rows, '>>>>><>>' + '<')


def forecast_section(comparison: LadderComparison) -> Section | None:
    forecast = comparison.analysis.forecast
    if forecast is None:
        return Section(wrapped(_why_no_forecast(comparison)))
    rows = []
    for index, cost in enumerate(forecast.costs):
        for label, losses in forecast.losses.items():
            gain, own = (
                gains[label][index] if label in gains else None
                for gains in (forecast.gains, forecast.own_gains)
            )
            rows.append(
                [
                    flops_text(cost),
                    nats(losses[index].value),
                    _interval(losses[index], '.4f'),
                    or_dash(gain, lambda each: factor_text(each.value)),
                    or_dash(gain and factor_interval(gain), str),
                    or_dash(own, lambda each: factor_text(each.value)),
                    or_dash(own and factor_interval(own), str),
                    label,
                ]
            )
    notes = [
        'Extrapolated, not measured: the fit with a shared E, up to 10 times the FLOPs of the top '
        'rung. It assumes that the curve holds there; intervals cover only the noise of seeds and '
        'the misfit at the rungs. own E: the gain without the assumption that E is shared; inf '
        'where the baseline would never reach the loss.'
    ]
    header = ['FLOPs', 'loss', LEVEL, 'gain', LEVEL, 'own E', LEVEL, 'architecture']
    return Section('FORECAST', notes, header, rows, '>>>>>>><')


def _why_no_forecast(comparison: LadderComparison) -> str:
    if comparison.analysis.shared_fit is not None:
        flat = flat_variants(comparison.analysis.shared_fit)
        if flat:
            return (
                f'FORECAST: none. The losses of {join_names(flat)} do not fall with compute, so '
                'the curve has no exponent.'
            )
        return (
            'FORECAST: none. The noise of seeds and the misfit leave the gain beyond the top rung '
            f'unknown: its interval is from below {1 / UNKNOWN_GAIN:g} to above {UNKNOWN_GAIN:g}. '
            'More seeds or a wider range of sizes make it narrower.'
        )
    losses = comparison.analysis.ladder.losses
    counts = {label: sum(map(bool, losses[label])) for label in comparison.variants}
    others = [counts[label] for label in comparison.others]
    rungs = min(counts[comparison.baseline], max(others, default=counts[comparison.baseline]))
    return (
        f'FORECAST: none. Fits and a forecast need at least {MIN_RUNGS} rungs with finished runs '
        f'of the baseline and of another, since a curve has three parameters. Here are {rungs}.'
    )


# --- Noise ---------------------------------------------------------------------------------------


def noise_section(comparison: LadderComparison) -> Section | None:
    noise = comparison.analysis.noise
    if noise is None:
        return None
    rows = []
    for index, rung in enumerate(comparison.rungs):
        cost = comparison.cost_of(index)
        deviation = noise.deviations[index] if index < len(noise.deviations) else None
        freedom = noise.freedom[index] if index < len(noise.freedom) else 0
        rows.append(
            [
                str(rung.number),
                or_dash(cost, flops_text),
                or_dash(deviation, nats),
                str(freedom),
                or_dash(cost, lambda each: nats(noise.deviation(each))),
            ]
        )
    notes = [
        'deviation: of a loss over seeds, pooled over architectures, in nats per token. freedom: '
        'its degrees of freedom. model: log-linear in the FLOPs, fitted to all rungs.'
    ]
    header = ['rung', 'FLOPs', 'deviation', 'freedom', 'model']
    return Section('NOISE of seeds', notes, header, rows, '>>>>>')


def seeds_section(comparison: LadderComparison) -> Section | None:
    """How many seeds a precision of the gain needs, at the top rung and at the next."""
    noise = comparison.pair_noise
    if noise is None:
        return None
    rows = []
    for name, cost in _planned_costs(comparison):
        slope = _loss_slope(comparison, cost)
        if slope is None:
            continue
        deviation = noise.deviation(cost)
        needed = [
            seeds_needed(deviation, slope * math.log1p(precision)) for precision in PRECISIONS
        ]
        seeds = [str(each) if each <= MANY else f'> {MANY}' for each in needed]
        rows.append([name, flops_text(cost), nats(deviation), nats(slope * math.log(2)), *seeds])
    if not rows:
        return None
    notes = [
        'Seeds of each architecture for a gain with this half-width of its interval, from that '
        'rung alone. pair: deviation of the difference within one pair of runs, by the model. '
        "halving: fall of the baseline's loss with twice the FLOPs."
    ]
    header = ['rung', 'FLOPs', 'pair', 'halving', *(f'{each:.0%}' for each in PRECISIONS)]
    return Section('SEEDS NEEDED', notes, header, rows, '>>>>' + '>' * len(PRECISIONS))


def _planned_costs(comparison: LadderComparison) -> list[tuple[str, float]]:
    """The FLOPs of the top rung, and of the one above it."""
    index = comparison.rungs.index(comparison.top)
    top = comparison.cost_of(index)
    if top is None:
        return []
    costs = [(str(comparison.top.number), top)]
    above = comparison.cost_of(index + 1) if index + 1 < len(comparison.rungs) else None
    below = comparison.cost_of(index - 1) if index else None
    if above is None and below is not None:
        above = top * top / below
    return [*costs, ('next', above)] if above is not None else costs


def _loss_slope(comparison: LadderComparison, cost: float) -> float | None:
    """The fall of the baseline's loss with the logarithm of its cost; None if it does not fall."""
    fit, baseline = comparison.analysis.shared_fit, comparison.baseline
    if fit is not None and baseline in fit.exponent:
        exponent = fit.exponent[baseline].value
        slope = exponent * fit.scale[baseline].value * cost**-exponent
    else:
        ladder = comparison.analysis.ladder
        points = sorted(
            (math.log(each), sum(losses.values()) / len(losses))
            for each, losses in zip(ladder.costs[baseline], ladder.losses[baseline])
            if each and losses
        )
        if len(points) < 2 or points[-2][0] == points[-1][0]:
            return None
        (x, y), (last_x, last_y) = points[-2:]
        slope = (y - last_y) / (last_x - x)
    return slope if slope > 0 else None
