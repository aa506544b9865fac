"""The overview of a study before it runs: variants, runs, cost and time."""

from common.formatting import amount, counted, duration, table
from studies.grid import Study, study_seeds
from studies.ladder_overview import describe_rungs
from studies.state import StudyState
from studies.time_estimate import estimate_time
from studies.trials import RUNS, TIMING, TUNING, StudyTrials, Trial, known_sum, trials_by_kind
from studies.variants import Variant, matched_cells, values_text

TrialsByKind = dict[str, list[Trial]]


def describe(state: StudyState, measure: bool) -> str:
    """The variants with their matched sizes, the number of runs, and the cost of all.

    measure: whether to measure the speed if there are no runs yet.
    """
    study, parts = state.study, state.trials()
    by_kind = trials_by_kind(parts)
    undecided = {part.rung_number for part in parts if not state.is_decided(part)}
    left = {
        kind: [
            trial
            for trial in of_kind
            if (kind == RUNS and trial.rung in undecided) or not _has_ended(state, kind, trial)
        ]
        for kind, of_kind in by_kind.items()
    }
    seeds, first = len(study_seeds(study)), state.parts[0]
    counts = f'{counted(len(first.variants), "variant")} with {counted(seeds, "seed")} each'
    rungs = sum(part.rung is not None and not part.rung.extra for part in state.parts)
    at_rungs = f', at {rungs} rungs' if rungs else ''
    time = estimate_time(state, left, measure) if any(left.values()) else None
    lines = [
        *([study.question] if study.question else []),
        f'{study.path}: {counts}{at_rungs}; baseline: {first.baseline.label}',
        *(
            describe_rungs(state, by_kind, left, time)
            if study.ladder
            else [_variants_table(study, first.variants, by_kind)]
        ),
        *(
            f'{same.label}: not run, since its settings are those of {variant.label}'
            for variant in first.variants
            for same in variant.same
        ),
        _run_counts(study, by_kind, left),
        *_total_cost(state, parts, by_kind),
    ]
    if time is not None:
        lines.append(f'time left: about {duration(time.seconds)}, {time.source}')
    return '\n'.join(lines)


def _has_ended(state: StudyState, kind: str, trial: Trial) -> bool:
    outcome = state.runner.outcome(kind, trial)
    return outcome is not None and outcome.is_final


def _variants_table(study: Study, variants: list[Variant], by_kind: TrialsByKind) -> str:
    """Each variant with its size, and the cost of one run and of all its runs."""
    matching = study.match != 'none'
    sizes = [study.match_by, f'{study.match} vs. reference'] * matching
    rows = [['variant', *sizes, 'tokens/run', 'FLOPs/run', 'total FLOPs', 'architecture']]
    trials = [trial for of_kind in by_kind.values() for trial in of_kind]
    for variant in variants:
        row = [variant.label, *(matched_cells(variant) if matching else [])]
        run = next(trial for trial in by_kind[RUNS] if trial.variant == variant.label)
        total = known_sum(trial.flops for trial in trials if trial.variant == variant.label)
        figures = [amount(run.tokens), amount(run.flops), amount(total)]
        rows.append([*row, *figures, variant.settings.architecture.name])
    return table(rows, '<' + '>>' * matching + '>>><')


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


def _total_cost(state: StudyState, parts: list[StudyTrials], by_kind: TrialsByKind) -> list[str]:
    """Total tokens and FLOPs of the study, if they are known."""
    every = [trial for of_kind in by_kind.values() for trial in of_kind]
    tokens, flops = (
        known_sum(trial.tokens for trial in every),
        known_sum(trial.flops for trial in every),
    )
    if flops is None:
        budget = values_text(state.study.budget)
        return [f'total: unknown until iterations are timed (budget {budget} per run)']
    undecided = any(
        not state.is_decided(part)
        and any(len({c.flops_per_iter for c in variant.choices}) > 1 for variant in part.variants)
        for part in parts
    )
    at_most = ' at most, depending on the result of tuning' if undecided else ''
    total = f'{amount(tokens)} tokens, {amount(flops)} training FLOPs'
    return [f'total: {total}{at_most}']
