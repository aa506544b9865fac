"""The overview of a study before it runs: variants, runs, cost and time."""

from collections.abc import Iterable

from common.formatting import counted, duration, table
from studies.grid import Study, study_seeds
from studies.state import StudyState
from studies.time_estimate import estimate_time
from studies.trials import RUNS, TIMING, TUNING, StudyTrials, Trial
from studies.variants import Variant

TrialsByKind = dict[str, list[Trial]]


def values_text(values: dict) -> str:
    return ', '.join(f'{key}={value}' for key, value in values.items())


def describe(state: StudyState, measure: bool) -> str:
    """The variants with their matched sizes, the number of runs, and the cost of all.

    measure: whether to measure the speed if there are no runs yet.
    """
    study, runner, trials = state.study, state.runner, state.trials()
    by_kind = trials.by_kind()
    left = {
        kind: [trial for trial in of_kind if not _is_complete(state, trials, kind, trial)]
        for kind, of_kind in by_kind.items()
    }
    seeds = len(study_seeds(study))
    counts = f'{counted(len(state.variants), "variant")} with {counted(seeds, "seed")} each'
    lines = [
        *([study.question] if study.question else []),
        f'{study.path}: {counts}; baseline: {state.baseline.label}',
        _variants_table(study, state.variants, by_kind),
        *(
            f'{same.label}: not run, since its settings are those of {variant.label}'
            for variant in state.variants
            for same in variant.same
        ),
        _run_counts(study, by_kind, left),
        *_total_cost(state, trials),
    ]
    if any(left.values()) and (time := estimate_time(runner, trials, left, measure)):
        lines.append(f'time left: about {duration(time.seconds)}, {time.source}')
    return '\n'.join(lines)


def _is_complete(state: StudyState, trials: StudyTrials, kind: str, trial: Trial) -> bool:
    if kind == RUNS and not state.is_decided(trials):
        return False
    outcome = state.runner.outcome(kind, trial)
    return outcome is not None and outcome.is_final


def _variants_table(study: Study, variants: list[Variant], by_kind: TrialsByKind) -> str:
    """Each variant with its size, and the cost of one run and of all its runs."""
    matching = study.match != 'none'
    sizes = [study.match_by, f'{study.match} vs. reference'] * matching
    rows = [['variant', *sizes, 'tokens/run', 'FLOPs/run', 'total FLOPs', 'architecture']]
    trials = [trial for of_kind in by_kind.values() for trial in of_kind]
    for variant in variants:
        row = [variant.label]
        if matching:
            value, was, mismatch = variant.matched.values()
            changed = f' (was {_sizes_text(was)})' if was != value else ''
            row += [f'{_sizes_text(value)}{changed}', f'{mismatch:+.3%}']
        run = next(trial for trial in by_kind[RUNS] if trial.variant == variant.label)
        total = _sum(trial.flops for trial in trials if trial.variant == variant.label)
        figures = [_number_text(run.tokens), _number_text(run.flops), _number_text(total)]
        rows.append([*row, *figures, variant.settings.architecture.name])
    return table(rows, '<' + '>>' * matching + '>>><')


def _sizes_text(sizes: int | list[int] | None) -> str:
    """`168`; `168 and 256` if layers differ; `-` without any."""
    listed = sizes if isinstance(sizes, list) else [] if sizes is None else [sizes]
    return ' and '.join(f'{size:,}' for size in listed) or '-'


def _run_counts(study: Study, by_kind: TrialsByKind, left: TrialsByKind) -> str:
    """The number of runs of each kind, and of complete ones."""
    purposes = {
        TIMING: 'to time an iteration',
        TUNING: f'to tune {", ".join(study.tune)} with seed {study.tune_seed}',
        RUNS: 'to compare',
    }
    total = sum(map(len, by_kind.values()))
    parts = [f'{len(by_kind[kind])} {purposes[kind]}' for kind in by_kind if by_kind[kind]]
    complete = total - sum(map(len, left.values()))
    of_which = f' ({", ".join(parts)})' if len(parts) > 1 else ''
    return f'{counted(total, "run")}{of_which}, {complete} complete'


def _total_cost(state: StudyState, trials: StudyTrials) -> list[str]:
    """Total tokens and FLOPs of the study, if they are known."""
    every = [trial for of_kind in trials.by_kind().values() for trial in of_kind]
    tokens, flops = _sum(trial.tokens for trial in every), _sum(trial.flops for trial in every)
    if flops is None:
        budget = values_text(state.study.budget)
        return [f'total: unknown until iterations are timed (budget {budget} per run)']
    costs = [{choice.flops_per_iter for choice in variant.choices} for variant in state.variants]
    undecided = not state.is_decided(trials) and any(len(cost) > 1 for cost in costs)
    at_most = ' at most, depending on the result of tuning' if undecided else ''
    total = f'{_number_text(tokens)} tokens, {_number_text(flops)} training FLOPs'
    return [f'total: {total}{at_most}']


def _sum(numbers: Iterable[float | None]) -> float | None:
    """The sum; None if one of the numbers is unknown."""
    total: float = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total


def _number_text(number: float | None) -> str:
    if number is None:
        return 'unknown'
    return f'{number:,}' if isinstance(number, int) and number < 10**9 else f'{number:.3g}'
