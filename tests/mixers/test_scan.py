"""Scans equal a loop over tokens, in values and gradients, whatever the blocks."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from components import scan
from components.element_counter import ElementCounter
from components.scan import linear_scan, selective_scan

MIN_TOKENS = 5
LENGTHS = (1, 2, 3, 4, 5, 6, 9, 10, 11, 15, 23)


@pytest.fixture(params=['one block', 'short blocks', 'rows and blocks'])
def blocks(request, monkeypatch):
    """How sequences are divided: not at all, into 5 tokens, or also into groups of sequences."""
    elements = {'one block': 10**6, 'short blocks': 2 * MIN_TOKENS * 6, 'rows and blocks': 1}
    monkeypatch.setattr(scan, 'MIN_TOKENS', MIN_TOKENS)
    monkeypatch.setitem(scan.BLOCK_ELEMENTS, 'cpu', elements[request.param])


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def decays(*shape: int) -> torch.Tensor:
    """From -1 to 1, with exact zeros, ones and numbers that underflow in a product."""
    a = numbers(*shape, seed=7).detach().tanh()
    a.view(-1)[::5], a.view(-1)[1::7], a.view(-1)[3::11] = 0.0, 1.0, 1e-200
    return a.requires_grad_()


def linear_loop(a, b, initial):
    h, states = initial, []
    for t in range(a.size(1)):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, dim=1)


def selective_loop(x, dt, decay, inputs, outputs, initial, keep=None):
    h, ys = initial, []
    for t in range(x.size(1)):
        a = torch.exp(dt[:, t, None, :] * decay)
        if keep is not None:
            a = a * keep[:, t, None, None]
        h = a * h + (dt[:, t] * x[:, t])[:, None, :] * inputs[:, t, :, None]
        ys.append((outputs[:, t, :, None] * h).sum(dim=1))
    return torch.stack(ys, dim=1), h


def assert_same(actual, expected, inputs) -> None:
    """Values, and the gradients of a random sum of them."""
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    total = [sum((y * numbers(*y.shape, seed=1)).sum() for y in ys) for ys in (actual, expected)]
    actual, right = (torch.autograd.grad(each, inputs) for each in total)
    for one, other in zip(actual, right):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def selective_inputs(length: int, batch: int = 2, channels: int = 3, states: int = 2):
    return (
        numbers(batch, length, channels),
        numbers(batch, length, channels, seed=1).detach().abs().requires_grad_(),
        numbers(states, channels, seed=2),
        numbers(batch, length, states, seed=3),
        numbers(batch, length, states, seed=4),
        numbers(batch, states, channels, seed=5),
    )


@pytest.mark.parametrize('length', LENGTHS)
def test_linear_scan(blocks, length):
    inputs = decays(3, length, 2), numbers(3, length, 2), numbers(3, 2)
    assert_same([linear_scan(*inputs)], [linear_loop(*inputs)], inputs)


@pytest.mark.parametrize('keeping', [False, True])
@pytest.mark.parametrize('length', LENGTHS)
def test_selective_scan(blocks, length, keeping):
    inputs = selective_inputs(length, batch=3)
    keep = (numbers(3, length, seed=6) > -0.5).double() if keeping else None
    assert_same(selective_scan(*inputs, keep), selective_loop(*inputs, keep), inputs)


@pytest.mark.parametrize('steps', [1e-30, 1e4, 1e30])
def test_extreme_decays_are_finite(blocks, steps):
    """Decays of 1 and of 0, which no logarithm and no division may meet, in fp32."""
    x, dt, decay, *rest = (each.detach().float() for each in selective_inputs(23))
    inputs = [x / steps, dt * steps, -decay.abs() - 0.1, *rest]
    inputs = [each.requires_grad_() for each in inputs]
    y, state = selective_scan(*inputs)
    actual = torch.autograd.grad(y.sum() + state.sum(), inputs)
    assert all(each.isfinite().all() for each in (y, state, *actual))


def test_states_are_not_kept():
    """What the backward pass keeps is about the inputs, not a state for each token."""
    inputs = selective_inputs(length=1024, channels=64, states=16)
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan(*inputs)
    of_states = 2 * 1024 * 64 * 16
    of_inputs = sum(each.numel() for each in inputs)
    assert of_inputs <= sum(saved.values()) <= of_inputs + of_states / scan.MIN_TOKENS


@pytest.mark.parametrize('keeping', [False, True])
def test_operators_meet_the_contract_of_torch(keeping):
    """Schemas, gradients, and the results of fake tensors; mixers that use them are compiled in
    the tests of all mixers."""
    checks = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    keep = torch.ones(2, 7, dtype=torch.float64) if keeping else None
    opcheck(
        torch.ops.components.selective_scan.default, (*selective_inputs(7), keep), test_utils=checks
    )
    opcheck(
        torch.ops.components.linear_scan.default, (decays(2, 7, 3), numbers(2, 7, 3), numbers(2, 3))
    )


def test_counts():
    """FLOPs and elements of the operators are those that their plain functions run."""
    linear = [each.detach() for each in (decays(2, 64, 8), numbers(2, 64, 8), numbers(2, 8))]
    selective = [each.detach() for each in selective_inputs(64, channels=16, states=8)]
    for operator, inputs in (
        (scan._linear_scan, linear),
        (scan._selective_scan, [*selective, None]),
    ):
        counts = []
        for function in (operator, operator._init_fn):
            with ElementCounter() as elements:
                function(*inputs)
            with FlopCounterMode(display=False) as flops:
                function(*inputs)
            counts.append((elements.elements, flops.get_total_flops()))
        (declared, declared_flops), (counted, counted_flops) = counts
        assert declared == pytest.approx(counted, rel=0.15)
        assert declared_flops == counted_flops
