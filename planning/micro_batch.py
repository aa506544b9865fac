"""The settings of a run, with the micro-batch that suits the memory of its GPU."""

from bisect import bisect_left
from dataclasses import replace

import torch

from common import hardware
from data.dataset import TokenDataset
from model_builder import complete
from planning.memory import MemoryEstimator, strategy_label
from training_config import Settings, TrainingConfig, divisors

SIZES = ('batch_size', 'gradient_accumulation_steps')
# Fraction of the memory for a derived micro-batch. The rest is for the CUDA context, NCCL,
# fragmentation, and kernels that need more than is simulated.
USED = 0.8
# Tokens from which a larger micro-batch gains nothing. Each micro-step reads and casts the weights
# and adds their gradients once, 10 to 20 bytes a weight. At 3 to 8 TB/s this takes less than 1 % of
# the time of the 6 · 65,536 FLOPs a weight, at 400 to 1000 TFLOP/s.
MOST_TOKENS = 2**16


def resolve(
    settings: Settings,
    device: torch.device,
    dtype: str,
    dataset: TokenDataset | None,
    memory: float | None,
) -> Settings:
    """`settings.resolve`. On CUDA, if neither batch_size nor gradient_accumulation_steps is set,
    with the largest micro-batch that fits and divides the sequences of an iteration.

    memory: bytes of the device that the run may use, the same on all ranks; None: unknown. Raises
    UserError. Takes a few simulations of a micro-step, about two seconds.
    """
    resolved = settings.resolve(device, dtype, dataset, memory=memory)
    run = settings.run
    is_set = any(run.get(key) is not None for key in SIZES)
    if device.type != 'cuda' or memory is None or is_set or run.eval_only:
        return resolved
    micro_batch = largest_micro_batch(resolved, memory)
    return settings.resolve(device, dtype, dataset, micro_batch, memory)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU for `resolve`; None for devices whose micro-batch is not derived from it."""
    return hardware.total_memory(device) if device.type == 'cuda' else None


def largest_micro_batch(settings: Settings, memory: float) -> tuple[int, str]:
    """The largest micro-batch, in sequences, that fits into `memory` bytes, and the reason.

    settings: resolved, with any micro-batch; the sequences of an iteration are kept.
    """
    run, ranks = settings.run, settings.ranks
    sequences = run.batch_size * run.gradient_accumulation_steps
    settings = replace(settings, architecture=complete(settings.architecture))
    most = max(1, MOST_TOKENS // settings.architecture.block_size)
    sizes = [size for size in divisors(sequences // ranks) if size <= most]
    estimator, label = MemoryEstimator(settings, True, memory), strategy_label(run, ranks)

    def is_too_large(size: int) -> bool:
        steps = {'batch_size': size, 'gradient_accumulation_steps': sequences // size}
        estimator.run = TrainingConfig({**run.to_dict(), **steps}, run.origins, run.dropped)
        strategy = next(each for each in estimator.strategies(ranks) if each.label == label)
        return estimator.peak(strategy, size) > USED * memory

    share = f'{sequences} / {ranks} ranks' if ranks > 1 else f'{sequences}'
    usable = f'{USED:.0%} of {memory / hardware.GB:.0f} GB'.replace('%', ' %')
    if not is_too_large(sizes[-1]):
        limit = f'{MOST_TOKENS:,} tokens' if most < sequences // ranks else usable
        return sizes[-1], f'for cuda: the largest divisor of {share} that fits into {limit}'
    count = bisect_left(sizes, True, hi=len(sizes) - 1, key=is_too_large)
    if count == 0:
        return 1, f'for cuda: not even one sequence fits into {usable}'
    return sizes[count - 1], f'for cuda: the largest divisor of {share} that fits into {usable}'
