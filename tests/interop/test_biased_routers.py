"""Mixtures with the router of DeepSeek-V3: the same as transformers, and as published."""

import pytest
from helpers import transformers_models as reference
from helpers.foreign_configs import BASES

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]

PARTIAL = {'rope_parameters': {'rope_type': 'default', 'rope_theta': 50.0}}
CASES = {
    'glm4_moe': ({'model_type': 'glm4_moe', **BASES['glm4_moe']}, 'DM'),
    'glm4_moe-groups': (
        {
            'model_type': 'glm4_moe',
            **BASES['glm4_moe'],
            **{'n_routed_experts': 8, 'n_group': 4, 'topk_group': 2, 'n_shared_experts': 2},
            **{'use_qk_norm': False, 'attention_bias': False, 'first_k_dense_replace': 0},
            'rope_parameters': {'rope_theta': 50.0, 'partial_rotary_factor': 1.0},
        },
        '',
    ),
    # With a dense first layer it would be exported as DeepSeek-V3, which is the same.
    'glm4_moe_lite': (
        {
            'model_type': 'glm4_moe_lite',
            **BASES['glm4_moe_lite'],
            'mlp_layer_types': ['sparse', 'dense'],
        },
        'AB',
    ),
    'dots1': ({'model_type': 'dots1', **BASES['dots1']}, 'GDLM'),
    'qwen2_moe': ({'model_type': 'qwen2_moe', **BASES['qwen2_moe']}, 'LG'),
    'ernie4_5_moe': (
        {
            'model_type': 'ernie4_5_moe',
            **BASES['ernie4_5_moe'],
            **{'num_hidden_layers': 5, 'moe_layer_interval': 2, 'moe_layer_end_index': 3},
            'rope_parameters': {'rope_type': 'default', 'rope_theta': 50.0},
        },
        'ABABA',
    ),
    'solar_open': ({'model_type': 'solar_open', **BASES['solar_open']}, ''),
    # With a dense first layer it would be exported as dots.llm1.
    'hy_v3': (
        {'model_type': 'hy_v3', **BASES['hy_v3'], 'mlp_layer_types': ['sparse', 'dense']},
        'AB',
    ),
    'exaone_moe': ({'model_type': 'exaone_moe', **BASES['exaone_moe']}, 'LG'),
    'afmoe': ({'model_type': 'afmoe', **BASES['afmoe']}, 'LG'),
    'minimax_m2': ({'model_type': 'minimax_m2', **BASES['minimax_m2']}, ''),
    'minimax_m2-partial': (
        {
            'model_type': 'minimax_m2',
            **BASES['minimax_m2'],
            'rope_parameters': {'rope_theta': 50.0, 'partial_rotary_factor': 0.5},
        },
        '',
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path)
