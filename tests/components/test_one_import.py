"""A component of every kind, written with names from one module only."""

import ast

import pytest
import torch
from helpers.architectures import random_tokens, tiny

import model_components
import optim
from common.architecture_options import MIXER_BACKEND_REGISTRY
from common.registry import ALL_REGISTRIES
from model_builder import build_model, check_calls, parameter_groups
from model_config import REGISTRIES
from optim.schedules import learning_rate_at
from optim.step import GuardedOptimizer
from parallel.strategies import SingleProcess
from training_config import TrainingConfig

COMPONENTS = '''
import math

import torch
import torch.nn as nn

from model_components import (
    ACTIVATION_REGISTRY,
    ATTENTION_BACKEND_REGISTRY,
    ATTENTION_REGISTRY,
    FFN_REGISTRY,
    INITIALIZATION_REGISTRY,
    MIXER_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    RESIDUAL_REGISTRY,
    ROPE_SCALING_REGISTRY,
    Activation,
    Attention,
    AttentionBackend,
    AttentionInputs,
    AuxOutput,
    Block,
    Component,
    FeedForward,
    Initial,
    Initialization,
    Mixer,
    Option,
    PositionEncoding,
    Residual,
    RotaryScaling,
    above,
    additive_mask,
    repeat_kv,
)


@ACTIVATION_REGISTRY.register('own')
class StarReLU(Activation):
    """scale · relu(x)², with one learned scale."""

    options = {'star_scale': Option(float, 0.9, 'Initial scale of StarReLU', check=above(0))}

    def __init__(self, config):
        super().__init__(config)
        self.initial_scale = config.star_scale
        self.scale = nn.Parameter(torch.empty(1))

    def initial_values(self):
        return {'scale': Initial.constant(self.initial_scale)}

    def forward(self, x):
        return self.scale * x.relu().square()


@NORM_REGISTRY.register('own')
class MaxNorm(Component, nn.Module):
    """x / max |x|, with a learned weight."""

    part = 'normalization'

    def __init__(self, config, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def initial_values(self):
        return {'weight': Initial.ones}

    def forward(self, x):
        return self.weight * x / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)


@POSITION_ENCODING_REGISTRY.register('own')
class DistanceBias(PositionEncoding):
    """Adds -log(1 + distance) to the attention scores."""

    has_bias = True

    def prepare(self, q_positions, k_positions):
        distance = (q_positions[:, None] - k_positions).clamp(min=0)
        return AttentionInputs(bias=-distance.float().log1p()[None])


@ROPE_SCALING_REGISTRY.register('own')
class HalfSpeed(RotaryScaling):
    """Halves all frequencies."""

    options = {}

    @staticmethod
    def scaled(frequencies, config):
        return frequencies / 2


@ATTENTION_BACKEND_REGISTRY.register('own')
class SimpleBackend(AttentionBackend):
    """A softmax that is written out."""

    supports = frozenset({'bias'})
    mask = staticmethod(additive_mask)

    @staticmethod
    def attend(q, k, v, mask, spec, dropout):
        k, v = repeat_kv(k, q.size(1)), repeat_kv(v, q.size(1))
        scores = (q @ k.mT).float() * spec.scale + mask
        return scores.softmax(-1).to(v.dtype) @ v


@ATTENTION_REGISTRY.register('own')
class SharedKeyAttention(Attention):
    """Attention whose queries and keys are the same projection."""

    cacheable = True

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.qk_proj = nn.Linear(config.n_embd, config.n_embd)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd)

    @classmethod
    def head_dims(cls, config):
        return config.n_embd // config.n_head, config.n_embd // config.n_head

    def forward(self, x, attn_inputs):
        qk, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.qk_proj, self.v_proj)
        )
        qk = self.rotate(qk, attn_inputs.rotation)
        return self.attend_and_project(qk, qk, v, attn_inputs)


@MIXER_REGISTRY.register('own')
class RunningMean(Mixer):
    """The mean of a projection over all tokens so far."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.value = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, attn_inputs):
        lengths = torch.arange(1, x.size(1) + 1, device=x.device)
        return self.value(x).cumsum(1) / lengths[:, None]


@FFN_REGISTRY.register('own')
class SineNetwork(FeedForward):
    """down(sin(up(x)))."""

    def __init__(self, config, layer):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.d_ff, bias=config.ffn_bias)
        self.down = nn.Linear(config.d_ff, config.n_embd, bias=config.ffn_bias)

    @classmethod
    def default_d_ff(cls, config):
        return 2 * config.n_embd

    def forward(self, x):
        return self.down(self.up(x).sin()), AuxOutput(0.0, {})


@NORM_POSITION_REGISTRY.register('own')
class ScaledBlock(Block):
    """Pre-norm with a learned scale of both sublayers."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.scale = nn.Parameter(torch.empty(2))

    def initial_values(self):
        return {'scale': Initial.constant(0.5)}

    def forward(self, x, attn_inputs):
        x = x + self.scale[0] * self.attention(self.attention_norm(x), attn_inputs)
        y, aux = self.ffn(self.ffn_norm(x))
        return x + self.scale[1] * y, aux


@RESIDUAL_REGISTRY.register('own')
class PullToTheInput(Residual):
    """x + sublayer, and at each entrance a tenth of the way back to x0."""

    def shared_inputs(self):
        return ('x0',)

    def enter(self, x, shared):
        return x.lerp(shared.x0, 0.1)


@INITIALIZATION_REGISTRY.register('own')
class FanIn(Initialization):
    """1 / sqrt(n_embd) for every weight."""

    @classmethod
    def std(cls, config, hidden, residual):
        return 1 / math.sqrt(config.n_embd)
'''
OPTIMIZERS = '''
import torch

from optim import (
    OPTIMIZER_REGISTRY,
    SCHEDULE_REGISTRY,
    Option,
    OptimizerComponent,
    Schedule,
    above,
    local_tensor,
    torch_groups,
)


@OPTIMIZER_REGISTRY.register('own')
class SGD(OptimizerComponent, torch.optim.Optimizer):
    """Gradient descent with decoupled weight decay."""

    options = {'sgd_scale': Option(float, 10.0, 'Factor of the learning rate', check=above(0))}

    def __init__(self, groups, run, parallel):
        super().__init__(torch_groups(groups, run, parallel, 'SGD', run.sgd_scale), {'lr': 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            rate = group['lr'] * (1 - self.found_inf)
            for parameter in group['params']:
                weight, gradient = local_tensor(parameter), local_tensor(parameter.grad)
                gradient = gradient.masked_fill(self.found_inf > 0, 0.0)
                weight.mul_(1 - rate * group['weight_decay']).sub_(gradient * rate)

    def state_keys(self, parameter):
        return frozenset()


@SCHEDULE_REGISTRY.register('own')
class InverseSquareRoot(Schedule):
    """learning_rate / sqrt(iteration + 1)."""

    @classmethod
    def learning_rate(cls, iteration, run):
        return run.learning_rate / (iteration + 1) ** 0.5
'''


