"""The captures in docs/comparing.md and docs/studies.md have the words of the current output."""

import re

import pytest
from helpers.project import PROJECT
from helpers.run_records import compared, decaying, study_record, write_study

from common.console_output import displayed
from comparison.cost_tables import COST_TO_BASELINE
from comparison.formats import emphasize, render_text

NORMS = [{'normalization': name} for name in ('layernorm', 'rmsnorm', 'none')]
SHIFTS = {  # differences of the loss; the two options of the grid interact
    'comparing.md': [0.0, 0.0, 0.5],
    'studies.md': [0.0, -0.4, -0.3, 0.2],
}
GRIDS = {
    'comparing.md': NORMS,
    'studies.md': [
        {'warmup_iters': warmup, 'depth_scaled_init': scaled}
        for warmup in (0, 100)
        for scaled in (True, False)
    ],
}


def losses(n, seed, shift):
    """Ten losses, with noise by variant and seed."""
    return [loss + shift + 0.01 * (n * seed % 3) for loss in decaying(0, seed)]


@pytest.fixture(params=GRIDS)
def page_and_output(request, tmp_path):
    """A page and the output for a small study like that of the page."""
    points, shifts = GRIDS[request.param], SHIFTS[request.param]
    variants = [
        {'label': ' '.join(f'{k}={v}' for k, v in point.items()), 'asked': point}
        for point in points
    ]
    records = [
        [study_record(n, seed, losses(n, seed, shift), points[n]) for seed in (1, 2, 3, 4, 5)]
        for n, shift in enumerate(shifts)
    ]
    folder = write_study(tmp_path, variants, records, tuned=[], baseline=variants[0]['label'])
    page = (PROJECT / 'docs' / request.param).read_text(encoding='utf-8')
    return page, render_text(compared(folder))


def test_titles_and_verdicts_are_bold_on_color_terminal(page_and_output, monkeypatch):
    _, output = page_and_output
    monkeypatch.setenv('FORCE_COLOR', '1')
    monkeypatch.delenv('NO_COLOR', raising=False)
    colored = displayed(emphasize(output), None)
    assert colored.startswith(output[0]) or colored.startswith('\x1b[1m')
    bold = re.findall('\x1b\\[1m(.*?)\x1b\\[0m', colored)
    assert len([text for text in bold if text.isupper()]) >= 3
    monkeypatch.setenv('NO_COLOR', '1')
    assert displayed(emphasize(output), None) == displayed(output, None)


def captured_sections(page):
    """The title and notes of each captured section, and the names of its columns."""
    for language, fence in re.findall(r'^```(\w*)\n(.*?)^```$', page, flags=re.M | re.S):
        for block in [] if language else fence.split('\n\n'):
            match = re.search(r'^(?:#|option|with) {2,}.*', block, flags=re.M)
            if match and re.match('[A-Z ]{4,}', block) and not block.startswith('WARNINGS'):
                yield ' '.join(block[: match.start()].split()), match[0].split()


def test_captures_have_titles_notes_and_columns_of_output(page_and_output):
    page, output = page_and_output
    words = ' '.join(output.split())
    captures = list(captured_sections(page))
    assert captures
    for text, columns in captures:
        if text.startswith('LOSS AT EQUAL COST'):  # its columns are amounts
            columns = columns[:1]
        if text.startswith('OPTIONS'):  # one column for each run
            columns = columns[:2]
        if text.startswith('COST'):  # a note on Pareto fronts may follow
            columns = []
        assert ' '.join([text, *columns]) in words


def test_page_names_every_section_and_verdict():
    page = (PROJECT / 'docs/comparing.md').read_text(encoding='utf-8')
    source = ''.join(
        (PROJECT / f'comparison/{name}.py').read_text(encoding='utf-8')
        for name in ('tables', 'loss_tables', 'cost_tables')
    )
    titles = {
        'RANKING',
        'VERDICT',
        COST_TO_BASELINE,
        *re.findall(r"Section\(\s*f?'([A-Z ]{4,}[A-Z])", source),
    }
    assert len(titles) > 8
    assert [title for title in titles if title not in page] == []
