"""From runs to a comparison: groups, ranking, baseline, verdicts and comparability."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from common.formatting import join_names
from comparison.analysis import (
    BASELINE,
    CorrectedTest,
    Verdict,
    holm_corrected,
    test_against_baseline,
)
from comparison.baseline import common_study, group_labels, select_baseline, study_grid
from comparison.conditions import MODEL_NEUTRAL_OPTIONS, SEEDS, SPEED_CONDITIONS, START_OPTIONS
from comparison.costs import COSTS, FRONTS, TIMES, AtEqualCost, at_equal_cost, front_letters
from comparison.differences import (
    Values,
    code_difference,
    differing_conditions,
    differing_evaluations,
    differing_loss_conditions,
    differing_values,
)
from comparison.effects import Effect, Interaction, interactions, main_effects
from comparison.groups import Group, Metric, group_runs
from comparison.runs import DIVERGED, Run
from comparison.shown_options import shown_options
from comparison.study_plan import StudyPlan

SAME_BUDGET = 0.01  # relative difference below which budgets are equal
# Options that a budget in FLOPs or seconds sets separately for each architecture.
BUDGETED_OPTIONS = ('tokens_seen', 'max_iters', 'warmup_iters', 'lr_decay_iters')
RISE = 0.02  # a run that ends this far above its best validation loss is reported


@dataclass(frozen=True)
class Comparison:
    """All data of a comparison. `groups` and `labels` are in rank order, lowest loss first.

    If any run is `repeated` with other seeds, a group is all runs that differ only in their seeds;
    otherwise each run is a group.
    """

    groups: list[Group]
    labels: list[str]
    repeated: bool
    baseline: Group
    baseline_reason: str
    study: StudyPlan | None  # that all runs belong to
    score: str  # 'final' or 'best': the evaluation by which runs are ranked
    margin: float | None  # differences below it are irrelevant
    verdicts: list[Verdict]
    concurrent: int  # runs trained at the same time on one machine; times are hidden above 1
    costs: dict[str, str]  # comparable COSTS
    front_costs: dict[str, tuple[str, Metric]]  # comparable FRONTS
    fronts: list[str]  # letters (FTM) of the Pareto fronts that a group lies on
    equal_cost: list[AtEqualCost]
    effects: list[tuple[Effect, CorrectedTest | None]]  # corrected for their number
    interactions: list[tuple[Interaction, CorrectedTest | None]]
    options: dict[str, Values]
    notes: list[str]
    loss_warnings: dict[str, Values]
    speed_warnings: dict[str, Values]
    best_warnings: dict[str, Values]  # affect best losses, but not final ones
    code_warning: str | None
    skipped: list[str]
    ladder_warning: str | None = None  # why runs of a ladder are not compared as such

    @property
    def baseline_rank(self) -> int:
        """The rank of the baseline, from 1."""
        return self.groups.index(self.baseline) + 1

    @property
    def baseline_label(self) -> str:
        return self.labels[self.baseline_rank - 1]

    @property
    def main_verdict(self) -> Verdict | None:
        """The verdict on the best group other than the baseline; None with a single group."""
        others = [verdict for verdict in self.verdicts if verdict.text != BASELINE]
        return others[0] if others else None


def compare(
    runs: Iterable[Run],
    baseline: str | None = None,
    skipped: Sequence[str] = (),
    score: str = 'final',
    margin: float | None = None,
) -> Comparison:
    """Rank the runs, test each group against the baseline, and collect what else differs.

    Raises UserError if `baseline` does not name a single architecture.
    """
    oldest_first = sorted(runs, key=lambda run: run.start)
    # Group and rank: by everything except the seeds, or each run separately if none is repeated.
    groups = group_runs(oldest_first, training_key)
    repeated = any(len(group.runs) > 1 for group in groups)
    if not repeated:
        groups = group_runs(oldest_first, lambda run: run.folder)
    labels = group_labels(groups)
    baseline_group, reason = select_baseline(groups, labels, baseline)
    # Conditions that make losses incomparable.
    conditions = differing_loss_conditions(groups)
    if score == 'best':
        conditions |= differing_evaluations(groups)
    loss_warnings, notes = drop_expected_differences(groups, conditions)
    # Costs, without times if runs trained at the same time.
    concurrent = max(run.conditions['concurrent_runs'][-1] for run in oldest_first)
    costs, front_costs = _costs_to_compare(concurrent)
    curves = all(len(run.curve) > 1 for group in groups for run in group.scored_runs)
    effects, interaction_tests = _grid_effects(groups)
    return Comparison(
        groups=groups,
        labels=labels,
        repeated=repeated,
        baseline=baseline_group,
        baseline_reason=reason,
        study=common_study(groups),
        score=score,
        margin=margin,
        verdicts=test_against_baseline(
            groups,
            baseline_group,
            margin,
            lambda group: _incomparable(groups, group, baseline_group, loss_warnings),
        ),
        concurrent=concurrent,
        costs=costs,
        front_costs=front_costs,
        fronts=front_letters(groups, front_costs),
        equal_cost=at_equal_cost(groups, costs) if curves else [],
        effects=effects,
        interactions=interaction_tests,
        options=differing_options(groups, repeated),
        notes=notes,
        loss_warnings=loss_warnings,
        speed_warnings=differing_conditions(groups, SPEED_CONDITIONS, lambda group: group.runs),
        best_warnings=differing_evaluations(groups) if score == 'final' else {},
        code_warning=code_difference(groups),
        skipped=list(skipped),
    )


def training_key(run: Run) -> Hashable:
    """A key that two runs share if they differ only in their seeds."""
    ignored = {*MODEL_NEUTRAL_OPTIONS, *SEEDS, *run.choices, *START_OPTIONS, 'init_from'}
    training = sorted((key, str(run.config[key])) for key in run.config if key not in ignored)
    return run.architecture_hash, run.conditions['weights_from'][-1], tuple(training)


def _costs_to_compare(concurrent: int) -> tuple[dict[str, str], dict[str, tuple[str, Metric]]]:
    """COSTS and FRONTS, without times if several runs trained at the same time."""
    hidden = TIMES if concurrent > 1 else ()
    return (
        {key: title for key, title in COSTS.items() if key not in hidden},
        {letter: cost for letter, cost in FRONTS.items() if letter not in hidden},
    )


def _grid_effects(
    groups: Sequence[Group],
) -> tuple[
    list[tuple[Effect, CorrectedTest | None]], list[tuple[Interaction, CorrectedTest | None]]
]:
    """The main effects and the interactions of a study's grid, each set corrected for its size."""
    grid = study_grid(groups)
    effects, pairs = main_effects(grid), interactions(grid)
    if len({effect.option for effect in effects}) == 1:
        effects = []  # the verdicts cover it, with a better estimate of the noise
    return (
        list(zip(effects, holm_corrected([effect.difference for effect in effects]))),
        list(zip(pairs, holm_corrected([interaction.difference for interaction in pairs]))),
    )


