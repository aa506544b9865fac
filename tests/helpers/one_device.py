"""Checks on a device that is a GPU or, to test the checks, a CPU."""

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch

from components.moe import GROUPED_MM_CAPABILITIES
from helpers.device_waits import Operations

HAS_CUDA = torch.cuda.is_available()
CUDA = pytest.mark.gpu


def each(name: str, values: Iterable[str], dry: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrize a test of `device` with values on a GPU, if there is one, and with those in `dry`
    on a CPU."""
    cases = [pytest.param('cpu', value, id=f'dry-{value}') for value in dry]
    if HAS_CUDA:
        cases += [pytest.param('cuda', v, id=f'cuda-{v}', marks=CUDA) for v in values]
    return pytest.mark.parametrize(('device', name), cases, indirect=['device'])


def skip_if_experts_wait(device: torch.device) -> None:
    """Skip a test of waits on a GPU whose grouped products read the sizes of the groups on the
    host."""
    if device.type != 'cuda':
        return
    if torch.cuda.get_device_capability(device)[0] not in GROUPED_MM_CAPABILITIES:
        pytest.skip('the grouped products of this GPU wait for it')


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """A context in which an operation that waits for the device is an error."""
    if device.type != 'cuda':
        with Operations() as counted:
            yield
        assert not counted.waits
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


@contextmanager
def one_rank() -> Iterator[None]:
    """A context in which this process is the only one of a job, with a real process group."""
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        port = listener.getsockname()[1]
    variables = {'RANK': 0, 'LOCAL_RANK': 0, 'WORLD_SIZE': 1, 'MASTER_PORT': port}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**variables, 'MASTER_ADDR': 'localhost'}.items():
            patch.setitem(os.environ, key, str(value))
        try:
            yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
