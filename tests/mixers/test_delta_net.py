"""components/delta_net.py: against transformers' modules; options, names, initial values."""

import pytest
import torch
from helpers.architectures import tiny
from helpers.mixers import mixer_module, random_inputs, random_starts, with_starts
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from components import delta_net
from components.attention_inputs import AttentionInputs
from model_builder import build_model
from model_config import MIXER_REGISTRY

pytestmark = pytest.mark.usefixtures('one_thread')

C = 16  # n_embd


# --- transformers ---------------------------------------------------------------------------------


def qwen3_next(modeling, our):
    """in_proj_qkvz and in_proj_ba hold, for each key head, its rows of q, k, v, z and of b, a."""
    config = modeling.Qwen3NextConfig(
        hidden_size=C,
        linear_num_key_heads=our.key_heads,
        linear_num_value_heads=our.heads,
        linear_key_head_dim=our.k_dim,
        linear_value_head_dim=our.v_dim,
        linear_conv_kernel_dim=our.convolution.width,
        rms_norm_eps=our.norm.eps,
        layer_types=['linear_attention'],
        num_hidden_layers=1,
    )
    other = modeling.Qwen3NextGatedDeltaNet(config, 0)

    def by_key_head(*rows):
        return torch.cat([r.unflatten(0, (our.key_heads, -1)) for r in rows], dim=1).flatten(0, 1)

    q, k, v, b, a, z = our.input.weight.split((*our.qkv_rows, *our.rows[1:]))
    return other, {
        'in_proj_qkvz.weight': by_key_head(q, k, v, z),
        'in_proj_ba.weight': by_key_head(b, a),
        'conv1d.weight': our.convolution.weight[:, None],
        'A_log': our.A_log,
        'dt_bias': our.dt_bias,
        'norm.weight': our.norm.weight,
        'out_proj.weight': our.output.weight,
    }


def olmo_hybrid(modeling, our):
    config = modeling.OlmoHybridConfig(
        hidden_size=C,
        linear_num_key_heads=our.key_heads,
        linear_num_value_heads=our.heads,
        linear_key_head_dim=our.k_dim,
        linear_value_head_dim=our.v_dim,
        linear_conv_kernel_dim=our.convolution.width,
        linear_allow_neg_eigval=our.largest_beta == 2,
        num_attention_heads=4,
        num_hidden_layers=2,
        layer_types=['linear_attention', 'full_attention'],
    )
    other = modeling.OlmoHybridGatedDeltaNet(config, 0)
    names = ('q_proj', 'k_proj', 'v_proj', 'b_proj', 'a_proj', 'g_proj')
    rows = our.input.weight.split((*our.qkv_rows, *our.rows[1:]))
    return other, {
        **{f'{name}.weight': weight for name, weight in zip(names, rows)},
        'conv1d.weight': our.convolution.weight[:, None],
        'A_log': our.A_log,
        'dt_bias': our.dt_bias,
        'o_norm.weight': our.norm.weight,
        'o_proj.weight': our.output.weight,
    }


def kimi_linear(modeling, our):
    config = modeling.KimiLinearConfig(
        hidden_size=C,
        linear_num_heads=our.heads,
        linear_head_dim=our.k_dim,
        linear_conv_kernel_dim=our.convolution.width,
        rms_norm_eps=our.norm.eps,
        num_attention_heads=4,
        num_hidden_layers=2,
        layer_types=['linear_attention', 'full_attention'],
    )
    other = modeling.KimiLinearDeltaAttention(config, 0)
    names = ('q_proj', 'k_proj', 'v_proj', 'b_proj', 'forget_gate.f_a_proj', 'g_a_proj')
    rows = our.input.weight.split((*our.qkv_rows, *our.rows[1:]))
    return other, {
        **{f'{name}.weight': weight for name, weight in zip(names, rows)},
        'conv1d.weight': our.convolution.weight[:, None],
        'forget_gate.f_b_proj.weight': our.decay_output.weight,
        'forget_gate.A_log': our.A_log.view(1, 1, -1, 1),
        'forget_gate.dt_bias': our.dt_bias,
        'g_b_proj.weight': our.gate_output.weight,
        'o_norm.weight': our.norm.weight,
        'o_proj.weight': our.output.weight,
    }


