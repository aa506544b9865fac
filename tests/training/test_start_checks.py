"""Checks at start: causality, independence of the sequences of a batch, and use of positions."""

import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import legal_config, pairwise_architectures, tiny
from torch import nn

from common.errors import UserError
from components.attention import MultiHeadAttention
from model_builder import build_model, flops_notes
from model_components import Activation, Attention, AuxOutput, FeedForward, Initial, Norm
from model_config import (
    ACTIVATION_REGISTRY,
    ATTENTION_BACKEND_REGISTRY,
    ATTENTION_REGISTRY,
    FFN_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    PRESETS,
)
from training.start_checks import ROUNDING, check_model

pytestmark = pytest.mark.usefixtures('one_thread')
CPU = torch.device('cpu')


def checked(**values) -> list[str]:
    """The notes of the check of a tiny model."""
    return check_model(build_model(tiny(**values), 'cpu', seed=1), CPU, 'float32')


def activation(function, **attributes) -> type:
    """An activation called Leak that computes function(self, x), x (B, T, width)."""
    return type('Leak', (Activation,), {'forward': function, 'tag': 'Leak', **attributes})


class Gated(Activation):
    """Leaks the next token through a gate that is initialized to `start`."""

    start: ClassVar = 0.0

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.empty(1))

    def initial_values(self):
        return {'gate': Initial.constant(self.start)}

    def forward(self, x):
        return F.gelu(x) + self.gate * x.roll(-1, 1)


def one_position(self, x):
    return torch.cat((x[:, :3], x[:, 3:4] + x[:, 4:5], x[:, 4:]), dim=1) if x.size(1) > 4 else x


# --- Later tokens ---------------------------------------------------------------------------------

LEAKS = {
    'the next token': lambda self, x: x + x.roll(-1, 1),
    'the last token': lambda self, x: x + x[:, -1:],
    'a mean over the sequence': lambda self, x: x - x.mean(1, keepdim=True),
    'a reversed cumulative sum': lambda self, x: x + x.flip(1).cumsum(1).flip(1),
    'the maximum over the sequence': lambda self, x: x / x.abs().amax(1, keepdim=True),
    'a selection without gradient': lambda self, x: x * (x >= x.median(1, keepdim=True).values),
    'a single position': one_position,
    'in training only': lambda self, x: x + x.roll(-1, 1) if self.training else F.gelu(x),
    'in evaluation only': lambda self, x: F.gelu(x) if self.training else x + x.roll(-1, 1),
    'with a small weight': lambda self, x: F.gelu(x) + 0.01 * x.roll(-1, 1),
}


@pytest.mark.parametrize('leak', LEAKS)
def test_noncausal_component_is_named(register, leak):
    register(ACTIVATION_REGISTRY, 'leak', activation(LEAKS[leak]))
    with pytest.raises(UserError, match=r"activation='leak': Leak\.forward is not causal"):
        checked(activation='leak')


@pytest.mark.parametrize('chunk', [7, 16, 32, 64])
def test_leak_within_full_chunks_is_detected(register, chunk):
    """A mean over each full chunk, as in chunked linear attention without a causal mask."""

    def forward(self, x):
        whole = x.size(1) // chunk * chunk
        parts = x[:, :whole].unflatten(1, (-1, chunk)) if whole else x[:, :0, None]
        return torch.cat(
            (parts.mean(2, keepdim=True).expand_as(parts).flatten(1, 2), x[:, whole:]), 1
        )

    register(ACTIVATION_REGISTRY, 'leak', activation(forward))
    with pytest.raises(UserError, match=r'Leak\.forward is not causal'):
        checked(activation='leak', block_size=80)


@pytest.mark.parametrize('start', [0.0, 1e-6])
def test_leak_behind_zero_weight_is_detected(register, start):
    register(ACTIVATION_REGISTRY, 'leak', type('Leak', (Gated,), {'start': start}))
    with pytest.raises(UserError, match=r'Leak\.forward is not causal'):
        checked(activation='leak')


class NoOutput(MultiHeadAttention):
    """Unmasked attention whose output projection is initialized to zero."""

    def initial_values(self):
        return {'output.weight': Initial.zeros, 'output.bias': Initial.zeros}

    def attend_and_project(self, q, k, v, attn_inputs):
        return self.project_output(F.scaled_dot_product_attention(q, k, v))


