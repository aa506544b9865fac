"""Rows to a comparison: groups, ranking, baseline, verdicts, and what is not comparable."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.errors import UserError, nearest
from common.formatting import join_names
from comparison.analysis import (
    DIVERGED,
    SEEDS,
    Corrected,
    Effect,
    Group,
    Interaction,
    Verdict,
    corrected,
    group_runs,
    interactions,
    judge,
    main_effects,
)
from comparison.conditions import (
    IMMATERIAL,
    SPEED_CONDITIONS,
    Values,
    differing,
    differing_conditions,
    unlike_code,
    unlike_evaluations,
    unlike_loss_conditions,
)
from comparison.costs import COSTS, FRONTS, TIMES, AtEqualCost, at_equal_cost, fronts_of
from comparison.runs import Run, StudyPlan

SAME_BUDGET = 0.01  # budgets that differ by less are equal
# What a budget in FLOPs or seconds, or tuning, sets for each architecture by itself.
BUDGETED = ('tokens_seen', 'max_iters', 'warmup_iters', 'lr_decay_iters')
RISE = 0.02  # of the best validation loss: a run that ends so far above it is named


@dataclass(frozen=True)
class Comparison:
    """Everything that a rendering needs. `groups` and `labels` are in rank order, best loss first.

    A group is a run, or, where any are `repeated` with several seeds, all that differ in seed only.
    """

    groups: list[Group]
    labels: list[str]
    repeated: bool
    baseline: Group
    baseline_reason: str
    study: StudyPlan | None  # that all runs are of
    score: str  # 'final' or 'best': the evaluation by which a run is judged
    margin: float | None  # differences below it do not matter
    verdicts: list[Verdict]
    concurrent: int  # the most runs at a time on one machine; of more than one, no times
    costs: dict[str, str]  # COSTS that may be compared
    front_costs: dict[str, tuple]  # FRONTS that may be compared
    fronts: list[str]  # on which Pareto fronts a group lies: letters of FTM
    equal_cost: list[AtEqualCost]
    effects: list[tuple[Effect, Corrected | None]]  # corrected for their number
    interactions: list[tuple[Interaction, Corrected | None]]
    options: dict[str, Values]
    notes: list[str]
    loss_warnings: dict[str, Values]
    speed_warnings: dict[str, Values]
    best_warnings: dict[str, Values]  # what makes best losses incomparable, and final ones not
    code_warning: str | None
    skipped: list[str]

    @property
    def baseline_rank(self) -> int:
        """Its place in the ranking, from 1."""
        return self.groups.index(self.baseline) + 1

    @property
    def baseline_label(self) -> str:
        return self.labels[self.baseline_rank - 1]


def compare(
    runs: Iterable[Run],
    baseline: str | None = None,
    skipped: Sequence[str] = (),
    score: str = 'final',
    margin: float | None = None,
) -> Comparison:
    """Rank and judge the runs, and say what differs.

    Raises UserError where `baseline` names no single architecture.
    """
    oldest_first = sorted(runs, key=lambda run: run.start)
    groups = group_runs(oldest_first, training_of)
    repeated = any(len(group.members) > 1 for group in groups)
    if not repeated:
        groups = group_runs(oldest_first, lambda run: run.folder)
    labels = labels_of(groups)
    chosen, reason = baseline_of(groups, labels, baseline)
    unlike = unlike_loss_conditions(groups)
    if score == 'best':
        unlike |= unlike_evaluations(groups)
    loss_warnings, notes = without_fair_differences(groups, unlike)
    concurrent = max(run.conditions['concurrent_runs'][-1] for run in oldest_first)
    costs, front_costs = (
        {key: what for key, what in known.items() if concurrent == 1 or key not in TIMES}
        for known in (COSTS, FRONTS)
    )
    curves = all(len(run.curve) > 1 for group in groups for run in group.evidence)
    placed = axes_of(groups)
    effects, dependences = main_effects(placed), interactions(placed)
    if len({effect.option for effect in effects}) == 1:
        effects = []  # the verdicts say it, of all runs and with all that is known of the noise
    verdicts = judge(
        groups, chosen, margin, lambda group: _unlike(groups, group, chosen, loss_warnings)
    )
    return Comparison(
        groups=groups,
        labels=labels,
        repeated=repeated,
        baseline=chosen,
        baseline_reason=reason,
        study=study_of(groups),
        score=score,
        margin=margin,
        verdicts=verdicts,
        concurrent=concurrent,
        costs=costs,
        front_costs=front_costs,
        fronts=fronts_of(groups, front_costs),
        equal_cost=at_equal_cost(groups, costs) if curves else [],
        effects=list(zip(effects, corrected([effect.difference for effect in effects]))),
        interactions=list(zip(dependences, corrected([each.difference for each in dependences]))),
        options=differing_options(groups, repeated),
        notes=notes,
        loss_warnings=loss_warnings,
        speed_warnings=differing_conditions(groups, SPEED_CONDITIONS, lambda group: group.members),
        best_warnings=unlike_evaluations(groups) if score == 'final' else {},
        code_warning=unlike_code(groups),
        skipped=list(skipped),
    )


def differing_options(groups: Sequence[Group], repeated: bool) -> dict[str, Values]:
    ignored = {*IMMATERIAL, *SEEDS} if repeated else IMMATERIAL
    configs = [[run.config for run in group.members] for group in groups]
    keys = dict.fromkeys(key for group in configs for config in group for key in config)
    return differing(configs, [key for key in keys if key not in ignored])


def training_of(run: Run) -> tuple:
    """What two runs share that differ in their seeds alone."""
    apart = {*IMMATERIAL, *SEEDS, *run.choices, 'arch_preset', 'init_from'}
    training = sorted((key, str(run.config[key])) for key in run.config if key not in apart)
    return run.architecture_hash, run.conditions['weights_from'][-1], tuple(training)


def _unlike(
    groups: Sequence[Group], group: Group, baseline: Group, warnings: dict[str, Values]
) -> str | None:
    """Why the losses of a group and of the baseline are not directly comparable."""
    ranks = [groups.index(each) + 1 for each in (group, baseline)]
    keys = [
        key
        for key, values in warnings.items()
        if len({text for text, having in values.items() if set(ranks) & set(having)}) > 1
    ]
    return f'losses are not directly comparable ({join_names(keys)})' if keys else None


def without_fair_differences(
    groups: Sequence[Group], warnings: dict[str, Values]
) -> tuple[dict[str, Values], list[str]]:
    """The warnings, but for what a study, an equal budget or tuning explains; and notes on that."""
    notes: list[str] = []
    plan = study_of(groups)
    fair: set[str] = set()
    if 'tokens_seen' in warnings and all(group.losses for group in groups):
        flops = [run.causal_flops for group in groups for run in group.evidence]
        if all(flops) and max(flops) / min(flops) - 1 < SAME_BUDGET:
            spread = max(flops) / min(flops) - 1
            notes.append(f'Each trained with the same FLOPs (within {spread:.2%}), not tokens.')
            fair |= {*BUDGETED}
        elif plan and 'seconds' in plan.budget:
            seconds = plan.budget['seconds']
            notes.append(f'Each trained for as many iterations as {seconds:g} s were to buy it.')
            fair |= {*BUDGETED}
    if plan:
        # What a study varies is its question; and the lowest rate follows from the highest.
        own = {*plan.tuned, *(key for asked in plan.variants.values() for key in asked)}
        fair |= {*own, *(['min_lr'] if 'learning_rate' in own else [])}
        if plan.tuned:
            notes.append(f'Tuned for each by itself: {", ".join(plan.tuned)}; see TUNING.')
    return {key: values for key, values in warnings.items() if key not in fair}, notes


def axes_of(groups: Sequence[Group]) -> list[tuple[dict, Group]]:
    """Where each group lies in the grid of its study; nothing unless all are of one study."""
    finished = [group for group in groups if group.losses]
    plan = study_of(finished)
    by_variant = {group.members[0].variant: group for group in finished}
    variants = plan.variants if plan else {}
    return [(axes, by_variant[label]) for label, axes in variants.items() if label in by_variant]


def study_of(groups: Sequence[Group]) -> StudyPlan | None:
    """The study that all runs are of."""
    plans = {run.study for group in groups for run in group.members}
    return plans.pop() if len(plans) == 1 else None


def rises_of(group: Group) -> list[Run]:
    """The runs that end well above their best validation loss."""
    return [
        run
        for run in group.members
        if run.outcome != DIVERGED
        and run.curve
        and run.curve[-1].loss - run.best_val_loss > RISE * abs(run.best_val_loss)
    ]


# --- Names ---------------------------------------------------------------------------------------


def labels_of(groups: Sequence[Group]) -> list[str]:
    """A study's names of its variants; else architecture names, with what tells two apart:
    differing choices, or else the run's name."""
    runs = [group.members[0] for group in groups]
    variants = [run.variant for run in runs]
    if None not in variants and len({run.study for run in runs}) == 1:
        counts = Counter(variants)
        return [v if counts[v] == 1 else f'{v} {run.name}' for v, run in zip(variants, runs)]
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(run.architecture, []).append(run)
    keys = {}
    for name, group in alike.items():
        choices = dict.fromkeys(key for run in group for key in run.choices)
        keys[name] = differing([[run.choices] for run in group], choices)

    labels = []
    for run in runs:
        parts = [f'{key}={run.choices.get(key, "-")}' for key in keys[run.architecture]]
        labels.append(run.architecture + (f' [{", ".join(parts)}]' if parts else ''))
    counts = Counter(labels)
    return [
        f'{label} {run.name}' if counts[label] > 1 else label for label, run in zip(labels, runs)
    ]


