"""The comparison of runs: an ordinary one, or that of a ladder."""

from collections.abc import Sequence
from dataclasses import replace

from comparison.compare import Comparison, compare
from comparison.ladder import LadderComparison, compare_ladder, ladder_of, why_no_ladder
from comparison.runs import Run

AnyComparison = Comparison | LadderComparison


def compare_runs(
    runs: Sequence[Run],
    baseline: str | None = None,
    skipped: Sequence[str] = (),
    score: str = 'final',
    margin: float | None = None,
) -> AnyComparison:
    """The comparison of a ladder if all runs are of one, at several rungs; else an ordinary one.

    Raises UserError if `baseline` does not name a single architecture.
    """
    plan = ladder_of(runs)
    if plan is None:
        comparison = compare(runs, baseline, skipped, score, margin)
        return replace(comparison, ladder_warning=why_no_ladder(runs))
    return compare_ladder(plan, runs, baseline, skipped, score, margin)
