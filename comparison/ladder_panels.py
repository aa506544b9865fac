"""The panels of a ladder's plots as plain data: losses, gains, differences and residuals by cost.

A variant whose runs have no losses at a rung has no mark there.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common.formatting import duration, nats
from comparison.ladder import LadderComparison
from comparison.ladder_headline import factor_text, flops_text
from comparison.picture_labels import STYLED_GROUPS, shortened
from scaling.results import Estimate, Gain, Trend

MAX_LOG = 700.0  # of a number that a float can hold
CURVE_POINTS = 60  # of a fitted curve
# Shares of the range of the values: margins at the lower and upper end, and space for a label.
X_MARGINS, Y_MARGINS, LABEL = (0.1, 0.1), (0.06, 0.06), 0.08
ERRORS = 2  # standard errors in the bars of residuals


class Mark(NamedTuple):
    """A value at a cost with its interval, whose ends are the value if there is none.

    A relation is that of a `Bound`.
    """

    cost: float
    value: float
    low: float
    high: float
    relation: str = ''
    low_relation: str = ''
    high_relation: str = ''


class LadderLine(NamedTuple):
    """What a panel shows of a variant."""

    variant: str
    number: int | None  # of its style; 0 is the baseline's
    marks: Sequence[Mark]
    curve: Sequence[tuple[float, float]] = ()  # (cost, value) of a fit, a trend or means
    forecast: Sequence[Mark] = ()


class Axis(NamedTuple):
    """The meaning of an axis, and how to write its values."""

    name: str
    text: Callable[[float], str]
    logarithmic: bool = True


class LadderPanel(NamedTuple):
    """Lines in one pair of axes."""

    title: str
    cost: Axis
    value: Axis
    lines: list[LadderLine]
    note: str  # the meaning of its lines and marks
    reference: float | None = None  # value of a horizontal line
    forecast_from: float | None = None  # cost of the variants' top rung
    bands: bool = False  # intervals of the marks are bands, or else bars
    x_limits: tuple[float, float] = (1.0, 10.0)
    y_limits: tuple[float, float] = (1.0, 10.0)


FLOPS = Axis('training FLOPs', flops_text)
SECONDS = Axis('seconds of training', duration)
LOSS = Axis('validation loss, nats per token', nats)
DIFFERENCE = Axis('loss difference, nats per token', '{:+.4f}'.format, logarithmic=False)
RESIDUAL = Axis('mean loss minus fit, nats per token', '{:+.4f}'.format, logarithmic=False)

GAINS = {  # by cost: title, axis, what a gain above 1 means
    FLOPS.name: ('Compute gain', Axis('compute gain', factor_text), 'less compute'),
    SECONDS.name: ('Gain in time', Axis('gain in time', factor_text), 'less time'),
}


def ladder_panels(ladder: LadderComparison) -> list[LadderPanel]:
    """The panels that have something to show. Those of FLOPs share their horizontal limits."""
    panels = [
        _loss_panel(ladder),
        _gain_panel(ladder, FLOPS, ladder.analysis.gains),
        _difference_panel(ladder),
        _residual_panel(ladder),
    ]
    if ladder.time_gains is not None:
        panels.append(_gain_panel(ladder, SECONDS, ladder.time_gains))
    drawn = [panel for panel in panels if panel.lines]
    by_axis = {panel.cost: [each for each in drawn if each.cost is panel.cost] for panel in drawn}
    return [_with_limits(panel, by_axis[panel.cost]) for panel in drawn]


def style_numbers(ladder: LadderComparison) -> dict[str, int | None]:
    """The style of each variant: 0 is the baseline's, None the common style of the last ones."""
    numbers: dict[str, int | None] = {ladder.baseline: 0}
    for number, variant in enumerate(ladder.others, 1):
        numbers[variant] = number if number <= STYLED_GROUPS else None
    return numbers


def variant_labels(ladder: LadderComparison) -> dict[str, str]:
    """The label of each variant, shortened for plots."""
    return dict(zip(ladder.variants, shortened(ladder.variants, ladder.study)))


