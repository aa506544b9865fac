"""The page and the plots of a ladder show the losses, gains and fits, and do not mislead."""

import dataclasses
import html
import json
import math
import re
import statistics
from functools import partial

import pytest
from helpers.ladder_records import CURVES, STANDARD, Curve, diverge, write_ladder
from helpers.pages import Page
from helpers.run_records import compared

import compare_architectures as ca
from comparison import ladder_plots, plots
from comparison.formats import one_line
from comparison.ladder_headline import ladder_headline
from comparison.ladder_panels import (
    common_caption,
    ladder_panels,
    panel_text,
    style_numbers,
    variant_labels,
)
from comparison.ladder_report import report_page
from comparison.ladder_tables import ladder_tables, rung_command
from scaling.results import Bound, Estimate, Gain, Trend

pytestmark = [pytest.mark.optional, pytest.mark.slow]

matplotlib = pytest.importorskip('matplotlib')

BASELINE, SWIGLU = CURVES
ODD = ['a$x^$', '<script>alert(1)', '"onload="x', 'y' * 200]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_ladder(tmp_path_factory.mktemp('ladder'))


@pytest.fixture(scope='module')
def ladder(folder):
    return compared(folder)


@pytest.fixture(scope='module')
def files(folder, tmp_path_factory):
    """The folder with the page and the plot that the command writes."""
    made = tmp_path_factory.mktemp('files')
    ca.main([str(folder), f'--report={made / "page.html"}', f'--plot={made / "plot.svg"}'])
    return made


@pytest.fixture(scope='module')
def page_text(files):
    return (files / 'page.html').read_text(encoding='utf-8')


def with_analysis(ladder, **changes):
    return dataclasses.replace(ladder, analysis=dataclasses.replace(ladder.analysis, **changes))


def panel_of(ladder, title):
    return next(panel for panel in ladder_panels(ladder) if panel.title == title)


def drawn(panel):
    with plots.drawing():
        axes = plots.new_figure(*plots.PANEL).subplots()
        ladder_plots.draw_panel(panel, axes)
    return axes


def lines_of(axes, number, **style):
    """The drawn lines in the color of a variant with this style."""
    color = ladder_plots.variant_style(number)['color']
    return [
        line
        for line in axes.lines
        if line.get_color() == color
        and all(getattr(line, f'get_{key}')() == value for key, value in style.items())
    ]


# --- Panels --------------------------------------------------------------------------------------


