"""The kernels of other packages themselves, where installed: Triton's interpreter on a CPU."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys

import pytest
from helpers.kernel_packages import FUNCTIONS
from helpers.project import PROJECT

# Not deltanet, whose kernel refuses fp32, nor mamba, whose kernel is CUDA.
CASES = {
    'fla': [
        'gated_deltanet',
        'gated_deltanet, groups',
        'kda, groups',
        'gla',
        'linear_attention',
        'linear_attention, odd',
        'retnet',
    ],
    'mamba_ssm': ['mamba2'],
}


def is_missing(package: str) -> bool:
    return any(importlib.util.find_spec(name) is None for name in (package, 'triton'))


@pytest.mark.optional
@pytest.mark.slow
@pytest.mark.parametrize('package', CASES)
def test_real_kernels_equal_plain_pytorch(package):
    if is_missing(package):
        pytest.skip(f'{package} or triton is not installed')
    script = PROJECT / 'tests/helpers/interpreted_kernels.py'
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''}
    command = [sys.executable, str(script), package, *CASES[package]]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    differences = json.loads(run.stdout.splitlines()[-1])
    assert len(differences) == len(CASES[package]) + (package == 'mamba_ssm')
    for case, (output, gradient) in differences.items():
        assert output < 1e-5 and gradient < 1e-4, case


@pytest.mark.optional
@pytest.mark.slow
@pytest.mark.parametrize('path, name', FUNCTIONS)
def test_stand_ins_have_the_real_parameters(path, name):
    """Names and defaults, in this order where they may be positional."""
    if is_missing(path.partition('.')[0]):
        pytest.skip(f'{path} is not installed')
    real = inspect.signature(getattr(pytest.importorskip(path), name)).parameters
    ours = inspect.signature(inspect.unwrap(FUNCTIONS[path, name])).parameters
    assert {key: real[key].default for key in ours} == {key: ours[key].default for key in ours}
    required = [key for key in ours if ours[key].default is inspect.Parameter.empty]
    assert list(real)[: len(required)] == required
