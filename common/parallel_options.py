"""Options of distributed training, and the values that are derived for FSDP."""

from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from common.registry import Option, at_least

# fmt: off
PARALLEL_OPTIONS = {
    'use_fsdp': Option(bool, False, 'Shard parameters, gradients and optimizer state (FSDP2)'),
    'use_zero1': Option(bool, False, 'Shard the optimizer state (ZeRO-1); without this and '
                        'use_fsdp: DDP'),
    'fsdp_param_dtype': Option(str | None, None, 'Dtype in which FSDP gathers the parameters that '
                               'autocast converts (others: float32); None: bfloat16 on CUDA with '
                               'dtype=bfloat16, else float32',
                               choices=('float32', 'bfloat16'), requires=('use_fsdp', True)),
    'fsdp_reshard_after_forward': Option(bool, True, 'Free gathered blocks between forward and '
                                         'backward pass: less memory, more communication',
                                         requires=('use_fsdp', True)),
    'fsdp_reduce_every_micro_step': Option(bool | None, None, 'Reduce the gradients in every '
                                           'micro-step: less memory, more communication; None: '
                                           'depends on the size of the model and of the memory',
                                           requires=('use_fsdp', True)),
    'fsdp_shard_size': Option(int | None, None, 'Processes per shard group (HSDP); None: all',
                              check=at_least(1), requires=('use_fsdp', True)),
    'reduce_dtype': Option(str, 'float32', 'Dtype of the gradient all-reduce / reduce-scatter',
                           choices=('float32', 'bfloat16')),
    'distributed_timeout': Option(int, 600, 'Seconds without an answer before a process counts as '
                                  'lost', check=at_least(1, at_most=10**7)),
}
# fmt: on

# Fraction of a device's memory from which gradients are reduced in every micro-step rather than
# accumulated unsharded. Models so large compute long enough to hide the traffic.
ACCUMULATED_SHARE = 0.1


def derived_fsdp_options(
    run: Mapping[str, Any], device: str, ranks: int, elements: int, memory: float | None
) -> dict[str, tuple[Any, str]]:
    """FSDP's options that depend on the device and the model, each with the reason.

    run: the options, of which dtype and the sizes are resolved. device: its kind. elements: number
    of parameters. memory: bytes of the device; None: unknown. Raises UserError if fsdp_param_dtype
    is set to a dtype that does not suit `dtype`.
    """
    dtype = run['dtype']
    if run.get('fsdp_param_dtype') == 'bfloat16' != dtype:
        raise UserError(
            f"fsdp_param_dtype='bfloat16' needs dtype='bfloat16', but this run multiplies in "
            f'{dtype}. Set --dtype=bfloat16 or --fsdp_param_dtype=float32.'
        )
    in_bfloat16 = device == 'cuda' and dtype == 'bfloat16'
    micro_steps = run['gradient_accumulation_steps'] // ranks
    return {
        'fsdp_param_dtype': (
            'bfloat16' if in_bfloat16 else 'float32',
            f'for {device} and dtype={dtype}',
        ),
        'fsdp_reduce_every_micro_step': _derived_reduction(
            device, micro_steps, elements * (2 if run['reduce_dtype'] == 'bfloat16' else 4), memory
        ),
    }


def _derived_reduction(
    device: str, micro_steps: int, gradient_bytes: int, memory: float | None
) -> tuple[bool, str]:
    if device == 'cpu' or memory is None:
        return False, f'for {device}' if device == 'cpu' else 'the size of the memory is unknown'
    if micro_steps == 1:
        return False, 'a rank has one micro-step'
    share = gradient_bytes / memory
    return share > ACCUMULATED_SHARE, (
        f'whole gradients would take {share:.1%} of the memory; True from {ACCUMULATED_SHARE:.0%}'
    )
