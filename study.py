"""Run a study: the grid of runs that a config file asks for, then the comparison.

    python study.py config/studies/gated_ffn.py
    python study.py config/studies/gated_ffn.py --jobs=2 --n_layer=4

The file is a config file of train.py with a grid beside the usual keys, for example

    sweep = {'ffn_type': ['standard', 'swiglu'], 'seed': [1, 2, 3]}

Each point is a process of its own: train.py with the options of the point, in a folder of its own
below out_dir. Points that are complete are skipped, interrupted ones resumed, failed ones reported
and tried again the next time; one that diverged is complete. Ctrl-C stops after the update in
progress, with everything saved. A folder takes one study at a time. What stands behind the file on
the command line is handed to every run. Keys of a study:

    question    what it is to answer, a line for the report
    sweep       {option: [values]}: every combination; 'seed' varies the data's seed with it
    ablate      {option: [values]}: the base, and each single change of it
    exclude     [{option: value}, …]: points of the grid to leave out
    baseline    the variant that the others are compared with, a dict of options (by default the
                `reference`, else the first of the grid)
    match       'params' or 'flops': make the variants equal to the `reference` (a dict of options,
                by default the base) by changing `match_by` ('d_ff', or another size) in steps of
                `match_step` (8)
    budget      {'iterations' | 'tokens' | 'flops' | 'seconds': amount} for each run
    tune        {option: [values]}: each variant first chooses its own best, at `tune_seed` (0),
                which is no seed of the sweep
"""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import compare_architectures
from common import (
    first_import,  # noqa: F401
    hardware,
)
from common.console_output import write_progress, write_text
from common.errors import UserError, run_script
from common.files import write_file
from common.formatting import duration, table
from common.registry import Option, at_least
from configurator import format_help, read_command_line
from data.dataset import load_dataset, prepare_if_missing
from studies.grid import STUDY_KEYS, Study, read_study, seeds_of, settings_of
from studies.progress import Progress, estimate
from studies.runner import ADVICE, Outcome, Runner, Stopped, figure
from studies.variants import (
    RUNS,
    TIMING,
    TUNING,
    Choice,
    Layout,
    Point,
    Variant,
    baseline_of,
    variants_of,
)
from training_config import schema as training_schema

OPTIONS = {
    'jobs': Option(
        int,
        1,
        'Runs at a time, on the GPUs that there are or sharing the cores; '
        'times are then not compared',
        check=at_least(1, at_most=1000),
    ),
    'plan_only': Option(bool, False, 'Show the runs and what they take, and start none'),
}


def schema() -> dict:
    return {'Study': OPTIONS, **training_schema()}


def main(argv: list[str]) -> int:
    command_line = read_command_line(argv, schema, aside=STUDY_KEYS)
    if command_line.help and not command_line.problems:
        write_text(format_help(__doc__, schema()))
        return 0
    study = read_study(command_line)
    settings = settings_of(study, {})
    base = settings.run
    device = hardware.select_device(base.device)
    dtype = hardware.resolve_dtype(base.dtype, device)
    prepare_if_missing(base.dataset)
    where = device, dtype, load_dataset(base.dataset, settings.architecture.block_size)
    variants = variants_of(study, where)
    plan_only, jobs = (command_line.value(key, schema) for key in ('plan_only', 'jobs'))
    runner = Runner(study, Path(base.out_dir), where, jobs, own_options=set(OPTIONS))
    plan = Plan(study, variants, baseline_of(study, variants), runner)
    if plan_only:
        write_text(describe(plan, measure=True))
        return 0
    write_progress(describe(plan, measure=False))
    return run_study(plan)


# --- What is run, and in which order -------------------------------------------------------------


class Tuned(NamedTuple):
    """What tuning chose for a variant, and which of the values are the end of their list."""

    choice: Choice
    loss: float
    at_edge: list[str]


