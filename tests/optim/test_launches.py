"""Few kernels per update, which on a GPU take longer to start than to run, and equal results."""

import math

import pytest
import torch
import torch.distributed as dist
from helpers.device_waits import Operations
from helpers.optimizer_options import options
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from model_builder import ParameterGroup, Transformer, parameter_groups
from model_config import ModelArchitectureConfig
from optim import optimizers, step
from optim.optimizers import one_ahead, orthogonalize, zero_unless
from optim.step import GuardedOptimizer, element_sum, whole_buffers
from parallel.matrix_exchange import LocalMatrices, PendingExchange
from parallel.strategies import ParamShard, SingleProcess

CPU = torch.device('cpu')
PRODUCTS = ('bmm', 'baddbmm')
# Operations of an update without the products of the Newton–Schulz iteration, at any depth: those
# of the guarded step, and those of the optimizer alone.
OPERATIONS = {'adamw': (26, 9), 'muon': (100, 84), 'lion': (34, 17)}


@pytest.fixture
def as_on_gpu(monkeypatch):
    """The choices for a GPU: one kernel for the norms of all gradients, and joined small sums."""
    supported = 'torch.utils._foreach_utils._get_foreach_kernels_supported_devices'
    monkeypatch.setattr(supported, lambda: ['cpu'])
    monkeypatch.setattr(step, 'JOINED_ELEMENTS', {'cpu': step.JOINED_ELEMENTS['cuda']})


def llama(n_layer: int, optimizer: str, **architecture) -> GuardedOptimizer:
    config = ModelArchitectureConfig(
        arch_preset='llama',
        n_layer=n_layer,
        **{'n_head': 2, 'n_embd': 16, 'block_size': 8, 'vocab_size': 32, **architecture},
    )
    run = options(optimizer=optimizer, dtype='bfloat16')
    alone = SingleProcess(run, CPU)
    inner = alone.build_optimizer(parameter_groups(Transformer(config)), run)
    return GuardedOptimizer(inner, run, CPU, alone)


def launches(optimizer: GuardedOptimizer, measured: bool = False) -> tuple[int, int]:
    """Kernels of an update without, and with, the products."""
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    with Operations() as counted:
        optimizer.step(1e-3, torch.ones(()), measured)
    assert not counted.waits
    total = sum(count for name, count in counted.kernels.items() if '_record_function' not in name)
    return total - sum(counted.kernels[name] for name in PRODUCTS), total


@pytest.mark.parametrize('optimizer', OPERATIONS)
def test_launches_do_not_grow_with_the_number_of_layers(optimizer, as_on_gpu):
    few, all_kernels = launches(llama(12, optimizer))
    assert launches(llama(24, optimizer)) == (few, all_kernels)
    whole, alone = OPERATIONS[optimizer]
    assert 0.9 * whole <= few <= whole
    # A logged update: the joined elements, their sum, and the sum of sums.
    assert launches(llama(12, optimizer), measured=True)[0] == few + 4

    inner = llama(12, optimizer).inner
    for group in inner.param_groups:
        for key in group['params']:
            key.grad = torch.ones_like(key)
    inner.found_inf = torch.zeros(())
    with Operations() as counted:
        inner.step()
    ours = {k: n for k, n in counted.kernels.items() if k not in PRODUCTS and 'record' not in k}
    assert 0.9 * alone <= sum(ours.values()) <= alone
    fused = {'adamw': 3, 'muon': 2, 'lion': 0}[optimizer]
    assert counted.kernels['_fused_adamw_'] == fused  # one for each group


def test_one_iteration_for_projections_of_equal_shape():
    """Queries, keys and values of full heads are one batch; of grouped heads, two."""

    def products(**architecture) -> int:
        few, total = launches(llama(3, 'muon', n_head=4, n_embd=32, **architecture))
        return total - few

    stacks, of_each = 4, 3 * 5
    assert products() == stacks * of_each
    assert products(use_gqa=True, num_kv_heads=2) == (stacks + 1) * of_each


