"""The HTML report: the answer first and last, the tables of the text, everything in one file."""

import html
import json
import re
import shutil
import subprocess

import pytest
from helpers.ladder_records import write_ladder
from helpers.pages import Page
from helpers.run_records import STUDY, compared, decaying, study_record, write_study

import compare_architectures as ca
from comparison import html_page, html_report, ladder_report
from comparison.formats import one_line, render_text
from comparison.headline import headline
from comparison.tables import tables

pytestmark = [pytest.mark.optional, pytest.mark.slow]

pytest.importorskip('matplotlib')
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
FLAGS = [
    *('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'),
    *('--disable-sync', '--disable-background-networking', '--disable-component-update'),
    *('--hide-scrollbars', '--enable-logging=stderr'),
    *('--virtual-time-budget=3000', '--allow-file-access-from-files'),
]


def gated_study(folder):
    """A study of four variants with two seeds each, ten evaluations a run."""
    records = [
        [study_record(n, seed, decaying(n, seed), variant['asked']) for seed in (1, 2)]
        for n, variant in enumerate(STUDY['variants'])
    ]
    question = 'Is <b> & c\x00\u202e better?'
    return write_study(folder, STUDY['variants'], records, question=question)


@pytest.fixture
def folder(tmp_path):
    return gated_study(tmp_path / 'out')


@pytest.fixture(scope='module')
def comparison(tmp_path_factory):
    return compared(gated_study(tmp_path_factory.mktemp('study')))


@pytest.fixture(scope='module')
def page_text(comparison):
    return html_report.report_page(comparison)


def change_records(folder, change):
    for number, path in enumerate(sorted(folder.rglob('record.json'))):
        record = json.loads(path.read_text())
        change(number, record)
        path.write_text(json.dumps(record))
    return compared(folder)


@pytest.mark.slow
def test_page_is_self_contained(folder, tmp_path, capsys):
    path = tmp_path / 'report.html'
    ca.main([str(folder), '--report', str(path)])
    text = path.read_text(encoding='utf-8')
    page = Page(text)
    assert page.outside == [] and 'url(http' not in text and '@import' not in text
    assert r'<h1>Is &lt;b&gt; &amp; c\x00\u202e better?</h1>' in text and '<b> &' not in text
    assert STUDY['command'] in text
    for variant in STUDY['variants']:
        assert variant['label'] in text
    # The tables have the figures of the text.
    for number in re.findall(r'\d\.\d{4}', capsys.readouterr().out):
        assert number in text


def test_page_has_every_table_cell_of_text(comparison, page_text):
    texts = Page(page_text).texts
    for section in tables(comparison):
        for row in (section.header, *section.rows):
            for cell in row:
                assert one_line(cell) in texts or cell == ''
        assert all(note in texts for note in section.notes)


def test_page_answer_is_first_and_last(comparison, page_text):
    texts = [text for text in Page(page_text).texts if text.strip()]
    answer = headline(comparison)
    assert texts[1] == texts[-1] == answer
    assert texts.index(answer) < texts.index('Curves')


def test_page_shows_failures_reasons_and_tuning(folder):
    def change(number, record):
        if number == 2:  # the first seed of the second variant
            record['status'] = 'failed'
            record['summary']['nonfinite_updates'] = 1
            record['eval_steps'] = record['eval_steps'][:5]

    comparison = change_records(folder, change)
    text = html_report.report_page(comparison)
    assert '1 of 2 seeds finished, 1 diverged' in text
    assert '1 of 2 diverged' in text  # in the legends
    reasons = [reason for verdict in comparison.verdicts for reason in verdict.reasons]
    assert reasons and all(html_page.escaped(reason) in text for reason in reasons)
    assert '<h2>TUNING</h2>' in text and 'learning_rate' in text


def test_page_is_accessible(page_text):
    page = Page(page_text)
    assert page.all('html') == [{'lang': 'en'}]
    assert any(meta.get('name') == 'viewport' for meta in page.all('meta'))
    assert page.count('main') == 1 and page.count('h1') == 1
    assert page.count('th') and all(header['scope'] == 'col' for header in page.all('th'))
    images = [div for div in page.all('div') if div.get('role') == 'img']
    assert len(images) == 5  # differences, curves over tokens and FLOPs, one front, effects
    assert all(len(image['aria-label']) > 20 for image in images)
    drawings = [svg for svg in page.all('svg') if svg.get('aria-hidden') != 'true']
    assert len(drawings) == len(images)
    names = [attributes['id'] for _, attributes in page.elements if 'id' in attributes]
    assert len(names) == len(set(names))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page_text))
    assert used <= set(names)


