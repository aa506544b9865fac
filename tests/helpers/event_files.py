"""The event files in a run folder, read by TensorBoard, against the record."""

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Number in a record's entry -> name in the dashboard; None: left out on purpose.
ITERATION = {
    'loss': 'train/loss',
    'lr': 'train/lr',
    'time_ms': 'perf/iter_ms',
    'tokens_per_sec': 'perf/tokens_per_second',
    'tokens_seen': 'data/tokens',
    'loss_scale': 'train/loss_scale',
    'steps': None,
    'epochs': None,  # evaluations have both
    'unique_tokens': None,
    'mfu.mfu_percent': 'perf/mfu',
    'mfu.mfu_causal_percent': 'perf/mfu_causal',
    'mfu.hfu_percent': 'perf/hfu',
    'mfu.achieved_tflops': 'perf/achieved_tflops',
    'mfu.hardware_peak_tflops': None,
    'mfu.flops_per_token': None,
    'memory.allocated_gb': 'memory/allocated_gb',
    'memory.peak_gb': 'memory/peak_gb',
    'memory.reserved_gb': 'memory/reserved_gb',
    'memory.reserved_peak_gb': 'memory/reserved_peak_gb',
    'memory.allocator_retries': 'memory/allocator_retries',
    'memory.rss_gb': 'memory/rss_gb',
    'gradients.norm': 'train/grad_norm',
    'gradients.mean': 'train/grad_mean',
    'gradients.std': 'train/grad_std',
}
EVALUATION = {
    'train_loss': 'val/train_loss',
    'val_loss': 'val/loss',
    'val_bits_per_byte': 'val/bits_per_byte',
    'epochs': 'data/epochs',
    'unique_tokens': 'data/unique_tokens',
    'tokens_seen': None,  # iterations have it
    'time_ms': 'perf/evaluation_ms',
    'lr': None,
    'train_seconds': None,
    'data_hash': None,
    'sample.time_ms': None,
}


def shown_of(record: dict) -> dict[str, dict[int, float]]:
    """Name -> step -> value: every number of a record's iterations and evaluations."""
    shown: dict[str, dict[int, float]] = {}

    def show(name, step, value):
        if name is not None and value is not None:
            assert step not in shown.setdefault(name, {})
            shown[name][step] = value

    for entry in record['training_iterations']:
        for path, value in numbers(entry):
            group, _, reading = path.partition('.')
            name = f'readings/{reading}' if group == 'readings' else ITERATION[path]
            show(name, entry['iter'], value)
    for entry in record['eval_steps']:
        details = entry.get('diagnostics', {})
        for path, value in numbers({k: v for k, v in entry.items() if k != 'diagnostics'}):
            show(EVALUATION[path], entry['iter'], value)
        for row in details.get('layers', ()):
            for key in ('activation_rms', 'gradient_norm', 'max_attention_logit'):
                show(f'layers/{key}/{row["layer"]:02}', entry['iter'], row[key])
        for group, ratio in details.get('update_to_weight', {}).items():
            show(f'update_to_weight/{group}', entry['iter'], ratio)
        for span in details.get('val_loss_by_position', ()):
            show(f'val_loss_by_position/{span["from"]:05}', entry['iter'], span['loss'])
    return shown


def numbers(entry: dict, prefix: str = ''):
    """All numbers of an entry except the step, such as ('mfu.mfu_percent', 12.3)."""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from numbers(value, f'{prefix}{key}.')
        elif not isinstance(value, str) and prefix + key != 'iter':
            yield prefix + key, value


def read(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={'scalars': 0, 'tensors': 0}).Reload()


def assert_holds(folder, record: dict) -> None:
    """The event files show each number of the record at its step, once, and nothing else."""
    reader, shown = read(folder), shown_of(record)
    assert set(reader.Tags()['scalars']) == set(shown)
    for name, values in shown.items():
        events = reader.Scalars(name)
        assert [event.step for event in events] == list(values), name
        # TensorBoard stores single precision.
        assert [event.value for event in events] == [
            float(np.float32(value)) for value in values.values()
        ], name