@dataclass
class Plan:
    """A study, with what its runs so far decide about those to come."""

    study: Study
    variants: list[Variant]
    baseline: Variant
    runner: Runner

    def layout(self) -> Layout:
        """The runs, by what is known by now. Raises UserError."""
        seconds = self._seconds(Layout(self.study, self.variants))
        if seconds is None:
            return Layout(self.study, self.variants)
        tuned = self.tuned(Layout(self.study, self.variants, seconds))
        chosen = tuned and {label: result.choice for label, result in tuned.items()}
        return Layout(self.study, self.variants, seconds, chosen)

    def is_decided(self, layout: Layout) -> bool:
        """Whether every option of the runs themselves is."""
        timed = len(layout.seconds) == len(self.variants) or not layout.timing
        return timed and (len(layout.chosen) == len(self.variants) or not self.study.tune)

    def _seconds(self, layout: Layout) -> dict[str, float] | None:
        """Of an update of each variant, by the timing runs; None if some are not finished."""
        seconds = {}
        for point in layout.timing:
            outcome = self.runner.outcome(TIMING, point)
            if outcome is None or outcome.kind != 'finished':
                return None
            time_ms = figure(self.runner.record(TIMING, point), 'avg_time_ms')
            if not time_ms:
                raise UserError(f'{self.runner.folder(TIMING, point)}: its record has no times.')
            seconds[point.variant] = time_ms / 1000
        return seconds

    def tuned(self, layout: Layout) -> dict[str, Tuned] | None:
        """Each variant's best setting of the keys of `tune`, by the final validation loss.

        A run that diverged is the worst. None if some have not ended. Raises UserError.
        """
        best: dict[str, tuple[float, Point]] = {}
        for point in layout.tuning:
            outcome = self.runner.outcome(TUNING, point)
            if outcome is None or not outcome.is_final:
                return None
            loss = figure(self.runner.record(TUNING, point), 'final_val_loss')
            known = outcome.kind == 'finished' and loss is not None
            if known and loss < best.get(point.variant, (math.inf,))[0]:
                best[point.variant] = loss, point
        result = {}
        for variant in self.variants if self.study.tune else []:
            if variant.label not in best:
                raise UserError(
                    f'{self.study.path}: every run that tuned {variant.label} diverged. Give tune '
                    f'other values.'
                )
            loss, point = best[variant.label]
            values = point.choice.values
            at_edge = [k for k, listed in self.study.tune.items() if is_at_edge(values[k], listed)]
            result[variant.label] = Tuned(point.choice, loss, at_edge)
        return result


def is_at_edge(value, choices: list) -> bool:
    """Whether a larger or smaller value than any of the list might be better still."""
    numbers = all(type(choice) in (int, float) for choice in choices)
    return numbers and len(choices) > 1 and value in (min(choices), max(choices))


def run_study(plan: Plan) -> int:
    """Time and tune where the study asks for it, run every point, compare. The exit code."""
    runner = plan.runner
    with runner.active():
        try:
            kind, outcomes = train_points(plan)
        except Stopped as stop:
            write_progress(f'\nstopped, with everything saved. To go on: {runner.command}')
            return 128 + stop.signal
    # From here on a signal ends the study as it ends any program.
    if kind == RUNS and any(outcome.is_final for outcome in outcomes.values()):
        write_progress('')
        compare_architectures.main([str(runner.out_dir / RUNS)])
    return report_unfinished(kind, outcomes, runner)


def train_points(plan: Plan) -> tuple[str, dict[Point, Outcome]]:
    """The kind of runs that the study came to, the last one or where it cannot go on; and what
    became of those. Raises Stopped and UserError."""
    study, runner = plan.study, plan.runner
    progress = Progress(runner, plan.layout().points())
    for kind in (TIMING, TUNING):
        points = plan.layout().points()[kind]
        outcomes = runner.run(kind, points, progress)
        allowed = ('finished', 'diverged') if kind == TUNING else ('finished',)
        if any(outcome.kind not in allowed for outcome in outcomes.values()):
            return kind, outcomes
        if kind == TUNING and study.tune:
            for label, tuned in plan.tuned(plan.layout()).items():
                edge = f'; {", ".join(tuned.at_edge)} is at the end of its list: try beyond'
                write_progress(
                    f'tuned {label}: {shown(tuned.choice.values)} (validation loss '
                    f'{tuned.loss:.4f}{edge if tuned.at_edge else ""})'
                )
    points = plan.layout().runs
    write_plan(plan, points)
    return RUNS, runner.run(RUNS, points, progress)


def report_unfinished(kind: str, outcomes: dict[Point, Outcome], runner: Runner) -> int:
    """Name each run that did not finish, and what to do. The exit code.

    That of the signal if runs were interrupted and nothing else is wrong; diverged runs are results
    like others, unless there are no others.
    """
    for point, outcome in outcomes.items():
        if outcome.kind == 'finished':
            continue
        reason = f' ({outcome.reason})' if outcome.reason else ''
        if outcome.kind in ('failed', 'killed'):
            reason += f', see {runner.console(kind, point)}'
        write_progress(f'{outcome.kind}: {point.folder}{reason}: {ADVICE[outcome.kind]}')
    kinds = {outcome.kind for outcome in outcomes.values()}
    if kind != RUNS:
        write_progress(f'The study goes on once its {kind} runs have ended: {runner.command}')
    if kinds <= {'finished', 'diverged'} and 'finished' in kinds and kind == RUNS:
        return 0
    if kinds <= {'finished', 'diverged', 'interrupted'} and 'interrupted' in kinds:
        return max(outcome.code for outcome in outcomes.values())
    return 1


