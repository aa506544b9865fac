"""Labels of groups, and the choice of the baseline."""

from collections import Counter
from collections.abc import Iterable, Sequence

from common.errors import UserError, did_you_mean
from common.formatting import join_names
from comparison.conditions import START_OPTIONS
from comparison.differences import differing_values
from comparison.effects import GridPoint
from comparison.groups import Group
from comparison.runs import Run
from comparison.shown_options import shown_choices
from comparison.study_plan import StudyPlan


def common_study(groups: Sequence[Group]) -> StudyPlan | None:
    """The study that all runs belong to, or None."""
    plans = {run.study for group in groups for run in group.runs}
    return plans.pop() if len(plans) == 1 else None


def study_grid(groups: Sequence[Group]) -> list[tuple[GridPoint, Group]]:
    """Each finished group with its grid point; empty unless all belong to one study."""
    finished = [group for group in groups if group.losses]
    plan = common_study(finished)
    by_variant = {group.runs[0].variant: group for group in finished}
    variants = plan.variants if plan else {}
    return [(point, by_variant[label]) for label, point in variants.items() if label in by_variant]


# --- Names ---------------------------------------------------------------------------------------


def group_labels(groups: Sequence[Group]) -> list[str]:
    """One label per group: the variant's name in a study, else the architecture's name.

    Equal names get the choices that differ, or else the name of the run.
    """
    runs = [group.runs[0] for group in groups]
    variants = [run.variant for run in runs if run.variant is not None]
    if len(variants) == len(runs) and len({run.study for run in runs}) == 1:
        return _unique(variants, runs)
    choices = shown_choices(runs)
    by_architecture: dict[str, list[dict]] = {}
    for run, own in zip(runs, choices):
        by_architecture.setdefault(run.architecture, []).append(own)
    differing = {}
    for name, namesakes in by_architecture.items():
        keys = dict.fromkeys(key for own in namesakes for key in own)
        differing[name] = differing_values([[own] for own in namesakes], keys)
    labels = []
    for run, own in zip(runs, choices):
        parts = [f'{key}={own.get(key, "-")}' for key in differing[run.architecture]]
        labels.append(run.architecture + (f' [{", ".join(parts)}]' if parts else ''))
    return _unique(labels, runs)


def _unique(labels: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """The labels, with the run's name appended where several are equal."""
    counts = Counter(labels)
    return [
        f'{label} {run.name}' if counts[label] > 1 else label for label, run in zip(labels, runs)
    ]


# --- The baseline --------------------------------------------------------------------------------


def select_baseline(
    groups: Sequence[Group], labels: Sequence[str], name: str | None
) -> tuple[Group, str]:
    """The baseline, and the reason for this choice.

    By default the baseline of the study, or the oldest finished run with a loss: experiments start
    with their reference, and this choice does not depend on the results. Raises UserError if the
    name matches no architecture or several.
    """
    if name is None:
        return _default_baseline(groups)
    name = name.rstrip('/')
    names = [_names(group, label) for group, label in zip(groups, labels)]
    matches = _matches(groups, names, name)
    if not matches:
        architectures = list(dict.fromkeys(group.runs[0].architecture for group in groups))
        hint = did_you_mean(name, [each for known in names for each in known])
        raise UserError(
            f'--baseline {name}: no run in this comparison has this architecture, name, '
            f'folder or preset.{hint} Architectures: {join_names(architectures)}'
        )
    if len({group.runs[0].architecture_hash for group in matches}) > 1:
        ambiguous = [
            f'{label} ({group.runs[0].folder})'
            for group, label in zip(groups, labels)
            if group in matches
        ]
        raise UserError(
            f'--baseline {name}: matches {len(matches)} runs of different architectures: '
            f'{join_names(ambiguous)}. Give a longer part of the architecture, run or folder name'
        )
    several = '' if len(matches) == 1 else f', the oldest of {len(matches)} that match'
    return _oldest(matches), f'--baseline {name}{several}'


def _matches(groups: Sequence[Group], names: Sequence[set[str]], name: str) -> list[Group]:
    """The groups with exactly this name, or a name that contains it, or this preset or family."""
    exact = [group for group, known in zip(groups, names) if name in known]
    part = name.casefold()
    containing = [
        group
        for group, known in zip(groups, names)
        if any(part in each.casefold() for each in known)
    ]
    configs = [group.runs[0].config for group in groups]
    start = [g for g, c in zip(groups, configs) if name in map(c.get, START_OPTIONS)]
    return exact or containing or start


def _names(group: Group, label: str) -> set[str]:
    names = {label}
    for run in group.runs:
        names |= {run.architecture, run.name, str(run.folder), str(run.folder.parent)}
    return names


def _oldest(candidates: Iterable[Group]) -> Group:
    """The oldest group; finished groups with a loss come first."""
    return min(candidates, key=lambda g: (g.loss is None, not g.losses, g.runs[0].start))


def _default_baseline(groups: Sequence[Group]) -> tuple[Group, str]:
    plan, hint = common_study(groups), '--baseline NAME chooses another'
    variants = {group.runs[0].variant: group for group in groups}
    if plan and plan.baseline in variants:
        return variants[plan.baseline], f'the baseline of the study; {hint}'
    if grid := study_grid(groups):
        return grid[0][1], f'the first of the study; {hint}'
    oldest = _oldest(groups)
    return oldest, f'the oldest {"finished " * bool(oldest.losses)}run; {hint}'
