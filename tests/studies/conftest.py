"""Fixtures of the tests of studies: runs without processes of their own."""

import contextlib
import io

import pytest
import torch

import train
from common.errors import UserError
from studies import runner


class TrainedHere:
    """A stand-in for the process of a run that runs train.py in this process."""

    def __init__(self, command, output, environment, lock):
        text, threads = io.TextIOWrapper(output, encoding='utf-8'), torch.get_num_threads()
        with contextlib.redirect_stdout(text):
            try:
                self.returncode = train.main(command[2:]) or 0
            except UserError as error:
                print(f'train.py: {error}')
                self.returncode = error.exit_code
        text.detach()
        torch.set_num_threads(threads)

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def trained_here(monkeypatch):
    """Train the runs of a study in this process."""
    monkeypatch.setattr(runner, 'start_process', TrainedHere)
