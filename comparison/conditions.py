"""Conditions that must agree before losses, or time and memory, are directly comparable."""

from collections.abc import Mapping
from typing import Any

from common.architecture_identity import with_neutral_values
from comparison.record_fields import count
from records import trackers

SEEDS = ('seed', 'data_seed')

# Some affect losses and speed: block_size changes both the context and the cost of a token.
LOSS_CONDITIONS = (
    *('dataset', 'train_sha256', 'val_sha256', 'tokenizer', 'vocab_size', 'model_vocab_size'),
    *('block_size', 'tokens_seen', 'tokens_per_iter', 'data_seed', 'sampling', 'eval_windows'),
    *('max_iters', 'optimizer', 'lr_schedule', 'learning_rate', 'min_lr', 'warmup_iters'),
    *('lr_decay_iters', 'decay_lr', 'weight_decay', 'grad_clip', 'dtype', 'weights_from'),
    'fsdp_param_dtype',
)
# Conditions that affect only the best of several evaluations.
BEST_CONDITIONS = ('eval_interval', 'evaluations')
SPEED_CONDITIONS = (
    *('device', 'device_name', 'threads', 'strategy', 'world_size', 'compile', 'dtype'),
    *('block_size', 'batch_size', 'tokens_per_iter', 'model_vocab_size', 'concurrent_runs'),
    *('peak_tflops', 'profile'),
)
# Reported separately: most code changes do not affect losses.
CODE_CONDITIONS = ('torch', 'git_commit')
FIXED_CONDITIONS = (*LOSS_CONDITIONS, *BEST_CONDITIONS, *SPEED_CONDITIONS, *CODE_CONDITIONS)
# Output folder, logging, profile and concurrent runs: no effect on losses.
REPORTING_OPTIONS = frozenset(
    {
        *('out_dir', 'log_style', 'report', 'log_interval', 'concurrent_runs', *trackers.OPTIONS),
        *('sample_interval', 'sample_prompt', 'sample_tokens', 'profile'),
    }
)
# Options without effect on the trained model. Evaluations draw no random numbers.
MODEL_NEUTRAL_OPTIONS = REPORTING_OPTIONS | {
    *('always_save_checkpoint', 'async_save', 'keep_last', 'keep_best', 'eval_interval'),
    *('diagnostics', 'debug', 'resume_run', 'verify_data', 'distributed_timeout', 'peak_tflops'),
}
# Options that affect speed, and losses only through rounding. `dtype`, `reduce_dtype` and
# `tokens_per_iter` are conditions of their own.
SPEED_OPTIONS = frozenset(
    {
        *('device', 'compile', 'activation_checkpointing', 'deterministic', 'batch_size'),
        *('gradient_accumulation_steps', 'use_fsdp', 'use_zero1', 'fsdp_reshard_after_forward'),
        *('fsdp_shard_size', 'fsdp_reduce_every_micro_step'),
    }
)
# Options that other conditions cover: the values they were resolved to, or their effects.
START_OPTIONS = ('arch_preset', 'like')  # what other options override
RESOLVED_OPTIONS = frozenset({*START_OPTIONS, 'init_from', 'eval_iters', 'eval_only', *SEEDS})


def run_conditions(record: Mapping[str, Any], evaluations: int) -> dict[str, tuple]:
    """The values of each condition, in the order in which the run had them.

    A run that was resumed with other options, hardware or data has several values.
    evaluations: number of validation losses of the run.
    """
    config, metadata, startup = record['config'], record['metadata'], record['startup_info']
    summary = record['summary']
    data, hardware = (startup.get(part) or {} for part in ('data', 'hardware'))
    choices = with_neutral_values(record['architecture'].get('choices') or {})
    # Values resolved for the device and the dataset override the options.
    values = {**config, **metadata, **hardware, **data}
    values['device'] = (
        str(hardware.get('device') or '').split(':')[0] or None
    )  # cuda:0 and cuda:1 are equal
    values['eval_windows'] = (data.get('eval_windows') or {}).get('val')
    values['tokens_seen'] = count(summary, 'total_tokens')
    values['weights_from'] = str((metadata.get('weights_from') or {}).get('source', 'the seed'))
    values['evaluations'] = evaluations
    values['peak_tflops'] = hardware.get('peak_tflops')
    values['torch'] = (metadata.get('versions') or {}).get('torch')
    values.setdefault('concurrent_runs', 1)  # before there were studies
    values.setdefault('profile', 0)  # before there was this option
    values.setdefault('fsdp_param_dtype', 'float32')  # of the other strategies
    values.setdefault('sampling', 'random')  # before there was a choice
    if type(values['concurrent_runs']) is not int:
        raise ValueError(f'concurrent_runs is {values["concurrent_runs"]!r}, not a count')
    # Every other training option is a condition too.
    others = (
        config.keys() - choices.keys() - MODEL_NEUTRAL_OPTIONS - SPEED_OPTIONS - RESOLVED_OPTIONS
    )
    keys = dict.fromkeys((*FIXED_CONDITIONS, *sorted(others)))
    current = {key: values.get(key) for key in keys if key in values or key not in others}
    earlier = earlier_values(record)
    earlier['torch'] = earlier.get('version of torch', [])
    return {key: (*earlier.get(key, ()), value) for key, value in current.items()}


def earlier_values(record: Mapping[str, Any]) -> dict[str, list]:
    """The earlier values of each option or fact that a resume changed."""
    values: dict[str, list] = {}
    for event in record['events']:
        changed = event.get('changed') if event.get('event') == 'resume' else None
        for key, pair in (changed or {}).items():
            if isinstance(pair, list | tuple) and len(pair) == 2:
                values.setdefault(key, []).append(pair[0])
    return values
