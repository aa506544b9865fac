"""The panels of a comparison's plots as plain data: loss curves and Pareto fronts.

Runs that did not end normally are marked. A run that diverged or ended above its untrained loss
does not set the limits of an axis: the others would look flat.
"""

import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from comparison.compare import Comparison
from comparison.costs import SAME_COST, all_same
from comparison.groups import Group
from comparison.picture_labels import BLOWN_UP, UNFINISHED, run_ending
from comparison.runs import DIVERGED, FINISHED, Run

# Share of a run to leave out at its start, where the loss falls too fast for the scale of the rest.
LEFT_OUT_SHARE = 0.25
TITLE_WIDTH = 42  # characters


class PlotPoint(NamedTuple):
    """A loss at a cost: the mean over runs, and their range."""

    amount: float
    loss: float
    low: float
    high: float


class PlotLine(NamedTuple):
    """The points of a group's finished runs, or of one run that ended otherwise."""

    rank: int  # of the group, from 1
    ending: str
    points: list[PlotPoint]
    ceiling: float = math.inf  # untrained loss; higher losses do not set the axis limits


class Panel(NamedTuple):
    """Lines in one pair of axes."""

    title: str
    cost: str  # label of the horizontal axis
    loss: str  # label of the vertical axis
    lines: list[PlotLine]
    x_limits: tuple[float, float]
    y_limits: tuple[float, float]
    front: Sequence[tuple[float, float]] = ()
    beginnings_left_out: bool = False


def panels_of(comparison: Comparison) -> tuple[list[Panel], list[Panel]]:
    """Curve panels and fronts; no curves if there are fronts and no run has two evaluations."""
    curves, fronts = curve_panels(comparison), front_panels(comparison)
    if fronts and all(len(line.points) == 1 for panel in curves for line in panel.lines):
        return [], fronts
    return curves, fronts


# --- Curves --------------------------------------------------------------------------------------


def curve_panels(comparison: Comparison) -> list[Panel]:
    """Validation loss over tokens, FLOPs and seconds; one panel for proportional costs."""
    runs = [run for group in comparison.groups for run in group.runs]
    points = [point for run in runs for point in run.curve]
    amounts = {cost: [getattr(point, cost) for point in points] for cost in comparison.costs}
    panels = []
    for cost, *others in proportional(amounts):
        lines = [
            line
            for rank, group in enumerate(comparison.groups, 1)
            for line in _group_lines(rank, group, cost)
        ]
        if lines:
            starts = _shown_from(lines)
            drawn = [_line_from(starts[line.rank], line) for line in lines]
            names = [comparison.costs[key] for key in (cost, *others)]
            panel = _panel('Loss over', names, 'validation loss, nats per token', drawn, starts)
            panels.append(panel._replace(beginnings_left_out=drawn != lines))
    return panels


def _group_lines(rank: int, group: Group, cost: str) -> list[PlotLine]:
    """The mean curve of the finished runs, and the curve of each other run."""
    finished = [run for run in group.runs if run_ending(run) == FINISHED]
    single = [run for run in group.runs if run_ending(run) != FINISHED]
    mean = _mean_curve(finished, cost)
    if not mean and len(finished) > 1:  # evaluated at different iterations
        single += finished
    lines = [PlotLine(rank, FINISHED, mean, _ceiling(finished))]
    lines += [
        PlotLine(rank, run_ending(run), _mean_curve([run], cost), _ceiling([run])) for run in single
    ]
    return [line for line in lines if line.points]


def _mean_curve(runs: Sequence[Run], cost: str) -> list[PlotPoint]:
    """The mean over the evaluations that all runs have, by increasing cost."""
    curves = [
        {point.iter: (getattr(point, cost), point.loss) for point in run.curve} for run in runs
    ]
    points = []
    for iteration in curves[0] if curves else ():
        amounts, losses = zip(*(curve.get(iteration, (None, None)) for curve in curves))
        if None not in amounts:
            points.append(PlotPoint(statistics.fmean(amounts), *_mean_and_range(losses)))
    return points


def _mean_and_range(losses: Sequence[float]) -> tuple[float, float, float]:
    return statistics.fmean(losses), min(losses), max(losses)


def _ceiling(runs: Iterable[Run]) -> float:
    return max((run.untrained_loss or math.inf for run in runs), default=math.inf)


def _shown_from(lines: Sequence[PlotLine]) -> dict[int, float]:
    """For each rank, the cost at which its lines start: LEFT_OUT_SHARE of its total."""
    starts = {line.rank: LEFT_OUT_SHARE * line.points[-1].amount for line in _limiting_lines(lines)}
    first = min(starts.values())
    return {line.rank: starts.get(line.rank, first) for line in lines}


def _limiting_lines(lines: Sequence[PlotLine]) -> Sequence[PlotLine]:
    """The lines that set the axis limits: finished runs, else unfinished ones, else all."""
    for endings in ((FINISHED,), (UNFINISHED,)):
        if limiting := [line for line in lines if line.ending in endings]:
            return limiting
    return lines


