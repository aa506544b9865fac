"""Run a study from the first trial to the comparison, and report unfinished runs."""

import json
import shlex
from pathlib import Path

from common.console_output import write_progress, write_text
from common.files import write_file
from comparison.answer import compare_runs
from comparison.formats import emphasize, render_text
from comparison.load import read_runs
from studies.outcome import ADVICE, Outcome
from studies.parts import StudyPart
from studies.progress import StudyProgress
from studies.runner import StudyRunner, StudyStopped
from studies.state import StudyState, TunedVariant
from studies.time_estimate import RunTimes
from studies.trials import RUNS, TIMING, TUNING, StudyTrials, Trial
from studies.variants import Variant, values_text


def run_study(state: StudyState) -> int:
    """Run timing, tuning and comparison runs, then compare. Returns the exit code."""
    runner = state.runner
    with runner.active():
        try:
            kind, outcomes = train_trials(state)
        except StudyStopped as stop:
            write_progress(f'\nstopped; progress is saved. To continue: {runner.command}')
            return 128 + stop.signal
    # From here on, signals have their default effect.
    if kind == RUNS and any(outcome.is_final for outcome in outcomes.values()):
        write_progress('')
        print_comparison(runner.out_dir / RUNS)
    return report_unfinished(kind, outcomes, runner)


def train_trials(state: StudyState) -> tuple[str, dict[Trial, Outcome]]:
    """Run the trials of each kind in turn, until one kind has trials that have not ended.

    Returns the last kind and the outcomes of its trials. Raises StudyStopped and UserError.
    """
    times = None
    if state.study.ladder:
        times = RunTimes(state)
        times.measure()
    with StudyProgress(state.runner, state.by_kind(), times) as progress:
        return _train_trials(state, progress)


def _train_trials(state: StudyState, progress: StudyProgress) -> tuple[str, dict[Trial, Outcome]]:
    study, runner = state.study, state.runner
    for kind in (TIMING, TUNING):
        trials = state.by_kind()[kind]
        outcomes = runner.run(kind, trials, progress)
        allowed = ('finished', 'diverged') if kind == TUNING else ('finished',)
        if any(outcome.kind not in allowed for outcome in outcomes.values()):
            return kind, outcomes
        if kind == TUNING and study.tune:
            for part in state.trials():
                write_tuned(part, state.tuned(part) or {})
    trials = state.by_kind()[RUNS]
    write_study_plan(state, trials)
    return RUNS, runner.run(RUNS, trials, progress)


def write_tuned(trials: StudyTrials, tuned: dict[str, TunedVariant]) -> None:
    """Report the best values of each variant."""
    for label, variant in tuned.items():
        rung = f' at {trials.rung.label}' if trials.rung else ''
        edge = f'; {", ".join(variant.at_edge)} is at the end of its list, so extend the list'
        write_progress(
            f'tuned {label}{rung}: {values_text(variant.choice.values)} (validation loss '
            f'{variant.loss:.4f}{edge if variant.at_edge else ""})'
        )


def print_comparison(folder: Path) -> None:
    """Print the output of `compare_architectures.py` for a folder. Raises UserError."""
    runs, skipped = read_runs([folder])
    write_text(emphasize(render_text(compare_runs(runs, skipped=skipped))), end='')


def report_unfinished(kind: str, outcomes: dict[Trial, Outcome], runner: StudyRunner) -> int:
    """Report each run that did not finish, with advice. Returns the exit code.

    It is that of the signal if runs were interrupted and none failed. Diverged runs count as
    results, unless all diverged.
    """
    for trial, outcome in outcomes.items():
        if outcome.kind == 'finished':
            continue
        reason = f' ({outcome.reason})' if outcome.reason else ''
        if outcome.kind in ('failed', 'killed'):
            reason += f', see {runner.console(kind, trial)}'
        write_progress(f'{outcome.kind}: {trial.folder}{reason}: {ADVICE[outcome.kind]}')
    kinds = {outcome.kind for outcome in outcomes.values()}
    if kind != RUNS:
        write_progress(
            f'The comparison needs all {kind} runs. Run the same command to continue: '
            f'{runner.command}'
        )
    if kinds <= {'finished', 'diverged'} and 'finished' in kinds and kind == RUNS:
        return 0
    if kinds <= {'finished', 'diverged', 'interrupted'} and 'interrupted' in kinds:
        return max(outcome.code for outcome in outcomes.values())
    return 1


def write_study_plan(state: StudyState, trials: list[Trial]) -> None:
    """Write `study.json`: the question, matched sizes, tuned options, rungs, and all commands."""
    study, runner = state.study, state.runner
    parts = list(zip(state.parts, state.trials(), strict=True))
    first = state.parts[0]
    if study.ladder:
        # Sizes and tuned values are those of the rungs.
        variants = [{**_variant_entry(v, None), 'matched': None} for v in first.variants]
    else:
        variants = _variant_entries(state, *parts[0])
    data = {
        'question': study.question,
        'command': runner.command,
        'study_file': study.command_line.config_files[0],
        'match': study.match,
        'match_by': study.match_by,
        'budget': study.budget,
        'tuned': list(study.tune),
        'baseline': first.baseline.label,
        'variants': variants,
        'ladder': _ladder_entry(state, parts) if study.ladder else None,
        'points': [
            {
                'folder': f'{RUNS}/{trial.folder}',
                'variant': trial.variant,
                **({} if trial.rung is None else {'rung': trial.rung}),
                'command': shlex.join(runner.arguments(RUNS, trial)),
            }
            for trial in trials
        ],
    }
    runner.out_dir.mkdir(parents=True, exist_ok=True)
    write_file(runner.out_dir / 'study.json', json.dumps(data, indent=1).encode())


def _ladder_entry(state: StudyState, parts: list[tuple[StudyPart, StudyTrials]]) -> dict:
    """The rungs, each with its variants."""
    return {
        'horizon': state.study.horizon,
        'transfer': state.study.transfer,
        'rungs': [
            {
                **{key: getattr(part.rung, key) for key in ('label', 'options', 'params')},
                **{key: getattr(part.rung, key) for key in ('extra', 'budget')},
                'variants': _variant_entries(state, part, trials),
            }
            for part, trials in parts
        ],
    }


def _variant_entries(state: StudyState, part: StudyPart, trials: StudyTrials) -> list[dict]:
    tuned = state.tuned(trials) or {}
    return [_variant_entry(variant, tuned.get(variant.label)) for variant in part.variants]


def _variant_entry(variant: Variant, tuned: TunedVariant | None) -> dict:
    return {
        'label': variant.label,
        'asked': variant.grid_point,
        'matched': variant.matched or None,
        'tuned': tuned.choice.values if tuned else {},
        'tuned_at_edge': tuned.at_edge if tuned else [],
    }
