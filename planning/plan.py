"""Plan a run: parameters, FLOPs, memory of each strategy, and time.

--plan shows `plan_report(plan_run(settings))` (see `planning.report`). As data:
`plan_run(settings)['memory']['fsdp']['total_gb']`. Neither the device nor the data is needed.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from common import gpu_specs, hardware
from common.errors import UserError
from data.dataset import is_prepared, load_dataset
from model_builder import ASSUMED_VOCABULARY, complete, count_parameters, training_flops
from parallel.strategies import recomputed_blocks
from planning import micro_batch
from planning.memory import FSDPMemory, MemoryEstimator, strategy_label
from records.record_types import FlopsInfo
from training_config import Settings

# Fraction of a GPU's memory; the rest is for the CUDA context, NCCL and fragmentation.
USABLE = 0.9
# Largest micro-batch of a plan, in tokens: ten times what the largest GPU can train on.
LARGEST_MICRO_BATCH = 2**22


def plan_run(settings: Settings) -> dict:
    """The plan as plain values, which `planning.report` shows; sizes in GB of 10⁹ bytes.

    Raises UserError for an unknown GPU, a dtype that it does not support, or a micro-batch that
    fits on no device.
    """
    gpu = gpu_specs.find_gpu(settings.plan.gpu) if settings.plan.gpu else None
    settings, notes = completed_settings(settings, gpu)
    _check_size(settings)
    run, architecture = settings.run, settings.architecture
    gpu_memory = gpu and gpu.memory_gb * hardware.GB
    memory = MemoryEstimator(settings, run.device != 'cpu', gpu_memory)
    model = memory.simulation.model
    recomputed = recomputed_blocks(run.activation_checkpointing, architecture.n_layer)
    flops, counts = training_flops(model, recomputed), count_parameters(model)
    peak, limit = _peak(settings, gpu), gpu_memory and USABLE * gpu_memory
    tokens_per_iter = run.batch_size * run.gradient_accumulation_steps * architecture.block_size
    return {
        'architecture': {'name': architecture.name, 'hash': architecture.hash},
        'model': counts,
        'flops': flops,
        'batch': _batch(settings, tokens_per_iter, counts['total_params']),
        'hardware': _hardware(settings, gpu, peak, limit),
        'chosen': strategy_label(run, settings.ranks),
        'memory': {
            strategy.label: memory.summary(strategy, limit)
            for strategy in memory.strategies(settings.ranks)
        },
        'advice': list(_advice(settings, memory, limit)) if limit else [],
        'time': _time(settings, flops, peak, tokens_per_iter),
        'notes': [*notes, *settings.notes, *_notes(memory, settings)],
        'derived': settings.derived,
    }


def _peak(settings: Settings, gpu: gpu_specs.Gpu | None) -> gpu_specs.Peak:
    """The peak of one device."""
    if settings.run.peak_tflops is not None:
        return gpu_specs.Peak(settings.run.peak_tflops, '--peak_tflops', measured=False)
    if gpu is None:
        return gpu_specs.Peak(None, 'pass --gpu', measured=False)
    return gpu.peak(settings.run.dtype)


def _batch(settings: Settings, tokens_per_iter: int, total_params: int) -> dict:
    run = settings.run
    return {
        'batch_size': run.batch_size,
        'gradient_accumulation_steps': run.gradient_accumulation_steps,
        'block_size': settings.architecture.block_size,
        'tokens_per_iter': tokens_per_iter,
        'micro_steps_per_rank': run.gradient_accumulation_steps // settings.ranks,
        'max_iters': run.max_iters,
        'tokens': tokens_per_iter * run.max_iters,
        'tokens_per_parameter': tokens_per_iter * run.max_iters / total_params,
    }


def _hardware(
    settings: Settings, gpu: gpu_specs.Gpu | None, peak: gpu_specs.Peak, limit: float | None
) -> dict:
    run = settings.run
    return {
        'device': gpu.name if gpu else run.device,
        'world_size': settings.ranks,
        'dtype': run.dtype,
        'activation_checkpointing': run.activation_checkpointing,
        'memory_gb': gpu and gpu.memory_gb,
        'memory_source': gpu and gpu.memory_source,
        'usable_gb': limit and limit / hardware.GB,
        'peak_tflops': peak.tflops and peak.tflops * settings.ranks,
        'peak_source': peak.source,
    }


def _check_size(settings: Settings) -> None:
    """Raise UserError for a micro-batch that fits on no device and takes minutes to simulate."""
    tokens = settings.run.batch_size * settings.architecture.block_size
    if tokens > LARGEST_MICRO_BATCH:
        raise UserError(
            f'batch_size={settings.run.batch_size:,} × block_size='
            f'{settings.architecture.block_size:,} are {tokens:,} tokens in a micro-batch; a plan '
            f'supports at most {LARGEST_MICRO_BATCH:,}. Lower batch_size.'
        )


def completed_settings(settings: Settings, gpu: gpu_specs.Gpu | None) -> tuple[Settings, list[str]]:
    """The settings, resolved for the planned device and the data; and notes on assumptions."""
    run, notes = settings.run, []
    if gpu:
        if run.device != 'auto' and not run.device.startswith('cuda'):
            raise UserError(
                f'gpu={settings.plan.gpu!r} contradicts device={run.device!r}. Remove one of them.'
            )
        device, dtype = torch.device('cuda'), gpu.resolve_dtype(run.dtype)
    elif run.device.startswith('cuda'):
        device, dtype = torch.device('cuda'), 'bfloat16' if run.dtype == 'auto' else run.dtype
    else:
        device = hardware.select_device(run.device)
        dtype = hardware.resolve_dtype(run.dtype, device)
    try:
        prepared = is_prepared(run.dataset)
    except UserError:  # the data may be on another machine
        prepared = False
    block_size = settings.architecture.block_size
    dataset = load_dataset(run.dataset, block_size) if prepared else None
    memory: float | None = None
    if gpu:
        memory = gpu.memory_gb * hardware.GB
    elif torch.cuda.is_available():
        memory = micro_batch.device_memory(device)
    settings = micro_batch.resolve(settings, device, dtype, dataset, memory)
    if settings.architecture.vocab_size is None:
        notes.append(
            f"The vocabulary is assumed to be GPT-2's ({ASSUMED_VOCABULARY:,}), since the dataset "
            f'{run.dataset!r} is not prepared here; --vocab_size sets it.'
        )
    return replace(settings, architecture=complete(settings.architecture)), notes


def _advice(settings: Settings, memory: MemoryEstimator, limit: float) -> Iterator[str]:
    """Options to try if nothing fits, with the memory that each needs."""
    run, ranks = settings.run, settings.ranks
    sequences = run.batch_size * run.gradient_accumulation_steps

    def leanest(batch_size: int, checkpointing: str, ranks: int) -> tuple[float, str]:
        peaks = [
            (memory.peak(strategy, batch_size, checkpointing), strategy.label)
            for strategy in memory.strategies(ranks)
        ]
        return min(peaks)

    def sentence(options: str, batch_size: int, checkpointing: str, ranks: int) -> str:
        total, label = leanest(batch_size, checkpointing, ranks)
        verdict = 'fits' if total <= limit else 'does not fit'
        return f'{options}: {label} takes {total / hardware.GB:.1f} GB, which {verdict}.'

    def smaller_batch(checkpointing: str) -> tuple[str, int] | None:
        largest = max(
            memory.largest_batch(strategy, limit, checkpointing)
            for strategy in memory.strategies(ranks)
        )
        if not 0 < largest < run.batch_size:
            return None
        steps = -(-sequences // (largest * ranks)) * ranks
        return f'--batch_size={largest} --gradient_accumulation_steps={steps}', largest

    checkpointing = run.activation_checkpointing
    if leanest(run.batch_size, checkpointing, ranks)[0] <= limit:
        return
    # A smaller micro-batch, activation checkpointing, or both.
    if batch := smaller_batch(checkpointing):
        yield sentence(*batch, checkpointing, ranks)
    if checkpointing != 'full':
        options = '--activation_checkpointing=full'
        yield sentence(options, run.batch_size, 'full', ranks)
        fits = leanest(run.batch_size, 'full', ranks)[0] <= limit
        if not fits and (batch := smaller_batch('full')):
            batch_options, batch_size = batch
            yield sentence(f'{options} {batch_options}', batch_size, 'full', ranks)
    # More devices.
    for more in (ranks * 2**power for power in range(1, 12)):
        if memory.peak(FSDPMemory(memory.units, run, more), run.batch_size) <= limit:
            yield sentence(f'--world_size={more}', run.batch_size, checkpointing, more)
            return
    yield 'More devices alone do not help: the micro-batch itself is too large.'


def _notes(memory: MemoryEstimator, settings: Settings) -> Iterator[str]:
    """Notes on the figures."""
    run, ranks = settings.run, settings.ranks
    steps = run.gradient_accumulation_steps // ranks
    if ranks > 1 and steps > 1:
        fsdp = FSDPMemory(memory.units, run, ranks)
        shard = f'{fsdp.parameter_bytes / hardware.GB:.1f} GB'
        yield (
            f'FSDP keeps {shard} of gradients, since it reduces them in every micro-step.'
            if fsdp.accumulates_shards
            else f'While gradients accumulate over {steps} micro-batches per device, FSDP keeps '
            f'them unsharded. With --fsdp_reduce_every_micro_step=True it would keep {shard}.'
        )
    if run.compile:
        yield 'Memory of the blocks is estimated without torch.compile, which often needs less.'


def _time(
    settings: Settings, flops: FlopsInfo, peak: gpu_specs.Peak, tokens_per_iter: int
) -> dict | None:
    """The time of the run on all devices at the given MFU; None without a peak."""
    if peak.tflops is None:
        return None
    rate = settings.ranks * peak.tflops * 1e12 * settings.plan.plan_mfu / flops['per_token']
    per_iter = tokens_per_iter / rate
    return {
        'mfu': settings.plan.plan_mfu,
        'tokens_per_sec': rate,
        'seconds_per_iter': per_iter,
        'seconds': per_iter * settings.run.max_iters,
        'device_hours': per_iter * settings.run.max_iters * settings.ranks / 3600,
    }
