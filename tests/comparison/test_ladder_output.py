"""comparison/ladder_*.py: every number shown of a ladder, computed in another way."""

import csv
import io
import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from helpers.ladder_records import PARAMS, STANDARD, Curve, interrupt, tokens_of, write_ladder
from scipy import optimize, stats

from comparison.answer import compare_runs
from comparison.formats import FORMATS, emphasize, escape_markdown
from comparison.ladder import LadderComparison
from comparison.ladder_fit_tables import forecast_section
from comparison.ladder_headline import bound_text, factor_text, flops_text, ladder_headline
from comparison.ladder_tables import ladder_tables
from comparison.load import read_runs
from scaling.results import Bound, Estimate

BASELINE, SWIGLU, RELU = 'ffn_type=standard', 'ffn_type=swiglu', 'ffn_type=relu'
CURVES = {
    BASELINE: STANDARD,
    SWIGLU: Curve(1.5, 90.0 / 1.3**0.15, 0.15, cost=1.1),
    RELU: Curve(1.5, 90.0 * 2e13**-0.01, 0.14),  # crosses the baseline between rungs 3 and 4
}


def compared(folder) -> LadderComparison:
    return compare_runs(read_runs([folder])[0])


@pytest.fixture(scope='module')
def ladder(tmp_path_factory):
    return compared(write_ladder(tmp_path_factory.mktemp('ladder'), CURVES, noise=0.003))


@pytest.fixture(scope='module')
def data(ladder):
    return json.loads(FORMATS['json'](ladder))


def rows(ladder, title) -> list[dict[str, list[str]]]:
    """The rows of a table; each column has a list, since names may repeat."""
    section = next(each for each in ladder_tables(ladder) if each.title.startswith(title))
    result = []
    for cells in section.rows:
        row = {}
        for name, cell in zip(section.header, cells, strict=True):
            row.setdefault(name, []).append(cell)
        result.append(row)
    return result


def final_losses(ladder, label, index) -> list[float]:
    """From the curves of the runs, not from what was analyzed."""
    group = ladder.rungs[index].groups[label]
    return [run.curve[-1].loss for run in group.runs]


def means(ladder, label) -> dict[int, float]:
    return {
        index: statistics.fmean(final_losses(ladder, label, index))
        for index, rung in enumerate(ladder.rungs)
        if label in rung.groups
    }


def flops(label, rung) -> float:
    return CURVES[label].flops_per_token(rung.params) * tokens_of(rung.params)


def fitted(fit, label, cost) -> float:
    scale, exponent = (fit[key][label]['value'] for key in ('scale', 'exponent'))
    return fit['irreducible'][label]['value'] + scale * cost**-exponent


# --- Gains and trends ----------------------------------------------------------------------------


def test_rungs(ladder):
    for rung, row in zip(ladder.rungs, rows(ladder, 'RUNGS'), strict=True):
        assert row['rung'] == [str(rung.number)] and row['size'][0].startswith(rung.label)
        assert row['FLOPs'] == [flops_text(flops(BASELINE, rung))]
        assert row['runs'] == ['3' if rung.extra else '9']
    assert [row['params'][0] for row in rows(ladder, 'RUNGS')][::4] == ['100.00K', '1.60M']
    assert rows(ladder, 'RUNGS')[0]['tokens'] == [f'{tokens_of(PARAMS[0]) / 1e6:.2f}M']


def test_gains_are_roots_of_the_interpolated_baseline(ladder, data):
    baseline = means(ladder, BASELINE)
    costs = [flops(BASELINE, rung) for rung in ladder.rungs]
    fit = data['ladder']['shared_fit']
    residuals = [baseline[i] - fitted(fit, BASELINE, cost) for i, cost in enumerate(costs)]

    def loss(log_cost):
        residual = np.interp(log_cost, np.log(costs), residuals)
        return fitted(fit, BASELINE, math.exp(log_cost)) + residual

    table = rows(ladder, 'COMPUTE GAIN')
    assert len(table) == 8
    for row in table:
        label, index = row['architecture'][0], int(row['rung'][0]) - 1
        own, cost = means(ladder, label)[index], flops(label, ladder.rungs[index])
        assert row['FLOPs'] == [flops_text(cost)]
        assert row['loss'] == [f'{own:.4f}'] and row['baseline'] == [f'{baseline[index]:.4f}']
        assert row['difference'] == [f'{own - baseline[index]:+.4f}']
        assert row['seeds'] == ['3']
        (gain,) = (g for g in data['ladder']['gains'][label] if g['rung'] == index + 1)
        if own > baseline[0]:
            assert row['gain'] == [f'< {factor_text(costs[0] / cost)}'] == row['in time']
            assert gain['gain']['relation'] == '<'
            continue
        root = optimize.brentq(
            lambda x, own=own: loss(x) - own, math.log(costs[0]), math.log(costs[-1])
        )
        expected = math.exp(root) / cost
        assert gain['gain']['value'] == pytest.approx(expected, rel=1e-6)
        # Every second of these runs has the same FLOPs.
        assert row['gain'] == [factor_text(expected)] == row['in time']
        low, high = (bound_text(Bound(**gain[end])) for end in ('low', 'high'))
        assert row['95% interval'] == [f'{low} to {high}']
        assert gain['low']['value'] < expected < gain['high']['value']
        verdict = ladder.verdict(ladder.rungs[index], label)
        assert row['verdict'] == [verdict.text]


