"""The processes of a study: each trial is a separate `train.py` with its own folder.

While a `StudyRunner` is active, SIGINT, SIGTERM and SIGHUP stop its trials, and then the study.
"""

import contextlib
import ctypes
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

import torch

from common.errors import UserError
from common.files import write_file
from common.layer_table import used_values
from common.live_region import write_in_signal_handler
from comparison.conditions import REPORTING_OPTIONS
from configurator import flatten
from planning import micro_batch
from records.record import read_outline
from records.record_types import Record
from records.run_folders import latest_run
from studies.grid import Study, merged_settings
from studies.lock import study_lock
from studies.outcome import (
    Outcome,
    count_oom_kills,
    last_line,
    outcome_from_exit,
    outcome_from_record,
    summary_value,
)
from studies.points import arguments, merged_values
from studies.trials import TIMING, Trial
from studies.variants import RunContext
from training.signals import stop_signals
from training_config import Settings, schema

if TYPE_CHECKING:
    from studies.progress import StudyProgress

TRAIN = Path(__file__).resolve().parents[1] / 'train.py'
# Options for the place and the output of a run: runs that differ only in them are the same.
PLACEMENT_OPTIONS = REPORTING_OPTIONS | {'init_from', 'resume_run', 'verify_data', 'debug'}
# In the folder of a trial: {'start_seconds': of its process, until the run began}.
PROCESS = 'process.json'
# Folder of torch.compile's caches, shared by all runs; a hidden one, in which no runs are searched.
COMPILE_CACHE = '.compile_cache'


class StudyStopped(Exception):
    """A signal stopped the study, and its runs have ended."""

    def __init__(self, number: int):
        self.signal = number


@dataclass
class RunningTrial:
    """A run in progress."""

    trial: Trial
    slot: int  # number of its GPU, or of its share of the cores
    process: subprocess.Popen
    console: Path
    console_start: int  # size of the file when the run began
    oom_kills_before: int
    began: float  # time.monotonic() before its process
    resumes: bool  # whether the trial had a run before
    stopping: bool = False

    def stop(self) -> None:
        self.stopping = True
        self.process.terminate()

    def outcome(self) -> Outcome:
        text = last_line(self.console, self.console_start)
        return outcome_from_exit(
            self.process.returncode, text, count_oom_kills() > self.oom_kills_before
        )


