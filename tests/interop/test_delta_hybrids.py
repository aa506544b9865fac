"""Qwen3-Next and Kimi Linear: import, export, generation."""

import pytest
from helpers import transformers_models as reference

from common.published_designs import PUBLISHED_DESIGNS
from interop.exporter import convert_config
from model_config import ModelArchitectureConfig

pytestmark = [pytest.mark.optional, pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

QWEN3_NEXT = {
    'model_type': 'qwen3_next',
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'hidden_size': 32,
    'intermediate_size': 48,
    'max_position_embeddings': 16,
    'linear_num_key_heads': 2,
    'linear_num_value_heads': 4,
    'linear_key_head_dim': 8,
    'linear_value_head_dim': 6,
    'num_experts': 4,
    'num_experts_per_tok': 2,
    'moe_intermediate_size': 16,
    'shared_expert_intermediate_size': 32,
}
KIMI_LINEAR = {
    'model_type': 'kimi_linear',
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 4,
    'hidden_size': 32,
    'intermediate_size': 48,
    'max_position_embeddings': 16,
    'kv_lora_rank': 10,
    'qk_nope_head_dim': 6,
    'qk_rope_head_dim': 4,
    'v_head_dim': 5,
    'linear_num_heads': 2,
    'linear_head_dim': 8,
    'num_local_experts': 4,
    'num_experts_per_tok': 2,
    'moe_intermediate_size': 16,
}
CASES = {
    'qwen3_next': ({**QWEN3_NEXT, 'full_attention_interval': 2}, 'GAGA'),
    'qwen3_next-dense': (
        {
            **QWEN3_NEXT,
            'layer_types': ['full_attention', *['linear_attention'] * 3],
            'mlp_only_layers': [1],
            'attention_bias': True,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': 50.0},
            'partial_rotary_factor': 0.5,
        },
        'ABCC',
    ),
    'kimi_linear': (
        {**KIMI_LINEAR, 'layer_types': ['linear_attention'] * 2 + ['full_attention']},
        'ABC',
    ),
    'kimi_linear-published': (
        {
            **{key: KIMI_LINEAR[key] for key in KIMI_LINEAR if 'linear_' not in key},
            'linear_attn_config': {
                'full_attn_layers': [1, 3],
                'kda_layers': [2],
                'head_dim': 6,
                'num_heads': 3,
                'short_conv_kernel_size': 3,
            },
            'q_lora_rank': 12,
            'attention_bias': True,
            'rms_norm_eps': 1e-2,
            'n_shared_experts': 2,
            'first_k_dense_replace': 0,
        },
        'AKA',
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path)


# The config.json of published checkpoints.
PUBLISHED = {
    'Qwen3-Next-80B-A3B': {
        'model_type': 'qwen3_next',
        'attention_bias': False,
        'decoder_sparse_step': 1,
        'full_attention_interval': 4,
        'head_dim': 256,
        'hidden_act': 'silu',
        'hidden_size': 2048,
        'intermediate_size': 5120,
        'linear_conv_kernel_dim': 4,
        'linear_key_head_dim': 128,
        'linear_num_key_heads': 16,
        'linear_num_value_heads': 32,
        'linear_value_head_dim': 128,
        'max_position_embeddings': 262144,
        'mlp_only_layers': [],
        'moe_intermediate_size': 512,
        'norm_topk_prob': True,
        'num_attention_heads': 16,
        'num_experts': 512,
        'num_experts_per_tok': 10,
        'num_hidden_layers': 48,
        'num_key_value_heads': 2,
        'partial_rotary_factor': 0.25,
        'rms_norm_eps': 1e-06,
        'rope_scaling': None,
        'rope_theta': 10000000,
        'router_aux_loss_coef': 0.001,
        'shared_expert_intermediate_size': 512,
        'tie_word_embeddings': False,
        'use_sliding_window': False,
        'vocab_size': 151936,
    },
    'Kimi-Linear-48B-A3B': {
        'model_type': 'kimi_linear',
        'first_k_dense_replace': 1,
        'head_dim': 72,
        'hidden_act': 'silu',
        'hidden_size': 2304,
        'intermediate_size': 9216,
        'kv_lora_rank': 512,
        'linear_attn_config': {
            'full_attn_layers': [4, 8, 12, 16, 20, 24, 27],
            'head_dim': 128,
            'kda_layers': [n for n in range(1, 27) if n % 4],
            'num_heads': 32,
            'short_conv_kernel_size': 4,
        },
        'mla_use_nope': True,
        'model_max_length': 1048576,
        'moe_intermediate_size': 1024,
        'moe_layer_freq': 1,
        'moe_renormalize': True,
        'moe_router_activation_func': 'sigmoid',
        'num_attention_heads': 32,
        'num_expert_group': 1,
        'num_experts': 256,
        'num_experts_per_token': 8,
        'num_hidden_layers': 27,
        'num_key_value_heads': 32,
        'num_nextn_predict_layers': 0,
        'num_shared_experts': 1,
        'q_lora_rank': None,
        'qk_nope_head_dim': 128,
        'qk_rope_head_dim': 64,
        'rms_norm_eps': 1e-05,
        'rope_scaling': None,
        'rope_theta': 10000.0,
        'routed_scaling_factor': 2.446,
        'tie_word_embeddings': False,
        'topk_group': 1,
        'use_grouped_topk': True,
        'v_head_dim': 128,
        'vocab_size': 163840,
    },
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_design_is_that_of_the_published_config(name):
    fields = PUBLISHED[name]
    design = PUBLISHED_DESIGNS[fields['model_type']].config
    expected = reference.architecture({'model_type': fields['model_type'], **design})
    assert reference.architecture(fields).hash == expected.hash


def test_the_mixer_backend_is_not_exported():
    """It is an implementation: the fields are those of plain PyTorch."""
    fields = [
        convert_config(
            ModelArchitectureConfig(
                arch_preset='qwen3_next',
                n_layer=4,
                block_size=32,
                vocab_size=64,
                layer_kinds={'G': {'mixer_backend': backend}},
            )
        ).fields
        for backend in ('torch', 'fla')
    ]
    assert fields[0] == fields[1]
