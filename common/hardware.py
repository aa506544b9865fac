"""Devices: selection, supported dtypes, peak, memory in use, process-wide settings.

Peaks come from `gpu_specs` and `cpu_peak`, for one device, in TFLOP/s. Sizes are in GB of 10⁹
bytes. This module does not depend on the model.
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
from typing import TypeAlias

import numpy
import psutil
import torch
from torch._functorch import config as functorch_config

from common import cpu_peak
from common.errors import UserError, did_you_mean
from common.gpu_specs import Peak, peak_of_products

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

GB = 1e9
DTYPES = ('float32', 'bfloat16', 'float16')
# Variables with which a launcher restricts the GPUs that a process sees (CUDA, ROCm).
VISIBLE_DEVICES = ('CUDA_VISIBLE_DEVICES', 'HIP_VISIBLE_DEVICES', 'ROCR_VISIBLE_DEVICES')


# --- Devices --------------------------------------------------------------------------------------


def select_device(name: str) -> torch.device:
    """The device called `name`: 'auto' (CUDA, else MPS, else CPU), 'cuda', 'cuda:1', 'mps', 'cpu'.

    A process started by torchrun takes the CUDA device of its LOCAL_RANK for 'auto' and 'cuda'; the
    first one if it sees a single device, as with launchers such as `srun --gpus-per-task=1`.
    Raises UserError for a name that is unknown or not available on this machine.
    """
    cuda_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = [f'cuda:{index}' for index in range(cuda_count)]
    available += ['mps'] * torch.backends.mps.is_available() + ['cpu']

    chosen = available[0] if name == 'auto' else name
    if name == 'cuda' or (name == 'auto' and cuda_count):
        one_each = cuda_count == 1 and any(name in os.environ for name in VISIBLE_DEVICES)
        chosen = f'cuda:{0 if one_each else os.environ.get("LOCAL_RANK", 0)}'
    if chosen in available:
        return torch.device(chosen)

    if cuda_count and 'LOCAL_RANK' in os.environ and name in ('auto', 'cuda'):
        raise UserError(
            f'device={name!r}: this process needs {chosen} (LOCAL_RANK), but the machine has '
            f'{cuda_count} CUDA device(s). Start at most {cuda_count} processes '
            f'(torchrun --nproc-per-node={cuda_count}) or use --device=cpu.'
        )
    built_without = name.startswith('cuda') and not torch.backends.cuda.is_built()
    why = f' (torch {torch.__version__} is built without CUDA)' if built_without else ''
    raise UserError(
        f'device={name!r} is not available here{why}: use one of auto, {", ".join(available)}.'
    )


def device_name(device: torch.device) -> str:
    """The driver's name of the device; for a CPU its model and number of cores."""
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
    """Wait until all work queued on the device is done, for timing."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


# --- Precision ------------------------------------------------------------------------------------


def resolve_dtype(name: str, device: torch.device) -> str:
    """The dtype of matrix multiplications: `name`, or for 'auto' the fastest that trains well.

    'auto' is bfloat16 if the hardware supports it natively, else float16 on CUDA and float32
    elsewhere. Raises UserError for an unknown dtype and for bfloat16 on a GPU without it.
    """
    if name != 'auto' and name not in DTYPES:
        allowed = ('auto', *DTYPES)
        raise UserError(
            f'dtype={name!r} is unknown: use one of {", ".join(allowed)}.'
            f'{did_you_mean(name, allowed)}'
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


def peak_flops(device: torch.device, dtype: str, override: float | None = None) -> Peak:
    """The peak of one device for matrix multiplications in `dtype`.

    `override` (--peak_tflops) has priority, then the table of GPUs; a CPU is measured, which takes
    about half a second the first time. An unknown peak is None, with the reason as its source.
    """
    if override is not None:
        return Peak(override, '--peak_tflops', measured=False)
    if device.type == 'cpu':
        return cpu_peak.peak(_cpu_model(), dtype)
    name = device_name(device)
    if device.type == 'cuda':
        tf32 = torch.backends.cuda.matmul.fp32_precision == 'tf32'
        return peak_of_products(name, dtype, tf32)
    return Peak(None, f'the peak of {name} is unknown; set --peak_tflops', measured=False)


# --- Memory ---------------------------------------------------------------------------------------


def memory_usage(device: torch.device) -> dict[str, float | None]:
    """The memory in use; None for values that the device does not report.

    `allocated_gb`, `reserved_gb` (by the allocator) and `rss_gb` are present values. Since the last
    `reset_peak_memory`: `peak_gb`, of the device's memory on CUDA, of the process's resident memory
    on a CPU; `reserved_peak_gb`; and `allocator_retries`, how often the device was full, so that
    the allocator returned its unused blocks to it and tried again.

    On CUDA it includes all work queued so far and nothing later, even if the device is still busy
    with it: the allocator counts memory when the host queues the work. A call takes about 0.1 ms
    on a CPU.
    """
    allocated = peak = reserved = reserved_peak = retries = None
    if device.type == 'cuda':
        statistics = torch.cuda.memory_stats(device)
        allocated = statistics.get('allocated_bytes.all.current', 0)
        peak = statistics.get('allocated_bytes.all.peak', 0)
        reserved = statistics.get('reserved_bytes.all.current', 0)
        reserved_peak = statistics.get('reserved_bytes.all.peak', 0)
        retries = statistics.get('num_alloc_retries', 0)
    elif device.type == 'mps':
        allocated = torch.mps.current_allocated_memory()
        reserved = torch.mps.driver_allocated_memory()
    else:
        peak = _peak_rss()
    sizes = {
        'allocated_gb': allocated,
        'peak_gb': peak,
        'reserved_gb': reserved,
        'reserved_peak_gb': reserved_peak,
        'rss_gb': psutil.Process().memory_info().rss,
    }
    usage = {key: None if size is None else size / GB for key, size in sizes.items()}
    return {**usage, 'allocator_retries': retries}


def total_memory(device: torch.device) -> int:
    """The size of the device's memory in bytes; for a CPU the machine's, with its swap space."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total + psutil.swap_memory().total