def baseline_of(
    groups: Sequence[Group], labels: Sequence[str], name: str | None
) -> tuple[Group, str]:
    """The group that differences are to, and why it.

    By default what a study names, or the oldest finished run that has a loss: an experiment starts
    from what it is to be judged by, and that choice does not depend on how the others came out.
    Raises UserError where the name matches none, or several architectures.
    """
    if name is None:
        return _default_baseline(groups)
    name = name.rstrip('/')
    names = [_names_of(group, label) for group, label in zip(groups, labels)]
    matches = [group for group, known in zip(groups, names) if name in known]
    if not matches:
        part = name.casefold()
        matches = [
            group
            for group, known in zip(groups, names)
            if any(part in each.casefold() for each in known)
        ]
    if not matches:
        architectures = list(dict.fromkeys(group.members[0].architecture for group in groups))
        raise UserError(
            f'--baseline {name}: no run compared here has this in its architecture, name or '
            f'folder.{nearest(name, [each for known in names for each in known])} Architectures '
            f'here: {join_names(architectures)}'
        )
    if len({group.members[0].architecture_hash for group in matches}) > 1:
        ambiguous = [
            f'{label} ({group.members[0].folder})'
            for group, label in zip(groups, labels)
            if group in matches
        ]
        raise UserError(
            f'--baseline {name}: matches {len(matches)} runs of different architectures: '
            f'{join_names(ambiguous)}. Type more of the architecture, run or folder name'
        )
    several = '' if len(matches) == 1 else f', the oldest of {len(matches)} that match'
    return _oldest(matches), f'--baseline {name}{several}'


def _names_of(group: Group, label: str) -> set[str]:
    names = {label}
    for run in group.members:
        names |= {run.architecture, run.name, str(run.folder), str(run.folder.parent)}
    return names


def _oldest(candidates: Iterable[Group]) -> Group:
    """The oldest, finished ones with a loss first."""
    return min(candidates, key=lambda g: (g.loss is None, not g.losses, g.members[0].start))


def _default_baseline(groups: Sequence[Group]) -> tuple[Group, str]:
    plan, other = study_of(groups), '--baseline NAME chooses another'
    variants = {group.members[0].variant: group for group in groups}
    if plan and plan.baseline in variants:
        return variants[plan.baseline], f'the baseline of the study; {other}'
    if placed := axes_of(groups):
        return placed[0][1], f'the first of the study; {other}'
    chosen = _oldest(groups)
    return chosen, f'the oldest {"finished " * bool(chosen.losses)}run; {other}'
