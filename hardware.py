"""Devices: which one to use, how fast it is at best, what memory is in use, which dtypes it runs.

Peaks are dense (no sparsity), for one device, in TFLOP/s. A device that is not known by its exact
name has no peak: a wrong peak would make every MFU derived from it wrong. Sizes are in GB of 10⁹
bytes. Nothing here knows about models.
"""

import contextlib
import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy
import psutil
import torch
from torch._functorch import config as functorch_config

from errors import UserError, nearest

try:
    import resource
except ImportError:  # Windows
    resource = None

GB = 1e9
DTYPES = ('float32', 'bfloat16', 'float16')


# --- Devices --------------------------------------------------------------------------------------


def select_device(name: str) -> torch.device:
    """The device called `name`: 'auto' (CUDA, else MPS, else CPU), 'cuda', 'cuda:1', 'mps', 'cpu'.

    A process started by torchrun takes the CUDA device of its LOCAL_RANK for 'auto' and 'cuda'.
    Raises UserError for a name that is unknown or not available on this machine.
    """
    cuda_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = [f'cuda:{index}' for index in range(cuda_count)]
    available += ['mps'] * torch.backends.mps.is_available() + ['cpu']

    chosen = available[0] if name == 'auto' else name
    if name == 'cuda' or (name == 'auto' and cuda_count):
        chosen = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    if chosen in available:
        return torch.device(chosen)

    if cuda_count and 'LOCAL_RANK' in os.environ and name in ('auto', 'cuda'):
        raise UserError(
            f'device={name!r}: this process needs {chosen} (LOCAL_RANK) and the machine has '
            f'{cuda_count} CUDA device(s). Start at most {cuda_count} processes '
            f'(torchrun --nproc-per-node={cuda_count}) or use --device=cpu.'
        )
    built_without = name.startswith('cuda') and not torch.backends.cuda.is_built()
    why = f' (torch {torch.__version__} is built without CUDA)' if built_without else ''
    raise UserError(
        f'device={name!r} is not available here{why}: use one of auto, {", ".join(available)}.'
    )