def reset_peak_memory(device: torch.device) -> None:
    """Start a new interval for the peaks and the retries of `memory_usage`.

    Without permission, the peak of a CPU stays that of the lifetime.
    """
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_accumulated_memory_stats(device)
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
    """A context with matrix multiplications in `dtype`; empty for 'float32'."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype))


# --- Speed ----------------------------------------------------------------------------------------


def tune(device: torch.device, deterministic: bool) -> None:
    """Apply settings of the whole process. deterministic: only deterministic kernels."""
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.backends.cudnn.benchmark = False
    if device.type == 'cuda':
        # FSDP and NCCL use the current device; without this it is cuda:0 on every rank.
        torch.cuda.set_device(device)
        # fp32 products in TF32, as in nanoGPT; `gpu_specs.Gpu.peak` assumes that.
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    elif device.type == 'cpu':
        _keep_freed_memory()
        # By default compiled code recomputes cheap values, mainly the outputs of norms, although a
        # matrix multiplication of the backward pass has to materialize them.
        functorch_config.ban_recompute_materialized_backward = False


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks, so that an iteration does not page-fault its memory in again.

    By default every large tensor is mapped and unmapped: on two cores an iteration of a 12-layer
    model took about 1.4 times as long. (Settings: mallopt(3).)
    """
    m_mxfast, m_trim_threshold, m_mmap_max = 1, -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(m_mmap_max, 0)  # M_MMAP_THRESHOLD may be refused above 32 MB
    mallopt(m_trim_threshold, -1)  # never: the largest threshold is less than an iteration frees
    # Let free() coalesce small chunks with their neighbors, which reduces fragmentation.
    mallopt(m_mxfast, 0)


# --- Time ----------------------------------------------------------------------------------------


class StepClock:
    """The time of the iterations since the last log entry, and their number.

    On CUDA it reads no time but records events among the work of the device, so that the host does
    not wait. Elsewhere it waits for the device and reads the time.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.spans: list[tuple[Moment, Moment]] = []
        self.steps, self.began = 0, now(self.device)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside: an evaluation, a checkpoint."""
        self.spans.append((self.began, now(self.device)))
        yield
        self.began = now(self.device)

    def take(self) -> 'TimedSteps':
        """The iterations since the last call, with their time. Begins the next interval."""
        end = now(self.device)
        taken = TimedSteps([*self.spans, (self.began, end)], self.steps)
        self.spans, self.steps, self.began = [], 0, end
        return taken


