"""components/gated_norm.py: against a plain formula in double precision and transformers' norms."""

import pytest
import torch

from components.gated_norm import GatedRMSNorm

pytestmark = pytest.mark.usefixtures('one_thread')

EPS = 1e-3
# width, group, gate_first, shape before the last dimension
CASES = [(6, None, False, (2, 5)), (6, None, True, (2, 5)), (6, 3, True, (4,)), (6, 2, False, ())]


def gated_norm(width, group, gate_first) -> GatedRMSNorm:
    norm = GatedRMSNorm(width, EPS, group, gate_first).double()
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    return norm


def inputs(*shape: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, gate = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_(), gate.to(dtype).requires_grad_()]


def by_formula(norm: GatedRMSNorm, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """One group of dimensions after the other."""
    swish = gate / (1 + torch.exp(-gate))
    x = x * swish if norm.gate_first else x
    groups = []
    for group in x.split(norm.group, dim=-1):
        mean_square = sum(group[..., i] ** 2 for i in range(norm.group)) / norm.group
        groups.append(group / (mean_square[..., None] + EPS) ** 0.5)
    y = norm.weight * torch.cat(groups, dim=-1)
    return y if norm.gate_first else y * swish


@pytest.mark.parametrize('width, group, gate_first, shape', CASES)
def test_equals_the_formula(width, group, gate_first, shape):
    norm, (x, gate) = gated_norm(width, group, gate_first), inputs(*shape, width)
    y, expected = norm(x, gate), by_formula(norm, x, gate)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(norm(x, gate), y)
    leaves = (x, gate, norm.weight)
    weights = torch.rand_like(y, generator=torch.Generator().manual_seed(2))
    for actual, correct in zip(
        torch.autograd.grad(y, leaves, weights), torch.autograd.grad(expected, leaves, weights)
    ):
        assert torch.allclose(actual, correct, rtol=1e-12, atol=1e-12)


def of_transformers(name: str, norm: GatedRMSNorm) -> torch.nn.Module:
    if name == 'Qwen3Next':
        modeling = pytest.importorskip('transformers.models.qwen3_next.modeling_qwen3_next')
        other = modeling.Qwen3NextRMSNormGated(norm.weight.numel(), eps=EPS)
    elif name == 'Mamba2':
        modeling = pytest.importorskip('transformers.models.mamba2.modeling_mamba2')
        other = modeling.MambaRMSNormGated(norm.weight.numel(), norm.group, eps=EPS)
    other.load_state_dict(norm.state_dict())
    return other


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name, group', [('Qwen3Next', None), ('Mamba2', None), ('Mamba2', 3)])
def test_equals_the_norms_of_transformers(name, group, dtype):
    norm = gated_norm(6, group, gate_first=name == 'Mamba2').float()
    x, gate = inputs(2, 5, 6, dtype=dtype)
    y, expected = norm(x, gate), of_transformers(name, norm)(x, gate)
    # They round to bf16 before the weight, and Mamba-2's returns fp32.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-6
    assert torch.allclose(y.float(), expected.float(), rtol=tolerance, atol=tolerance)
    assert y.dtype == dtype
    for actual, correct in zip(
        torch.autograd.grad(y.float().sum(), (x, gate)),
        torch.autograd.grad(expected.float().sum(), (x, gate)),
    ):
        assert torch.allclose(actual, correct, rtol=tolerance, atol=tolerance)


def test_extreme_gates_have_finite_gradients():
    norm = gated_norm(6, None, True).float()
    x = torch.zeros(3, 6, requires_grad=True)
    gate = torch.tensor([-1e4, 0.0, 1e4])[:, None].expand(3, 6).clone().requires_grad_()
    norm(x, gate).sum().backward()
    assert x.grad.isfinite().all() and gate.grad.isfinite().all()


def test_only_inputs_are_kept_for_the_backward_pass():
    norm, (x, gate) = gated_norm(6, None, False), inputs(50, 6)
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        norm(x, gate)
    assert sum(saved.values()) <= x.nbytes + gate.nbytes + norm.weight.nbytes


def test_compiles_without_breaks():
    torch._dynamo.reset()
    norm, (x, gate) = gated_norm(6, 3, True), inputs(2, 5, 6)
    compiled = torch.compile(norm, fullgraph=True, backend='aot_eager')
    y, expected = compiled(x, gate), norm(x, gate)
    assert torch.allclose(y, expected)
    assert torch.allclose(
        torch.autograd.grad(y.sum(), norm.weight)[0],
        torch.autograd.grad(expected.sum(), norm.weight)[0],
    )
