"""What a study is: its keys, read and checked, and the names of its variants and folders.

A study is a config file of `train.py` with some of the keys of `STUDY_KEYS` beside the usual ones,
which are the base of every run. `studies.variants` and `studies.trials` make runs of it.
"""

import hashlib
import itertools
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from common.errors import UserError, did_you_mean
from common.registry import Option
from configurator import COMMAND_LINE, CommandLine, Layer, flatten, validate_layer
from training_config import PLAN_OPTIONS, Settings, load_settings, schema

SEED_KEYS = ('seed', 'data_seed')
BUDGETS = ('iterations', 'tokens', 'flops', 'seconds')
MATCHES = ('params', 'flops')
LARGEST_STUDY = 10_000  # runs; each is checked and has a folder before the first begins
# Options that the study sets for each run.
RESERVED = {
    *('out_dir', 'init_from', 'resume_run', 'log_style', 'concurrent_runs', 'wandb_run_name'),
    *('debug', *PLAN_OPTIONS),
}
LONGEST_NAME = 255  # bytes in the name of a folder, on nearly every file system

_brief = reprlib.Repr()  # short whatever the value is, and never an error
_brief.maxstring = _brief.maxother = 60


# --- Keys ----------------------------------------------------------------------------------------

_GRID = "a dict of lists, such as {'ffn_type': ['standard', 'swiglu']}"
_POINT = "a dict of options, such as {'ffn_type': 'standard'}"
_BUDGET = f"a dict of one of {', '.join(BUDGETS)} and a finite amount, such as {{'tokens': 1e7}}"


def _is_point(value) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_grid(value) -> bool:
    return _is_point(value) and all(isinstance(values, list | tuple) for values in value.values())


def _is_budget(value) -> bool:
    return isinstance(value, dict) and len(value) <= 1 and all(map(_is_amount, value.items()))


def _is_amount(item: tuple) -> bool:
    kind, amount = item
    try:
        return kind in BUDGETS and type(amount) in (int, float) and 0 < float(amount) < math.inf
    except OverflowError:
        return False


