"""Study files: read and check their keys; name the variants and folders.

A study file is a config file of `train.py` with some of the keys in `STUDY_KEYS`. Its other keys
are the base of every run. `studies.variants` and `studies.trials` derive the runs.
"""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from common.architecture_options import START_OPTIONS
from common.dict_option import DictOption, leaves
from common.errors import UserError, did_you_mean
from common.formatting import join_names
from common.layer_pattern import letters_of
from common.layer_table import kind_and_option, used_values
from common.registry import Option
from configurator import COMMAND_LINE, CommandLine, Layer, flatten, validate_layer
from model_config import ModelArchitectureConfig
from studies.keys import GRIDS, STUDY_KEYS, brief
from studies.ladder_keys import (
    SHAPES,
    ladder_problems,
    ladder_values,
    number_of_rungs,
    smallest_point,
)
from studies.points import (
    arguments,
    check_name,
    contains,
    merged_values,
    overlap,
    point_label,
)
from training_config import PLAN_OPTIONS, Settings, load_settings, schema

SEED_KEYS = ('seed', 'data_seed')
LARGEST_STUDY = 10_000  # runs; all are checked before the first begins
# Options that the study sets for each run itself.
RESERVED = {
    *('out_dir', 'init_from', 'resume_run', 'log_style', 'concurrent_runs', 'wandb_run_name'),
    *('debug', *PLAN_OPTIONS),
}
LONGEST_NAME = 255  # bytes in the name of a folder, on nearly every file system


@dataclass(frozen=True)
class Study:
    """The keys of a study file, and the command line that it was read from."""

    path: str
    command_line: CommandLine  # file and command-line options: the base of every run
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
    ladder: dict
    horizon: dict
    baseline_extra: int | dict
    transfer: str
    rung: dict = field(default_factory=dict)  # options of the rung that this study is a part of
    micro_batch: dict = field(default_factory=dict)  # derived sizes that all runs share


def read_study(command_line: CommandLine) -> Study:
    """The study in the single config file of a command line.

    Raises UserError with all problems, including those of the other keys and the command line.
    """
    if len(command_line.config_files) != 1:
        usage = 'give one study file: python study.py config/studies/NAME.py (see --help).'
        raise UserError(*command_line.problems, usage)
    path = command_line.config_files[0]['path']
    problems, values = [], {}
    for key, (default, fits, kind) in STUDY_KEYS.items():
        values[key] = command_line.extra.get(key, default)
        if not fits(values[key]):
            problems.append(f'{path}: {key}={brief(values[key])}: {key} takes {kind}.')
            values[key] = default
    study = Study(path, command_line, **values)
    if not problems and not (study.sweep or study.ablate) and _was_read(command_line):
        problems.append(
            f"{path} defines no runs: set sweep = {{'ffn_type': ['standard', 'swiglu'], "
            f"'seed': [1, 2, 3]}}, or ablate = {{…}}."
        )
    problems += list(_grid_problems(study)) or [*_value_problems(study), *_key_problems(study)]
    problems += ladder_problems(study) if not problems else []
    problems += _base_problems(path, lambda key: command_line.value(key, schema))
    problems += command_line.problems
    if not (problems and study.ladder):  # whose sizes the base may need
        try:
            merged_settings(study, smallest_point(study))
        except UserError as error:
            smallest = point_label(smallest_point(study))
            whose = f'{path}: rung {smallest}: ' if smallest_point(study) else ''
            problems += [f'{whose}{problem}' for problem in error.problems]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return study


def _was_read(command_line: CommandLine) -> bool:
    """Whether the config file could be read. If not, missing keys are not its problem."""
    return bool(command_line.layers[0].values or command_line.extra or not command_line.problems)