@pytest.fixture
def own_components(monkeypatch):
    """Registers the components of both texts for one test."""
    for registry in ALL_REGISTRIES:
        list(registry)  # imports the project's own first
        monkeypatch.setattr(registry, '_components', dict(registry._components))
        if not hasattr(registry, 'whole'):  # a subset shares its whole's sources
            monkeypatch.setattr(registry, '_sources', dict(registry._sources))
    for text in (COMPONENTS, OPTIMIZERS):
        exec(text, {'__name__': 'config:own.py'})


def imported_modules(text: str) -> set[str]:
    nodes = ast.walk(ast.parse(text))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def kinds_of(text: str) -> list[str]:
    """The registries that a text registers a component with."""
    return [
        decorator.func.value.id
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
    ]


def test_every_kind_is_written_from_one_import():
    assert imported_modules(COMPONENTS) == {'model_components'}
    assert imported_modules(OPTIMIZERS) == {'optim'}
    written = [getattr(model_components, name) for name in kinds_of(COMPONENTS)]
    # The kernels of mixers are listed in one place, and none is a user's.
    others = [registry for registry in REGISTRIES if registry is not MIXER_BACKEND_REGISTRY]
    assert len(written) == len(others) and set(written) == set(others)
    assert sorted(kinds_of(OPTIMIZERS)) == ['OPTIMIZER_REGISTRY', 'SCHEDULE_REGISTRY']
    for module in (model_components, optim):
        assert all(hasattr(module, name) for name in module.__all__)


def choices(*options: str) -> dict[str, str]:
    return dict.fromkeys(options, 'own')


@pytest.mark.parametrize(
    'values',
    [
        choices('attention_type', 'attention_backend', 'position_encoding', 'normalization')
        | choices('ffn_type', 'norm_position', 'initialization'),
        {'position_encoding': 'rope', 'activation': 'own', 'rope_scaling': 'own'},
        {'mixer': 'own', 'residual': 'own'},
    ],
    ids=['most kinds', 'activation and RoPE scaling', 'mixer and residual stream'],
)
def test_components_from_one_import_train(own_components, values):
    config = tiny(**values)
    check_calls(config)
    model = build_model(config, 'cpu', seed=1)
    run = TrainingConfig.from_dict({'optimizer': 'own', 'lr_schedule': 'own'})
    strategy = SingleProcess(run, torch.device('cpu'))
    inner = strategy.build_optimizer(parameter_groups(model), run)
    optimizer = GuardedOptimizer(inner, run, torch.device('cpu'), strategy)
    tokens = random_tokens(config, batch=2)
    losses = []
    for iteration in range(5):
        loss, count, _ = model(tokens, tokens)
        optimizer.backward(loss / count)
        optimizer.step(learning_rate_at(iteration, run), loss, measured=False)
        losses.append(loss.item())
    assert losses[-1] < losses[0] and optimizer.skipped == 0
