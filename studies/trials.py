"""The trials of a study: its runs, with their options and costs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from studies.grid import SEED_KEYS, Study, folder_names, run_options, study_seeds
from studies.ladder import Rung
from studies.points import point_labels
from studies.variants import TuneChoice, Variant, budgeted_iterations

RUNS, TUNING, TIMING = 'runs', 'tuning', 'timing'  # kinds of trials, and their folders in out_dir
TIMED_ITERATIONS = 10  # of a timing run; the record excludes the first


@dataclass(frozen=True, eq=False)  # hashable by identity
class Trial:
    """One run of a study."""

    folder: str  # unique, within the folder of its kind
    variant: str
    overrides: dict
    choice: TuneChoice
    iterations: int | None  # None: unknown until iterations are timed
    study: Study  # at the size of this run
    rung: int | None = None  # number of the rung; None without a ladder

    @property
    def tokens(self) -> int | None:
        return None if self.iterations is None else self.iterations * self.choice.tokens_per_iter

    @property
    def flops(self) -> float | None:
        return None if self.iterations is None else self.iterations * self.choice.flops_per_iter

    def share(self, iterations_done: int) -> float:
        """The share of its iterations that is done (0 to 1)."""
        return min(1.0, iterations_done / self.iterations) if self.iterations else 0.0


class StudyTrials:
    """The runs of a study, as far as their options are known.

    seconds: seconds per iteration of each variant, by label, once they are timed.
    tuned_choices: the result of tuning each variant, by label.
    While either is unknown, a run is assumed to have the largest cost.
    """

    def __init__(
        self,
        study: Study,
        variants: list[Variant],
        seconds: dict[str, float] | None = None,
        tuned_choices: dict[str, TuneChoice] | None = None,
        rung: Rung | None = None,
    ):
        self.study, self.variants, self.rung = study, variants, rung
        self.seconds, self.tuned_choices = seconds or {}, tuned_choices or {}

    def _trial(self, folder: str, variant: Variant, choice: TuneChoice, seed: dict) -> Trial:
        iterations = budgeted_iterations(
            self.study, variant.label, choice, self.seconds.get(variant.label)
        )
        budget = {} if iterations is None else {'max_iters': iterations}
        if 'seconds' not in self.study.budget and iterations is None:
            iterations = choice.settings.run.max_iters
        point = {**variant.overrides, **budget, **choice.values, **seed}
        overrides = run_options(self.study, point)
        return self._at_rung(
            Trial(folder, variant.label, overrides, choice, iterations, self.study)
        )

    def _at_rung(self, trial: Trial) -> Trial:
        """The trial in the folder of its rung."""
        if self.rung is None:
            return trial
        (folder,) = folder_names([self.rung.label])
        return replace(trial, folder=f'{folder}/{trial.folder}', rung=self.rung.number)

    @property
    def timing(self) -> list[Trial]:
        """A short run of each variant, if the budget is in seconds."""
        if 'seconds' not in self.study.budget:
            return []
        labels = [variant.label for variant in self.variants]
        folders = folder_names(labels, clean=lambda label: label.replace('/', '_'))
        timed = {'max_iters': TIMED_ITERATIONS}
        return [
            Trial(
                *(folder, v.label, {**v.overrides, **timed}, v.choices[0], TIMED_ITERATIONS),
                study=self.study,
            )
            for folder, v in zip(folders, self.variants)
        ]

    @property
    def tuning(self) -> list[Trial]:
        """The runs that choose the `tune` options of each variant, with a separate seed."""
        if not self.study.tune:
            return []
        seed = dict.fromkeys(SEED_KEYS, self.study.tune_seed)
        trials = []
        for parent, variant in self._variant_folders():
            labels = point_labels(choice.values for choice in variant.choices)
            trials += [
                self._trial(f'{parent}/{folder}', variant, choice, seed)
                for folder, choice in zip(folder_names(labels), variant.choices)
            ]
        return trials

    @property
    def runs(self) -> list[Trial]:
        """The runs to compare: all variants with the first seed, then with the next, so that
        pairs complete together."""
        seeds = study_seeds(self.study)
        return [
            self._trial(
                f'{parent}/{folder}' if name else parent,
                variant,
                self.tuned_choices.get(variant.label, variant.costliest),
                seeds[name],
            )
            for name, folder in zip(seeds, folder_names(list(seeds)))
            for parent, variant in self._variant_folders()
        ]

    def _variant_folders(self) -> list[tuple[str, Variant]]:
        """The folder name of each variant, and the variant."""
        labels = [variant.label for variant in self.variants]
        return list(zip(folder_names(labels), self.variants))

    @property
    def rung_number(self) -> int | None:
        """The number of the rung, as its trials have it; None without a ladder."""
        return None if self.rung is None else self.rung.number

    def by_kind(self) -> dict[str, list[Trial]]:
        """All trials by kind, in the order in which the kinds are run."""
        return {TIMING: self.timing, TUNING: self.tuning, RUNS: self.runs}


def trials_by_kind(parts: Iterable[StudyTrials]) -> dict[str, list[Trial]]:
    """The trials of all parts by kind, in the order in which they are run."""
    result: dict[str, list[Trial]] = {}
    for part in parts:
        for kind, of_kind in part.by_kind().items():
            result.setdefault(kind, []).extend(of_kind)
    return result


def known_sum(numbers: Iterable[float | None]) -> float | None:
    """The sum; None if one of the numbers is unknown."""
    total: float = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total
