"""components/linear_cross_entropy.py: loss and gradients against torch's, with different chunks."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from common import gpu_specs, hardware
from components import linear_cross_entropy as module
from components.linear_cross_entropy import (
    LossMethod,
    cross_entropy_,
    cuda_method,
    fused_cross_entropy_,
    linear_cross_entropy,
    loss_method,
)

IGNORED = -100


def problem(count=37, width=12, vocabulary=29, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(count, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (count,))
    targets[::5] = IGNORED
    return hidden, weight, targets


def reference_loss(hidden, weight, targets, softcap, bias=0.0):
    logits = (hidden @ weight.T + bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction='sum', ignore_index=IGNORED)


CHUNKS = {
    '1': LossMethod(2**29, 2**22),
    '5': LossMethod(29 * 4 * 8, 29 * 4 * 3),
    '37': LossMethod(1, 1),
}
# As on a CUDA device, without products that add to an fp32 matrix, which a CPU does not have.
FUSED = {'5 fused': LossMethod(29 * 4 * 8, 0, fused_cross_entropy_)}
ALL = {**CHUNKS, **FUSED}


@pytest.fixture(params=CHUNKS.values(), ids=CHUNKS)
def chunks(request, monkeypatch):
    """One chunk, five chunks, and a chunk per row."""
    monkeypatch.setattr(module, 'CPU_METHOD', request.param)


@pytest.fixture(params=ALL.values(), ids=ALL)
def methods(request, monkeypatch):
    monkeypatch.setattr(module, 'CPU_METHOD', request.param)


@pytest.mark.parametrize('softcap', [None, 2.0])
def test_loss_and_gradients_match_reference(methods, softcap):
    hidden, weight, targets = problem()
    expected = reference_loss(hidden, weight, targets, softcap)
    gradients = torch.autograd.grad(0.37 * expected, (hidden, weight))
    actual = linear_cross_entropy(hidden, weight, targets, softcap, IGNORED)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(0.37 * actual, (hidden, weight)), gradients)
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, targets, softcap, IGNORED)
    assert without == actual and not without.requires_grad


@pytest.mark.parametrize('softcap', [None, 2.0])
def test_bias_of_the_logits(methods, softcap):
    hidden, weight, targets = problem()
    bias = torch.randn(29, requires_grad=True)
    leaves = hidden, weight, bias
    expected = reference_loss(hidden, weight, targets, softcap, bias)
    gradients = torch.autograd.grad(0.37 * expected, leaves)
    actual = linear_cross_entropy(hidden, weight, targets, softcap, IGNORED, bias=bias)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(0.37 * actual, leaves), gradients)
    bias.requires_grad_(False)
    frozen = linear_cross_entropy(hidden, weight, targets, softcap, IGNORED, bias=bias)
    torch.testing.assert_close(torch.autograd.grad(0.37 * frozen, leaves[:2]), gradients[:2])


def test_gradients_only_where_needed(methods):
    hidden, weight, targets = problem()
    for frozen, free in ((hidden, weight), (weight, hidden)):
        (expected,) = torch.autograd.grad(reference_loss(hidden, weight, targets, None), free)
        frozen.requires_grad_(False)
        actual = linear_cross_entropy(hidden, weight, targets, None, IGNORED)
        torch.testing.assert_close(torch.autograd.grad(actual, free)[0], expected)
        frozen.requires_grad_(True)


def test_loss_without_targets_is_zero(methods):
    hidden, weight, _ = problem()
    loss = linear_cross_entropy(hidden, weight, torch.full((37,), IGNORED), None, IGNORED)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_error_is_that_of_torch(methods, dtype):
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
    assert largest <= max(min(module.CPU_METHOD.chunk_bytes, whole), weight.nbytes)


# --- On a CUDA device -----------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def chunk_of_logits(dtype):
    torch.manual_seed(0)
    targets = torch.randint(97, (33,))
    targets[::5] = IGNORED
    return (3 * torch.randn(33, 97)).to(dtype), targets


@pytest.mark.parametrize('into_gradient', [True, False])
@pytest.mark.parametrize('softcap', [None, 2.0])
@pytest.mark.parametrize('dtype', DTYPES)
def test_fused_function_equals_the_operator(dtype, softcap, into_gradient):
    logits, targets = chunk_of_logits(dtype)
    expected, actual = logits.clone(), logits.clone()
    rest = softcap, IGNORED, into_gradient
    loss = cross_entropy_(expected, targets, torch.empty(4, 97), *rest)
    losses = fused_cross_entropy_(actual, targets, *rest)
    torch.testing.assert_close(losses.sum(), loss)
    assert not losses[targets == IGNORED].any() and losses.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
    assert torch.equal(actual, logits) is not into_gradient


@pytest.mark.slow  # Inductor compiles for about 10 s
def test_compiled_function_equals_the_operator():
    logits, targets = chunk_of_logits(torch.bfloat16)
    expected, actual = logits.clone(), logits.clone()
    loss = cross_entropy_(expected, targets, torch.empty(4, 97), 2.0, IGNORED, True)
    compiled = torch.compile(fused_cross_entropy_, dynamic=False)
    with torch.no_grad():
        losses = compiled(actual, targets, 2.0, IGNORED, True)
    torch.testing.assert_close(losses.sum(), loss)
    torch.testing.assert_close(actual, expected)


def test_compiled_function_has_a_graph_for_training_and_one_for_evaluation(monkeypatch):
    counter = CompileCounterWithBackend('eager')
    compiled = torch.compile(fused_cross_entropy_, dynamic=False, backend=counter)
    method = LossMethod(29 * 4 * 8, 0, compiled)
    monkeypatch.setattr(module, 'CPU_METHOD', method)
    hidden, weight, targets = problem(count=40)
    assert method.chunk_rows(40, 29 * 4) == 8
    for _ in range(2):
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, targets, 2.0, IGNORED)
        linear_cross_entropy(hidden, weight, targets, 2.0, IGNORED).backward()
    assert counter.frame_count == 2


def test_method_follows_device_and_compilation(monkeypatch):
    monkeypatch.setattr(hardware, 'total_memory', lambda device: 85e9)
    for compiled in (False, True):
        assert loss_method(torch.device('cpu'), compiled) is module.CPU_METHOD
        method = loss_method(torch.device('cuda:3'), compiled)
        assert method.chunk_bytes == 2**31 and method.adds_to_fp32
        assert (method.fused is not None) is compiled


@pytest.mark.parametrize('limit', [1, 50, 700, 4000, 2**20])
def test_chunks_of_the_compiled_function_are_equal(limit):
    for rows in (12 * 1024, 1000, 96, 7, 1):
        method = LossMethod(limit * 10, 0, fused_cross_entropy_)
        chunk_rows = method.chunk_rows(rows, 10)
        assert chunk_rows == rows or limit / 4 < chunk_rows <= limit
        assert rows % chunk_rows == 0 or all(rows % n for n in range(2, rows))


# Memory of GPUs as torch.cuda reports it.
REPORTED = {'T4': 15.6e9, 'V100-PCIE-16GB': 16.9e9, 'RTX 4090': 25.4e9, 'A100-40GB': 42.3e9}
REPORTED |= {'A100-80GB': 85.1e9, 'H100': 85.0e9, 'H200': 150e9, 'B200': 191e9}


def test_planned_chunk_is_that_of_the_gpu():
    for name, reported in REPORTED.items():
        nominal = gpu_specs.find_gpu(name).memory_gb * 1e9
        chunk = cuda_method(nominal, None).chunk_bytes
        assert chunk == cuda_method(reported, None).chunk_bytes, name
        assert chunk == 2**31 or 1 / 64 < chunk / nominal <= 1 / 32


class Operations(TorchDispatchMode):
    """Counts operations, and the largest tensor in fp32."""

    def __init__(self):
        super().__init__()
        self.count, self.largest = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.count[function.name()] += 1
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize('dtype', DTYPES)
def test_operations_of_a_chunk_on_cuda(dtype, monkeypatch):
    """On the meta device, with one operation in place of the compiled function's one kernel."""

    def kernel(logits, *_):
        return logits.new_empty(len(logits), dtype=torch.float32)

    rows, vocabulary, width = 1024, 50304, 64
    method = cuda_method(80e9, kernel)._replace(chunk_bytes=rows * vocabulary * dtype.itemsize)
    monkeypatch.setattr(module, 'loss_method', lambda device, compiled: method)
    total = {}
    for chunks in (1, 3):
        hidden = torch.empty(chunks * rows, width, device='meta', dtype=dtype, requires_grad=True)
        weight = torch.empty(vocabulary, width, device='meta', dtype=dtype, requires_grad=True)
        targets = torch.empty(chunks * rows, device='meta', dtype=torch.int64)
        with Operations() as operations:
            linear_cross_entropy(hidden, weight, targets, 2.0, IGNORED)
        total[chunks] = operations.count
        if dtype != torch.float32:  # no scores in fp32
            assert operations.largest == vocabulary * width
    per_chunk = total[3] - total[1]
    assert not {'aten::_local_scalar_dense', 'aten::item'} & total[3].keys()
    assert sum(per_chunk.values()) <= 2 * 6  # for two more chunks
    sums = 'aten::addmm.out' if dtype == torch.float32 else 'aten::addmm.dtype_out'
    assert per_chunk[sums] == 2 and per_chunk['aten::mm.out'] == 4


