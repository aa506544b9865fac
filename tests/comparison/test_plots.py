"""The plots of a comparison show the values of the records and do not mislead."""

import errno
import itertools
import os
import re
from functools import partial

import pytest
from helpers.run_records import STUDY, compared, decaying, study_record, write_study

import compare_architectures as ca
from common import files
from common.errors import UserError
from comparison import plots
from comparison.intervals import difference_rows, effect_rows
from comparison.panels import caption, panels_of
from comparison.picture_labels import (
    BLOWN_UP,
    LONGEST_LABEL,
    STYLED_GROUPS,
    UNFINISHED,
    ellipsized,
    legend,
    short_labels,
    style_number,
)
from comparison.runs import DIVERGED

pytestmark = [pytest.mark.optional, pytest.mark.slow]

matplotlib = pytest.importorskip('matplotlib')

PRESETS = [{'label': f'arch_preset=p{n}', 'asked': {'arch_preset': f'p{n}'}} for n in range(3)]


def study(folder, change=lambda record, n, seed: None, variants=PRESETS, seeds=(1, 2, 3), **plan):
    """The comparison of a study after `change(record, variant number, seed)` on each record."""
    records = []
    for n in range(len(variants)):
        of_variant = [study_record(n, seed, decaying(n, seed)) for seed in seeds]
        for seed, record in zip(seeds, of_variant):
            change(record, n, seed)
        records.append(of_variant)
    return compared(write_study(folder, variants, records, tuned=[], **plan))


def set_losses(record, losses):
    record['eval_steps'] = record['eval_steps'][: 1 + len(losses)]
    for entry, loss in zip(record['eval_steps'][1:], losses):
        entry['val_loss'] = loss
    record['summary']['final_iter'] = record['eval_steps'][-1]['iter']


def diverge(record):
    """Let the run diverge at half of its iterations, after a loss far above all others."""
    set_losses(record, [3.5, 3.4, 3.3, 80.0, None])
    record['status'] = 'failed'
    record['summary']['nonfinite_updates'] = 1


def drawn(comparison, panel):
    """The axes of a panel."""
    with plots.drawing():
        axes = plots.new_figure(4, 3).subplots()
        plots.draw_panel(comparison, panel, axes)
    return axes


def lines_of(axes):
    """The drawn lines by their label."""
    return {line.get_label(): line for line in axes.lines}


# --- Curves --------------------------------------------------------------------------------------


def test_curves_are_seed_means_with_range(tmp_path):
    comparison = study(tmp_path)
    curves, _ = panels_of(comparison)
    assert [panel.title for panel in curves] == [
        'Loss over tokens and seconds of training',
        'Loss over training FLOPs',
    ]
    axes = drawn(comparison, curves[0])
    assert axes.get_title() == curves[0].title
    for n, group in enumerate(comparison.groups):
        amounts, losses = lines_of(axes)[f'#{n + 1}'].get_data()
        # The first quarter is left out.
        assert list(amounts) == pytest.approx([4096 * i for i in range(30, 101, 10)])
        each = [decaying(n, seed)[2:] for seed in (1, 2, 3)]
        assert list(losses) == pytest.approx([sum(values) / 3 for values in zip(*each)])
        assert losses[-1] == pytest.approx(group.loss)
    bands = [band.get_paths()[0].vertices for band in axes.collections]
    for n, band in enumerate(reversed(bands)):
        each = [decaying(n, seed)[2:] for seed in (1, 2, 3)]
        assert band[:, 1].min() == pytest.approx(min(map(min, each)))
        assert band[:, 1].max() == pytest.approx(max(map(max, each)))
    assert 'bands span the lowest to the highest seed' in caption(curves)
    assert 'first quarter' in caption(curves)


def test_curves_and_bands_are_not_cut_off(tmp_path):
    comparison = study(tmp_path)
    for panel in itertools.chain(*panels_of(comparison)):
        axes = drawn(comparison, panel)
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        for line in axes.lines:
            assert left < line.get_xdata().min() <= line.get_xdata().max() < right
            assert bottom < line.get_ydata().min() <= line.get_ydata().max() < top
        for band in axes.collections:
            vertices = band.get_paths()[0].vertices
            assert bottom < vertices[:, 1].min() <= vertices[:, 1].max() < top


def blow_up(record):
    """Let the run end far above its initial loss."""
    set_losses(record, [*decaying(1, 1)[:6], 20.0, 25.0, 28.0, 30.0])


