"""Tests of a CUDA device: python -m pytest tests/gpu

Without one, they run only "dry": on a CPU, with fewer cases, so that the tests themselves are
tested. With one, they run both ways; `-m gpu` selects those on the GPU.
"""

import pytest
import torch
from helpers.one_device import CUDA, HAS_CUDA

from common import hardware


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(__file__.rpartition('conftest')[0]):
            item.add_marker('slow')


DEVICES = [pytest.param('cpu', id='dry'), *([pytest.param('cuda', marks=CUDA)] * HAS_CUDA)]


@pytest.fixture(params=DEVICES)
def device(request, one_thread):
    """The device, with the settings of a run."""
    device = hardware.select_device(request.param)
    before = torch.backends.cuda.matmul.allow_tf32
    hardware.tune(device, deterministic=False)
    torch.compiler.reset()  # the number of compiled functions is limited
    yield device
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.use_deterministic_algorithms(False)
    if device.type == 'cuda':
        torch.cuda.empty_cache()
