"""A study, with the results of its trials that later trials need: times and tuned options."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from common.errors import UserError
from studies.grid import Study
from studies.outcome import summary_value
from studies.parts import StudyPart
from studies.runner import StudyRunner
from studies.trials import TIMING, TUNING, StudyTrials, Trial, trials_by_kind
from studies.variants import TuneChoice


class TunedVariant(NamedTuple):
    """The result of tuning a variant; `at_edge`: options whose value is at the end of its list."""

    choice: TuneChoice
    loss: float
    at_edge: list[str]


@dataclass
class StudyState:
    """A study, with the results that its later trials need."""

    study: Study
    parts: list[StudyPart]
    runner: StudyRunner

    def trials(self) -> list[StudyTrials]:
        """The trials of each part, as far as their options are known. Raises UserError."""
        return [self._trials_of(part) for part in self.parts]

    def by_kind(self) -> dict[str, list[Trial]]:
        """The trials of all parts by kind, in the order in which they are run."""
        return trials_by_kind(self.trials())

    def _trials_of(self, part: StudyPart) -> StudyTrials:
        known = partial(StudyTrials, part.study, part.variants, rung=part.rung)
        seconds = self._seconds_per_iter(known())
        if seconds is None:
            return known()
        tuned = self.tuned(known(seconds))
        tuned_choices = {label: variant.choice for label, variant in (tuned or {}).items()}
        return known(seconds, tuned_choices)

    def is_decided(self, trials: StudyTrials) -> bool:
        """Whether all options of the runs to compare are known."""
        count = len(trials.variants)
        timed = len(trials.seconds) == count or not trials.timing
        return timed and (len(trials.tuned_choices) == count or not self.study.tune)

    def _seconds_per_iter(self, trials: StudyTrials) -> dict[str, float] | None:
        """Seconds per iteration of each variant, from timing runs; None if some have not run."""
        seconds = {}
        for trial in trials.timing:
            outcome = self.runner.outcome(TIMING, trial)
            if outcome is None or outcome.kind != 'finished':
                return None
            time_ms = summary_value(self.runner.record(TIMING, trial), 'avg_time_ms')
            if not time_ms:
                raise UserError(
                    f'{self.runner.folder(TIMING, trial)}: the record has no times. Remove the '
                    f'folder and run the same command.'
                )
            seconds[trial.variant] = time_ms / 1000
        return seconds

    def tuned(self, trials: StudyTrials) -> dict[str, TunedVariant] | None:
        """The best choice of the `tune` options for each variant, by final validation loss.

        Diverged runs rank last. None if some have not ended. Raises UserError.
        """
        best: dict[str, tuple[float, Trial]] = {}
        for trial in trials.tuning:
            outcome = self.runner.outcome(TUNING, trial)
            if outcome is None or not outcome.is_final:
                return None
            loss = summary_value(self.runner.record(TUNING, trial), 'final_val_loss')
            if outcome.kind != 'finished' or loss is None:
                continue
            if trial.variant not in best or loss < best[trial.variant][0]:
                best[trial.variant] = loss, trial
        tuned = {}
        for variant in trials.variants if self.study.tune else []:
            if variant.label not in best:
                raise UserError(
                    f'{self.study.path}: all tuning runs of {variant.label} diverged. Set other '
                    f'values in tune.'
                )
            loss, trial = best[variant.label]
            values = trial.choice.values
            at_edge = [k for k, v in values.items() if is_at_edge(v, self.study.tune[k])]
            tuned[variant.label] = TunedVariant(trial.choice, loss, at_edge)
        return tuned


def is_at_edge(value: Any, choices: list) -> bool:
    """Whether the value is the smallest or largest of a list of numbers."""
    numbers = all(type(choice) in (int, float) for choice in choices)
    return numbers and len(choices) > 1 and value in (min(choices), max(choices))
