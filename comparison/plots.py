"""The plots of a comparison, drawn with matplotlib, an optional package.

Text from records is drawn literally: no math markup, no control characters.
"""

import contextlib
import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.files import write_file
from comparison.analysis import BETTER, WORSE
from comparison.compare import Comparison
from comparison.formats import one_line
from comparison.intervals import IntervalRow
from comparison.panels import Panel, PlotLine, caption, panels_of
from comparison.picture_labels import BLOWN_UP, UNFINISHED, legend, style_number
from comparison.runs import DIVERGED, FINISHED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Draw = Callable[['Axes'], None]
Style = dict[str, Any]  # color, dashes and marker
LegendEntry = tuple[Style, str]

SUFFIXES = ('.png', '.svg', '.pdf')
# The color-blind safe palette of Okabe & Ito (2008); the first is the baseline's.
COLORS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#8C6D31')
DASHES = ('-', '--')  # of the first and second group of each color
GROUP_MARKS = ('o', 's')
UNSTYLED_COLOR = '#BBBBBB'  # of groups without their own style
SOFT_COLOR = '#888888'
END_MARKS = {DIVERGED: 'X', BLOWN_UP: '^', UNFINISHED: '>'}
FINDINGS = {BETTER: '#0072B2', WORSE: '#D55E00', None: SOFT_COLOR}
MANY_POINTS = 25  # curves with at least this many points have no markers

PANEL = (3.75, 3.0)  # inches
ROW_HEIGHT = 0.42
SETTINGS: dict[Any, Any] = {
    'font.family': 'DejaVu Sans',  # included in matplotlib
    'font.size': 8.5,
    'axes.titlesize': 9.5,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.alpha': 0.3,
    'legend.frameon': False,
    'figure.constrained_layout.use': True,
    'text.parse_math': False,
    'svg.fonttype': 'none',  # text stays text
}