def test_losses_are_seed_means_with_range_and_fit(folder, ladder):
    losses, flops = {}, {}
    for path in folder.rglob('record.json'):
        record = json.loads(path.read_text())
        _, rung, variant, *_ = path.relative_to(folder).parts
        losses.setdefault((variant, rung), []).append(record['eval_steps'][-1]['val_loss'])
        per_token = record['startup_info']['flops']['per_token_causal']
        flops[variant, rung] = per_token * record['summary']['total_tokens']
    panel = panel_of(ladder, 'Loss against training FLOPs')
    axes = drawn(panel)
    assert axes.get_xscale() == axes.get_yscale() == 'log'
    fit = ladder.analysis.shared_fit
    for line in panel.lines:
        keys = sorted((key for key in losses if key[0] == line.variant), key=flops.get)
        assert len(keys) == (5 if line.number == 0 else 4)  # the baseline has one rung more
        assert [mark.cost for mark in line.marks] == pytest.approx([flops[key] for key in keys])
        for mark, key in zip(line.marks, keys):
            values = losses[key]
            assert mark[1:4] == pytest.approx((statistics.fmean(values), min(values), max(values)))
        for cost, loss in line.curve[:: len(line.curve) // 3]:
            parameters = fit.irreducible, fit.scale, fit.exponent
            e, scale, exponent = (each[line.variant].value for each in parameters)
            assert loss == pytest.approx(e + scale * cost**-exponent)
        (curve,) = lines_of(axes, line.number, linestyle='-', marker='None')
        assert curve.get_xdata()[[0, -1]] == pytest.approx(
            [line.marks[0].cost, line.marks[-1].cost]
        )
    bands = [band.get_paths()[0].vertices[:, 1] for band in axes.collections]
    lows = [min(mark.low for mark in line.marks) for line in panel.lines]
    assert {round(band.min(), 9) for band in bands} >= {round(low, 9) for low in lows}


def test_forecast_is_dashed_and_marked(ladder):
    forecast = ladder.analysis.forecast
    panel = panel_of(ladder, 'Loss against training FLOPs')
    axes = drawn(panel)
    assert [text.get_text() for text in axes.texts] == ['forecast']
    for line in panel.lines:
        (dashed,) = lines_of(axes, line.number, linestyle='--')
        costs, losses = dashed.get_data()
        future = dict(zip(forecast.costs, forecast.losses[line.variant]))
        assert costs[0] == line.marks[-1].cost and losses[0] == line.curve[-1][1]
        assert all(future[cost].value == loss for cost, loss in zip(costs[1:], losses[1:]))
        assert costs[-1] == max(future)
    gains = panel_of(ladder, 'Compute gain')
    (dashed,) = lines_of(drawn(gains), 1, linestyle='--')
    assert list(dashed.get_ydata()) == [each.value for each in forecast.gains[SWIGLU]]
    assert 'Dashed' in common_caption([panel]) and 'forecast' in panel_text(gains, CURVES_LABELS)


CURVES_LABELS = {name: name for name in CURVES}


def test_bounds_are_open_marks_with_arrows(ladder):
    costs = ladder.analysis.ladder.costs[SWIGLU]
    number = Bound(1.2), Bound(1.1), Bound(1.3)
    above = Bound(2.0, '>'), Bound(1.5), Bound(2.0, '>')
    below = Bound(0.5, '<'), Bound(0.5, '<'), Bound(0.6)
    gains = [Gain(rung, costs[rung], *values) for rung, values in enumerate((number, above, below))]
    changed = with_analysis(
        ladder,
        gains={SWIGLU: gains},
        trends={SWIGLU: Trend(Estimate(0.5, 0.4, 0.6), (0, 1, 2))},
        forecast=None,
    )
    panel = panel_of(changed, 'Compute gain')
    axes = drawn(panel)
    style = ladder_plots.variant_style(1)
    marks = {
        line.get_markerfacecolor(): list(line.get_ydata())
        for line in lines_of(axes, 1, marker=style['marker'])
    }
    assert marks == {style['color']: [1.2], 'white': [2.0, 0.5]}
    arrows = [(text.xy, text.xyann[1] > 0) for text in axes.texts]
    assert arrows == [((costs[1], 2.0), True), ((costs[2], 0.5), False)]
    (bars,) = [each.get_segments() for each in axes.collections]
    assert [list(bar[:, 1]) for bar in bars] == [[1.1, 1.3], [1.5, 2.0], [0.5, 0.6]]
    (trend,) = lines_of(axes, 1, marker='None')  # through the only number
    first, last = trend.get_ydata()
    decades = math.log10(costs[2] / costs[0])
    assert first == pytest.approx(1.2) and last / first == pytest.approx(0.5**decades)
    assert axes.lines[0].get_ydata()[0] == 1.0  # the line of no gain
    words = panel_text(panel, CURVES_LABELS)
    assert '1.20 (1.10 to 1.30)' in words and '> 2.00 (1.50 to > 2.00)' in words
    assert '< 0.50' in words and 'arrow' in panel.note


def test_differences_are_those_of_each_rung(ladder):
    (line,) = panel_of(ladder, 'Difference from the baseline').lines
    tests = [ladder.verdict(rung, SWIGLU).test for rung in ladder.rungs[:4]]
    assert [mark[1:4] for mark in line.marks] == [
        (test.difference.mean, test.interval.low, test.interval.high) for test in tests
    ]
    axes = drawn(panel_of(ladder, 'Difference from the baseline'))
    assert axes.get_yscale() == 'linear' and axes.lines[0].get_ydata()[0] == 0.0


def test_residuals_have_standard_errors_of_the_noise_model(ladder):
    panel = panel_of(ladder, 'Residuals of the fit')
    noise = ladder.analysis.noise
    for line in panel.lines:
        expected = ladder.analysis.shared_fit.residuals[line.variant]
        assert [mark.value for mark in line.marks] == [*filter(None, expected)]
        for mark in line.marks:
            error = 2 * noise.deviation(mark.cost) / math.sqrt(3)
            assert mark.high - mark.value == pytest.approx(error)
    losses = panel_of(ladder, 'Loss against training FLOPs')
    for fitted, line in zip(losses.lines, panel.lines):
        ends = (0, fitted.marks[0], fitted.curve[0]), (-1, fitted.marks[-1], fitted.curve[-1])
        for index, mark, (_, value) in ends:
            assert line.marks[index].value == pytest.approx(mark.value - value, abs=1e-9)


def test_three_rungs_and_one_seed_have_no_fit_and_no_bars(tmp_path):
    ladder = compared(write_ladder(tmp_path, params=(1e5, 2e5, 4e5), extra=0, seeds=(1,)))
    assert ladder.analysis.draws == 0
    panels = ladder_panels(ladder)
    assert [panel.title for panel in panels] == [
        'Loss against training FLOPs',
        'Compute gain',
        'Gain in time',
    ]
    assert all(mark.low == mark.high for p in panels for line in p.lines for mark in line.marks)
    assert panels[0].lines[0].curve == [mark[:2] for mark in panels[0].lines[0].marks]
    assert all(not line.forecast for panel in panels for line in panel.lines)
    assert not any('Bars' in panel.note or panel.forecast_from for panel in panels)


def test_one_seed_has_a_fit_and_a_forecast_without_intervals(tmp_path):
    ladder = compared(write_ladder(tmp_path, seeds=(1,)))
    panels = ladder_panels(ladder)
    assert [panel.title for panel in panels if panel.forecast_from] == [
        'Loss against training FLOPs',
        'Compute gain',
    ]
    text = common_caption(panels) + ''.join(panel_text(p, variant_labels(ladder)) for p in panels)
    assert 'forecast' in text and 'nan' not in text and 'interval' not in text
    assert all(map(math.isfinite, (end for p in panels for end in (*p.x_limits, *p.y_limits))))
    drawn(panels[1])


@pytest.mark.parametrize('factor', [0.0, 1e-300, 1e300])
def test_extreme_trend_is_drawn_without_setting_the_limits(ladder, factor):
    trend = Trend(Estimate(factor, 0.0, math.inf), (0, 1, 2, 3))
    changed = with_analysis(ladder, trends={SWIGLU: trend})
    panel = panel_of(changed, 'Compute gain')
    low, high = panel.y_limits
    assert 0.01 < low < 1 < high < 100
    drawn(panel)


def test_one_wide_interval_does_not_flatten_the_others(ladder):
    costs = ladder.analysis.ladder.costs[SWIGLU]
    values = [(1.2, 1.1, 1.3), (1.2, 1.1, 1.3), (1.25, 1e-6, 1e6)]
    gains = [Gain(rung, costs[rung], *map(Bound, values[rung])) for rung in range(len(values))]
    panel = panel_of(with_analysis(ladder, gains={SWIGLU: gains}, forecast=None), 'Compute gain')
    low, high = panel.y_limits
    assert 0.5 < low < 1 and 1.3 < high < 3
    assert 'continue beyond' in common_caption([panel])
    drawn(panel)


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (0.0, '0'),
        (0.5, '0.5'),
        (-0.08, '-0.08'),
        (2000.0, '2000'),
        (1e12, '1e12'),
        (2.5e-7, '2.5e-7'),
    ],
)
def test_tick_text(value, text):
    assert ladder_plots.tick_text(value) == text