class Unmasked(ATTENTION_BACKEND_REGISTRY['sdpa']):
    @staticmethod
    def attend(q, k, v, mask, spec, dropout):
        return F.scaled_dot_product_attention(q, k, v)


class RollingRope(POSITION_ENCODING_REGISTRY['rope']):
    @staticmethod
    def rotate(x, rotation):
        return POSITION_ENCODING_REGISTRY['rope'].rotate(x, rotation).roll(-1, 2)


class RollingEmbedding(POSITION_ENCODING_REGISTRY['learned_absolute']):
    def embed(self, x, positions):
        return super().embed(x, positions).roll(-1, 1)


class RollingBlock(NORM_POSITION_REGISTRY['pre']):
    def forward(self, x, positions):
        return super().forward(x + 0.5 * x.roll(-1, 1), positions)


class RollingNorm(Norm):
    def forward(self, x):
        return F.rms_norm(x.float(), self.width, self.weight).roll(-1, 1)


class RollingFeedForward(FFN_REGISTRY['swiglu']):
    def forward(self, x):
        y, auxiliary = super().forward(x)
        return y.roll(-1, 1), auxiliary


@pytest.mark.parametrize(
    ('registry', 'component', 'method'),
    [
        (ATTENTION_REGISTRY, NoOutput, 'forward'),
        (ATTENTION_BACKEND_REGISTRY, Unmasked, 'attend'),
        (POSITION_ENCODING_REGISTRY, RollingRope, 'rotate'),
        (POSITION_ENCODING_REGISTRY, RollingEmbedding, 'embed'),
        (NORM_POSITION_REGISTRY, RollingBlock, 'forward'),
        (NORM_REGISTRY, RollingNorm, 'forward'),
        (FFN_REGISTRY, RollingFeedForward, 'forward'),
    ],
    ids=lambda value: getattr(value, '__name__', ''),
)
def test_leaking_component_of_any_registry_is_named(register, registry, component, method):
    register(registry, 'mine', component)
    message = rf"{registry.option}='mine': {component.__name__}\.{method} is not causal"
    with pytest.raises(UserError, match=message):
        checked(**{registry.option: 'mine'})


def test_possible_inner_culprits_are_named(register):
    """An expert's activation receives the tokens of all sequences in one row."""
    register(ACTIVATION_REGISTRY, 'leak', activation(lambda self, x: x + x.roll(-1, 0)))
    with pytest.raises(UserError, match=r"ffn_type='moe': .*inside it: activation='leak': Leak"):
        checked(ffn_type='moe', expert_ffn='standard', activation='leak')


# --- Other sequences ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'function',
    [
        lambda self, x: x - x.mean(0, keepdim=True),
        lambda self, x: x + x.roll(1, 0),
        lambda self, x: x / x.std(dim=(0, 1)) if self.training else x,
    ],
)
def test_component_mixing_sequences_is_named(register, function):
    register(ACTIVATION_REGISTRY, 'leak', activation(function))
    with pytest.raises(UserError, match=r'Leak\.forward mixes the sequences of a batch'):
        checked(activation='leak')


def test_expert_choice_routing_is_detected(register):
    class ExpertChoice(FeedForward):
        """Processes the half of all tokens with the highest scores (Zhou et al. 2022)."""

        def __init__(self, config, layer):
            super().__init__()
            self.score = nn.Linear(config.n_embd, 1)
            self.down = nn.Linear(config.n_embd, config.n_embd)

        @classmethod
        def default_d_ff(cls, config):
            return config.n_embd

        def forward(self, x):
            score = self.score(x)
            return self.down(x) * (score > score.median()), AuxOutput(0.0, {})

    register(FFN_REGISTRY, 'expert_choice', ExpertChoice)
    with pytest.raises(
        UserError, match=r'ExpertChoice\.forward (mixes the sequences|is not causal)'
    ):
        checked(ffn_type='expert_choice', vocab_size=200, n_layer=4)


def test_nondeterministic_component_is_reported(register):
    noise = torch.Generator().manual_seed(0)
    noisy = activation(lambda self, x: x + torch.randn(x.shape, generator=noise))
    register(ACTIVATION_REGISTRY, 'leak', noisy)
    with pytest.raises(UserError, match='returns another output when called again'):
        checked(activation='leak')


