"""components/initialization.py: standard deviations of initial weights, and the effect of the
width.
"""

import hashlib
import math

import pytest
import torch
from helpers.architectures import SIZES, changes_after_updates, random_tokens, tiny

from model_builder import build_model, parameter_groups

pytestmark = pytest.mark.usefixtures('one_thread')

RESIDUAL = ('attention.output.weight', 'ffn.down.weight')
TABLES = ('token_embedding.weight', 'output_head.projection.weight', 'table.weight')


@pytest.mark.parametrize(
    ('values', 'table', 'hidden', 'residual'),
    [
        ({}, 0.02, 0.02, 0.02 / math.sqrt(2 * 3)),
        ({'init_std': 0.1}, 0.1, 0.1, 0.1 / math.sqrt(2 * 3)),
        ({'depth_scaled_init': False}, 0.02, 0.02, 0.02),
        ({'initialization': 'normal'}, 0.02, 0.02, 0.02),
        ({'initialization': 'normal', 'init_std': 0.1}, 0.1, 0.1, 0.1),
        # Four times the base width: half the standard deviation in hidden matrices.
        (
            {'initialization': 'mup', 'mup_base_width': 4},
            0.02,
            0.01,
            0.01 / math.sqrt(2 * 3),
        ),
        (
            {'initialization': 'mup', 'mup_base_width': 4, 'depth_scaled_init': False},
            0.02,
            0.01,
            0.01,
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize('ffn_type', ['standard', 'swiglu'])
def test_weight_std_follows_rule_and_name(values, table, hidden, residual, ffn_type):
    """`gpt2` stays bit-identical, each parameter from its own random stream."""
    config = tiny(**{**SIZES, 'n_layer': 3}, ffn_type=ffn_type, weight_tying=False, **values)
    for name, parameter in build_model(config, device='cpu', seed=5).named_parameters():
        if parameter.dim() < 2:
            continue
        std = table if name.endswith(TABLES) else residual if name.endswith(RESIDUAL) else hidden
        digest = hashlib.sha256(f'5/{name}'.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], 'little') >> 1)
        drawn = torch.empty(parameter.shape).normal_(0.0, 1.0, generator=generator)
        torch.testing.assert_close(parameter, drawn * std, rtol=1e-6, atol=0)
        if values == {}:
            generator.manual_seed(int.from_bytes(digest[:8], 'little') >> 1)
            assert torch.equal(parameter, drawn.normal_(0.0, std, generator=generator))


def test_mup_at_base_width_is_gpt2():
    one = build_model(tiny(), device='cpu', seed=1)
    two = build_model(tiny(initialization='mup', mup_base_width=16), device='cpu', seed=1)
    tokens = random_tokens(one.config, batch=2)
    assert torch.equal(one(tokens), two(tokens))
    assert {group.lr_scale for group in parameter_groups(two)} == {1.0}
    assert two.config.name == one.config.name + '-muP'


def test_mup_scales_hidden_lr_and_output():
    config = tiny(initialization='mup', mup_base_width=4, weight_tying=False)
    model = build_model(config, device='cpu', seed=1)
    scales = {id(p): g.lr_scale for g in parameter_groups(model) for p in g.parameters}
    for name, parameter in model.named_parameters():
        hidden = parameter.dim() > 1 and not name.endswith(TABLES)
        assert scales[id(parameter)] == (0.25 if hidden else 1.0), name
    x = torch.randn(1, 2, 16)
    expected = 0.25 * x @ model.output_head.projection.weight.T
    torch.testing.assert_close(model.output_head(x), expected)


def changes_at_width(width, **values):
    """Those of `changes_after_updates` for a model of this width."""
    config = tiny(
        arch_preset='llama',
        n_head=width // 16,
        n_embd=width,
        block_size=16,
        vocab_size=64,
        **values,
    )
    return changes_after_updates(config)


@pytest.mark.slow
def test_update_size_is_independent_of_width_under_mup():
    """The coordinate check of Yang et al. 2022, appendix D.1."""
    narrow, wide = 32, 256
    base = changes_at_width(narrow)
    scaled = changes_at_width(wide, initialization='mup', mup_base_width=narrow)
    plain = changes_at_width(wide)
    for at_base, under_mup, under_gpt2 in zip(base, scaled, plain):
        assert 0.5 * at_base < under_mup < 2 * at_base
        assert under_gpt2 > 4 * at_base