def test_trend_is_the_least_squares_line(ladder, data):
    table = {row['architecture'][0]: row for row in rows(ladder, 'TREND')}
    for label, row in table.items():
        trend = data['ladder']['trends'][label]
        assert row['rungs'] == [' '.join(map(str, trend['rungs']))]
        gains = [g for g in data['ladder']['gains'][label] if g['rung'] in trend['rungs']]
        if not any(gain['gain']['relation'] for gain in gains):
            x = [math.log10(gain['cost']) for gain in gains]
            slope = np.polyfit(x, [math.log10(gain['gain']['value']) for gain in gains], 1)[0]
            assert row['per tenfold'] == [factor_text(10**slope)]
        low, value, high = (trend['factor'][key] for key in ('low', 'value', 'high'))
        assert row['95% interval'] == [f'{factor_text(low)} to {factor_text(high)}']
        assert low < value < high
        word = 'grows' if low > 1 else 'shrinks' if high < 1 else 'not significant'
        assert row['trend'] == [word]
    assert table[RELU]['trend'] == ['shrinks'] and table[SWIGLU]['trend'] == ['not significant']


def test_reversal_is_said_in_words(ladder, data):
    gains = {g['rung']: g['gain']['value'] for g in data['ladder']['gains'][RELU]}
    assert gains[3] > 1 > gains[4]
    (reversal,) = data['ladder']['reversals'][RELU]
    assert reversal['rung'] == 3 and data['ladder']['reversals'][SWIGLU] == []
    certainty = 'significant at both' if reversal['significant'] else 'which may be chance'
    text = f'{RELU} is ahead at rung 3 and behind at rung 4 ({certainty})'
    assert text in ' '.join(FORMATS['text'](ladder).split('TREND')[1].split())


def test_headline_has_the_numbers_of_the_tables(ladder):
    text = ladder_headline(ladder)
    assert ' '.join(FORMATS['text'](ladder).split()).startswith(text)
    assert ' '.join(FORMATS['text'](ladder).split()).endswith(f'ANSWER: {text}')
    at_top = [row for row in rows(ladder, 'COMPUTE GAIN') if row['rung'] == ['4']]
    for row in at_top:
        (label,), (gain,), (interval,) = (row[k] for k in ('architecture', 'gain', '95% interval'))
        assert f'{label} {gain} ({interval}; loss {row["verdict"][0]}' in text
    assert f'{RELU} {at_top[1]["gain"][0]}' in text and 'shrinks with compute)' in text
    assert 'Intervals cover the noise of seeds at the given hyper-parameters' in text


def test_wrong_curve_is_said_and_no_trend_is_tested(tmp_path):
    def bend(record, place):
        own = 0.004 * (place.variant == SWIGLU)
        record['eval_steps'][-1]['val_loss'] += (0.02 + own) * (-1) ** place.rung

    curves = {BASELINE: STANDARD, SWIGLU: STANDARD}
    one = compared(write_ladder(tmp_path, curves, noise=0.004, change=bend))
    data, text = json.loads(FORMATS['json'](one))['ladder'], ladder_headline(one)
    misfit = data['shared_fit']['misfit']
    assert misfit > 2
    assert (
        'is not tested. The fitted curve misfits the losses (its residuals are '
        f'{misfit:.2f} times as large as the noise of seeds explains), so no trend is tested. The '
        f'measured order reverses (which may be chance): {SWIGLU} is behind at rung 1 and ahead '
        f'at rung 2; {SWIGLU} is ahead at rung 2 and behind at rung 3; {SWIGLU} is behind at rung '
        '3 and ahead at rung 4.'
    ) in text
    (row,) = rows(one, 'TREND')
    assert row['trend'] == ['not tested'] and row['95% interval'] == ['-']
    assert data['trends'][SWIGLU]['factor']['low'] is None
    section = next(s for s in ladder_tables(one) if s.title.startswith('TREND'))
    assert section.notes[-1].startswith('not tested: the fitted curve misfits the losses')


