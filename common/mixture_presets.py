"""Presets of transformers with mixtures of experts: their options and descriptions."""

from functools import partial

from common.preset_ratios import LLAMA, head_dim, kv_heads_in_groups_of, multiple_of_8

# Experts whose load is balanced by a bias (DeepSeek-V3), with a small loss beside it.
_BIASED_ROUTER = {
    'router_score': 'sigmoid',
    'router_selection_bias': True,
    'load_balance_weight': 0.0001,
}


def _part_of_context(values: dict) -> int:
    return max(1, values['block_size'] // 32)


MIXTURES = {
    'mixtral': {
        **LLAMA,
        'rope_theta': 1e6,
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 4),
        'ffn_type': 'moe',
        'expert_ffn': 'swiglu',
        'num_experts': 8,
        'experts_per_token': 2,
        'expert_d_ff': lambda values: 8 * max(1, round(7 * values['n_embd'] / 32)),
    },
    'deepseek': {
        **LLAMA,
        'norm_eps': 1e-6,
        'attention_type': 'mla',
        'kv_lora_rank': lambda values: max(1, values['n_embd'] // 4),
        'ffn_type': 'moe',
        'expert_ffn': 'swiglu',
        'num_experts': 32,
        'experts_per_token': 6,
        'shared_experts': 2,
        'expert_d_ff': lambda values: 8 * max(1, round(values['n_embd'] / 24)),
        'dense_layers': 1,
        'router_normalize': False,
        'load_balance_weight': 0.001,
    },
    'qwen3_moe': {
        **LLAMA,
        'rope_theta': 1e6,
        'norm_eps': 1e-6,
        'head_dim': partial(head_dim, 2),
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 8),
        'qk_norm': 'rmsnorm',
        'qk_norm_scope': 'head',
        'ffn_type': 'moe',
        'expert_ffn': 'swiglu',
        'num_experts': 32,
        'experts_per_token': 8,
        'expert_d_ff': partial(multiple_of_8, 3 / 8),
        'load_balance_weight': 0.001,
    },
    'glm4_moe': {
        **LLAMA,
        'rope_theta': 1e6,
        'rope_fraction': 0.5,
        'head_dim': partial(head_dim, 3),
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 12),
        'attention_bias': True,
        'attention_output_bias': False,
        'ffn_type': 'moe',
        'expert_ffn': 'swiglu',
        'd_ff': partial(multiple_of_8, 171 / 64),
        'num_experts': 32,
        'experts_per_token': 8,
        'shared_experts': 1,
        'expert_d_ff': partial(multiple_of_8, 11 / 32),
        'dense_layers': 1,
        **_BIASED_ROUTER,
    },
    'deepseek_v3': {
        **LLAMA,
        'norm_eps': 1e-6,
        'attention_type': 'mla',
        'q_lora_rank': partial(multiple_of_8, 3 / 14),
        'kv_lora_rank': partial(multiple_of_8, 1 / 14),
        'qk_nope_head_dim': partial(head_dim, 16 / 7),
        'ffn_type': 'moe',
        'expert_ffn': 'swiglu',
        'd_ff': partial(multiple_of_8, 18 / 7),
        'num_experts': 32,
        'experts_per_token': 8,
        'shared_experts': 1,
        'expert_d_ff': partial(multiple_of_8, 2 / 7),
        'dense_layers': lambda values: max(1, round(3 * values['n_layer'] / 61)),
        'router_scale': 2.5,
        'router_groups': 8,
        'router_groups_per_token': 4,
        'router_group_score': 'top2',
        **_BIASED_ROUTER,
    },
    'gpt_oss': {
        **LLAMA,
        'rope_theta': 1.5e5,
        'head_dim': partial(head_dim, 64 / 45),
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 8),
        'attention_bias': True,
        'attention_sinks': True,
        'sliding_window': _part_of_context,
        'attention_pattern': 'LG',
        'ffn_type': 'moe',
        'expert_ffn': 'clamped_swiglu',
        'ffn_bias': True,
        'num_experts': 32,
        'experts_per_token': 4,
        'expert_d_ff': partial(multiple_of_8, 1),
        'router_bias': True,
        'load_balance_weight': 0.001,
    },
    'llama4': {
        **LLAMA,
        'rope_theta': 5e5,
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 5),
        'ffn_type': 'moe',
        'expert_ffn': 'swiglu',
        'num_experts': 16,
        'experts_per_token': 1,
        'shared_experts': 1,
        'expert_weights_at': 'input',
        'expert_d_ff': partial(multiple_of_8, 8 / 5),
        'router_score': 'sigmoid',
        'router_normalize': False,
        'load_balance_weight': 0.001,
        'layer_pattern': 'RRRN',
        'layer_kinds': {
            'R': {
                'attention_chunk': _part_of_context,
                'qk_norm': 'rmsnorm_nogain',
                'qk_norm_position': 'after_rotation',
            },
            'N': {
                'position_encoding': 'none',
                'query_scale_growth': 0.1,
                'query_scale_length': _part_of_context,
                'query_scale_offset': 1,
            },
        },
    },
}
MIXTURE_DESCRIPTIONS = {
    'mixtral': (
        'Mixtral (Jiang et al. 2024): `mistral` without the window, with 2 of 8 experts per '
        'token, each half as wide as its FFN'
    ),
    'deepseek': (
        "DeepSeek-V2 (DeepSeek-AI 2024) with the Lite model's ratios: latent attention; after "
        'a dense first layer, 6 of 32 small experts (64 in the original) and 2 shared ones '
        'per token'
    ),
    'qwen3_moe': (
        "Qwen3 with experts (Qwen Team 2025) with the 30B-A3B model's ratios: QK norm per head, "
        'heads together 2 · n_embd wide, 8 query heads that share keys and values, 8 of 32 small '
        'experts per token (128 in the original)'
    ),
    'glm4_moe': (
        "GLM-4.5 (Zhipu AI 2025) with the Air model's ratios: RoPE on half of each head, heads "
        'together 3 · n_embd wide, 12 query heads that share keys and values; after a dense first '
        'layer, 8 of 32 experts (128 in the original) and a shared one per token, balanced by a '
        'bias'
    ),
    'deepseek_v3': (
        "DeepSeek-V3 (DeepSeek-AI 2024) with the published model's ratios: latent attention; after "
        'dense first layers, 8 of 32 experts (256 in the original), from 4 of 8 groups, and a '
        'shared one per token, balanced by a bias'
    ),
    'gpt_oss': (
        "gpt-oss (OpenAI 2025) with the 20B model's ratios: attention sinks, a window of 1/32 of "
        'the context in every other layer, 8 query heads that share keys and values, biases; 4 of '
        '32 experts with clamped SwiGLU per token'
    ),
    'llama4': (
        "Llama 4 (Meta 2025) with Scout's ratios: in three of four layers RoPE, QK norm without "
        'weights, and chunks of 1/32 of the context (8192 of 262,144 in the original); in the '
        'fourth no positions, and queries that grow with theirs; 5 query heads share keys and '
        'values; 1 of 16 experts, weighted at its input, and a shared one per token'
    ),
}
