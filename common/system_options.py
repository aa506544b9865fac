"""Options of a run that choose the device, the precision and the way of computing."""

from common.registry import Option, above


def is_activation_checkpointing(value: str) -> bool:
    return value in ('none', 'full') or (value.isdecimal() and int(value) >= 1)


# fmt: off
SYSTEM_OPTIONS = {
    'device': Option(str, 'auto', 'Device: auto, cpu, cuda, cuda:N or mps'),
    'dtype': Option(str, 'auto', 'Dtype of matrix multiplications (autocast); float16 trains with '
                    'a gradient scaler', choices=('auto', 'float32', 'bfloat16', 'float16')),
    'compile': Option(bool | None, None, 'Compile each block with torch.compile; None: on '
                      'CUDA or a CPU, if the run is long enough to benefit'),
    'activation_checkpointing': Option(str, 'none', 'Blocks whose activations are recomputed in '
                                       'the backward pass to save memory: none, full (all), or N '
                                       '(every N-th block)',
                                       check=(is_activation_checkpointing,
                                              'none, full or a whole number of at least 1')),
    'deterministic': Option(bool, False, 'Use deterministic kernels only (slower on a GPU)'),
    'peak_tflops': Option(float | None, None, 'Peak TFLOPS of one device, for MFU; None: from the '
                          'list of known GPUs, or measured', check=above(0)),
}
# fmt: on
