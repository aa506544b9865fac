"""How far a study is while it runs: trials that have ended, those in progress, the time left."""

import contextlib
import shutil
import sys
import time

from common.console_output import is_terminal, overwrite_line, write_progress
from common.errors import UserError
from common.formatting import duration
from studies.outcome import Outcome, summary_value
from studies.runner import RunningTrial, StudyRunner, iterations_done
from studies.trials import RUNS, TIMING, Trial


class StudyProgress:
    """One counter over the whole study: runs that have ended, those in progress, the time left.

    Time is estimated by FLOPs: those left, at the rate of those made since the start. With a budget
    in seconds, by that budget.
    """

    SHOW_SECONDS = 60.0  # seconds between lines where nobody watches; a terminal is kept up to date

    def __init__(self, runner: StudyRunner, trials: dict[str, list[Trial]]):
        """trials: all of the study by kind, as far as their options are known."""
        self.runner, self.trials = runner, dict(trials)
        self.ended_trials: set[Trial] = set()  # in whichever way
        self.kind = ''
        self.work_before: dict[Trial, float] = {}
        self.began = self.last_shown = time.monotonic()

    def begin(self, kind: str, trials: list[Trial], waiting: list[Trial]) -> None:
        """Of these trials, now that all of their options are known, some are still to be run."""
        if not self.work_before:
            self.began = time.monotonic()
        self.kind, self.trials[kind] = kind, trials
        for trial in waiting:
            self.work_before[trial] = self._work(kind, trial) * self._share(trial)
        self.ended_trials |= set(trials) - set(waiting)
        complete = len(trials) - len(waiting)
        if complete:
            write_progress(f'{kind}: {complete} of {len(trials)} runs are complete already')

    def _work(self, kind: str, trial: Trial) -> float:
        """What a run costs, in one unit throughout the study."""
        seconds = self.runner.study.budget.get('seconds')
        if seconds is None:
            return trial.flops or 0.0
        return 0.0 if kind == TIMING else seconds

    def _share(self, trial: Trial) -> float:
        """Which part of its iterations the trial has made."""
        return trial.share(iterations_done(self.runner.folder(self.kind, trial)))

    def on_trial_end(self, running: RunningTrial, outcome: Outcome) -> None:
        """Say what became of a run."""
        self.ended_trials.add(running.trial)
        loss = None
        if outcome.kind == 'finished':
            with contextlib.suppress(UserError, KeyError, AttributeError):
                loss = summary_value(self.runner.record(self.kind, running.trial), 'final_val_loss')
        reason = f' ({outcome.reason})' if outcome.reason else ''
        result = f'{outcome.kind}{reason}' if loss is None else f'validation loss {loss:.4f}'
        seconds = duration(time.monotonic() - running.began)
        kind = '' if self.kind == RUNS else f'{self.kind} '
        self._print(f'{self._count()} {kind}{running.trial.folder}: {result}, {seconds}')

    def _count(self) -> str:
        return f'[{len(self.ended_trials)}/{sum(map(len, self.trials.values()))}]'

    def seconds_left(self) -> float | None:
        """Of the whole study; None while nothing tells."""
        shares = {running.trial: self._share(running.trial) for running in self.runner.running}
        remaining = done = 0.0
        for kind, trials in self.trials.items():
            for trial in trials:
                work = self._work(kind, trial)
                share = 1.0 if trial in self.ended_trials else shares.get(trial, 0.0)
                remaining += work * (1 - share)
                if trial in self.work_before:
                    done += max(0.0, work * share - self.work_before[trial])
        return remaining * (time.monotonic() - self.began) / done if done else None

    def show(self) -> None:
        """Where it is, now and then."""
        now = time.monotonic()
        interval = 1.0 if is_terminal(sys.stdout) else self.SHOW_SECONDS
        if not self.runner.running or now - self.last_shown < interval:
            return
        self.last_shown = now
        trials = [running.trial for running in self.runner.running]
        done = [iterations_done(self.runner.folder(self.kind, trial)) for trial in trials]
        current = ', '.join(
            f'{trial.folder} {iterations}/{trial.iterations}'
            for trial, iterations in zip(trials, done)
        )
        seconds = self.seconds_left()
        left = 'unknown' if seconds is None else duration(seconds)
        self._print(f'{self._count()} {current}; time left {left}', transient=True)

    def _print(self, text: str, transient: bool = False) -> None:
        if not is_terminal(sys.stdout):
            write_progress(text)
        elif transient:  # it is written over by the next, so it has to fit on one line
            overwrite_line(text[: shutil.get_terminal_size().columns - 1])
        else:
            overwrite_line(text)
            write_progress('')