# --- Correct models -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    'values', pairwise_architectures()[::12], ids=range(len(pairwise_architectures()[::12]))
)
def test_built_in_components_pass(values):
    config = legal_config({**values, 'init_std': 0.1})  # so that positions matter visibly
    assert check_model(build_model(config, 'cpu', seed=1), CPU, 'float32') == []


@pytest.mark.parametrize('preset', PRESETS)
def test_every_preset_passes(preset):
    sizes = {'n_embd': 32, 'd_ff': 32} if preset in ('mixtral', 'deepseek') else {'n_embd': 32}
    small = {'expert_d_ff': 16} if preset in ('mixtral', 'deepseek') else {}
    # Windows or chunks are 1/32 of the context, and would be one token.
    context = {'block_size': 64} if preset in ('gemma3', 'llama4') else {}
    assert checked(arch_preset=preset, **sizes, **small, **context) == []


@pytest.mark.parametrize('values', [{'block_size': 1}, {'vocab_size': 1}, {'block_size': 2}])
def test_smallest_models_pass(values):
    assert checked(**values) == []


@pytest.mark.parametrize('values', [{'ffn_type': 'moe'}, {'position_encoding': 'rope'}])
def test_gpu_rounding_is_not_reported_as_leak(monkeypatch, register, values):
    monkeypatch.setattr(
        'training.start_checks.precision', lambda device, dtype: (dtype, ROUNDING[dtype])
    )
    register(ACTIVATION_REGISTRY, 'leak', activation(LEAKS['the next token']))
    model = build_model(tiny(**values), 'cpu', seed=1)
    assert check_model(model, CPU, 'bfloat16') == []
    leaking = build_model(tiny(activation='leak'), 'cpu', seed=1)
    with pytest.raises(UserError, match='is not causal'):
        check_model(leaking, CPU, 'bfloat16')


def test_checks_restore_model_and_random_state(register):
    class WithBuffer(Gated):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer('scale', torch.empty(3))

        def initial_values(self):
            return {**super().initial_values(), 'scale': Initial.normal(1.0)}

        def forward(self, x):
            return F.gelu(x) * (1 + self.gate) * self.scale.sum()

    register(ACTIVATION_REGISTRY, 'gated', WithBuffer)
    model = build_model(tiny(activation='gated', dropout=0.1), 'cpu', seed=1).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any('gate' in name and not tensor.any() for name, tensor in before.items())
    modules = [
        (m, set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    assert check_model(model, CPU, 'float32') == []
    assert torch.equal(torch.random.get_rng_state(), state)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    for module, names, hooks, pre_hooks in modules:
        assert set(vars(module)) == names
        assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == (hooks, pre_hooks)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_weights_are_restored_after_leak(register):
    register(ACTIVATION_REGISTRY, 'leak', type('Leak', (Gated,), {}))
    model = build_model(tiny(activation='leak'), 'cpu', seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError):
        check_model(model, CPU, 'float32')
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_changing_buffer_is_refused(register):
    class Running(Activation):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer('mean', torch.empty(1))

        def initial_values(self):
            return {'mean': Initial.zeros}

        def forward(self, x):
            y = x - self.mean
            if self.training and not x.is_meta:
                self.mean.lerp_(torch.ones_like(self.mean), 0.1)
            return y

    register(ACTIVATION_REGISTRY, 'running', Running)
    with pytest.raises(UserError, match=r'returns another output|ffn\.activation\.mean changes'):
        checked(activation='running')


# --- Positions ------------------------------------------------------------------------------------


class NeverRotates(Attention):
    """Causal attention that uses no positions."""

    @classmethod
    def head_dims(cls, config):
        size = config.n_embd // config.n_head
        return size, size

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)

    def forward(self, x, positions):
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        scores = q @ k.mT / math.sqrt(q.size(-1))
        future = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).triu(1)
        return self.project_output(scores.masked_fill(future, -math.inf).softmax(-1) @ v)


@pytest.mark.parametrize('encoding', ['rope', 'alibi', 't5_relative'])
def test_unused_positions_are_noted(register, encoding):
    register(ATTENTION_REGISTRY, 'mine', NeverRotates)
    (note,) = checked(attention_type='mine', position_encoding=encoding, attention_backend='manual')
    assert f"position_encoding='{encoding}' does not affect the output" in note
    assert "attention_type='mine': NeverRotates" in note and "position_encoding='none'" in note