@pytest.mark.parametrize(
    ('costs', 'gains'),
    [
        ((1e12, 1.9e12), (1.01, 1.0)),
        ((1e12, 4e12), (1.01, 1.6)),
        ((5.7e10, 5.3e11), (1.0, 4.3)),
        ((1e12, 3e14), (0.02, 1.5)),
        ((1e12, 1e23), (0.01, 90.0)),
    ],
)
def test_ticks_are_labeled_at_any_range(ladder, costs, gains):
    """From two to eight labels on each axis, none longer than six characters."""
    made = [Gain(n, c, *[Bound(g)] * 3) for n, (c, g) in enumerate(zip(costs, gains))]
    changed = with_analysis(ladder, gains={SWIGLU: made}, trends={}, forecast=None)
    panel = panel_of(changed, 'Compute gain')
    panel = panel._replace(x_limits=(costs[0] / 1.2, costs[1] * 1.2))
    axes = drawn(panel)
    for axis, limits in ((axes.xaxis, panel.x_limits), (axes.yaxis, panel.y_limits)):
        ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels())
        shown = [text.get_text() for place, text in ticks if limits[0] <= place <= limits[1]]
        assert 2 <= len(shown) == len({*shown}) <= 8 and max(map(len, shown)) <= 6, shown


# --- Page ----------------------------------------------------------------------------------------