def _is_whole(least: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and value >= least


def _is_text(value) -> bool:
    return isinstance(value, str)


# key -> (default, whether a value is one, what it is in words)
STUDY_KEYS: dict[str, tuple] = {
    'question': ('', _is_text, 'a line of text'),
    'sweep': ({}, _is_grid, _GRID),
    'ablate': ({}, _is_grid, _GRID),
    'exclude': (
        [],
        lambda value: isinstance(value, list | tuple) and all(map(_is_point, value)),
        f'a list of points, each {_POINT}',
    ),
    'tune': ({}, _is_grid, "a dict of lists, such as {'learning_rate': [3e-4, 1e-3, 3e-3]}"),
    'tune_seed': (0, _is_whole(0), 'a whole number of at least 0'),
    'match': (
        'none',
        lambda value: _is_text(value) and value in (*MATCHES, 'none'),
        f'one of {[*MATCHES, "none"]}',
    ),
    'match_by': ('d_ff', _is_text, 'the name of an option that sets a size'),
    'match_step': (8, _is_whole(1), 'a whole number: the size is a multiple of it'),
    'reference': ({}, _is_point, _POINT),
    'baseline': ({}, _is_point, _POINT),
    'budget': ({}, _is_budget, _BUDGET),
}
GRIDS = ('sweep', 'ablate', 'tune')


@dataclass(frozen=True)
class Study:
    """A study file's keys, and what it is read from."""

    path: str
    command_line: CommandLine  # the file and the command line: the base of every run
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


def read_study(command_line: CommandLine) -> Study:
    """The study that the one config file of a command line holds.

    Raises UserError with every mistake, those of the file's other keys and of the command line too.
    """
    if len(command_line.config_files) != 1:
        usage = 'a study is one config file: study.py config/studies/NAME.py'
        raise UserError(*command_line.problems, usage)
    path = command_line.config_files[0]['path']
    problems, values = [], {}
    for key, (default, fits, kind) in STUDY_KEYS.items():
        values[key] = command_line.extra.get(key, default)
        if not fits(values[key]):
            problems.append(f'{path}: {key}={_brief.repr(values[key])}: {key} takes {kind}.')
            values[key] = default
    study = Study(path, command_line, **values)
    if not problems and not (study.sweep or study.ablate) and _was_read(command_line):
        problems.append(
            f"{path} defines no runs: set sweep = {{'ffn_type': ['standard', 'swiglu'], "
            f"'seed': [1, 2, 3]}}, or ablate = {{…}}."
        )
    problems += list(_grid_problems(study)) or [*_value_problems(study), *_key_problems(study)]
    problems += _base_problems(path, lambda key: command_line.value(key, schema))
    try:
        load_settings(command_line)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return study


def _was_read(command_line: CommandLine) -> bool:
    """Whether the config file could be: otherwise its mistake is that, not what it lacks."""
    return bool(command_line.layers[0].values or command_line.extra or not command_line.problems)


def _grid_problems(study: Study) -> Iterator[str]:
    """Lists without values, and grids so large that not even their values are looked at."""
    for name in GRIDS:
        for key, values in getattr(study, name).items():
            if not values:
                yield f'{study.path}: {name}[{key!r}] is empty. Give it values, or leave it out.'
    seeds = math.prod(len(v) for k, v in study.sweep.items() if k in SEED_KEYS)
    swept = math.prod(len(v) for k, v in study.sweep.items() if k not in SEED_KEYS)
    variants = swept * (1 + sum(map(len, study.ablate.values())))
    settings = math.prod(map(len, study.tune.values())) if study.tune else 0
    runs = variants * (seeds + settings)
    if runs > LARGEST_STUDY:
        yield (
            f'{study.path}: {_count(variants)} variants × ({_count(seeds)} seeds + '
            f'{_count(settings)} settings to tune) = {_count(runs)} runs. A study has at most '
            f'{LARGEST_STUDY:,}: shorten its lists.'
        )


def _count(number: int) -> str:
    return f'{number:,}' if number < 10**15 else f'about 1e{len(str(number)) - 1}'


def _named_points(study: Study) -> Iterator[tuple[str, dict]]:
    """Every value that the study sets, as points, so that each is checked by itself."""
    for name in GRIDS:
        for key, values in getattr(study, name).items():
            for value in values:
                yield name, {key: value}
    for point in study.exclude:
        yield 'exclude', point
    yield 'reference', study.reference
    yield 'baseline', study.baseline


def _value_problems(study: Study) -> Iterator[str]:
    """Options that do not exist, and values that they do not take."""
    options = flatten(schema())
    for name, point in _named_points(study):
        problems: list[str] = []
        accepted = validate_layer(Layer(f'{study.path}, {name}', point), {'': options}, problems)
        yield from problems
        for key, value in accepted.values.items():
            if key in RESERVED:
                yield f'{study.path}: {name} has {key!r}, which the study sets for each run.'
            elif argument(key, value, options) is None:
                yield (
                    f'{study.path}, {name}: {key}={_brief.repr(value)} cannot stand on the command '
                    f'line of a run.'
                )
    for name in GRIDS:
        for key, values in getattr(study, name).items():
            plain = Counter(v for v in values if isinstance(v, int | float | str | None))
            if repeated := [_brief.repr(value) for value, times in plain.items() if times > 1]:
                yield f'{study.path}: {name}[{key!r}] has {", ".join(repeated)} more than once.'
    if study.match != 'none' and study.match_by not in options:
        hint = did_you_mean(study.match_by, options)
        yield f'{study.path}: match_by={study.match_by!r} is no option.{hint}'


def _key_problems(study: Study) -> Iterator[str]:
    """Keys that contradict each other: a variant would not be what its name says."""
    path = study.path
    for name in ('ablate', 'tune', 'exclude'):
        points = study.exclude if name == 'exclude' else [getattr(study, name)]
        for key in SEED_KEYS:
            if any(key in point for point in points):
                yield f'{path}: {name} has {key!r}: seeds stand in sweep only.'
    for key in study.tune:
        if key in study.sweep or key in study.ablate:
            yield f'{path}: {key!r} is in tune and in the grid: it is either varied or tuned.'
    for name in GRIDS:
        for key in getattr(study, name):
            if study.budget and key == 'max_iters':
                yield f'{path}: {name} has max_iters, which the budget decides. Leave out either.'
            if study.match != 'none' and key == study.match_by:
                yield (
                    f'{path}: {name} has {key!r}, which match_by changes. Leave it out of {name}, '
                    f'or match by another size.'
                )
    if not study.tune:
        return
    base = {key: study.command_line.value(key, schema) for key in SEED_KEYS}
    used = {seed for point in study_seeds(study).values() for seed in {**base, **point}.values()}
    if study.tune_seed in used:
        unused = next(seed for seed in itertools.count() if seed not in used)
        yield (
            f'{path}: tune_seed={study.tune_seed} is a seed of the runs themselves, so that a run '
            f'that chose an option would be evidence for it. Set tune_seed = {unused}.'
        )


def _base_problems(path: str, base: Callable[[str], object]) -> Iterator[str]:
    """What the base may not set: the study begins or continues each run in a folder of its own."""
    if base('init_from') not in ('scratch', 'auto'):
        yield (
            f'{path}: init_from={base("init_from")!r}: a study trains from scratch, and continues '
            f'what was interrupted by itself. Leave init_from out.'
        )
    if base('resume_run') is not None:
        yield f'{path}: resume_run={base("resume_run")!r} names one run. Leave it out of a study.'
    if base('plan'):
        yield f'{path}: plan=True shows one run. --plan_only shows the runs of a study.'


def argument(key: str, value, options: dict[str, Option]) -> str | None:
    """`--key=value` as train.py reads it back, to the same value; None if nothing is."""
    for text in (str(value), f"'{value}'"):
        try:
            text.encode()
            if '\0' not in text and options[key].parse(key, text) == value:
                return f'--{key}={text}'
        except (UserError, ValueError):
            continue
    return None


# --- Points --------------------------------------------------------------------------------------


def grid(choices: dict[str, list]) -> list[dict]:
    """Every combination, the last key varying fastest."""
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def variant_overrides(study: Study) -> list[dict]:
    """What each variant sets over the base: the grid, each with the ablations one at a time.

    Raises UserError if `exclude` leaves nothing, or names a point that there is not.
    """
    combinations = grid({k: v for k, v in study.sweep.items() if k not in SEED_KEYS})
    ablations = [{}, *({key: value} for key, values in study.ablate.items() for value in values)]
    points = [{**point, **ablation} for point in combinations for ablation in ablations]
    problems, left = [], points
    for excluded in study.exclude:
        left = [point for point in left if not excluded.items() <= point.items()]
        if not any(excluded.items() <= point.items() for point in points):
            problems.append(
                f'{study.path}: exclude has {excluded!r}, which is no point of the grid.'
            )
    if not left:
        problems.append(f'{study.path}: exclude leaves no point of the grid.')
    if problems:
        raise UserError(*problems)
    return left


def merged_settings(study: Study, overrides: dict) -> Settings:
    """The base with `overrides`, as train.py would merge them. Raises UserError."""
    problems: list[str] = []
    layer = validate_layer(Layer(COMMAND_LINE, overrides), schema(), problems)
    layers = [*study.command_line.layers, layer]
    return load_settings(replace(study.command_line, layers=layers, problems=problems))


def study_seeds(study: Study) -> dict[str, dict]:
    """The replicates by name: both seeds together, unless the sweep varies them by themselves."""
    seeds = {key: study.sweep[key] for key in SEED_KEYS if key in study.sweep}
    if list(seeds) == ['seed']:
        return {f'seed={seed}': {'seed': seed, 'data_seed': seed} for seed in seeds['seed']}
    return {point_label(point) if point else '': point for point in grid(seeds)}


# --- Names ---------------------------------------------------------------------------------------


def point_label(overrides: dict, show: Callable[[object], str] = str) -> str:
    """`ffn_type=swiglu position_encoding=rope`, or `base`."""
    return ' '.join(f'{key}={show(value)}' for key, value in overrides.items()) or 'base'


def point_labels(points: Iterable[dict]) -> list[str]:
    """A label for each point. Where two would be one, as of None and 'None', a later one quotes."""
    labels: dict[str, None] = {}
    for point in points:
        label = point_label(point)
        labels[point_label(point, repr) if label in labels else label] = None
    return list(labels)


def _folder_name(label: str) -> str:
    return re.sub(r'[^\w.=+-]+', '_', label)


def folder_names(labels: list[str], clean: Callable[[str], str] = _folder_name) -> list[str]:
    """The labels as names of folders, all different on every file system.

    One that is too long, or that another label has taken, ends in a hash of its label. A label
    that the cleaning only loses spaces of takes its name first.
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