# --- Losses --------------------------------------------------------------------------------------


def _loss_panel(ladder: LadderComparison) -> LadderPanel:
    """Mean losses with the range of the seeds, the fitted curves, and their forecast."""
    forecast, fit = ladder.analysis.forecast, ladder.analysis.shared_fit
    lines = []
    for variant, number in style_numbers(ladder).items():
        marks = _mean_losses(ladder, variant)
        if marks:
            curve = _fitted_curve(ladder, variant, marks) or [(m.cost, m.value) for m in marks]
            future = _forecast(ladder, forecast.losses if forecast else {}, variant)
            future = [mark for mark in future if mark.cost > marks[-1].cost]
            lines.append(LadderLine(variant, number, marks, curve, future))
    note = ['Means over seeds.' if ladder.analysis.draws else 'One seed each.']
    if any(mark.low < mark.high for line in lines for mark in line.marks):
        note.append('Bands: from the lowest to the highest seed.')
    note.append('Curves: the fit with a shared E.' if fit else 'Straight lines from rung to rung.')
    return LadderPanel(
        *('Loss against training FLOPs', FLOPS, LOSS, lines, ' '.join(note)),
        forecast_from=_top_cost(ladder, lines),
        bands=True,
    )


def _mean_losses(ladder: LadderComparison, variant: str) -> list[Mark]:
    """The mean loss at each rung with finished runs, and the range of its seeds."""
    data = ladder.analysis.ladder
    return [
        Mark(cost, statistics.fmean(losses.values()), min(losses.values()), max(losses.values()))
        for cost, losses in zip(data.costs[variant], data.losses[variant])
        if cost is not None and losses
    ]


def _fitted_curve(
    ladder: LadderComparison, variant: str, marks: Sequence[Mark]
) -> list[tuple[float, float]]:
    """The curve of the fit with a shared E from the first to the last mark; [] without a fit."""
    fit = ladder.analysis.shared_fit
    if fit is None or variant not in fit.scale:
        return []
    e, scale, exponent = (
        parameter[variant].value for parameter in (fit.irreducible, fit.scale, fit.exponent)
    )
    start, end = marks[0].cost, marks[-1].cost
    shares = [step / (CURVE_POINTS - 1) for step in range(CURVE_POINTS)]
    costs = [start * (end / start) ** share for share in shares]
    return [(cost, e + scale * cost**-exponent) for cost in costs]


def _forecast(
    ladder: LadderComparison, estimates: dict[str, list[Estimate]], variant: str
) -> list[Mark]:
    forecast = ladder.analysis.forecast
    by_cost = zip(forecast.costs if forecast else [], estimates.get(variant, ()))
    return [
        Mark(cost, value, *((value, value) if math.isnan(low) else (low, high)))
        for cost, (value, low, high) in by_cost
    ]


def _top_cost(ladder: LadderComparison, lines: Sequence[LadderLine]) -> float | None:
    """The highest cost of a variant but the baseline, where a panel has a forecast."""
    if not any(line.forecast for line in lines):
        return None
    costs = ladder.analysis.ladder.costs
    return max(
        (cost for variant in ladder.others for cost in costs[variant] if cost is not None),
        default=None,
    )


# --- Gains ---------------------------------------------------------------------------------------


