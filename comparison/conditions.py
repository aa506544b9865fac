"""What must agree for losses, or for time and memory, to speak of the architecture alone."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from comparison.analysis import SEEDS, Group, seeds_of
from records import trackers

# Some belong to both: block size changes what a token can see and what it costs.
LOSS_CONDITIONS = (
    *('dataset', 'train_sha256', 'val_sha256', 'tokenizer', 'vocab_size', 'model_vocab_size'),
    *('block_size', 'tokens_seen', 'tokens_per_iter', 'data_seed', 'sampling', 'eval_windows'),
    *('max_iters', 'optimizer', 'lr_schedule', 'learning_rate', 'min_lr', 'warmup_iters'),
    *('lr_decay_iters', 'decay_lr', 'weight_decay', 'grad_clip', 'dtype', 'weights_from'),
)
# What the best of several evaluations depends on besides.
BEST_CONDITIONS = ('eval_interval', 'evaluations')
SPEED_CONDITIONS = (
    *('device', 'device_name', 'threads', 'strategy', 'world_size', 'compile', 'dtype'),
    *('block_size', 'batch_size', 'tokens_per_iter', 'model_vocab_size', 'concurrent_runs'),
    'peak_tflops',
)
CODE = ('torch', 'git_commit')  # told apart from options: most changes of code change no losses
_FIXED = (*LOSS_CONDITIONS, *BEST_CONDITIONS, *SPEED_CONDITIONS, *CODE)
# Where a run is kept, how it reports, what ran beside it; nothing that its losses depend on.
REPORTING = frozenset(
    {
        *('out_dir', 'log_style', 'log_interval', 'concurrent_runs', *trackers.OPTIONS),
        *('sample_interval', 'sample_prompt', 'sample_tokens'),
    }
)
# Neither does the trained model depend on these. Evaluations draw no random numbers.
IMMATERIAL = REPORTING | {
    *('always_save_checkpoint', 'async_save', 'keep_last', 'keep_best', 'eval_interval'),
    *('diagnostics', 'debug', 'resume_run', 'verify_data', 'distributed_timeout', 'peak_tflops'),
}
# Options that change the speed, and the losses by rounding alone. `dtype`, `reduce_dtype` and
# `tokens_per_iter` say what does change them.
OF_SPEED = frozenset(
    {
        *('device', 'compile', 'activation_checkpointing', 'deterministic', 'batch_size'),
        *('gradient_accumulation_steps', 'use_fsdp', 'use_zero1', 'fsdp_reshard_after_forward'),
        'fsdp_shard_size',
    }
)
# Options for which other conditions stand: what they were resolved to, or what they led to.
RESOLVED = frozenset({'init_from', 'arch_preset', 'eval_iters', 'eval_only', *SEEDS})

# Values as text, each with the ranks (1-based) of the groups that have it, some in part.
Values = dict[str, list[int]]


def conditions_of(record: dict[str, Any], evaluations: int) -> dict[str, tuple]:
    """The values of all conditions, each in the order in which the run had them.

    A run that was resumed with other options, on another machine or on other data has several
    values. evaluations: how many validation losses the run has.
    """
    config, metadata, startup = record['config'], record['metadata'], record['startup_info']
    summary = record['summary']
    data, hardware = (startup.get(part) or {} for part in ('data', 'hardware'))
    choices = record['architecture'].get('choices') or {}
    # What was resolved for this machine and this dataset stands above what was set.
    known = {**config, **metadata, **hardware, **data}
    known['device'] = str(hardware.get('device') or '').split(':')[0] or None  # any cuda:N alike
    known['eval_windows'] = (data.get('eval_windows') or {}).get('val')
    known['tokens_seen'] = summary.get('total_tokens')
    known['weights_from'] = str((metadata.get('weights_from') or {}).get('source', 'the seed'))
    known['evaluations'] = evaluations
    known['peak_tflops'] = hardware.get('peak_tflops')
    known['torch'] = (metadata.get('versions') or {}).get('torch')
    known.setdefault('concurrent_runs', 1)  # before there were studies
    known.setdefault('sampling', 'random')  # before there was a choice
    if type(known['concurrent_runs']) is not int:
        raise ValueError(f'concurrent_runs is {known["concurrent_runs"]!r}, not a count')
    # Every other option of training is a condition too.
    others = config.keys() - choices.keys() - IMMATERIAL - OF_SPEED - RESOLVED
    keys = dict.fromkeys((*_FIXED, *sorted(others)))
    current = {key: known.get(key) for key in keys if key in known or key not in others}
    earlier = earlier_values(record)
    earlier['torch'] = earlier.get('version of torch', [])
    return {key: (*earlier.get(key, ()), value) for key, value in current.items()}


def earlier_values(record: dict[str, Any]) -> dict[str, list]:
    """What each option and fact was before the resumes that changed it."""
    values: dict[str, list] = {}
    for event in record['events']:
        changed = event.get('changed') if event.get('event') == 'resume' else None
        for key, pair in (changed or {}).items():
            if isinstance(pair, list | tuple) and len(pair) == 2:
                values.setdefault(key, []).append(pair[0])
    return values


def loss_conditions(runs: Iterable) -> list[str]:
    """The keys of what must agree for losses: the fixed ones, and all other training options."""
    others = dict.fromkeys(key for run in runs for key in run.conditions if key not in _FIXED)
    return [*LOSS_CONDITIONS, *others]


def differing(
    groups: Sequence[Sequence[dict[str, Any]]], keys: Iterable[str], unknown: str = 'None'
) -> dict[str, Values]:
    """Of `keys`, those whose values are not all the same, over all runs of all groups.

    '-' stands for a key that is missing.
    """
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
    groups: Sequence[Group], keys: Iterable[str], members: Callable[[Group], Sequence]
) -> dict[str, Values]:
    """The conditions that do not agree over `members` of all groups.

    An option that a record does not have was no choice when the run was made: it counts as equal.
    """
    keys = list(keys)
    result = differing([[run.conditions for run in members(group)] for group in groups], keys, '')
    for key in list(result):
        result[key].pop('-', None)
        if len(result[key]) < 2:
            del result[key]
    return result


def value_text(key: str, value: Any, unknown: str) -> str:
    """One value as text, or several that a run had in turn."""
    if isinstance(value, tuple):
        distinct = [v for place, v in enumerate(value) if not place or v != value[place - 1]]
        return ' then '.join(value_text(key, each, 'unknown') for each in distinct)
    if value is None:
        return unknown
    if key in ('tokens_seen', 'tokens_per_iter') and type(value) in (int, float):
        return f'{value:,}'
    if isinstance(value, float):
        return f'{value:.4g}' if key == 'peak_tflops' else f'{value:.12g}'
    return str(value)[:12] if key.endswith('_sha256') else str(value)


def unlike_evaluations(groups: Sequence[Group]) -> dict[str, Values]:
    """What differs of all that the best of several evaluations depends on besides."""
    return differing_conditions(groups, BEST_CONDITIONS, lambda group: group.evidence)


def unlike_loss_conditions(groups: Sequence[Group]) -> dict[str, Values]:
    """What differs, besides the architecture, of all that losses depend on."""
    keys = loss_conditions(run for group in groups for run in group.members)
    keys.remove('data_seed')
    keys.remove('tokens_seen')
    warnings = differing_conditions(groups, keys, lambda group: group.members)
    # What an unfinished run has seen so far says nothing about its group, unless that is all.
    warnings |= differing_conditions(groups, ['tokens_seen'], lambda group: group.evidence)
    if not _data_seeds_agree(groups):
        warnings |= differing_conditions(groups, ['data_seed'], lambda group: group.members)
    warnings |= unlike_data(groups)
    return {key: warnings[key] for key in (*keys, *warnings) if key in warnings}


def _data_seeds_agree(groups: Sequence[Group]) -> bool:
    """Whether all groups have the same seeds of the data order, or all draw several at random."""
    seeds = [{str(run.conditions['data_seed']) for run in group.members} for group in groups]
    drawn = all(len(own) == len(g.members) > 1 for own, g in zip(seeds, groups))
    return drawn or all(own == seeds[0] for own in seeds)


def unlike_data(groups: Sequence[Group]) -> dict[str, Values]:
    """Whether runs of different groups with equal seeds were trained on different sequences.

    The records hold a hash of them for each evaluation; two runs are compared at the last
    iteration for which both have one.
    """
    by_seeds: dict[tuple, list[tuple[int, Any]]] = {}
    for rank, group in enumerate(groups, 1):
        for run in group.members:
            by_seeds.setdefault(seeds_of(run), []).append((rank, run))
    values: Values = {}
    for seeds, runs in by_seeds.items():
        for place, (rank, run) in enumerate(runs):
            for other_rank, other in runs[place + 1 :]:
                shared = run.data_hashes.keys() & other.data_hashes.keys()
                per_iter = {str(r.conditions['tokens_per_iter']) for r in (run, other)}
                if not shared or len(per_iter) > 1:
                    continue
                hashes = [r.data_hashes[max(shared)] for r in (run, other)]
                if hashes[0] == hashes[1]:
                    continue
                for each, digest in zip((rank, other_rank), hashes):
                    ranks = values.setdefault(f'{digest} (seed {seeds[0]})', [])
                    ranks.extend([each] * (each not in ranks))
    return {'data_hash': values} if values else {}


def unlike_code(groups: Sequence[Group]) -> str | None:
    """The source files and the versions of torch that differ, in a sentence."""
    runs = [run for group in groups for run in group.members]
    known = [run for run in runs if run.code]
    files = sorted({file for run in known for file in run.code})
    changed = [file for file in files if len({run.code.get(file) for run in known}) > 1]
    versions = differing_conditions(groups, CODE, lambda group: group.members)
    parts = []
    if 'torch' in versions:
        parts.append(f'torch {_listing(versions["torch"])}')
    if changed:
        more = f' and {len(changed) - 4} more' if len(changed) > 4 else ''
        parts.append(f'the source files {", ".join(changed[:4])}{more}')
    elif 'git_commit' in versions and len(known) < len(runs):
        # An older record does not tell which files its training depended on.
        parts.append(f'git commit {_listing(versions["git_commit"])}')
    return f'The runs used different code: {"; ".join(parts)}.' if parts else None


def _listing(values: Values) -> str:
    return ', '.join(f'{text[:12]} (#{" #".join(map(str, v))})' for text, v in values.items())