def device_name(device: torch.device) -> str:
    """The name that the driver gives the device; for a CPU its model and number of cores."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    cpu = _cpu_model()
    if device.type == 'mps':
        return f'{cpu} GPU'
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    return f'{cpu}, {cores} core{"s" if cores != 1 else ""}'


def _cpu_model() -> str:
    reported = torch.cpu.get_capabilities().get('cpu_name')
    return reported or platform.processor() or platform.machine() or 'unknown CPU'


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on the device is done, so that the clock can be read."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


# --- Precision ------------------------------------------------------------------------------------


def resolve_dtype(name: str, device: torch.device) -> str:
    """The dtype of matrix multiplications: `name`, or for 'auto' the fastest that trains well.

    'auto' is bfloat16 where the hardware multiplies it natively, else float16 on CUDA and float32
    elsewhere. Raises UserError for an unknown dtype and for bfloat16 on a GPU without it.
    """
    if name != 'auto' and name not in DTYPES:
        allowed = ('auto', *DTYPES)
        raise UserError(
            f'dtype={name!r} is unknown: use one of {", ".join(allowed)}.{nearest(name, allowed)}'
        )
    if device.type == 'cuda':
        # Older GPUs only emulate bfloat16. AMD's Instinct cards report 9 and have it.
        native = torch.cuda.get_device_capability(device)[0] >= 8
        if name == 'bfloat16' and not native:
            raise UserError(
                f"dtype='bfloat16': {device_name(device)} has no bfloat16 hardware: "
                'use --dtype=float16 or --dtype=float32.'
            )
        fallback = 'float16'
    else:
        capabilities = torch.cpu.get_capabilities()
        native = device.type == 'cpu' and any(
            capabilities.get(feature) for feature in ('amx_bf16', 'avx512_bf16', 'sve_bf16')
        )
        fallback = 'float32'
    if name != 'auto':
        return name
    return 'bfloat16' if native else fallback


# --- Peak throughput ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """Dense peak of one device in TFLOP/s, None where unknown, and where the figure is from."""

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

# What is left of a driver's name without maker, brand and memory size must equal a name here: any
# other suffix (Laptop GPU, MIG 1g.10gb, D, Ti, a vGPU profile) makes it another device.
# fmt: off
_PEAKS = (
    # names                                    bf16   fp16   tf32   fp32   fp8   source
    (('V100 SXM2', 'V100 SXM3'),              (None,  125,   None,  15.7,  None), _COMPOSER),
    (('V100 PCIE',),                          (None,  112,   None,  14,    None), _COMPOSER),
    (('T4',),                                 (None,  65,    None,  8.1,   None), _COMPOSER),
    (('A10',),                                (125,   125,   62.5,  31.2,  None), _COMPOSER),
    (('A30',),                                (165,   165,   None,  None,  None), _NANOCHAT),
    (('A40',),                                (149.7, 149.7, None,  None,  None), _NANOCHAT),
    (('A100 SXM4', 'A100 PCIE'),              (312,   312,   156,   19.5,  None),
     'NVIDIA data sheet'),
    (('RTX A6000',),                          (154.8, 154.8, None,  38.7,  None), _TITAN),
    (('L4',),                                 (121,   121,   None,  30.3,  242),
     f'{_NANOCHAT}; NVIDIA data sheet'),
    (('L40S',),                               (362,   362,   183,   91.6,  733), _STAS),
    (('RTX 3090',),                           (71,    71,    35.6,  35.6,  None), _LLM_C),
    (('RTX 4090',),                           (165.2, 165.2, 82.6,  82.6,  330.3), _LLM_C),
    (('RTX 5090',),                           (209.5, 209.5, 104.8, 104.8, 419),
     'NVIDIA Blackwell white paper'),
    # The driver calls the SXM boards plain "H100 80GB HBM3", "H200" and "H800".
    (('H100', 'H200', 'GH200', 'H800'),       (989,   989,   494.5, 67,    1979), _HOPPER),
    (('H100 PCIE',),                          (756,   756,   378,   51,    1513), _HOPPER),
    (('H100 NVL',),                           (835,   835,   None,  None,  None), _TITAN),
    (('H200 NVL',),                           (836,   836,   None,  None,  None), _NANOCHAT),
    (('H20',),                                (148,   148,   None,  None,  None), _TITAN),
    (('B200', 'B300', 'B300 SXM6 AC'),        (2250,  2250,  1125,  75,    4500), _HGX),
    (('GB200',),                              (2500,  2500,  1250,  80,    5000),
     'NVIDIA GB200 NVL72 table'),
    (('GB300',),                              (2500,  2500,  None,  None,  None), _TITAN),
    # torch sees each of the two dies as a device: half of 383 and of 47.9.
    (('MI250X',),                             (191.5, 191.5, None,  23.95, None),
     f'{_STAS}, one of two dies'),
    (('MI300X',),                             (1307,  1307,  653.7, 163.4, 2615),
     f'{_NANOCHAT}; AMD data sheet'),
    (('MI325X',),                             (1307,  1307,  None,  None,  None), _NANOCHAT),
    (('MI355X',),                             (2500,  2500,  None,  None,  None), _TITAN),
)
# fmt: on
_BY_NAME = {name: (peaks, source) for names, peaks, source in _PEAKS for name in names}
_MAKER_OR_MEMORY = re.compile(r'NVIDIA|TESLA|GEFORCE|AMD|INSTINCT|OAM|\d+GB?|HBM3E?')

# Memory of one device in GB as its maker's data sheet has it; each size that it was sold with.
# The sheets mean 2^30 bytes on most of them: 10^9 is on the safe side.
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
    """A GPU that need not be here: its name in the tables, and its memory."""

    name: str
    memory_gb: int
    memory_source: str

    def peak(self, dtype: str) -> Peak:
        """The peak of matrix multiplications in `dtype`, with TF32 for float32 where it has it."""
        columns = {'bfloat16': ['bf16'], 'float16': ['fp16'], 'float32': ['tf32', 'fp32']}[dtype]
        for column in columns:
            if found := peak_for_name(self.name, column):
                return Peak(found[0], f'{self.name}, dense {column}: {found[1]}', measured=False)
        why = f'no {columns[-1]} peak known for {self.name}; pass --peak_tflops'
        return Peak(None, why, measured=False)

    def resolve_dtype(self, name: str) -> str:
        """As the function `resolve_dtype`, for this GPU. Raises UserError."""
        native = self.peak('bfloat16').tflops is not None
        if name == 'bfloat16' and not native:
            raise UserError(
                f"dtype='bfloat16': {self.name} has no bfloat16 hardware: use --dtype=float16 or "
                f'--dtype=float32.'
            )
        return name if name != 'auto' else 'bfloat16' if native else 'float16'


def find_gpu(name: str) -> Gpu:
    """The GPU that is called `name`, with its memory where it was sold with several sizes.

    'B200', 'a100-80gb' or a driver's 'NVIDIA A100-SXM4-80GB'. Raises UserError if it is not known
    or could be several.
    """
    words = [w for w in re.split(r'[\s_-]+', name.upper()) if w]
    asked = [int(w.rstrip('GB')) for w in words if re.fullmatch(r'\d+GB', w)]
    bare = ''.join(word for word in words if not _MAKER_OR_MEMORY.fullmatch(word))
    family = [known for known in _MEMORY_OF if bare and known.split()[0] == bare]
    found = [known for known in _MEMORY_OF if bare == known.replace(' ', '')] or family

    def shown(known: str) -> list[str]:
        sizes, typed = _MEMORY_OF[known][0], known.replace(' ', '-')
        return [f'{typed}-{size}GB' for size in sizes] if len(sizes) > 1 else [typed]

    if not found:
        known = [full for one in _MEMORY_OF for full in shown(one)]
        hint = nearest(name, known)
        raise UserError(f'gpu={name!r} is not known.{hint} There are: {", ".join(known)}.')
    if len({(_BY_NAME[known], _MEMORY_OF[known]) for known in found}) > 1:
        choices = ', '.join(full for one in found for full in shown(one))
        raise UserError(f'gpu={name!r} may be one of several: {choices}.')
    sizes, source = _MEMORY_OF[found[0]]
    fitting = [size for size in sizes if not asked or size in asked]
    if len(fitting) != 1:
        start = name if not asked else found[0].replace(' ', '-')
        choices = ' or '.join(f'--gpu={start}-{size}GB' for size in sizes)
        raise UserError(
            f'gpu={name!r}: it comes with {" or ".join(map(str, sizes))} GB. Say '
            f'{choices if len(sizes) > 1 else f"--gpu={start}"}.'
        )
    return Gpu(found[0], fitting[0], source)


def peak_for_name(name: str, column: str) -> tuple[float, str] | None:
    """(TFLOP/s, source) of the device that a driver calls `name`, or None where unknown.

    `column` is 'bf16', 'fp16', 'tf32', 'fp32' or 'fp8'.
    """
    words = re.split(r'[\s-]+', name.upper())
    bare = ' '.join(word for word in words if not _MAKER_OR_MEMORY.fullmatch(word))
    peaks, source = _BY_NAME.get(bare, ((), ''))
    value = dict(zip(_COLUMNS, peaks)).get(column)
    return None if value is None else (value, source)


def peak_flops(device: torch.device, dtype: str, override: float | None = None) -> Peak:
    """The peak of one device when its matrix multiplications run in `dtype`.

    `override` (--peak_tflops) comes first, then the table for a GPU; a CPU is measured, which
    takes about half a second. Unknown is None with the reason as source.
    """
    if override is not None:
        return Peak(override, '--peak_tflops', measured=False)
    if device.type == 'cpu':
        return _measure_cpu(dtype)
    name = device_name(device)
    if device.type == 'cuda':
        float32 = 'tf32' if torch.backends.cuda.matmul.fp32_precision == 'tf32' else 'fp32'
        column = {'bfloat16': 'bf16', 'float16': 'fp16', 'float32': float32}[dtype]
        if found := peak_for_name(name, column):
            value, source = found
            return Peak(value, f'{name}, dense {column}: {source}', measured=False)
        return Peak(None, f'no {column} peak known for {name}; pass --peak_tflops', measured=False)
    return Peak(None, f'no peak known for {name}; pass --peak_tflops', measured=False)


def _measure_cpu(dtype: str) -> Peak:
    """Time square matrix multiplications of two sizes, about 0.2 s each; the fastest one counts.

    On a busy machine a small one is slowed many times over by threads that wait for each other,
    so the sizes are a model's. `linear` is what a model calls: in float16 `mm` can be ten times
    slower.
    """
    generator = torch.Generator().manual_seed(0)  # leaves the run's own random stream alone
    best_tflops, best_size, fastest = 0.0, 0, 0.0
    for size in (1024, 2048):
        if 8 * fastest > 0.2:  # twice the size is eight times the work
            break
        x, weight = torch.randn(2, size, size, generator=generator).to(getattr(torch, dtype))
        torch.nn.functional.linear(x, weight)  # warm-up
        fastest, now = float('inf'), time.perf_counter()
        deadline = now + 0.2
        while now < deadline:
            start = now
            torch.nn.functional.linear(x, weight)
            now = time.perf_counter()
            fastest = min(fastest, now - start)
        best_tflops, best_size = max((best_tflops, best_size), (2 * size**3 / fastest / 1e12, size))
    threads = torch.get_num_threads()
    source = (
        f'measured: {best_size:,}-cubed {dtype} matrix multiplication '
        f'on {threads} thread{"s" if threads != 1 else ""}'
    )
    return Peak(best_tflops, source, measured=True)


# --- Memory ---------------------------------------------------------------------------------------


def memory_usage(device: torch.device) -> dict[str, float | None]:
    """allocated_gb, peak_gb, reserved_gb, rss_gb; None where the device does not tell.

    The peak is since the last `reset_peak_memory`: of the device's memory on CUDA, of the
    process's resident memory on a CPU. It takes about 0.1 ms on a CPU.
    """
    allocated = peak = reserved = None
    if device.type == 'cuda':
        statistics = torch.cuda.memory_stats(device)
        allocated = statistics.get('allocated_bytes.all.current', 0)
        peak = statistics.get('allocated_bytes.all.peak', 0)
        reserved = statistics.get('reserved_bytes.all.current', 0)
    elif device.type == 'mps':
        allocated = torch.mps.current_allocated_memory()
        reserved = torch.mps.driver_allocated_memory()
    else:
        peak = _peak_rss()
    readings = {
        'allocated_gb': allocated,
        'peak_gb': peak,
        'reserved_gb': reserved,
        'rss_gb': psutil.Process().memory_info().rss,
    }
    return {key: None if value is None else value / GB for key, value in readings.items()}


def reset_peak_memory(device: torch.device) -> None:
    """Start a new interval for the peak; where that is not permitted it stays the lifetime's."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == 'cpu':
        with contextlib.suppress(OSError):
            Path('/proc/self/clear_refs').write_text('5')


