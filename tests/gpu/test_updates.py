"""Updates on a GPU: the losses of a CPU, without waiting for the device; compiled blocks."""

import pytest
import torch
import torch.nn as nn
from helpers.one_device import each, no_waits, skip_if_experts_wait
from torch._dynamo.utils import counters

from benchmarks.gpu_workloads import MODELS, TINY, Updates, fp32_products

CPU = torch.device('cpu')
OPTIMIZERS = ('adamw', 'muon', 'lion')
# Models whose blocks have different graphs.
COMPILED = {
    'llama': {},
    'gemma2': {},
    'mistral': {},
    'mixtral': {},
    'legacy': {'document_mask': True, 'end_of_text': 0},
    'mixed': {},
}


def updates_of(device: torch.device, name: str, **options) -> Updates:
    return Updates(device, **{**TINY, **MODELS[name], **options})


@each('name', MODELS, dry=('gpt2', 'mixed'))
def test_losses_equal_those_of_a_cpu(device, name):
    """In fp32, with the attention backend that each device derives."""
    with fp32_products():
        on_cpu, here = (updates_of(kind, name, dtype='float32').losses(4) for kind in (CPU, device))
    assert here == pytest.approx(on_cpu, rel=1e-4)
    assert here[0] != here[1]


@each('name', MODELS, dry=('gpt2', 'mixed'))
def test_update_does_not_wait(device, name):
    if any('num_experts' in key for key in MODELS[name]):
        skip_if_experts_wait(device)
    optimizer = OPTIMIZERS[list(MODELS).index(name) % len(OPTIMIZERS)]
    updates = updates_of(device, name, optimizer=optimizer, dropout=0.1)
    updates.update()
    with no_waits(device):
        updates.update(1, measured=True)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_nonfinite_update_changes_nothing(device, optimizer, dtype):
    updates = updates_of(device, 'llama', optimizer=optimizer, dtype=dtype)
    updates.update()
    parameters = list(updates.raw_model.parameters())
    for value, changes in ((float('nan'), False), (1e-3, True)):
        before = [p.detach().clone() for p in parameters]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, value)
        with no_waits(device):
            updates.optimizer.step(0.1, torch.ones((), device=device), measured=False)
        same = [torch.equal(p, old) for p, old in zip(parameters, before)]
        assert not any(same) if changes else all(same)


@pytest.fixture
def compiler(device, monkeypatch):
    """Inductor on a GPU; on a CPU a backend that runs graphs uncompiled, which takes a second."""
    real = nn.Module.compile
    if device.type == 'cpu':
        monkeypatch.setattr(
            nn.Module, 'compile', lambda self, **options: real(self, backend='eager', **options)
        )
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@each('name', COMPILED, dry=('mixed',))
def test_compiled_updates_equal_eager_ones(device, compiler, name):
    """Without a graph break, and without a graph that later evaluations or updates add."""
    options = {'batch_size': 4, 'dtype': 'float32', **COMPILED[name]}
    with fp32_products():
        eager = updates_of(device, name, **options)
        compiled = updates_of(device, name, compiled=True, **options)
        assert compiled.evaluate().item() == pytest.approx(eager.evaluate().item(), rel=1e-4)
        losses = [updates.losses(1) for updates in (eager, compiled)]
        graphs = counters['stats']['unique_graphs']
        assert graphs > 0
        # The last batch of an evaluation is filled with ignored sequences.
        for updates, seen in zip((eager, compiled), losses):
            seen.append(updates.evaluate(ignored=3).item())
            seen += updates.losses(3)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert counters['stats']['unique_graphs'] == graphs and not counters['graph_break']


@each('optimizer', OPTIMIZERS, dry=('muon',))
def test_compiled_update_does_not_wait(device, compiler, optimizer):
    updates = updates_of(device, 'llama', compiled=True, optimizer=optimizer)
    for number in range(3):
        updates.update(number, measured=True)
    with no_waits(device):
        updates.update(measured=True)