def write_plan(plan: Plan, points: list[Point]) -> None:
    """`study.json` beside the runs: the question, what was made equal or chosen, every command."""
    study, runner = plan.study, plan.runner
    tuned = plan.tuned(plan.layout()) or {}
    data = {
        'question': study.question,
        'command': runner.command,
        'study_file': study.command_line.config_files[0],
        'match': study.match,
        'match_by': study.match_by,
        'budget': study.budget,
        'tuned': list(study.tune),
        'baseline': plan.baseline.label,
        'variants': [
            {
                'label': v.label,
                'asked': v.asked,
                'matched': v.matched or None,
                'tuned': tuned[v.label].choice.values if v.label in tuned else {},
                'tuned_at_edge': tuned[v.label].at_edge if v.label in tuned else [],
            }
            for v in plan.variants
        ],
        'points': [
            {
                'folder': f'{RUNS}/{point.folder}',
                'variant': point.variant,
                'command': shlex.join(runner.arguments(RUNS, point)),
            }
            for point in points
        ],
    }
    runner.out_dir.mkdir(parents=True, exist_ok=True)
    write_file(runner.out_dir / 'study.json', json.dumps(data, indent=1).encode())


# --- What it says beforehand ---------------------------------------------------------------------


def shown(values: dict) -> str:
    return ', '.join(f'{key}={value}' for key, value in values.items())


def describe(plan: Plan, measure: bool) -> str:
    """The variants, what was changed to make them equal, the number of runs and what they take.

    measure: whether speed may be measured where no run tells it.
    """
    study, runner, layout = plan.study, plan.runner, plan.layout()
    points = layout.points()
    left = {
        kind: [p for p in points[kind] if not _is_complete(plan, layout, kind, p)]
        for kind in points
    }
    seeds = len(seeds_of(study))
    counts = f'{len(plan.variants)} variants, {seeds} seed{"s" * (seeds > 1)} of each'
    lines = [
        *([study.question] if study.question else []),
        f'{study.path}: {counts}; baseline: {plan.baseline.label}',
        _variants_table(study, plan.variants, points),
        _run_counts(study, points, left),
        *_total_cost(plan, layout, points),
    ]
    if any(left.values()) and (time := estimate(runner, layout, left, measure)):
        lines.append(f'time left: about {duration(time.seconds)}, {time.source}')
    return '\n'.join(lines)


def _is_complete(plan: Plan, layout: Layout, kind: str, point: Point) -> bool:
    if kind == RUNS and not plan.is_decided(layout):
        return False
    outcome = plan.runner.outcome(kind, point)
    return outcome is not None and outcome.is_final


def _variants_table(study: Study, variants: list[Variant], points: dict[str, list[Point]]) -> str:
    """Each variant with its size, and what one run of it and all of them cost."""
    matching = study.match != 'none'
    sizes = [study.match_by, f'{study.match} off by'] * matching
    rows = [['variant', *sizes, 'tokens a run', 'FLOPs a run', 'all FLOPs', 'architecture']]
    every = [point for kind in points.values() for point in kind]
    for variant in variants:
        row = [variant.label]
        if matching:
            value, was, mismatch = variant.matched.values()
            row += [f'{value:,}' + (f' (was {was:,})' if was != value else ''), f'{mismatch:+.3%}']
        run = next(point for point in points[RUNS] if point.variant == variant.label)
        total = _sum(point.flops for point in every if point.variant == variant.label)
        figures = [_figure(run.tokens), _figure(run.flops), _figure(total)]
        rows.append([*row, *figures, variant.settings.architecture.name])
    return table(rows, '<' + '>>' * matching + '>>><')


def _run_counts(study: Study, points: dict, left: dict) -> str:
    """How many runs of each kind there are, and how many are complete."""
    purposes = {
        TIMING: 'to time an update',
        TUNING: f'to tune {", ".join(study.tune)} at seed {study.tune_seed}',
        RUNS: 'to compare',
    }
    total = sum(map(len, points.values()))
    parts = [f'{len(points[kind])} {purposes[kind]}' for kind in points if points[kind]]
    complete = total - sum(map(len, left.values()))
    of_which = f' ({", ".join(parts)})' if len(parts) > 1 else ''
    return f'{total} run{"s" * (total > 1)}{of_which}; {complete} complete'


def _total_cost(plan: Plan, layout: Layout, points: dict[str, list[Point]]) -> list[str]:
    """Tokens and FLOPs of the whole study, once they are known."""
    every = [point for kind in points.values() for point in kind]
    tokens, flops = (_sum(getattr(p, key) for p in every) for key in ('tokens', 'flops'))
    if flops is None:
        return [f'tokens and FLOPs: what {shown(plan.study.budget)} buys, once they are timed']
    costs = [{choice.flops for choice in variant.choices} for variant in plan.variants]
    open_choice = not plan.is_decided(layout) and any(len(cost) > 1 for cost in costs)
    at_most = ' at most, since tuning is still to choose' if open_choice else ''
    return [f'in all: {_figure(tokens)} tokens, {_figure(flops)} training FLOPs{at_most}']


def _sum(numbers) -> float | None:
    """None where one of them is unknown."""
    numbers = list(numbers)
    return None if None in numbers else sum(numbers)


def _figure(number: float | None) -> str:
    if number is None:
        return 'unknown'
    return f'{number:,}' if isinstance(number, int) and number < 10**9 else f'{number:.3g}'


if __name__ == '__main__':
    run_script(main)
