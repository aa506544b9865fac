"""Kernels of other packages: the arguments that they get, by stand-ins that compute plain loops."""

import pytest
import torch
from helpers.architectures import gradients, perturbed_model, random_tokens, tiny
from helpers.kernel_packages import (
    CASES,
    both_configs,
    both_modules,
    calls,
    kernels_on_cpu,
    results,
)
from helpers.mixers import random_inputs, random_starts, with_starts
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from components import mixer_kernels
from components.attention_inputs import AttentionInputs
from inference.generate import generate
from model_builder import build_model

every_case = pytest.mark.parametrize('case', CASES)


@every_case
def test_values_and_gradients_are_those_of_plain_pytorch(case):
    x = random_inputs(2, 70, 16)
    with kernels_on_cpu(torch.float64):
        plain, module = both_modules(case)
        assert not calls
        (expected, of_plain), (actual, of_kernel) = (
            results(each, x, AttentionInputs()) for each in (plain, module)
        )
        assert {name for name, _ in calls} == {CASES[case][2]}
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    for gradient, other in zip(of_kernel, of_plain, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-9)


def test_documents_of_mamba2():
    x, starts = random_inputs(2, 70, 16), random_starts(2, 70)
    with kernels_on_cpu(torch.float64):
        plain, module = both_modules('mamba2', document_mask=True, end_of_text=3)
        (expected, of_plain), (actual, of_kernel) = (
            results(each, x, with_starts(starts)) for each in (plain, module)
        )
        assert calls
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    for gradient, other in zip(of_kernel, of_plain, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-9)


@every_case
def test_dtypes_under_autocast(case):
    """Queries, keys and values in half precision; decays, steps and β in fp32. Mamba: all fp32."""
    x = random_inputs(2, 9, 16, dtype=torch.float32)
    with kernels_on_cpu(torch.bfloat16):
        plain, module = both_modules(case, torch.float32)
        with torch.no_grad():
            expected = plain(x, AttentionInputs())
            with torch.autocast('cpu', torch.bfloat16):
                actual = module(x, AttentionInputs()).float()
        ((_, dtypes),) = calls
        assert (actual - expected).norm() < 0.03 * expected.norm()
        calls.clear()
        module(x, AttentionInputs())  # in fp32
        assert bool(calls) == (case == 'mamba')
    wide = {'g', 'g_gamma', 'beta', 'dt', 'A', 'D'}
    for name, dtype in dtypes.items():
        half = name not in wide and case != 'mamba'
        assert dtype == (torch.bfloat16 if half else torch.float32), name


@every_case
@torch.no_grad()
def test_generation_has_no_kernel(case):
    """With the state of earlier tokens, plain PyTorch computes; the text is the same."""
    with kernels_on_cpu(torch.float32):
        _, config = both_configs(case)
        model = perturbed_model(config, factor=3.0).eval()
        tokens = random_tokens(config, batch=2)[:, :4]
        texts = []
        for cached in (True, False):
            calls.clear()
            texts.append(torch.stack(list(generate(model, tokens, 6, choose=greedy, cache=cached))))
            assert bool(calls) != cached
    assert torch.equal(*texts)


@every_case
def test_flops_are_counted(case):
    """FLOPs equal PyTorch's count, of the operator's formula."""
    with kernels_on_cpu(torch.float32):
        for length in (1, 65, 150):
            _, module = both_modules(case, torch.float32)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                module(torch.zeros(1, length, 16), AttentionInputs())
            assert counter.get_total_flops() == sum(module.flops(length, False).values())


@pytest.mark.parametrize('case', ['gated_deltanet', 'retnet', 'mamba2'])
def test_compiles_without_graph_breaks(case):
    with kernels_on_cpu(torch.float32):
        plain, config = both_configs(case, block_size=10, n_layer=1)
        models = [perturbed_model(each, factor=3.0) for each in (plain, config)]
        models[1].load_state_dict(models[0].state_dict())
        graphs, aot_eager = [], lookup_backend('aot_eager')

        def backend(graph, inputs):
            graphs.append(graph)
            return aot_eager(graph, inputs)

        torch.compiler.reset()
        for block in models[1].blocks:
            block.compile(backend=backend, fullgraph=True)
        tokens = random_tokens(config, batch=2)
        for model in models:
            model(tokens).square().mean().backward()
        torch.compiler.reset()
        assert graphs and calls
    expected = gradients(models[0])
    for name, gradient in gradients(models[1]).items():
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5 + 1e-3 * largest)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1)


# --- Mistakes -------------------------------------------------------------------------------------


def test_choices_that_have_no_kernel():
    with pytest.raises(UserError, match=r"no kernel for mixer='mamba2'. Set .*=torch or mamba_ssm"):
        tiny(mixer='mamba2', mixer_backend='fla')
    documents = {'document_mask': True, 'end_of_text': 3}
    with pytest.raises(UserError, match='cannot keep documents apart'):
        tiny(mixer='kda', mixer_backend='fla', **documents)
    assert tiny(mixer='mamba2', mixer_backend='mamba_ssm', **documents)
    assert tiny(mixer='attention+kda', mixer_backend='fla').name.count('FLA') == 1
    with pytest.raises(UserError, match='mixer_backend'):
        tiny(mixer='rg_lru', mixer_backend='fla')


def test_training_elsewhere_is_refused(monkeypatch):
    _, config = both_configs('kda')
    (problem,) = config.sentences('training_problems', 'cpu')
    assert problem == (
        "mixer_backend='fla' has kernels for CUDA, not for cpu. Set --mixer_backend=torch."
    )
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for version, installed in (((), 'it is not'), ((0, 5), '0.5 is')):
        monkeypatch.setattr(mixer_kernels, 'installed_version', lambda package, v=version: v)
        (problem,) = config.sentences('training_problems', 'cuda')
        assert problem == (
            f"mixer_backend='fla' needs flash-linear-attention 0.6 or later, and {installed} "
            "installed. Run pip install 'flash-linear-attention>=0.6', or set "
            '--mixer_backend=torch.'
        )
        assert build_model(config).blocks[0].mixers['kda'].kernel is None
    monkeypatch.setattr(mixer_kernels, 'installed_version', lambda package: (0, 6))
    assert build_model(config).blocks[0].mixers['kda'].kernel == 'kda'
    assert config.sentences('training_problems', 'cuda') == []
    (problem,) = config.sentences('dtype_problems', 'float32')
    assert '--dtype=bfloat16' in problem
    assert config.sentences('dtype_problems', 'bfloat16') == []
    _, mamba = both_configs('mamba')
    assert mamba.sentences('dtype_problems', 'float32') == []


def test_refusals_of_a_package_are_user_errors():
    with kernels_on_cpu(torch.float64):
        _, module = both_modules('kda')
        x = random_inputs(1, 4, 16)
        torch.use_deterministic_algorithms(True)
        try:
            with pytest.raises(UserError, match='remove deterministic'):
                module(x, AttentionInputs())
        finally:
            torch.use_deterministic_algorithms(False)

        def refuse(*inputs):
            raise AssertionError('head dimensions above 256.')

        broken = mixer_kernels.KERNELS['kda']._replace(run=refuse)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(mixer_kernels.KERNELS, 'kda', broken)
            with pytest.raises(UserError, match='head dimensions above 256'):
                module(x, AttentionInputs())
