"""What a study asks, as a list of runs: grid, ablations, replicates, fair sizes and budgets.

A study is a config file of `train.py` with some of the keys of `STUDY_KEYS` beside the usual ones,
which are the base of every run. Nothing here starts a run; `study.py` does.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from configurator import COMMAND_LINE, CommandLine, Layer, accept_layer, flatten
from errors import UserError, nearest
from model_builder import build_model, flops_by_part
from model_config import ModelArchitectureConfig
from token_data import TokenDataset
from training_config import Settings, load_settings, schema

SEED_KEYS = ('seed', 'data_seed')
BUDGETS = ('iterations', 'tokens', 'flops', 'seconds')
MEASURES: dict[str, Callable[[ModelArchitectureConfig], float]] = {
    'params': lambda a: sum(parameter.numel() for parameter in build_model(a).parameters()),
    'flops': lambda a: sum(flops_by_part(build_model(a), causal=False).values()),  # a token
}


def _is_grid(value) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(values, list | tuple) and len(values) > 0
        for key, values in value.items()
    )


def _is_point(value) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_budget(value) -> bool:
    return isinstance(value, dict) and all(
        key in BUDGETS and type(amount) in (int, float) and amount > 0
        for key, amount in value.items()
    )


# key -> (default, whether a value is one, what it is in words)
_GRID = "a dict of lists, such as {'ffn_type': ['standard', 'swiglu']}"
_POINT = "a dict of options, such as {'ffn_type': 'standard'}"
STUDY_KEYS: dict[str, tuple] = {
    'question': ('', lambda v: isinstance(v, str), 'a line of text'),
    'sweep': ({}, _is_grid, _GRID),
    'ablate': ({}, _is_grid, _GRID),
    'exclude': (
        [],
        lambda v: isinstance(v, list | tuple) and all(map(_is_point, v)),
        f'a list of points, each {_POINT}',
    ),
    'tune': ({}, _is_grid, "a dict of lists, such as {'learning_rate': [3e-4, 1e-3, 3e-3]}"),
    'tune_seed': (0, lambda v: type(v) is int and v >= 0, 'a whole number of at least 0'),
    'match': ('none', lambda v: v in (*MEASURES, 'none'), f'one of {[*MEASURES, "none"]}'),
    'match_by': ('d_ff', lambda v: isinstance(v, str), 'the name of an option that sets a size'),
    'match_step': (
        8,
        lambda v: type(v) is int and v >= 1,
        'a whole number: the size found is a multiple of it',
    ),
    'reference': ({}, _is_point, _POINT),
    'baseline': ({}, _is_point, _POINT),
    'budget': (
        {},
        lambda v: _is_budget(v) and len(v) <= 1,
        f"a dict of one of {', '.join(BUDGETS)}, such as {{'tokens': 1e7}}",
    ),
}


@dataclass(frozen=True)
class Study:
    """What a study file asks."""

    path: str
    asked: CommandLine  # the file and the command line: the base of every run
    question: str
    sweep: dict[str, list]
    ablate: dict[str, list]
    exclude: list[dict]
    tune: dict[str, list]
    tune_seed: int
    match: str
    match_by: str
    match_step: int
    reference: dict
    baseline: dict
    budget: dict


@dataclass(frozen=True)
class Variant:
    """One architecture, or one way to train it, of a study: what it sets over the base."""

    label: str
    asked: dict  # its place in the grid
    overrides: dict  # the same, and what was changed to match it
    settings: Settings
    matched: dict = field(default_factory=dict)  # {'value', 'was', 'mismatch'} of `match_by`


@dataclass(frozen=True, eq=False)  # a key by itself
class Point:
    """One run of a study."""

    folder: str  # below the study's, unique
    variant: str
    overrides: dict

    def arguments(self) -> list[str]:
        """As `train.py` takes them."""
        return [f'--{key}={value}' for key, value in self.overrides.items()]


def read_study(asked: CommandLine) -> Study:
    """The study that the one config file of a command line holds. Raises UserError."""
    problems = list(asked.problems)
    if len(asked.config_files) != 1:
        raise UserError(*problems, 'a study is one config file: study.py config/studies/NAME.py')
    path = asked.config_files[0]['path']
    values = {}
    for key, (default, fits, kind) in STUDY_KEYS.items():
        values[key] = asked.aside.get(key, default)
        if not fits(values[key]):
            problems.append(f'{path}: {key}={values[key]!r}: {key} takes {kind}.')
    if not problems and not (values['sweep'] or values['ablate']):
        problems.append(
            f"{path} asks nothing: a study has a grid, such as sweep = {{'ffn_type': ['standard', "
            f"'swiglu'], 'seed': [1, 2, 3]}}, or ablate = {{…}}."
        )
    if problems:
        raise UserError(*problems)
    study = Study(path, asked, **values)
    known = flatten(schema())
    for name, point in _named_points(study):
        layer = Layer(f'{path}, {name}', point)
        accept_layer(layer, schema(), problems)
    if study.match != 'none' and study.match_by not in known:
        problems.append(
            f'{path}: match_by={study.match_by!r} is no option.{nearest(study.match_by, known)}'
        )
    problems += _seed_problems(study)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return study


def _seed_problems(study: Study) -> Iterator[str]:
    """Seeds that would make a run count as evidence for the value that it chose."""
    for name in ('ablate', 'tune', 'exclude'):
        points = study.exclude if name == 'exclude' else [getattr(study, name)]
        for key in SEED_KEYS:
            if any(key in point for point in points):
                yield f'{study.path}: {name} has {key!r}: seeds stand in sweep only.'
    if not study.tune:
        return
    base = {key: study.asked.value(key, schema) for key in SEED_KEYS}
    used = {seed for point in seeds_of(study).values() for seed in {**base, **point}.values()}
    if study.tune_seed in used:
        unused = next(seed for seed in itertools.count() if seed not in used)
        yield (
            f'{study.path}: tune_seed={study.tune_seed} is a seed of the runs themselves, so that '
            f'a run that chose an option would be evidence for it. Set tune_seed = {unused}.'
        )


def _named_points(study: Study) -> Iterator[tuple[str, dict]]:
    """Every value that the study sets, as points, so that each is checked by itself."""
    for name in ('sweep', 'ablate', 'tune'):
        for key, values in getattr(study, name).items():
            for value in values:
                yield name, {key: value}
    for point in study.exclude:
        yield 'exclude', point
    yield 'reference', study.reference
    yield 'baseline', study.baseline


def grid(choices: dict[str, list]) -> list[dict]:
    """Every combination, the last key varying fastest."""
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def overrides_of(study: Study) -> list[dict]:
    """What each variant sets over the base: the grid, each with the ablations one at a time."""
    combinations = grid({k: v for k, v in study.sweep.items() if k not in SEED_KEYS})
    ablations = [{}, *({key: value} for key, values in study.ablate.items() for value in values)]
    variants = [{**point, **ablation} for point in combinations for ablation in ablations]
    return [
        point
        for point in variants
        if not any(excluded.items() <= point.items() for excluded in study.exclude)
    ]


def variants(study: Study, device: torch.device, dtype: str, dataset: TokenDataset):
    """The study's variants, checked all at once and matched in size. Raises UserError."""
    found, problems = [], []
    for overrides in overrides_of(study):
        try:
            settings = settings_of(study, overrides).complete(device, dtype, dataset)
        except UserError as error:
            problems += [f'{label_of(overrides)}: {problem}' for problem in error.problems]
        else:
            found.append(Variant(label_of(overrides), overrides, overrides, settings))
    if problems:
        raise UserError(
            *problems,
            f'{study.path}: leave such points out with exclude = [{{…}}, …], or change the grid.',
        )
    if not found:
        raise UserError(f'{study.path}: exclude leaves no point of the grid.')
    found = _distinct(study, found)
    return found if study.match == 'none' else [*_matched(study, found, device, dtype, dataset)]


