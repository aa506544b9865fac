"""Runs of a study as processes: one study at a time in a folder, and what became of each run.

While a `Runner` is entered, SIGINT, SIGTERM and SIGHUP stop its runs, and then the study.
"""

import contextlib
import ctypes
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import torch

from common.console_output import write_progress
from common.errors import UserError
from common.files import lock_file
from comparison.conditions import REPORTING
from comparison.runs import stopped_by_nonfinite
from configurator import flatten
from records.record import read_outline
from records.run_folders import latest_run
from studies.grid import Study, argument, settings_of
from studies.variants import TIMING, Point, Where
from training.signals import stopping_signals
from training_config import schema

if TYPE_CHECKING:
    from studies.progress import Progress

TRAIN = Path(__file__).resolve().parents[1] / 'train.py'
# Options that say where a run goes and how it reports: two runs that differ in them are one.
IMMATERIAL = REPORTING | {'init_from', 'resume_run', 'verify_data', 'debug'}
STOPPING = tuple(
    getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)
)
PATIENCE = 60.0  # seconds for the runs of a study that was killed to save and end


# --- One study in a folder -----------------------------------------------------------------------


@contextlib.contextmanager
def locked(out_dir: Path) -> Iterator[list[int]]:
    """Keep other studies out of a folder; the file descriptors that hold the lock.

    The lock ends with the processes that have one of them, however they end: the study, and its
    runs, which save after it was killed. Raises UserError where another study runs.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(out_dir / 'study.lock', os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f'out_dir={str(out_dir)!r}: a study cannot write there ({error.strerror}). Choose '
            f'another folder by --out_dir=FOLDER.'
        ) from error
    try:
        if os.name == 'posix':
            _acquire(lock, out_dir)
        yield [lock] if os.name == 'posix' else []
    finally:
        os.close(lock)


def _acquire(lock: int, out_dir: Path) -> None:
    """Take the lock. Raises UserError if another study holds it: at once if that one is alive."""
    until, waiting, here = time.monotonic() + PATIENCE, False, socket.gethostname()
    while not lock_file(lock):
        pid, _, host = os.pread(lock, 300, 0).decode(errors='replace').strip().partition(' ')
        where = f'pid {pid or "unknown"}' + (f' on {host}' if host not in ('', here) else '')
        if host != here or _is_alive(pid):
            raise UserError(
                f'{out_dir}: another study ({where}) is running there. Wait for its end, stop it, '
                f'or choose another folder by --out_dir=FOLDER.'
            )
        if time.monotonic() > until:
            raise UserError(
                f'{out_dir}: the study that ran there ({where}) has ended, but not its runs. Wait '
                f'for the end of its train.py processes, or stop them.'
            )
        if not waiting:
            write_progress(f'{out_dir}: waiting for the runs of a killed study ({where}) to save')
        waiting = True
        time.sleep(0.2)
    with contextlib.suppress(OSError):  # it is for the message alone
        os.ftruncate(lock, 0)
        os.pwrite(lock, f'{os.getpid()} {here}\n'.encode(), 0)


def _is_alive(pid: str) -> bool:
    """Whether there is such a process; an unreadable number stands for one."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True


# --- What became of a run ------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How a run ended, in one of the words of `ADVICE` or finished; and why."""

    kind: str
    reason: str = ''
    code: int = 0

    @property
    def is_final(self) -> bool:
        """Whether the same command would only come to the same again."""
        return self.kind in ('finished', 'diverged')


FINISHED = Outcome('finished')
# What to do about a run that came to this, after its folder and the reason.
ADVICE = {
    'diverged': 'counts as diverged; remove its folder to train it again',
    'interrupted': 'the same command continues it',
    'killed': 'the same command continues it',
    'failed': 'the same command tries it again',
    'unreadable': 'move its folder away, and the same command trains it again',
}


def outcome_of(code: int, last_line: str, out_of_memory: bool) -> Outcome:
    """What the exit code of a run says, as subprocess or as a shell has it."""
    number = -code if code < 0 else code - 128
    if code == 0:
        return FINISHED
    if number not in set(signal.Signals):
        return Outcome('failed', last_line or f'exit code {code}', code)
    name = signal.Signals(number).name
    if number in STOPPING:
        return Outcome('interrupted', name, 128 + number)
    memory = ', as the machine ran out of memory' if out_of_memory else ''
    return Outcome('killed', f'{name}{memory}', 128 + number)


