"""What the pictures of a comparison show, as plain data: curves, fronts, intervals and a legend.

A run that did not end well is shown as such. One that diverged or ended above its untrained loss
sets no limit of an axis: it would leave no room for the others.
"""

import math
import re
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from comparison.analysis import (
    BETTER,
    BLOCKED,
    DIVERGED,
    FINISHED,
    PROVISIONAL,
    UNMEASURED,
    WORSE,
    Group,
)
from comparison.compare import Comparison
from comparison.costs import SAME_COST, all_same
from comparison.runs import Run
from comparison.significance import ALPHA

# How a run ended, beside DIVERGED and FINISHED.
BLOWN_UP, UNFINISHED = 'ended above the untrained loss', 'not finished'
LEFT_OUT = 0.25  # of a run: the loss falls so fast there that the rest would look flat beside it
LONGEST_LABEL = 48  # characters
STYLED = 14  # groups that are told apart by color, line and marker, beside the baseline
TITLE_WIDTH = 42  # characters


class Point(NamedTuple):
    """A loss at a cost: the mean over runs, and their range."""

    amount: float
    loss: float
    low: float
    high: float


class Line(NamedTuple):
    """The points of a group's finished runs, or of one run that ended otherwise."""

    rank: int  # of the group, from 1
    ending: str
    points: list[Point]
    ceiling: float = math.inf  # the loss without training: what is above it sets no limit


class Panel(NamedTuple):
    """Lines in one pair of axes."""

    title: str
    cost: str  # what the horizontal axis has
    loss: str  # what the vertical axis has
    lines: list[Line]
    x_limits: tuple[float, float]
    y_limits: tuple[float, float]
    front: Sequence[tuple[float, float]] = ()
    beginnings_left_out: bool = False


class Row(NamedTuple):
    """A difference with its interval."""

    text: str
    mean: float
    low: float | None
    high: float | None
    finding: str | None  # BETTER or WORSE, if it is significant


def panels_of(comparison: Comparison) -> tuple[list[Panel], list[Panel]]:
    """Of curves, unless no run has two evaluations and fronts show all there is; and of fronts."""
    curves, fronts = curve_panels(comparison), front_panels(comparison)
    if fronts and all(len(line.points) == 1 for panel in curves for line in panel.lines):
        return [], fronts
    return curves, fronts


# --- Curves --------------------------------------------------------------------------------------


def curve_panels(comparison: Comparison) -> list[Panel]:
    """Validation loss over tokens, FLOPs and seconds; once where two of them are proportional."""
    points = [point for run in _runs(comparison) for point in run.curve]
    amounts = {cost: [getattr(point, cost) for point in points] for cost in comparison.costs}
    panels = []
    for cost, *others in proportional(amounts):
        lines = [
            line
            for rank, group in enumerate(comparison.groups, 1)
            for line in _curves_of(rank, group, cost)
        ]
        if lines:
            starts = _starts(lines)
            shown = [_from(starts[line.rank], line) for line in lines]
            names = [comparison.costs[key] for key in (cost, *others)]
            panel = _panel('Loss over', names, 'validation loss, nats a token', shown, starts)
            panels.append(panel._replace(beginnings_left_out=shown != lines))
    return panels


def ending_of(run: Run) -> str:
    if run.outcome == DIVERGED:
        return DIVERGED
    if run.blown_up:
        return BLOWN_UP
    return FINISHED if run.outcome in (FINISHED, UNMEASURED) else UNFINISHED


def _curves_of(rank: int, group: Group, cost: str) -> list[Line]:
    """The mean of the runs that ended well, and each of the others."""
    finished = [run for run in group.members if ending_of(run) == FINISHED]
    alone = [[run] for run in group.members if ending_of(run) != FINISHED]
    mean = _mean_curve(finished, cost)
    if not mean and len(finished) > 1:  # evaluated at different iterations
        alone += [[run] for run in finished]
    lines = [Line(rank, FINISHED, mean, _ceiling(finished))]
    lines += [
        Line(rank, ending_of(runs[0]), _mean_curve(runs, cost), _ceiling(runs)) for runs in alone
    ]
    return [line for line in lines if line.points]


