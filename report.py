"""A comparison as pictures and as one page: the verdict first, then curves, fronts and tables.

The page is one file with everything inside, for a screen, a phone or paper. Needs matplotlib:
pip install matplotlib.
"""

import html
import io
import os
from collections.abc import Sequence
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING

from comparison.compare import Comparison
from comparison.costs import curve_over, loss_at
from comparison.headline import headline
from comparison.significance import estimate
from comparison.tables import Section, tables
from console_output import visible
from errors import UserError
from judgement import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SUFFIXES = ('.png', '.svg', '.pdf')
# Okabe & Ito 2008: told apart by the colour-blind too.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#8C6D31')
LINES = ('-', '--', ':')  # for the first of each colour, the second, the third


def matplotlib_figure(width: float, height: float) -> 'Figure':
    """An empty figure, drawn without a screen. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            '--plot and --report draw with matplotlib, which is not installed: pip install '
            'matplotlib. --format gives tables without it.'
        ) from error
    return Figure(figsize=(width, height), layout='constrained')


def write(path: Path, data: bytes) -> None:
    """Replace a file in one step. Raises UserError where that is not possible."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error.strerror}).') from error


def plot(comparison: Comparison, path: Path) -> None:
    """Curves and fronts as one picture. Raises UserError."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f'--plot={path}: the name ends in one of {", ".join(SUFFIXES)}.')
    figure = matplotlib_figure(13, 8.5)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    draw_curves(comparison, upper)
    draw_fronts(comparison, lower)
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:].lower(), dpi=150)
    write(path, data.getvalue())


# --- Pictures ------------------------------------------------------------------------------------


def style_of(rank: int) -> dict[str, str]:
    """Colour and line of a group; the same again only after two dozen."""
    again, place = divmod(rank, len(COLOURS))
    return {'color': COLOURS[place], 'ls': LINES[again % len(LINES)]}


def clear(axes: 'Axes', title: str, amounts: bool = True) -> None:
    """A grid, no box; below it amounts such as 20M, or plain numbers."""
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(title)
    if amounts:
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)


def draw_curves(comparison: Comparison, figure) -> None:
    """Validation loss over tokens, FLOPs and seconds: means over seeds, with their interval."""
    every = [run for group in comparison.groups for run in group.members]
    several = any(len(run.curve) > 1 for run in every)
    costs = comparison.costs
    places = figure.subplots(1, len(costs), sharey=True)
    for axes, (cost, title) in zip(places, costs.items()):
        for rank, (group, label) in enumerate(zip(comparison.groups, comparison.labels)):
            draw_curve(axes, group, cost, label, style_of(rank), behind=-rank)
        clear(axes, title, amounts=cost != 'seconds')
        losses = [point.loss for run in every for point in run.curve]
        if losses and several:
            axes.set_ylim(*loss_limits(comparison))
    first = figure.axes[0]
    first.set_ylabel('validation loss, nats a token')
    handles, labels = first.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc='outside lower center', ncols=columns(labels))


def columns(labels: Sequence[str]) -> int:
    """As many as a line of the legend holds."""
    return max(1, min(4, 170 // (max(map(len, labels)) + 6)))


def loss_limits(comparison: Comparison) -> tuple[float, float]:
    """From the lowest loss to what had been reached after a quarter of the evaluations."""
    curves = [run.curve for group in comparison.groups for run in group.members if run.curve]
    low = min(point.loss for curve in curves for point in curve)
    high = max(curve[min(len(curve) - 1, max(1, len(curve) // 4))].loss for curve in curves)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def draw_curve(axes: 'Axes', group: Group, cost: str, label: str, style: dict, behind: int) -> None:
    curves = [curve for run in group.members if (curve := curve_over(run.curve, cost))]
    if not curves:
        return
    places = [amount for amount, _ in curves[0] if amount <= min(c[-1][0] for c in curves)]
    means, lows, highs, shown = [], [], [], []
    for place in places:
        losses = [loss for curve in curves if (loss := loss_at(curve, place)) is not None]
        if len(losses) == len(curves):
            found = estimate(losses)
            shown.append(place)
            means.append(found.mean)
            lows.append(found.mean if found.low is None else found.low)
            highs.append(found.mean if found.high is None else found.high)
    marker = 'o' if len(shown) < 25 else None
    axes.plot(shown, means, **style, label=label, marker=marker, ms=3.5, zorder=10 + behind)
    axes.fill_between(shown, lows, highs, color=style['color'], alpha=0.15, lw=0, zorder=behind)


def draw_fronts(comparison: Comparison, figure) -> None:
    """Final loss against what it cost, with the front that nothing else beats."""
    costs = comparison.front_costs
    places = figure.subplots(1, len(costs), sharey=True)
    for axes, (letter, (title, figure_of)) in zip(places, costs.items()):
        points = []
        for rank, group in enumerate(comparison.groups):
            amount = group.mean(figure_of)
            if amount is None or group.loss is None or not group.finished:
                continue
            spread = group.estimate
            error = 0 if spread.low is None else (spread.high - spread.low) / 2
            axes.errorbar(
                amount, group.loss, yerr=error, fmt='o', color=style_of(rank)['color'], capsize=3
            )
            if letter in comparison.fronts[rank]:
                points.append((amount, group.loss))
        if len(points) > 1:
            axes.plot(*zip(*sorted(points)), color='#888888', lw=1, ls='--', zorder=0)
        clear(axes, title, amounts=letter == 'F')
    figure.axes[0].set_ylabel('best validation loss')


def draw_effects(comparison: Comparison, axes: 'Axes') -> None:
    """Each main effect with its interval; left of zero is better."""
    drawn = [each for each in comparison.effects if each[0].mean is not None]
    for place, (effect, correction) in enumerate(drawn):
        test = effect.difference
        error = 0 if correction is None else correction.interval.high - test.mean
        colour = '#888888' if error == 0 or abs(effect.mean) < error else COLOURS[effect.mean > 0]
        axes.errorbar(effect.mean, place, xerr=error, fmt='o', color=colour, capsize=3)
    axes.axvline(0, color='#888888', lw=1)
    names = [f'{e.option}: {e.value} against {e.against}' for e, _ in drawn]
    axes.set_yticks(range(len(drawn)), names)
    axes.invert_yaxis()
    clear(axes, 'change of the loss, all else equal (lower is better)', amounts=False)


# --- The page ------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #5b6570; --line: #d9dee4; --wash: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 1.5rem 1rem 4rem; color: var(--ink);
  background: #fff; font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { margin: .4rem 0; }
.verdict { font-size: 1.15rem; padding: 1rem 1.2rem; background: var(--wash);
  border-left: 4px solid #0072B2; border-radius: 4px; }
.note { color: var(--soft); font-size: .92rem; }
figure { margin: .75rem 0; }
figure svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { text-align: left; color: var(--soft); font-weight: 600; }
.r { text-align: right; }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 0 1rem; }
.texts figure { margin: 0; min-width: 0; }
.texts figcaption { font-size: .9rem; }
.texts pre { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--wash); padding: .8rem 1rem; border-radius: 4px;
  font-size: .82rem; line-height: 1.45; }
@media (max-width: 700px) { .picture { overflow-x: auto; } .picture svg { width: 860px; } }
@media print { body { max-width: none; font-size: 11pt; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } pre { white-space: pre-wrap; } }
"""