@pytest.mark.parametrize(
    ('change', 'ending', 'mark'), [(diverge, DIVERGED, 'X'), (blow_up, BLOWN_UP, '^')]
)
def test_failed_run_is_marked_and_sets_no_limit(tmp_path, change, ending, mark):
    without = study(tmp_path / 'without', seeds=(2, 3))
    comparison = study(
        tmp_path / 'with', lambda record, n, seed: change(record) if (n, seed) == (1, 1) else None
    )
    group = next(g for g in comparison.groups if g.runs[0].variant == 'arch_preset=p1')
    rank = comparison.groups.index(group) + 1
    curves, fronts = panels_of(comparison)
    clean, _ = panels_of(without)
    for panel, before in zip(curves, clean):
        axes = drawn(comparison, panel)
        assert axes.get_xlim() == pytest.approx(before.x_limits)
        assert axes.get_ylim()[1] < 5
        end = lines_of(axes)[f'#{rank} {ending}']
        assert end.get_marker() == mark and not end.get_clip_on()
        (x,), (y,) = end.get_data()
        last = next(line for line in panel.lines if line.ending == ending).points[-1]
        assert x == pytest.approx(last.amount)
        assert y == pytest.approx(axes.get_ylim()[1])  # its loss is above the limit: at the edge
        # The curve of the group is the mean of the other seeds.
        mean = lines_of(axes)[f'#{rank}'].get_ydata()
        assert mean[-1] == pytest.approx(sum(decaying(1, seed)[-1] for seed in (2, 3)) / 2)
    for panel in fronts:
        assert panel.y_limits[1] < 5
        assert lines_of(drawn(comparison, panel))[f'#{rank} {ending}'].get_marker() == mark
    assert dict(legend(comparison))[rank] == f'#{rank} p1 (1 of 3 {ending})'
    assert {DIVERGED: 'runs that diverged', BLOWN_UP: 'above their untrained loss'}[ending] in (
        caption(curves)
    )


def test_unfinished_run_is_marked_at_last_point(tmp_path):
    def change(record, n, seed):
        if (n, seed) == (2, 3):
            record['status'] = 'running'
            set_losses(record, decaying(2, 3)[:5])

    comparison = study(tmp_path, change)
    panel = panels_of(comparison)[0][0]
    end = lines_of(drawn(comparison, panel))[f'#3 {UNFINISHED}']
    assert end.get_marker() == '>'
    assert [*end.get_xdata(), *end.get_ydata()] == pytest.approx([50 * 4096, decaying(2, 3)[4]])
    assert dict(legend(comparison))[3] == '#3 p2 (1 of 3 not finished)'
    assert 'have not finished' in caption([panel])


def test_loss_spike_sets_no_limit(tmp_path):
    def change(record, n, seed):
        if (n, seed) == (0, 1):
            record['eval_steps'][6]['val_loss'] = 900.0

    curves, _ = panels_of(study(tmp_path, change))
    assert all(panel.y_limits[1] < 5 for panel in curves)


def test_all_diverged_is_drawn(tmp_path):
    comparison = study(tmp_path, lambda record, n, seed: diverge(record))
    curves, fronts = panels_of(comparison)
    assert curves and not fronts
    assert len(drawn(comparison, curves[0]).lines) == 2 * 9  # a line and a mark for each run
    assert 'baseline, 3 of 3 diverged' in legend(comparison)[0][1]
    with plots.drawing():
        plots.figure_of(comparison).savefig(tmp_path / 'plot.png')


def test_single_evaluation_is_a_point(tmp_path):
    def change(record, n, seed):
        if n == 1:
            record['eval_steps'] = [record['eval_steps'][0], record['eval_steps'][-1]]

    comparison = study(tmp_path, change)
    point = lines_of(drawn(comparison, panels_of(comparison)[0][0]))['#2']
    assert len(point.get_xdata()) == 1 and point.get_marker() not in (None, 'None', '')


def test_single_evaluations_are_shown_once_against_costs(tmp_path):
    def change(record, n, seed):
        record['eval_steps'] = [record['eval_steps'][0], record['eval_steps'][-1]]

    curves, fronts = panels_of(study(tmp_path, change))
    assert curves == [] and fronts


def test_empty_plot_has_a_note(tmp_path):
    comparison = study(tmp_path, lambda record, n, seed: set_losses(record, []))
    assert panels_of(comparison) == ([], [])
    with plots.drawing():
        figure = plots.figure_of(comparison)
        assert 'No trained model has a validation loss' in figure.texts[0].get_text()
        figure.savefig(tmp_path / 'plot.png')


# --- Costs ---------------------------------------------------------------------------------------


def test_no_front_panel_for_equal_costs(tmp_path):
    """Costs are equal within the range of the seeds or within a percent."""

    def change(record, n, seed):
        record['summary']['peak_memory_gb'] = 0.36 + 0.001 * n  # 0.6 % at most
        record['summary']['total_flops'] = 2.4e12 * (1 + 0.02 * ((n + seed) % 3))  # noise alone
        record['eval_steps'][-1]['train_seconds'] = 10.0 + n

    _, fronts = panels_of(study(tmp_path, change))
    assert [panel.title for panel in fronts] == ['Final loss against seconds of training']