def _mean_curve(runs: Sequence[Run], cost: str) -> list[Point]:
    """The evaluations that all of the runs have, by rising cost."""
    curves = [
        {point.iter: (getattr(point, cost), point.loss) for point in run.curve} for run in runs
    ]
    points = []
    for place in curves[0] if curves else ():
        amounts, losses = zip(*(curve.get(place, (None, None)) for curve in curves))
        if None not in amounts:
            points.append(Point(statistics.fmean(amounts), *_mean_and_range(losses)))
    return points


def _mean_and_range(losses: Sequence[float]) -> tuple[float, float, float]:
    return statistics.fmean(losses), min(losses), max(losses)


def _ceiling(runs: Iterable[Run]) -> float:
    return max((run.untrained_loss or math.inf for run in runs), default=math.inf)


def _starts(lines: Sequence[Line]) -> dict[int, float]:
    """For each rank, the cost from which on its lines are shown: LEFT_OUT of what it spends."""
    starts = {line.rank: LEFT_OUT * line.points[-1].amount for line in _counted(lines)}
    first = min(starts.values())
    return {line.rank: starts.get(line.rank, first) for line in lines}


def _counted(lines: Sequence[Line]) -> Sequence[Line]:
    """The lines that set the limits of the axes: the finished ones, else what there is."""
    for endings in ((FINISHED,), (UNFINISHED,)):
        if counted := [line for line in lines if line.ending in endings]:
            return counted
    return lines


def _from(start: float, line: Line) -> Line:
    """The line from a cost on, or its last point."""
    points = [point for point in line.points if point.amount >= start]
    return line._replace(points=points or line.points[-1:])


# --- Fronts --------------------------------------------------------------------------------------


def front_panels(comparison: Comparison) -> list[Panel]:
    """Loss against what it cost, where that differs; once where two costs are proportional."""
    groups = [group for group in comparison.groups if group.losses]
    costs = {
        letter: figure
        for letter, (_, figure) in comparison.front_costs.items()
        if not all_same([amounts for group in groups if (amounts := group.figures(figure))])
    }
    amounts = {letter: [group.mean(figure) for group in groups] for letter, figure in costs.items()}
    kind = 'Best' if comparison.score == 'best' else 'Final'
    panels = []
    for letter, *others in proportional(amounts):
        lines, front = [], []
        for group, amount in zip(groups, amounts[letter]):
            if amount is None:
                continue
            rank = comparison.groups.index(group) + 1
            losses = [*group.losses.values()]
            lines.append(
                Line(rank, _worst_ending(group), [Point(amount, *_mean_and_range(losses))])
            )
            if letter in comparison.fronts[rank - 1]:
                front.append((amount, group.loss))
        names = [comparison.front_costs[key][0] for key in (letter, *others)]
        loss = f'{kind.lower()} validation loss, nats a token'
        panel = _panel(f'{kind} loss against', names, loss, lines)
        panels.append(panel._replace(front=sorted(front)))
    return panels


def _worst_ending(group: Group) -> str:
    endings = [*map(ending_of, group.members)]
    return next(
        (ending for ending in (BLOWN_UP, DIVERGED, UNFINISHED) if ending in endings), FINISHED
    )


# --- Axes ----------------------------------------------------------------------------------------


def proportional(amounts: dict[str, list[float | None]]) -> list[list[str]]:
    """The costs, those together that are the same but for a factor; none of which nothing is known.

    amounts: of each cost, in the same order.
    """
    alike: list[list[str]] = []
    for cost, values in amounts.items():
        if all(value is None for value in values):
            continue
        for costs in alike:
            if _in_proportion(amounts[costs[0]], values):
                costs.append(cost)
                break
        else:
            alike.append([cost])
    return alike


