"""The variants of a study: check them, match their sizes, compute their budgets."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from common.architecture_options import layer_options
from common.dict_option import leaves
from common.errors import UserError
from common.layer_table import kind_and_option, merged_kinds, used_values
from data.dataset import TokenDataset
from model_builder import build_model, flops_by_part
from model_config import ModelArchitectureConfig
from planning import micro_batch
from studies.grid import (
    Study,
    grid,
    merged_settings,
    run_options,
    variant_points,
)
from studies.points import contains, point_label, point_labels
from training_config import Settings

MEASURES: dict[str, Callable[[ModelArchitectureConfig], float]] = {
    'params': lambda a: sum(parameter.numel() for parameter in build_model(a).parameters()),
    'flops': lambda a: sum(flops_by_part(build_model(a), causal=True).values()),  # a token
}
MAX_ITERATIONS = 10**12  # in a run


@dataclass(frozen=True)
class TuneChoice:
    """One combination of the `tune` options, with the resulting settings of the variant."""

    values: dict
    settings: Settings
    tokens_per_iter: int
    flops_per_iter: float


@dataclass(frozen=True)
class Variant:
    """One variant of a study: the options that it sets over the base."""

    label: str
    grid_point: dict[str, Any]
    overrides: dict[str, Any]  # the grid point, and the option changed by `match`
    settings: Settings
    same: tuple['Variant', ...] = ()  # others with the same settings, which are not trained
    # {'value', 'was', 'mismatch'} of `match_by`; a list: several sizes, which layers had before
    matched: dict = field(default_factory=dict)
    choices: tuple[TuneChoice, ...] = ()  # the candidates of tuning; without `tune` a single one

    @property
    def costliest(self) -> TuneChoice:
        return max(self.choices, key=lambda choice: choice.flops_per_iter)


def values_text(values: dict) -> str:
    return ', '.join(f'{key}={value}' for key, value in values.items())


def matched_cells(variant: Variant) -> list[str]:
    """The matched size, with the one before, and how far it is from the reference."""
    value, was, mismatch = variant.matched.values()
    changed = f' (was {_sizes_text(was)})' if was != value else ''
    return [f'{_sizes_text(value)}{changed}', f'{mismatch:+.3%}']


def _sizes_text(sizes: int | list[int] | None) -> str:
    """`168`; `168 and 256` if layers differ; `-` without any."""
    listed = sizes if isinstance(sizes, list) else [] if sizes is None else [sizes]
    return ' and '.join(f'{size:,}' for size in listed) or '-'


class RunContext(NamedTuple):
    """The device, dtype and dataset that resolve the settings of every run of a study."""

    device: torch.device
    dtype: str
    dataset: TokenDataset


def build_variants(study: Study, context: RunContext) -> list[Variant]:
    """The study's variants, checked, with matched sizes and the candidates of tuning.

    Raises UserError with all problems.
    """
    points = variant_points(study)
    variants, problems = [], []
    for label, point in zip(point_labels(points), points, strict=True):
        try:
            settings = merged_settings(study, point).resolve(*context)
        except UserError as error:
            problems += [f'{label}: {problem}' for problem in error.problems]
        else:
            variants.append(Variant(label, point, run_options(study, point), settings))
    if problems:
        raise UserError(
            *problems,
            f'{study.path}: exclude such combinations with exclude = [{{…}}], or change the grid.',
        )
    variants = _without_duplicates(study, variants)
    if study.match != 'none':
        variants = _match_sizes(study, variants, context)
    return _with_choices(study, variants, context)


def _without_duplicates(study: Study, variants: list[Variant]) -> list[Variant]:
    """The variants without duplicates: an ablation may equal the base, and two patterns each other
    at this depth. Those with layers that tuning or matching changes differ from those without."""
    changed_kinds = {kind_and_option(name)[0] for name in (*study.tune, study.match_by)}
    equal: dict[str, list[Variant]] = {}
    for variant in variants:
        architecture, run = variant.settings.architecture, variant.settings.run.to_dict()
        chosen = architecture.preset, architecture.get('attention_backend')
        changed = [kind in changed_kinds and kind for kind in architecture.layer_letters]
        identity = architecture.hash, *chosen, changed, sorted(run.items())
        equal.setdefault(repr(identity), []).append(variant)
    return [replace(first, same=tuple(others)) for first, *others in equal.values()]


def _with_choices(study: Study, variants: list[Variant], context: RunContext) -> list[Variant]:
    """The variants with the candidates of tuning. Raises UserError."""
    result, problems = [], []
    for variant in variants:
        flops = MEASURES['flops'](variant.settings.architecture)
        choices = []
        for values in _tuned_values(study, variant):
            label = f'{variant.label}, {point_label(values)}' if values else variant.label
            try:
                choice = _checked_choice(study, variant, values, flops, context)
                choices.append(choice)
                budgeted_iterations(study, label, choice, seconds_per_iter=None)
            except UserError as error:
                problems += [f'{label}: {problem}' for problem in error.problems]
        result.append(replace(variant, choices=tuple(choices)))
        if (
            'seconds' in study.budget
            and len({(c.tokens_per_iter, c.flops_per_iter) for c in choices}) > 1
        ):
            problems.append(
                f'{study.path}: {variant.label}: tune changes the cost of an iteration, so '
                f'budget={study.budget!r} cannot be converted to iterations. Give the budget in '
                f'flops or tokens.'
            )
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return result


def _tuned_values(study: Study, variant: Variant) -> list[dict]:
    """The combinations of the `tune` options; without `tune`, only {}.

    Values of kinds of layers that the variant does not have are left out.
    """
    combinations = grid(study.tune)
    if 'layer_pattern' in variant.overrides.keys() - study.tune.keys():
        kinds = variant.settings.architecture.kinds
        combinations = [used_values(values, kinds) for values in combinations]
    return list({repr(values): values for values in combinations}.values())


def _checked_choice(
    study: Study, variant: Variant, values: dict, flops: float, context: RunContext
) -> TuneChoice:
    """A candidate of tuning, checked. flops: FLOPs per token of the variant. Raises UserError."""
    settings = variant.settings
    if values:
        settings = merged_settings(study, {**variant.overrides, **values}).resolve(*context)
        architecture = settings.architecture
        if architecture.to_dict() != variant.settings.architecture.to_dict():
            flops = MEASURES['flops'](architecture)
            if study.match != 'none':
                measure = MEASURES[study.match]
                if measure(architecture) != measure(variant.settings.architecture):
                    raise UserError(
                        f'tune changes the {study.match}, which match makes equal. Remove the '
                        f'option from tune.'
                    )
    run = settings.run
    tokens = run.batch_size * run.gradient_accumulation_steps * settings.architecture.block_size
    return TuneChoice(values, settings, tokens, tokens * flops)


def with_micro_batch(
    study: Study, variants: list[Variant], context: RunContext, jobs: int
) -> Study:
    """The study with one micro-batch for all runs, so that their times are comparable: the
    smallest of those derived for the variants. As it is if a size is set, and except on CUDA."""
    memory = micro_batch.device_memory(context.device)
    runs = [choice.settings.run for variant in variants for choice in variant.choices]
    derived = all(
        run.origins[key].startswith('derived') for run in runs for key in micro_batch.SIZES
    )
    if memory is None or not derived:
        return study
    share = memory / -(-jobs // torch.cuda.device_count())  # of each run on a GPU
    chosen = [variant.costliest.settings for variant in variants]
    size = min(micro_batch.largest_micro_batch(settings, share)[0] for settings in chosen)
    sequences = runs[0].batch_size * runs[0].gradient_accumulation_steps
    return replace(study, micro_batch=dict(zip(micro_batch.SIZES, (size, sequences // size))))


def baseline_variant(study: Study, variants: list[Variant]) -> Variant:
    """The variant that the others are compared with. Raises UserError.

    `baseline`, else `reference` if it is a variant, else the first variant.
    """
    if not study.baseline:
        matching = _variants_at_point(study, variants, study.reference) if study.reference else []
        return matching[0] if len(matching) == 1 else variants[0]
    matching = _variants_at_point(study, variants, study.baseline)
    if len(matching) == 1:
        return matching[0]
    labels = ', '.join(variant.label for variant in matching or variants)
    if matching:
        raise UserError(
            f'{study.path}: baseline={study.baseline!r} matches {len(matching)} variants: '
            f'{labels}. Add the options in which they differ.'
        )
    raise UserError(
        f'{study.path}: baseline={study.baseline!r} matches no variant. Variants: {labels}.'
    )


def _variants_at_point(study: Study, variants: list[Variant], point: dict) -> list[Variant]:
    """The variants that match every option of a point.

    If the point has all options of the sweep, ablations that it does not name do not match.
    """

    def agrees(variant: Variant) -> bool:
        values = leaves({**variant.settings.to_dict(), **_kind_values(variant)})
        return contains({**values, **leaves(variant.grid_point)}, point)

    matching = [v for v in variants if any(map(agrees, (v, *v.same)))]
    named = {*point, *leaves(point)}
    if all(v.grid_point.keys() & study.sweep.keys() <= named for v in matching):
        fewest = min((len(variant.grid_point) for variant in matching), default=0)
        matching = [variant for variant in matching if len(variant.grid_point) == fewest]
    return matching


def _kind_values(variant: Variant) -> dict:
    """All options of each kind of layers, by dotted name."""
    kinds = variant.settings.architecture.kinds
    return leaves({'layer_kinds': {letter: kind.to_dict() for letter, kind in kinds.items()}})


# --- Fair sizes ----------------------------------------------------------------------------------


def _match_sizes(study: Study, variants: list[Variant], context: RunContext) -> list[Variant]:
    """The variants with `match_by` set so that `match` equals that of the reference.

    Raises UserError.
    """
    measure = MEASURES[study.match]
    target = measure(merged_settings(study, study.reference).resolve(*context).architecture)
    matched: list[Variant] = []
    problems: list[str] = []
    for variant in variants:
        try:
            matched.append(_resize(study, variant, measure, target, context))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return matched


def _resize(
    study: Study, variant: Variant, measure: Callable, target: float, context: RunContext
) -> Variant:
    """The variant with the size for which `measure` is closest to `target`. Raises UserError."""

    def changed(value: int) -> Settings:
        overrides = {**variant.overrides, study.match_by: value}
        return merged_settings(study, overrides).resolve(*context)

    def measured(steps: int) -> float:
        return measure(changed(steps * study.match_step).architecture)

    sizes = _matched_sizes(variant, study.match_by)
    was = sizes[0] if len(sizes) == 1 else sizes or None
    value, resized = was, variant
    if measure(variant.settings.architecture) != target:
        if not sizes:
            raise UserError(_why_no_size(study, variant))
        try:
            value = nearest_integer(measured, target) * study.match_step
        except ValueError:
            raise UserError(
                f'{study.path}: match_by={study.match_by!r} has no effect on {study.match} of '
                f'{variant.label}. Set match_by to another size.'
            ) from None
        if value != was:
            overrides = {**variant.overrides, study.match_by: value}
            resized = replace(variant, overrides=overrides, settings=changed(value))
    mismatch = measure(resized.settings.architecture) / target - 1
    return replace(resized, matched={'value': value, 'was': was, 'mismatch': mismatch})


def _matched_sizes(variant: Variant, match_by: str) -> list[int]:
    """The distinct sizes that `match_by` replaces in the layers that follow it; [] if none do."""
    architecture = variant.settings.architecture
    kind, option = kind_and_option(match_by)
    if kind is not None:
        owners = [architecture.kinds[kind]] if kind in architecture.kinds else []
    elif option in layer_options() and architecture.get('layer_pattern') is not None:
        own = _kinds_with_own(variant, option)
        owners = [layers for name, layers in architecture.kinds.items() if name not in own]
    else:
        owners = [architecture]
    sizes = dict.fromkeys(owner.get(option) for owner in owners)
    return [size for size in sizes if type(size) is int]


def _kinds_with_own(variant: Variant, option: str) -> list[str]:
    """The kinds of the variant's layers that set the option themselves."""
    settings = variant.settings
    start = settings.architecture.start.layer
    declared = merged_kinds([start, *settings.command_line.layers], layer_options(), [])
    used = settings.architecture.kinds
    return [name for name, kind in declared.items() if name in used and option in kind.overrides]


