"""Runs that differ in their seeds alone, as one group with a mean score."""

import functools
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from comparison.conditions import SEEDS
from comparison.runs import DIVERGED, FINISHED, Run
from comparison.significance import MeanEstimate, estimate_mean

Metric = Callable[[Run], float | None]


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one architecture, trained alike, that differ in their seeds alone."""

    runs: list[Run]  # one for each pair of seeds, whatever became of them

    @functools.cached_property
    def losses(self) -> dict[tuple, float]:
        """The scores of the finished runs by (seed, data_seed)."""
        return {
            run_seeds(run): run.val_loss
            for run in self.runs
            if run.outcome == FINISHED and run.val_loss is not None
        }

    @functools.cached_property
    def estimate(self) -> MeanEstimate | None:
        return estimate_mean([*self.losses.values()]) if self.losses else None

    @functools.cached_property
    def outcomes(self) -> Counter:
        """How many runs ended in each way, finished ones first."""
        counts = Counter(run.outcome for run in self.runs)
        return Counter(dict(sorted(counts.items(), key=lambda item: item[0] != FINISHED)))

    @property
    def finished(self) -> bool:
        """Whether every run is."""
        return self.outcomes[FINISHED] == len(self.runs)

    @functools.cached_property
    def scored_runs(self) -> list[Run]:
        """The finished runs; without any, all of them, as far as they came."""
        return [run for run in self.runs if run.outcome == FINISHED] or self.runs

    @property
    def loss(self) -> float | None:
        """The mean score of the finished runs; without any, that of the others so far."""
        return self.mean(lambda run: run.val_loss)

    def mean(
        self,
        metric: Metric,
        weight: Metric = lambda run: 1.0,
    ) -> float | None:
        """The mean of a run's metric over the scored runs that have it, and that have a weight."""
        pairs = [(metric(run), weight(run)) for run in self.scored_runs]
        weighted_values = [
            (value, factor) for value, factor in pairs if value is not None and factor
        ]
        if not weighted_values:
            return None
        values, factors = zip(*weighted_values)
        return statistics.fmean(values, factors)

    def values(self, metric: Metric) -> list[float]:
        """A run's metric, of the scored runs that have it."""
        return [value for value in map(metric, self.scored_runs) if value is not None]


def run_seeds(run: Run) -> tuple:
    return tuple(run.config.get(name) for name in SEEDS)


def group_runs(runs: Iterable[Run], key: Callable[[Run], Hashable]) -> list[Group]:
    """All runs, oldest first, by `key(run)`; best first."""
    attempts: dict[Hashable, dict[tuple, list[Run]]] = {}
    for run in runs:
        attempts.setdefault(key(run), {}).setdefault(run_seeds(run), []).append(run)
    groups = [Group([*map(counted_attempt, by_seeds.values())]) for by_seeds in attempts.values()]
    return sorted(groups, key=lambda g: (g.loss is None, g.loss or 0.0, g.runs[0].start))


def counted_attempt(attempts: Sequence[Run]) -> Run:
    """The one of several runs with equal seeds, oldest first, that counts.

    A repeated run is no further evidence. One that diverged is evidence that no repetition undoes;
    else the first that finished counts, else the last.
    """
    for outcome in (DIVERGED, FINISHED):
        for run in attempts:
            if run.outcome == outcome:
                return run
    return attempts[-1]
