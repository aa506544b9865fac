"""How the groups of a comparison are called in its pictures, and how their runs ended."""

import re

from comparison.compare import Comparison
from comparison.groups import Group
from comparison.runs import DIVERGED, FINISHED, UNMEASURED, Run

# How a run ended, beside DIVERGED and FINISHED.
BLOWN_UP, UNFINISHED = 'ended above the untrained loss', 'not finished'


LONGEST_LABEL = 48  # characters


STYLED_GROUPS = 14  # groups that are told apart by color, line and marker, beside the baseline


def run_ending(run: Run) -> str:
    if run.outcome == DIVERGED:
        return DIVERGED
    if run.blown_up:
        return BLOWN_UP
    return FINISHED if run.outcome in (FINISHED, UNMEASURED) else UNFINISHED


def short_labels(comparison: Comparison) -> list[str]:
    """The groups' labels, short enough for a picture.

    Without the name of the option where a study varies one only, and without `arch_preset=`.
    """
    plan = comparison.study
    varied = {key for point in plan.variants.values() for key in point} if plan else set()
    names = varied if len(varied) == 1 else varied & {'arch_preset'}
    labels = comparison.labels
    for name in names:
        labels = [re.sub(rf'(?<!\S){re.escape(name)}=', '', label) for label in labels]
    return [*map(ellipsized, labels)]


def ellipsized(text: str, longest: int = LONGEST_LABEL) -> str:
    """The text with an ellipsis in its middle if it is too long: names differ at their ends."""
    if len(text) <= longest:
        return text
    begin = longest // 2
    return f'{text[:begin]}…{text[begin + 1 - longest :]}'


def legend(comparison: Comparison) -> list[tuple[int, str]]:
    """The groups that are told apart, by rank; those of the rest share one entry, the last."""
    labels, entries, unstyled = short_labels(comparison), [], []
    for rank, (group, label) in enumerate(zip(comparison.groups, labels), 1):
        if style_number(comparison, rank) is None:
            unstyled.append(rank)
            continue
        notes = ['baseline'] if group is comparison.baseline and len(labels) > 1 else []
        notes += _endings_text(group)
        entries.append((rank, f'#{rank} {label}' + (f' ({", ".join(notes)})' if notes else '')))
    if unstyled:
        entries.append((unstyled[0], f'the others, from #{unstyled[0]} on'))
    return entries


def style_number(comparison: Comparison, rank: int) -> int | None:
    """Which style a group has: 0 is the baseline's, None is that of all without their own."""
    baseline = comparison.baseline_rank
    if rank == baseline:
        return 0
    number = rank if rank < baseline else rank - 1
    return number if number <= STYLED_GROUPS else None


def _endings_text(group: Group) -> list[str]:
    """`2 of 5 diverged`, or what became of a single run."""
    endings, count = [*map(run_ending, group.runs)], len(group.runs)
    return [
        ending if count == 1 else f'{endings.count(ending)} of {count} {ending}'
        for ending in (DIVERGED, BLOWN_UP, UNFINISHED)
        if ending in endings
    ]