def outcome_in(record: dict) -> Outcome | None:
    """What a record says that the run came to, if that is final.

    A run that diverged ends because of an update that is not finite, not merely after one.
    """
    if record['status'] == 'finished':
        return FINISHED
    if stopped_by_nonfinite(record):
        return Outcome('diverged', 'loss or gradient not finite')
    return None


def figure(record: dict | None, key: str) -> float | None:
    """A number of a record's summary; None where there is none."""
    value = record and record['summary'].get(key)
    with contextlib.suppress(OverflowError):
        if isinstance(value, int | float) and math.isfinite(value):
            return value
    return None


def oom_kills() -> int:
    """How many processes this machine's kernel has ended for want of memory, as far as it tells."""
    with contextlib.suppress(OSError, ValueError), open('/proc/vmstat') as file:
        return sum(int(line.split()[1]) for line in file if line.startswith('oom_kill '))
    return 0


def last_line(path: Path, start: int) -> str:
    """The last line of a console from `start` on."""
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - 4096))
        lines = [line.strip() for line in file.read().decode(errors='replace').splitlines()]
        text = next((line for line in reversed(lines) if line), '')
        return text if len(text) <= 160 else text[:159] + '…'
    return ''


# --- Processes -----------------------------------------------------------------------------------


class Stopped(Exception):
    """The study was asked to stop, and its runs have ended."""

    def __init__(self, number: int):
        self.signal = number


@dataclass
class Job:
    """A run in progress."""

    point: Point
    place: int
    process: subprocess.Popen
    console: Path
    console_start: int  # its size when the run began
    oom_kills: int  # before it
    stopping: bool = False
    began: float = field(default_factory=time.monotonic)

    def stop(self) -> None:
        self.stopping = True
        self.process.terminate()

    def outcome(self) -> Outcome:
        text = last_line(self.console, self.console_start)
        return outcome_of(self.process.returncode, text, oom_kills() > self.oom_kills)