def _grid_problems(study: Study) -> Iterator[str]:
    """Empty lists, and grids that are too large to check."""
    for name in GRIDS:
        for key, values in getattr(study, name).items():
            if not values:
                yield f'{study.path}: {name}[{key!r}] is empty. Add values or remove it.'
    seeds = math.prod(len(v) for k, v in study.sweep.items() if k in SEED_KEYS)
    swept = math.prod(len(v) for k, v in study.sweep.items() if k not in SEED_KEYS)
    variants = swept * (1 + sum(map(len, study.ablate.values())))
    settings = math.prod(map(len, study.tune.values())) if study.tune else 0
    rungs = number_of_rungs(study) or 1
    runs = rungs * variants * (seeds + settings)
    if runs > LARGEST_STUDY:
        yield (
            f'{study.path}: {f"{rungs} rungs × " * (rungs > 1)}{_count(variants)} variants × '
            f'({_count(seeds)} seeds + '
            f'{_count(settings)} tuning runs) = {_count(runs)} runs, but a study has at most '
            f'{LARGEST_STUDY:,}. Shorten the lists.'
        )


def _count(number: int) -> str:
    return f'{number:,}' if number < 10**15 else f'about 1e{len(str(number)) - 1}'


def _named_points(study: Study) -> Iterator[tuple[str, dict]]:
    """Every value in the study, as a dict of its own, so that each is checked separately."""
    for name in GRIDS:
        for key, values in getattr(study, name).items():
            for value in values:
                yield name, {key: value}
    for key, values in ladder_values(study).items():
        for value in values:
            yield 'ladder', {key: value}
    if isinstance(study.baseline_extra, dict):
        yield 'baseline_extra', study.baseline_extra
    for point in study.exclude:
        yield 'exclude', point
    yield 'reference', study.reference
    yield 'baseline', study.baseline


def _value_problems(study: Study) -> Iterator[str]:
    """Unknown options, and invalid values."""
    options = flatten(schema())
    for name, point in _named_points(study):
        for key, value in point.items():
            also = ('params', *SHAPES) if name == 'ladder' else ()
            yield from _problems_of_value(f'{study.path}, {name}', key, value, options, also)
            if key in RESERVED:
                yield f'{study.path}: {name} has {key!r}, which study.py sets itself. Remove it.'
    for name in GRIDS:
        for key, values in getattr(study, name).items():
            plain = Counter(v for v in values if isinstance(v, int | float | str | None))
            dicts = Counter(point_label({key: v}, repr) for v in values if isinstance(v, dict))
            repeated = [brief(value) for value, times in plain.items() if times > 1]
            repeated += [label for label, times in dicts.items() if times > 1]
            if repeated:
                yield (
                    f'{study.path}: {name}[{key!r}] has {", ".join(repeated)} more than once. '
                    f'Remove duplicates.'
                )
    if study.match != 'none':
        yield from _match_by_problems(study, options)


def _problems_of_value(
    place: str, key: str, value: object, options: dict[str, Option], also: Iterable[str] = ()
) -> list[str]:
    """The problems of one value of a point. also: further names to suggest for an unknown one."""
    try:
        check_name(key, options, also)
    except UserError as error:
        return [f'{place}: {problem}' for problem in error.problems]
    problems: list[str] = []
    accepted = validate_layer(Layer(place, merged_values({key: value})), {'': options}, problems)
    if not problems and key not in RESERVED and arguments(accepted.values, options) is None:
        problems = [f'{place}: {key}={brief(value)} cannot be passed on a command line. Remove it.']
    return problems


def _key_problems(study: Study) -> Iterator[str]:
    """Contradictions between keys."""
    path = study.path
    for name in ('ablate', 'tune', 'exclude'):
        points = study.exclude if name == 'exclude' else [getattr(study, name)]
        for key in SEED_KEYS:
            if any(key in point for point in points):
                yield f'{path}: {name} has {key!r}, but seeds belong in sweep. Move it there.'
    for key in overlap(study.tune, {**study.sweep, **study.ablate}):
        yield f'{path}: {key!r} is both in tune and in the grid. Remove it from one of them.'
    for name in GRIDS:
        for length in ('budget', 'horizon'):
            if getattr(study, length) and 'max_iters' in getattr(study, name):
                yield (
                    f'{path}: {name} has max_iters, which {length} determines. Remove one of them.'
                )
        if study.match == 'none':
            continue
        for key in overlap(getattr(study, name), {study.match_by: [None]}):
            yield (
                f'{path}: {name} has {key!r}, which match_by changes. Remove it from {name} or '
                f'set another match_by.'
            )
    yield from _unused_kind_problems(study)
    if not study.tune:
        return
    base = {key: study.command_line.value(key, schema) for key in SEED_KEYS}
    used = {seed for point in study_seeds(study).values() for seed in {**base, **point}.values()}
    if study.tune_seed in used:
        unused = next(seed for seed in itertools.count() if seed not in used)
        yield (
            f'{path}: tune_seed={study.tune_seed} is also a seed of the runs to compare, so the '
            f'comparison would reuse data that tuning has selected on. Set tune_seed = {unused}.'
        )


