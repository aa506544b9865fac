"""RG-LRU equals a loop over tokens written from the paper, and RecurrentGemma's block."""

import math
from functools import partial

import pytest
import torch
from helpers.architectures import tiny
from helpers.mixers import (
    check_loop,
    mixer_config,
    mixer_module,
    random_inputs,
    with_starts,
)

from components import scan
from components.rg_lru import LARGEST_SLOPE, _BoundedSqrt
from model_builder import build_model

MIN_TOKENS = 5
LENGTHS = (1, 3, MIN_TOKENS - 1, MIN_TOKENS, MIN_TOKENS + 1, 2 * MIN_TOKENS + 5)
VARIANTS = [
    {},
    {'rg_lru_width': 24, 'rg_lru_heads': 3, 'rg_lru_conv_size': 2},
    {'rg_lru_heads': 1, 'rg_lru_bias': False},
]


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(scan, 'MIN_TOKENS', MIN_TOKENS)
    monkeypatch.setitem(scan.BLOCK_ELEMENTS, 'cpu', 1)


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def loop(mixer, config, x, starts):
    """Equations 1 to 4 of De et al. 2024 with the block of figure 2, one token after the other."""
    weights = dict(mixer.named_parameters())

    def linear(name, token):
        return weights[f'{name}.weight'] @ token + weights.get(f'{name}.bias', 0)

    def gate(name, token):
        matrix = torch.block_diag(*weights[f'{name}_weight'])
        return torch.sigmoid(token @ matrix + weights[f'{name}_bias'].flatten())

    rows = []
    for sequence, begins in zip(x, starts):
        h, window = torch.zeros(config.rg_lru_width, dtype=x.dtype), []
        for token, begin in zip(sequence, begins):
            if begin:
                h, window = torch.zeros_like(h), []
            window = [*window, linear('linear_x', token)][-config.rg_lru_conv_size :]
            taps = weights['conv.weight'][:, -len(window) :]
            u = (torch.stack(window, dim=1) * taps).sum(dim=1) + weights['conv.bias']
            r, i = gate('recurrent_gate', u), gate('input_gate', u)
            a = torch.sigmoid(-weights['recurrent_param']) ** (8 * r)
            h = a * h + (1.0 if begin else (1 - a**2).sqrt()) * i * u
            rows.append(linear('linear_out', h * gelu(linear('linear_y', token))))
    return torch.stack(rows).view(x.shape)


@pytest.mark.usefixtures('short_blocks')
@pytest.mark.parametrize('values', VARIANTS, ids=str)
def test_equals_the_paper_token_by_token(values):
    config = mixer_config('rg_lru', **values)
    mixer = mixer_module(config)
    lengths = LENGTHS[-1:] if values else LENGTHS
    check_loop(mixer, config.n_embd, partial(loop, mixer, config), lengths, materialize_grads=True)


def test_equals_transformers():
    """Outputs and gradients of RecurrentGemma's block with equal weights."""
    family = pytest.importorskip('transformers.models.recurrent_gemma.modeling_recurrent_gemma')
    their_config = family.RecurrentGemmaConfig(
        hidden_size=16, lru_width=24, num_attention_heads=4, conv1d_width=3
    )
    reference = family.RecurrentGemmaRecurrentBlock(their_config, layer_idx=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    config = tiny(mixer='rg_lru', n_layer=1, rg_lru_width=24, rg_lru_conv_size=3)
    ours = build_model(config, 'cpu', seed=0).blocks[0].mixers['rg_lru']
    weights = {
        name.replace('rg_lru.', '').replace('conv_1d', 'conv'): parameter
        for name, parameter in reference.named_parameters()
    }
    ours.load_state_dict({n: weights[n].view(p.shape) for n, p in ours.named_parameters()})
    assert weights.keys() == dict(ours.named_parameters()).keys()
    x = random_inputs(2, 12, 16, dtype=torch.float32)
    actual = ours(x, with_starts(None))
    expected, _ = reference(x, torch.arange(12)[None], None, use_cache=False)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for y in (actual, expected):
        y.square().sum().backward()
    for name, parameter in ours.named_parameters():
        gradient = weights[name].grad.view(parameter.shape)
        scale = gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5 * scale)


def test_initial_decays():
    """σ(Λ)^8 is uniform from 0.9 to 0.999 (section 2.4 of the paper)."""
    model = build_model(tiny(mixer='rg_lru', n_embd=1024), 'cpu', seed=1)
    mixer = model.blocks[0].mixers['rg_lru']
    decays = torch.sigmoid(-mixer.recurrent_param) ** 8
    assert decays.min() + 1e-5 >= 0.9 and decays.max() <= 0.999 + 1e-5
    assert decays.mean().item() == pytest.approx(0.9495, abs=0.005)
    assert decays.std().item() == pytest.approx(0.099 / 12**0.5, rel=0.1)
    assert mixer.input_gate_weight.std().item() == pytest.approx(256**-0.5, rel=0.05)


def test_a_decay_of_one_has_a_finite_gradient():
    """√(1 - a²) has an infinite slope there; its slope is bounded as in RecurrentGemma."""
    x = torch.tensor([0.0, 1e-30, 1e-7, 0.25], dtype=torch.float64, requires_grad=True)
    root = _BoundedSqrt.apply(x)
    assert torch.equal(root, x.sqrt())
    (gradient,) = torch.autograd.grad(root.sum(), x)
    assert gradient.tolist() == [LARGEST_SLOPE, LARGEST_SLOPE, LARGEST_SLOPE, 1.0]
    mixer = mixer_module(mixer_config('rg_lru'))
    with torch.no_grad():
        mixer.recurrent_param.fill_(-1e4)  # a = 1
    mixer(random_inputs(1, 9, 16), with_starts(None)).sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters() if p.grad is not None)


def test_heads_divide_the_width():
    with pytest.raises(Exception, match=r'rg_lru_heads=5 does not divide.*--rg_lru_heads=4'):
        tiny(mixer='rg_lru', rg_lru_heads=5)