def _distinct(study: Study, found: list[Variant]) -> list[Variant]:
    """Each way to train once: an ablation may set what the base has already."""
    by_config: dict[str, Variant] = {}
    for variant in found:
        by_config.setdefault(repr(sorted(variant.settings.to_dict().items(), key=str)), variant)
    return list(by_config.values())


def baseline_of(study: Study, found: list[Variant]) -> Variant:
    """The variant that the others are compared with: `baseline`, else the `reference` if it is a
    variant, else the first. Raises UserError."""
    if not study.baseline:
        matching = _variants_at(study, found, study.reference) if study.reference else []
        return matching[0] if len(matching) == 1 else found[0]
    matching = _variants_at(study, found, study.baseline)
    if len(matching) == 1:
        return matching[0]
    labels = ', '.join(variant.label for variant in matching or found)
    if matching:
        raise UserError(
            f'{study.path}: baseline={study.baseline!r} fits {len(matching)} variants: {labels}. '
            f'Add the options that tell them apart.'
        )
    raise UserError(
        f'{study.path}: baseline={study.baseline!r} is none of the variants, which are: {labels}.'
    )


def _variants_at(study: Study, found: list[Variant], point: dict) -> list[Variant]:
    """The variants that agree with every option of a point.

    Where it gives each option of the sweep, ablations that it does not name are left out.
    """

    def agrees(variant: Variant) -> bool:
        values = {**variant.settings.to_dict(), **variant.asked}
        return all(key in values and values[key] == value for key, value in point.items())

    matching = [variant for variant in found if agrees(variant)]
    if set(study.sweep) - set(SEED_KEYS) <= point.keys():
        fewest = min((len(variant.asked) for variant in matching), default=0)
        matching = [variant for variant in matching if len(variant.asked) == fewest]
    return matching


