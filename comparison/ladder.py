"""The comparison of a ladder: an ordinary comparison at each rung, and the gains over all rungs."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from comparison.analysis import Verdict
from comparison.baseline import group_labels, select_baseline
from comparison.compare import BUDGETED_OPTIONS, Comparison, compare, training_key
from comparison.conditions import SPEED_CONDITIONS
from comparison.differences import (
    Values,
    code_difference,
    differing_conditions,
    loss_conditions,
)
from comparison.groups import Group, Metric, group_runs, run_seeds
from comparison.runs import FINISHED, Run
from comparison.study_plan import PLAN, LadderPlan, StudyPlan, unreadable_plan

if TYPE_CHECKING:
    from scaling.results import Gain, Ladder, LadderAnalysis, NoiseModel

MISSING = 'missing'  # outcome of a planned run without a record


@dataclass(frozen=True)
class LadderRung:
    """A rung, with its runs compared as those of any study."""

    number: int  # from 1, the smallest
    label: str
    options: dict
    params: int  # of the reference, without token table, output head and position tables
    extra: bool  # only the baseline of the study trains it
    tokens: float | None  # of a finished run, or else of the budget
    comparison: Comparison | None  # None without runs
    groups: dict[str, Group]  # variant -> its runs
    planned: Counter  # variant -> number of runs that the study has

    def outcomes(self, variant: str) -> Counter:
        """The number of runs of a variant with each outcome; planned ones are `missing`."""
        group = self.groups.get(variant)
        counts = Counter(group.outcomes if group else {})
        if missing := max(0, self.planned[variant] - counts.total()):
            counts[MISSING] = missing
        return counts

    def failures(self, variant: str) -> int:
        """The number of runs of a variant that have not finished, or not with a loss."""
        return sum(n for outcome, n in self.outcomes(variant).items() if outcome != FINISHED)


@dataclass(frozen=True)
class LadderComparison:
    """All data of the comparison of a ladder. Rungs are in the order of their size."""

    plan: LadderPlan
    study: StudyPlan
    rungs: list[LadderRung]  # all of the plan
    variants: list[str]  # labels, in the order of the study
    baseline: str  # label of the variant that others are compared with
    baseline_reason: str
    analysis: 'LadderAnalysis'  # of training FLOPs
    time_gains: 'dict[str, list[Gain]] | None'  # in seconds; None if runs did not train alone
    pair_noise: 'NoiseModel | None'  # of the difference of two variants with the same seed
    concurrent: int  # runs trained at the same time on one machine
    score: str  # 'final' or 'best': the evaluation by which runs are ranked
    margin: float | None  # differences below it are irrelevant
    without_cost: int  # finished runs without known FLOPs, which are not in the analysis
    loss_warnings: dict[str, Values]  # conditions that differ between rungs, by rung number
    speed_warnings: dict[str, Values]
    code_warning: str | None
    skipped: list[str]

    @property
    def others(self) -> list[str]:
        """The variants but the baseline."""
        return [label for label in self.variants if label != self.baseline]

    @property
    def top(self) -> LadderRung:
        """The largest rung that all variants train."""
        shared = [rung for rung in self.rungs if not rung.extra]
        return (shared or self.rungs)[-1]

    def cost_of(self, index: int) -> float | None:
        """The mean FLOPs of a run at a rung, over variants with finished runs there."""
        costs = [cost for each in self.analysis.ladder.costs.values() if (cost := each[index])]
        return statistics.geometric_mean(costs) if costs else None

    def verdict(self, rung: LadderRung, variant: str) -> Verdict | None:
        """The verdict on a variant at a rung; None without runs of it or of the baseline there."""
        comparison, group = rung.comparison, rung.groups.get(variant)
        if comparison is None or group is None or variant == self.baseline:
            return None
        if comparison.baseline is not rung.groups.get(self.baseline):
            return None
        verdict = comparison.verdicts[comparison.groups.index(group)]
        missing = tuple(
            f'{rung.outcomes(label)[MISSING]} of {rung.outcomes(label).total()} seeds of {whose}: '
            f'{MISSING}'
            for label, whose in ((variant, 'this architecture'), (self.baseline, 'the baseline'))
            if rung.outcomes(label)[MISSING]
        )
        return replace(verdict, reservations=(*verdict.reservations, *missing))

    @property
    def main_verdict(self) -> Verdict | None:
        """The verdict at the top rung on the best variant there but the baseline."""
        verdicts = [
            verdict
            for label in self.others
            if (verdict := self.verdict(self.top, label)) is not None
        ]
        return min(
            verdicts, key=lambda v: (v.group.loss is None, v.group.loss or 0.0), default=None
        )


def ladder_of(runs: Sequence[Run]) -> LadderPlan | None:
    """The ladder that all runs belong to, if they are at several of its rungs."""
    plans = {run.study for run in runs}
    ladders = {plan.ladder if plan and plan.rung else None for plan in plans}
    return ladders.pop() if len(ladders) == 1 and len(plans) > 1 else None


def why_no_ladder(runs: Sequence[Run]) -> str | None:
    """Why runs are not compared as a ladder, although some are or look like those of one."""
    rungs: dict[LadderPlan, set[int]] = {}
    for run in runs:
        if run.study and run.study.ladder and run.study.rung:
            rungs.setdefault(run.study.ladder, set()).add(run.study.rung.number)
    ladders = [ladder.folder for ladder, numbers in rungs.items() if len(numbers) > 1]
    if ladders:
        besides = 'runs of another ladder' if len(ladders) > 1 else 'other runs'
        return (
            f'No ladder is recognized, since {ladders[0]} and {besides} are compared together. For '
            'compute gains, give the folder of one ladder.'
        )
    unknown = [run.folder.absolute() for run in runs if not (run.study and run.study.rung)]
    for plan in filter(None, map(unreadable_plan, unknown)):
        return f'No study or ladder is recognized, since {plan} cannot be read as a plan.'
    # STUDY/runs/RUNG/VARIANT/SEED/RUN
    by_study: dict[Path, set[Path]] = {}
    for folder in unknown:
        if folder.parts[-5:-4] == ('runs',) and all('=' in folder.parts[i] for i in (-4, -2)):
            by_study.setdefault(folder.parents[4], set()).add(folder.parents[2])
    for study, of_rungs in by_study.items():
        if len(of_rungs) > 1:
            plan = study / PLAN
            why = f'{plan} does not name these runs' if plan.is_file() else f'{plan} is missing'
            return f'No ladder is recognized, since {why}.'
    return None


def compare_ladder(
    plan: LadderPlan,
    runs: Sequence[Run],
    baseline: str | None = None,
    skipped: Sequence[str] = (),
    score: str = 'final',
    margin: float | None = None,
) -> LadderComparison:
    """Compare the runs at each rung, and analyze the losses over all rungs.

    Raises UserError if `baseline` does not name a single architecture.
    """
    # These import numpy, which other comparisons do without.
    from scaling.analysis import analyze, analyze_gains
    from scaling.noise import noise_model

    by_rung = [[run for run in runs if run.study is study] for study in plan.plans]
    study = next(study for study, of_rung in zip(plan.plans, by_rung) if of_rung)
    # A damaged plan may lack the variant of a run.
    labels = [label for each in plan.plans for label in each.variants]
    oldest_first = sorted(runs, key=lambda run: run.start)
    variants = list(dict.fromkeys([*labels, *(str(run.variant) for run in oldest_first)]))
    label, reason = _baseline(study.baseline, variants, by_rung, baseline)
    rungs = [
        _rung(study, of_rung, label, score, margin) for study, of_rung in zip(plan.plans, by_rung)
    ]
    concurrent = max(run.conditions['concurrent_runs'][-1] for run in runs)
    ladder = _ladder_of_runs(rungs, variants, label, _flops)
    seconds = _ladder_of_runs(rungs, variants, label, _seconds)
    return LadderComparison(
        plan=plan,
        study=study,
        rungs=rungs,
        variants=variants,
        baseline=label,
        baseline_reason=reason,
        analysis=analyze(ladder),
        time_gains=analyze_gains(seconds) if concurrent == 1 else None,
        pair_noise=noise_model(ladder, paired=True),
        concurrent=concurrent,
        score=score,
        margin=margin,
        without_cost=sum(
            1
            for run in runs
            if run.outcome == FINISHED and run.val_loss is not None and not _flops(run)
        ),
        **_differences(plan, by_rung),
        skipped=list(skipped),
    )


# --- Baseline and rungs --------------------------------------------------------------------------


def _baseline(
    planned: str | None,
    variants: Sequence[str],
    by_rung: Sequence[Sequence[Run]],
    name: str | None,
) -> tuple[str, str]:
    """The label of the baseline, and the reason for this choice.

    planned: the baseline of the study. name: of another, which the user chose. Raises UserError if
    it does not name a single architecture.
    """
    if name is None:
        trained = {run.variant for of_rung in by_rung for run in of_rung}
        hint = '--baseline NAME chooses another'
        if planned is not None and planned in trained:
            return planned, f'the baseline of the study; {hint}'
        first = next(label for label in variants if label in trained)
        return first, f'the first of the study; {hint}'
    errors = []
    for of_rung in by_rung:
        groups = group_runs(sorted(of_rung, key=lambda run: run.start), training_key)
        try:
            group, reason = select_baseline(groups, group_labels(groups), name)
        except UserError as error:
            errors.append(error)
        else:
            return str(group.runs[0].variant), reason
    # The smallest rung is as good as any other to say which names there are.
    raise errors[0]


def _rung(
    study: StudyPlan, runs: Sequence[Run], baseline: str, score: str, margin: float | None
) -> LadderRung:
    """The rung of a plan with its runs. Raises UserError."""
    assert study.rung is not None
    comparison = None
    if runs:
        has_baseline = any(run.variant == baseline for run in runs)
        is_default = baseline == study.baseline
        name = baseline if has_baseline and not is_default else None
        comparison = compare(runs, name, (), score, margin)
    tokens = [
        run.conditions['tokens_seen'][-1]
        for run in runs
        if run.outcome == FINISHED and run.conditions['tokens_seen'][-1]
    ]
    return LadderRung(
        number=study.rung.number,
        label=study.rung.label,
        options=study.rung.options,
        params=study.rung.params,
        extra=study.rung.extra,
        tokens=statistics.fmean(tokens) if tokens else study.budget.get('tokens'),
        comparison=comparison,
        groups=_groups(comparison) if comparison else {},
        planned=Counter(
            label for trial, label in study.folders.items() if study.at(trial) is study
        ),
    )


def _groups(comparison: Comparison) -> dict[str, Group]:
    """The group of each variant; the one with the most losses, if options changed midway."""
    groups = sorted(
        comparison.groups,
        key=lambda group: (group is comparison.baseline, len(group.losses), group.runs[0].start),
    )
    return {str(group.runs[0].variant): group for group in groups}


# --- Analysis ------------------------------------------------------------------------------------


def _flops(run: Run) -> float | None:
    return run.causal_flops


def _seconds(run: Run) -> float | None:
    return run.train_seconds


def _ladder_of_runs(
    rungs: Sequence[LadderRung], variants: Sequence[str], baseline: str, cost: Metric
) -> 'Ladder':
    """The finished runs with a known cost."""
    from scaling.results import Ladder, LadderRun

    runs = [
        LadderRun(label, index, run_seeds(run), run.val_loss, amount)
        for index, rung in enumerate(rungs)
        for label, group in rung.groups.items()
        for run in group.runs
        if run.outcome == FINISHED and run.val_loss is not None and (amount := cost(run))
    ]
    return Ladder.of_runs(baseline, variants, len(rungs), runs)


def _differences(plan: LadderPlan, by_rung: Sequence[Sequence[Run]]) -> dict[str, Any]:
    """What differs between rungs besides their sizes and budgets, by rung number."""
    groups = [Group(list(of_rung)) for of_rung in by_rung]
    runs = [run for of_rung in by_rung for run in of_rung]
    expected = {'data_seed', 'peak_tflops', 'batch_size', *BUDGETED_OPTIONS}
    for study in plan.plans:
        points = [*study.variants.values(), study.rung.options if study.rung else {}]
        expected |= {*study.tuned, *(key for point in points for key in point)}
    if 'learning_rate' in expected:
        expected.add('min_lr')
    if expected & {'block_size', 'gradient_accumulation_steps'}:
        expected.add('tokens_per_iter')

    def between_rungs(keys: Iterable[str]) -> dict[str, Values]:
        differing = differing_conditions(groups, keys, lambda group: group.runs)
        return {
            key: values
            for key, values in differing.items()
            if key not in expected and len({tuple(ranks) for ranks in values.values()}) > 1
        }

    return {
        'loss_warnings': between_rungs(loss_conditions(runs)),
        'speed_warnings': between_rungs(SPEED_CONDITIONS),
        'code_warning': code_difference(groups),
    }
