"""What must agree for losses, or for time and memory, to speak of the architecture alone."""

from collections.abc import Mapping
from typing import Any

from records import trackers

SEEDS = ('seed', 'data_seed')

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
CODE_CONDITIONS = (
    'torch',
    'git_commit',
)  # told apart from options: most changes of code change no losses
FIXED_CONDITIONS = (*LOSS_CONDITIONS, *BEST_CONDITIONS, *SPEED_CONDITIONS, *CODE_CONDITIONS)
# Where a run is kept, how it reports, what ran beside it; nothing that its losses depend on.
REPORTING_OPTIONS = frozenset(
    {
        *('out_dir', 'log_style', 'log_interval', 'concurrent_runs', *trackers.OPTIONS),
        *('sample_interval', 'sample_prompt', 'sample_tokens'),
    }
)
# Neither does the trained model depend on these. Evaluations draw no random numbers.
MODEL_NEUTRAL_OPTIONS = REPORTING_OPTIONS | {
    *('always_save_checkpoint', 'async_save', 'keep_last', 'keep_best', 'eval_interval'),
    *('diagnostics', 'debug', 'resume_run', 'verify_data', 'distributed_timeout', 'peak_tflops'),
}
# Options that change the speed, and the losses by rounding alone. `dtype`, `reduce_dtype` and
# `tokens_per_iter` say what does change them.
SPEED_OPTIONS = frozenset(
    {
        *('device', 'compile', 'activation_checkpointing', 'deterministic', 'batch_size'),
        *('gradient_accumulation_steps', 'use_fsdp', 'use_zero1', 'fsdp_reshard_after_forward'),
        'fsdp_shard_size',
    }
)
# Options for which other conditions stand: what they were resolved to, or what they led to.
RESOLVED_OPTIONS = frozenset({'init_from', 'arch_preset', 'eval_iters', 'eval_only', *SEEDS})


def run_conditions(record: Mapping[str, Any], evaluations: int) -> dict[str, tuple]:
    """The values of all conditions, each in the order in which the run had them.

    A run that was resumed with other options, on another machine or on other data has several
    values. evaluations: how many validation losses the run has.
    """
    config, metadata, startup = record['config'], record['metadata'], record['startup_info']
    summary = record['summary']
    data, hardware = (startup.get(part) or {} for part in ('data', 'hardware'))
    choices = record['architecture'].get('choices') or {}
    # What was resolved for this machine and this dataset stands above what was set.
    values = {**config, **metadata, **hardware, **data}
    values['device'] = str(hardware.get('device') or '').split(':')[0] or None  # any cuda:N alike
    values['eval_windows'] = (data.get('eval_windows') or {}).get('val')
    values['tokens_seen'] = summary.get('total_tokens')
    values['weights_from'] = str((metadata.get('weights_from') or {}).get('source', 'the seed'))
    values['evaluations'] = evaluations
    values['peak_tflops'] = hardware.get('peak_tflops')
    values['torch'] = (metadata.get('versions') or {}).get('torch')
    values.setdefault('concurrent_runs', 1)  # before there were studies
    values.setdefault('sampling', 'random')  # before there was a choice
    if type(values['concurrent_runs']) is not int:
        raise ValueError(f'concurrent_runs is {values["concurrent_runs"]!r}, not a count')
    # Every other option of training is a condition too.
    others = (
        config.keys() - choices.keys() - MODEL_NEUTRAL_OPTIONS - SPEED_OPTIONS - RESOLVED_OPTIONS
    )
    keys = dict.fromkeys((*FIXED_CONDITIONS, *sorted(others)))
    current = {key: values.get(key) for key in keys if key in values or key not in others}
    earlier = earlier_values(record)
    earlier['torch'] = earlier.get('version of torch', [])
    return {key: (*earlier.get(key, ()), value) for key, value in current.items()}


def earlier_values(record: Mapping[str, Any]) -> dict[str, list]:
    """What each option and fact was before the resumes that changed it."""
    values: dict[str, list] = {}
    for event in record['events']:
        changed = event.get('changed') if event.get('event') == 'resume' else None
        for key, pair in (changed or {}).items():
            if isinstance(pair, list | tuple) and len(pair) == 2:
                values.setdefault(key, []).append(pair[0])
    return values