def _gain_panel(ladder: LadderComparison, cost: Axis, gains: dict[str, list[Gain]]) -> LadderPanel:
    """Gains with their intervals; those in FLOPs also with their trend and forecast."""
    analysis = ladder.analysis
    title, value, less = GAINS[cost.name]
    trends = analysis.trends if cost is FLOPS else {}
    estimates = analysis.forecast.gains if cost is FLOPS and analysis.forecast else {}
    lines = []
    for variant, number in style_numbers(ladder).items():
        by_rung = gains.get(variant, [])
        if by_rung:
            marks = [*map(_gain_mark, by_rung)]
            trend = _trend_line(trends.get(variant), by_rung)
            future = _forecast(ladder, estimates, variant)
            lines.append(LadderLine(variant, number, marks, trend, future))
    note = [f'Above 1: {less} than the baseline needs for the same loss.']
    if any(mark.low < mark.high for line in lines for mark in line.marks):
        note.append('Bars: 95% intervals.')
    if any(line.curve for line in lines):
        note.append('Straight lines: trends.')
    if any(mark.relation for line in lines for mark in line.marks):
        note.append('Open marks with an arrow: bounds, outside the range of the baseline.')
    return LadderPanel(
        *(title, cost, value, lines, ' '.join(note)),
        reference=1.0,
        forecast_from=_top_cost(ladder, lines),
    )


def _gain_mark(gain: Gain) -> Mark:
    known = not math.isnan(gain.low.value)
    low, high = (gain.low, gain.high) if known else (gain.value, gain.value)
    return Mark(
        *(gain.cost, gain.value.value, low.value, high.value),
        relation=gain.value.relation,
        low_relation=low.relation,
        high_relation=high.relation,
    )


def _trend_line(trend: Trend | None, gains: Sequence[Gain]) -> list[tuple[float, float]]:
    """The trend over its rungs, through the middle of their known gains; [] without one."""
    used = [gain for gain in gains if trend and gain.rung in trend.rungs]
    known = [gain for gain in used if not gain.value.relation]
    if trend is None or not known or not trend.factor.value > 0:
        return []
    center, middle = (
        statistics.fmean(map(math.log, values))
        for values in ([gain.cost for gain in known], [gain.value.value for gain in known])
    )
    slope = math.log(trend.factor.value) / math.log(10)
    ends = min(gain.cost for gain in used), max(gain.cost for gain in used)
    logs = [middle + slope * (math.log(cost) - center) for cost in ends]
    return [(cost, math.exp(min(value, MAX_LOG))) for cost, value in zip(ends, logs)]


# --- Differences and residuals -------------------------------------------------------------------


def _difference_panel(ladder: LadderComparison) -> LadderPanel:
    """The difference from the baseline at each rung, with the interval of its test."""
    costs = ladder.analysis.ladder.costs
    lines = []
    for variant in ladder.others:
        marks = []
        for rung, cost in zip(ladder.rungs, costs[variant]):
            verdict = ladder.verdict(rung, variant)
            if cost is not None and verdict and (test := verdict.test):
                interval = test.interval
                marks.append(Mark(cost, test.difference.mean, interval.low, interval.high))
        if marks:
            lines.append(LadderLine(variant, style_numbers(ladder)[variant], marks))
    return LadderPanel(
        *('Difference from the baseline', FLOPS, DIFFERENCE, lines),
        'Below 0 is better. Bars: intervals of the tests at each rung.',
        reference=0.0,
    )


def _residual_panel(ladder: LadderComparison) -> LadderPanel:
    """Mean losses minus the fit, with their standard errors by the noise model."""
    analysis = ladder.analysis
    fit, noise, data = analysis.shared_fit, analysis.noise, analysis.ladder
    lines = []
    for variant, number in style_numbers(ladder).items():
        residuals = fit.residuals.get(variant, []) if fit else []
        marks = []
        for cost, losses, residual in zip(data.costs[variant], data.losses[variant], residuals):
            if cost is not None and residual is not None and losses:
                deviation = noise.deviation(cost) if noise else 0.0
                error = ERRORS * deviation / math.sqrt(len(losses))
                marks.append(Mark(cost, residual, residual - error, residual + error))
        if marks:
            lines.append(LadderLine(variant, number, marks))
    note = 'Means minus the fit with a shared E.'
    bars = ' Bars: two standard errors by the noise model.' if noise else ''
    return LadderPanel(
        *('Residuals of the fit', FLOPS, RESIDUAL, lines, f'{note}{bars}'), reference=0.0
    )


# --- Limits --------------------------------------------------------------------------------------