def _line_from(start: float, line: PlotLine) -> PlotLine:
    """The line from a cost on, or at least its last point."""
    points = [point for point in line.points if point.amount >= start]
    return line._replace(points=points or line.points[-1:])


# --- Fronts --------------------------------------------------------------------------------------


def front_panels(comparison: Comparison) -> list[Panel]:
    """Loss against each cost that differs; one panel for proportional costs."""
    groups = [group for group in comparison.groups if group.losses]
    amounts = {
        letter: [group.mean(metric) for group in groups]
        for letter, (_, metric) in comparison.front_costs.items()
        if not all_same([values for group in groups if (values := group.values(metric))])
    }
    kind = 'Best' if comparison.score == 'best' else 'Final'
    panels = []
    for letter, *others in proportional(amounts):
        lines, front = [], []
        for group, amount in zip(groups, amounts[letter]):
            if amount is None:
                continue
            rank = comparison.groups.index(group) + 1
            point = PlotPoint(amount, *_mean_and_range([*group.losses.values()]))
            lines.append(PlotLine(rank, _worst_ending(group), [point]))
            if letter in comparison.fronts[rank - 1]:
                front.append((amount, point.loss))
        names = [comparison.front_costs[key][0] for key in (letter, *others)]
        loss = f'{kind.lower()} validation loss, nats per token'
        panel = _panel(f'{kind} loss against', names, loss, lines)
        panels.append(panel._replace(front=sorted(front)))
    return panels


def _worst_ending(group: Group) -> str:
    endings = [*map(run_ending, group.runs)]
    return next(
        (ending for ending in (BLOWN_UP, DIVERGED, UNFINISHED) if ending in endings), FINISHED
    )


# --- Axes ----------------------------------------------------------------------------------------


def proportional(amounts: dict[str, list[float | None]]) -> list[list[str]]:
    """Lists of costs that are proportional to each other; unknown costs are left out.

    amounts: the values of each cost, in the same order.
    """
    classes: list[list[str]] = []
    for cost, values in amounts.items():
        if all(value is None for value in values):
            continue
        for costs in classes:
            if _in_proportion(amounts[costs[0]], values):
                costs.append(cost)
                break
        else:
            classes.append([cost])
    return classes


def _in_proportion(values: Sequence[float | None], other_values: Sequence[float | None]) -> bool:
    if any((one is None) != (other is None) for one, other in zip(values, other_values)):
        return False
    ratios = [other / one for one, other in zip(values, other_values) if one and other is not None]
    return bool(ratios) and 0 < max(ratios) <= (1 + SAME_COST) * min(ratios)


def _title(begin: str, costs: Sequence[str]) -> str:
    *others, last = costs
    return textwrap.fill(
        f'{begin} {" and ".join(filter(None, [", ".join(others), last]))}', TITLE_WIDTH
    )


def _axis(costs: Sequence[str]) -> str:
    cost, *others = costs
    return f'{cost}\n(in proportion: {", ".join(others)})' if others else cost


def _panel(
    begin: str,
    costs: Sequence[str],
    loss: str,
    lines: list[PlotLine],
    starts: dict[int, float] | None = None,
) -> Panel:
    """starts: for each rank, the lowest cost that sets the axis limits."""
    limiting = [*_limiting_lines(lines), *(line for line in lines if line.ending == UNFINISHED)]
    points = [
        (point, point.high <= line.ceiling)
        for line in limiting
        for point in line.points
        if starts is None or point.amount >= starts[line.rank]
    ]
    usual = [point for point, learned in points if learned] or [point for point, _ in points]
    return Panel(
        *(_title(begin, costs), _axis(costs), loss, lines),
        x_limits=_limits([point.amount for point, _ in points]),
        y_limits=_limits([loss for point in usual for loss in (point.low, point.high)]),
    )


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.02 * abs(high) or 1.0
    return low - margin, high + margin


# --- Captions ------------------------------------------------------------------------------------

MARKS = {
    DIVERGED: 'crosses: runs that diverged',
    BLOWN_UP: 'upward arrowheads: runs that ended above their untrained loss',
    UNFINISHED: 'right arrowheads: runs that have not finished',
}


def caption(panels: Sequence[Panel]) -> str:
    """The meaning of lines, bands and markers in the panels."""
    lines = [line for panel in panels for line in panel.lines]
    sentences = []
    spread = [line for line in lines if any(point.low < point.high for point in line.points)]
    if spread:
        extents = [
            name
            for name, single in (('bands', False), ('bars', True))
            if any((len(line.points) == 1) == single for line in spread)
        ]
        extent = ' and '.join(extents)
        sentences.append(f'Means over seeds; {extent} span the lowest to the highest seed.')
    if any(panel.beginnings_left_out for panel in panels):
        sentences.append('The first quarter of each run is not shown.')
    marks = [text for ending, text in MARKS.items() if any(line.ending == ending for line in lines)]
    if marks:
        text = '; '.join(marks)
        sentences.append(f'{text[0].upper()}{text[1:]}.')
    if any(len(panel.front) > 1 for panel in panels):
        sentences.append(
            'Dashed: the Pareto front (no other has a lower loss at the same or lower cost).'
        )
    return ' '.join(sentences)
