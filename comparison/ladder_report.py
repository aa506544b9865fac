"""The HTML page of a ladder: its answer, plots and tables."""

from functools import partial

from comparison import ladder_plots
from comparison.html_page import Picture, page, panels_html, section_html
from comparison.ladder import LadderComparison
from comparison.ladder_headline import ladder_headline
from comparison.ladder_panels import (
    common_caption,
    ladder_panels,
    panel_text,
    variant_labels,
)
from comparison.ladder_tables import ladder_tables


def report_page(ladder: LadderComparison) -> str:
    """The page. Raises UserError without matplotlib."""
    panels, labels = ladder_panels(ladder), variant_labels(ladder)
    pictures = [
        Picture(partial(ladder_plots.draw_panel, panel), panel_text(panel, labels), panel.note)
        for panel in panels
    ]
    return page(
        ladder.study.question or 'Which architecture is better, and at which size?',
        ladder_headline(ladder),
        [
            *panels_html(
                'Loss and compute gain by size',
                pictures,
                ladder_plots.legend_entries(ladder),
                common_caption(panels),
            ),
            *map(section_html, ladder_tables(ladder)),
        ],
        ladder.study.command,
    )
