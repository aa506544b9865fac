"""Mixtures with the router of DeepSeek-V3: the same as transformers, and as published."""

import pytest
from helpers import transformers_models as reference
from helpers.foreign_configs import BASES

from model_builder import build_model, count_parameters

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


# Fields of the published config.json files that differ from the defaults of transformers, without
# those that change no shapes; billions of parameters, total and per token, in the models' cards.
PUBLISHED = {
    'DeepSeek-V2': (
        {
            'model_type': 'deepseek_v2',
            **{'hidden_size': 5120, 'intermediate_size': 12288, 'num_hidden_layers': 60},
            **{'num_attention_heads': 128, 'num_key_value_heads': 128, 'vocab_size': 102400},
            **{'moe_intermediate_size': 1536, 'n_routed_experts': 160, 'n_shared_experts': 2},
            **{'num_experts_per_tok': 6, 'first_k_dense_replace': 1, 'norm_topk_prob': False},
            **{'topk_method': 'group_limited_greedy', 'n_group': 8, 'topk_group': 3},
            **{'q_lora_rank': 1536, 'routed_scaling_factor': 16.0},
        },
        (236, 21),
    ),
    'DeepSeek-V3': (
        {
            'model_type': 'deepseek_v3',
            **{'hidden_size': 7168, 'intermediate_size': 18432, 'num_hidden_layers': 61},
            **{'num_attention_heads': 128, 'num_key_value_heads': 128, 'vocab_size': 129280},
            **{'n_group': 8, 'topk_group': 4, 'first_k_dense_replace': 3},
        },
        (671, 37),
    ),
    'GLM-4.5': (
        {
            'model_type': 'glm4_moe',
            **{'hidden_size': 5120, 'intermediate_size': 12288, 'num_hidden_layers': 92},
            **{'num_attention_heads': 96, 'num_key_value_heads': 8, 'head_dim': 128},
            **{'moe_intermediate_size': 1536, 'n_routed_experts': 160, 'use_qk_norm': True},
            **{'first_k_dense_replace': 3, 'attention_bias': True, 'vocab_size': 151552},
        },
        (353, 32),  # the card has 355, with the layer for multi-token prediction
    ),
    'GLM-4.5-Air': (
        {
            'model_type': 'glm4_moe',
            **{'hidden_size': 4096, 'intermediate_size': 10944, 'num_hidden_layers': 46},
            **{'num_attention_heads': 96, 'num_key_value_heads': 8, 'head_dim': 128},
            **{'attention_bias': True, 'vocab_size': 151552},
        },
        (107, 12),
    ),
    'GLM-4.7-Flash': (
        {
            'model_type': 'glm4_moe_lite',
            **{'hidden_size': 2048, 'intermediate_size': 10240, 'num_hidden_layers': 47},
            **{'num_attention_heads': 20, 'num_key_value_heads': 20, 'vocab_size': 154880},
        },
        (30, 4),
    ),
    'dots.llm1': (
        {
            'model_type': 'dots1',
            **{'hidden_size': 4096, 'intermediate_size': 10944, 'num_hidden_layers': 62},
            **{'num_attention_heads': 32, 'num_key_value_heads': 32, 'vocab_size': 152064},
            **{'n_routed_experts': 128, 'num_experts_per_tok': 6, 'n_shared_experts': 2},
            **{'first_k_dense_replace': 1, 'norm_topk_prob': True, 'sliding_window': None},
        },
        (142, 14),
    ),
    'Qwen1.5-MoE-A2.7B': (
        {
            'model_type': 'qwen2_moe',
            **{'hidden_size': 2048, 'num_attention_heads': 16, 'num_hidden_layers': 24},
            'vocab_size': 151936,
        },
        (14.3, 2.7),
    ),
    'ERNIE-4.5-21B-A3B': (
        {
            'model_type': 'ernie4_5_moe',
            **{'hidden_size': 2560, 'num_attention_heads': 20, 'num_hidden_layers': 28},
            'vocab_size': 103424,
        },
        (21, 3),
    ),
    'Solar-Open-100B': (
        {
            'model_type': 'solar_open',
            **{'hidden_size': 4096, 'num_attention_heads': 64, 'num_hidden_layers': 48},
            'vocab_size': 196608,
        },
        (102, 12),
    ),
    'MiniMax-M2': (
        {
            'model_type': 'minimax_m2',
            **{'hidden_size': 3072, 'intermediate_size': 1536, 'num_hidden_layers': 62},
            **{'num_attention_heads': 48, 'num_key_value_heads': 8, 'vocab_size': 200064},
            'rotary_dim': 64,
        },
        (229, 10),
    ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_models_have_their_sizes(name):
    fields, billions = PUBLISHED[name]
    ours = build_model(reference.architecture(fields))
    theirs = reference.from_fields(fields, 'meta')
    counted = count_parameters(ours)
    assert counted['total_params'] == theirs.num_parameters(only_trainable=True)
    counts = [counted[key] / 1e9 for key in ('total_params', 'active_params')]
    assert counts == pytest.approx(billions, abs=2)  # cards round, some without embeddings