SIZES = {'gdn_heads': 2, 'gdn_value_heads': 4, 'gdn_head_dim': 6, 'gdn_v_head_dim': 5}
CASES = [
    (qwen3_next, 'gated_deltanet', {**SIZES, 'gdn_norm_eps': 1e-3}),
    (olmo_hybrid, 'gated_deltanet', {'gdn_negative_eigenvalues': True}),
    (olmo_hybrid, 'gated_deltanet', {**SIZES, 'gdn_conv_size': 3}),
    (kimi_linear, 'kda', {'gdn_heads': 3, 'gdn_head_dim': 5, 'gdn_norm_eps': 1e-3}),
]


@pytest.mark.parametrize('other_module, mixer, options', CASES)
def test_equals_transformers(other_module, mixer, options):
    """Outputs and all gradients, for 70 tokens: more than a chunk."""
    name = other_module.__name__
    modeling = pytest.importorskip(f'transformers.models.{name}.modeling_{name}')
    our = mixer_module(tiny(mixer=mixer, **options), torch.float32)
    with torch.no_grad():
        other, weights = other_module(modeling, our)
        other.load_state_dict(weights)
    x = random_inputs(2, 70, C, dtype=torch.float32).requires_grad_()
    y, expected = our(x, AttentionInputs()), other(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-6)
    # The same weights again, as functions of ours, so that gradients are compared in their layout.
    _, weights = other_module(modeling, our)
    factors = random_inputs(2, 70, C, seed=1, dtype=torch.float32)
    of_x, *of_theirs = torch.autograd.grad(
        (expected * factors).sum(), [x, *(other.get_parameter(name) for name in weights)]
    )
    ours = [x, *our.parameters()]
    actual = torch.autograd.grad((y * factors).sum(), ours)
    mapped = torch.autograd.grad(list(weights.values()), ours[1:], of_theirs)
    for gradient, expected_gradient in zip(actual, (of_x, *mapped), strict=True):
        scale = expected_gradient.abs().max().item()
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5 * scale)


# --- Options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'mixer, k_dim, v_dim, gate',
    [('gated_deltanet', 96, 192, True), ('deltanet', 128, 128, False), ('kda', 128, 128, True)],
)
def test_derived_sizes(mixer, k_dim, v_dim, gate):
    config = tiny(mixer=mixer, n_embd=2048, n_head=16)
    assert (config.gdn_heads, config.gdn_value_heads) == (16, 16)
    assert (config.gdn_head_dim, config.gdn_v_head_dim, config.gdn_gate) == (k_dim, v_dim, gate)
    fewer = config.replace(gdn_heads=8)
    assert fewer.gdn_heads * fewer.gdn_head_dim == 16 * k_dim
    more = config.replace(gdn_value_heads=32)
    assert 2 * more.gdn_v_head_dim == v_dim


def test_value_heads_are_a_multiple_of_key_heads():
    with pytest.raises(UserError, match=r'--gdn_value_heads=6'):
        tiny(mixer='gated_deltanet', gdn_heads=3, gdn_value_heads=4)


def test_mixers_of_a_layer_share_options():
    """They get one value: where their defaults differ, it must be set."""
    with pytest.raises(UserError) as error:
        tiny(mixer='deltanet+gated_deltanet', gdn_head_dim=4)
    assert [problem.rpartition('Set ')[2] for problem in error.value.problems] == [
        *('--gdn_v_head_dim.', '--gdn_gate.')
    ]
    assert '4 in deltanet and 8 in gated_deltanet' in error.value.problems[0]
    config = tiny(mixer='deltanet+kda', gdn_gate=True)  # whose other defaults are the same
    mixers = build_model(config).blocks[0].mixers
    assert {(each.k_dim, each.v_dim, each.rows[-1] > 0) for each in mixers.values()} == {
        (4, 4, True)
    }


