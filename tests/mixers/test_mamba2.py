"""components/mamba2.py: against a loop over tokens, and against the modules of transformers."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from helpers.mixers import mixer_config, mixer_module, random_inputs, random_starts

from common.errors import UserError
from components import state_space_duality
from components.attention_inputs import AttentionInputs
from components.kv_cache import MixerState
from model_builder import build_model

pytestmark = pytest.mark.usefixtures('one_thread')

CHUNK = 4
LENGTHS = (1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5)
VARIANTS = (
    {},
    {'mamba2_width': 24, 'mamba2_head_dim': 2, 'mamba2_state_size': 5, 'mamba2_groups': 3},
    {
        'mamba2_groups': 2,
        'mamba2_proj_bias': True,
        'mamba2_conv_bias': False,
        'mamba2_conv_size': 2,
    },
    {'mamba2_norm': False, 'mamba2_conv_size': 1},
    {'mamba2_norm_first': True, 'mamba2_groups': 4},
    {'mamba2_dt_min': 0.02, 'mamba2_dt_max': 0.06},
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(state_space_duality, 'CHUNK', CHUNK)
    monkeypatch.setattr(state_space_duality, 'SEGMENT', 2 * 2 * 8 * CHUNK**2)  # two chunks


# --- A loop over tokens ---------------------------------------------------------------------------


def split_rows(module, x):
    """z, x, B, C and the step of each head, of one token (C,)."""
    projected = module.in_proj.weight @ x
    if module.in_proj.bias is not None:
        projected = projected + module.in_proj.bias
    return projected.split(module.rows)


def convolved(module, window):
    """silu of the convolution's output at the last token of a window of its inputs, (n, channels),
    the earliest first."""
    weight = module.conv.weight
    taps = [weight[:, weight.size(1) - len(window) + i] for i in range(len(window))]
    y = sum(tap * each for tap, each in zip(taps, window))
    if module.conv.bias is not None:
        y = y + module.conv.bias
    return y * torch.sigmoid(y)


def normalized(module, y):
    """RMSNorm of each group, without the weight."""
    rows = y.view(module.groups, -1)
    return (rows / (rows.square().mean(dim=1, keepdim=True) + module.norm.eps).sqrt()).flatten()


def of_document(module, document, config):
    """The output (T, C) of one document (T, C), token by token (Dao & Gu 2024, section 7)."""
    heads, groups = module.heads, module.groups
    inner, _, keys, _, _ = module.rows
    size = config.mamba2_state_size
    state = document.new_zeros(heads, size, config.mamba2_head_dim)
    inputs, outputs = [], []
    for token in document:
        z, *xbc, steps = split_rows(module, token)
        inputs.append(torch.cat(xbc))
        mixed = convolved(module, inputs[-config.mamba2_conv_size :])
        x, b, c = mixed.split((inner, keys, keys))
        delta = torch.log1p(torch.exp(steps + module.dt_bias))
        delta = torch.clamp(delta, config.mamba2_dt_min, config.mamba2_dt_max)
        y = []
        for head in range(heads):
            group = head * groups // heads
            of_group = slice(group * size, (group + 1) * size)
            of_head = slice(head * config.mamba2_head_dim, (head + 1) * config.mamba2_head_dim)
            decay = torch.exp(-delta[head] * torch.exp(module.A_log[head]))
            added = delta[head] * torch.outer(b[of_group], x[of_head])
            after = decay * state[head] + added
            state = torch.cat((state[:head], after[None], state[head + 1 :]))
            y.append(c[of_group] @ after + module.D[head] * x[of_head])
        y, gate = torch.cat(y), z * torch.sigmoid(z)
        if not config.mamba2_norm:
            y = y * gate
        elif config.mamba2_norm_first:
            y = module.norm.weight * normalized(module, y) * gate
        else:
            y = module.norm.weight * normalized(module, y * gate)
        y = module.out_proj.weight @ y
        outputs.append(y if module.out_proj.bias is None else y + module.out_proj.bias)
    return torch.stack(outputs)


def by_loop(module, x, starts, config):
    rows = []
    for sequence, begins in zip(x, starts):
        bounds = begins.nonzero().flatten().tolist()[1:]
        parts = sequence.tensor_split(bounds)
        rows.append(torch.cat([of_document(module, part, config) for part in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize('values', VARIANTS, ids=lambda values: '-'.join(values) or 'defaults')
def test_equals_a_loop_over_tokens(values):
    """Values, and gradients of the input and all weights, in float64."""
    config = mixer_config('mamba2', **values)
    module = mixer_module(config)
    with torch.no_grad():
        module.A_log.add_(torch.linspace(-1, 3, module.heads))  # from slow to fast
    for length in LENGTHS:
        for seed in (None, length):
            starts = torch.zeros(2, length, dtype=torch.bool)
            starts[:, 0] = True
            if seed is not None:
                starts = random_starts(2, length, seed)
            x = random_inputs(2, length, 16, seed=length).requires_grad_()
            y = module(x, AttentionInputs(starts=None if seed is None else starts))
            check_equal(module, x, y, by_loop(module, x, starts, config))


def check_equal(module, x, y, expected, tolerance=1e-9):
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    cotangent = random_inputs(*y.shape, seed=9).to(y.dtype)
    points = (x, *module.parameters())
    for actual, correct in zip(
        torch.autograd.grad(y, points, cotangent),
        torch.autograd.grad(expected, points, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(actual, correct, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('documents', [False, True])
def test_gradients_of_states(documents):
    """Gradients of the inputs, and of the states before and after, equal differences."""

    def random(*shape):
        return random_inputs(1, 1, torch.Size(shape).numel(), seed=len(shape)).view(shape)

    heads, dims, groups, size, length = 4, 2, 2, 3, 3 * CHUNK + 1
    inputs = state_space_duality.Inputs(
        x=random(2, length, heads, dims),
        steps=random(2, length, heads).exp(),
        log_decays=-random(2, length, heads).exp(),
        keys=random(2, length, groups, size),
        queries=random(2, length, groups, size).roll(1, dims=1),
    )
    state = random(2, groups, size, heads // groups, dims)
    starts = random_starts(2, length, seed=2) if documents else None
    if documents:
        starts[0, 0] = False

    def duality(skip, state, *inputs):
        inputs = state_space_duality.Inputs(*inputs)
        return state_space_duality.state_space_duality(inputs, skip, state, starts)

    points = [each.requires_grad_() for each in (random(heads), state, *inputs)]
    assert torch.autograd.gradcheck(duality, points)


def test_compiles_without_documents():
    module = mixer_module(mixer_config('mamba2'))
    compiled = torch.compile(module, backend='aot_eager', fullgraph=True)
    x = random_inputs(2, 3 * CHUNK, 16).requires_grad_()
    y, expected = (each(x, AttentionInputs()) for each in (compiled, module))
    check_equal(module, x, y, expected)


def test_steps_of_zero_and_strong_decays_are_exact():
    """A step that underflows adds nothing; a state that decays at once is forgotten; gradients are
    finite in fp32."""
    module = mixer_module(mixer_config('mamba2'), torch.float32)
    with torch.no_grad():
        module.dt_bias.copy_(torch.tensor([-1e4, 1e4] * 4))
        module.A_log.fill_(6.0)
    x = random_inputs(1, 3 * CHUNK, 16, dtype=torch.float32).requires_grad_()
    cache = MixerState()
    y = module(x, AttentionInputs(cache=cache))
    state = cache.get('state')[0, 0].transpose(0, 1)  # (H, N, P)
    assert state[::2].abs().max() < 1e-25
    alone = module(x[:, -4:], AttentionInputs())[:, -1]  # the width of the convolution
    torch.testing.assert_close(y[:, -1], alone, rtol=1e-4, atol=1e-4)
    actual = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    assert all(gradient.isfinite().all() for gradient in actual)


def test_initial_steps_and_rates():
    """softplus(dt_bias) is log-uniform from 1e-3 to 0.1, exp(A_log) is uniform from 1 to 16."""
    config = mixer_config('mamba2', mamba2_width=4000, mamba2_head_dim=1)
    module = build_model(config, 'cpu', seed=0).blocks[0].mixers['mamba2']
    for values, low, high in (
        (F.softplus(module.dt_bias.double()).log10(), -3.0, -1.0),
        (module.A_log.double().exp(), 1.0, 16.0),
    ):
        shares = (values - low) / (high - low)
        assert shares.min() > -1e-4 and shares.max() < 1 + 1e-4
        expected = (torch.arange(4000) + 0.5) / 4000
        assert (shares.sort().values - expected).abs().max() < 0.04  # Kolmogorov-Smirnov
    assert (module.D == 1).all()


@pytest.mark.parametrize(
    ('values', 'expected'),
    [
        ({'n_embd': 768, 'n_head': 12}, (1536, 64, 128)),
        ({'n_embd': 2560, 'n_head': 20}, (5120, 64, 128)),
        ({'n_embd': 128, 'n_head': 4}, (256, 32, 64)),
        ({'n_embd': 10, 'n_head': 3}, (20, 2, 4)),
        ({'mamba2_width': 15, 'n_embd': 16, 'n_head': 4}, (15, 3, 6)),
        ({'mamba2_head_dim': 8}, (32, 8, 16)),
    ],
)
def test_derived_sizes(values, expected):
    config = mixer_config('mamba2', **values)
    assert (config.mamba2_width, config.mamba2_head_dim, config.mamba2_state_size) == expected


@pytest.mark.parametrize(
    ('values', 'problem'),
    [
        ({'mamba2_head_dim': 6}, 'mamba2_width=32. Set a --mamba2_head_dim that does, such as 4'),
        ({'mamba2_groups': 6}, 'the 8 heads, .* such as --mamba2_groups=4'),
        ({'mamba2_dt_min': 0.2, 'mamba2_dt_max': 0.1}, 'mamba2_dt_max=0.1 is below .*=0.2'),
        ({'mamba2_norm': False, 'mamba2_norm_first': True}, 'mamba2_norm_first'),
    ],
)
def test_illegal_values_are_refused(values, problem):
    with pytest.raises(UserError, match=problem):
        mixer_config('mamba2', **values)


# --- Modules of transformers ----------------------------------------------------------------------

SIZES = {'hidden_size': 16, 'vocab_size': 11, 'num_hidden_layers': 2}
MAMBA = {
    **{'mamba_n_heads': 8, 'mamba_d_head': 4, 'mamba_n_groups': 2, 'mamba_d_state': 5},
    **{'mamba_d_conv': 3, 'mamba_expand': 2, 'mamba_chunk_size': 4},
}
OURS = {
    **{'mamba2_head_dim': 4, 'mamba2_groups': 2, 'mamba2_state_size': 5},
    'mamba2_conv_size': 3,
}
FALCON = {
    **(MAMBA | {'mamba_n_heads': 6, 'mamba_d_ssm': 24}),
    **{'mamba_conv_bias': True, 'ssm_in_multiplier': 0.7},
    'ssm_multipliers': [0.5, 1.5, 0.8, 1.2, 0.9],
}
MODULES = {
    'Mamba2Mixer': (
        {
            **{'num_heads': 8, 'head_dim': 4, 'n_groups': 2, 'state_size': 5, 'conv_kernel': 3},
            **{'expand': 2, 'chunk_size': 4, 'time_step_limit': (0.01, 0.05)},
            **{'layer_norm_epsilon': 1e-3, 'use_bias': True, 'use_conv_bias': False},
        },
        {
            **{'mamba2_dt_min': 0.01, 'mamba2_dt_max': 0.05},
            **{'mamba2_proj_bias': True, 'mamba2_conv_bias': False},
        },
    ),
    'BambaMixer': (
        MAMBA | {'rms_norm_eps': 1e-3, 'mamba_proj_bias': True},
        {'mamba2_proj_bias': True},
    ),
    'GraniteMoeHybridMambaLayer': (MAMBA | {'rms_norm_eps': 1e-3}, {}),
    'NemotronHMamba2Mixer': (
        {
            **{'mamba_num_heads': 6, 'mamba_head_dim': 4, 'n_groups': 2, 'ssm_state_size': 5},
            **{'conv_kernel': 3, 'chunk_size': 4, 'time_step_min': 0.02},
            **{'layer_norm_epsilon': 1e-3, 'layers_block_type': ['linear_attention'] * 2},
        },
        {'mamba2_dt_min': 0.02, 'mamba2_width': 24},
    ),
    'FalconH1Mixer': (
        FALCON | {'rms_norm_eps': 1e-3},
        {'mamba2_norm': False, 'mamba2_width': 24},
    ),
    'FalconH1Mixer, norm': (
        FALCON | {'rms_norm_eps': 1e-3, 'mamba_rms_norm': True},
        {'mamba2_norm_first': True, 'mamba2_width': 24},
    ),
    'FalconH1Mixer, gate first': (
        FALCON | {'rms_norm_eps': 1e-3, 'mamba_rms_norm': True, 'mamba_norm_before_gate': False},
        {'mamba2_width': 24},
    ),
}


def foreign_module(name: str, fields: dict):
    transformers = pytest.importorskip('transformers')
    family = {'Mamba2Mixer': 'mamba2', 'BambaMixer': 'bamba', 'FalconH1Mixer': 'falcon_h1'} | {
        'GraniteMoeHybridMambaLayer': 'granitemoehybrid',
        'NemotronHMamba2Mixer': 'nemotron_h',
    }
    config = transformers.AutoConfig.for_model(family[name], **SIZES, **fields)
    code = importlib.import_module(f'transformers.models.{family[name]}.modeling_{family[name]}')
    return getattr(code, name)(config, layer_idx=0).double(), config, code


def our_name(name: str) -> str:
    return name.replace('conv1d', 'conv')


def without_middle(weight: torch.Tensor) -> torch.Tensor:
    """The weight of a convolution as (channels, width); others unchanged."""
    return weight.squeeze(1) if weight.dim() == 3 else weight


@pytest.mark.optional
@pytest.mark.parametrize('case', MODULES)
def test_equals_the_module_of_transformers(case):
    """Values and gradients with the same weights; multipliers are folded into the projection."""
    fields, values = MODULES[case]
    theirs, config, code = foreign_module(case.split(',')[0], fields)
    eps = {'mamba2_norm_eps': 1e-3} if values.get('mamba2_norm', True) else {}
    ours = mixer_module(mixer_config('mamba2', **OURS, **eps, **values))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(1))
    factor = 1.0
    if 'ssm_multipliers' in fields:
        vector = code.compute_mup_vector(config).double()
        theirs.mup_vector = vector  # set by the model around it
        factor = fields['ssm_in_multiplier'] * vector.view(-1, 1)
    weights = dict(theirs.named_parameters())
    if not values.get('mamba2_norm', True):
        weights.pop('norm.weight', None)
    with torch.no_grad():
        state = {our_name(name): without_middle(w) for name, w in weights.items()}
        state['in_proj.weight'] = state['in_proj.weight'] * factor
        ours.load_state_dict(state)
    for length in LENGTHS:
        x = random_inputs(2, length, 16, seed=length).requires_grad_()
        y, expected = ours(x, AttentionInputs()), theirs.train()(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        cotangent = random_inputs(*y.shape, seed=9)
        actual = torch.autograd.grad(y, [x, *ours.parameters()], cotangent)
        correct = torch.autograd.grad(expected, [x, *weights.values()], cotangent)
        torch.testing.assert_close(actual[0], correct[0], rtol=1e-4, atol=1e-5)
        of_theirs = {our_name(n): without_middle(g) for n, g in zip(weights, correct[1:])}
        for (name, _), gradient in zip(ours.named_parameters(), actual[1:], strict=True):
            expected = of_theirs[name] / (factor if name == 'in_proj.weight' else 1.0)
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
