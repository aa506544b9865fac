"""Links, anchors and file names in the pages; README's size and its table of pages."""

import re

import pytest
from helpers.documents import (
    ALL_PAGES,
    PAGES,
    README,
    SHELL,
    anchors,
    fences,
    internal_links,
    page_name,
    prose,
)
from helpers.project import PROJECT

README_BYTES = 8192
# Files that commands of the pages write, and that a reader has.
WRITTEN = re.compile(
    r'^(out|data/\w+/(input|meta|train|val)|runs?/|config/(mine|my_\w+)\.py|checkpoints/|profile/|path/to/)'
)


@pytest.mark.parametrize('page', ALL_PAGES, ids=page_name)
def test_internal_links_resolve(page):
    broken = []
    for link in internal_links(page):
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_files_named_in_pages_exist():
    """CHANGELOG.md names modules that have moved."""
    paths = {
        path
        for page in ALL_PAGES
        if page.name != 'CHANGELOG.md'
        for path in re.findall(r'`([\w.-]+/[\w./-]+\.\w+)`', prose(page))
    }
    assert len(paths) > 20
    assert [p for p in sorted(paths) if not WRITTEN.match(p) and not (PROJECT / p).exists()] == []


def test_readme_is_short():
    assert len(README.read_bytes()) <= README_BYTES


def test_readme_links_every_page_of_docs():
    text = README.read_text(encoding='utf-8')
    table = text.partition('## Documentation')[2].partition('\n## ')[0]
    linked = set(re.findall(r'\]\((docs/[\w-]+\.md)\)', table))
    assert linked == {page_name(page) for page in PAGES if page.parent.name == 'docs'}


def test_readme_table_of_contents_lists_every_section():
    contents = README.read_text(encoding='utf-8').partition('\n## ')[0]
    sections = re.findall(r'^## (.+)$', prose(README), flags=re.M)
    assert re.findall(r'\[([^\]]+)\]\(#', contents) == sections


@pytest.mark.parametrize('page', ALL_PAGES, ids=page_name)
def test_fences_are_closed_and_have_known_languages(page):
    text = page.read_text(encoding='utf-8')
    assert len(re.findall(r'^```', text, flags=re.M)) == 2 * len(fences(page))
    assert {fence.language for fence in fences(page)} <= {*SHELL, '', 'python', 'json', 'text'}
