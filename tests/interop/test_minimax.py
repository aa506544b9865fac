"""MiniMax-01 in transformers: import, export, generation."""

import pytest
from helpers import transformers_models as reference
from helpers.architectures import tiny

import interop
from common.errors import UserError

pytestmark = [pytest.mark.optional, pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

FULL, LIGHTNING = 'full_attention', 'linear_attention'
MINIMAX = {
    'model_type': 'minimax',
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'hidden_size': 32,
    'intermediate_size': 48,
    'max_position_embeddings': 32,
    'num_local_experts': 4,
    'num_experts_per_tok': 2,
}
FACTORS = {
    'linear_attn_alpha_factor': 2,
    'linear_attn_beta_factor': 0.7,
    'full_attn_alpha_factor': 1.5,
    'full_attn_beta_factor': 0.8,
    'mlp_alpha_factor': 1.3,
    'mlp_beta_factor': 0.6,
}
# The config of transformers, and the letter of each layer that it is read as.
CASES = {
    'alternating': (MINIMAX, 'ALAL'),
    'factors': (
        {**MINIMAX, **FACTORS, 'layer_types': [LIGHTNING] * 3 + [FULL], 'head_dim': 12},
        'LLLA',
    ),
    'windows': ({**MINIMAX, 'sliding_window': 5, 'block_size': 3}, 'ALAL'),
    'lightning': ({**MINIMAX, 'layer_types': [LIGHTNING] * 4}, ''),
}


@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path, new_tokens=20)


def test_sizes_of_heads_that_transformers_cannot_express_are_refused():
    config = tiny(
        mixer='lightning_attention',
        lightning_value_dim=8,
        norm_position='entrance',
        normalization='rmsnorm',
        residual='deepnorm',
        ffn_type='moe',
        expert_ffn='swiglu',
        bias=False,
    )
    with pytest.raises(UserError, match=r'lightning_value_dim=8'):
        interop.convert_config(config)