Moment: TypeAlias = float | torch.cuda.Event  # seconds, or an event that the device passes


def now(device: torch.device) -> Moment:
    """The moment when all work queued on the device is done. The host waits, except on CUDA."""
    if device.type == 'cuda':
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    synchronize(device)
    return time.perf_counter()


@dataclass
class TimedSteps:
    """Iterations, and the periods that they took. The device may still be busy with them."""

    spans: list[tuple[Moment, Moment]]
    steps: int

    @property
    def seconds_per_step(self) -> float:
        """The mean time of an iteration, after waiting for the end of the last one."""
        return sum(seconds_between(*span) for span in self.spans) / self.steps


def seconds_between(begin: Moment, end: Moment) -> float:
    """Waits until the device has passed `end`."""
    if isinstance(begin, float) or isinstance(end, float):
        return end - begin  # type: ignore[operator]
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class HostCopy:
    """A copy of a tensor in host memory, which the device makes after the work queued so far."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.copied = tensor, None
        if tensor.is_cuda:
            # A copy to memory that is not pinned would make the host wait.
            self.tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.tensor.copy_(tensor, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    @property
    def is_done(self) -> bool:
        """Whether `tolist` would not wait."""
        return self.copied is None or self.copied.query()

    def tolist(self) -> list:
        """The values, after waiting for the copy."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor.tolist()


# --- Environment ---------------------------------------------------------------------------------


def compile_problem(device: torch.device) -> str | None:
    """The reason why torch.compile cannot work on this device, or None."""
    on_cuda = device.type == 'cuda'
    problem = _c_compiler_problem() if on_cuda else _cpp_compiler_problem()
    if problem:
        return problem
    include = sysconfig.get_path('include')
    if not Path(include, 'Python.h').exists():
        return f"Python's development headers are missing (no Python.h in {include})"
    if on_cuda and find_spec('triton') is None:
        return 'the package triton is not installed'
    if on_cuda and torch.version.cuda and torch.cuda.get_device_capability(device)[0] < 7:
        return f'{device_name(device)} is older than triton supports'
    return None


def _c_compiler_problem() -> str | None:
    """Triton compiles its launchers with the C compiler that CC names, else gcc or clang."""
    compilers = [os.environ['CC']] if os.environ.get('CC') else ['gcc', 'clang']
    if any(map(shutil.which, compilers)):
        return None
    return f'there is no C compiler ({" or ".join(compilers)} is not on the PATH)'


def _cpp_compiler_problem() -> str | None:
    """Inductor compiles for CPUs with the C++ compiler that CXX names, else that of the system."""
    compiler = os.environ.get('CXX', 'clang++' if sys.platform == 'darwin' else 'g++')
    if shutil.which(compiler):
        return None
    return f'there is no C++ compiler ({compiler} is not on the PATH)'


def versions() -> dict[str, str | None]:
    """Versions of python, torch, numpy and of torch's CUDA (None: built without)."""
    return {
        'python': platform.python_version(),
        'torch': str(torch.__version__),  # a plain string, for records and checkpoints
        'numpy': numpy.__version__,
        'cuda': torch.version.cuda,
    }


def git_state(folder: str | os.PathLike) -> tuple[str | None, bool | None]:
    """(commit, clean) of the git work tree of `folder`; (None, None) without one.

    Clean: no file differs from the commit and none is untracked, except for ignored files.
    """
    command = ['git', '-C', str(folder), 'status', '--porcelain=v2', '--branch']
    try:
        status = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            env={**os.environ, 'GIT_OPTIONAL_LOCKS': '0'},  # do not block other git processes
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None, None
    commit = re.fullmatch(r'# branch\.oid ([0-9a-f]+)', status[0])
    if commit is None:  # a repository without a commit
        return None, None
    return commit[1], all(line.startswith('#') for line in status)