def _with_limits(panel: LadderPanel, sharing: Sequence[LadderPanel]) -> LadderPanel:
    """The panel with its limits; those of the costs hold all marks of the panels in `sharing`."""
    marks = _all_marks(panel)
    values = [mark.value for mark in marks]
    if panel.reference is not None:
        values.append(panel.reference)
    ends = [(end, mark.value) for mark in marks for end in (mark.low, mark.high)]
    curves = [value for line in panel.lines for _, value in line.curve]
    costs = [mark.cost for each in sharing for mark in _all_marks(each)]
    below, above = Y_MARGINS
    if panel.forecast_from is not None:
        above += LABEL
    return panel._replace(
        x_limits=_limits(panel.cost, costs, [], [], X_MARGINS),
        y_limits=_limits(panel.value, values, ends, curves, (below, above)),
    )


def _all_marks(panel: LadderPanel) -> list[Mark]:
    return [mark for line in panel.lines for mark in (*line.marks, *line.forecast)]


def _limits(
    axis: Axis,
    values: Sequence[float],
    ends: Sequence[tuple[float, float]],
    curves: Sequence[float],
    margins: tuple[float, float],
) -> tuple[float, float]:
    """The limits of an axis: all values; ends of intervals and curves unless they are far away.

    ends: with the value that each belongs to.
    """
    scale: Callable[[float], float] = math.log if axis.logarithmic else float
    back: Callable[[float], float] = math.exp if axis.logarithmic else float

    def shown(value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not axis.logarithmic)

    inside = [scale(value) for value in values if shown(value)]
    low, high = min(inside, default=0.0), max(inside, default=1.0)
    pairs = [(scale(end), scale(value)) for end, value in ends if shown(end) and shown(value)]
    if pairs:
        reach = high - low + 2 * statistics.median(abs(end - value) for end, value in pairs)
        others = [end for end, _ in pairs] + [scale(value) for value in curves if shown(value)]
        clipped = [min(max(other, low - reach), high + reach) for other in others]
        low, high = min(low, *clipped), max(high, *clipped)
    extent = high - low or abs(high) or 1.0
    return back(low - margins[0] * extent), back(high + margins[1] * extent)


# --- Words ---------------------------------------------------------------------------------------


def common_caption(panels: Sequence[LadderPanel]) -> str:
    """What applies to several panels."""
    sentences = []
    forecasts = [mark for panel in panels for line in panel.lines for mark in line.forecast]
    if forecasts:
        bands = ', with 95% intervals' * any(mark.low < mark.high for mark in forecasts)
        sentences.append(
            f'Dashed: forecasts by the fit{bands}. Gray: beyond the top rung of the variants.'
        )
    if any(_clipped(panel) for panel in panels):
        sentences.append('Bars that reach the edge continue beyond it; the tables have their ends.')
    return ' '.join(sentences)


def _clipped(panel: LadderPanel) -> bool:
    low, high = panel.y_limits
    return any(mark.low < low or mark.high > high for mark in _all_marks(panel))


def panel_text(panel: LadderPanel, labels: dict[str, str]) -> str:
    """The numbers of a panel in words."""
    sentences = [f'{panel.title}.']
    for line in panel.lines:
        points = [_mark_text(panel, mark) for mark in line.marks]
        points += [f'forecast {_mark_text(panel, mark)}' for mark in line.forecast[-1:]]
        sentences.append(f'{labels[line.variant]}: {"; ".join(points)}.')
    return ' '.join(sentences)


def _mark_text(panel: LadderPanel, mark: Mark) -> str:
    """`1.30e15: 1.31 (1.20 to 1.43)`"""
    text = panel.value.text
    value, low, high = (
        f'{relation} {text(value)}'.lstrip()
        for value, relation in (
            (mark.value, mark.relation),
            (mark.low, mark.low_relation),
            (mark.high, mark.high_relation),
        )
    )
    interval = f' ({low} to {high})' if (low, high) != (value, value) else ''
    return f'{panel.cost.text(mark.cost)}: {value}{interval}'
