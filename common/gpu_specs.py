"""Published peaks and memory sizes of GPUs, by the name that the driver reports.

Peaks are dense (no sparsity), for one device, in TFLOP/s. A GPU whose exact name is not in the
table has no peak: a wrong peak would make every MFU wrong. Sizes are in GB of 10⁹ bytes.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from common.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Peak:
    """Dense peak of one device in TFLOP/s (None if unknown), and the source of the figure."""

    tflops: float | None
    source: str
    measured: bool


_COMPOSER = 'mosaicml/composer, speed_monitor'
_STAS = 'stas00/ml-engineering'
_HOPPER = f'{_COMPOSER}; {_STAS}'
_LLM_C = 'karpathy/llm.c, mfu.h'
_NANOCHAT = 'karpathy/nanochat, common.py'
_TITAN = 'pytorch/torchtitan, tools/utils.py'
_HGX = 'NVIDIA HGX table, 36 PFLOP/s sparse / 2 / 8 GPUs'

_COLUMNS = ('bf16', 'fp16', 'tf32', 'fp32', 'fp8')
# The hardware does not support the format. (None: there is no source for a figure.)
_NEVER = 0.0

# Peaks of matrix multiplications (where a vendor gives a vector and a matrix peak, the latter). The
# driver's name without vendor, brand and memory size must equal a name here: any other suffix
# (Laptop GPU, MIG 1g.10gb, D, Ti, a vGPU profile) makes it another device.
# fmt: off
_PEAKS = (
    # names                                    bf16   fp16   tf32   fp32   fp8   source
    (('V100 SXM2', 'V100 SXM3'),              (_NEVER, 125,  _NEVER, 15.7, None), _COMPOSER),
    (('V100 PCIE',),                          (_NEVER, 112,  _NEVER, 14,   None), _COMPOSER),
    (('T4',),                                 (_NEVER, 65,   _NEVER, 8.1,  None), _COMPOSER),
    (('A10',),                                (125,   125,   62.5,  31.2,  None), _COMPOSER),
    (('A30',),                                (165,   165,   82,    10.3,  None),
     f'{_NANOCHAT}; NVIDIA data sheet'),
    (('A40',),                                (149.7, 149.7, 74.8,  37.4,  None),
     f'{_NANOCHAT}; NVIDIA data sheet'),
    (('A100 SXM4', 'A100 PCIE'),              (312,   312,   156,   19.5,  None),
     'NVIDIA data sheet'),
    (('RTX A6000',),                          (154.8, 154.8, 77.4,  38.7,  None),
     f'{_TITAN}; NVIDIA GA102 white paper'),
    (('L4',),                                 (121,   121,   60,    30.3,  242),
     f'{_NANOCHAT}; NVIDIA data sheet'),
    (('L40S',),                               (362,   362,   183,   91.6,  733), _STAS),
    (('RTX 3090',),                           (71,    71,    35.6,  35.6,  None), _LLM_C),
    (('RTX 4090',),                           (165.2, 165.2, 82.6,  82.6,  330.3), _LLM_C),
    (('RTX 5090',),                           (209.5, 209.5, 104.8, 104.8, 419),
     'NVIDIA Blackwell white paper'),
    # The driver calls the SXM boards plain "H100 80GB HBM3", "H200" and "H800".
    (('H100', 'H200', 'GH200', 'H800'),       (989,   989,   494.5, 67,    1979), _HOPPER),
    (('H100 PCIE',),                          (756,   756,   378,   51,    1513), _HOPPER),
    (('H100 NVL',),                           (835,   835,   417.5, 60,    None),
     f'{_TITAN}; NVIDIA data sheet, sparse / 2'),
    (('H200 NVL',),                           (836,   836,   417.5, 60,    None),
     f'{_NANOCHAT}; NVIDIA data sheet, sparse / 2'),
    (('H20',),                                (148,   148,   74,    44,    None),
     f'{_TITAN}; NVIDIA data sheet'),
    (('B200', 'B300', 'B300 SXM6 AC'),        (2250,  2250,  1125,  75,    4500), _HGX),
    (('GB200',),                              (2500,  2500,  1250,  80,    5000),
     'NVIDIA GB200 NVL72 table'),
    (('GB300',),                              (2500,  2500,  None,  None,  None), _TITAN),
    # torch sees each of the two dies as a device: half of 383 and of 95.7 (vectors: of 47.9).
    (('MI250X',),                             (191.5, 191.5, _NEVER, 47.85, None),
     f'{_STAS}; AMD data sheet, one of two dies'),
    (('MI300X',),                             (1307,  1307,  653.7, 163.4, 2615),
     f'{_NANOCHAT}; AMD data sheet'),
    (('MI325X',),                             (1307,  1307,  None,  None,  None), _NANOCHAT),
    (('MI355X',),                             (2500,  2500,  None,  None,  None), _TITAN),
)
# fmt: on
_BY_NAME = {name: (peaks, source) for names, peaks, source in _PEAKS for name in names}
_MAKER_OR_MEMORY = re.compile(r'NVIDIA|TESLA|GEFORCE|AMD|INSTINCT|OAM|\d+GB?|HBM3E?')

# Memory of one device in GB, from the vendor's data sheet; every size that was sold. Most sheets
# mean 2^30 bytes: 10^9 is conservative.
# fmt: off
_MEMORIES = (
    (('V100 SXM2', 'V100 PCIE'),              (16, 32),   'NVIDIA V100 data sheet'),
    (('V100 SXM3',),                          (32,),      'NVIDIA DGX-2 data sheet'),
    (('T4',),                                 (16,),      'NVIDIA T4 data sheet'),
    (('A10', 'A30', 'L4'),                    (24,),      'NVIDIA A10, A30, L4 data sheets'),
    (('A40', 'RTX A6000', 'L40S'),            (48,),      'NVIDIA A40, A6000, L40S data sheets'),
    (('A100 SXM4', 'A100 PCIE'),              (40, 80),   'NVIDIA A100 data sheet'),
    (('RTX 3090', 'RTX 4090'),                (24,),      'NVIDIA GeForce specifications'),
    (('RTX 5090',),                           (32,),      'NVIDIA GeForce specifications'),
    (('H100', 'H100 PCIE', 'H800'),           (80,),      'NVIDIA H100 data sheet'),
    (('H100 NVL',),                           (94,),      'NVIDIA H100 data sheet'),
    (('H200', 'H200 NVL'),                    (141,),     'NVIDIA H200 data sheet'),
    (('GH200',),                              (96, 144),  'NVIDIA GH200 data sheet'),
    (('H20',),                                (96, 141),  'NVIDIA H20 data sheet'),
    (('B200',),                               (180,),     'NVIDIA HGX table, 1.4 TB / 8 GPUs'),
    (('B300', 'B300 SXM6 AC'),                (270,),     'NVIDIA HGX table, 2.1 TB / 8 GPUs'),
    (('GB200',),                              (186,),     'NVIDIA NVL72 table, 13.4 TB / 72 GPUs'),
    (('GB300',),                              (278,),     'NVIDIA NVL72 table, 20 TB / 72 GPUs'),
    (('MI250X',),                             (64,),      'AMD data sheet, one of two dies'),
    (('MI300X',),                             (192,),     'AMD data sheet'),
    (('MI325X',),                             (256,),     'AMD data sheet'),
    (('MI355X',),                             (288,),     'AMD data sheet'),
)
# fmt: on
_MEMORY_OF = {name: (sizes, source) for names, sizes, source in _MEMORIES for name in names}


class Gpu(NamedTuple):
    """A GPU that need not be in this machine: its name in the tables, and its memory."""

    name: str
    memory_gb: int
    memory_source: str

    def peak(self, dtype: str) -> Peak:
        """The peak of matrix multiplications in `dtype`, with TF32 for float32 if it has it."""
        return peak_of_products(self.name, dtype, tf32=True)

    def resolve_dtype(self, name: str) -> str:
        """`hardware.resolve_dtype` for this GPU. Raises UserError."""
        native = _multiplies(self.name, 'bf16')
        if name == 'bfloat16' and not native:
            raise UserError(
                f"dtype='bfloat16': {self.name} has no bfloat16 hardware: use --dtype=float16 or "
                f'--dtype=float32.'
            )
        return name if name != 'auto' else 'bfloat16' if native else 'float16'


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`, which has the memory size if there are several.

    For example 'B200', 'a100-80gb' or a driver's 'NVIDIA A100-SXM4-80GB'. Raises UserError if the
    name is unknown or ambiguous.
    """
    words = [w for w in re.split(r'[\s_-]+', name.upper()) if w]
    sizes_in_name = [int(w.rstrip('GB')) for w in words if re.fullmatch(r'\d+GB', w)]
    model_name = ''.join(word for word in words if not _MAKER_OR_MEMORY.fullmatch(word))
    family = [known for known in _MEMORY_OF if model_name and known.split()[0] == model_name]
    matches = [known for known in _MEMORY_OF if model_name == known.replace(' ', '')] or family

    def full_names(known: str) -> list[str]:
        sizes, typed = _MEMORY_OF[known][0], known.replace(' ', '-')
        return [f'{typed}-{size}GB' for size in sizes] if len(sizes) > 1 else [typed]

    if not matches:
        known = [full for one in _MEMORY_OF for full in full_names(one)]
        hint = did_you_mean(name, known)
        raise UserError(f'gpu={name!r} is unknown.{hint} Known GPUs: {", ".join(known)}.')
    if len({(_BY_NAME[known], _MEMORY_OF[known]) for known in matches}) > 1:
        choices = ', '.join(full for one in matches for full in full_names(one))
        raise UserError(f'gpu={name!r} is ambiguous: use one of {choices}.')
    sizes, source = _MEMORY_OF[matches[0]]
    fitting = [size for size in sizes if not sizes_in_name or size in sizes_in_name]
    if len(fitting) != 1:
        start = name if not sizes_in_name else matches[0].replace(' ', '-')
        choices = ' or '.join(f'--gpu={start}-{size}GB' for size in sizes)
        raise UserError(
            f'gpu={name!r} has {" or ".join(map(str, sizes))} GB. Use '
            f'{choices if len(sizes) > 1 else f"--gpu={start}"}.'
        )
    return Gpu(matches[0], fitting[0], source)


