"""hardware.py: devices, precision, peaks, memory readings."""

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from helpers.project import PROJECT
from torch._functorch import config as functorch_config

from common import gpu_specs, hardware
from common.errors import UserError

CPU = torch.device('cpu')


@pytest.fixture
def cuda(monkeypatch):
    """Pretend that the machine has CUDA devices: `cuda(name, capability, count)`."""

    def pretend(name='NVIDIA H100 80GB HBM3', capability=(9, 0), count=2):
        monkeypatch.delenv('LOCAL_RANK', raising=False)
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
        monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: name)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
        return torch.device('cuda:0')

    return pretend


@pytest.fixture
def cpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)


# --- Devices --------------------------------------------------------------------------------------


def test_auto_prefers_cuda_then_mps_then_cpu(cuda, cpu_only, monkeypatch):
    assert hardware.select_device('auto') == CPU
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert hardware.select_device('auto') == torch.device('mps')
    cuda()
    assert hardware.select_device('auto') == torch.device('cuda:0')


def test_named_devices(cuda):
    cuda()
    assert hardware.select_device('cpu') == CPU
    assert hardware.select_device('cuda') == torch.device('cuda:0')
    assert hardware.select_device('cuda:1') == torch.device('cuda:1')


@pytest.mark.parametrize('name', ['auto', 'cuda'])
def test_each_local_rank_has_its_own_gpu(cuda, monkeypatch, name):
    cuda(count=2)
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert hardware.select_device(name) == torch.device('cuda:1')
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(UserError, match=r'cuda:2.*LOCAL_RANK.*--nproc-per-node=2'):
        hardware.select_device(name)


def test_local_rank_means_nothing_on_a_cpu(cpu_only, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '3')
    assert hardware.select_device('auto') == CPU


@pytest.mark.parametrize('name', ['cuda', 'cuda:0', 'mps', 'gpu', '', 'cpu:7'])
def test_unavailable_device_names_key_value_and_choices(cpu_only, name):
    with pytest.raises(UserError, match=f'device={name!r}.*auto, cpu'):
        hardware.select_device(name)


def test_gpu_beyond_the_last_lists_those_there_are(cuda):
    cuda(count=2)
    with pytest.raises(UserError, match=r"device='cuda:2'.*auto, cuda:0, cuda:1, "):
        hardware.select_device('cuda:2')


def test_cpu_name_tells_cores():
    name = hardware.device_name(CPU)
    assert name.endswith(('core', 'cores'))
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists() and 'model name' in cpuinfo.read_text():
        line = next(x for x in cpuinfo.read_text().splitlines() if x.startswith('model name'))
        assert name.split()[0] in line


# --- Precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('capability', 'dtype'), [((7, 0), 'float16'), ((7, 5), 'float16'), ((8, 0), 'bfloat16')]
)
def test_auto_dtype_on_cuda_depends_on_hardware(cuda, capability, dtype):
    assert hardware.resolve_dtype('auto', cuda(capability=capability)) == dtype


@pytest.mark.parametrize(
    ('capabilities', 'dtype'),
    [
        ({'avx2': True, 'avx512_f': True, 'avx512_bf16': False}, 'float32'),
        ({'avx512_bf16': True}, 'bfloat16'),
        ({'amx_bf16': True}, 'bfloat16'),
        ({'neon': True, 'sve_bf16': True}, 'bfloat16'),
        ({'neon': True}, 'float32'),
    ],
)
def test_auto_dtype_on_a_cpu(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: capabilities)
    assert hardware.resolve_dtype('auto', CPU) == dtype


def test_auto_dtype_agrees_with_the_flags_of_this_cpu():
    cpuinfo = Path('/proc/cpuinfo')
    flags = cpuinfo.read_text() if cpuinfo.exists() else ''
    if 'flags' not in flags:
        pytest.skip('no x86 flags to read')
    expected = 'bfloat16' if 'amx_bf16' in flags or 'avx512_bf16' in flags else 'float32'
    assert hardware.resolve_dtype('auto', CPU) == expected


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_named_dtype_is_used_on_cpu(dtype):
    assert hardware.resolve_dtype(dtype, CPU) == dtype


