"""Parts of the model on a GPU beside plain PyTorch: loss, attention, experts, sampling."""

import pytest
import torch
import torch.nn.functional as F
from helpers.one_device import HAS_CUDA, each, no_waits

from benchmarks.gpu_workloads import kernels_of, settings_of
from components import linear_cross_entropy as loss_module
from components.linear_cross_entropy import linear_cross_entropy
from components.moe import grouped_mm
from inference.sampling import Sampler
from model_builder import build_model

IGNORED = -100
# What makes an attention mask or score differ from plain causality.
ATTENTION = {
    'causal': {},
    'grouped': {'use_gqa': True, 'num_kv_heads': 2},
    'latent': {'attention_type': 'mla'},
    'window': {'sliding_window': 40},
    'documents': {'document_mask': True, 'end_of_text': 0},
    'alibi': {'position_encoding': 'alibi'},
    'softcap': {'attention_softcap': 20.0},
    'learned bias': {'position_encoding': 't5_relative', 'sliding_window': 40},
}
# Parts of the names of kernels and operations that attention by each backend runs.
KERNELS = {
    'sdpa': ('flash', 'fmha', 'sdpa', 'attention'),
    'flex': ('flex', 'triton_tem'),
    'manual': ('mm', 'gemm', 'cutlass'),
}


@pytest.mark.gpu
def test_there_is_a_gpu():
    """The one line that a summary has where the tests of this folder ran on a CPU only."""
    if not HAS_CUDA:
        pytest.skip('no CUDA device: the tests in tests/gpu ran on a CPU only')


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('softcap', [None, 20.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_loss_equals_cross_entropy(device, dtype, softcap, compiled, monkeypatch):
    """Over several chunks; some targets are ignored."""
    monkeypatch.setattr(loss_module, 'CUDA_CHUNK_BYTES', 2**28)
    rows, vocabulary, width = (9000, 50304, 256) if device.type == 'cuda' else (40, 96, 16)
    hidden = torch.randn(rows, width, device=device, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) * 0.1).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    targets[::7] = IGNORED
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = F.linear(hidden, weight)
        if softcap:
            logits = softcap * torch.tanh(logits.float() / softcap)
        expected = F.cross_entropy(logits.float(), targets, reduction='sum')
        expected_gradients = torch.autograd.grad(expected, (hidden, weight))
        loss = linear_cross_entropy(hidden, weight, targets, softcap, IGNORED, compiled)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2  # TF32 products in fp32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance / 10)
    for gradient, other in zip(gradients, expected_gradients):
        assert relative(gradient, other) < tolerance


@pytest.mark.parametrize('kind', ATTENTION)
def test_attention_equals_written_out_attention(device, kind):
    """The backend that the device derives beside `manual`, in bfloat16, with its gradient."""
    options = {'n_layer': 1, 'n_head': 4, 'n_embd': 64, 'block_size': 192, 'vocab_size': 64}
    options |= {'arch_preset': 'custom', 'bias': False, **ATTENTION[kind]}
    derived = settings_of(device, **options).architecture
    manual = settings_of(device, **options, attention_backend='manual').architecture
    tokens = torch.randint(0, 64, (2, 192), generator=torch.Generator().manual_seed(0)).to(device)
    results = []
    for config in (manual, derived):
        model = build_model(config, device, 1)

        def step(model=model):
            model.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16):
                loss, _, _ = model(tokens, tokens)
            loss.backward()
            return loss

        loss = step()
        weight = model.blocks[0].attention.output.weight
        results.append((loss.detach(), weight.grad))
        names = kernels_of(device, step).names
        parts = KERNELS[config.attention_backend]
        assert any(part in name.lower() for name in names for part in parts), names
    for value, expected in zip(*reversed(results)):
        assert relative(value, expected) < 2e-2


@each('dtype', ('bfloat16', 'float32'), dry=('float32',))
def test_experts_without_tokens(device, dtype):
    """Products of groups, some of them empty, in memory that held something else before."""
    sizes = [300, 0, 500, 1, 0, 223, 1024, 0]
    kind = getattr(torch, dtype)
    ends = torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)
    shape = (len(sizes), 64, 96)
    leftovers = [torch.full(shape, float('nan'), device=device, dtype=kind) for _ in range(4)]
    del leftovers
    a = torch.randn(sum(sizes), 96, device=device, dtype=kind, requires_grad=True)
    b = torch.randn(shape, device=device, dtype=kind, requires_grad=True)
    y = grouped_mm(a, b.mT, ends)
    y.float().square().sum().backward()
    groups = a.detach().split(sizes)
    expected = torch.cat([rows.float() @ w.float().T for rows, w in zip(groups, b.detach())])
    assert relative(y, expected) < 2e-2
    for number, rows in enumerate(groups):
        gradient = 2 * expected.split(sizes)[number].T @ rows.float()
        assert relative(b.grad[number], gradient) < 2e-2 if len(rows) else not b.grad[number].any()
    assert a.grad.isfinite().all()


def test_deterministic_sampling_equals_free_sampling(device):
    logits = torch.randn(4, 1000, device=device)
    tokens = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        generator = torch.Generator().manual_seed(1)
        tokens.append(Sampler(1000, top_p=0.9, top_k=50, generator=generator)(logits))
    assert torch.equal(*tokens)


def test_head_and_loss_do_not_wait(device):
    hidden = torch.randn(64, 16, device=device, requires_grad=True)
    weight = torch.randn(96, 16, device=device, requires_grad=True)
    targets = torch.randint(0, 96, (64,), device=device)
    for checked in (False, True):  # the first call may compile
        with no_waits(device) if checked else torch.enable_grad():
            linear_cross_entropy(hidden, weight, targets, None, IGNORED, compiled=True).backward()
