"""Groups of runs that differ only in their seeds, with a mean score."""

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
    """Runs of one architecture and one training configuration that differ only in their seeds."""

    runs: list[Run]  # one per (seed, data_seed), finished or not

    @functools.cached_property
    def losses(self) -> dict[tuple, float]:
        """The losses of the finished runs by (seed, data_seed)."""
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
        """The number of runs with each outcome, finished first."""
        counts = Counter(run.outcome for run in self.runs)
        return Counter(dict(sorted(counts.items(), key=lambda item: item[0] != FINISHED)))

    @property
    def finished(self) -> bool:
        """Whether all runs have finished."""
        return self.outcomes[FINISHED] == len(self.runs)

    @functools.cached_property
    def scored_runs(self) -> list[Run]:
        """The finished runs, or all runs if none has finished."""
        return [run for run in self.runs if run.outcome == FINISHED] or self.runs

    @property
    def loss(self) -> float | None:
        """The mean loss of the scored runs."""
        return self.mean(lambda run: run.val_loss)

    def mean(
        self,
        metric: Metric,
        weight: Metric = lambda run: 1.0,
    ) -> float | None:
        """The weighted mean of a metric over the scored runs that have a value and a weight."""
        pairs = [(metric(run), weight(run)) for run in self.scored_runs]
        weighted_values = [
            (value, factor) for value, factor in pairs if value is not None and factor
        ]
        if not weighted_values:
            return None
        values, factors = zip(*weighted_values)
        return statistics.fmean(values, factors)

    def values(self, metric: Metric) -> list[float]:
        """The values of a metric over the scored runs that have it."""
        return [value for value in map(metric, self.scored_runs) if value is not None]


def run_seeds(run: Run) -> tuple:
    return tuple(run.config.get(name) for name in SEEDS)


def group_runs(runs: Iterable[Run], key: Callable[[Run], Hashable]) -> list[Group]:
    """Groups of the runs (oldest first) by `key(run)`, lowest loss first."""
    attempts: dict[Hashable, dict[tuple, list[Run]]] = {}
    for run in runs:
        attempts.setdefault(key(run), {}).setdefault(run_seeds(run), []).append(run)
    groups = [Group([*map(counted_attempt, by_seeds.values())]) for by_seeds in attempts.values()]
    return sorted(groups, key=lambda g: (g.loss is None, g.loss or 0.0, g.runs[0].start))


def counted_attempt(attempts: Sequence[Run]) -> Run:
    """Of several runs with equal seeds (oldest first), the one to use.

    Repeating a run adds no evidence. A diverged run counts even if a repetition finished; otherwise
    the first finished run counts, or else the last run.
    """
    for outcome in (DIVERGED, FINISHED):
        for run in attempts:
            if run.outcome == outcome:
                return run
    return attempts[-1]
