"""The rungs of a ladder: the sizes of the models, and how long each trains.

Each rung is a study of its own, with options over the base and a budget, and has the same variants.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from common.errors import UserError
from common.layer_pattern import MOST_LAYERS
from configurator import COMMAND_LINE
from model_builder import build_model, count_parameters
from model_config import ModelArchitectureConfig
from studies.grid import Study, merged_settings
from studies.ladder_keys import SOLVED_SIZES, is_amount, ladder_lists, number_of_rungs
from studies.points import point_label
from studies.variants import RunContext, nearest_integer

# Parts of a model that the size of a rung does not count: they depend on the vocabulary and on
# block_size, and are a large share of small models only.
NOT_COUNTED = ('token_embedding', 'output_head', 'position_encoding')
# Widths of a feed-forward network, which follow n_embd unless the file sets them.
FOLLOWING = ('d_ff', 'expert_d_ff')
# A deviation from the number of parameters counts as much as one from the aspect ratio that is this
# many times as large.
SIZE_WEIGHT = 4.0
# The deviation, in this unit, that a rung may add so that its depth and width do not fall.
RISING_WEIGHT = SIZE_WEIGHT * math.log(1.2)


class Rung(NamedTuple):
    """One size of a ladder."""

    number: int  # from 0, the smallest
    label: str
    options: dict  # over the base of the study
    params: int  # of the reference, without token table, output head and positions
    budget: dict  # of each run, like the key of a study
    extra: bool  # only the baseline trains it
    target: float | None = None  # of params, that its sizes were solved for


def study_at(study: Study, rung: Rung) -> Study:
    """The study of one rung."""
    return replace(study, rung=rung.options, budget=rung.budget)


def build_rungs(study: Study, context: RunContext) -> list[Rung]:
    """The rungs of a ladder, from the smallest, with those that only the baseline trains.

    Raises UserError.
    """
    count = number_of_rungs(study)
    solve = _solver(study, context) if 'params' in study.ladder else None
    lists = ladder_lists(study)
    points: list[tuple[dict, float | None]] = []  # with the target of params
    extra = study.baseline_extra
    for number in range(count + (1 if isinstance(extra, dict) else extra)):
        if number >= count and isinstance(extra, dict):
            points.append((extra, None))
            continue
        values = {key: entry_at(listed, number) for key, listed in lists.items()}
        target = values.pop('params', None)
        sizes = {}
        if solve is not None and target is not None:
            sizes = solve(target, points[-1][0] if points else {})
        points.append(({**sizes, **values}, target))
    rungs: list[Rung] = []
    transferred: dict = {}
    for number, (point, target) in enumerate(points):
        try:
            architecture = _architecture(study, point, context)
            params = size_of(architecture)
        except UserError as error:
            raise UserError(*_with_advice(study, point, number >= count, error)) from None
        if study.transfer == 'mup' and not rungs:
            transferred = {'initialization': 'mup', 'mup_base_width': architecture.n_embd}
        if rungs and params <= rungs[-1].params:
            raise UserError(
                f'{study.path}: rung {number + 1} of the ladder ({point_label(point)}, {params:,} '
                f'parameters) is not larger than rung {number} ({rungs[-1].label}, '
                f'{rungs[-1].params:,}). Set sizes that are further apart'
                f'{", or a smaller head_size" if solve else ""}.'
            )
        options = {**point, **transferred}
        budget = _budget(study, number, params)
        # All options of the ladder, so that no folder changes if a rung is added.
        label = point_label(point)
        rungs.append(Rung(number, label, options, params, budget, number >= count, target))
    return rungs


def _with_advice(study: Study, point: dict, is_extra: bool, error: UserError) -> list[str]:
    """The problems of a rung, with the rung that they belong to."""
    # The values of a rung reach its runs on their command lines.
    whose = f'{study.path}: rung {point_label(point)}'
    problems = [f'{whose}: {text.removeprefix(f"{COMMAND_LINE}: ")}' for text in error.problems]
    if not is_extra:
        return problems
    advice = (
        'This rung, which only the baseline trains, continues the lists of ladder. Set its options '
        'with baseline_extra = {…}, or baseline_extra = 0.'
    )
    return [*problems, advice]


def entry_at(values: list, number: int) -> Any:
    """The value of a list for a rung; beyond its end, the list continues at its last ratio.

    Raises UserError if it cannot be continued.
    """
    if number < len(values):
        return values[number]
    last, before = values[-1], values[-2] if len(values) > 1 else values[-1]
    if last == before:
        return last
    if not (is_amount(last) and is_amount(before)):
        raise UserError(
            f'baseline_extra: the list {values!r} of ladder has no continuation. Set the options '
            f'of the extra rung with baseline_extra = {{…}}, or baseline_extra = 0.'
        )
    value = last * (last / before) ** (number - len(values) + 1)
    return round(value) if isinstance(last, int) else value


def _budget(study: Study, number: int, params: int) -> dict:
    """The budget of a rung's runs by the horizon."""
    ((kind, amounts),) = study.horizon.items()
    amount = amounts if is_amount(amounts) else entry_at([*amounts], number)
    return {'tokens': amount * params} if kind == 'tokens_per_param' else {kind: amount}