def test_headline_of_one_variant(tmp_path):
    curves = {label: CURVES[label] for label in (BASELINE, SWIGLU)}
    one = compared(write_ladder(tmp_path, curves, params=PARAMS[:2], noise=0.003))
    text = ladder_headline(one)
    row = rows(one, 'COMPUTE GAIN')[-1]
    test = rows(one, 'LOSS DIFFERENCE')[-1]
    assert text.startswith(
        f'At the top rung (200.00K parameters, {row["FLOPs"][0]} FLOPs), {SWIGLU} has a compute '
        f'gain of {row["gain"][0]} over {BASELINE} (95% interval {row["95% interval"][0]}, 3 '
        f'seeds): {BASELINE} needs {row["gain"][0]} times the training FLOPs for the same loss. '
        f'Its loss there is better by {test["difference"][0][1:]} nats per token, which is '
        f'significant (p {test["p"][0]}).'
    )
    trend = rows(one, 'TREND')[0]
    factor, rungs = trend['per tenfold'][0], f'{BASELINE} has fewer than 4 rungs'
    assert f'a factor of {factor} for each tenfold of compute, is not tested, since {rungs}' in text
    assert trend['trend'][0] == 'not tested'
    # With two rungs of three parameters, nothing is fitted, and one line says why.
    titles = [section.title for section in ladder_tables(one)]
    assert not any(title.startswith(('FITS', 'RESIDUALS', 'TOP RUNG')) for title in titles)
    (why,) = (' '.join(title.split()) for title in titles if title.startswith('FORECAST'))
    assert why.startswith('FORECAST: none. Fits and a forecast need at least 4 rungs')
    assert why.endswith('Here are 2.')


def test_one_seed_has_no_intervals_and_says_so(tmp_path):
    one = compared(write_ladder(tmp_path, {b: CURVES[b] for b in (BASELINE, SWIGLU)}, seeds=(1,)))
    text = ladder_headline(one)
    assert text.endswith(
        'With one seed each, gains have no intervals, and differences may be chance.'
    )
    assert 'interval 1' not in text and 'nan' not in FORMATS['text'](one)
    for row in rows(one, 'COMPUTE GAIN'):
        assert row['95% interval'] == ['-'] and row['gain'] != ['-']
    for title in ('FITS of', 'FITS WITH', 'TOP RUNG', 'FORECAST', 'TREND'):
        assert all(set(row['95% interval']) == {'-'} for row in rows(one, title))
    titles = [section.title for section in ladder_tables(one)]
    assert not any(title.startswith(('NOISE', 'SEEDS', 'LOSS DIFF')) for title in titles)
    data = json.loads(FORMATS['json'](one))['ladder']
    assert data['draws'] == 0 and data['gains'][SWIGLU][0]['low']['value'] is None
    assert {each['hit'] for each in data['predictions'].values()} == {None}


# --- Fits and forecast ---------------------------------------------------------------------------


def test_fits_are_least_squares(ladder, data):
    """The shared and the own E: no neighboring parameters fit better; the table has the numbers."""
    for title, key in (('FITS of', 'shared_fit'), ('FITS WITH', 'own_fit')):
        fit = data['ladder'][key]
        for row in rows(ladder, title):
            (label,) = row['architecture']
            estimates = [fit[name][label] for name in ('irreducible', 'scale', 'exponent')]
            forms = ('.4f', '.4g', '.4f')
            cells = [f'{e["value"]:{form}}' for e, form in zip(estimates, forms)]
            assert [row['E'][0], row['A'][0], row['alpha'][0]] == cells
            intervals = [
                f'{e["low"]:{form}} to {e["high"]:{form}}' for e, form in zip(estimates, forms)
            ]
            assert row['95% interval'] == intervals
        section = next(s for s in ladder_tables(ladder) if s.title.startswith(title))
        widened = f'{fit["misfit"]:.2f} times as large as the noise of seeds explains'
        assert (widened in section.notes[-1]) == (fit['misfit'] > 1)
    points = [
        (label, flops(label, ladder.rungs[index]), loss)
        for label in CURVES
        for index, loss in means(ladder, label).items()
    ]
    fit = data['ladder']['shared_fit']

    def errors(x):
        return [
            x[0] + math.exp(x[1 + n] - x[4 + n] * math.log(cost / 1e13)) - loss
            for n, name in enumerate(CURVES)
            for label, cost, loss in points
            if label == name
        ]

    best = optimize.least_squares(errors, [1.5, 0, 0, 0, 0.15, 0.15, 0.15], xtol=1e-14, ftol=1e-14)
    assert fit['irreducible'][BASELINE]['value'] == pytest.approx(best.x[0], rel=1e-4)
    for n, label in enumerate(CURVES):
        assert fit['exponent'][label]['value'] == pytest.approx(best.x[4 + n], rel=1e-4)


