"""The table of families beside transformers: its figures and its exit code."""

import pytest
from stress import family_parity

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]


def test_table_of_an_exact_family(capsys):
    assert family_parity.main('opt') == 0
    header, _, row, *_, last = capsys.readouterr().out.splitlines()
    assert row.count('|') == header.count('|') and row.startswith('| `opt` |')
    assert row.endswith('| 66 of 66 |') and last == 'families: 1; over the bounds: none'


def test_difference_is_named_and_sets_the_exit_code(capsys, monkeypatch):
    monkeypatch.setitem(family_parity.BOUNDS, 'gradients', 1e-12)
    assert family_parity.main('opt') == 1
    assert capsys.readouterr().out.splitlines()[-1] == 'families: 1; over the bounds: opt'