def _in_proportion(ones: Sequence[float | None], others: Sequence[float | None]) -> bool:
    if any((one is None) != (other is None) for one, other in zip(ones, others)):
        return False
    ratios = [other / one for one, other in zip(ones, others) if one]
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
    lines: list[Line],
    starts: dict[int, float] | None = None,
) -> Panel:
    """starts: for each rank the least cost that counts."""
    counted = [*_counted(lines), *(line for line in lines if line.ending == UNFINISHED)]
    points = [
        (point, point.high <= line.ceiling)
        for line in counted
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


# --- Intervals -----------------------------------------------------------------------------------


def differences(comparison: Comparison) -> list[Row]:
    """Each group against the baseline, with the interval of its test."""
    rows = []
    for rank, verdict in enumerate(comparison.verdicts, 1):
        if verdict.difference is None:
            continue
        note = f' ({verdict.text})' if verdict.text in (BLOCKED, PROVISIONAL) else ''
        rows.append(
            Row(
                f'#{rank} {labels_of(comparison)[rank - 1]}{note}',
                verdict.difference.mean,
                verdict.interval.low,
                verdict.interval.high,
                verdict.text if verdict.text in (BETTER, WORSE) else None,
            )
        )
    return rows


def effects(comparison: Comparison) -> list[Row]:
    """What each value of a grid's option does."""
    several = len({effect.option for effect, _ in comparison.effects}) > 1
    rows = []
    for effect, correction in comparison.effects:
        if effect.mean is None:
            continue
        option = f'{effect.option}: ' * several
        text = f'{option}{shortened(str(effect.value))} against {shortened(str(effect.against))}'
        low, high, finding = None, None, None
        if correction is not None:
            _, low, high = (effect.mean, correction.interval.low, correction.interval.high)
            if correction.p_value < ALPHA:
                finding = BETTER if effect.mean < 0 else WORSE
        rows.append(Row(text, effect.mean, low, high, finding))
    return rows


# --- Names ---------------------------------------------------------------------------------------


def labels_of(comparison: Comparison) -> list[str]:
    """The groups' labels, short enough for a picture.

    Without the name of the option where a study varies one only, and without `arch_preset=`.
    """
    plan = comparison.study
    varied = {key for asked in plan.variants.values() for key in asked} if plan else set()
    names = varied if len(varied) == 1 else varied & {'arch_preset'}
    labels = comparison.labels
    for name in names:
        labels = [re.sub(rf'(?<!\S){re.escape(name)}=', '', label) for label in labels]
    return [*map(shortened, labels)]


def shortened(text: str, longest: int = LONGEST_LABEL) -> str:
    """The text with an ellipsis in its middle if it is too long: names differ at their ends."""
    if len(text) <= longest:
        return text
    begin = longest // 2
    return f'{text[:begin]}…{text[begin + 1 - longest :]}'


def legend(comparison: Comparison) -> list[tuple[int, str]]:
    """The groups that are told apart, by rank; those of the rest share one entry, the last."""
    labels, entries, rest = labels_of(comparison), [], []
    for rank, (group, label) in enumerate(zip(comparison.groups, labels), 1):
        if style_number(comparison, rank) is None:
            rest.append(rank)
            continue
        notes = ['baseline'] if group is comparison.baseline and len(labels) > 1 else []
        notes += _endings_text(group)
        entries.append((rank, f'#{rank} {label}' + (f' ({", ".join(notes)})' if notes else '')))
    if rest:
        entries.append((rest[0], f'the others, from #{rest[0]} on'))
    return entries


def style_number(comparison: Comparison, rank: int) -> int | None:
    """Which style a group has: 0 is the baseline's, None is that of all without their own."""
    baseline = comparison.baseline_rank
    if rank == baseline:
        return 0
    number = rank if rank < baseline else rank - 1
    return number if number <= STYLED else None


def _endings_text(group: Group) -> list[str]:
    """`2 of 5 diverged`, or what became of a single run."""
    endings, count = [*map(ending_of, group.members)], len(group.members)
    return [
        ending if count == 1 else f'{endings.count(ending)} of {count} {ending}'
        for ending in (DIVERGED, BLOWN_UP, UNFINISHED)
        if ending in endings
    ]


def _runs(comparison: Comparison) -> list[Run]:
    return [run for group in comparison.groups for run in group.members]


# --- Captions ------------------------------------------------------------------------------------

MARKS = {
    DIVERGED: 'crosses: runs that diverged',
    BLOWN_UP: 'arrowheads upwards: runs that ended above their untrained loss',
    UNFINISHED: 'arrowheads to the right: runs that have not finished',
}


def caption(panels: Sequence[Panel]) -> str:
    """What lines, bands and marks of the panels mean."""
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
        sentences.append(f'Means over seeds; {extent} reach from the lowest seed to the highest.')
    if any(panel.beginnings_left_out for panel in panels):
        sentences.append('The first quarter of each run is left out.')
    marks = [text for ending, text in MARKS.items() if any(line.ending == ending for line in lines)]
    if marks:
        text = '; '.join(marks)
        sentences.append(f'{text[0].upper()}{text[1:]}.')
    if any(len(panel.front) > 1 for panel in panels):
        sentences.append('Dashed: the front, where no other has a lower loss for as little.')
    return ' '.join(sentences)