class StudyRunner:
    """Runs trials as processes, in a folder that is locked against other studies."""

    def __init__(
        self, study: Study, out_dir: Path, context: RunContext, jobs: int, study_options: set[str]
    ):
        """study_options: the options that are for study.py and not passed to the runs."""
        self.study, self.out_dir, self.context, self.jobs = study, out_dir, context, jobs
        values = study.command_line.layers[-1].values
        of_study = [f'--{key}={values[key]}' for key in values if key in study_options]
        self.run_values = {key: v for key, v in values.items() if key not in study_options}
        command = ['python', 'study.py', study.path, *_arguments(self.run_values), *of_study]
        self.command = shlex.join(command)
        self.wandb = study.command_line.value('wandb_log', schema)
        self.stop_signal: int | None = None
        self.running: list[RunningTrial] = []
        self.lock: list[int] = []  # file descriptors that hold the folder's lock
        # Of the runs that have ended, by kind and folder.
        self.final_outcomes: dict[tuple[str, str], Outcome] = {}
        self.final_records: dict[tuple[str, str], Record] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Lock the folder, and let signals stop the runs, until the context ends."""
        with study_lock(self.out_dir) as self.lock:
            handlers = {number: signal.signal(number, self._stop) for number in stop_signals()}
            try:
                yield
            finally:
                for running in self.running:
                    running.stop()
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number
        write_in_signal_handler(
            '\nStopping: each run saves a checkpoint after its current iteration. Press again to '
            'stop immediately.\n'
        )
        for running in self.running:
            running.stop()

    def folder(self, kind: str, trial: Trial) -> Path:
        return self.out_dir / kind / trial.folder

    def console(self, kind: str, trial: Trial) -> Path:
        return self.folder(kind, trial) / 'console.txt'

    def arguments(self, kind: str, trial: Trial, jobs: int | None = None) -> list[str]:
        """The command that starts the trial's run, or resumes it."""
        return [
            *('python', 'train.py', self.study.path),
            *_arguments(_used_values(self.run_values, trial.choice.settings), trial.overrides),
            *('--init_from=auto', f'--out_dir={self.folder(kind, trial)}', '--log_style=line'),
            f'--concurrent_runs={jobs or self.jobs}',
            *(f'--{key}={value}' for key, value in trial.study.micro_batch.items()),
            *([f'--wandb_run_name={trial.folder}'] if self.wandb else []),
        ]

    def record(self, kind: str, trial: Trial) -> Record | None:
        """The outline of the trial's record; None if there is no run. Raises UserError."""
        if (kind, trial.folder) in self.final_records:
            return self.final_records[kind, trial.folder]
        run = latest_run(self.folder(kind, trial))
        return None if run is None else read_outline(run)

    def run(
        self, kind: str, trials: list[Trial], progress: 'StudyProgress'
    ) -> dict[Trial, Outcome]:
        """Run the trials that have not ended, and return the outcome of each trial.

        Raises StudyStopped and UserError.
        """
        jobs = 1 if kind == TIMING else self.jobs
        outcomes: dict[Trial, Outcome] = {}
        for trial in trials:
            if outcome := self.outcome(kind, trial):
                outcomes[trial] = outcome
        waiting = [trial for trial in trials if trial not in outcomes]
        progress.begin(kind, trials, waiting)
        slots = list(range(min(jobs, len(waiting))))  # each has its own GPU or cores
        while True:
            while waiting and slots and self.stop_signal is None:
                self.running.append(self._start(kind, waiting.pop(0), slots.pop(0), jobs))
            ended = [running for running in self.running if running.process.poll() is not None]
            for running in ended:
                self.running.remove(running)
                slots.append(running.slot)
                outcomes[running.trial] = self._process_outcome(kind, running)
                self._save_start(kind, running)
                progress.on_trial_end(running, outcomes[running.trial])
            if self.stop_signal is not None and not self.running:
                raise StudyStopped(self.stop_signal)
            if not waiting and not self.running:
                return {trial: outcomes[trial] for trial in trials}
            for running in self.running:  # one that started when the signal arrived
                if self.stop_signal is not None and not running.stopping:
                    running.stop()
            progress.show()
            time.sleep(0.2)

    def outcome(self, kind: str, trial: Trial) -> Outcome | None:
        """The outcome of the trial's run; None if it has not ended.

        Raises UserError if the run had other options.
        """
        if (kind, trial.folder) in self.final_outcomes:
            return self.final_outcomes[kind, trial.folder]
        try:
            record = self.record(kind, trial)
            outcome = None if record is None else outcome_from_record(record)
        except (UserError, KeyError, AttributeError, TypeError) as error:
            return Outcome('unreadable', str(error))
        if record is not None and outcome is not None:
            self._check_options(kind, trial, record['config'])
            self.final_outcomes[kind, trial.folder] = outcome
            self.final_records[kind, trial.folder] = record
        return outcome

    def _check_options(self, kind: str, trial: Trial, config: dict) -> None:
        """Raises UserError if an ended run had other options than the trial."""
        settings = merged_settings(trial.study, trial.overrides).resolve(*self.context)
        values, placement = settings.to_dict(), PLACEMENT_OPTIONS
        before, now = (
            math.prod(each[key] for key in micro_batch.SIZES) for each in (config, values)
        )
        if before == now:
            # The same sequences, divided as the memory allowed then.
            placement = placement | trial.study.micro_batch.keys()
        differing = [
            f'{key}={config[key]!r} (now {value!r})'
            for key, value in values.items()
            if key in config and config[key] != value and key not in placement
        ]
        if differing:
            raise UserError(
                f'{self.folder(kind, trial)} was run with {", ".join(differing)}: the study has '
                f'changed since. Choose another folder with --out_dir=FOLDER, or remove '
                f'{self.out_dir}.'
            )

    def _process_outcome(self, kind: str, running: RunningTrial) -> Outcome:
        """The outcome of a run whose process has ended; the record takes precedence."""
        outcome = running.outcome()
        if outcome.kind == 'failed' and (recorded := self.outcome(kind, running.trial)):
            return recorded
        return outcome

    def _save_start(self, kind: str, running: RunningTrial) -> None:
        """Save the seconds before a run began: those of its process less those of its record."""
        with contextlib.suppress(UserError, KeyError, AttributeError, OSError):
            record = None if running.resumes else self.record(kind, running.trial)
            seconds = summary_value(record, 'wall_seconds')
            if record is None or seconds is None or record['status'] != 'finished':
                return
            start = max(0.0, time.monotonic() - running.began - seconds)
            text = json.dumps({'start_seconds': round(start, 3)})
            write_file(self.folder(kind, running.trial) / PROCESS, text.encode())

    def start_seconds(self, kind: str, trial: Trial) -> float | None:
        """Seconds from the start of the trial's process until its run; None if unknown."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            text = (self.folder(kind, trial) / PROCESS).read_bytes()
            seconds = float(json.loads(text)['start_seconds'])
            return seconds if 0 <= seconds < math.inf else None
        return None

    def _start(self, kind: str, trial: Trial, slot: int, jobs: int) -> RunningTrial:
        folder, console = self.folder(kind, trial), self.console(kind, trial)
        began, resumes = time.monotonic(), latest_run(folder) is not None
        device, environment = self.context.device, dict(os.environ)
        group = trial.variant if trial.rung is None else trial.folder.rpartition('/')[0]
        environment.setdefault('WANDB_RUN_GROUP', group)  # has no effect without W&B
        # Kept with the study, so that a resumed one, or one on another node, compiles nothing anew.
        cache = self.out_dir.resolve() / COMPILE_CACHE
        environment.setdefault('TORCHINDUCTOR_CACHE_DIR', str(cache))
        if jobs > 1 and device.type == 'cuda':
            environment['CUDA_VISIBLE_DEVICES'] = visible_gpu(slot)
        elif jobs > 1:
            environment.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // jobs)))
        command = [sys.executable, str(TRAIN), *self.arguments(kind, trial, jobs)[2:]]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(console, 'ab') as output:
                start = output.tell()
                process = start_process(command, output, environment, self.lock)
        except OSError as error:
            raise UserError(
                f'{folder}: a run cannot be started there ({error.strerror}). Completed runs are '
                f'saved. Fix the problem and run the same command to continue.'
            ) from error
        return RunningTrial(trial, slot, process, console, start, count_oom_kills(), began, resumes)


def _arguments(*points: dict) -> list[str]:
    """Values as arguments, those of later points over earlier ones."""
    options, values = flatten(schema()), merged_values(*points)
    texts = (arguments({key: value}, options) for key, value in values.items())
    return [text for of_key in texts for text in of_key or []]


def _used_values(values: dict, settings: Settings) -> dict:
    """The values of the study's command line that a run has a use for.

    A run has a single command line, on which a value without effect would be a mistake.
    """
    kinds = settings.architecture.kinds
    has_effect = settings.to_dict().keys() | {k for kind in kinds.values() for k in kind.to_dict()}
    used = {key: value for key, value in values.items() if key in has_effect}
    removed = [name for name, kind in values.get('layer_kinds', {}).items() if kind is None]
    return used_values(used, [*kinds, *removed])


def visible_gpu(slot: int) -> str:
    """CUDA_VISIBLE_DEVICES for the run in this slot: one of the GPUs that this process sees."""
    names = [name.strip() for name in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')]
    count = torch.cuda.device_count()
    index = slot % count
    return names[index] if names[0] else str(index)


def start_process(
    command: list[str], output: IO[bytes], environment: dict[str, str], lock: list[int]
) -> subprocess.Popen:
    """Start a run, which holds the study's lock too. Raises OSError."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        pass_fds=lock,
        start_new_session=True,  # so that Ctrl-C reaches it only once, from this process
        preexec_fn=_terminate_with_parent(),
    )


def _terminate_with_parent() -> Callable[[], None] | None:
    """A function for the child: let the kernel send it SIGTERM if the study is killed."""
    if not sys.platform.startswith('linux'):
        return None
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_death_signal, signal.SIGTERM)


def iterations_done(folder: Path) -> int:
    """Iterations done by the newest run in a folder, from the last complete line of its journal."""
    run = latest_run(folder)
    if run is None:
        return 0
    with (
        contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError),
        open(run / 'journal.jsonl', 'rb') as journal,
    ):
        journal.seek(max(0, journal.seek(0, os.SEEK_END) - 8192))
        for line in reversed(journal.read().split(b'\n')[:-1]):
            if line.startswith(b'{"kind": "iteration"'):
                return json.loads(line)['iter'] + 1
    return 0