def _why_no_size(study: Study, variant: Variant) -> str:
    """The problem of a variant without layers whose size `match_by` can change."""
    architecture, (kind, option) = variant.settings.architecture, kind_and_option(study.match_by)
    begin = f'{study.path}: match_by={study.match_by!r}'
    if kind is not None and kind not in architecture.kinds:
        return (
            f'{begin}: {variant.label} has no layers of kind {kind}. Set match_by to a size that '
            f'all variants have, or exclude this one.'
        )
    if kind is None and (own := _kinds_with_own(variant, option)):
        names = ' or '.join(f'layer_kinds.{name}.{option}' for name in own)
        return (
            f'{begin} has no effect on {variant.label}: every kind of its layers with a {option} '
            f'sets its own. Set match_by to {names}.'
        )
    owner = architecture if kind is None else architecture.kinds[kind]
    prefix = '' if kind is None else f'layer_kinds.{kind}.'
    sizes = (f'{prefix}{key}' for key, value in owner.to_dict().items() if type(value) is int)
    return (
        f'{study.path}: {variant.label} has no size {study.match_by!r}. Set match_by to one of '
        f'{", ".join(sizes)}.'
    )


def nearest_integer(rising: Callable[[int], float], target: float) -> int:
    """The n ≥ 1 for which an increasing function is closest to `target`.

    Raises ValueError if it does not increase.
    """
    rising = functools.cache(rising)
    high = 1
    while (reached := rising(high)) < target:
        high *= 2
        if rising(high) <= reached:
            raise ValueError('not an increasing function')
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    near = [n for n in (low, high) if n >= 1]
    return min(near, key=lambda n: abs(rising(n) - target))


# --- Fair budgets --------------------------------------------------------------------------------


def budgeted_iterations(
    study: Study, label: str, choice: TuneChoice, seconds_per_iter: float | None
) -> int | None:
    """Number of iterations within the budget. Raises UserError.

    None: no budget, or one in seconds before iterations are timed.
    """
    if not study.budget:
        return None
    ((kind, amount),) = study.budget.items()
    price = {
        'iterations': 1,
        'tokens': choice.tokens_per_iter,
        'flops': choice.flops_per_iter,
        'seconds': seconds_per_iter,
    }[kind]
    if price is None:
        return None
    iterations = int(amount / price)
    # The budget of a rung comes from the horizon.
    key = f'horizon, here {amount:g} {kind},' if study.rung else f'budget={study.budget!r}'
    if iterations < 1:
        raise UserError(
            f'{study.path}: {key} is too small for {label}: one iteration takes {price:.4g} '
            f'{kind}. Increase it.'
        )
    if iterations > MAX_ITERATIONS:
        raise UserError(
            f'{study.path}: {key} gives {label} {iterations:.3g} iterations, more than '
            f'{MAX_ITERATIONS:,}. Decrease it.'
        )
    return iterations
