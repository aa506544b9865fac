"""Text is measured in columns of a terminal."""

import pytest

from common.text_width import cut_to_width, display_width


@pytest.mark.parametrize(
    ('text', 'width'),
    [
        ('', 0),
        ('abc', 3),
        ('│ é ─', 5),
        ('日本', 4),
        ('📍 Iter', 7),
        ('⚠ x', 3),
        ('⚠\ufe0f x', 4),
        ('e\u0301', 1),
        ('\x1b[1mbold\x1b[0m', 4),
    ],
)
def test_display_width_counts_columns(text, width):
    assert display_width(text) == width


@pytest.mark.parametrize('text', ['日本語のテキスト', 'a📍b📍c📍', 'plain text', 'e\u0301' * 9])
def test_cut_text_fits(text):
    for columns in range(1, 20):
        cut = cut_to_width(text, columns)
        assert columns - 1 <= display_width(cut) <= columns or cut == text
        assert cut == text or (cut[-1] == '…' and text.startswith(cut[:-1]))


def test_cut_text_ends_its_color():
    assert cut_to_width('\x1b[31mwarning\x1b[0m!', 4) == '\x1b[31mwar…\x1b[0m'
