"""train.py in the process of the test, with access to its session and batches."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import model_builder
import train
from common import hardware
from common.errors import run_script
from configurator import read_command_line
from helpers.project import TINY_RUN
from model_builder import Transformer
from records.record import read_record
from records.run_folders import latest_run
from studies.keys import STUDY_KEYS
from training import start_checks
from training.checkpoint import load_latest
from training.session import Session
from training_config import schema


@dataclass
class Run:
    """The results of a run, and the inputs of its model."""

    code: int
    session: Session
    # (tokens, targets) of each call in training, and of each call at evaluations.
    trained_on: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    evaluated_on: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.session.logger.run_folder

    @property
    def record(self) -> dict:
        return read_record(self.folder / 'record.json')

    @property
    def losses(self) -> list[float | None]:
        return [entry['loss'] for entry in self.record['training_iterations']]

    def events(self, kind: str) -> list[dict]:
        return [event for event in self.record['events'] if event['event'] == kind]

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights at the end of the run."""
        return {name: p.detach() for name, p in self.session.model.named_parameters()}

    def saved_weights(self) -> dict[str, torch.Tensor]:
        """The weights in the newest checkpoint."""
        return load_latest(self.folder / 'checkpoints', print)[1][0]['model']


def train_here(dataset: Path, out_dir: Path, **options) -> Run:
    """`python train.py --key=value …` with TINY_RUN as defaults, on one thread."""
    values = {**TINY_RUN, 'dataset': dataset, 'out_dir': out_dir, 'log_style': 'line', **options}
    run = Run(code=-1, session=None)
    forward, set_up, threads = Transformer.forward, train.set_up, torch.get_num_threads()

    def seen_forward(model, tokens, targets=None, **options):
        if targets is not None:
            seen = run.trained_on if model.training else run.evaluated_on
            seen.append((tokens.clone(), targets.clone()))
        return forward(model, tokens, targets, **options)

    def kept_set_up(*arguments):
        run.session = set_up(*arguments)
        return run.session

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(Transformer, 'forward', seen_forward)
        patch.setattr(train, 'set_up', kept_set_up)
        run_script(train.main, [f'--{key}={value}' for key, value in values.items()])
    torch.set_num_threads(threads)
    run.code = exit.value.code
    assert latest_run(out_dir) == run.folder
    return run


def session_here(dataset: Path, out_dir: Path, **options) -> Session:
    """A run that is set up and not started, with TINY_RUN as defaults. It prints its report.

    Without the checks and counts of the start that take most of its time.
    """
    values = {**TINY_RUN, 'dataset': dataset, 'out_dir': out_dir, 'log_style': 'line', **options}
    argv = [f'--{key}={value}' for key, value in values.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start_checks, 'check_model', lambda *_: [])
        patch.setattr(model_builder, 'elementwise_operations', lambda config: 1)
        patch.setattr(hardware, 'git_state', lambda folder: (None, None))
        settings, source = train.read_settings(read_command_line(argv, schema, extra=STUDY_KEYS))
        return train.start_session(settings, source, argv)


def joined(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The sequences of several batches, concatenated: (2, N, T)."""
    return torch.stack([torch.cat(part) for part in zip(*batches)])
