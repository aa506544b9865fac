"""Labels and legends of the plots, and how runs ended."""

import re
from collections.abc import Sequence

from common.dict_option import leaves, short_name
from comparison.compare import Comparison
from comparison.conditions import START_OPTIONS
from comparison.runs import DIVERGED, FINISHED, UNMEASURED, Run
from comparison.study_plan import StudyPlan

# Endings of a run besides DIVERGED and FINISHED.
BLOWN_UP, UNFINISHED = 'ended above the untrained loss', 'not finished'
LONGEST_LABEL = 48  # characters
STYLED_GROUPS = 14  # groups with their own color, line and marker, besides the baseline


def run_ending(run: Run) -> str:
    if run.outcome == DIVERGED:
        return DIVERGED
    if run.blown_up:
        return BLOWN_UP
    return FINISHED if run.outcome in (FINISHED, UNMEASURED) else UNFINISHED


def short_labels(comparison: Comparison) -> list[str]:
    """The groups' labels, shortened for plots."""
    return shortened(comparison.labels, comparison.study)


def shortened(labels: Sequence[str], plan: StudyPlan | None) -> list[str]:
    """The labels without the option's name where a study varies only one, or those of a start."""
    points = plan.variants.values() if plan else ()
    varied = {short_name(name) for point in points for name in leaves(point)}
    names = varied if len(varied) == 1 else varied & {*START_OPTIONS}
    for name in names:
        labels = [re.sub(rf'(?<!\S){re.escape(name)}=', '', label) for label in labels]
    return [*map(ellipsized, labels)]


def ellipsized(text: str, longest: int = LONGEST_LABEL) -> str:
    """The text with an ellipsis in the middle if it is too long."""
    if len(text) <= longest:
        return text
    begin = longest // 2
    return f'{text[:begin]}…{text[begin + 1 - longest :]}'


def legend(comparison: Comparison) -> list[tuple[int, str]]:
    """(rank, text) of each group with its own style; all others share the last entry."""
    labels, entries, unstyled = short_labels(comparison), [], []
    for rank, (group, label) in enumerate(zip(comparison.groups, labels), 1):
        if style_number(comparison, rank) is None:
            unstyled.append(rank)
            continue
        notes = ['baseline'] if group is comparison.baseline and len(labels) > 1 else []
        notes += endings_text(group.runs)
        entries.append((rank, f'#{rank} {label}' + (f' ({", ".join(notes)})' if notes else '')))
    if unstyled:
        entries.append((unstyled[0], f'the others, from #{unstyled[0]}'))
    return entries


def style_number(comparison: Comparison, rank: int) -> int | None:
    """The style of a group: 0 is the baseline's, None the common style of the last groups."""
    baseline = comparison.baseline_rank
    if rank == baseline:
        return 0
    number = rank if rank < baseline else rank - 1
    return number if number <= STYLED_GROUPS else None


def endings_text(runs: Sequence[Run]) -> list[str]:
    """`2 of 5 diverged`, or the ending of a single run."""
    endings, count = [*map(run_ending, runs)], len(runs)
    return [
        ending if count == 1 else f'{endings.count(ending)} of {count} {ending}'
        for ending in (DIVERGED, BLOWN_UP, UNFINISHED)
        if ending in endings
    ]