def settings_of(study: Study, overrides: dict) -> Settings:
    """The base with `overrides`, as train.py would merge them. Raises UserError."""
    problems: list[str] = []
    layer = accept_layer(Layer(COMMAND_LINE, overrides), schema(), problems)
    asked = replace(study.asked, layers=[*study.asked.layers, layer], problems=problems)
    return load_settings(asked)


def label_of(overrides: dict) -> str:
    """`ffn_type=swiglu position_encoding=rope`, or `base`."""
    return ' '.join(f'{key}={value}' for key, value in overrides.items()) or 'base'


def folder_of(label: str) -> str:
    """The label as the name of a folder."""
    return re.sub(r'[^\w.=+-]+', '_', label)


# --- Fair sizes ----------------------------------------------------------------------------------


def _matched(study: Study, found: list[Variant], *where) -> Iterator[Variant]:
    """The variants with `match_by` set such that `match` agrees with the reference's."""
    measure = MEASURES[study.match]
    target = measure(settings_of(study, study.reference).complete(*where).architecture)
    for variant in found:
        size = variant.settings.architecture.to_dict().get(study.match_by)
        if type(size) is not int:
            raise UserError(
                f'{study.path}: {variant.label} has no size {study.match_by!r} to match by; its '
                f'sizes are {_sizes(variant.settings.architecture)}. Choose one by match_by.'
            )

        def changed(value: int, variant=variant) -> Settings:
            overrides = {**variant.overrides, study.match_by: value}
            return settings_of(study, overrides).complete(*where)

        value = size
        if measure(variant.settings.architecture) != target:
            step = study.match_step
            try:
                times = nearest_integer(
                    lambda n, changed=changed, step=step: measure(changed(n * step).architecture),
                    target,
                )
            except ValueError:
                raise UserError(
                    f'{study.path}: match_by={study.match_by!r} has no effect on {study.match} of '
                    f'{variant.label}. Choose another size.'
                ) from None
            value = times * step
        if value != size:
            overrides = {**variant.overrides, study.match_by: value}
            variant = replace(variant, overrides=overrides, settings=changed(value))
        mismatch = measure(variant.settings.architecture) / target - 1
        yield replace(variant, matched={'value': value, 'was': size, 'mismatch': mismatch})


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


def iterations(study: Study, variant: Variant, seconds_per_update: float | None) -> int | None:
    """Updates that the budget buys this variant; None: what the base says. Raises UserError."""
    if not study.budget:
        return None
    ((kind, amount),) = study.budget.items()
    run, architecture = variant.settings.run, variant.settings.architecture
    tokens = run.batch_size * run.gradient_accumulation_steps * architecture.block_size
    price = {
        'iterations': lambda: 1,
        'tokens': lambda: tokens,
        'flops': lambda: tokens * MEASURES['flops'](architecture),
        'seconds': lambda: seconds_per_update,
    }[kind]()
    updates = int(amount / price)
    if updates < 1:
        raise UserError(
            f'{study.path}: budget={study.budget!r} buys {variant.label} no update: one takes '
            f'{price:.4g} {kind}.'
        )
    return updates


def seeds_of(study: Study) -> dict[str, dict]:
    """The replicates by name: both seeds together, unless the sweep varies them by themselves."""
    seeds = {key: study.sweep[key] for key in SEED_KEYS if key in study.sweep}
    if list(seeds) == ['seed']:
        return {f'seed={seed}': {'seed': seed, 'data_seed': seed} for seed in seeds['seed']}
    return {label_of(point) if point else '': point for point in grid(seeds)}


def points_of(study: Study, found: list[Variant], chosen: dict[str, dict]) -> list[Point]:
    """Every run: all variants at the first seed, then at the next, so that pairs grow together.

    chosen: by the variant's label, what the budget and the tuning add.
    """
    return [
        Point(
            folder='/'.join(folder_of(part) for part in (v.label, name) if part),
            variant=v.label,
            overrides={**v.overrides, **chosen.get(v.label, {}), **seed},
        )
        for name, seed in seeds_of(study).items()
        for v in found
    ]


def tuning_points(study: Study, found: list[Variant], chosen: dict[str, dict]) -> list[Point]:
    """The runs that choose each variant's own values of the keys of `tune`, at a seed apart."""
    seed = {'seed': study.tune_seed, 'data_seed': study.tune_seed}
    return [
        Point(
            folder=f'{folder_of(v.label)}/{folder_of(label_of(setting))}',
            variant=v.label,
            overrides={**v.overrides, **chosen.get(v.label, {}), **setting, **seed},
        )
        for v in found
        for setting in (grid(study.tune) if study.tune else [])
    ]
