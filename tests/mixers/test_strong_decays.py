"""Decays that differ by many orders of magnitude keep the precision of fp32, whatever the mixer."""

import pytest
import torch
import torch.nn.functional as F
from helpers.mixers import random_inputs, random_starts

from components.decayed_attention import decayed_attention
from components.delta_rule import delta_rule
from components.state_space_duality import Inputs, state_space_duality

LENGTH = 200


def rows(*shape, seed=0):
    """(1, LENGTH, *shape), in double precision."""
    return random_inputs(LENGTH, 1, torch.Size(shape).numel(), seed).view(1, LENGTH, *shape)


def log_decays(*shape, strong):
    """Weak decays, and a strong one at every seventh token."""
    logs = -0.02 * rows(*shape, seed=4).abs()
    logs[:, ::7] = -strong
    return logs


def run_linear(starts, log_decay, q, k, v):
    heads = (x.transpose(1, 2) for x in (q, k, v, log_decay))
    return decayed_attention(*heads, starts=starts)[0]


def run_delta(starts, log_decay, q, k, v, beta):
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return delta_rule(q, k, v, beta.sigmoid(), log_decay, starts)[0]


def run_duality(starts, log_decay, queries, keys, x, steps, skip):
    inputs = Inputs(x, steps.abs(), log_decay, keys, queries)
    return state_space_duality(inputs, skip[0, 0], starts=starts)[0]


# By name: the function, the shape of its decays of a token, and those of its other inputs.
RECURRENCES = {
    'channels': (run_linear, (2, 4), [(2, 4), (2, 4), (2, 3)]),
    'delta': (run_delta, (2,), [(2, 4), (2, 4), (2, 3), (2,)]),
    'delta-channels': (run_delta, (2, 4), [(2, 4), (2, 4), (2, 3), (2,)]),
    'duality': (run_duality, (2,), [(1, 4), (1, 4), (2, 3), (2,), (2,)]),
}


@pytest.mark.parametrize('starts', [None, random_starts(1, LENGTH)], ids=['one', 'documents'])
@pytest.mark.parametrize('strong', [20.0, 1e3, 1e6])
@pytest.mark.parametrize('name', RECURRENCES)
def test_weak_decays_among_strong_ones_are_exact_in_fp32(name, strong, starts):
    """Values and gradients equal those in double precision."""
    run, decay_shape, shapes = RECURRENCES[name]
    inputs = [log_decays(*decay_shape, strong=strong)]
    inputs += [rows(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    results = []
    for dtype in (torch.float32, torch.float64):
        points = [x.float().to(dtype).requires_grad_() for x in inputs]
        y = run(starts, *points)
        weights = random_inputs(1, 1, y.numel(), seed=9).view(y.shape).to(dtype)
        results.append([y, *torch.autograd.grad(y, points, weights)])
    for value, expected in zip(*results):
        assert value.isfinite().all()
        assert (value.double() - expected).abs().max() < 5e-5 * expected.abs().max()