def test_residuals_are_losses_minus_the_fit(ladder, data):
    for row in rows(ladder, 'RESIDUALS'):
        (label,) = row['architecture']
        for index, loss in means(ladder, label).items():
            cost = flops(label, ladder.rungs[index])
            residual = loss - fitted(data['ladder']['shared_fit'], label, cost)
            assert float(row[f'rung {index + 1}'][0]) == pytest.approx(residual, abs=6e-5)
    assert rows(ladder, 'RESIDUALS')[1]['rung 5'] == ['-']


def test_prediction_of_the_top_rung(ladder, data):
    table = rows(ladder, 'TOP RUNG PREDICTED')
    assert [row['architecture'][0] for row in table] == list(CURVES)
    for row in table:
        (label,) = row['architecture']
        low, high = map(float, row['95% interval'][0].split(' to '))
        measured = means(ladder, label)[3]
        assert row['measured'] == [f'{measured:.4f}'] and row['rung'] == ['4']
        assert row['hit'] == ['hit' if low <= measured <= high else 'miss']
        assert float(row['width'][0]) == pytest.approx(high - low, abs=2e-4)
        error = float(row['predicted'][0]) - measured
        assert float(row['error'][0]) == pytest.approx(error, abs=2e-4)
        # A straight line of ln L against ln C through the rungs below.
        x = [math.log(flops(label, ladder.rungs[index])) for index in range(4)]
        y = [math.log(means(ladder, label)[index]) for index in range(3)]
        line = math.exp(np.polyval(np.polyfit(x[:3], y, 1), x[3]))
        assert float(row['log-linear'][0]) == pytest.approx(line - measured, abs=2e-4)
    assert {d['hit'] for d in data['ladder']['predictions'].values()} <= {True, False}


def test_forecast_continues_the_fit(ladder, data):
    fit = data['ladder']['shared_fit']
    table = rows(ladder, 'FORECAST')
    top = statistics.geometric_mean(flops(label, ladder.rungs[3]) for label in CURVES)
    assert data['ladder']['forecast']['flops'][-1] == pytest.approx(10 * top, rel=1e-3)
    for row in table:
        (label,) = row['architecture']
        cost = next(
            c for c in data['ladder']['forecast']['flops'] if flops_text(c) == row['FLOPs'][0]
        )
        loss = fitted(fit, label, cost)
        assert row['loss'] == [f'{loss:.4f}']
        low, high = map(float, row['95% interval'][0].split(' to '))
        assert low < loss < high
        if label == BASELINE:
            assert row['gain'] == row['own E'] == ['-'] and row['95% interval'][1:] == ['-', '-']
            continue
        for column, key in (('gain', 'shared_fit'), ('own E', 'own_fit')):
            curves = data['ladder'][key]
            loss = fitted(curves, label, cost)
            needed = optimize.brentq(
                lambda x, f=curves, loss=loss: fitted(f, BASELINE, math.exp(x)) - loss, 20, 60
            )
            assert row[column] == [factor_text(math.exp(needed) / cost)]
    section = next(s for s in ladder_tables(ladder) if s.title == 'FORECAST')
    assert section.notes[0].startswith('Extrapolated, not measured')


def test_no_forecast_says_why(ladder):
    analysis = replace(ladder.analysis, forecast=None)
    unknown = ' '.join(forecast_section(replace(ladder, analysis=analysis)).title.split())
    assert unknown.startswith('FORECAST: none. The noise of seeds and the misfit leave the gain')
    assert 'its interval is from below 0.001 to above 1000.' in unknown
    exponents = analysis.shared_fit.exponent | {RELU: Estimate(1e-6, 1e-6, 0.1)}
    flat = replace(analysis, shared_fit=analysis.shared_fit._replace(exponent=exponents))
    text = ' '.join(forecast_section(replace(ladder, analysis=flat)).title.split())
    assert text.startswith(f'FORECAST: none. The losses of {RELU} do not fall with compute')