class Runner:
    """Runs points as processes, in a folder that no other study uses meanwhile."""

    def __init__(self, study: Study, out_dir: Path, where: Where, jobs: int, own_options: set[str]):
        """own_options: those of the command line that are the study's and not its runs'."""
        self.study, self.out_dir, self.where, self.jobs = study, out_dir, where, jobs
        options, values = flatten(schema()), study.command_line.layers[-1].values
        own = [f'--{key}={values[key]}' for key in values if key in own_options]
        texts = (argument(key, values[key], options) for key in values if key not in own_options)
        self.passed = [text for text in texts if text is not None]
        self.command = shlex.join(['python', 'study.py', study.path, *self.passed, *own])
        self.wandb = study.command_line.value('wandb_log', schema)
        self.stop_signal: int | None = None
        self.running: list[Job] = []
        self.ended: dict[tuple[str, str], Outcome] = {}  # by kind and folder, those that are final

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While entered, the folder is this study's, and signals stop the runs."""
        with locked(self.out_dir) as self.lock:
            before = {number: signal.signal(number, self._stop) for number in stopping_signals()}
            try:
                yield
            finally:
                for job in self.running:
                    job.stop()
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _stop(self, number: int, frame) -> None:
        self.stop_signal = number
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b'\nstopping: each run saves after its update; once more to stop at once\n')
        for job in self.running:
            job.stop()

    def folder(self, kind: str, point: Point) -> Path:
        return self.out_dir / kind / point.folder

    def console(self, kind: str, point: Point) -> Path:
        return self.folder(kind, point) / 'console.txt'

    def arguments(self, kind: str, point: Point, jobs: int | None = None) -> list[str]:
        """The command that makes the point's run, or goes on with it."""
        return [
            *('python', 'train.py', self.study.path, *self.passed),
            *point.arguments(flatten(schema())),
            *('--init_from=auto', f'--out_dir={self.folder(kind, point)}', '--log_style=line'),
            f'--concurrent_runs={jobs or self.jobs}',
            *([f'--wandb_run_name={point.folder}'] if self.wandb else []),
        ]

    def record(self, kind: str, point: Point) -> dict | None:
        """The outline of the point's record; None without a run. Raises UserError."""
        run = latest_run(self.folder(kind, point))
        return None if run is None else read_outline(run)

    def run(self, kind: str, points: list[Point], progress: 'Progress') -> dict[Point, Outcome]:
        """Run what has not ended, and say what became of each. Raises Stopped and UserError."""
        jobs = 1 if kind == TIMING else self.jobs
        outcomes = {point: self.outcome(kind, point) for point in points}
        waiting = [point for point in points if outcomes[point] is None]
        progress.begin(kind, points, waiting)
        places = list(range(min(jobs, len(waiting))))  # so that each has a GPU or cores of its own
        while True:
            while waiting and places and self.stop_signal is None:
                self.running.append(self._start(kind, waiting.pop(0), places.pop(0), jobs))
            for job in [job for job in self.running if job.process.poll() is not None]:
                self.running.remove(job)
                places.append(job.place)
                outcomes[job.point] = self._outcome_of(kind, job)
                progress.ended(job, outcomes[job.point])
            if self.stop_signal is not None and not self.running:
                raise Stopped(self.stop_signal)
            if not waiting and not self.running:
                return outcomes
            for job in self.running:  # one that began as the signal came
                if self.stop_signal is not None and not job.stopping:
                    job.stop()
            progress.show()
            time.sleep(0.2)

    def outcome(self, kind: str, point: Point) -> Outcome | None:
        """What the point's run came to; None where it is to be begun or continued.

        Raises UserError if it was another study's.
        """
        if (kind, point.folder) in self.ended:
            return self.ended[kind, point.folder]
        try:
            record = self.record(kind, point)
            outcome = record and outcome_in(record)
        except (UserError, KeyError, AttributeError, TypeError) as error:
            return Outcome('unreadable', str(error))
        if outcome is not None:
            self._check(kind, point, record['config'])
            self.ended[kind, point.folder] = outcome
        return outcome

    def _check(self, kind: str, point: Point, config: dict) -> None:
        """Raises UserError if a run that has ended had other options than the point."""
        settings = settings_of(self.study, point.overrides).complete(*self.where)
        differing = [
            f'{key}={config[key]!r} (now {value!r})'
            for key, value in settings.to_dict().items()
            if key in config and config[key] != value and key not in IMMATERIAL
        ]
        if differing:
            raise UserError(
                f'{self.folder(kind, point)} was run with {", ".join(differing)}: the study has '
                f'changed since. Give it another folder by --out_dir=FOLDER, or remove '
                f'{self.out_dir}.'
            )

    def _outcome_of(self, kind: str, job: Job) -> Outcome:
        """What became of a run whose process has ended: its record knows best."""
        outcome = job.outcome()
        if outcome.kind == 'failed' and (recorded := self.outcome(kind, job.point)):
            return recorded
        return outcome

    def _start(self, kind: str, point: Point, place: int, jobs: int) -> Job:
        folder, console = self.folder(kind, point), self.console(kind, point)
        device, environment = self.where[0], dict(os.environ)
        environment.setdefault('WANDB_RUN_GROUP', point.variant)  # has no effect without W&B
        if jobs > 1 and device.type == 'cuda':
            environment['CUDA_VISIBLE_DEVICES'] = str(place % torch.cuda.device_count())
        elif jobs > 1:
            environment.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // jobs)))
        command = [sys.executable, str(TRAIN), *self.arguments(kind, point, jobs)[2:]]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(console, 'ab') as output:
                start = output.tell()
                process = start_process(command, output, environment, self.lock)
        except OSError as error:
            raise UserError(
                f'{folder}: a run cannot be started there ({error.strerror}). What has run is '
                f'intact, and the same command goes on.'
            ) from error
        return Job(point, place, process, console, start, oom_kills())


def start_process(
    command: list[str], output: IO[bytes], environment: dict[str, str], lock: list[int]
) -> subprocess.Popen:
    """A run, which holds the study's lock too. Raises OSError."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        pass_fds=lock,
        start_new_session=True,  # Ctrl-C reaches it through us, once
        preexec_fn=_end_with_parent(),
    )


def _end_with_parent() -> Callable[[], None] | None:
    """For the child to call: be told to save and stop should the study itself be killed."""
    if not sys.platform.startswith('linux'):
        return None
    prctl, set_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_signal, signal.SIGTERM)
