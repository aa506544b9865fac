"""The overview of a ladder before it runs: each rung with its sizes, cost and time."""

import contextlib
import itertools

from common.errors import UserError
from common.formatting import amount, duration, join_names, table, wrapped
from comparison.conditions import MODEL_NEUTRAL_OPTIONS
from configurator import flatten
from studies.grid import GRIDS, merged_settings
from studies.parts import StudyPart
from studies.points import merged_values
from studies.state import StudyState
from studies.time_estimate import TimeEstimate
from studies.trials import RUNS, Trial, known_sum
from studies.variants import matched_cells
from training_config import schema

# Repeated data is worth as much as new data up to about this many epochs (Muennighoff et al. 2023).
MOST_EPOCHS = 4
LARGE_DEVIATION = 0.2  # of the params of a rung from those in `ladder`, relative


def describe_rungs(
    state: StudyState,
    by_kind: dict[str, list[Trial]],
    left: dict[str, list[Trial]],
    time: TimeEstimate | None,
) -> list[str]:
    """Tables of the rungs and of their variants, and notes.

    by_kind: all trials; left: those that have not ended; time: that these take.
    """
    runs = by_kind[RUNS]
    notes = [*_size_notes(state, runs), *_time_notes(time)]
    return [
        _rungs_table(state, by_kind, left, time),
        *_variants_table(state, runs),
        *(wrapped(f'Note: {note}', '  ') for note in notes),
    ]


def _of_rung(by_kind: dict[str, list[Trial]], part: StudyPart) -> list[Trial]:
    assert part.rung is not None
    trials = [trial for of_kind in by_kind.values() for trial in of_kind]
    return [trial for trial in trials if trial.rung == part.rung.number]


def _first_run(runs: list[Trial], part: StudyPart, variant: str) -> Trial:
    return next(t for t in runs if part.rung and (t.rung, t.variant) == (part.rung.number, variant))


def _rungs_table(
    state: StudyState,
    by_kind: dict[str, list[Trial]],
    left: dict[str, list[Trial]],
    time: TimeEstimate | None,
) -> str:
    """Each rung with its sizes, the cost of a run of the baseline, and that of all runs."""
    rows = [['rung', 'sizes', 'params', 'tokens/run', 'epochs', 'FLOPs/run', 'runs']]
    rows[0] += ['total FLOPs', 'time left']
    available = state.runner.context.dataset.tokens('train')
    for part in state.parts:
        rung, trials = part.rung, _of_rung(by_kind, part)
        assert rung is not None
        run, of_left = _first_run(by_kind[RUNS], part, part.baseline.label), _of_rung(left, part)
        solved = f' ({rung.params / rung.target - 1:+.1%})' if rung.target else ''
        seconds = time.by_rung.get(rung.number) if time else None
        rows.append(
            [
                f'{rung.number + 1}{"*" * rung.extra}',
                rung.label,
                f'{rung.params:,}{solved}',
                amount(run.tokens),
                _epochs_text((run.tokens or 0) / available),
                amount(run.flops),
                str(len(trials)),
                amount(known_sum(trial.flops for trial in trials)),
                'unknown' if of_left and seconds is None else duration(seconds or 0.0),
            ]
        )
    return table(rows, '><>>>>>>>')


def _epochs_text(epochs: float) -> str:
    return f'{epochs:.2f}' if epochs >= 0.005 else '<0.01'


def _variants_table(state: StudyState, runs: list[Trial]) -> list[str]:
    """Each variant at each rung, if sizes are matched or costs differ; else nothing."""
    study = state.study
    matching = study.match != 'none'
    equal = all(
        len({_first_run(runs, part, each.label).flops for each in part.variants}) == 1
        for part in state.parts
    )
    if equal and not matching:
        return []
    sizes = [study.match_by, f'{study.match} vs. reference'] * matching
    rows = [['rung', 'variant', *sizes, 'tokens/run', 'FLOPs/run']]
    for part in state.parts:
        for index, variant in enumerate(part.variants):
            run = _first_run(runs, part, variant.label)
            number = f'{part.rung.number + 1}' if part.rung and index == 0 else ''
            row = [number, variant.label, *(matched_cells(variant) if matching else [])]
            rows.append([*row, amount(run.tokens), amount(run.flops)])
    return [table(rows, '><' + '>>' * matching + '>>')]


