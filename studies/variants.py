"""The variants of a study: checked, made equal in size, and given a fair budget."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from common.errors import UserError
from data.dataset import TokenDataset
from model_builder import build_model, flops_by_part
from model_config import ModelArchitectureConfig
from studies.grid import (
    SEED_KEYS,
    Study,
    grid,
    merged_settings,
    point_label,
    point_labels,
    variant_overrides,
)
from training_config import Settings

MEASURES: dict[str, Callable[[ModelArchitectureConfig], float]] = {
    'params': lambda a: sum(parameter.numel() for parameter in build_model(a).parameters()),
    'flops': lambda a: sum(flops_by_part(build_model(a), causal=True).values()),  # a token
}
MAX_ITERATIONS = 10**12  # in a run


@dataclass(frozen=True)
class TuneChoice:
    """One setting of the keys of `tune`, with the variant's settings under it."""

    values: dict
    settings: Settings
    tokens_per_iter: int
    flops_per_iter: float


@dataclass(frozen=True)
class Variant:
    """One architecture, or one way to train it, of a study: what it sets over the base."""

    label: str
    grid_point: dict[str, Any]
    overrides: dict[str, Any]  # the same, and what was changed to match it
    settings: Settings
    matched: dict = field(default_factory=dict)  # {'value', 'was', 'mismatch'} of `match_by`
    choices: tuple[TuneChoice, ...] = ()  # what tuning chooses among; without it the one there is

    @property
    def costliest(self) -> TuneChoice:
        return max(self.choices, key=lambda choice: choice.flops_per_iter)


class RunContext(NamedTuple):
    """What the settings of every run of a study are completed with."""

    device: torch.device
    dtype: str
    dataset: TokenDataset


def build_variants(study: Study, context: RunContext) -> list[Variant]:
    """The study's variants, checked all at once, matched in size, with what tuning chooses among.

    Raises UserError.
    """
    points = variant_overrides(study)
    variants, problems = [], []
    for label, overrides in zip(point_labels(points), points, strict=True):
        try:
            settings = merged_settings(study, overrides).resolve(*context)
        except UserError as error:
            problems += [f'{label}: {problem}' for problem in error.problems]
        else:
            variants.append(Variant(label, overrides, overrides, settings))
    if problems:
        raise UserError(
            *problems,
            f'{study.path}: leave such points out with exclude = [{{…}}, …], or change the grid.',
        )
    variants = _without_duplicates(variants)
    if study.match != 'none':
        variants = _match_sizes(study, variants, context)
    return _with_choices(study, variants, context)


def _without_duplicates(variants: list[Variant]) -> list[Variant]:
    """Each way to train once: an ablation may set what the base has already."""
    by_config: dict[str, Variant] = {}
    for variant in variants:
        by_config.setdefault(repr(sorted(variant.settings.to_dict().items(), key=str)), variant)
    return list(by_config.values())


def _with_choices(study: Study, variants: list[Variant], context: RunContext) -> list[Variant]:
    """The variants with what tuning chooses among. Raises UserError."""
    result, problems = [], []
    for variant in variants:
        flops = MEASURES['flops'](variant.settings.architecture)
        choices = []
        for values in grid(study.tune):  # without `tune` one, {}
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
                f'{study.path}: {variant.label}: tune changes the cost of an update, and '
                f'budget={study.budget!r} is shared out by that cost. Give the budget in flops or '
                f'tokens.'
            )
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return result


def _checked_choice(
    study: Study, variant: Variant, values: dict, flops: float, context: RunContext
) -> TuneChoice:
    """A setting of `tune`, checked. flops: the variant's, a token. Raises UserError."""
    settings = variant.settings
    if values:
        settings = merged_settings(study, {**variant.overrides, **values}).resolve(*context)
        architecture = settings.architecture
        if architecture.to_dict() != variant.settings.architecture.to_dict():
            flops = MEASURES['flops'](architecture)
            if study.match != 'none':
                measure = MEASURES[study.match]
                if measure(architecture) != measure(variant.settings.architecture):
                    raise UserError(f'tune changes the {study.match} that match made equal.')
    run = settings.run
    tokens = run.batch_size * run.gradient_accumulation_steps * settings.architecture.block_size
    return TuneChoice(values, settings, tokens, tokens * flops)