@pytest.mark.parametrize(
    'options, tag',
    [
        ({}, 'GDN-'),
        ({'gdn_heads': 4, 'gdn_head_dim': 3, 'gdn_v_head_dim': 6}, 'GDN-LN'),
        ({'gdn_heads': 2}, 'GDN-H2-'),
        ({'gdn_value_heads': 8, 'gdn_head_dim': 5}, 'GDN-VH8-D5-'),
        ({'gdn_v_head_dim': 7, 'gdn_conv_size': 0}, 'GDN-DV7-Conv0-'),
        ({'gdn_negative_eigenvalues': True, 'gdn_gate': False}, 'GDN-Neg-NoGate-'),
    ],
)
def test_name(options, tag):
    assert tag in tiny(mixer='gated_deltanet', **options).name


def test_parameters_of_qwen3_next():
    """A layer of Qwen3-Next-80B-A3B: projections of 12,288 + 64 and 2,048 rows, the convolution's
    8,192 channels, 32 heads."""
    config = tiny(
        mixer='gated_deltanet', n_embd=2048, gdn_heads=16, gdn_value_heads=32, gdn_head_dim=128
    )
    module = MIXER_REGISTRY['gated_deltanet'](config, 0)
    expected = 2048 * (12_288 + 64) + 4096 * 2048 + 8192 * 4 + 32 * 2 + 128
    assert sum(parameter.numel() for parameter in module.parameters()) == expected


# --- Initial values -------------------------------------------------------------------------------


@pytest.mark.parametrize('mixer, lowest_rate', [('gated_deltanet', 0.01), ('kda', 1.0)])
def test_initial_decays(mixer, lowest_rate):
    """exp(A_log) is uniform up to 16, softplus(dt_bias) log-uniform from 0.001 to 0.1."""
    config = tiny(mixer=mixer, n_embd=4, gdn_heads=2000, gdn_head_dim=1, gdn_v_head_dim=1)
    (module,) = build_model(config, 'cpu', seed=1).blocks[0].mixers.values()
    rates = (module.A_log.exp() - lowest_rate) / (16 - lowest_rate)
    steps = torch.log(torch.nn.functional.softplus(module.dt_bias) / 1e-3) / torch.tensor(100).log()
    for values in (rates, steps):
        sorted_values, _ = values.detach().double().sort()
        expected = torch.linspace(0, 1, len(values), dtype=torch.float64)
        assert (sorted_values - expected).abs().max() < 0.04  # Kolmogorov-Smirnov


def test_muon_orthogonalizes_each_projection_alone():
    for mixer in ('deltanet', 'gated_deltanet', 'kda'):
        module = mixer_module(tiny(mixer=mixer, gdn_gate=True))
        rows = module.matrices()[module.input.weight]
        assert sum(rows) == len(module.input.weight) and 0 not in rows
        assert rows[:3] == {'gated_deltanet': (12, 12, 24)}.get(mixer, (16, 16, 16))
        assert module.output.weight in module.matrices()


def test_gates_and_conv_without_weights():
    """Without the convolution and the gate there are no weights of theirs, in no mixer."""
    for mixer in ('deltanet', 'gated_deltanet', 'kda'):
        config = tiny(mixer=mixer, gdn_gate=False, gdn_conv_size=0)
        names = {name for name, _ in mixer_module(config).named_parameters()}
        decays = set() if mixer == 'deltanet' else {'A_log', 'dt_bias'}
        low_rank = {'decay_output.weight'} if mixer == 'kda' else set()
        assert names == {'input.weight', 'output.weight', 'norm.weight'} | decays | low_rank


@pytest.mark.parametrize('mixer', ['deltanet', 'gated_deltanet', 'kda'])
def test_segments_change_nothing(mixer, monkeypatch):
    """A sequence in several segments, with documents: outputs, gradients, and FLOPs as counted."""
    module = mixer_module(tiny(mixer=mixer, document_mask=True, end_of_text=3))
    x, inputs = random_inputs(2, 45, C).requires_grad_(), with_starts(random_starts(2, 45))
    results = []
    for segment in (64, 16):
        monkeypatch.setattr(delta_net, 'SEGMENT', segment)
        with FlopCounterMode(display=False) as counter:
            y = module(x, inputs)
        assert 2 * sum(module.flops(45, False).values()) == counter.get_total_flops()
        weights = random_inputs(2, 45, C, seed=1)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
