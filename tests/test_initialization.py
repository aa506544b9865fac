"""components/initialization.py: how weights begin, by rule."""

import hashlib
import math

import pytest
import torch
from architectures import SIZES, tiny

from model_builder import build_model

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
    ],
    ids=str,
)
@pytest.mark.parametrize('ffn_type', ['standard', 'swiglu'])
def test_every_weight_is_drawn_by_its_name_with_the_rules_deviation(
    values, table, hidden, residual, ffn_type
):
    """Bit for bit, from a stream of its own: what `gpt2` has always been."""
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