def _base_problems(path: str, base: Callable[[str], object]) -> Iterator[str]:
    """Options that the base must not set, since the study starts and resumes each run itself."""
    if base('init_from') not in ('scratch', 'auto'):
        yield (
            f'{path}: init_from={base("init_from")!r}: a study trains from scratch and resumes '
            f'interrupted runs itself. Remove init_from.'
        )
    if base('resume_run') is not None:
        yield f'{path}: resume_run={base("resume_run")!r} names a single run. Remove it.'
    if base('plan'):
        yield f'{path}: plan=True is for a single run. Use --plan_only for a study.'


def _match_by_problems(study: Study, options: dict[str, Option]) -> Iterator[str]:
    """Whether `match_by` names an option, or a value of a dict option."""
    name = study.match_by
    try:
        check_name(name, options)
    except UserError as error:
        yield from (f'{study.path}: match_by={name!r}: {problem}' for problem in error.problems)
    else:
        if isinstance(options[name.partition('.')[0]], DictOption) and name.count('.') < 2:
            yield (
                f'{study.path}: match_by={name!r} is no single size. Name one, such as '
                f"match_by = 'layer_kinds.L.d_ff'."
            )


# --- Layer patterns ------------------------------------------------------------------------------


def _varies_pattern(study: Study) -> bool:
    """Whether the grid has patterns; or kinds of layers, and presets or designs with their own."""
    keys = {key.partition('.')[0] for name in GRIDS for key in getattr(study, name)}
    return 'layer_pattern' in keys or ('layer_kinds' in keys and bool(keys & START_OPTIONS.keys()))


def run_options(study: Study, point: dict) -> dict:
    """The options of a point as the command line of its run sets them.

    In a study that varies the layer pattern, each run sets its own, the base's too, and values of
    kinds that it lacks are left out: the command line overrides the kinds of the file.
    """
    point = {**study.rung, **point}
    if not _varies_pattern(study):
        return point
    if 'layer_pattern' not in point:
        layers = [*study.command_line.layers, Layer(COMMAND_LINE, merged_values(point))]
        pattern = ModelArchitectureConfig.resolve(layers, []).layer_pattern
        point = {**point, 'layer_pattern': pattern}
    return used_values(point, letters_of(point['layer_pattern'] or ''))


def _patterns(study: Study) -> Iterator[str]:
    """The layer patterns of the study: those in its grid, and those of the base, of presets and of
    published designs where the grid names none."""
    points = [(key, v) for n in GRIDS for key, values in getattr(study, n).items() for v in values]
    known = {key: option.choices or () for key, option in START_OPTIONS.items()}
    starts = [{key: value} for key, value in points if value in known.get(key, ())]
    yield from (value for key, value in points if key == 'layer_pattern' and isinstance(value, str))
    for start in ({}, *starts):
        layers = [*study.command_line.layers, Layer(COMMAND_LINE, start)]
        yield ModelArchitectureConfig.resolve(layers, []).layer_pattern or ''


def _unused_kind_problems(study: Study) -> Iterator[str]:
    """Kinds of layers that no pattern of the study has."""
    if not _varies_pattern(study):
        return
    letters = letters_of(''.join(_patterns(study)))
    points = [
        *((layer.origin, layer.values) for layer in study.command_line.layers),
        *((f'{study.path}, {name}', point) for name, point in _named_points(study)),
        (f'{study.path}, match_by', {study.match_by: None}),
    ]
    for origin, point in points:
        for kind in dict.fromkeys(kind_and_option(leaf)[0] for leaf in leaves(point)):
            if kind is not None and kind not in letters:
                hint = did_you_mean(kind, letters) or f' Their letters: {join_names(letters)}.'
                yield (
                    f'layer_kinds.{kind} ({origin}): no layer_pattern of the study has the letter '
                    f'{kind}.{hint} Remove the kind or use it.'
                )