def test_bfloat16_on_a_gpu_without_it_is_refused(cuda):
    v100 = cuda('Tesla V100-SXM2-16GB', (7, 0))
    with pytest.raises(UserError, match=r"dtype='bfloat16'.*V100.*--dtype=float16"):
        hardware.resolve_dtype('bfloat16', v100)
    assert hardware.resolve_dtype('float16', v100) == 'float16'


def test_unknown_dtype_suggests_the_nearest():
    with pytest.raises(UserError, match=r"dtype='bfloat'.*Did you mean bfloat16\?"):
        hardware.resolve_dtype('bfloat', CPU)


# --- Peaks ----------------------------------------------------------------------------------------


@pytest.fixture
def matmul():
    """The switches of CUDA matrix multiplications, put back afterwards."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


def test_peak_follows_the_dtype_of_the_matrix_multiplications(cuda, matmul):
    device = cuda('NVIDIA A100-SXM4-80GB', (8, 0))
    matmul.fp32_precision = 'ieee'
    assert hardware.peak_flops(device, 'bfloat16').tflops == 312
    assert hardware.peak_flops(device, 'float32').tflops == 19.5
    matmul.fp32_precision = 'tf32'
    peak = hardware.peak_flops(device, 'float32')
    assert (peak.tflops, peak.measured) == (156, False)
    assert 'tf32' in peak.source and 'NVIDIA data sheet' in peak.source


@pytest.mark.parametrize(
    ('name', 'capability', 'tf32', 'fp32'),
    [
        ('Tesla V100-SXM2-32GB', (7, 0), 15.7, 15.7),
        ('Tesla T4', (7, 5), 8.1, 8.1),
        ('NVIDIA L4', (8, 9), 60, 30.3),
        ('NVIDIA RTX A6000', (8, 6), 77.4, 38.7),
        ('NVIDIA H100 80GB HBM3', (9, 0), 494.5, 67),
        ('AMD Instinct MI250X', (9, 0), 47.85, 47.85),
        ('AMD Instinct MI300X', (9, 4), 653.7, 163.4),
    ],
)
def test_float32_uses_tf32_if_supported_and_enabled(cuda, matmul, name, capability, tf32, fp32):
    device = cuda(name, capability)
    hardware.tune(device, deterministic=False)
    assert hardware.peak_flops(device, 'float32').tflops == tf32
    matmul.allow_tf32 = False
    assert hardware.peak_flops(device, 'float32').tflops == fp32


@pytest.mark.parametrize(
    ('name', 'dtype'), [('NVIDIA RTX A4000', 'bfloat16'), ('NVIDIA GB300', 'float32')]
)
def test_unknown_peak_gives_the_reason_and_the_flag(cuda, name, dtype):
    peak = hardware.peak_flops(cuda(name), dtype)
    assert peak.tflops is None
    assert name in peak.source and '--peak_tflops' in peak.source


def test_mps_has_no_peak():
    peak = hardware.peak_flops(torch.device('mps'), 'float32')
    assert peak.tflops is None and '--peak_tflops' in peak.source


def test_override_comes_first(cuda):
    for device in (CPU, cuda('NVIDIA RTX A4000'), cuda('NVIDIA H100 80GB HBM3')):
        peak = hardware.peak_flops(device, 'bfloat16', override=12.5)
        assert peak == gpu_specs.Peak(12.5, '--peak_tflops', measured=False)


# --- Memory ---------------------------------------------------------------------------------------


def test_rss_agrees_with_psutil_and_unknown_is_none():
    reading = hardware.memory_usage(CPU)
    assert reading['rss_gb'] == pytest.approx(psutil.Process().memory_info().rss / 1e9, abs=0.02)
    assert reading['allocated_gb'] is None and reading['reserved_gb'] is None
    assert reading['peak_gb'] > 0


@pytest.mark.skipif(
    not os.access('/proc/self/clear_refs', os.W_OK), reason='the peak cannot be reset here'
)
def test_peak_is_that_of_the_interval():
    hardware.reset_peak_memory(CPU)
    before = hardware.memory_usage(CPU)
    # Past malloc, which may keep freed memory (another test of this process may have asked it to).
    with mmap.mmap(-1, 200_000_000) as block:
        block[::4096] = bytes(len(range(0, len(block), 4096)))
        held = hardware.memory_usage(CPU)
    after = hardware.memory_usage(CPU)
    hardware.reset_peak_memory(CPU)
    reset = hardware.memory_usage(CPU)

    assert held['rss_gb'] - before['rss_gb'] == pytest.approx(0.2, abs=0.02)
    assert after['peak_gb'] - before['peak_gb'] == pytest.approx(0.2, abs=0.02)
    assert after['peak_gb'] - after['rss_gb'] == pytest.approx(0.2, abs=0.02)
    assert reset['peak_gb'] == pytest.approx(before['peak_gb'], abs=0.02)


def test_without_proc_the_peak_is_the_lifetimes(monkeypatch):
    def refuse(self, *args):
        raise PermissionError(str(self))

    rss = hardware.memory_usage(CPU)['rss_gb']
    monkeypatch.setattr(Path, 'read_bytes', refuse)
    monkeypatch.setattr(Path, 'write_text', refuse)
    hardware.reset_peak_memory(CPU)
    # The kernel brings the two figures up to date at different moments.
    assert hardware.memory_usage(CPU)['peak_gb'] >= rss - 0.02


def test_cuda_readings_are_in_gb_of_the_allocator(cuda, monkeypatch):
    statistics = {
        'allocated_bytes.all.current': 2_000_000_000,
        'allocated_bytes.all.peak': 3_000_000_000,
        'reserved_bytes.all.current': 4_500_000_000,
        'reserved_bytes.all.peak': 5_000_000_000,
        'num_alloc_retries': 7,
    }
    monkeypatch.setattr(torch.cuda, 'memory_stats', lambda device: statistics)
    reading = hardware.memory_usage(cuda())
    assert reading.pop('rss_gb') > 0
    assert reading == {
        'allocated_gb': 2.0,
        'peak_gb': 3.0,
        'reserved_gb': 4.5,
        'reserved_peak_gb': 5.0,
        'allocator_retries': 7,
    }


def test_reset_on_cuda_restarts_peaks_and_retries(cuda, monkeypatch):
    called = []
    for name in ('reset_peak_memory_stats', 'reset_accumulated_memory_stats'):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: called.append(name))
    hardware.reset_peak_memory(cuda())
    assert called == ['reset_peak_memory_stats', 'reset_accumulated_memory_stats']


# --- Surroundings ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='another C library')
def test_freed_memory_is_reused_without_page_faults():
    """64 MB are 16,384 pages or 32 huge ones. By malloc itself, since what was given back by a
    tensor, which is aligned, need not fit the next."""
    program = """
