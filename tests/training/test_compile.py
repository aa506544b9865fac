"""Number of graphs of a compiled run, counted by a backend that runs them uncompiled."""

import pytest
import torch
import torch.nn as nn
from helpers.fake_ranks import fake_ranks
from helpers.in_process import session_here, train_here
from torch._dynamo.utils import counters

import train
from components import linear_cross_entropy as loss
from model_components import IGNORED

pytestmark = pytest.mark.slow

EXPERTS = {'num_experts': 4, 'experts_per_token': 2, 'shared_experts': 1}
# Number of different layers, each of which has its own graph.
KINDS = {'legacy': 1, 'llama': 1, 'mistral': 1, 'gemma2': 1, 'deepseek': 2, 'mixtral': 1}
OPTIONS = {
    'deepseek': EXPERTS,
    'mixtral': {'num_experts': 4},
    'gemma2': {'sliding_window': 8},
    'mistral': {'sliding_window': 8},
}


class Backend:
    """Runs graphs uncompiled; one entry per graph: whether it has dynamic sizes."""

    def __init__(self):
        self.dynamic: list[bool] = []

    def __call__(self, module, inputs):
        sizes = [s for x in inputs if isinstance(x, torch.Tensor) for s in x.shape]
        self.dynamic.append(any(isinstance(x, torch.SymInt) for x in [*inputs, *sizes]))
        return module.forward


@pytest.fixture
def graphs(monkeypatch):
    """The graphs of blocks."""
    backend, real = Backend(), nn.Module.compile
    monkeypatch.setattr(
        nn.Module, 'compile', lambda self, **options: real(self, backend=backend, **options)
    )
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(optimize_ddp=True):
        yield backend.dynamic
    torch._dynamo.reset()


@pytest.fixture
def loss_graphs(monkeypatch):
    """The graphs of the loss, which is computed as on a CUDA device."""
    backend = Backend()
    fused = torch.compile(loss.fused_cross_entropy_, dynamic=False, backend=backend)
    on_cuda = loss.cuda_method(80e9, fused)._replace(adds_to_fp32=False)
    methods = {True: on_cuda, False: loss.CPU_METHOD}
    monkeypatch.setattr(loss, 'loss_method', lambda device, compiled: methods[compiled])
    return backend.dynamic


def test_layers_of_different_attention_and_ffn_have_a_graph_each(graphs, tiny_dataset, tmp_path):
    """Four layers with windows in every second one; the first one is dense."""
    windows = {'arch_preset': 'deepseek', 'sliding_window': 8, 'attention_pattern': 'LG'}
    sizes = {'n_layer': 4, 'eval_iters': 5, 'eval_interval': 2, 'compile': True}
    run = train_here(tiny_dataset, tmp_path, **windows, **EXPERTS, **sizes)
    assert run.code == 0 and graphs == [False] * (2 * 3) and not counters['graph_break']


@pytest.mark.parametrize('strategy', [{}, {'use_zero1': True}, {'use_fsdp': True}])
def test_strategies_cut_no_graph(strategy, graphs, loss_graphs, tiny_dataset, tmp_path):
    """As the first of four ranks, whose last evaluation batch is partial too."""
    sizes = {'gradient_accumulation_steps': 8, 'eval_iters': 22, 'eval_interval': 2}
    with fake_ranks(4):
        session = session_here(
            tiny_dataset, tmp_path, **sizes, **strategy, compile=True, on_nonfinite='skip'
        )
        assert train.run_training(session) == 0
    assert len(session.logger.evaluations) == 3
    assert graphs == loss_graphs == [False] * 2 and not counters['graph_break']


@pytest.mark.parametrize('preset', KINDS)
def test_each_distinct_layer_and_the_loss_have_two_static_graphs(
    preset, graphs, loss_graphs, tiny_dataset, tmp_path
):
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
    assert graphs == [False] * (2 * KINDS[preset]) and loss_graphs == [False] * 2
    assert not counters['graph_break'] and not torch._dynamo.config.optimize_ddp
    rows = [(targets != IGNORED).any(dim=1).sum().item() for _, targets in run.evaluated_on]
    assert rows == [2, 2, 1] * 6
