"""One copy of the project for all pages, as it was at first for each of them."""

import pytest
from helpers.sandbox import Sandbox


@pytest.fixture(scope='session')
def shared_sandbox(tmp_path_factory):
    sandbox = Sandbox(tmp_path_factory.mktemp('sandbox'))
    yield sandbox
    sandbox.close()


@pytest.fixture
def sandbox(shared_sandbox):
    shared_sandbox.reset()
    return shared_sandbox