@pytest.mark.parametrize('encoding', ['none', 'learned_absolute', 'sinusoidal'])
def test_no_note_without_position_encoding(register, encoding):
    register(ATTENTION_REGISTRY, 'mine', NeverRotates)
    assert checked(attention_type='mine', position_encoding=encoding) == []


def test_one_layer_using_positions_suffices(register):
    class AllButFirstLayer(NeverRotates):
        def __init__(self, config, layer):
            super().__init__(config, layer)
            self.layer = layer

        def forward(self, x, positions):
            if self.layer == 0:
                return super().forward(x, positions)
            q, k, v = (
                part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for part in self.qkv(x).chunk(3, dim=-1)
            )
            q, k = (self.rotate(heads, positions.rotation) for heads in (q, k))
            return self.attend_and_project(q, k, v, positions)

    register(ATTENTION_REGISTRY, 'mine', AllButFirstLayer)
    assert checked(attention_type='mine', position_encoding='rope') == []


@pytest.mark.parametrize(
    ('values', 'kinds', 'noted'),
    [
        ({'position_encoding': 'rope'}, {'L': {'attention_type': 'mine'}}, 'layers L: '),
        ({'position_encoding': 'rope', 'attention_type': 'mine'}, {'L': {'d_ff': 8}}, ''),
        ({'position_encoding': 'rope'}, {'L': {'position_encoding': 'none'}}, None),
        ({'position_encoding': 'none'}, {'L': {'sliding_window': 2}}, None),
        # Positions cannot matter in a window of one token.
        ({'position_encoding': 'rope'}, {'L': {'sliding_window': 1}}, None),
        ({'position_encoding': 'alibi'}, {'L': {'attention_type': 'mine'}}, 'layers L: '),
        ({'position_encoding': 'sinusoidal'}, {'L': {'attention_type': 'mine'}}, None),
    ],
)
def test_unused_positions_are_noted_by_kind_of_layers(register, values, kinds, noted):
    """A kind that uses positions does not hide another that does not."""
    register(ATTENTION_REGISTRY, 'mine', NeverRotates)
    values |= {'layer_pattern': 'GL', 'layer_kinds': kinds, 'attention_backend': 'manual'}
    begins = [note[: note.index('position_encoding=')] for note in checked(**values)]
    assert begins == ([] if noted is None else [noted])


# --- FLOPs ----------------------------------------------------------------------------------------


def test_wrong_flops_are_noted(register):
    class Linear(NeverRotates):
        """Linear attention (Σ k vᵀ) q, without a softmax, with the FLOPs of standard attention."""

        def forward(self, x, positions):
            q, k, v = (
                part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for part in self.qkv(x).chunk(3, dim=-1)
            )
            states = (k[..., None] * v[..., None, :]).cumsum(2)  # (B, H, T, D, Dv)
            return self.project_output((q[..., None, :] @ states)[..., 0, :])

    class Counted(Linear):
        def flops(self, seq_len, causal):
            total = super().flops(seq_len, causal)
            scores = 2.0 * self.num_heads * self.qk_head_dim * self.v_head_dim * seq_len
            return {**total, 'attention_scores': scores}

    sizes = {'block_size': 64, 'position_encoding': 'none'}
    register(ATTENTION_REGISTRY, 'mine', Linear)
    (note,) = checked(attention_type='mine', **sizes)
    assert "attention_type='mine': Linear.flops() returns" in note
    # FLOPs per sequence for C = 16 and heads of 4: 8 · C² per token for the projections, and the
    # scores of standard attention or of linear attention.
    assert f'{64 * 8 * 16**2 + 4 * 64 * 64 * 16:,} FLOPs for a sequence of 64 tokens' in note
    assert f'PyTorch counts {64 * 8 * 16**2 + 2 * 64 * 16 * 4:,}' in note
    register(ATTENTION_REGISTRY, 'counted', Counted)
    assert checked(attention_type='counted', **sizes) == []


def test_uncounted_products_are_noted_by_class(register):
    class Squared(Activation):
        def __init__(self, config):
            super().__init__(config)
            self.weight = nn.Parameter(torch.empty(config.d_ff, config.d_ff))

        def initial_values(self):
            return {'weight': Initial.normal(0.1)}

        def forward(self, x):
            return x @ self.weight

    register(ACTIVATION_REGISTRY, 'squared', Squared)
    (note,) = flops_notes(tiny(activation='squared', ffn_bias=True))
    assert "activation='squared': Squared.flops() returns 0 FLOPs" in note