import ctypes, resource, torch
from common import hardware
hardware.tune(torch.device('cpu'), deterministic=False)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
faults = []
for _ in range(4):
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
print(min(after - before for before, after in zip(faults, faults[1:])))
"""
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 16


@pytest.mark.slow
def test_compiled_code_on_a_cpu_keeps_no_output_of_a_norm(monkeypatch):
    """Only the stream, the norm's two numbers a row, and the product, which is the result."""
    monkeypatch.setattr(functorch_config, 'ban_recompute_materialized_backward', True)
    rows, width = 64, 32
    norm, linear = torch.nn.LayerNorm(width), torch.nn.Linear(width, width)

    def kept() -> int:
        saved = {}

        def note(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.compiler.reset()
        compiled = torch.compile(
            lambda x: linear(norm(x)), backend='aot_eager_decomp_partition', fullgraph=True
        )
        x = torch.randn(rows, width, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            compiled(x)
        torch.compiler.reset()
        given = [x, *norm.parameters(), *linear.parameters()]
        for tensor in given:
            saved.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(saved.values())

    before = kept()
    hardware.tune(CPU, deterministic=False)
    assert before - kept() == rows * width * 4


def test_compile_needs_the_compiler_that_cxx_names(monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    assert 'no-such-compiler' in hardware.compile_problem(CPU)


def test_compile_problem_agrees_with_torch(monkeypatch):
    from torch._inductor import cpp_builder, exc

    monkeypatch.delenv('CXX', raising=False)
    try:
        cpp_builder.get_cpp_compiler()
        found = True
    except exc.InvalidCxxCompiler:
        found = False
    assert ('C++ compiler' in (hardware.compile_problem(CPU) or '')) == (not found)


def test_compile_on_cuda_needs_triton_and_supported_gpu(cuda, monkeypatch, tmp_path):
    (tmp_path / 'Python.h').touch()
    monkeypatch.setattr(hardware.sysconfig, 'get_path', lambda name: str(tmp_path))
    monkeypatch.setenv('CXX', 'sh')  # any program on the PATH will do
    monkeypatch.setenv('CC', 'sh')
    monkeypatch.setattr(hardware, 'find_spec', lambda name: None)
    assert 'triton' in hardware.compile_problem(cuda())
    assert hardware.compile_problem(CPU) is None
    monkeypatch.setattr(hardware, 'find_spec', lambda name: object())
    assert hardware.compile_problem(cuda()) is None
    monkeypatch.setattr(torch.version, 'cuda', '12.8')
    assert 'Tesla P100' in hardware.compile_problem(cuda('Tesla P100-PCIE-16GB', (6, 0)))
    monkeypatch.setenv('CXX', 'no-such-compiler')  # which a GPU does not need
    assert hardware.compile_problem(cuda()) is None
    monkeypatch.setenv('CXX', 'sh')
    monkeypatch.setenv('CC', 'no-such-compiler')
    assert 'no C compiler (no-such-compiler' in hardware.compile_problem(cuda())
    monkeypatch.delenv('CC')
    monkeypatch.setattr(hardware.shutil, 'which', lambda name: None)
    assert 'gcc or clang' in hardware.compile_problem(cuda())
    monkeypatch.undo()
    monkeypatch.setattr(hardware.sysconfig, 'get_path', lambda name: str(tmp_path))
    monkeypatch.setenv('CXX', 'sh')
    (tmp_path / 'Python.h').unlink()
    assert 'Python.h' in hardware.compile_problem(CPU)


def test_versions_are_those_in_use():
    versions = hardware.versions()
    assert versions['torch'] == torch.__version__ and versions['cuda'] == torch.version.cuda
    assert set(versions) == {'python', 'torch', 'numpy', 'cuda'}
    assert all(type(value) in (str, type(None)) for value in versions.values())


@pytest.fixture
def git(tmp_path, monkeypatch):
    for variable in [name for name in os.environ if name.startswith('GIT_')]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv('GIT_CONFIG_GLOBAL', os.devnull)
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))

    def run(*arguments):
        identity = ['-c', 'user.name=A', '-c', 'user.email=a@example.org']
        command = ['git', '-C', str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    return run


def test_git_state_of_a_work_tree(git, tmp_path):
    assert hardware.git_state(tmp_path) == (None, None)  # no repository
    git('init')
    assert hardware.git_state(tmp_path) == (None, None)  # no commit
    (tmp_path / 'model.py').write_text('1')
    (tmp_path / '.gitignore').write_text('out/')
    git('add', '.')
    git('commit', '-m', 'first')
    commit = git('rev-parse', 'HEAD')
    assert hardware.git_state(tmp_path) == (commit, True)

    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'run').write_text('ignored')
    assert hardware.git_state(tmp_path / 'out') == (commit, True)
    (tmp_path / 'model.py').write_text('2')
    assert hardware.git_state(tmp_path) == (commit, False)
    (tmp_path / 'model.py').write_text('1')
    (tmp_path / 'component.py').write_text('untracked')
    assert hardware.git_state(tmp_path) == (commit, False)


def test_git_state_without_git(git, tmp_path, monkeypatch):
    git('init')
    monkeypatch.setenv('PATH', str(tmp_path))
    assert hardware.git_state(tmp_path) == (None, None)