# --- Variants ------------------------------------------------------------------------------------


def grid(choices: dict[str, list]) -> list[dict]:
    """All combinations; the last key varies fastest."""
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def variant_points(study: Study) -> list[dict]:
    """The options of each variant: every combination of the sweep, alone and with each ablation.

    Values of kinds of layers that a variant does not have are left out. Raises UserError if
    `exclude` leaves nothing or has an entry that matches nothing.
    """
    combinations = grid({k: v for k, v in study.sweep.items() if k not in SEED_KEYS})
    ablations = [{}, *({key: value} for key, values in study.ablate.items() for value in values)]
    points = [{**point, **ablation} for point in combinations for ablation in ablations]
    problems, left = [], points
    for excluded in study.exclude:
        left = [point for point in left if not contains(point, excluded)]
        if not any(contains(point, excluded) for point in points):
            problems.append(
                f'{study.path}: exclude has {excluded!r}, which is not in the grid. Remove it.'
            )
    if not left:
        problems.append(f'{study.path}: exclude leaves no runs. Remove entries from it.')
    if _varies_pattern(study):
        problems += _values_without_layers(study, points)
    if problems:
        raise UserError(*problems)
    used = (_used_point(study, point) for point in left)
    return list({repr(sorted(leaves(point).items())): point for point in used}.values())


def _used_point(study: Study, point: dict) -> dict:
    """The point without values of kinds of layers that its run lacks."""
    options = run_options(study, point)
    hidden = {'layer_pattern', *study.rung} - point.keys()
    return {key: value for key, value in options.items() if key not in hidden}


def _values_without_layers(study: Study, points: list[dict]) -> list[str]:
    """A problem for each value of a kind that the layer pattern of no point has."""
    given, used = (
        {(leaf, repr(value)) for each in of for leaf, value in leaves(each).items()}
        for of in (points, [_used_point(study, point) for point in points])
    )
    return [
        f'{study.path}: {leaf}={value} has no effect, since no layer_pattern that it is combined '
        f'with has the letter {kind_and_option(leaf)[0]}. Move layer_pattern to sweep, or set it '
        f'in the base.'
        for leaf, value in sorted(given - used)
    ]


def merged_settings(study: Study, overrides: dict) -> Settings:
    """The settings of the base with `overrides`, merged as by train.py. Raises UserError."""
    problems: list[str] = []
    shared = Layer('derived: the same for all runs of the study', study.micro_batch)
    values = merged_values(run_options(study, overrides))
    layer = validate_layer(Layer(COMMAND_LINE, values), schema(), problems)
    layers = [shared, *study.command_line.layers, layer]
    return load_settings(replace(study.command_line, layers=layers, problems=problems))


def study_seeds(study: Study) -> dict[str, dict]:
    """The seeds of the replicates by name. `seed` sets data_seed too, unless that is swept."""
    seeds = {key: study.sweep[key] for key in SEED_KEYS if key in study.sweep}
    if list(seeds) == ['seed']:
        return {f'seed={seed}': {'seed': seed, 'data_seed': seed} for seed in seeds['seed']}
    return {point_label(point) if point else '': point for point in grid(seeds)}


# --- Names ---------------------------------------------------------------------------------------


def _folder_name(label: str) -> str:
    return re.sub(r'[^\w.=+-]+', '_', label)


def folder_names(labels: list[str], clean: Callable[[str], str] = _folder_name) -> list[str]:
    """The labels as folder names that differ on every file system.

    A name that is too long or already used ends in a hash of its label. Labels in which only spaces
    are replaced get their names first.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for label in sorted(labels, key=lambda label: clean(label) != label.replace(' ', '_')):
        name = clean(label)
        if len(name.encode()) > LONGEST_NAME or name.casefold() in taken:
            digest = hashlib.sha256(label.encode()).hexdigest()[:12]
            cut = name.encode()[: LONGEST_NAME - 55].decode(errors='ignore')
            name = f'{cut}-{digest}'
        taken.add(name.casefold())
        names[label] = name
    return [names[label] for label in labels]