def test_times_of_concurrent_runs_are_not_compared(folder):
    concurrent = change_records(
        folder, lambda _, record: record['config'].update(concurrent_runs=2)
    )
    assert [row.cost for row in concurrent.equal_cost] == ['tokens', 'flops']
    assert set(''.join(concurrent.fronts)) <= set('FM')
    text = render_text(concurrent)
    assert '2 runs trained at the same time, so times are not compared.' in text
    assert 'wall' not in text and 'tokens/s' not in text and 'time (T)' not in text
    assert 'seconds of training' not in html_report.report_page(concurrent)


def test_samples_are_side_by_side_and_escaped(folder):
    def change(number, record):
        text = f'<script>x{number}</script> & "\x00\x1b[0m\n' + 30 * '<b>line</b>\n'
        record['eval_steps'][-1]['sample'] = {'prompt': '<i>', 'text': text, 'time_ms': 1.0}

    comparison = change_records(folder, change)
    text = html_report.report_page(comparison)
    page = Page(text)
    variants = len(STUDY['variants'])
    assert page.outside == [] and not {'script', 'b', 'i'} & {tag for tag, _ in page.elements}
    assert text.count('&lt;i&gt;&lt;script&gt;') == variants
    assert text.count('&lt;b&gt;line&lt;/b&gt;') == 30 * variants  # all of it
    assert '\x00' not in text and '\x1b' not in text


def test_odd_names_are_shown_verbatim(tmp_path):
    odd = ['a$x^$', '<script>alert(1)</script>', '"onload="x', 'line\nend\x1b[2J', 'y' * 200]
    variants = [{'label': name, 'asked': {'ffn_type': name}} for name in odd]
    records = [[study_record(n, s, decaying(n, s)) for s in (1, 2)] for n in range(len(odd))]
    comparison = compared(write_study(tmp_path, variants, records, tuned=[]))
    text = html_report.report_page(comparison)
    page = Page(text)
    assert page.count('script') == 0 and '\x1b' not in text
    for name in odd:
        assert one_line(name) in page.texts
    assert not any('onload' in attributes for _, attributes in page.elements)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium on the PATH')
def test_pages_fit_narrow_screen_in_browser(page_text, tmp_path):
    """Only tables are wider than the screen, and the labels of the plots are legible.

    The pages are those of a comparison and of a ladder.
    """
    probe = """<script>
    window.onerror = m => { document.title = 'ERROR ' + m };
    window.onload = () => {
      const box = e => e.getBoundingClientRect(), root = document.documentElement;
      const drawings = [...document.querySelectorAll('[role=img] svg')];
      const texts = drawings.flatMap(e => [...e.querySelectorAll('text')]);
      const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
      const result = {
        width: root.clientWidth, content: root.scrollWidth,
        drawings: drawings.map(e => [box(e).left, box(e).right]),
        smallest: Math.min(...texts.map(e => box(e).height)),
        outside: texts.filter(e => box(e).left < box(e.ownerSVGElement).left - 1
          || box(e).right > box(e.ownerSVGElement).right + 1).map(e => e.textContent),
        overlapping: texts.flatMap((e, i) => texts.slice(i + 1)
          .filter(other => meet(box(e), box(other))).map(o => [e.textContent, o.textContent])),
      };
      document.body.setAttribute('data-shown', JSON.stringify(result));
    };
    </script></head>"""
    frame = tmp_path / 'frame.html'  # a window of Chromium is at least 500 pixels wide
    ladder = write_ladder(tmp_path / 'ladder')
    pages = {'page.html': page_text, 'ladder.html': ladder_report.report_page(compared(ladder))}
    for name, text in pages.items():
        (tmp_path / name).write_text(text.replace('</head>', probe, 1), encoding='utf-8')
    frame.write_text(
        ''.join(
            f'<iframe src="{name}" style="width:420px;height:900px;border:0"></iframe>'
            for name in pages
        )
        + '<script>onload=()=>setTimeout(()=>{document.title="["+'
        '[...document.querySelectorAll("iframe")].map(e=>e.contentDocument.body.dataset.shown)'
        '+"]"},200)</script>'
    )
    done = subprocess.run(
        [
            *(CHROMIUM, *FLAGS, f'--user-data-dir={tmp_path / "browser"}'),
            *('--dump-dom', frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert 'CONSOLE' not in done.stderr and '<title>ERROR' not in done.stdout
    measured = json.loads(html.unescape(re.search(r'<title>(.*?)</title>', done.stdout)[1]))
    assert len(measured) == 2
    for shown in measured:
        assert shown['width'] == 420 and shown['content'] <= 420
        assert len(shown['drawings']) == 5
        assert all(left >= 0 and 340 < right - left <= 420 for left, right in shown['drawings'])
        assert shown['smallest'] >= 9 and shown['outside'] == shown['overlapping'] == []