def report(comparison: Comparison, path: Path) -> None:
    """Write the page. Raises UserError."""
    study = comparison.study
    title = (study and study.question) or 'Which architecture is better?'
    pictures = [
        ('Curves', svg(13, 5.2, lambda figure: draw_curves(comparison, figure))),
        ('Loss against cost', svg(13, 4, lambda figure: draw_fronts(comparison, figure))),
    ]
    if comparison.effects:
        height = 1.2 + 0.45 * len(comparison.effects)
        drawing = svg(9, height, lambda figure: draw_effects(comparison, figure.subplots()))
        pictures.append(('Main effects', drawing))
    body = [
        f'<h1>{html.escape(title)}</h1>',
        f'<p class="verdict">{html.escape(headline(comparison))}</p>',
        *(
            f'<h2>{name}</h2>'
            f'<figure class="picture" role="img" aria-label="{name}">{drawing}</figure>'
            for name, drawing in pictures
        ),
        *map(section_html, tables(comparison)),
        '<h2>To repeat it</h2>',
        f'<pre>{html.escape(commands(comparison))}</pre>',
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f'<style>{STYLE}</style></head>\n<body>\n' + '\n'.join(body) + '\n</body></html>\n'
    )
    write(path, page.encode())


def commands(comparison: Comparison) -> str:
    """What was typed: the study's one command, or that of each run."""
    if comparison.study is not None:
        return comparison.study.command
    return '\n'.join(run.command for group in comparison.groups for run in group.members)


def svg(width: float, height: float, draw) -> str:
    """What `draw(figure)` draws, as an element to stand in a page."""
    figure, text = matplotlib_figure(width, height), io.StringIO()
    draw(figure)
    figure.savefig(text, format='svg', metadata={'Date': None})
    return text.getvalue().partition('<svg')[1] + text.getvalue().partition('<svg')[2]


def section_html(section: Section) -> str:
    parts = [
        f'<h2>{html.escape(section.title)}</h2>'
        if section.rows or section.lines or section.texts
        else f'<p class="note">{html.escape(" ".join(section.title.split()))}</p>'
    ]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in section.notes]
    if section.lines:
        parts.append(f'<pre>{html.escape(chr(10).join(section.lines))}</pre>')
    if section.texts:
        parts.append(f'<div class="texts">{"".join(starmap(figure_html, section.texts))}</div>')
    if section.rows:
        sides = ['r' if side == '>' else 'l' for side in section.align]

        def row(cells: list[str], tag: str) -> str:
            inner = ''.join(
                f'<{tag} class="{side}">{html.escape(cell)}</{tag}>'
                for side, cell in zip(sides, cells, strict=True)
            )
            return f'<tr>{inner}</tr>'

        head = row(section.header, 'th')
        rows = ''.join(row(cells, 'td') for cells in section.rows)
        parts.append(
            f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
        )
    return '\n'.join(parts)


def figure_html(heading: str, text: str) -> str:
    shown = html.escape(visible(text).strip('\n'))
    return f'<figure><figcaption>{html.escape(heading)}</figcaption><pre>{shown}</pre></figure>'
