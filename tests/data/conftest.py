"""Shared by the tests of data/: GPT-2's tokenizer."""

import pytest

from data.tokenizer import Tokenizer


@pytest.fixture(scope='session')
def gpt2_tokenizer(no_memory_of_the_user) -> Tokenizer:
    return Tokenizer({'kind': 'gpt2'})
