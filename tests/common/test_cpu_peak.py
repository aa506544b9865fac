"""cpu_peak.py: a measurement, and the best of them remembered."""

import itertools
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from common import cpu_peak
from common.cpu_peak import Best

CPU = 'Some CPU'


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where this test's runs remember their best."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return cpu_peak.cache_file()


@pytest.fixture
def measured(monkeypatch):
    """`measured(0.2)`: what every measurement from here on gives. Returns the rounds of all."""
    called = []

    def pretend(tflops: float, size: int = 1024) -> list[int]:
        def measure(dtype, rounds):
            called.append(rounds)
            return Best(tflops, size)

        monkeypatch.setattr(cpu_peak, 'measure', measure)
        return called

    return pretend


def tflops(dtype='float32', cpu=CPU) -> float:
    return cpu_peak.peak(cpu, dtype).tflops


def test_measurement_is_labeled_and_keeps_random_stream(file):
    before = torch.get_rng_state()
    peak = cpu_peak.peak(CPU, 'float32')
    assert torch.equal(torch.get_rng_state(), before)
    assert peak.measured and peak.tflops > 0
    assert peak.source.startswith('measured: ') and 'float32' in peak.source
    assert f'{torch.get_num_threads()} thread' in peak.source


def test_measurement_is_operations_over_time(monkeypatch):
    clock = itertools.count(step=0.1)  # a tenth of a second passes between two looks at the clock
    monkeypatch.setattr(cpu_peak.time, 'perf_counter', lambda: next(clock))
    best = cpu_peak.measure('float32', rounds=2)
    assert best == Best(pytest.approx(2 * 1024**3 / 0.1 / 1e12), 1024)


def test_best_of_several_measurements_counts(monkeypatch):
    seconds = iter([0.010, 0.200, 0.002, 0.016, 0.300, 0.100])
    monkeypatch.setattr(cpu_peak, '_fastest', lambda *operands: next(seconds))
    best = cpu_peak.measure('float32', rounds=3)
    assert best == Best(2 * 2048**3 / 0.016 / 1e12, 2048)


def test_peak_only_rises(file, measured):
    measured(0.2)
    assert tflops() == 0.2
    measured(1.0, 2048)
    assert tflops() == 1.0
    rounds = measured(0.25)
    peak = cpu_peak.peak(CPU, 'float32')
    assert peak.tflops == 1.0
    assert '2,048-cubed' in peak.source and 'earlier run; now 25% of it' in peak.source
    assert rounds == [cpu_peak.ROUNDS, 1, 1]  # a start that knows one takes a third of the time
    assert len(file.read_text().split('\n')) == 1 + 2  # a line for each new best


def test_peak_is_remembered_per_configuration(file, measured, monkeypatch):
    measured(1.0)
    tflops()
    measured(0.5)
    assert tflops() == 1.0
    assert tflops(cpu='Another CPU') == 0.5
    assert tflops('bfloat16') == 0.5
    monkeypatch.setattr(torch, '__version__', '99.0')
    assert tflops() == 0.5
    monkeypatch.undo()


def test_peak_is_remembered_per_thread_count(file, measured):
    measured(1.0)
    tflops()
    measured(0.5)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert tflops() == 0.5
    finally:
        torch.set_num_threads(before)


def test_concurrent_writes_lose_nothing(file, measured):
    key = {'cpu': CPU, 'threads': 1, 'dtype': 'float32', 'torch': 'x'}
    values = [n / 100 for n in range(1, 201)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda v: cpu_peak._remember(key, Best(v, 1024)), values))
    lines = [json.loads(line) for line in file.read_text().splitlines() if line]
    assert sorted(line['tflops'] for line in lines) == values
    assert cpu_peak._recall(key) == Best(2.0, 1024)


@pytest.mark.parametrize(
    'damage',
    [
        b'{"cpu": "Some',
        b'\xff\xfe\x00',
        b'[]\n"x"\n3\nnull\n',
        b'[' * 100_000,
        *(
            json.dumps({'cpu': CPU, 'dtype': 'float32', 'tflops': value, 'size': 9}).encode()
            for value in (math.nan, math.inf, -1, 'x', None, 10**400)
        ),
    ],
)
def test_damaged_cache_is_skipped_and_extended(file, measured, damage):
    file.parent.mkdir()
    own = {'threads': torch.get_num_threads(), 'torch': str(torch.__version__)}
    if damage.startswith(b'{"cpu": "Some CPU"'):
        damage = json.dumps({**json.loads(damage), **own}).encode()
    file.write_bytes(damage)  # no line end: the next line must not be glued to it
    measured(0.7)
    assert tflops() == 0.7
    measured(0.1)
    assert tflops() == 0.7


def test_unwritable_cache_is_mentioned(tmp_path, measured, monkeypatch):
    measured(0.3)
    blocked = tmp_path / 'file'
    blocked.touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(blocked))  # no folder can be made in a file
    peak = cpu_peak.peak(CPU, 'float32')
    assert peak.tflops == 0.3 and peak.source.endswith(', not cached')

    def homeless():
        raise RuntimeError('no home')

    monkeypatch.setattr(cpu_peak.Path, 'home', homeless)
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert cpu_peak.cache_file() is None
    assert tflops() == 0.3


def test_cache_is_in_user_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_peak.Path, 'home', lambda: tmp_path)
    monkeypatch.setattr(sys, 'platform', 'linux')
    for ignored in ('', 'relative/path'):
        monkeypatch.setenv('XDG_CACHE_HOME', ignored)
        assert cpu_peak.cache_file().is_relative_to(tmp_path / '.cache')
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert cpu_peak.cache_file().is_relative_to(tmp_path / 'Library' / 'Caches')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'x'))
    assert cpu_peak.cache_file().is_relative_to(tmp_path / 'x')


def test_processes_share_peak_of_cores(file, measured, monkeypatch):
    """So that the peak of the job, that of a process times their number, is the machine's."""
    measured(1.0)
    monkeypatch.setattr(cpu_peak.psutil, 'cpu_count', lambda logical: 4)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    for processes, share in (('', 1), ('1', 1), ('2', 1), ('4', 0.5), ('8', 0.25), ('x', 1)):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', processes)
        peak = cpu_peak.peak(CPU, 'float32')
        assert peak.tflops == share
        assert ('share 4 cores' in peak.source) == (share < 1)
