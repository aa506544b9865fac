"""The gated short convolution equals a loop over tokens, and LFM2's module in transformers."""

from functools import partial

import pytest
import torch
from helpers.architectures import tiny
from helpers.mixers import check_loop, mixer_config, mixer_module, random_inputs, with_starts

from model_builder import build_model

LENGTHS = (1, 2, 3, 4, 21)
VARIANTS = [{}, {'short_conv_bias': False}, {'short_conv_size': 1}, {'short_conv_size': 5}]


def loop(mixer, size: int, x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """LFM2's equations, one token after the other: B, C, h = in(u); y = out(C · conv(B · h))."""
    weights = dict(mixer.named_parameters())

    def linear(name, token):
        return weights[f'{name}.weight'] @ token + weights.get(f'{name}.bias', 0)

    rows = []
    for sequence, begins in zip(x, starts):
        window: list[torch.Tensor] = []
        for token, begin in zip(sequence, begins):
            before, after, h = linear('input', token).split(len(token))
            window = [] if begin else window
            window = [*window, before * h][-size:]
            taps = weights['convolution.weight'][:, size - len(window) :]
            y = (torch.stack(window, dim=1) * taps).sum(dim=1) + weights.get('convolution.bias', 0)
            rows.append(linear('output', after * y))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize('values', VARIANTS, ids=str)
def test_equals_a_loop_over_tokens(values):
    config = mixer_config('short_conv', **values)
    mixer = mixer_module(config)
    loop_of = partial(loop, mixer, config.short_conv_size)
    check_loop(mixer, config.n_embd, loop_of, LENGTHS)


@pytest.mark.parametrize('bias', [False, True])
def test_equals_transformers(bias):
    """Outputs and gradients of LFM2's convolution with equal weights."""
    family = pytest.importorskip('transformers.models.lfm2.modeling_lfm2')
    their_config = family.Lfm2Config(
        hidden_size=16, num_hidden_layers=1, conv_L_cache=3, conv_bias=bias, layer_types=['conv']
    )
    reference = family.Lfm2ShortConv(their_config, layer_idx=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    config = tiny(mixer='short_conv', n_layer=1, short_conv_bias=bias)
    ours = build_model(config, 'cpu', seed=0).blocks[0].mixers['short_conv']
    names = {'in_proj': 'input', 'conv': 'convolution', 'out_proj': 'output'}
    weights = {}
    for name, parameter in reference.named_parameters():
        module, _, kind = name.partition('.')
        weights[f'{names[module]}.{kind}'] = parameter
    ours.load_state_dict({n: weights[n].view(p.shape) for n, p in ours.named_parameters()})
    x = random_inputs(2, 12, 16, dtype=torch.float32)
    actual, expected = ours(x, with_starts(None)), reference(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for y in (actual, expected):
        y.square().sum().backward()
    assert weights.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        gradient = weights[name].grad.view(parameter.shape)
        scale = gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * scale)


def test_state_is_the_last_two_vectors():
    config = mixer_config('short_conv')
    module = mixer_module(config, torch.float32)
    cache = module.empty_cache(100)
    module(random_inputs(3, 50, 16, dtype=torch.float32), with_starts(None, cache))
    assert cache.nbytes == 3 * 2 * 16 * 4
