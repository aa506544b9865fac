"""Mamba equals a loop over tokens written from the paper, and transformers' own mixers."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import tiny
from helpers.mixers import (
    check_loop,
    mixer_config,
    mixer_module,
    random_inputs,
    with_starts,
)

from components import scan
from model_builder import build_model, parameter_groups

MIN_TOKENS = 5
LENGTHS = (1, 3, MIN_TOKENS - 1, MIN_TOKENS, MIN_TOKENS + 1, 2 * MIN_TOKENS + 5)
VARIANTS = [
    {},
    {'mamba_expand': 1, 'mamba_state_size': 3, 'mamba_dt_rank': 4, 'mamba_conv_size': 2},
    {'mamba_conv_bias': False, 'mamba_proj_bias': True},
    {'mamba_norm': 'weighted', 'mamba_dt_rank': 4, 'mamba_norm_eps': 0.1},
    {'mamba_norm': 'unweighted', 'mamba_dt_rank': 4},
]


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(scan, 'MIN_TOKENS', MIN_TOKENS)
    monkeypatch.setitem(scan.BLOCK_ELEMENTS, 'cpu', 1)


def loop(mixer, config, x, starts):
    """Algorithm 2 of Gu & Dao 2023 with the block of figure 3, one token after the other."""
    weights = dict(mixer.named_parameters())
    width, states, rank = (
        config.mamba_expand * config.n_embd,
        config.mamba_state_size,
        config.mamba_dt_rank,
    )
    rows = []
    for sequence, begins in zip(x, starts):
        h, window = torch.zeros(width, states, dtype=x.dtype), []
        for token, begin in zip(sequence, begins):
            if begin:
                h, window = torch.zeros_like(h), []
            u, z = (weights['in_proj.weight'] @ token + weights.get('in_proj.bias', 0)).split(width)
            window = [*window, u][-config.mamba_conv_size :]
            taps = weights['conv.weight'][:, -len(window) :]
            mixed = (torch.stack(window, dim=1) * taps).sum(dim=1) + weights.get('conv.bias', 0)
            u = mixed * mixed.sigmoid()
            low_rank, b, c = (weights['x_proj.weight'] @ u).split([rank, states, states])
            if config.mamba_norm != 'none':
                normed = []
                for number, part in enumerate((low_rank, b, c)):
                    size = (part.square().mean() + config.mamba_norm_eps).sqrt()
                    normed.append(part / size * weights.get(f'norms.{number}.weight', 1))
                low_rank, b, c = normed
            dt = weights['dt_proj.weight'] @ low_rank + weights['dt_proj.bias']
            dt = torch.log(1 + dt.exp())
            decay = torch.exp(dt[:, None] * -weights['A_log'].exp())
            h = decay * h + (dt * u)[:, None] * b
            y = (h @ c + weights['D'] * u) * z * z.sigmoid()
            rows.append(weights['out_proj.weight'] @ y + weights.get('out_proj.bias', 0))
    return torch.stack(rows).view(x.shape)


@pytest.mark.usefixtures('short_blocks')
@pytest.mark.parametrize('values', VARIANTS, ids=str)
def test_equals_the_paper_token_by_token(values):
    config = mixer_config('mamba', **values)
    mixer = mixer_module(config)
    lengths = LENGTHS[-1:] if values else LENGTHS
    check_loop(mixer, config.n_embd, partial(loop, mixer, config), lengths)


def theirs(family: str):
    """A mixer of transformers with random weights, and our config of it."""
    models = pytest.importorskip('transformers.models')
    common = {'hidden_size': 16, 'hidden_act': 'silu'}
    sizes = {'mamba_state_size': 6, 'mamba_dt_rank': 5, 'mamba_conv_size': 3}
    if family == 'jamba':
        from transformers.models.jamba.modeling_jamba import JambaMambaMixer

        config = models.jamba.JambaConfig(
            **common, mamba_d_state=6, mamba_dt_rank=5, mamba_d_conv=3, rms_norm_eps=1e-5
        )
        norm = {'mamba_norm': 'weighted', 'mamba_norm_eps': 1e-5}
        mixer = JambaMambaMixer(config, layer_idx=0)
    else:
        of_family = {'state_size': 6, 'time_step_rank': 5, 'conv_kernel': 3}
        if family == 'mamba':
            from transformers.models.mamba.modeling_mamba import MambaMixer

            config, norm = models.mamba.MambaConfig(**common, **of_family), {}
            mixer = MambaMixer(config, layer_idx=0)
        else:
            from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer

            config = models.falcon_mamba.FalconMambaConfig(
                **common, **of_family, mixer_rms_eps=1e-4
            )
            norm = {'mamba_norm': 'unweighted', 'mamba_norm_eps': 1e-4}
            mixer = FalconMambaMixer(config, layer_idx=0, initialize_mixer_weights=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return mixer, tiny(mixer='mamba', n_layer=1, **sizes, **norm)


NAMES = {'conv1d': 'conv', 'dt_layernorm': 'norms.0', 'b_layernorm': 'norms.1'}
NAMES |= {'c_layernorm': 'norms.2'}


@pytest.mark.parametrize('family', ['mamba', 'jamba', 'falcon_mamba'])
def test_equals_transformers(family):
    """Outputs and gradients with equal weights; with `eval`, so that no kernel is looked for."""
    reference, config = theirs(family)
    reference.eval()
    ours = build_model(config, 'cpu', seed=0).blocks[0].mixers['mamba']
    weights = {}
    for name, parameter in reference.named_parameters():
        module, _, kind = name.rpartition('.')
        weights['.'.join(filter(None, (NAMES.get(module, module), kind)))] = parameter
    ours.load_state_dict({n: w.squeeze(1) if w.dim() == 3 else w for n, w in weights.items()})
    x = random_inputs(2, 12, 16, dtype=torch.float32)
    actual, expected = ours(x, with_starts(None)), reference(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for y in (actual, expected):
        y.square().sum().backward()
    for name, parameter in ours.named_parameters():
        gradient = weights[name].grad.view(parameter.shape)
        scale = gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5 * scale)


def test_initial_values():
    """A = -1 ... -N, D = 1, steps log-uniform from 0.001 to 0.1 (section 3.6 of the paper)."""
    model = build_model(tiny(mixer='mamba', n_embd=256), 'cpu', seed=1)
    mixer = model.blocks[0].mixers['mamba']
    expected = torch.arange(1.0, 17.0).expand(512, 16)
    torch.testing.assert_close(mixer.A_log.exp(), expected)
    assert (mixer.D == 1).all()
    steps = F.softplus(mixer.dt_proj.bias).log()
    low, high = math.log(1e-3), math.log(1e-1)
    assert low - 1e-3 <= steps.min() and steps.max() <= high + 1e-3
    assert steps.mean().item() == pytest.approx((low + high) / 2, abs=0.2)
    assert steps.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.1)
    assert mixer.dt_proj.weight.abs().max() <= 16**-0.5


def test_optimizer_groups():
    """Decays and D have no weight decay; Muon takes each projection alone."""
    model = build_model(tiny(mixer='mamba', mamba_dt_rank=4, ffn_type='none', n_layer=1))
    mixer = model.blocks[0].mixers['mamba']
    hidden = {id(p) for p in parameter_groups(model)[0].parameters}
    assert hidden == {
        id(layer.weight) for layer in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    }
    assert mixer.matrices()[mixer.in_proj.weight] == (32, 32)
    assert mixer.matrices()[mixer.x_proj.weight] == (4, 16, 16)
    undecayed = {id(p) for g in parameter_groups(model) if not g.decayed for p in g.parameters}
    assert {id(mixer.A_log), id(mixer.D), id(mixer.dt_proj.bias)} <= undecayed


@pytest.mark.parametrize('key', ['mamba_dt_rank', 'mamba_state_size'])
def test_norm_of_a_single_number_is_refused(key):
    with pytest.raises(Exception, match=f'{key}=1 leaves only the sign'):
        tiny(mixer='mamba', mamba_norm='weighted', **{'mamba_dt_rank': 4, key: 1})