def test_proportional_costs_share_a_panel(tmp_path):
    def change(record, n, seed):
        flops = 1e9 * (1 + 0.001 * n)
        record['startup_info']['flops'] = {'per_token': flops, 'per_token_causal': flops}
        for entry in record['eval_steps']:
            entry['train_seconds'] = entry['iter'] * (1 + n)
        record['summary']['peak_memory_gb'] = 2.0 * (1 + n)  # in proportion to the seconds

    curves, fronts = panels_of(study(tmp_path, change))
    assert [panel.title for panel in curves] == [
        'Loss over tokens and training FLOPs',
        'Loss over seconds of training',
    ]
    assert curves[0].cost == 'tokens\n(in proportion: training FLOPs)'
    assert [' '.join(panel.title.split()) for panel in fronts] == [
        'Final loss against training FLOPs, seconds of training and peak memory, GB'
    ]


def test_front_panels_show_means_ranges_and_front(tmp_path):
    comparison = study(
        tmp_path, lambda r, n, s: set_losses(r, [loss - 0.3 * n for loss in decaying(n, s)])
    )
    _, fronts = panels_of(comparison)
    panel = fronts[0]
    axes = drawn(comparison, panel)
    assert list(panel.front) == sorted(
        (1e15 * (1 + int(group.runs[0].architecture[1])), group.loss) for group in comparison.groups
    )
    assert axes.lines[0].get_linestyle() == '--'
    assert 'no other has a lower loss at the same or lower cost' in caption(fronts)
    for bar, line in zip(axes.collections, reversed(panel.lines)):
        losses = [*comparison.groups[line.rank - 1].losses.values()]
        (segment,) = bar.get_segments()
        assert list(segment[:, 1]) == pytest.approx([min(losses), max(losses)])


# --- Names ---------------------------------------------------------------------------------------


def test_labels_drop_the_varied_option(tmp_path):
    assert short_labels(study(tmp_path / 'a')) == ['p0', 'p1', 'p2']
    assert study(tmp_path / 'b').labels[0] == 'arch_preset=p0'  # tables show the whole label
    variants = [
        {'label': f'arch_preset=p{n} bias=False', 'asked': {'arch_preset': f'p{n}', 'bias': False}}
        for n in range(3)
    ]
    assert short_labels(study(tmp_path / 'c', variants=variants))[0] == 'p0 bias=False'
    ablation = [
        {'label': 'reference', 'asked': {}},
        {'label': 'norm=rms', 'asked': {'norm': 'rms'}},
        {'label': 'norm=none', 'asked': {'norm': 'none'}},
    ]
    assert short_labels(study(tmp_path / 'd', variants=ablation)) == ['reference', 'rms', 'none']
    windows = [
        {'label': f'L.sliding_window={n}', 'asked': {'layer_kinds': {'L': {'sliding_window': n}}}}
        for n in range(3)
    ]
    assert short_labels(study(tmp_path / 'e', variants=windows)) == ['0', '1', '2']


ODD = [
    'a$x^$',
    '_hidden',
    'x' * 100 + 'y' * 100,
    '<b>&\n\x1b[31m\u202e\ud800',
    '中文 \U0001f600',
    '',
]


@pytest.mark.slow
def test_any_name_is_drawn_verbatim(tmp_path, recwarn):
    variants = [{'label': name, 'asked': {'ffn_type': name}} for name in ODD]
    comparison = study(tmp_path, variants=variants)
    with plots.drawing():
        figure = plots.figure_of(comparison)
        (texts,) = [part.legends[0].get_texts() for part in figure.subfigs if part.legends]
        shown = [text.get_text() for text in texts]
        assert not any(text.get_parse_math() for text in texts)
        axes = plots.new_figure(4, 3).subplots()
        plots.draw_rows(difference_rows(comparison), axes)
        assert not any(text.get_parse_math() for text in axes.texts)
        assert len(axes.texts) == len(ODD) - 1
    assert shown[0] == '#1 a$x^$ (baseline)'
    assert shown[1] == '#2 _hidden'
    assert shown[2] == f'#3 {"x" * 24}…{"y" * 23}'
    assert shown[3] == r'#4 <b>&\n\x1b[31m\u202e\ud800'
    assert shown[4].startswith(r'#5 \u4e2d\u6587 ')  # the font lacks the characters
    for suffix in plots.SUFFIXES:
        plots.save(partial(plots.figure_of, comparison), tmp_path / f'plot{suffix}')
    assert '<b>' not in (tmp_path / 'plot.svg').read_text()
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize('length', [LONGEST_LABEL, LONGEST_LABEL + 1, 200])
def test_long_names_keep_both_ends(length):
    text = ''.join(chr(ord('a') + i % 26) for i in range(length))
    short = ellipsized(text)
    assert len(short) == min(length, LONGEST_LABEL)
    assert re.fullmatch(re.escape(short).replace('…', '.*'), text)