def test_page_has_answer_tables_and_commands(ladder, page_text):
    page = Page(page_text)
    texts = [text for text in page.texts if text.strip()]
    assert texts[1] == texts[-1] == ladder_headline(ladder)
    for section in ladder_tables(ladder):
        for row in (section.header, *section.rows):
            assert all(one_line(cell) in page.texts for cell in row if cell)
    assert page.outside == [] and 'url(http' not in page_text and '@import' not in page_text
    assert ladder.study.command in page_text
    for rung in ladder.rungs:
        assert html.escape(rung_command(ladder, rung)) in page_text


def test_plot_has_all_panels_and_one_legend(files, ladder):
    text = (files / 'plot.svg').read_text(encoding='utf-8')
    shown = re.findall(r'>([^<]+)</text>', text)
    assert all(panel.title in shown for panel in ladder_panels(ladder))
    assert shown.count('standard (baseline)') == shown.count('swiglu') == 1


def test_page_is_accessible(ladder, page_text):
    page = Page(page_text)
    images = [div for div in page.all('div') if div.get('role') == 'img']
    panels = ladder_panels(ladder)
    labels = variant_labels(ladder)
    assert [div['aria-label'] for div in images] == [panel_text(p, labels) for p in panels]
    gain = ladder.analysis.gains[SWIGLU][-1].value.value
    assert f': {gain:.2f} (' in images[1]['aria-label']
    names = [attributes['id'] for _, attributes in page.elements if 'id' in attributes]
    assert sorted(names) == sorted(set(re.findall(r'(?:href="#|url\(#)([^")]+)', page_text)))


def test_odd_names_are_shown_verbatim(tmp_path, recwarn):
    curves = {BASELINE: STANDARD} | {f'ffn_type={name}': Curve(1.5, 92.0, 0.15) for name in ODD}
    ladder = compared(write_ladder(tmp_path, curves, params=(1e5, 2e5), seeds=(1, 2)))
    text = report_page(ladder)
    page = Page(text)
    assert page.count('script') == 0
    assert not any('onload' in attributes for _, attributes in page.elements)
    legend = page.texts[page.texts.index('standard (baseline)') :]
    assert legend[1:4] == ODD[:3] and legend[4].startswith('yyy') and '…' in legend[4]
    assert [str(warning.message) for warning in recwarn] == []


def test_failed_runs_are_in_the_legend(tmp_path):
    def change(record, place):
        if place.variant == SWIGLU and (place.rung, place.seed) == (1, 2):
            diverge(record)

    ladder = compared(write_ladder(tmp_path, params=(1e5, 2e5), change=change))
    texts = [text for _, text in ladder_plots.legend_entries(ladder)]
    assert texts == ['standard (baseline)', 'swiglu (1 of 6 diverged)']


def test_variants_differ_without_color(ladder):
    many = dataclasses.replace(ladder, variants=[BASELINE, *(f'v{n}' for n in range(20))])
    numbers = style_numbers(many)
    styles = [ladder_plots.variant_style(n) for n in numbers.values() if n is not None]
    assert len({(style['color'], style['marker']) for style in styles}) == 15
    assert len({style['marker'] for style in styles[:7]}) == 7
    assert [*numbers.values()].count(None) == 6


def test_nothing_finished_has_a_note(tmp_path):
    def unfinished(record, place):
        record['status'] = 'interrupted'

    ladder = compared(write_ladder(tmp_path / 'ladder', params=(1e5, 2e5), change=unfinished))
    assert ladder_panels(ladder) == []
    plots.save(partial(ladder_plots.figure_of, ladder), tmp_path / 'plot.svg')
    assert 'No finished run of the ladder' in (tmp_path / 'plot.svg').read_text()
    assert 'Commands to reproduce' in report_page(ladder)