ALLOCATIONS = {'empty', 'empty_like', 'new_empty', 'detach', 'split', 'promote_types'}


class Launches(TorchDispatchMode):
    """Counts kernels, and the bytes of tensors as wide as the vocabulary that they move."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.count, self.bytes = vocabulary, 0, 0

    def wide(self, *tensors):
        matrices = [t for t in tensors if isinstance(t, torch.Tensor) and t.dim() == 2]
        return sum(t.nbytes for t in matrices if t.size(1) == self.vocabulary)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name().removeprefix('aten::').partition('.')[0]
        if function.is_view or name in ALLOCATIONS:
            return result
        self.count += 1
        if name not in ('mm', 'addmm', 'gather', 'scatter_add_'):  # the last two touch few values
            self.bytes += self.wide(*args[name == 'copy_' :], result)
        return result


@pytest.mark.parametrize(
    ('compiled', 'softcap', 'launches', 'bytes_per_logit'),
    [(True, 2.0, 11, 0), (False, None, 409, 44), (False, 2.0, None, 96)],
)
def test_documented_launches_and_bytes(compiled, softcap, launches, bytes_per_logit, monkeypatch):
    """As in docs/performance.md; the compiled kernel, which is not run here, moves 6 bytes."""
    tokens, vocabulary, width, meta = 12 * 1024, 50304, 768, torch.device('meta')
    method = cuda_method(80e9, lambda logits, *_: torch.zeros(len(logits), device=meta))
    method = method if compiled else method._replace(fused=None)
    monkeypatch.setattr(module, 'loss_method', lambda device, compiled: method)
    monkeypatch.setattr(module, 'matmul_dtype', lambda weight: torch.bfloat16)
    monkeypatch.setattr(module, 'cross_entropy_', cross_entropy_._init_fn)
    hidden = torch.empty(tokens, width, device=meta, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(vocabulary, width, device=meta, requires_grad=True)
    targets = torch.empty(tokens, device=meta, dtype=torch.int64)
    with Launches(vocabulary) as counted:
        linear_cross_entropy(hidden, weight, targets, softcap, IGNORED).backward()
    assert launches is None or counted.count == launches
    assert counted.bytes == bytes_per_logit * tokens * vocabulary


def test_products_are_added_in_fp32(monkeypatch):
    """Where torch can, one call for each chunk; the first one ignores what is in the memory."""
    real, calls = torch.addmm, []

    def addmm(total, a, b, out_dtype=None, *, beta, out):
        calls.append((a.dtype, out_dtype))
        if beta == 0:
            total.fill_(math.nan)
        return real(total, a.float(), b.float(), beta=beta, out=out)

    monkeypatch.setattr(torch, 'addmm', addmm)
    method = CHUNKS['5']._replace(adds_to_fp32=True)
    monkeypatch.setattr(module, 'CPU_METHOD', method)
    hidden, weight, targets = problem()
    expected = torch.autograd.grad(reference_loss(hidden, weight, targets, None), weight)
    with torch.autocast('cpu', torch.bfloat16):
        actual = linear_cross_entropy(hidden, weight, targets, None, IGNORED)
    gradients = torch.autograd.grad(actual, weight)
    assert calls == [(torch.bfloat16, torch.float32)] * len(calls) and 2 < len(calls) < 6
    torch.testing.assert_close(gradients, expected, rtol=0.05, atol=0.05)


def test_fp16_gradient_of_many_rows_does_not_overflow(methods):
    """2/3 · 100 · 2000 is more than the largest fp16 number, 65504."""
    hidden, weight = torch.full((2000, 8), 100.0), torch.zeros(3, 8, requires_grad=True)
    with torch.autocast('cpu', torch.float16):
        loss = linear_cross_entropy(
            hidden, weight, torch.zeros(2000, dtype=torch.int64), None, IGNORED
        )
    (1e-3 * loss).backward()
    expected = torch.tensor([[-2 / 3], [1 / 3], [1 / 3]]).expand(3, 8) * 200
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=0)
