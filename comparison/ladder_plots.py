"""The plots of a ladder, drawn with matplotlib, an optional package."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from comparison.ladder import LadderComparison
from comparison.ladder_panels import (
    Axis,
    LadderLine,
    LadderPanel,
    Mark,
    common_caption,
    ladder_panels,
    style_numbers,
    variant_labels,
)
from comparison.picture_labels import endings_text
from comparison.plots import (
    SOFT_COLOR,
    LegendEntry,
    Style,
    note_figure,
    sheet,
    style_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ('o', 's', '^', 'v', 'P', 'X')  # of the variants, to tell them apart without color
SPACE, SPREAD = 7.0, 24.0  # points between the marks of two variants at one rung, and of all
ARROW = 14.0  # points
MANY_DECADES = 2  # with fewer, an axis has labels between the powers of ten
# With fewer, an axis has labels at equal steps. Those of the horizontal one are wider than high.
FEW_DECADES = {'x': 0.7, 'y': 1.0}


def figure_of(ladder: LadderComparison) -> 'Figure':
    """All panels, one legend and one note."""
    panels = ladder_panels(ladder)
    if not panels:
        return note_figure('No finished run of the ladder has a validation loss.')
    columns = 3 if len(panels) in (3, 5) else 2
    drawings = [partial(draw_panel, panel) for panel in panels]
    rows = [drawings[start : start + columns] for start in range(0, len(panels), columns)]
    note = ' '.join([*(f'{panel.title}. {panel.note}' for panel in panels), common_caption(panels)])
    return sheet(rows, legend_entries(ladder), note)


def legend_entries(ladder: LadderComparison) -> list[LegendEntry]:
    """The style and label of each variant, the baseline first; later ones share the last entry."""
    labels, entries = variant_labels(ladder), []
    numbers = style_numbers(ladder)
    for variant, number in numbers.items():
        if number is None:
            entries.append((variant_style(None), 'the others'))
            break
        groups = [rung.groups[variant] for rung in ladder.rungs if variant in rung.groups]
        notes = ['baseline'] * (number == 0)
        notes += endings_text([run for group in groups for run in group.runs])
        text = labels[variant] + (f' ({", ".join(notes)})' if notes else '')
        entries.append((variant_style(number), text))
    return entries


def variant_style(number: int | None) -> Style:
    """As in the plots of a comparison, but with solid lines and more markers."""
    style = style_of(number) | {'ls': '-'}
    if number:
        style['marker'] = MARKERS[(number - 1) % len(MARKERS)]
    return style


# --- One panel -----------------------------------------------------------------------------------


def draw_panel(panel: LadderPanel, axes: 'Axes') -> None:
    """Draw all lines of a panel, with the part beyond the variants' top rung in gray."""
    axes.set_title(panel.title)
    for axis, name, limits in (
        (panel.cost, 'x', panel.x_limits),
        (panel.value, 'y', panel.y_limits),
    ):
        _set_axis(axes, name, axis, limits)
    if panel.reference is not None:
        axes.axhline(panel.reference, color=SOFT_COLOR, lw=1.2, zorder=1.5)
    if panel.forecast_from is not None:
        axes.axvspan(panel.forecast_from, panel.x_limits[1], color=SOFT_COLOR, alpha=0.12, lw=0)
        middle = math.sqrt(panel.forecast_from * panel.x_limits[1])
        place = {'transform': axes.get_xaxis_transform(), 'ha': 'center', 'va': 'top'}
        axes.text(middle, 0.99, 'forecast', color='#555555', **place)
    last = len(panel.lines) - 1
    space = 0.0 if panel.bands else min(SPACE, SPREAD / max(1, last))
    for index, line in enumerate(panel.lines):
        _draw_line(axes, panel, line, space * (index - last / 2))


def _set_axis(axes: 'Axes', name: str, axis: Axis, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    scale = 'log' if axis.logarithmic else 'linear'
    axes.set(**{f'{name}scale': scale, f'{name}lim': limits, f'{name}label': axis.name})
    ticks = axes.xaxis if name == 'x' else axes.yaxis
    decades = math.log10(limits[1] / limits[0]) if axis.logarithmic else 0.0
    digits = (1,) if decades > MANY_DECADES else (1, 2, 5)
    ticks.set_major_locator(
        LogLocator(subs=digits, numticks=6)
        if decades > FEW_DECADES[name]
        else MaxNLocator(5, steps=[1, 2, 5, 10])
    )
    ticks.set_minor_locator(NullLocator())
    ticks.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))


def tick_text(value: float) -> str:
    """`0.5`, `2000`, `2e12`"""
    if 1e-4 <= abs(value) < 1e4 or value == 0:
        return f'{value:.6g}'
    digits, _, power = f'{value:.3e}'.partition('e')
    return f'{float(digits):g}e{int(power)}'


def _draw_line(axes: 'Axes', panel: LadderPanel, line: LadderLine, shift: float) -> None:
    """A variant's curve, marks and forecast. shift: of the marks to the right, in points."""
    style = variant_style(line.number)
    color, depth = style['color'], 1 if line.number is None else 3
    if line.curve:
        axes.plot(*zip(*line.curve), color=color, lw=1.4, zorder=depth, label=line.variant)
    if panel.bands and len(line.marks) > 1:
        costs, _, lows, highs, *_ = zip(*line.marks)
        axes.fill_between(costs, lows, highs, color=color, alpha=0.15, lw=0, zorder=2)
    if line.forecast:
        costs, values, lows, highs, *_ = zip(*line.forecast)
        joined = [*line.curve[-1:], *zip(costs, values)] if panel.bands else [*zip(costs, values)]
        axes.plot(*zip(*joined), color=color, lw=1.4, ls='--', zorder=depth)
        axes.fill_between(costs, lows, highs, color=color, alpha=0.12, lw=0, zorder=1)
    _draw_marks(axes, panel, line.marks, style, shift)


def _draw_marks(
    axes: 'Axes', panel: LadderPanel, marks: Sequence[Mark], style: Style, shift: float
) -> None:
    """Marks with their bars; arrows where a value or an end of a bar is a bound."""
    from matplotlib.transforms import ScaledTranslation

    color = style['color']
    look: dict[str, Any] = {
        'transform': axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans),
        'zorder': 4,
    }
    bars = [mark[:1] + mark[2:4] for mark in marks if mark.low < mark.high and not panel.bands]
    if bars:
        axes.vlines(*zip(*bars), color=color, lw=1.2, **look)
    for mark in marks:
        for end, direction in _arrows(mark):
            axes.annotate(
                *('', (mark.cost, end), (0, ARROW * direction)),
                **{'xycoords': look['transform'], 'textcoords': 'offset points'},
                arrowprops={'arrowstyle': '<-', 'color': color, 'lw': 1.2, 'shrinkB': 0},
            )
    for fill, shown in (
        (color, [mark for mark in marks if not mark.relation]),
        ('white', [mark for mark in marks if mark.relation]),
    ):
        if shown:
            costs, values, *_ = zip(*shown)
            marker = {'marker': style['marker'], 'ms': 5, 'mfc': fill}
            axes.plot(costs, values, color=color, ls='', **marker, **look)


def _arrows(mark: Mark) -> list[tuple[float, int]]:
    """Where the arrows of a mark start, with 1 for upwards and -1 for downwards."""
    bounds = (
        (mark.value, mark.relation),
        (mark.low, mark.low_relation),
        (mark.high, mark.high_relation),
    )
    return sorted({(end, 1 if relation == '>' else -1) for end, relation in bounds if relation})
