"""The variants of a study: checked, made equal in size, given a fair budget, and laid out as runs.

Nothing here starts a run; `study.py` does.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from common.errors import UserError
from common.registry import Option
from data.dataset import TokenDataset
from model_builder import build_model, flops_by_part
from model_config import ModelArchitectureConfig
from studies.grid import (
    SEED_KEYS,
    Study,
    argument,
    folder_names,
    grid,
    label_of,
    labels_of,
    overrides_of,
    seeds_of,
    settings_of,
)
from training_config import Settings

MEASURES: dict[str, Callable[[ModelArchitectureConfig], float]] = {
    'params': lambda a: sum(parameter.numel() for parameter in build_model(a).parameters()),
    'flops': lambda a: sum(flops_by_part(build_model(a), causal=True).values()),  # a token
}
RUNS, TUNING, TIMING = 'runs', 'tuning', 'timing'  # kinds of runs; their folders below out_dir
MOST_UPDATES = 10**12  # in a run
TIMED_UPDATES = 10  # to learn the seconds of an update; the record leaves the first out


@dataclass(frozen=True)
class Choice:
    """One setting of the keys of `tune`, with the variant's settings under it."""

    values: dict
    settings: Settings
    tokens: int  # of an update
    flops: float  # of an update


@dataclass(frozen=True)
class Variant:
    """One architecture, or one way to train it, of a study: what it sets over the base."""

    label: str
    asked: dict  # its place in the grid
    overrides: dict  # the same, and what was changed to match it
    settings: Settings
    matched: dict = field(default_factory=dict)  # {'value', 'was', 'mismatch'} of `match_by`
    choices: tuple[Choice, ...] = ()  # what tuning chooses among; without it the one there is

    @property
    def costliest(self) -> Choice:
        return max(self.choices, key=lambda choice: choice.flops)


@dataclass(frozen=True, eq=False)  # a key by itself
class Point:
    """One run of a study."""

    folder: str  # below the study's, unique
    variant: str
    overrides: dict
    choice: Choice
    updates: int | None  # None: not known before the budget's seconds are

    @property
    def tokens(self) -> int | None:
        return None if self.updates is None else self.updates * self.choice.tokens

    @property
    def flops(self) -> float | None:
        return None if self.updates is None else self.updates * self.choice.flops

    def arguments(self, options: dict[str, Option]) -> list[str]:
        """As `train.py` takes them."""
        arguments = (argument(key, value, options) for key, value in self.overrides.items())
        return [text for text in arguments if text is not None]  # all can be: they were checked


Where = tuple[torch.device, str, TokenDataset]  # what settings are completed with


def variants_of(study: Study, where: Where) -> list[Variant]:
    """The study's variants, checked all at once, matched in size, with what tuning chooses among.

    Raises UserError.
    """
    points = overrides_of(study)
    variants, problems = [], []
    for label, overrides in zip(labels_of(points), points, strict=True):
        try:
            settings = settings_of(study, overrides).complete(*where)
        except UserError as error:
            problems += [f'{label}: {problem}' for problem in error.problems]
        else:
            variants.append(Variant(label, overrides, overrides, settings))
    if problems:
        raise UserError(
            *problems,
            f'{study.path}: leave such points out with exclude = [{{…}}, …], or change the grid.',
        )
    variants = _distinct(variants)
    if study.match != 'none':
        variants = _matched(study, variants, where)
    return _with_choices(study, variants, where)


def _distinct(variants: list[Variant]) -> list[Variant]:
    """Each way to train once: an ablation may set what the base has already."""
    by_config: dict[str, Variant] = {}
    for variant in variants:
        by_config.setdefault(repr(sorted(variant.settings.to_dict().items(), key=str)), variant)
    return list(by_config.values())


def _with_choices(study: Study, variants: list[Variant], where: Where) -> list[Variant]:
    """The variants with what tuning chooses among. Raises UserError."""
    result, problems = [], []
    for variant in variants:
        flops = MEASURES['flops'](variant.settings.architecture)
        choices = []
        for values in grid(study.tune):  # without `tune` one, {}
            label = f'{variant.label}, {label_of(values)}' if values else variant.label
            try:
                choice = _choice(study, variant, values, flops, where)
                choices.append(choice)
                iterations(study, label, choice, seconds_per_update=None)
            except UserError as error:
                problems += [f'{label}: {problem}' for problem in error.problems]
        result.append(replace(variant, choices=tuple(choices)))
        if 'seconds' in study.budget and len({(c.tokens, c.flops) for c in choices}) > 1:
            problems.append(
                f'{study.path}: {variant.label}: tune changes the cost of an update, and '
                f'budget={study.budget!r} is shared out by that cost. Give the budget in flops or '
                f'tokens.'
            )
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return result


def _choice(study: Study, variant: Variant, values: dict, flops: float, where: Where) -> Choice:
    """A setting of `tune`, checked. flops: the variant's, a token. Raises UserError."""
    settings = variant.settings
    if values:
        settings = settings_of(study, {**variant.overrides, **values}).complete(*where)
        architecture = settings.architecture
        if architecture.to_dict() != variant.settings.architecture.to_dict():
            flops = MEASURES['flops'](architecture)
            if study.match != 'none':
                measure = MEASURES[study.match]
                if measure(architecture) != measure(variant.settings.architecture):
                    raise UserError(f'tune changes the {study.match} that match made equal.')
    run = settings.run
    tokens = run.batch_size * run.gradient_accumulation_steps * settings.architecture.block_size
    return Choice(values, settings, tokens, tokens * flops)


