"""Shared by the tests of data/: GPT-2's tokenizer."""

import pytest

from data.tokenizer import Tokenizer


@pytest.fixture(scope='session')
def gpt2_tokenizer(empty_cache_folder) -> Tokenizer:
    return Tokenizer({'kind': 'gpt2'})
