"""The layout of an HTML page: the answer first and last, pictures and tables in between.

A page is one self-contained file, laid out for screens, phones and print. Text from records is
escaped in `escaped`, and nowhere else.
"""

import html
import re
from collections.abc import Sequence
from itertools import starmap
from typing import NamedTuple

from common.console_output import visible
from comparison import plots
from comparison.formats import one_line
from comparison.intervals import IntervalRow
from comparison.section import Section

SUFFIXES = ('.html', '.htm')
DRAWN_ROWS = 20  # of a figure of intervals, to fit on a page

STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d9dee4; --wash: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.5rem 1rem 3rem; color: var(--ink);
  background: #fff; font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { margin: .4rem 0; }
.answer { font-size: 1.15rem; padding: 1rem 1.2rem; background: var(--wash);
  border-left: 4px solid #0072B2; border-radius: 4px; }
.note, figcaption { color: var(--soft); font-size: .92rem; }
figure { margin: .75rem 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 22.5rem));
  gap: .5rem 1rem; }
.panels svg, .rows svg { width: 100%; height: auto; display: block; }
.rows { max-width: 30rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; margin: .3rem 0;
  padding: 0; font-size: .9rem; }
.legend li { display: flex; }
.legend svg { flex: none; width: 2rem; height: .8rem; margin: .4rem .4rem 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap;
  text-align: left; }
th { color: var(--soft); font-weight: 600; }
th.r, td.r { text-align: right; }
.texts { display: grid; gap: 0 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.texts figure { margin: 0; min-width: 0; }
pre { white-space: pre-wrap; background: var(--wash); padding: .8rem 1rem; border-radius: 4px;
  font-size: .82rem; line-height: 1.45; }
@media print { @page { margin: 12mm; } html { font-size: 12px; } body { font-size: 1rem;
  max-width: none; padding: 0; } h2 { break-after: avoid; margin-top: 1.6rem; }
  figure, tr, table, .answer { break-inside: avoid; }
  .panels { grid-template-columns: repeat(3, 1fr); }
  .scroll { overflow: visible; } th, td { padding: .2rem .4rem; white-space: normal; }
  th, td.r { white-space: nowrap; } }
"""


def page(title: str, answer: str, parts: Sequence[str], commands: str) -> str:
    """A page as HTML. title, answer, commands: plain text; parts: HTML."""
    title, answer = escaped(title), escaped(answer)
    body = [
        f'<h1>{title}</h1>',
        f'<p class="answer">{answer}</p>',
        *parts,
        '<h2>Commands to reproduce</h2>',
        f'<pre>{escaped(commands)}</pre>',
        '<h2>Answer</h2>',
        f'<p class="answer">{answer}</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title>'
        f'<style>{STYLE}</style></head>\n<body><main>\n'
        + '\n'.join(body)
        + '\n</main></body></html>\n'
    )


def escaped(text: str) -> str:
    """The text escaped for HTML, with control and direction characters made visible."""
    return html.escape(visible(text))


# --- Pictures ------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A drawing, its alternative text, and a note below it."""

    draw: plots.Draw
    text: str
    note: str = ''


def panels_html(
    title: str, pictures: Sequence[Picture], entries: Sequence[plots.LegendEntry], note: str
) -> list[str]:
    """A figure of several panels, one drawing each, so that they wrap on small screens."""
    if not pictures:
        return []
    drawings = [
        _picture_html(picture, f'{title} {number}') for number, picture in enumerate(pictures)
    ]
    return [
        f'<h2>{escaped(title)}</h2><figure><div class="panels">{"".join(drawings)}</div>'
        f'{legend_html(entries)}<figcaption>{escaped(note)}</figcaption></figure>'
    ]


def _picture_html(picture: Picture, name: str) -> str:
    image = _image(plots.svg(*plots.PANEL, name, picture.draw), picture.text)
    if not picture.note:
        return image
    return f'<div>{image}<p class="note">{escaped(picture.note)}</p></div>'


def intervals_html(title: str, rows: Sequence[IntervalRow], note: str) -> list[str]:
    """A figure of intervals, limited to DRAWN_ROWS."""
    if not rows:
        return []
    if len(rows) > DRAWN_ROWS:
        note = f'The first {DRAWN_ROWS} of {len(rows)}. {note}'
        rows = rows[:DRAWN_ROWS]
    height = 0.6 + plots.ROW_HEIGHT * len(rows)
    drawing = plots.svg(4.2, height, title, lambda axes: plots.draw_rows(rows, axes))
    numbers = '; '.join(f'{row.text}: {row.mean:+.4f}' for row in rows)
    return [
        f'<h2>{escaped(title)}</h2><figure><div class="rows">{_image(drawing, numbers)}</div>'
        f'<figcaption>{escaped(note)}</figcaption></figure>'
    ]


def _image(drawing: str, text: str) -> str:
    """The drawing as an image with alternative text, without ids that are not referenced."""
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawing))
    drawing = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else '', drawing)
    return f'<div role="img" aria-label="{escaped(one_line(text))}">{drawing}</div>'