class _Pointers(TorchDispatchMode):
    """Addresses of the tensors of multi-tensor operations."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if '_foreach_' in function.name() or '_fused_' in function.name():
            lists = [a for a in args if isinstance(a, (list, tuple))]
            tensors = [t for tensors in lists for t in tensors if isinstance(t, torch.Tensor)]
            self.addresses += [t.data_ptr() for t in tensors if t.dim()]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('optimizer', OPERATIONS)
def test_views_are_aligned(optimizer):
    """Multi-tensor kernels read four numbers at a time if every tensor begins at 16 bytes."""
    guarded = llama(3, optimizer)
    for parameter in guarded.parameters:
        parameter.grad = torch.ones_like(parameter)
    with _Pointers() as pointers:
        guarded.step(1e-3, torch.ones(()), measured=True)
    assert len(pointers.addresses) > 3 * len(guarded.parameters)
    assert not any(address % 16 for address in pointers.addresses)


# --- Equal to an update of one parameter after the other ------------------------------------------

SHAPES = {'square': (6, 6), 'fused': (12, 6), 'grouped': (8, 6), 'experts': (3, 4, 6), 'gain': (6,)}
ROWS = {'square': (6,), 'fused': (4, 4, 4), 'grouped': (4, 2, 2), 'experts': (4,)}
DECAY = 0.1


def random(name: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 10 * list(SHAPES).index(name.rstrip('2')))
    return torch.randn(SHAPES[name.rstrip('2')], generator=generator)


def plain_lion(weight, momentum, gradient, rate, decay):
    update = torch.sign(gradient.lerp(momentum, 0.9)) * rate
    weight.mul_(1 - rate * decay).sub_(update)
    momentum.mul_(1 - torch.tensor(1 - 0.99)).add_(gradient * (1 - 0.99))


def plain_muon(rows, weight, momentum, gradient, rate, decay):
    momentum.lerp_(gradient, 1 - 0.95)
    nesterov = gradient.lerp(momentum, 0.95)
    directions = [
        torch.stack([orthogonalize(m[None], 5, torch.float32)[0] for m in part.flatten(0, -3)])
        .mul(0.2 * math.sqrt(max(part.shape[-2:])))
        .view(part.shape)
        for part in nesterov[None].split(rows, dim=-2)
    ]
    direction = torch.cat(directions, dim=-2)[0]
    weight.mul_(1 - rate * decay).sub_(direction * rate)


@pytest.mark.parametrize('elements', [2**26, 1])
@pytest.mark.parametrize('optimizer', ['muon', 'lion'])
def test_equals_one_parameter_after_the_other(optimizer, elements, monkeypatch):
    """Also where a step is skipped, and without a gradient. elements: updated at a time."""
    monkeypatch.setattr(optimizers, 'STACKED_ELEMENTS', elements)
    monkeypatch.setattr(optimizers, 'STEP_ELEMENTS', elements)
    names = ['square', 'fused', 'square2', 'grouped', 'experts', 'fused2', 'gain']
    weights = {name: torch.nn.Parameter(random(name, seed=len(name))) for name in names}
    matrices = [weights[name] for name in names[:-1]]
    groups = [
        ParameterGroup('matrices', matrices, True, rows=[ROWS[n.rstrip('2')] for n in names[:-1]]),
        ParameterGroup('not decayed', [weights['gain']], False, lr_scale=0.5),
    ]
    run = options(optimizer=optimizer, weight_decay=DECAY)
    inner = SingleProcess(run, CPU).build_optimizer(groups, run)
    expected = {name: weight.detach().clone() for name, weight in weights.items()}
    momenta = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    checked = names if optimizer == 'lion' else names[:-1]
    key = 'exp_avg' if optimizer == 'lion' else 'momentum_buffer'
    for number, skipped in enumerate((False, True, False, True, False)):
        rate = 0.1 / (number + 1)
        for group in inner.param_groups:
            group['lr'] = rate * group['lr_scale']
        inner.found_inf = torch.tensor(float(skipped))
        for name, weight in weights.items():
            absent = name == 'square2' and number == 2
            weight.grad = None if absent else random(name, seed=100 * number)
            if skipped:
                weight.grad.view(-1)[::3] = (math.nan, math.inf)[number // 2]
        gradients = {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
            for name, weight in weights.items()
            if weight.grad is not None or optimizer == 'muon'
        }
        inner.step()
        for name in checked:
            if not skipped and name in gradients:
                state = expected[name], momenta[name], gradients[name]
                scale, decay = (0.5, 0.0) if name == 'gain' else (1.0, DECAY)
                if optimizer == 'lion':
                    plain_lion(*state, rate * scale, decay)
                else:
                    plain_muon(ROWS[name.rstrip('2')], *state, rate * scale, decay)
            actual = weights[name].detach(), inner.state[weights[name]][key]
            tolerance = {'rtol': 0, 'atol': 2e-6 if optimizer == 'muon' else 1e-7}
            torch.testing.assert_close(actual, (expected[name], momenta[name]), **tolerance)
    assert all((weights[n] - random(n, seed=len(n))).abs().max() > 0.01 for n in checked)


def test_zero_unless():
    values = [torch.tensor([1.5, -0.0, math.nan]), torch.tensor([[math.inf, -math.inf]])]
    kept = [value.clone() for value in values]
    zero_unless(torch.ones(()), kept)
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(kept, values))
    zero_unless(torch.zeros(()), kept)
    assert all(not value.any() for value in kept)


# --- Muon's exchanges -----------------------------------------------------------------------------


def test_one_ahead():
    events = []

    def items():
        for number in range(3):
            events.append(f'begin {number}')
            yield number

    for number in one_ahead(items()):
        events.append(f'use {number}')
    assert events == ['begin 0', 'begin 1', 'use 0', 'begin 2', 'use 1', 'use 2']
    assert not list(one_ahead([])) and list(one_ahead([4])) == [4]


class _Recorded(LocalMatrices):
    """The exchange of one process, with a list of its events."""

    def __init__(self, owns: bool, elements: int = 36):
        self.owns, self.elements, self.events = owns, elements, []

    def start_gather(self, indices, shards):
        return self._started('gather', indices, shards if self.owns else [])

    def start_scatter_back(self, indices, matrices):
        shards = matrices if self.owns else [torch.ones(self.elements) for _ in indices]
        return self._started('scatter', indices, shards)

    def _started(self, kind, indices, tensors):
        self.events.append(f'start {kind} {indices.start}')
        return PendingExchange(
            lambda: self.events.append(f'wait {kind} {indices.start}') or tensors
        )


@pytest.mark.parametrize('owns', [True, False])
def test_exchanges_run_while_muon_computes(owns, monkeypatch):
    """The iteration of a stack, between its gather and its scatter, is under way together with the
    next gather and the previous scatter. A rank that owns no matrix takes part."""
    monkeypatch.setattr(optimizers, 'STACKED_ELEMENTS', 1)
    exchange = _Recorded(owns)
    monkeypatch.setattr(SingleProcess, 'matrix_exchange', lambda *arguments: exchange)
    weights = [torch.nn.Parameter(torch.ones(6, 6)) for _ in range(3)]
    groups = [
        ParameterGroup('matrices', weights, True, rows=[(6,)] * 3),
        ParameterGroup('rest', [torch.nn.Parameter(torch.ones(2))], False),
    ]
    run = options(optimizer='muon')
    inner = SingleProcess(run, CPU).build_optimizer(groups, run)
    for weight in weights:
        weight.grad = random('square', seed=1)
    for group in inner.param_groups:
        group['lr'] = 0.1
    inner.found_inf = torch.zeros(())
    inner.step()
    assert exchange.events == [
        *('start gather 0', 'start gather 1', 'wait gather 0', 'start scatter 0'),
        *('start gather 2', 'wait gather 1', 'start scatter 1', 'wait scatter 0'),
        *('wait gather 2', 'start scatter 2', 'wait scatter 1', 'wait scatter 2'),
    ]
    if not owns:  # the other ranks' directions arrive
        assert all(torch.allclose(w, torch.tensor(1 - 0.1 * 0.1 - 0.1)) for w in weights)


def test_shards_without_elements():
    """A rank may have no part of a matrix, or of all matrices of a stack."""
    weights = [torch.nn.Parameter(torch.ones(6, 6)) for _ in range(2)]
    rest = torch.nn.Parameter(torch.ones(2))
    groups = [
        ParameterGroup('matrices', weights, True, rows=[(6,)] * 2),
        ParameterGroup('rest', [rest], False),
    ]
    shards = {weight: torch.nn.Parameter(torch.zeros(0)) for weight in weights}
    for optimizer in ('muon', 'lion'):
        run = options(optimizer=optimizer)
        rank = SingleProcess(run, CPU)
        rank.shard = lambda weight: ParamShard(weight, 0, shards.get(weight, weight))
        rank.matrix_exchange = lambda *arguments: _Recorded(owns=False, elements=0)
        inner = rank.build_optimizer(groups, run)
        for gradient in (None, torch.zeros(0)):
            for shard in shards.values():
                shard.grad = gradient
            rest.grad = torch.ones(2)
            for group in inner.param_groups:
                group['lr'] = 0.1
            inner.found_inf = torch.zeros(())
            inner.step()
    assert torch.allclose(rest, torch.tensor(1 - 4 * 0.1)) and not any(map(len, shards.values()))


# --- The sum of the gradient ----------------------------------------------------------------------


@pytest.fixture
def process_group():
    dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_gradients_in_buckets_are_summed_by_bucket(process_group):
    model = torch.nn.Sequential(*(torch.nn.Linear(9, 9) for _ in range(5)))
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for _ in range(2):  # DDP builds its buckets anew after the first
        wrapped(torch.randn(3, 9)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    (flat,) = whole_buffers(gradients)
    assert flat.numel() == sum(gradient.numel() for gradient in gradients)
    expected = sum(gradient.double().sum() for gradient in gradients)
    assert element_sum(gradients).item() == pytest.approx(expected.item(), rel=1e-5)


def test_parts_of_a_buffer_are_summed_one_by_one():
    buffer = torch.arange(24.0)
    views = [buffer[:4], buffer[10:16].view(2, 3)]
    assert whole_buffers(views) == views or all(map(torch.equal, whole_buffers(views), views))
    assert element_sum(views) == buffer[:4].sum() + buffer[10:16].sum()


def test_small_gradients_are_joined(monkeypatch):
    tensors = [torch.randn(shape) for shape in ((3,), (40, 40), (4, 5), (50, 50))]
    expected = sum(tensor.double().sum() for tensor in tensors).item()
    for limit, sums in ((0, 5), (1000, 4), (10**6, 2)):
        monkeypatch.setattr(step, 'JOINED_ELEMENTS', {'cpu': limit})
        with Operations() as counted:
            total = element_sum(tensors)
        assert counted.kernels['sum'] == sums
        assert total.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
