"""Differences between groups of runs besides their architecture, by the rank of each group."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from comparison.conditions import (
    BEST_CONDITIONS,
    CODE_CONDITIONS,
    FIXED_CONDITIONS,
    LOSS_CONDITIONS,
)
from comparison.groups import Group, run_seeds
from comparison.runs import Run

# Values as text, each with the ranks (from 1) of the groups in which at least one run has it.
Values = dict[str, list[int]]


def loss_conditions(runs: Iterable[Run]) -> list[str]:
    """Keys of all conditions that losses depend on: the fixed ones and other training options."""
    others = dict.fromkeys(
        key for run in runs for key in run.conditions if key not in FIXED_CONDITIONS
    )
    return [*LOSS_CONDITIONS, *others]


def differing_values(
    groups: Sequence[Sequence[dict[str, Any]]], keys: Iterable[str], unknown: str = 'None'
) -> dict[str, Values]:
    """The keys with more than one value over all runs of all groups; '-' is a missing key."""
    result = {}
    for key in keys:
        values: Values = {}
        for rank, settings in enumerate(groups, 1):
            for setting in settings:
                text = value_text(key, setting[key], unknown) if key in setting else '-'
                ranks = values.setdefault(text, [])
                if rank not in ranks:
                    ranks.append(rank)
        if len(values) > 1:
            result[key] = values
    return result


def differing_conditions(
    groups: Sequence[Group], keys: Iterable[str], runs_of: Callable[[Group], Sequence[Run]]
) -> dict[str, Values]:
    """The conditions that differ between the `runs_of(group)` of all groups.

    An option that is missing in a record did not exist when the run started: it counts as equal.
    """
    keys = list(keys)
    result = differing_values(
        [[run.conditions for run in runs_of(group)] for group in groups], keys, ''
    )
    for key in list(result):
        result[key].pop('-', None)
        if len(result[key]) < 2:
            del result[key]
    return result


def value_text(key: str, value: Any, unknown: str) -> str:
    """A value as text, or several values that a run had in turn."""
    if isinstance(value, tuple):
        distinct = [v for index, v in enumerate(value) if not index or v != value[index - 1]]
        return ' then '.join(value_text(key, each, 'unknown') for each in distinct)
    if value is None:
        return unknown
    if key in ('tokens_seen', 'tokens_per_iter') and type(value) in (int, float):
        return f'{value:,}'
    if isinstance(value, float):
        return f'{value:.4g}' if key == 'peak_tflops' else f'{value:.12g}'
    return str(value)[:12] if key.endswith('_sha256') else str(value)


def differing_evaluations(groups: Sequence[Group]) -> dict[str, Values]:
    """The conditions that differ and affect only the best of several evaluations."""
    return differing_conditions(groups, BEST_CONDITIONS, lambda group: group.scored_runs)


def differing_loss_conditions(groups: Sequence[Group]) -> dict[str, Values]:
    """The conditions that differ and that losses depend on, besides the architecture."""
    keys = loss_conditions(run for group in groups for run in group.runs)
    keys.remove('data_seed')
    keys.remove('tokens_seen')
    warnings = differing_conditions(groups, keys, lambda group: group.runs)
    # The tokens of an unfinished run are ignored if its group has a finished one.
    warnings |= differing_conditions(groups, ['tokens_seen'], lambda group: group.scored_runs)
    if not _data_seeds_agree(groups):
        warnings |= differing_conditions(groups, ['data_seed'], lambda group: group.runs)
    warnings |= differing_data(groups)
    return {key: warnings[key] for key in (*keys, *warnings) if key in warnings}


def _data_seeds_agree(groups: Sequence[Group]) -> bool:
    """Whether all groups have the same data seeds, or each run has its own in all groups."""
    seeds = [{str(run.conditions['data_seed']) for run in group.runs} for group in groups]
    all_distinct = all(len(drawn) == len(group.runs) > 1 for drawn, group in zip(seeds, groups))
    return all_distinct or all(group == seeds[0] for group in seeds)


def differing_data(groups: Sequence[Group]) -> dict[str, Values]:
    """Hashes of the training sequences where they differ between runs with equal seeds.

    Each evaluation records a hash of all sequences so far; two runs are compared at the last
    iteration for which both have one.
    """
    by_seeds: dict[tuple, list[tuple[int, Run]]] = {}
    for rank, group in enumerate(groups, 1):
        for run in group.runs:
            by_seeds.setdefault(run_seeds(run), []).append((rank, run))
    values: Values = {}
    for seeds, runs in by_seeds.items():
        for index, (rank, run) in enumerate(runs):
            for other_rank, other in runs[index + 1 :]:
                shared = run.data_hashes.keys() & other.data_hashes.keys()
                per_iter = {str(r.conditions['tokens_per_iter']) for r in (run, other)}
                if not shared or len(per_iter) > 1:
                    continue
                hashes = [r.data_hashes[max(shared)] for r in (run, other)]
                if hashes[0] == hashes[1]:
                    continue
                for differing_rank, digest in zip((rank, other_rank), hashes):
                    ranks = values.setdefault(f'{digest} (seed {seeds[0]})', [])
                    ranks.extend([differing_rank] * (differing_rank not in ranks))
    return {'data_hash': values} if values else {}


def code_difference(groups: Sequence[Group]) -> str | None:
    """One sentence on differing source files and torch versions, or None."""
    runs = [run for group in groups for run in group.runs]
    with_hashes = [run for run in runs if run.code]
    files = sorted({file for run in with_hashes for file in run.code})
    changed = [file for file in files if len({run.code.get(file) for run in with_hashes}) > 1]
    versions = differing_conditions(groups, CODE_CONDITIONS, lambda group: group.runs)
    parts = []
    if 'torch' in versions:
        parts.append(f'torch {_values_with_ranks(versions["torch"])}')
    if changed:
        more = f' and {len(changed) - 4} more' if len(changed) > 4 else ''
        parts.append(f'the source files {", ".join(changed[:4])}{more}')
    elif 'git_commit' in versions and len(with_hashes) < len(runs):
        # An older record does not list the source files.
        parts.append(f'git commit {_values_with_ranks(versions["git_commit"])}')
    return f'The runs used different code: {"; ".join(parts)}.' if parts else None


def _values_with_ranks(values: Values) -> str:
    return ', '.join(f'{text[:12]} (#{" #".join(map(str, v))})' for text, v in values.items())