@contextlib.contextmanager
def drawing(salt: str = 'comparison') -> Iterator[None]:
    """A context with the settings of this module instead of the user's.

    salt: makes the ids in an SVG differ from those of another. Raises UserError if matplotlib is
    not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            '--plot and --report need matplotlib, which is not installed: pip install matplotlib. '
            'Without it, use --format for the tables.'
        ) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**SETTINGS, 'svg.hashsalt': salt})
        yield


def new_figure(width: float, height: float) -> 'Figure':
    """An empty figure, independent of any display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def drawable(text: str) -> str:
    """The text as one line, with characters that the font lacks escaped."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont('DejaVu Sans'))
    return ''.join(
        character
        if font.get_char_index(ord(character))
        else character.encode('ascii', 'backslashreplace').decode()
        for character in one_line(text)
    )


# --- One panel -----------------------------------------------------------------------------------


def style_of(number: int | None) -> Style:
    """Color, dashes and marker of a group."""
    if number is None:
        return {'color': UNSTYLED_COLOR, 'ls': '-', 'marker': 'o'}
    if number == 0:
        return {'color': COLORS[0], 'ls': '-', 'marker': 'D'}
    cycle, index = divmod(number - 1, len(COLORS) - 1)
    return {'color': COLORS[1 + index], 'ls': DASHES[cycle], 'marker': GROUP_MARKS[cycle]}


def draw_panel(comparison: Comparison, panel: Panel, axes: 'Axes') -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set(xlim=panel.x_limits, ylim=panel.y_limits, xlabel=panel.cost, ylabel=panel.loss)
    axes.set_title(panel.title)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(useOffset=False, style='plain')
    if panel.x_limits[1] >= 1e4:
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    if len(panel.front) > 1:
        axes.plot(*zip(*panel.front), color=SOFT_COLOR, lw=1, ls='--', zorder=1.5, label='front')
    for line in reversed(panel.lines):  # draw the best last, on top
        draw_line(axes, panel, line, style_number(comparison, line.rank))


def draw_line(axes: 'Axes', panel: Panel, line: PlotLine, number: int | None) -> None:
    """A curve with its band, or a point with its bar; and a marker for an abnormal ending."""
    style = style_of(number)
    amounts, losses, lows, highs = zip(*line.points)
    color, mark, name = style['color'], style.pop('marker'), f'#{line.rank}'
    depth = 1 if number is None else 3  # draw groups without a style below the others
    if len(amounts) > 1:
        width = 1.6 if line.ending == FINISHED and number is not None else 0.8
        mark = None if number is None or len(amounts) >= MANY_POINTS else mark
        axes.plot(amounts, losses, **style, lw=width, marker=mark, ms=3, zorder=depth, label=name)
        if number is not None:
            axes.fill_between(amounts, lows, highs, color=color, alpha=0.15, lw=0, zorder=2)
    else:
        axes.vlines(amounts, lows, highs, color=color, lw=1.2, zorder=depth)
        if line.ending == FINISHED:
            axes.plot(amounts, losses, color=color, marker=mark, ms=5, zorder=depth, label=name)
    if line.ending != FINISHED:
        ends = zip((amounts[-1], losses[-1]), (panel.x_limits, panel.y_limits))
        x, y = (min(max(end, low), high) for end, (low, high) in ends)  # clipped to the edge
        look: dict[str, Any] = {
            'marker': END_MARKS[line.ending],
            'ms': 7,
            'mec': 'white',
            'mew': 0.6,
        }
        label = f'{name} {line.ending}'
        axes.plot([x], [y], color=color, clip_on=False, zorder=5, label=label, **look)


# --- Intervals -----------------------------------------------------------------------------------


def draw_rows(rows: Sequence[IntervalRow], axes: 'Axes') -> None:
    """Differences with their names above, which leaves room for long names."""
    for index, row in enumerate(rows):
        color = FINDINGS[row.finding]
        if row.low is not None and row.high is not None:
            axes.hlines(index, row.low, row.high, color=color, lw=1.6)
        axes.plot(
            [row.mean],
            [index],
            color=color,
            marker='o',
            ls='',
            ms=5,
            mfc=color if row.finding else 'white',
        )
        axes.annotate(
            drawable(row.text),
            (0, index),
            xycoords=axes.get_yaxis_transform(),
            xytext=(2, 7),
            textcoords='offset points',
            bbox={'fc': 'white', 'ec': 'none', 'pad': 1},
        )
    axes.axvline(0, color=SOFT_COLOR, lw=1)
    axes.set(ylim=(len(rows) - 0.5, -0.9), yticks=[], xlabel='nats per token; below 0 is better')
    axes.spines['left'].set_visible(False)
    axes.ticklabel_format(axis='x', useOffset=False, style='plain')


# --- A file of all panels ------------------------------------------------------------------------


def figure_of(comparison: Comparison) -> 'Figure':
    """Curves above, fronts below, and one legend."""
    curves, fronts = panels_of(comparison)
    rows = [
        [partial(draw_panel, comparison, panel) for panel in panels]
        for panels in (curves, fronts)
        if panels
    ]
    if not rows:
        return note_figure('No trained model has a validation loss.')
    return sheet(rows, legend_entries(comparison), caption([*curves, *fronts]))


def legend_entries(comparison: Comparison) -> list[LegendEntry]:
    return [(style_of(style_number(comparison, rank)), text) for rank, text in legend(comparison)]


def note_figure(text: str) -> 'Figure':
    """A figure of a single line of text."""
    figure = new_figure(6, 2)
    figure.text(0.5, 0.5, text, ha='center')
    return figure


def sheet(rows: Sequence[Sequence[Draw]], entries: Sequence[LegendEntry], note: str) -> 'Figure':
    """Rows of panels with one legend and one note below all of them."""
    width = max(7.0, 4.2 * max(map(len, rows)))
    texts = [drawable(text) for _, text in entries]
    columns = max(1, min(4, int(width * 11) // (max(map(len, texts)) + 6)))
    lines = textwrap.wrap(note, int(width * 15))
    below = 0.2 * -(-len(texts) // columns) + 0.18 * len(lines) + 0.3
    heights = [*(3.6 for _ in rows), below]
    figure = new_figure(width, sum(heights))
    *parts, last = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat
    for drawings, part in zip(rows, parts):
        for draw, axes in zip(drawings, part.subplots(1, len(drawings), squeeze=False).flat):
            draw(axes)
    handles = [handle_of(style) for style, _ in entries]
    last.legend(handles, texts, loc='upper center', ncols=columns)
    last.text(0.5, 0.02, '\n'.join(lines), ha='center', va='bottom', fontsize=8, color='#555555')
    return figure


def handle_of(style: Style) -> 'Line2D':
    from matplotlib.lines import Line2D

    return Line2D([], [], **style, ms=4, lw=1.6)


def save(make: Callable[[], 'Figure'], path: Path) -> None:
    """Write the figure that `make` draws. Raises UserError."""
    data = io.BytesIO()
    with drawing():
        make().savefig(data, format=path.suffix[1:].lower(), dpi=150)
    write_file(path, data.getvalue())


def svg(width: float, height: float, name: str, draw: Draw) -> str:
    """The drawing of `draw(axes)` as an SVG element for a page."""
    text = io.StringIO()
    with drawing(name):
        figure = new_figure(width, height)
        draw(figure.subplots())
        figure.savefig(text, format='svg', metadata={'Date': None})
    return ''.join(text.getvalue().partition('<svg')[1:])