def baseline_variant(study: Study, variants: list[Variant]) -> Variant:
    """The variant that the others are compared with: `baseline`, else the `reference` if it is a
    variant, else the first. Raises UserError."""
    if not study.baseline:
        matching = _variants_at_point(study, variants, study.reference) if study.reference else []
        return matching[0] if len(matching) == 1 else variants[0]
    matching = _variants_at_point(study, variants, study.baseline)
    if len(matching) == 1:
        return matching[0]
    labels = ', '.join(variant.label for variant in matching or variants)
    if matching:
        raise UserError(
            f'{study.path}: baseline={study.baseline!r} fits {len(matching)} variants: {labels}. '
            f'Add the options that tell them apart.'
        )
    raise UserError(
        f'{study.path}: baseline={study.baseline!r} is none of the variants, which are: {labels}.'
    )


def _variants_at_point(study: Study, variants: list[Variant], point: dict) -> list[Variant]:
    """The variants that agree with every option of a point.

    Where it gives each option of the sweep, ablations that it does not name are left out.
    """

    def agrees(variant: Variant) -> bool:
        values = {**variant.settings.to_dict(), **variant.grid_point}
        return all(key in values and values[key] == value for key, value in point.items())

    matching = [variant for variant in variants if agrees(variant)]
    if set(study.sweep) - set(SEED_KEYS) <= point.keys():
        fewest = min((len(variant.grid_point) for variant in matching), default=0)
        matching = [variant for variant in matching if len(variant.grid_point) == fewest]
    return matching


# --- Fair sizes ----------------------------------------------------------------------------------


def _match_sizes(study: Study, variants: list[Variant], context: RunContext) -> list[Variant]:
    """The variants with `match_by` set such that `match` agrees with the reference's.

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
    """The variant with the size at which `measure` comes nearest to `target`. Raises UserError."""
    size = variant.settings.architecture.to_dict().get(study.match_by)
    if type(size) is not int:
        raise UserError(
            f'{study.path}: {variant.label} has no size {study.match_by!r} to match by; its '
            f'sizes are {_sizes(variant.settings.architecture)}. Choose one by match_by.'
        )

    def changed(value: int) -> Settings:
        overrides = {**variant.overrides, study.match_by: value}
        return merged_settings(study, overrides).resolve(*context)

    def measured(steps: int) -> float:
        return measure(changed(steps * study.match_step).architecture)

    value, resized = size, variant
    if measure(variant.settings.architecture) != target:
        try:
            value = nearest_integer(measured, target) * study.match_step
        except ValueError:
            raise UserError(
                f'{study.path}: match_by={study.match_by!r} has no effect on {study.match} of '
                f'{variant.label}. Choose another size.'
            ) from None
    if value != size:
        overrides = {**variant.overrides, study.match_by: value}
        resized = replace(variant, overrides=overrides, settings=changed(value))
    mismatch = measure(resized.settings.architecture) / target - 1
    return replace(resized, matched={'value': value, 'was': size, 'mismatch': mismatch})


def _sizes(architecture: ModelArchitectureConfig) -> str:
    return ', '.join(key for key, value in architecture.to_dict().items() if type(value) is int)


def nearest_integer(rising: Callable[[int], float], target: float) -> int:
    """The n ≥ 1 at which a rising function comes nearest to `target`.

    Raises ValueError if it does not rise.
    """
    rising = functools.cache(rising)
    high = 1
    while (reached := rising(high)) < target:
        high *= 2
        if rising(high) <= reached:
            raise ValueError('not a rising function')
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
    """Iterations that the budget buys. Raises UserError.

    None: what the base says, or, where the budget is in seconds, not known yet.
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
    if iterations < 1:
        raise UserError(
            f'{study.path}: budget={study.budget!r} buys {label} no update: one takes '
            f'{price:.4g} {kind}.'
        )
    if iterations > MAX_ITERATIONS:
        raise UserError(
            f'{study.path}: budget={study.budget!r} buys {label} {iterations:.3g} updates. Give at '
            f'most what {MAX_ITERATIONS:,} take.'
        )
    return iterations
