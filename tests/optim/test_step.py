"""optim/step.py: the guarded step of each optimizer."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers.optimizer_options import RUN, options
from torch.utils._python_dispatch import TorchDispatchMode

from model_builder import ParameterGroup
from optim.schedules import learning_rate_at
from optim.step import GuardedOptimizer
from parallel import sharded_state
from parallel.strategies import SingleProcess
from training_config import (
    OPTIMIZER_REGISTRY,
)

CPU = torch.device('cpu')
FINITE = torch.tensor(1.0)
NAN = torch.tensor(math.nan)


SHAPES = ((7, 5), (5,), (3, 4, 2))


def guarded_optimizer(**changed) -> GuardedOptimizer:
    """An optimizer of a matrix, a stack of three, and a parameter without weight decay."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES)
    groups = [
        ParameterGroup('matrices', [a, c], True, rows=[(7,), (4,)]),
        ParameterGroup('not decayed', [b], False, lr_scale=0.5),
    ]
    run = options(**changed)
    parallel = SingleProcess(run, CPU)
    return GuardedOptimizer(parallel.build_optimizer(groups, run), run, CPU, parallel)


def module_of(optimizer: GuardedOptimizer) -> torch.nn.Module:
    """An object with the optimizer's parameters as named parameters."""
    return torch.nn.ParameterList(optimizer.parameters)


def gradients_of(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator) + 0.3 for shape in (SHAPES[0], *SHAPES[:0:-1])]


def backward(optimizer: GuardedOptimizer, gradients: list[torch.Tensor]) -> None:
    """Sets gradients through the loss Σ parameter · gradient, scaled if there is a scaler."""
    optimizer.backward(sum((p * g).sum() for p, g in zip(optimizer.parameters, gradients)))


def snapshot(optimizer: GuardedOptimizer) -> list[torch.Tensor]:
    """Copies of the weights and their optimizer state."""
    optimizer_state = [t for p in optimizer.parameters for t in optimizer.inner.state[p].values()]
    return [tensor.detach().clone() for tensor in (*optimizer.parameters, *optimizer_state)]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


@pytest.mark.parametrize('grad_clip', [0.0, 0.5, 1e6])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_gradient_statistics_before_clipping(grad_clip, dtype):
    optimizer = guarded_optimizer(grad_clip=grad_clip, dtype=dtype)
    backward(optimizer, gradients_of(0))
    backward(optimizer, gradients_of(1))  # a second micro-batch
    sums = optimizer.step(1e-3, FINITE, measured=True)
    first, second = gradients_of(0), gradients_of(1)
    flat = np.concatenate([(a + b).numpy().ravel() for a, b in zip(first, second)])
    flat = flat.astype(np.float64)
    actual = optimizer.statistics(sums.norm.item(), sums.total.item())
    assert actual == pytest.approx(
        {'norm': np.sqrt((flat**2).sum()), 'mean': flat.mean(), 'std': flat.std()}, rel=1e-5
    )


def test_parameter_without_gradient_counts_as_zeros():
    optimizer = guarded_optimizer()
    first = gradients_of(0)[0]
    (optimizer.parameters[0] * first).sum().backward()
    sums = optimizer.step(1e-3, FINITE, measured=True)
    flat = np.zeros(sum(math.prod(shape) for shape in SHAPES))
    flat[: first.numel()] = first.numpy().ravel()
    actual = optimizer.statistics(sums.norm.item(), sums.total.item())
    assert actual['mean'] == pytest.approx(flat.mean(), rel=1e-5)
    assert actual['std'] == pytest.approx(flat.std(), rel=1e-5)


@pytest.mark.parametrize('grad_clip', [0.0, 0.5, 1e6], ids=['off', 'clips', 'never reached'])
def test_step_is_adamw_with_torch_clipping(grad_clip):
    optimizer = guarded_optimizer(grad_clip=grad_clip)
    plain = copy.deepcopy(optimizer.parameters)
    reference = torch.optim.AdamW(
        [
            {'params': [plain[0], plain[1]], 'weight_decay': 0.1},
            {'params': [plain[2]], 'weight_decay': 0.0},
        ],
        lr=6e-4,
        betas=(0.9, 0.95),
        fused=True,
    )
    for step in range(5):
        rate = learning_rate_at(step, RUN)
        backward(optimizer, gradients_of(step))
        optimizer.step(rate, FINITE, measured=step % 2 == 0)

        for parameter, gradient in zip(plain, gradients_of(step)):
            parameter.grad = gradient
        if grad_clip:
            norm = torch.nn.utils.clip_grad_norm_(plain, grad_clip)
            assert (norm > grad_clip) == (grad_clip == 0.5)
        for group, scale in zip(reference.param_groups, (1.0, 0.5)):
            group['lr'] = rate * scale
        reference.step()
        assert equal(optimizer.parameters, plain)
    assert not equal(guarded_optimizer().parameters, plain)
    assert optimizer.skipped == 0
    assert all(parameter.grad is None for parameter in optimizer.parameters)