def test_groups_have_distinct_styles_and_rest_shares_one(tmp_path):
    variants = [{'label': f'n={n}', 'asked': {'n': n}} for n in range(20)]
    comparison = study(tmp_path, variants=variants, seeds=(1, 2))
    entries = legend(comparison)
    assert len(entries) == 1 + STYLED_GROUPS + 1
    assert entries[-1][1] == 'the others, from #16'
    looks = [tuple(plots.style_of(style_number(comparison, rank)).items()) for rank, _ in entries]
    assert len(set(looks)) == len(looks)


# --- Effects -------------------------------------------------------------------------------------

GRID = [{'label': v['label'], 'asked': v['asked']} for v in STUDY['variants']]


def test_effects_are_drawn_with_intervals(tmp_path):
    comparison = study(tmp_path, variants=GRID)
    rows = effect_rows(comparison)
    assert [row.text for row in rows] == [
        'ffn_type: swiglu against standard',
        'bias: False against True',
    ]
    with plots.drawing():
        axes = plots.new_figure(4, 3).subplots()
        plots.draw_rows(rows, axes)
    for row, segments, (effect, correction) in zip(rows, axes.collections, comparison.effects):
        ((start, end),) = segments.get_segments()
        interval = correction.interval
        assert [start[0], end[0]] == pytest.approx([interval.low, interval.high])
        assert row.mean == effect.mean
    assert [text.get_text() for text in axes.texts] == [row.text for row in rows]


def test_single_option_has_no_main_effects(tmp_path):
    comparison = study(tmp_path)
    assert comparison.effects == []
    for row, verdict in zip(difference_rows(comparison), comparison.verdicts[1:]):
        assert (row.low, row.high) == (verdict.test.interval.low, verdict.test.interval.high)
        assert row.finding == verdict.text == 'worse'


# --- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('suffix', ['.png', '.svg', '.PDF'])
def test_pictures_of_every_kind(tmp_path, suffix):
    path = tmp_path / f'plot{suffix}'
    plots.save(partial(plots.figure_of, study(tmp_path / 'study')), path)
    starts = {'.png': b'\x89PNG', '.svg': b'<?xml', '.PDF': b'%PDF'}
    assert path.read_bytes().startswith(starts[suffix])
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name, 'study']


@pytest.mark.slow
def test_user_matplotlib_settings_have_no_effect(tmp_path):
    comparison = study(tmp_path / 'study')
    plots.save(partial(plots.figure_of, comparison), tmp_path / 'a.svg')
    with matplotlib.rc_context({'text.usetex': True, 'lines.linewidth': 9, 'font.size': 30}):
        plots.save(partial(plots.figure_of, comparison), tmp_path / 'b.svg')
        assert matplotlib.rcParams['font.size'] == 30

    def without_date(path):
        return re.sub(r'<dc:date>.*</dc:date>', '', path.read_text())

    assert without_date(tmp_path / 'a.svg') == without_date(tmp_path / 'b.svg')


@pytest.mark.parametrize(
    ('option', 'name', 'message'),
    [
        ('--plot', 'plot.jpeg', r'ends in \.png or \.svg or \.pdf, for example --plot=.*plot\.png'),
        ('--report', 'page.png', r'ends in \.html or \.htm, for example --report=.*page\.html'),
        ('--plot', 'plot', 'ends in'),
        (
            '--plot',
            'no/plot.png',
            r'the folder .*no does not exist\. Create it first: mkdir -p .*no',
        ),
        ('--report', 'study.json/r.html', 'study.json is a file, not a folder'),
        ('--report', '.', 'is a folder: give the name of a file'),
    ],
)
def test_bad_plot_path_is_one_message(tmp_path, option, name, message):
    study(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        ca.main([str(tmp_path), f'{option}={tmp_path / name}'])
    assert len(error.value.problems) == 1


def test_full_disk_loses_picture_not_text(tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    study(tmp_path)
    monkeypatch.setattr(files.os, 'fsync', full)
    with pytest.raises(UserError, match=r'cannot be written \(No space left'):
        ca.main([str(tmp_path), f'--plot={tmp_path / "plot.png"}'])
    assert not [*tmp_path.glob('plot*')]
    assert 'RANKING' in capsys.readouterr().out


@pytest.mark.parametrize('option', ['--plot=p.png', '--report=r.html'])
def test_missing_matplotlib_is_one_line(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__('sys').modules, 'matplotlib', None)
    with pytest.raises(UserError, match='pip install matplotlib') as error:
        ca.main([option])  # raised before the search for runs
    assert len(error.value.problems) == 1 and '\n' not in str(error.value)