# --- Notes ---------------------------------------------------------------------------------------


def _size_notes(state: StudyState, runs: list[Trial]) -> list[str]:
    """What the figures do not say by themselves, a sentence each."""
    study, notes = state.study, []
    extra = [str(part.rung.number + 1) for part in state.parts if part.rung and part.rung.extra]
    if extra:
        notes.append(f'* only the baseline trains rung {join_names(extra)}.')
    if any(part.rung and part.rung.target for part in state.parts):
        notes.append('in parentheses, the deviation of params from the size in ladder.')
        falls = [
            f'{upper.number + 1} ({key})'
            for lower, upper in itertools.pairwise(part.rung for part in state.parts if part.rung)
            for key in ('n_layer', 'n_embd')
            if upper.target and upper.options[key] < lower.options[key]
        ]
        if falls:
            notes.append(
                f'a size falls at rung {join_names(falls)}, so the shape of the models changes. A '
                f'smaller head_size in ladder would avoid it.'
            )
        far = [
            f'{rung.number + 1} ({rung.params / rung.target - 1:+.0%})'
            for rung in (part.rung for part in state.parts)
            if rung and rung.target and abs(rung.params / rung.target - 1) > LARGE_DEVIATION
        ]
        if far:
            notes.append(
                f'params deviate by more than {LARGE_DEVIATION:.0%} at rung {join_names(far)}. A '
                f'smaller head_size in ladder, or larger params, would come closer.'
            )
    if fixed := _fixed_options(state, runs):
        notes.append(f'the same at all rungs: {"; ".join(fixed)}.')
    depths = {part.baseline.settings.architecture.n_layer for part in state.parts}
    if study.transfer == 'mup' and len(depths) > 1:
        notes.append("transfer='mup' has a rule for the width, and none for n_layer.")
    available = state.runner.context.dataset.tokens('train')
    repeated = [
        str(part.rung.number + 1)
        for part in state.parts
        if part.rung
        and (_first_run(runs, part, part.baseline.label).tokens or 0) > MOST_EPOCHS * available
    ]
    if repeated:
        notes.append(
            f'rung {join_names(repeated)}: more than {MOST_EPOCHS} epochs. Repeated data is worth '
            f'less than new data.'
        )
    return notes


def _time_notes(time: TimeEstimate | None) -> list[str]:
    assumed: dict[int, list[str]] = {}  # known rung -> those without a speed
    for rung, known in (time.speed_of if time else {}).items():
        if rung is not None and known is not None and rung != known:
            assumed.setdefault(known, []).append(str(rung + 1))
    return [
        f'the speed of rung {known + 1} is assumed for rung {join_names(rungs)}.'
        for known, rungs in assumed.items()
    ]


def _fixed_options(state: StudyState, runs: list[Trial]) -> list[str]:
    """Options that are set, and that would differ between the rungs if they were not."""
    study, texts = state.study, []
    swept = {key for name in GRIDS for key in getattr(study, name)}
    if study.transfer == 'none' and 'learning_rate' not in swept | study.ladder.keys():
        rate = state.parts[0].baseline.settings.run.learning_rate
        texts.append(f"learning_rate={rate:g} (transfer='mup' or tune would adapt it)")
    smallest, *_, largest = state.parts
    set_values = merged_values(*(layer.values for layer in study.command_line.layers))
    chosen = {*swept, *study.ladder, *(smallest.rung.options if smallest.rung else {})}
    for key, option in flatten(schema()).items():
        if option.default is not None or set_values.get(key) is None or key in chosen:
            continue
        if key in MODEL_NEUTRAL_OPTIONS:
            continue
        with contextlib.suppress(UserError):
            derived = [_derived(state, runs, part, key) for part in (smallest, largest)]
            if derived[0] != derived[1]:
                first, last = (_text(value) for value in derived)
                texts.append(f'{key}={_text(set_values[key])} (by default {first} to {last})')
    return texts


def _derived(state: StudyState, runs: list[Trial], part: StudyPart, key: str) -> object:
    """The value that an option of the baseline would have at a rung if it were not set."""
    run = _first_run(runs, part, part.baseline.label)
    settings = merged_settings(part.study, {**run.overrides, key: None})
    return settings.resolve(*state.runner.context).to_dict().get(key)


def _text(value: object) -> str:
    return f'{value:g}' if isinstance(value, float) else str(value)