LOSSES_AND_GRADIENTS = [
    pytest.param(NAN, 1.0, id='loss nan'),
    pytest.param(torch.tensor(math.inf), 1.0, id='loss inf'),
    pytest.param(FINITE, math.nan, id='gradient nan'),
    pytest.param(FINITE, math.inf, id='gradient inf'),
    pytest.param(FINITE, -math.inf, id='gradient -inf'),
    pytest.param(NAN, math.nan, id='both'),
]


@pytest.mark.parametrize('grad_clip', [0.0, 1.0])
@pytest.mark.parametrize(('loss', 'element'), LOSSES_AND_GRADIENTS)
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('steps_before', [0, 2])
@pytest.mark.parametrize('optimizer', list(OPTIMIZER_REGISTRY))
def test_nonfinite_step_changes_nothing(optimizer, loss, element, grad_clip, dtype, steps_before):
    changed = {'optimizer': optimizer, 'grad_clip': grad_clip, 'dtype': dtype}
    optimizer = guarded_optimizer(**changed)
    for step in range(steps_before):
        backward(optimizer, gradients_of(step))
        optimizer.step(1e-3, FINITE, measured=True)
    before = snapshot(optimizer)
    gradients = gradients_of(9)
    gradients[1][2, 1, 1] = element * gradients[1][2, 1, 1]
    backward(optimizer, gradients)
    optimizer.step(1e-3, loss, measured=True)
    assert equal(snapshot(optimizer), before)
    # In fp16, overflowing gradients are left to the scaler, a non-finite loss is not.
    assert optimizer.skipped == (dtype == 'float32' or not torch.isfinite(loss))
    assert all(parameter.grad is None for parameter in optimizer.parameters)

    # Training continues as if the iteration had not happened.
    control = guarded_optimizer(**changed)
    for step in range(steps_before):
        backward(control, gradients_of(step))
        control.step(1e-3, FINITE, measured=True)
    for one in (optimizer, control):
        backward(one, gradients_of(5))
        one.step(1e-3, FINITE, measured=True)
    assert equal(snapshot(optimizer), snapshot(control))
    assert not equal(snapshot(optimizer), before)


class _Waits(TorchDispatchMode):
    """Records operations that would synchronize with a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ('_local_scalar', 'nonzero', 'equal')):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('optimizer', list(OPTIMIZER_REGISTRY))
def test_step_does_not_synchronize(optimizer):
    optimizer = guarded_optimizer(optimizer=optimizer)
    for step, loss in enumerate((FINITE, NAN)):
        backward(optimizer, gradients_of(step))
        with _Waits() as waits:
            optimizer.step(1e-3, loss, measured=True)
        assert waits.seen == []
    with _Waits() as waits:
        assert optimizer.skipped == 1
    assert waits.seen


def test_skipped_steps_are_counted():
    optimizer = guarded_optimizer()
    for loss in (FINITE, NAN, FINITE, NAN, NAN):
        backward(optimizer, gradients_of(0))
        optimizer.step(1e-3, loss, measured=False)
    assert optimizer.skipped == 3


def test_fp16_scale_halves_at_overflow():
    optimizer = guarded_optimizer(dtype='float16')
    before = optimizer.loss_scale
    assert before == torch.amp.GradScaler('cpu').get_scale()
    backward(optimizer, gradients_of(0))
    optimizer.step(1e-3, FINITE, measured=False)
    assert optimizer.loss_scale == before
    overflow = gradients_of(1)
    overflow[0][0, 0] = math.inf
    backward(optimizer, overflow)
    optimizer.step(1e-3, FINITE, measured=False)
    assert optimizer.loss_scale == before / 2
    assert optimizer.skipped == 0
    assert guarded_optimizer().loss_scale is None


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('optimizer', list(OPTIMIZER_REGISTRY))
def test_loaded_optimizer_continues_bit_for_bit(optimizer, dtype):
    one, other = (guarded_optimizer(optimizer=optimizer, dtype=dtype) for _ in range(2))
    overflow = gradients_of(1)
    overflow[0][0, 0] = math.inf
    for gradients in (gradients_of(0), overflow):
        backward(one, gradients)
        one.step(1e-3, FINITE, measured=False)
    with torch.no_grad():
        for parameter in other.parameters:
            parameter.fill_(math.nan)  # the weights come with the rest
    state = sharded_state.collect(one.parallel, module_of(one), one)
    stored = sharded_state.StoredState([state])
    sharded_state.restore(stored, other.parallel, module_of(other), other)
    before = snapshot(one)
    for optimizer in (other, one):
        assert equal(snapshot(optimizer), before)  # unaffected by the other's update
        backward(optimizer, gradients_of(2))
        optimizer.step(1e-3, FINITE, measured=False)
    assert equal(snapshot(one), snapshot(other)) and not equal(snapshot(one), before)
    assert one.loss_scale == other.loss_scale


@pytest.mark.parametrize('element', [math.nan, math.inf])
def test_nonfinite_weights_are_detected(element):
    optimizer = guarded_optimizer()
    assert optimizer.weights_are_finite()
    with torch.no_grad():
        optimizer.parameters[1][0, 0, 0] = element
    assert not optimizer.weights_are_finite()
