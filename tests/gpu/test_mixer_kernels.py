"""Kernels of other packages on a GPU beside plain PyTorch, where they are installed."""

import pytest
import torch
from helpers.kernel_packages import CASES, both_configs, kernels_on_cpu
from helpers.one_device import CUDA

from common.architecture_options import MIXER_BACKEND_REGISTRY
from model_builder import build_model

SIZES = {'n_layer': 1, 'n_head': 4, 'n_embd': 256, 'block_size': 200, 'vocab_size': 64}


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.float() - expected.float()).norm() / expected.float().norm()).item()


def losses_and_gradients(config, device, weights, compiled):
    """Of the model in bfloat16, in fp32."""
    model = build_model(config, device, seed=1)
    model.load_state_dict(weights)
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (2, 200), generator=generator).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        loss, count, _ = model(tokens, tokens.roll(-1, dims=1))
    (loss / count).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return (loss / count).detach(), {k: g for k, g in gradients.items() if g is not None}


def skip_without(backend: str) -> None:
    if not MIXER_BACKEND_REGISTRY[backend].is_installed():
        pytest.skip(f'{backend} is not installed')


def check(case, device, compiled, **values):
    plain, kernels = both_configs(case, **SIZES, **values)
    weights = build_model(plain, device, seed=1).state_dict()
    expected, of_plain = losses_and_gradients(plain, device, weights, compiled=False)
    actual, of_kernel = losses_and_gradients(kernels, device, weights, compiled)
    assert abs(actual - expected) < 2e-3 * expected
    assert of_kernel.keys() == of_plain.keys()
    for name, gradient in of_plain.items():
        assert relative(of_kernel[name], gradient) < 0.1, name


@pytest.mark.optional
@CUDA
@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('case', [case for case in CASES if 'odd' not in case])
def test_kernels_on_a_gpu(case, compiled):
    skip_without(CASES[case][0])
    torch.compiler.reset()
    check(case, torch.device('cuda'), compiled)


@pytest.mark.optional
@CUDA
def test_documents_on_a_gpu():
    skip_without('mamba_ssm')
    check('mamba2', torch.device('cuda'), False, document_mask=True, end_of_text=3)


@pytest.mark.parametrize('case', ['gated_deltanet', 'mamba'])
def test_dry(case, one_thread):
    """The same test with the stand-ins."""
    with kernels_on_cpu(torch.bfloat16):
        check(case, torch.device('cpu'), compiled=False)
