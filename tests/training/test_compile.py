"""Number of graphs of a compiled run, counted by a backend that runs them uncompiled."""

import pytest
import torch
import torch.nn as nn
from helpers.in_process import train_here
from torch._dynamo.utils import counters

from model_components import IGNORED

pytestmark = pytest.mark.slow

# Number of different layers, each of which has its own graph.
KINDS = {'legacy': 1, 'llama': 1, 'mistral': 1, 'gemma2': 1, 'deepseek': 2, 'mixtral': 1}
OPTIONS = {
    'deepseek': {'num_experts': 4, 'experts_per_token': 2, 'shared_experts': 1},
    'mixtral': {'num_experts': 4},
    'gemma2': {'sliding_window': 8},
    'mistral': {'sliding_window': 8},
}


@pytest.fixture
def graphs(monkeypatch):
    """A list with one entry per compiled graph: whether it has dynamic sizes."""
    dynamic: list[bool] = []

    def backend(module, inputs):
        sizes = [s for x in inputs if isinstance(x, torch.Tensor) for s in x.shape]
        dynamic.append(any(isinstance(x, torch.SymInt) for x in [*inputs, *sizes]))
        return module.forward

    real = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, 'compile', lambda self, **options: real(self, backend=backend, **options)
    )
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(optimize_ddp=True):
        yield dynamic
    torch._dynamo.reset()


@pytest.mark.parametrize('preset', KINDS)
def test_each_distinct_layer_has_two_static_graphs(preset, graphs, tiny_dataset, tmp_path):
    """One is for evaluation, one for training; evaluations end with a partial batch of windows."""
    run = train_here(
        tiny_dataset,
        tmp_path,
        arch_preset=preset,
        **OPTIONS.get(preset, {}),
        n_layer=4,
        compile=True,
        eval_iters=5,
        eval_interval=2,
    )
    assert run.code == 0 and len(run.record['eval_steps']) == 3
    assert graphs == [False] * (2 * KINDS[preset])
    assert not counters['graph_break'] and not torch._dynamo.config.optimize_ddp
    rows = [(targets != IGNORED).any(dim=1).sum().item() for _, targets in run.evaluated_on]
    assert rows == [2, 2, 1] * 6