def baseline_of(study: Study, variants: list[Variant]) -> Variant:
    """The variant that the others are compared with: `baseline`, else the `reference` if it is a
    variant, else the first. Raises UserError."""
    if not study.baseline:
        matching = _variants_at(study, variants, study.reference) if study.reference else []
        return matching[0] if len(matching) == 1 else variants[0]
    matching = _variants_at(study, variants, study.baseline)
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


def _variants_at(study: Study, variants: list[Variant], point: dict) -> list[Variant]:
    """The variants that agree with every option of a point.

    Where it gives each option of the sweep, ablations that it does not name are left out.
    """

    def agrees(variant: Variant) -> bool:
        values = {**variant.settings.to_dict(), **variant.asked}
        return all(key in values and values[key] == value for key, value in point.items())

    matching = [variant for variant in variants if agrees(variant)]
    if set(study.sweep) - set(SEED_KEYS) <= point.keys():
        fewest = min((len(variant.asked) for variant in matching), default=0)
        matching = [variant for variant in matching if len(variant.asked) == fewest]
    return matching


# --- Fair sizes ----------------------------------------------------------------------------------


def _matched(study: Study, variants: list[Variant], where: Where) -> list[Variant]:
    """The variants with `match_by` set such that `match` agrees with the reference's.

    Raises UserError.
    """
    measure = MEASURES[study.match]
    target = measure(settings_of(study, study.reference).complete(*where).architecture)
    matched, problems = [], []
    for variant in variants:
        try:
            matched.append(_resized(study, variant, measure, target, where))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return matched


def _resized(
    study: Study, variant: Variant, measure: Callable, target: float, where: Where
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
        return settings_of(study, overrides).complete(*where)

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


def iterations(
    study: Study, label: str, choice: Choice, seconds_per_update: float | None
) -> int | None:
    """Updates that the budget buys; None: what the base says, or, where the budget is in seconds,
    not known yet. Raises UserError."""
    if not study.budget:
        return None
    ((kind, amount),) = study.budget.items()
    price = {
        'iterations': 1,
        'tokens': choice.tokens,
        'flops': choice.flops,
        'seconds': seconds_per_update,
    }[kind]
    if price is None:
        return None
    updates = int(amount / price)
    if updates < 1:
        raise UserError(
            f'{study.path}: budget={study.budget!r} buys {label} no update: one takes '
            f'{price:.4g} {kind}.'
        )
    if updates > MOST_UPDATES:
        raise UserError(
            f'{study.path}: budget={study.budget!r} buys {label} {updates:.3g} updates. Give at '
            f'most what {MOST_UPDATES:,} take.'
        )
    return updates


# --- Runs ----------------------------------------------------------------------------------------


class Layout:
    """The runs of a study, as far as their options are known.

    seconds: of an update of each variant, by label, once they are timed. chosen: what tuning chose
    for each, by label. Where either is not known yet, a run stands for one at the largest cost.
    """

    def __init__(
        self,
        study: Study,
        variants: list[Variant],
        seconds: dict[str, float] | None = None,
        chosen: dict[str, Choice] | None = None,
    ):
        self.study, self.variants = study, variants
        self.seconds, self.chosen = seconds or {}, chosen or {}

    def _point(self, folder: str, variant: Variant, choice: Choice, seed: dict) -> Point:
        updates = iterations(self.study, variant.label, choice, self.seconds.get(variant.label))
        budget = {} if updates is None else {'max_iters': updates}
        if 'seconds' not in self.study.budget and updates is None:
            updates = choice.settings.run.max_iters
        overrides = {**variant.overrides, **budget, **choice.values, **seed}
        return Point(folder, variant.label, overrides, choice, updates)

    @property
    def timing(self) -> list[Point]:
        """A few updates of each variant, where the budget is in seconds."""
        if 'seconds' not in self.study.budget:
            return []
        labels = [variant.label for variant in self.variants]
        folders = folder_names(labels, clean=lambda label: label.replace('/', '_'))
        updates = {'max_iters': TIMED_UPDATES}
        return [
            Point(folder, v.label, {**v.overrides, **updates}, v.choices[0], TIMED_UPDATES)
            for folder, v in zip(folders, self.variants)
        ]

    @property
    def tuning(self) -> list[Point]:
        """The runs that choose each variant's values of the keys of `tune`, at a seed apart."""
        if not self.study.tune:
            return []
        seed = dict.fromkeys(SEED_KEYS, self.study.tune_seed)
        folders = folder_names(labels_of(grid(self.study.tune)))
        return [
            self._point(f'{place}/{folder}', variant, choice, seed)
            for place, variant in self._places()
            for folder, choice in zip(folders, variant.choices)
        ]

    @property
    def runs(self) -> list[Point]:
        """Every run that counts: all variants at the first seed, then at the next, so that pairs
        grow together."""
        seeds = seeds_of(self.study)
        return [
            self._point(
                f'{place}/{folder}' if name else place,
                variant,
                self.chosen.get(variant.label, variant.costliest),
                seeds[name],
            )
            for name, folder in zip(seeds, folder_names(list(seeds)))
            for place, variant in self._places()
        ]

    def _places(self) -> list[tuple[str, Variant]]:
        """Each variant with the name of its folder."""
        labels = [variant.label for variant in self.variants]
        return list(zip(folder_names(labels), self.variants))

    def points(self) -> dict[str, list[Point]]:
        """All runs by kind, in the order in which the kinds are run."""
        return {TIMING: self.timing, TUNING: self.tuning, RUNS: self.runs}