def legend_html(entries: Sequence[plots.LegendEntry]) -> str:
    items = [
        f'<li>{_swatch(style)}<span>{escaped(one_line(text))}</span></li>'
        for style, text in entries
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _swatch(style: plots.Style) -> str:
    """The line and marker of a group in the legend."""
    dashes = ' stroke-dasharray="5 3"' if style['ls'] == '--' else ''
    marks = {
        'o': '<circle cx="16" cy="6" r="3.5"/>',
        's': '<rect x="12.5" y="2.5" width="7" height="7"/>',
        'D': '<path d="M16 1.5 20.5 6 16 10.5 11.5 6Z"/>',
        '^': '<path d="M16 2 20 10H12Z"/>',
        'v': '<path d="M16 10 12 2H20Z"/>',
        'P': '<path d="M14.5 2h3v2.5H20v3h-2.5V10h-3V7.5H12v-3h2.5Z"/>',
        'X': '<path d="M14 2 16 4 18 2 20 4 18 6 20 8 18 10 16 8 14 10 12 8 14 6 12 4Z"/>',
    }
    return (
        f'<svg viewBox="0 0 32 12" aria-hidden="true" fill="{style["color"]}">'
        f'<path d="M0 6H32" stroke="{style["color"]}" stroke-width="2"{dashes}/>'
        f'{marks[style["marker"]]}</svg>'
    )


# --- Tables --------------------------------------------------------------------------------------


def section_html(section: Section) -> str:
    title = escaped(one_line(' '.join(section.title.split())))
    if not (section.rows or section.lines or section.texts):
        return f'<p class="note">{title}</p>'
    parts = [f'<h2>{title}</h2>']
    parts += [f'<p class="note">{escaped(note)}</p>' for note in section.notes]
    if section.lines:
        # Continuation lines have a larger indent. Join them: the browser wraps the text.
        lines = re.sub(r'\n {3,}', ' ', '\n'.join(section.lines))
        parts.append(f'<pre>{escaped(lines)}</pre>')
    if section.texts:
        parts.append(f'<div class="texts">{"".join(starmap(figure_html, section.texts))}</div>')
    if section.rows:
        parts.append(table_html(title, section))
    return '\n'.join(parts)


def table_html(title: str, section: Section) -> str:
    """A table with its own horizontal scroll bar on narrow screens."""
    sides = [' class="r"' if side == '>' else '' for side in section.align]

    def row(cells: list[str], tag: str, scope: str = '') -> str:
        inner = ''.join(
            f'<{tag}{scope}{side}>{escaped(one_line(cell))}</{tag}>'
            for side, cell in zip(sides, cells, strict=True)
        )
        return f'<tr>{inner}</tr>'

    head = row(section.header, 'th', ' scope="col"')
    rows = ''.join(row(cells, 'td') for cells in section.rows)
    return (
        f'<div class="scroll" role="region" aria-label="{title}" tabindex="0">'
        f'<table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    )


def figure_html(heading: str, text: str) -> str:
    return (
        f'<figure><figcaption>{escaped(one_line(heading))}</figcaption>'
        f'<pre>{escaped(text.strip(chr(10)))}</pre></figure>'
    )
