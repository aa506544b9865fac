"""The progress of a running study: ended and running trials, and the time left."""

import contextlib
import time

from common.console_output import write_progress
from common.errors import UserError
from common.formatting import duration
from common.progress_bar import ProgressBar
from studies.outcome import Outcome, summary_value
from studies.runner import RunningTrial, StudyRunner, iterations_done
from studies.time_estimate import RunTimes
from studies.trials import RUNS, TIMING, Trial

UPDATE_SECONDS = 1.0  # between two looks at the runs in progress
LINE_SECONDS = 60.0  # between lines where the output is not a terminal


class StudyProgress:
    """One progress bar for the whole study, and a line for each trial that ends.

    The time left is estimated from FLOPs: those left, at the rate since the start. Those of a
    ladder count by the seconds per FLOP at their rung. With a budget in seconds, it is estimated
    from that budget.
    """

    def __init__(
        self,
        runner: StudyRunner,
        trials: dict[str, list[Trial]],
        times: RunTimes | None = None,
    ):
        """trials: all trials of the study by kind, as far as their options are known.

        times: expected times of the runs of a ladder.
        """
        self.runner, self.trials, self.times = runner, dict(trials), times
        self.ended_trials: set[Trial] = set()  # with any outcome
        self.kind = ''
        self.shares_before: dict[Trial, float] = {}  # done before this process
        self.began = self.last_shown = time.monotonic()
        self.bar = ProgressBar(
            'Study', self._count_trials(), unit='runs', line_seconds=LINE_SECONDS, show_rate=False
        )

    def __enter__(self) -> 'StudyProgress':
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def begin(self, kind: str, trials: list[Trial], waiting: list[Trial]) -> None:
        """Begin with a kind of trials, whose options are all known; `waiting` have not ended."""
        if not self.shares_before:
            self.began = time.monotonic()
        self.kind, self.trials[kind] = kind, trials
        for trial in waiting:
            self.shares_before[trial] = self._share(trial)
        self.ended_trials |= set(trials) - set(waiting)
        complete = len(trials) - len(waiting)
        if complete:
            write_progress(f'{kind}: {complete} of {len(trials)} runs are already complete')

    def _count_trials(self) -> int:
        return sum(map(len, self.trials.values()))

    def _work(self, kind: str, trial: Trial) -> float:
        """The cost of a run, in one unit for the whole study."""
        seconds = self.runner.study.budget.get('seconds')
        if seconds is not None:
            return 0.0 if kind == TIMING else seconds
        expected = self.times.expected(trial) if self.times else None
        return (trial.flops or 0.0) if expected is None else expected.left(0.0)

    def _share(self, trial: Trial) -> float:
        """The share of its iterations that the trial has done."""
        return trial.share(iterations_done(self.runner.folder(self.kind, trial)))

    def on_trial_end(self, running: RunningTrial, outcome: Outcome) -> None:
        """Write a line with the outcome of a run."""
        self.ended_trials.add(running.trial)
        if self.times is not None:
            self.times.read(self.kind, running.trial)
        loss = None
        if outcome.kind == 'finished':
            with contextlib.suppress(UserError, KeyError, AttributeError):
                loss = summary_value(self.runner.record(self.kind, running.trial), 'final_val_loss')
        reason = f' ({outcome.reason})' if outcome.reason else ''
        result = f'{outcome.kind}{reason}' if loss is None else f'validation loss {loss:.4f}'
        seconds = duration(time.monotonic() - running.began)
        kind = '' if self.kind == RUNS else f'{self.kind} '
        count = f'[{len(self.ended_trials)}/{self._count_trials()}]'
        write_progress(f'{count} {kind}{running.trial.folder}: {result}, {seconds}')

    def seconds_left(self) -> float | None:
        """Seconds that the study still takes; None while unknown."""
        shares = {running.trial: self._share(running.trial) for running in self.runner.running}
        remaining = done = 0.0
        for kind, trials in self.trials.items():
            for trial in trials:
                work = self._work(kind, trial)
                share = 1.0 if trial in self.ended_trials else shares.get(trial, 0.0)
                remaining += work * (1 - share)
                if trial in self.shares_before:
                    done += max(0.0, work * (share - self.shares_before[trial]))
        return remaining * (time.monotonic() - self.began) / done if done else None

    def show(self) -> None:
        """Update the bar with the runs in progress."""
        now = time.monotonic()
        if not self.runner.running or now - self.last_shown < UPDATE_SECONDS:
            return
        self.last_shown = now
        current = ', '.join(
            f'{trial.folder} {iterations_done(self.runner.folder(self.kind, trial))}'
            f'/{trial.iterations}'
            for trial in (running.trial for running in self.runner.running)
        )
        self.bar.total = self._count_trials()
        self.bar.update(len(self.ended_trials), current, self.seconds_left())
