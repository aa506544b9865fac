"""The number of seeds that a study needs for a precision, from the noise of finished runs."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from common.formatting import amount, counted, nats, or_dash, table, wrapped
from comparison.groups import run_seeds
from comparison.load import read_runs
from comparison.runs import FINISHED, causal_flops
from comparison.significance import CONFIDENCE, POWER, detectable_ratio
from comparison.study_plan import read_study_plan
from scaling.results import Ladder, LadderRun, NoiseModel
from studies.grid import SEED_KEYS, study_seeds
from studies.outcome import summary_value
from studies.state import StudyState
from studies.trials import RUNS

MOST_SEEDS = 1_000_000  # that are computed


class RungSeeds(NamedTuple):
    """The seeds of a rung. Deviations and differences are in nats per token."""

    rung: int
    flops: float  # mean over the variants' runs
    deviation: float  # expected of the difference of two variants with the same seed
    needed: int | None  # for the precision; None: more than MOST_SEEDS, or no precision is given
    detectable: float | None  # difference that the planned seeds find; None with a single seed


def describe_seeds(state: StudyState, precision: float | None, noise_from: str | None) -> list[str]:
    """The seeds that each rung needs, and what the planned ones detect. Raises UserError.

    precision: half-width of the interval of a difference, in nats per token. noise_from: folder of
    another study, whose noise counts while this one has no several seeds of a variant.
    """
    runs, source = own_runs(state), str(state.runner.out_dir)
    model = noise_of(runs)
    if model is None and noise_from is not None:
        runs, source = runs_of_study(Path(noise_from)), noise_from
        model = noise_of(runs)
        if model is None:
            raise UserError(
                f'noise_from={noise_from!r}: no variant there has finished runs with several '
                f'seeds. Choose the folder of another study.'
            )
    if model is None:
        if precision is None:
            return []
        return [
            wrapped(
                'seeds needed: unknown without finished runs that differ in their seeds. Train the '
                'first ones and show the plan again, or use those of another study: '
                '--noise_from=FOLDER.'
            )
        ]
    is_own = noise_from is None or source != noise_from
    seeds = len(study_seeds(state.study))
    rows = rung_seeds(state, model, precision, is_own)
    return _seeds_text(rows, precision, seeds, f'{counted(len(runs), "run")} in {source}')


def _seeds_text(
    rows: list[RungSeeds], precision: float | None, planned: int, source: str
) -> list[str]:
    header = ['rung', 'FLOPs/run', 'noise', 'seeds needed', 'planned', 'detectable']
    cells = [
        [
            str(row.rung + 1),
            amount(row.flops),
            nats(row.deviation),
            f'> {MOST_SEEDS:,}' if row.needed is None else f'{row.needed:,}',
            str(planned),
            or_dash(row.detectable, nats),
        ]
        for row in rows
    ]
    if precision is None:
        header, *cells = [line[:3] + line[4:] for line in (header, *cells)]
    needed = (
        f'seeds needed: for a {CONFIDENCE:.0%} interval of a difference of ± {precision:g}. '
        if precision is not None
        else ''
    )
    return [
        table([header, *cells], '>>>>>>'[: len(header)]),
        wrapped(
            f'noise: expected standard deviation of the difference of two variants with the same '
            f'seed, in nats per token, from {source}. {needed}detectable: the difference that the '
            f'planned seeds find with {POWER:.0%} probability.'
        ),
    ]


def rung_seeds(
    state: StudyState, model: NoiseModel, precision: float | None, is_own: bool
) -> list[RungSeeds]:
    """The seeds of each rung that all variants train.

    is_own: whether the model is of the runs of this study, so that its rungs are those here.
    """
    from scaling.noise import moderated_deviation, seeds_needed

    rows = []
    planned, runs = len(study_seeds(state.study)), state.by_kind()[RUNS]
    for index, part in enumerate(state.parts):
        costs = [trial.flops for trial in runs if trial.rung == (part.rung and part.rung.number)]
        known = [cost for cost in costs if cost is not None]
        if (part.rung and part.rung.extra) or not known:
            continue
        flops = statistics.fmean(known)
        deviation = moderated_deviation(model, flops, index if is_own else None)
        comparisons = max(1, len(part.variants) - 1)
        needed = None
        if precision is not None and deviation / precision < math.sqrt(MOST_SEEDS) / 2:
            needed = seeds_needed(deviation, precision)
        detectable = None
        if planned > 1:
            detectable = deviation / math.sqrt(planned) * detectable_ratio(planned - 1, comparisons)
        rows.append(RungSeeds(index, flops, deviation, needed, detectable))
    return rows


# --- Finished runs -------------------------------------------------------------------------------


def own_runs(state: StudyState) -> list[LadderRun]:
    """The finished runs of a study, which must not have changed. Raises UserError."""
    runner, runs = state.runner, []
    for trials in state.trials():
        for trial in trials.runs if state.is_decided(trials) else []:
            outcome = runner.outcome(RUNS, trial)
            if outcome is None or outcome.kind != 'finished':
                continue
            record = runner.record(RUNS, trial)
            loss = summary_value(record, 'final_val_loss')
            flops = causal_flops(record) if record else None
            if loss is not None and flops:
                seed = tuple(trial.overrides.get(key) for key in SEED_KEYS)
                runs.append(LadderRun(trial.variant, trial.rung or 0, seed, loss, flops))
    return runs


def runs_of_study(folder: Path) -> list[LadderRun]:
    """The finished runs of the study in a folder. Raises UserError."""
    if read_study_plan(folder.absolute()) is None:
        raise UserError(
            f'noise_from={str(folder)!r} has no study.json that can be read. Give the out_dir of a '
            f'study.'
        )
    runs, _ = read_runs([folder])
    return [
        LadderRun(
            run.variant,
            run.study.rung.number - 1 if run.study.rung else 0,
            run_seeds(run),
            run.val_loss,
            run.causal_flops,
        )
        for run in runs
        if run.study and run.variant is not None and run.outcome == FINISHED
        if run.val_loss is not None and run.causal_flops
    ]


def noise_of(runs: Iterable[LadderRun]) -> NoiseModel | None:
    """The noise of the difference of two variants; None without several seeds of a variant."""
    runs = list(runs)
    if len({(run.rung, run.variant) for run in runs}) == len(runs):
        return None
    from scaling.noise import noise_model  # imports numpy

    variants = list(dict.fromkeys(run.variant for run in runs))
    rungs = 1 + max(run.rung for run in runs)
    return noise_model(Ladder.of_runs(variants[0], variants, rungs, runs), paired=True)