# --- Noise ---------------------------------------------------------------------------------------


def test_noise_is_pooled_over_variants(ladder, data):
    noise = data['ladder']['noise']
    for index, row in enumerate(rows(ladder, 'NOISE')):
        labels = [label for label in CURVES if label in ladder.rungs[index].groups]
        values = [final_losses(ladder, label, index) for label in labels]
        freedom = sum(len(each) - 1 for each in values)
        pooled = sum((len(v) - 1) * statistics.variance(v) for v in values) / freedom
        assert row['deviation'] == [f'{math.sqrt(pooled):.4f}'] and row['freedom'] == [str(freedom)]
        cost = statistics.geometric_mean(flops(label, ladder.rungs[index]) for label in labels)
        assert row['FLOPs'] == [flops_text(cost)]
        model = math.exp(noise['intercept'] + noise['slope'] * math.log(cost))
        assert row['model'] == [f'{model:.4f}']


def test_seeds_needed_give_the_precision(ladder, data):
    noise, fit = data['ladder']['pair_noise'], data['ladder']['shared_fit']
    table = rows(ladder, 'SEEDS NEEDED')
    assert [row['rung'][0] for row in table] == ['4', 'next']
    for row in table:
        cost = float(row['FLOPs'][0])
        deviation = math.exp(noise['intercept'] + noise['slope'] * math.log(cost))
        assert float(row['pair'][0]) == pytest.approx(deviation, abs=6e-5)
        # The fall of the loss per unit of ln C, by differences.
        slope = (fitted(fit, BASELINE, cost) - fitted(fit, BASELINE, cost * 1.001)) / math.log(
            1.001
        )
        assert float(row['halving'][0]) == pytest.approx(slope * math.log(2), rel=0.01, abs=6e-5)
        for precision in ('5%', '10%', '20%'):
            half, seeds = slope * math.log1p(float(precision[:-1]) / 100), int(row[precision][0])
            assert _half_width(seeds) * deviation <= half * 1.02
            assert seeds == 2 or _half_width(seeds - 1) * deviation > half * 0.98


def _half_width(seeds: int) -> float:
    """Expected, in standard deviations: the mean of a χ distribution times Student's quantile."""
    freedom = seeds - 1
    expected = stats.chi.mean(freedom) / math.sqrt(freedom)
    return stats.t.ppf(0.975, freedom) * expected / math.sqrt(seeds)


# --- Formats -------------------------------------------------------------------------------------


def test_all_formats_have_the_same_numbers(ladder, data):
    text, markdown = FORMATS['text'](ladder), FORMATS['markdown'](ladder)
    for section in ladder_tables(ladder):
        for cell in (cell for row in section.rows for cell in row):
            assert cell in text and escape_markdown(cell) in markdown
    assert text.isascii() and max(map(len, text.splitlines())) <= 120
    assert '\x1b[1mCOMPUTE GAIN' in emphasize(text) or emphasize(text) != text
    lines = list(csv.DictReader(io.StringIO(FORMATS['csv'](ladder))))
    assert len(lines) == len(data['runs']) == 3 * (3 * 4 + 1)
    for line, run in zip(lines, data['runs']):
        rung = ladder.rungs[run['rung'] - 1]
        assert line['rung'] == str(rung.number) and line['rung_label'] == rung.label
        assert float(line['val_loss']) == run['val_loss'] and int(line['params']) == rung.params
    assert data['verdict']['rung'] == 4 and data['verdict']['architecture'] == SWIGLU
    at_top = data['ladder']['rungs'][3]['comparison']
    assert data['verdict']['difference'] == at_top['groups'][0]['difference']['mean']
    assert [rung['extra'] for rung in data['ladder']['rungs']] == [False] * 4 + [True]


def test_text_from_records_is_escaped(tmp_path):
    evil = 'ffn_type=<b>|x|</b>\x1b[31m\u202e'
    curves = {BASELINE: STANDARD, evil: CURVES[SWIGLU]}

    def change(record, place):
        if place.seed == 2:
            interrupt(record)

    write_ladder(tmp_path, curves, params=PARAMS[:2], extra=0, change=change)
    odd = compared(tmp_path)
    assert odd.others == [evil]
    for name in ('text', 'markdown', 'csv'):
        shown = FORMATS[name](odd)
        assert '\x1b' not in shown and '\u202e' not in shown
    assert '<b>' not in FORMATS['markdown'](odd).replace('`', '').split('### LOSS')[0]
    assert json.loads(FORMATS['json'](odd))['ladder']['variants'][1] == evil
