"""The HTML page of a comparison: its answer, plots and tables."""

from collections.abc import Sequence
from functools import partial

from comparison import plots
from comparison.compare import Comparison
from comparison.headline import headline
from comparison.html_page import Picture, intervals_html, page, panels_html, section_html
from comparison.intervals import difference_rows, effect_rows
from comparison.panels import Panel, caption, panels_of
from comparison.picture_labels import short_labels
from comparison.tables import tables


def report_page(comparison: Comparison) -> str:
    """The page. Raises UserError without matplotlib."""
    return page(
        (comparison.study and comparison.study.question) or 'Which architecture is better?',
        headline(comparison),
        [*pictures(comparison), *map(section_html, tables(comparison))],
        commands(comparison),
    )


def commands(comparison: Comparison) -> str:
    """The command of the study, or that of each run."""
    if comparison.study is not None:
        return comparison.study.command
    return '\n'.join(run.command for group in comparison.groups for run in group.runs)


def pictures(comparison: Comparison) -> list[str]:
    baseline = short_labels(comparison)[comparison.baseline_rank - 1]
    curves, fronts = panels_of(comparison)
    return [
        *intervals_html(
            f'Differences from {baseline}',
            difference_rows(comparison),
            'With the confidence interval of each test. Colored: significant differences.',
        ),
        *_panels(comparison, 'Curves', curves),
        *_panels(comparison, 'Loss against cost', fronts),
        *intervals_html(
            'Main effects',
            effect_rows(comparison),
            'Effect of each value on the loss, all else equal, with its confidence interval. '
            'Colored: significant effects.',
        ),
    ]


def _panels(comparison: Comparison, title: str, panels: Sequence[Panel]) -> list[str]:
    drawings = []
    for panel in panels:
        groups = len({line.rank for line in panel.lines})
        description = (
            f'{" ".join(panel.title.split())}, of {groups} architecture{"s" * (groups > 1)}. '
            'The final losses are in the table RANKING.'
        )
        drawings.append(Picture(partial(plots.draw_panel, comparison, panel), description))
    return panels_html(title, drawings, plots.legend_entries(comparison), caption(panels))