def peak_for_name(name: str, column: str) -> tuple[float, str] | None:
    """(TFLOP/s, source) of the device with the driver's name `name`, or None if unknown.

    `column` is 'bf16', 'fp16', 'tf32', 'fp32' or 'fp8'.
    """
    peaks, source = _row(name)
    value = peaks.get(column)
    return (value, source) if value else None


def peak_of_products(name: str, dtype: str, tf32: bool) -> Peak:
    """The matrix multiplication peak in `dtype` of the device with the driver's name `name`.

    tf32: whether torch may use TF32 for float32. A device without TF32 multiplies in float32.
    """
    float32 = 'tf32' if tf32 and _multiplies(name, 'tf32') else 'fp32'
    column = {'bfloat16': 'bf16', 'float16': 'fp16', 'float32': float32}[dtype]
    if peak := peak_for_name(name, column):
        value, source = peak
        return Peak(value, f'{name}, dense {column}: {source}', measured=False)
    return Peak(None, f'the {column} peak of {name} is unknown; set --peak_tflops', measured=False)


def _multiplies(name: str, column: str) -> bool:
    """Whether the hardware supports the format, as far as is known."""
    return _row(name)[0].get(column) != _NEVER


def _row(name: str) -> tuple[dict[str, float | None], str]:
    words = re.split(r'[\s-]+', name.upper())
    model_name = ' '.join(word for word in words if not _MAKER_OR_MEMORY.fullmatch(word))
    peaks, source = _BY_NAME.get(model_name, ((), ''))
    return dict(zip(_COLUMNS, peaks)), source