# --- Sizes ---------------------------------------------------------------------------------------


def _architecture(study: Study, options: dict, context: RunContext) -> ModelArchitectureConfig:
    """The architecture of the reference with the options of a rung. Raises UserError."""
    at_rung = replace(study, rung=options)
    return merged_settings(at_rung, study.reference).resolve(*context).architecture


def size_of(architecture: ModelArchitectureConfig) -> int:
    """The number of parameters without the parts NOT_COUNTED."""
    parts = count_parameters(build_model(architecture))['components']
    return sum(count for part, count in parts.items() if part not in NOT_COUNTED)


def _solver(study: Study, context: RunContext) -> Callable[[float, dict], dict]:
    """A function from a number of parameters and the options of the rung below to n_layer, n_embd
    and n_head, none of them smaller than there if such a shape is nearly as close.

    The aspect ratio n_embd / n_layer and the head size n_embd / n_head are those of `ladder`, else
    of the base. Widths are multiples of the head size. Raises UserError.
    """
    base = _architecture(study, {}, context)
    files = {layer.origin for layer in study.command_line.layers[:-1]} | {COMMAND_LINE}
    for option in FOLLOWING:
        if base.get(option) is not None and base.origins.get(option) in files:
            raise UserError(
                f'{study.path}: {option}={base.get(option)} is set, so it would not follow the '
                f'sizes that params determines. Remove {option}, or give lists: ladder = '
                f"{{'n_layer': […], 'n_embd': […], 'n_head': […], '{option}': […]}}."
            )
    head_size = study.ladder.get('head_size', base.n_embd / base.n_head)
    if head_size != int(head_size):
        raise UserError(
            f'{study.path}: the head size of ladder is {head_size:g}, not a whole number. Set '
            f"'head_size' in ladder."
        )
    head_size = int(head_size)
    aspect = study.ladder.get('aspect_ratio', base.n_embd / base.n_layer)
    # params ≈ factor · n_layer · n_embd², with n_embd = aspect · n_layer
    factor = size_of(base) / (base.n_layer * base.n_embd**2)

    def solve(target: float, below: dict) -> dict:
        depth = (target / factor / aspect**2) ** (1 / 3)
        if depth > MOST_LAYERS:
            raise UserError(
                f'{study.path}: params={target:g} of ladder would need more than {MOST_LAYERS:,} '
                f'layers. Decrease params, or increase aspect_ratio.'
            )
        first, last = max(1, math.floor(depth) - 1), math.ceil(depth) + 1

        def deviation(candidate: tuple[dict, int]) -> float:
            sizes, params = candidate
            shape = sizes['n_embd'] / sizes['n_layer']
            return SIZE_WEIGHT * abs(math.log(params / target)) + abs(math.log(shape / aspect))

        def closest(depths: Iterable[int], below: dict) -> tuple[dict, int]:
            sized = (_sized(study, n, head_size, target, context, below) for n in depths)
            return min(sized, key=deviation)

        best = closest(range(first, last + 1), {})
        if not below:
            return best[0]
        lowest = below['n_layer']
        rising = closest(range(max(first, lowest), max(last, lowest) + 2), below)
        return (rising if deviation(rising) - deviation(best) < RISING_WEIGHT else best)[0]

    return solve


def _sized(
    study: Study,
    layers: int,
    head_size: int,
    target: float,
    context: RunContext,
    below: dict,
) -> tuple[dict, int]:
    """The sizes with this depth whose number of parameters is closest to the target.

    below: the sizes of the rung below, if these must be as wide at least, and larger; else {}.
    """

    def sizes(heads: int) -> dict:
        return dict(zip(SOLVED_SIZES, (layers, heads * head_size, heads)))

    def params(heads: int) -> float:
        try:
            return size_of(_architecture(study, sizes(heads), context))
        except UserError as error:
            raise UserError(*_with_advice(study, sizes(heads), False, error)) from None

    heads = max(below.get('n_head', 1), nearest_integer(params, target))
    if sizes(heads) == below:
        heads += 1
    return sizes(heads), int(params(heads))