def differing_options(groups: Sequence[Group], repeated: bool) -> dict[str, Values]:
    """The options that differ between runs, except for the seeds where groups differ in them."""
    options = iter(shown_options(run for group in groups for run in group.runs))
    varied = varied_options([[next(options) for _ in group.runs] for group in groups])
    return {key: varied[key] for key in varied if not (repeated and key in SEEDS)}


def varied_options(configs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Values]:
    """The options that differ between the runs' configs and may affect the trained model."""
    keys = dict.fromkeys(key for group in configs for config in group for key in config)
    return differing_values(configs, [key for key in keys if key not in MODEL_NEUTRAL_OPTIONS])


def _incomparable(
    groups: Sequence[Group], group: Group, baseline: Group, warnings: dict[str, Values]
) -> str | None:
    """Why the losses of a group and of the baseline are not directly comparable."""
    ranks = {groups.index(each) + 1 for each in (group, baseline)}
    keys = [
        key
        for key, values in warnings.items()
        if len({text for text, having in values.items() if ranks.intersection(having)}) > 1
    ]
    return f'losses are not directly comparable ({join_names(keys)})' if keys else None


def drop_expected_differences(
    groups: Sequence[Group], warnings: dict[str, Values]
) -> tuple[dict[str, Values], list[str]]:
    """The warnings without those that a study, an equal budget or tuning explains; and notes."""
    notes: list[str] = []
    plan = common_study(groups)
    expected: set[str] = set()
    if 'tokens_seen' in warnings and all(group.losses for group in groups):
        note = _equal_budget(groups, plan)
        if note is not None:
            notes.append(note)
            expected |= {*BUDGETED_OPTIONS}
    if plan:
        # A study varies these on purpose; min_lr follows from learning_rate.
        expected |= {*plan.tuned, *(key for point in plan.variants.values() for key in point)}
        if 'learning_rate' in expected:
            expected.add('min_lr')
        if plan.tuned:
            notes.append(
                f'Tuned separately for each architecture: {", ".join(plan.tuned)} (see TUNING).'
            )
    return {key: values for key, values in warnings.items() if key not in expected}, notes


def _equal_budget(groups: Sequence[Group], plan: StudyPlan | None) -> str | None:
    """One sentence on the budget that all runs share instead of tokens, or None."""
    flops = [run.causal_flops or 0.0 for group in groups for run in group.scored_runs]
    if all(flops) and max(flops) / min(flops) - 1 < SAME_BUDGET:
        spread = max(flops) / min(flops) - 1
        return f'Equal training FLOPs (within {spread:.2%}) instead of equal tokens.'
    if plan and 'seconds' in plan.budget:
        seconds = plan.budget['seconds']
        return f'Equal training time instead of equal tokens: iterations for {seconds:g} s each.'
    return None


def runs_above_best(group: Group) -> list[Run]:
    """The runs that end well above their best validation loss."""
    return [
        run
        for run in group.runs
        if run.outcome != DIVERGED
        and run.curve
        and run.best_val_loss is not None
        and run.curve[-1].loss - run.best_val_loss > RISE * abs(run.best_val_loss)
    ]
