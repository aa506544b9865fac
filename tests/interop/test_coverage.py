"""The table of families that are supported, and its count in the documentation."""

import subprocess
import sys

import pytest
from helpers.project import PROJECT

from interop import TRANSFORMERS
from interop.coverage import FAMILIES, count, status

PAGES = ('docs/pretrained.md', 'README.md')


@pytest.mark.parametrize('page', PAGES)
def test_pages_have_the_count(page):
    assert count() in ' '.join((PROJECT / page).read_text(encoding='utf-8').split())


def test_every_supported_family_is_in_the_table():
    assert len(FAMILIES) == 137
    assert TRANSFORMERS.keys() <= FAMILIES.keys()
    assert {name for name in FAMILIES if status(name).startswith('yes')} == TRANSFORMERS.keys()


def test_aliases_have_the_model_of_another_family():
    for family in TRANSFORMERS.values():
        original = TRANSFORMERS.get(family.alias_of or family.name)
        assert original is not None and original.architecture == family.architecture
        assert not original.alias_of


def test_command_prints_the_table(tmp_path):
    command = [sys.executable, PROJECT / 'interop/coverage.py']
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    lines = out.splitlines()
    assert lines[0].split() == ['afmoe', 'yes'] and lines[-1] == count()
    assert len(lines) == len(FAMILIES) + 1


@pytest.mark.optional
def test_families_are_those_of_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert FAMILIES.keys() <= MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
