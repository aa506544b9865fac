"""Mamba-2 and its hybrids: imports and exports compute what transformers computes."""

import pytest
from helpers import transformers_models as reference

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]

MAMBA2 = {
    'model_type': 'mamba2',
    'hidden_size': 16,
    'num_hidden_layers': 2,
    'num_heads': 8,
    'head_dim': 4,
    'n_groups': 2,
    'state_size': 5,
    'conv_kernel': 3,
}
MIXER = {
    'mamba_n_heads': 8,
    'mamba_d_state': 5,
    'mamba_n_groups': 2,
    'mamba_d_conv': 3,
}
SIZES = {
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 16,
}
BAMBA = {
    'model_type': 'bamba',
    'num_hidden_layers': 4,
    'attn_layer_indices': [1],
    **SIZES,
    **MIXER,
}
NEMOTRON = {
    'model_type': 'nemotron_h',
    'layers_block_type': ['mamba', 'mlp', 'mamba', 'attention', 'mlp', 'moe'],
    **SIZES,
    'head_dim': 6,
    'mamba_num_heads': 6,
    'mamba_head_dim': 4,
    'ssm_state_size': 5,
    'n_groups': 3,
    'conv_kernel': 2,
    'n_routed_experts': 4,
    'moe_intermediate_size': 8,
    'moe_shared_expert_intermediate_size': 16,
}
CASES = {
    'mamba2': (MAMBA2, ''),
    'mamba2-options': (
        {
            **MAMBA2,
            'head_dim': 2,
            'expand': 1,
            'use_bias': True,
            'use_conv_bias': False,
            'tie_word_embeddings': True,
            'layer_norm_epsilon': 1e-3,
        },
        '',
    ),
    'bamba': (BAMBA, 'MAMM'),
    'bamba-options': (
        {
            **BAMBA,
            'mamba_d_head': 2,
            'mamba_expand': 1,
            'mamba_proj_bias': True,
            'mamba_conv_bias': False,
            'attention_bias': True,
            'mlp_bias': True,
            'attn_layer_indices': [0, 3],
            'rms_norm_eps': 1e-3,
            'rope_parameters': {
                'rope_type': 'default',
                'rope_theta': 50.0,
                'partial_rotary_factor': 1.0,
            },
        },
        'AMMA',
    ),
    'nemotron_h': (NEMOTRON, 'MFMAFE'),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path, new_tokens=20 if name == 'mamba2' else 11)


@pytest.mark.slow
@pytest.mark.parametrize('limits', [[0.05, 0.5], [0.3, float('inf')]])
def test_limited_steps_are_those_of_transformers(limits, tmp_path):
    """Without a comparison of texts: with a cache, transformers does not limit the steps."""
    fields = {**MAMBA2, 'time_step_limit': limits}
    _, ours, _, pairs = reference.compared(fields, tmp_path)
    assert [ours.config.mamba2_dt_min, ours.config.mamba2_dt_max or float('inf')] == limits
    assert reference.largest_difference(*pairs['logits']) < 1e-5
    assert reference.largest_difference(*pairs['gradients']) < 1e-4
    assert reference.largest_difference(*pairs['exported']) < 1e-5
