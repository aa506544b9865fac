"""gpu_specs.py: peaks and memory by name."""

import pytest

from common import gpu_specs
from common.gpu_specs import peak_for_name, peak_of_products

# As drivers call them; dense TFLOP/s in bf16, fp16, tf32, fp32, fp8 from the makers' data sheets.
KNOWN = {
    'Tesla V100-SXM2-16GB': (None, 125, None, 15.7, None),
    'Tesla V100-SXM2-32GB': (None, 125, None, 15.7, None),
    'Tesla V100-SXM3-32GB': (None, 125, None, 15.7, None),
    'Tesla V100-PCIE-16GB': (None, 112, None, 14, None),
    'Tesla T4': (None, 65, None, 8.1, None),
    'NVIDIA A10': (125, 125, 62.5, 31.2, None),
    'NVIDIA A30': (165, 165, 82, 10.3, None),
    'NVIDIA A40': (149.7, 149.7, 74.8, 37.4, None),
    'NVIDIA A100-SXM4-40GB': (312, 312, 156, 19.5, None),
    'A100-SXM4-40GB': (312, 312, 156, 19.5, None),
    'NVIDIA A100-PCIE-40GB': (312, 312, 156, 19.5, None),
    'NVIDIA A100 80GB PCIe': (312, 312, 156, 19.5, None),
    'NVIDIA RTX A6000': (154.8, 154.8, 77.4, 38.7, None),
    'NVIDIA L4': (121, 121, 120 / 2, 30.3, 242),
    'NVIDIA L40S': (362, 362, 183, 91.6, 733),
    'NVIDIA GeForce RTX 3090': (71, 71, 35.6, 35.6, None),
    'NVIDIA GeForce RTX 4090': (165.2, 165.2, 82.6, 82.6, 330.3),
    'NVIDIA GeForce RTX 5090': (209.5, 209.5, 104.8, 104.8, 419),
    'NVIDIA H100 80GB HBM3': (989, 989, 494.5, 67, 1979),
    'NVIDIA H200': (989, 989, 494.5, 67, 1979),
    'NVIDIA GH200 480GB': (989, 989, 494.5, 67, 1979),
    'NVIDIA GH200 144G HBM3e': (989, 989, 494.5, 67, 1979),
    'NVIDIA H800': (989, 989, 494.5, 67, 1979),
    'NVIDIA H100 PCIe': (756, 756, 378, 51, 1513),
    'NVIDIA H100 NVL': (835, 835, 835 / 2, 60, None),
    'NVIDIA H200 NVL': (836, 836, 835 / 2, 60, None),
    'NVIDIA H20': (148, 148, 74, 44, None),
    'NVIDIA B200': (2250, 2250, 1125, 75, 4500),
    'NVIDIA B300 SXM6 AC': (2250, 2250, 1125, 75, 4500),
    'NVIDIA GB200': (2500, 2500, 1250, 80, 5000),
    'NVIDIA GB300': (2500, 2500, None, None, None),
    'AMD Instinct MI250X': (383 / 2, 383 / 2, None, 95.7 / 2, None),  # one of two dies
    'AMD Instinct MI300X': (1307, 1307, 653.7, 163.4, 2615),
    'AMD Instinct MI325X': (1307, 1307, None, None, None),
    'AMD Instinct MI355X': (2500, 2500, None, None, None),
}
# Each looks like one of the above and is something else.
UNKNOWN = [
    'NVIDIA A100-SXM4-80GB MIG 1g.10gb',
    'NVIDIA H100 80GB HBM3 MIG 3g.40gb',
    'NVIDIA GeForce RTX 3090 Ti',
    'NVIDIA GeForce RTX 4090 D',
    'NVIDIA GeForce RTX 4090 Laptop GPU',
    'NVIDIA GeForce RTX 5090 Laptop GPU',
    'NVIDIA RTX A4000',
    'NVIDIA RTX 6000 Ada Generation',
    'NVIDIA A10G',
    'NVIDIA A10-24Q',
    'NVIDIA A800-SXM4-80GB',
    'NVIDIA T400 4GB',
    'NVIDIA L40',
    'NVIDIA H800 PCIe',
    'Tesla V100S-PCIE-32GB',
    'GRID A100-40C',
    'AMD Instinct MI300A',
    'AMD Radeon Graphics',
    'NVIDIA',
    '',
]


@pytest.mark.parametrize('name', KNOWN)
def test_peak_of_known_device(name):
    found = [peak_for_name(name, c) for c in ('bf16', 'fp16', 'tf32', 'fp32', 'fp8')]
    assert tuple(pair and pair[0] for pair in found) == pytest.approx(KNOWN[name])
    assert all(pair is None or pair[1] for pair in found)  # each figure has a source


@pytest.mark.parametrize('name', UNKNOWN)
def test_lookalikes_have_no_peak(name):
    for column in ('bf16', 'fp16', 'tf32', 'fp32', 'fp8'):
        assert peak_for_name(name, column) is None


def test_every_listed_device_is_tested():
    tested = {peak_for_name(name, 'fp16') for name in KNOWN}
    listed = {(peaks[1], source) for _, peaks, source in gpu_specs._PEAKS}
    assert tested == listed


NO_TF32 = ('V100', 'T4', 'MI250X')


@pytest.mark.parametrize('name', KNOWN)
def test_columns_have_hardware_ratios(name):
    """What a sparse, a vector or a misplaced figure would break: TF32 at half of bfloat16's rate,
    no slower than float32, float8 at twice."""
    bf16, fp16, tf32, fp32, fp8 = KNOWN[name]
    assert fp16 and bf16 in (None, fp16)
    assert (tf32 is None) == any(part in name for part in (*NO_TF32, 'GB300', 'MI325', 'MI355'))
    if tf32:
        assert tf32 == pytest.approx(bf16 / 2, rel=0.015) and tf32 >= fp32
    if fp8:
        assert fp8 == pytest.approx(2 * bf16, rel=0.015)


@pytest.mark.parametrize('name', KNOWN)
def test_float32_plan_uses_peak_of_run(name):
    """`hardware.tune` lets torch take TF32; hardware without it has its float32 rate."""
    _, _, tf32, fp32, _ = KNOWN[name]
    expected = fp32 if any(part in name for part in NO_TF32) else tf32
    assert peak_of_products(name, 'float32', tf32=True).tflops == (
        None if expected is None else pytest.approx(expected)
    )
    assert peak_of_products(name, 'float32', tf32=False).tflops == (
        None if fp32 is None else pytest.approx(fp32)
    )


def test_bfloat16_is_refused_only_without_hardware():
    lacking = {name for name in gpu_specs._BY_NAME if not gpu_specs._multiplies(name, 'bf16')}
    assert lacking == {'V100 SXM2', 'V100 SXM3', 'V100 PCIE', 'T4'}
