"""report.py: the page and the picture show what the records hold."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from run_records import STUDY, make_record

import compare_architectures as ca
import report
from comparison.compare import compare
from comparison.formats import render
from comparison.runs import load, read_plan
from errors import UserError

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')


@pytest.fixture
def folder(tmp_path):
    """A study of four variants with two seeds each, ten evaluations a run."""
    points = []
    for n, variant in enumerate(STUDY['variants']):
        for seed in (1, 2):
            record = make_record(
                10 * n + seed, seed=seed, data_seed=seed, architecture=f'a{n}', **variant['asked']
            )
            record['eval_steps'] = [
                {'iter': i, 'val_loss': 3 + 4 * math.exp(-i / 30) + 0.1 * n + 0.01 * seed * (n + 1)}
                for i in range(0, 101, 10)
            ]
            for entry in record['eval_steps']:
                entry |= {'train_loss': 3.0, 'val_bits_per_byte': 1.0}
                entry['train_seconds'] = 0.1 * entry['iter']
            record['summary']['total_flops'] = 1e15 * (1 + n)
            point = f'runs/{n}/seed={seed}'
            run = tmp_path / 'out' / point / record['run_name']
            run.mkdir(parents=True)
            (run / 'record.json').write_text(json.dumps(record))
            points.append({'folder': point, 'variant': variant['label']})
    plan = {**STUDY, 'question': 'Is <b> & c better?', 'points': points}
    (tmp_path / 'out/study.json').write_text(json.dumps(plan))
    read_plan.cache_clear()
    return tmp_path / 'out'


@pytest.fixture
def comparison(folder):
    return compare(*load([folder])[:1])


def test_a_studys_baseline_is_its_first_variant(comparison):
    assert comparison.baseline.members[0].variant == STUDY['variants'][0]['label']
    assert comparison.baseline_reason.startswith('the first of the study')


def test_times_of_runs_beside_one_another_are_not_compared(folder, tmp_path):
    for path in folder.rglob('record.json'):
        record = json.loads(path.read_text())
        record['config']['concurrent_runs'] = 2
        path.write_text(json.dumps(record))
    beside = compare(*load([folder])[:1])
    assert [row.cost for row in beside.equal_cost] == ['tokens', 'flops']
    assert set(''.join(beside.fronts)) <= set('FM')
    text = render(beside)
    assert 'Trained 2 at a time: times are not compared.' in text
    assert 'wall' not in text and 'tokens/s' not in text and 'time (T)' not in text
    report.report(beside, tmp_path / 'report.html')
    assert 'seconds of training' not in (tmp_path / 'report.html').read_text()


class Page(HTMLParser):
    """Counts elements, and what refers to something outside of the page."""

    def __init__(self, text):
        super().__init__()
        self.found, self.outside = {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found[tag] = self.found.get(tag, 0) + 1
        for key, value in attributes:
            if key in ('src', 'href', 'xlink:href') and not value.startswith(('#', 'data:')):
                self.outside.append(value)


def test_the_page_has_everything_inside(folder, tmp_path, capsys):
    path = tmp_path / 'report.html'
    ca.main([str(folder), '--report', str(path)])
    text = path.read_text(encoding='utf-8')
    page = Page(text)
    assert page.found['svg'] == 3 and page.outside == []
    assert 'Is &lt;b&gt; &amp; c better?' in text and '<b> &' not in text
    assert text.index('class="verdict"') < text.index('<svg') < text.index('<table')
    assert STUDY['command'] in text
    for variant in STUDY['variants']:
        assert variant['label'] in text
    # The tables are those of the text.
    for number in re.findall(r'\d\.\d{4}', capsys.readouterr().out):
        assert number in text


def test_samples_stand_side_by_side_and_are_no_markup(folder, tmp_path, capsys):
    texts = {}
    for number, path in enumerate(sorted(folder.rglob('record.json'))):
        record = json.loads(path.read_text())
        texts[number] = f'<script>x{number}</script> & "\x00\x1b[0m\n' + 30 * '<b>line</b>\n'
        sample = {'prompt': '<i>', 'text': texts[number], 'time_ms': 1.0}
        record['eval_steps'][-1]['sample'] = sample
        path.write_text(json.dumps(record))
    path = tmp_path / 'report.html'
    ca.main([str(folder), '--report', str(path)])
    text = path.read_text(encoding='utf-8')
    page = Page(text)
    variants = len(STUDY['variants'])
    assert page.found['figcaption'] == variants and page.outside == []
    assert not page.found.keys() & {'script', 'b', 'i'}
    assert text.count('&lt;i&gt;&lt;script&gt;') == variants
    assert text.count('&lt;b&gt;line&lt;/b&gt;') == 30 * variants  # all of it
    assert '\x00' not in text and '\x1b' not in text


def test_the_curves_are_the_means_of_the_records(comparison):
    figure = report.matplotlib_figure(9, 4)
    report.draw_curves(comparison, figure)
    tokens, flops, seconds = figure.axes
    for axes, scale in ((tokens, 4096), (seconds, 0.1)):
        assert len(axes.lines) == len(comparison.groups)
        for line, group in zip(axes.lines, comparison.groups):
            amounts, losses = line.get_data()
            assert list(amounts) == pytest.approx([scale * i for i in range(10, 101, 10)])
            for place, loss in enumerate(losses):
                each = [run.curve[place].loss for run in group.members]
                assert loss == pytest.approx(sum(each) / len(each))
    assert len(flops.collections) == len(comparison.groups)  # the bands


@pytest.mark.parametrize('suffix', ['.png', '.svg', '.pdf'])
def test_pictures_of_every_kind(comparison, tmp_path, suffix):
    path = tmp_path / f'plot{suffix}'
    report.plot(comparison, path)
    starts = {'.png': b'\x89PNG', '.svg': b'<?xml', '.pdf': b'%PDF'}
    assert path.read_bytes().startswith(starts[suffix])
    assert list(tmp_path.glob('.*tmp')) == []


def test_mistakes(comparison, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r'\.png, \.svg, \.pdf'):
        report.plot(comparison, tmp_path / 'plot.jpeg')
    with pytest.raises(UserError, match='cannot be written'):
        report.report(comparison, tmp_path / 'no/folder.html')
    monkeypatch.setitem(__import__('sys').modules, 'matplotlib.figure', None)
    with pytest.raises(UserError, match='pip install matplotlib'):
        report.plot(comparison, tmp_path / 'plot.png')


@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium on the PATH')
def test_a_browser_shows_the_curves_without_an_error(comparison, tmp_path):
    path = tmp_path / 'report.html'
    report.report(comparison, path)
    probe = (
        '<script>window.onerror=m=>{document.title="ERROR "+m};'
        'window.onload=()=>{const s=[...document.querySelectorAll("svg")]'
        '.map(e=>e.getBoundingClientRect()).filter(r=>r.width>300&&r.height>80).length;'
        'document.body.setAttribute("data-shown",s)}</script></head>'
    )
    path.write_text(path.read_text(encoding='utf-8').replace('</head>', probe, 1), encoding='utf-8')
    options = '--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking'
    done = subprocess.run(
        [
            *(CHROMIUM, *options.split(), '--disable-sync', '--disable-component-update'),
            *(f'--user-data-dir={tmp_path / "browser"}', '--enable-logging=stderr'),
            *('--virtual-time-budget=3000', '--dump-dom', path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert 'data-shown="3"' in done.stdout
    assert 'CONSOLE' not in done.stderr and '<title>ERROR' not in done.stdout
