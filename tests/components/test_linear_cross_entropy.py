"""components/linear_cross_entropy.py: loss and gradients against torch's, with different chunks."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from components import linear_cross_entropy as module
from components.linear_cross_entropy import cross_entropy_, linear_cross_entropy

IGNORED = -100


def problem(count=37, width=12, vocabulary=29, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(count, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (count,))
    targets[::5] = IGNORED
    return hidden, weight, targets


def reference_loss(hidden, weight, targets, softcap):
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction='sum', ignore_index=IGNORED)


@pytest.fixture(params=[(2**29, 2**22), (29 * 4 * 8, 29 * 4 * 3), (1, 1)], ids=['1', '5', '37'])
def chunks(request, monkeypatch):
    """One chunk, five chunks, and a chunk per row."""
    monkeypatch.setitem(module.CHUNK_BYTES, 'cpu', request.param[0])
    monkeypatch.setitem(module.SCRATCH_BYTES, 'cpu', request.param[1])


@pytest.mark.parametrize('softcap', [None, 2.0])
def test_loss_and_gradients_match_reference(chunks, softcap):
    hidden, weight, targets = problem()
    expected = reference_loss(hidden, weight, targets, softcap)
    gradients = torch.autograd.grad(0.37 * expected, (hidden, weight))
    actual = linear_cross_entropy(hidden, weight, targets, softcap, IGNORED)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(0.37 * actual, (hidden, weight)), gradients)
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, targets, softcap, IGNORED)
    assert without == actual and not without.requires_grad


def test_gradients_only_where_needed(chunks):
    hidden, weight, targets = problem()
    for frozen, free in ((hidden, weight), (weight, hidden)):
        (expected,) = torch.autograd.grad(reference_loss(hidden, weight, targets, None), free)
        frozen.requires_grad_(False)
        actual = linear_cross_entropy(hidden, weight, targets, None, IGNORED)
        torch.testing.assert_close(torch.autograd.grad(actual, free)[0], expected)
        frozen.requires_grad_(True)


def test_loss_without_targets_is_zero(chunks):
    hidden, weight, _ = problem()
    loss = linear_cross_entropy(hidden, weight, torch.full((37,), IGNORED), None, IGNORED)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_error_is_that_of_torch(chunks, dtype):
    hidden, weight, targets = problem(width=64)
    with torch.no_grad():
        hidden *= 0.3
        weight *= 0.3
    true = torch.autograd.grad(reference_loss(hidden, weight, targets, None), (hidden, weight))
    errors = []
    for loss_of in (reference_loss, lambda *rest: linear_cross_entropy(*rest, IGNORED)):
        with torch.autocast('cpu', dtype):
            loss = loss_of(hidden, weight, targets, None)
        assert loss.dtype == torch.float32
        actual = torch.autograd.grad(loss, (hidden, weight))
        assert [gradient.dtype for gradient in actual] == [torch.float32] * 2
        errors.append(max((f - t).norm() / t.norm() for f, t in zip(actual, true)))
    assert errors[1] < 1.5 * errors[0] + 1e-6


def test_second_backward_is_rejected():
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets, None, IGNORED)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='differentiated only once'):
        loss.backward()


@pytest.mark.parametrize('softcap', [None, 2.0])
def test_cross_entropy_opcheck(softcap):
    logits, targets = torch.randn(7, 5), torch.randint(5, (7,))
    torch.library.opcheck(cross_entropy_, (logits, targets, torch.empty(3, 5), softcap, -1, True))


def test_no_tensor_as_large_as_all_logits(chunks):
    """The largest tensor, apart from inputs and outputs, is a chunk of logits."""
    hidden, weight, targets = problem(count=40, width=2, vocabulary=1000)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            actual = function(*args, **(kwargs or {}))
            if isinstance(actual, torch.Tensor):
                largest = max(largest, actual.untyped_storage().nbytes())
            return actual

    with Sizes():
        linear_cross_entropy(hidden, weight, targets, None, IGNORED).backward()
    whole = 40 * 1000 * 4
    assert largest <= max(min(module.CHUNK_BYTES['cpu'], whole), weight.nbytes)