def _peak_rss() -> int | None:
    """The largest resident size in bytes: since the last reset on Linux, else of the lifetime."""
    try:
        high_water = re.search(rb'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_bytes())
    except OSError:
        high_water = None
    if high_water:
        return int(high_water[1]) * 1024
    if resource is None:
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Matrix multiplications in `dtype`; nothing to do for 'float32'."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype))


# --- Speed ----------------------------------------------------------------------------------------


def tune(device: torch.device, deterministic: bool) -> None:
    """Settings of the whole process; `deterministic` asks for kernels that are, at any price."""
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if device.type == 'cuda':
        # fp32 products outside autocast in TF32, as nanoGPT has it.
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    elif device.type == 'cpu':
        _keep_freed_memory()
        # Compiled code recomputes what costs no product, the norms' outputs above all, although a
        # product of the backward pass takes it.
        functorch_config.ban_recompute_materialized_backward = False


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks, so that each step does not fault its memory in anew.

    By default every large tensor is mapped and unmapped: on two cores a step of a 12-layer model
    took about 1.4 times as long. (Settings: mallopt(3).)
    """
    m_mxfast, m_trim_threshold, m_mmap_max = 1, -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(m_mmap_max, 0)  # M_MMAP_THRESHOLD may be refused above 32 MB
    mallopt(m_trim_threshold, -1)  # never: any threshold that fits is less than a step frees
    # The splinters that are left beside an aligned tensor join it again when it is freed, so that
    # one of its size more often fits there.
    mallopt(m_mxfast, 0)


# --- Time ----------------------------------------------------------------------------------------


class StepClock:
    """Seconds that went into updates since the last log entry, and their number."""

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.seconds, self.steps, self.began = 0.0, 0, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what goes on inside: an evaluation, a checkpoint."""
        self._add()
        yield
        self.began = time.perf_counter()

    def take(self) -> tuple[float, int]:
        """Seconds an update, and the number of updates that they are the mean of."""
        self._add()
        return self.seconds / self.steps, self.steps

    def _add(self) -> None:
        synchronize(self.device)
        self.seconds += time.perf_counter() - self.began


# --- Surroundings ---------------------------------------------------------------------------------


def compile_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work on this device, or None where nothing is missing."""
    default = 'clang++' if sys.platform == 'darwin' else 'g++'
    compiler = os.environ.get('CXX', default)
    if shutil.which(compiler) is None:
        return f'there is no C++ compiler ({compiler} is not on the PATH)'
    include = sysconfig.get_path('include')
    if not Path(include, 'Python.h').exists():
        return f"Python's development headers are missing (no Python.h in {include})"
    if device.type == 'cuda':
        if find_spec('triton') is None:
            return 'the package triton is not installed'
        if torch.version.cuda and torch.cuda.get_device_capability(device)[0] < 7:
            return f'{device_name(device)} is older than triton supports'
    return None


def versions() -> dict[str, str | None]:
    """Versions of python, torch, numpy and the CUDA that torch was built for (None: without)."""
    return {
        'python': platform.python_version(),
        'torch': str(torch.__version__),  # a plain string: records and checkpoints hold it
        'numpy': numpy.__version__,
        'cuda': torch.version.cuda,
    }


def git_state(folder: str | os.PathLike) -> tuple[str | None, bool | None]:
    """(commit, clean) of the git work tree that holds `folder`; (None, None) where there is none.

    Clean means that no file differs from the commit and none is untracked, ignored files aside.
    """
    command = ['git', '-C', str(folder), 'status', '--porcelain=v2', '--branch']
    try:
        status = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            env={**os.environ, 'GIT_OPTIONAL_LOCKS': '0'},  # disturb no git at work beside us
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None, None
    commit = re.fullmatch(r'# branch\.oid ([0-9a-f]+)', status[0])
    if commit is None:  # a repository without a commit
        return None, None
    return commit[1], all(line.startswith('#') for line in status)
