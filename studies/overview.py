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
    study, parts = state.study, state.trials()
    by_kind = state.by_kind()
    decided = {id(part.rung): state.is_decided(part) for part in parts}
    left = {
        kind: [
            trial
            for part in parts
            for trial in part.by_kind()[kind]
            if not _is_complete(state, decided[id(part.rung)], kind, trial)
        ]
        for kind in by_kind
    }
    seeds, first = len(study_seeds(study)), state.parts[0]
    counts = f'{counted(len(first.variants), "variant")} with {counted(seeds, "seed")} each'
    rungs = sum(part.rung is not None and not part.rung.extra for part in state.parts)
    at_rungs = f', at {rungs} rungs' if rungs else ''
    lines = [
        *([study.question] if study.question else []),
        f'{study.path}: {counts}{at_rungs}; baseline: {first.baseline.label}',
        *(_rungs_table(state, by_kind) if study.ladder else []),
        *([] if study.ladder else [_variants_table(study, first.variants, by_kind)]),
        *(
            f'{same.label}: not run, since its settings are those of {variant.label}'
            for variant in first.variants
            for same in variant.same
        ),
        _run_counts(study, by_kind, left),
        *_total_cost(state, parts),
    ]
    if any(left.values()) and (time := estimate_time(state, left, measure)):
        lines.append(f'time left: about {duration(time.seconds)}, {time.source}')
    return '\n'.join(lines)


def _is_complete(state: StudyState, decided: bool, kind: str, trial: Trial) -> bool:
    if kind == RUNS and not decided:
        return False
    outcome = state.runner.outcome(kind, trial)
    return outcome is not None and outcome.is_final


def _rungs_table(state: StudyState, by_kind: TrialsByKind) -> list[str]:
    """Each rung with its size, and the cost of one run and of all its runs."""
    rows = [['rung', 'sizes', 'params', 'tokens/run', 'FLOPs/run', 'runs', 'total FLOPs']]
    for part in state.parts:
        if part.rung is None:
            continue
        trials = [trial for of_kind in by_kind.values() for trial in of_kind]
        trials = [trial for trial in trials if trial.rung == part.rung.number]
        run = next(t for t in trials if t.variant == part.baseline.label and t in by_kind[RUNS])
        only = ' (baseline only)' if part.rung.extra else ''
        rows.append(
            [
                str(part.rung.number + 1),
                f'{part.rung.label}{only}',
                f'{part.rung.params:,}',
                _number_text(run.tokens),
                _number_text(run.flops),
                str(len(trials)),
                _number_text(_sum(trial.flops for trial in trials)),
            ]
        )
    return [table(rows, '><>>>>>')]


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


def _total_cost(state: StudyState, parts: list[StudyTrials]) -> list[str]:
    """Total tokens and FLOPs of the study, if they are known."""
    every = [trial for p in parts for of_kind in p.by_kind().values() for trial in of_kind]
    tokens, flops = _sum(trial.tokens for trial in every), _sum(trial.flops for trial in every)
    if flops is None:
        budget = values_text(state.study.budget)
        return [f'total: unknown until iterations are timed (budget {budget} per run)']
    undecided = any(
        not state.is_decided(part)
        and any(len({c.flops_per_iter for c in variant.choices}) > 1 for variant in part.variants)
        for part in parts
    )
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
