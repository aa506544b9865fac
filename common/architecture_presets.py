"""The preset architectures: the options that each sets, and its description."""

from functools import partial

from common.mixture_presets import MIXTURE_DESCRIPTIONS, MIXTURES
from common.preset_ratios import GROUPS_OF_FOUR as _GROUPS_OF_FOUR
from common.preset_ratios import LLAMA as _LLAMA
from common.preset_ratios import head_dim as _head_dim
from common.preset_ratios import kv_heads_in_groups_of
from common.preset_ratios import multiple_of_8 as _multiple_of_8


def _layernorm_with_bias_of_linear_layers(values: dict) -> str:
    return 'layernorm' if values['bias'] else 'layernorm_nobias'


_OLMO = {
    **_LLAMA,
    'rope_theta': 5e5,
    'norm_eps': 1e-6,
    'norm_position': 'reordered',
    'qk_norm': 'rmsnorm',
    'qk_norm_scope': 'projection',
    'z_loss': 1e-5,
}
_GRANITE = {
    **_LLAMA,
    'use_gqa': True,
    'attention_scale': lambda values: values['n_head'] / values['n_embd'],
    'residual': 'multiplier',
    'residual_multiplier': 0.22,
    'embedding_multiplier': 12.0,
    'logit_multiplier': lambda values: min(1.0, 256 / values['n_embd']),
    'weight_tying': True,
}
# A value may be a function of the merged values, so that it follows overrides.
PRESETS = {
    'gpt2': {
        'normalization': 'layernorm_nobias',
        'position_encoding': 'learned_absolute',
        'ffn_type': 'standard',
        'activation': 'gelu',
        'norm_position': 'post',
        'bias': False,
        'weight_tying': True,
        'dropout': 0.0,
    },
    'llama': _LLAMA,
    'team': _LLAMA,
    'hybrid': {
        'normalization': 'layernorm_nobias',
        'position_encoding': 'rope',
        'ffn_type': 'standard',
        'activation': 'gelu',
        'norm_position': 'pre',
        'bias': False,
        'weight_tying': True,
        'dropout': 0.0,
    },
    'legacy': {
        'normalization': _layernorm_with_bias_of_linear_layers,
        'position_encoding': 'learned_absolute',
        'ffn_type': 'standard',
        'activation': 'gelu',
        'norm_position': 'pre',
        'bias': True,
        'weight_tying': True,
        'dropout': 0.0,
    },
    'llama3': {**_LLAMA, 'rope_theta': 5e5, **_GROUPS_OF_FOUR},
    'qwen2': {
        **_LLAMA,
        'rope_theta': 1e6,
        'norm_eps': 1e-6,
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 7),
        'attention_bias': True,
        'attention_output_bias': False,
        'd_ff': partial(_multiple_of_8, 37 / 7),
    },
    'qwen3': {
        **_LLAMA,
        'rope_theta': 1e6,
        'norm_eps': 1e-6,
        'head_dim': 128,
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 2),
        'qk_norm': 'rmsnorm',
        'qk_norm_scope': 'head',
        'd_ff': lambda values: 3 * values['n_embd'],
        'weight_tying': True,
    },
    'gemma2': {
        **_LLAMA,
        'norm_eps': 1e-6,
        'norm_position': 'sandwich',
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 2),
        'sliding_window': lambda values: max(1, values['block_size'] // 2),
        'attention_pattern': 'LG',
        'attention_softcap': 50.0,
        'logit_softcap': 30.0,
        'ffn_type': 'geglu',
        'geglu_tanh': True,
        'd_ff': lambda values: 4 * values['n_embd'],
        'scale_embeddings': True,
        'weight_tying': True,
    },
    'gemma3': {
        **_LLAMA,
        'norm_eps': 1e-6,
        'norm_position': 'sandwich',
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 2),
        'qk_norm': 'rmsnorm',
        'qk_norm_scope': 'head',
        'ffn_type': 'geglu',
        'geglu_tanh': True,
        'd_ff': lambda values: 4 * values['n_embd'],
        'scale_embeddings': True,
        'weight_tying': True,
        'layer_pattern': 'LLLLLG',
        'layer_kinds': {
            'L': {
                'sliding_window': lambda values: max(1, values['block_size'] // 32),
                'rope_theta': 1e4,
            },
            'G': {'sliding_window': None, 'rope_theta': 1e6},
        },
    },
    'olmo2': _OLMO,
    'olmo3': {
        **_OLMO,
        'layer_pattern': 'LLLG',
        'layer_kinds': {
            'L': {'sliding_window': lambda values: max(1, values['block_size'] // 2)},
            'G': {'sliding_window': None},
        },
    },
    'smollm3': {
        **_LLAMA,
        'rope_theta': 5e6,
        'norm_eps': 1e-6,
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 4),
        'd_ff': lambda values: 43 * values['n_embd'] // 8,
        'weight_tying': True,
        'layer_pattern': 'RRRN',
        'layer_kinds': {'N': {'position_encoding': 'none'}},
    },
    'mistral': {
        **_LLAMA,
        **_GROUPS_OF_FOUR,
        'sliding_window': lambda values: max(1, values['block_size'] // 2),
    },
    'granite': {
        **_GRANITE,
        'num_kv_heads': partial(kv_heads_in_groups_of, 4),
        'd_ff': lambda values: 4 * values['n_embd'],
    },
    'cohere2': {
        **_LLAMA,
        **_GROUPS_OF_FOUR,
        'normalization': 'layernorm_nobias',
        'norm_position': 'parallel',
        'parallel_shared_norm': True,
        'rope_theta': 5e4,
        'logit_multiplier': 0.25,
        'weight_tying': True,
        'layer_pattern': 'LLLG',
        'layer_kinds': {
            'L': {'sliding_window': lambda values: max(1, values['block_size'] // 2)},
            'G': {'position_encoding': 'none'},
        },
    },
    'pythia': {
        'normalization': 'layernorm',
        'position_encoding': 'rope',
        'rope_fraction': 0.25,
        'ffn_type': 'standard',
        'activation': 'gelu',
        'norm_position': 'parallel',
        'bias': True,
        'weight_tying': False,
        'dropout': 0.0,
    },
    **MIXTURES,
    'qwen3_next': {
        **_LLAMA,
        'rope_theta': 1e7,
        'rope_fraction': 0.25,
        'norm_eps': 1e-6,
        'head_dim': partial(_head_dim, 2),
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 8),
        'qk_norm': 'rmsnorm',
        'qk_norm_scope': 'head',
        'attention_gate': 'elementwise',
        'ffn_type': 'moe',
        'expert_ffn': 'swiglu',
        'num_experts': 64,
        'experts_per_token': 10,
        'expert_d_ff': partial(_multiple_of_8, 1 / 4),
        'shared_experts': 1,
        'shared_gate': True,
        'load_balance_weight': 0.001,
        'layer_pattern': 'GGGA',
        'layer_kinds': {
            'G': {
                'mixer': 'gated_deltanet',
                'gdn_value_heads': lambda values: 2 * values['n_head'],
                'gdn_head_dim': partial(_head_dim, 1),
                'gdn_v_head_dim': partial(_head_dim, 1),
                'gdn_norm_eps': 1e-6,
            }
        },
    },
    'kimi_linear': {
        **_LLAMA,
        'position_encoding': 'none',
        'attention_type': 'mla',
        'kv_lora_rank': partial(_multiple_of_8, 2 / 9),
        'qk_nope_head_dim': partial(_head_dim, 16 / 9),
        'latent_norm_eps': 1e-6,
        'd_ff': lambda values: 4 * values['n_embd'],
        'ffn_type': 'moe',
        'expert_ffn': 'swiglu',
        'num_experts': 32,
        'experts_per_token': 8,
        'expert_d_ff': partial(_multiple_of_8, 4 / 9),
        'shared_experts': 1,
        'router_score': 'sigmoid',
        'router_scale': 2.446,
        'router_selection_bias': True,
        'load_balance_weight': 0.001,
        'layer_pattern': 'D KKAK*',
        'layer_kinds': {
            'K': {'mixer': 'kda', 'gdn_head_dim': partial(_head_dim, 16 / 9)},
            'D': {
                'mixer': 'kda',
                'gdn_head_dim': partial(_head_dim, 16 / 9),
                'ffn_type': 'swiglu',
            },
        },
    },
    'lfm2': {
        **_LLAMA,
        'rope_theta': 1e6,
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 4),
        'qk_norm': 'rmsnorm',
        'qk_norm_scope': 'head',
        'd_ff': lambda values: 4 * values['n_embd'],
        'weight_tying': True,
        'layer_pattern': 'SSASSASSASASASAS',
        'layer_kinds': {'S': {'mixer': 'short_conv'}},
    },
    'mamba': {
        'normalization': 'rmsnorm',
        'mixer': 'mamba',
        'ffn_type': 'none',
        'norm_position': 'pre',
        'bias': False,
        'weight_tying': True,
        'dropout': 0.0,
    },
    'mamba2': {
        'normalization': 'rmsnorm',
        'mixer': 'mamba2',
        'ffn_type': 'none',
        'norm_position': 'pre',
        'bias': False,
        'weight_tying': True,
        'dropout': 0.0,
    },
    'granite4': {
        **_GRANITE,
        'position_encoding': 'none',
        'num_kv_heads': partial(kv_heads_in_groups_of, 3),
        'ffn_type': 'moe',
        'expert_ffn': 'swiglu',
        'num_experts': 32,
        'experts_per_token': 6,
        'expert_d_ff': partial(_multiple_of_8, 1 / 3),
        'shared_experts': 2,
        'load_balance_weight': 0.001,
        'layer_pattern': 'MMMMMAMMMM',
        'layer_kinds': {'M': {'mixer': 'mamba2'}},
    },
    'falcon_h1': {
        **_LLAMA,
        'mixer': 'attention+mamba2',
        'rope_theta': 1e11,
        'head_dim': partial(_head_dim, 1 / 2),
        'use_gqa': True,
        'num_kv_heads': partial(kv_heads_in_groups_of, 4),
        'mamba2_width': partial(_multiple_of_8, 3 / 2),
        'd_ff': partial(_multiple_of_8, 9 / 4),
    },
    'jamba': {
        'normalization': 'rmsnorm',
        'norm_eps': 1e-6,
        'mixer': 'mamba',
        'mamba_norm': 'weighted',
        'ffn_type': 'swiglu',
        'd_ff': partial(_multiple_of_8, 7 / 2),
        'norm_position': 'pre',
        'bias': False,
        'weight_tying': False,
        'dropout': 0.0,
        'layer_pattern': 'MEMEAEME',
        'layer_kinds': {
            'E': {
                'ffn_type': 'moe',
                'expert_ffn': 'swiglu',
                'num_experts': 16,
                'experts_per_token': 2,
                'expert_d_ff': partial(_multiple_of_8, 7 / 2),
                'router_normalize': False,
                'load_balance_weight': 0.001,
            },
            'A': {
                'mixer': 'attention',
                'position_encoding': 'none',
                'use_gqa': True,
                'num_kv_heads': partial(kv_heads_in_groups_of, 4),
            },
        },
    },
    'speedrun': {
        'normalization': 'rmsnorm',
        'position_encoding': 'rope',
        'qk_norm': 'rmsnorm',
        'qk_norm_scope': 'head',
        'ffn_type': 'standard',
        'activation': 'relu2',
        'norm_position': 'pre',
        'logit_softcap': 15.0,
        'bias': False,
        'weight_tying': False,
        'dropout': 0.0,
    },
    'custom': {},
}

PRESET_DESCRIPTIONS = {
    'gpt2': (
        "GPT-2's components with post-norm and LayerNorm without bias; not OpenAI's GPT-2, "
        'which is pre-norm: that is `legacy`'
    ),
    'llama': 'LLaMA (Touvron et al. 2023)',
    'team': 'The same architecture as `llama`, under a second name',
    'hybrid': "GPT-2's feed-forward network and LayerNorm with rotary positions and pre-norm",
    'legacy': (
        "OpenAI's GPT-2 (Radford et al. 2019) as in nanoGPT: pre-norm; `bias` is also that of "
        'the norms'
    ),
    'llama3': (
        "Llama 3 (Grattafiori et al. 2024) with the 8B model's ratios: 4 query heads share "
        'keys and values, FFN 3.5 · n_embd wide. For the long context of Llama 3.1: '
        'rope_scaling=llama3'
    ),
    'qwen2': (
        "Qwen2 (Yang et al. 2024) with the 7B model's ratios: biases of queries, keys and values "
        'alone, 7 query heads share keys and values, FFN 5.29 · n_embd wide'
    ),
    'qwen3': (
        "Qwen3 (Yang et al. 2025) with the 0.6B model's ratios: heads of 128 dimensions, 2 "
        'query heads share keys and values, QK norm per head, FFN 3 · n_embd wide'
    ),
    'gemma2': (
        "Gemma 2 (Gemma Team 2024) with the 2B model's ratios: norms before and after each "
        'sublayer, in every other layer a window of half the context (4096 of 8192 in the '
        'original), soft caps of scores and logits'
    ),
    'gemma3': (
        "Gemma 3 (Gemma Team 2025) with the 4B model's ratios: blocks as in `gemma2` with QK norm "
        'in place of soft caps; 5 local layers, with a window of 1/32 of the context (1024 of '
        '32,768 in pretraining) and RoPE of base 10,000, for each global one of base 1,000,000'
    ),
    'olmo2': (
        "OLMo 2 (OLMo et al. 2024), the 7B model's components: norms after the sublayers, QK "
        'norm over all heads at once, z-loss'
    ),
    'olmo3': (
        "OLMo 3 (OLMo et al. 2025), the 7B model's components: `olmo2` with a window of half the "
        'context in three of four layers (4096 of 8192 in the original). For a longer context, as '
        'in the original, only the other layers: layer_kinds.G.rope_scaling=yarn'
    ),
    'smollm3': (
        "SmolLM3 (Bakouch et al. 2025) with the 3B model's ratios: no positions in every fourth "
        'layer, 4 query heads share keys and values, FFN 5.375 · n_embd wide, tied head'
    ),
    'mistral': (
        "Mistral (Jiang et al. 2023) with the 7B model's ratios: heads and FFN as in "
        '`llama3`, a window of half the context in every layer (4096 of 8192 in the original)'
    ),
    'granite': (
        "Granite 3.0 (IBM 2024) with the 2B model's ratios: multipliers of embeddings, of the "
        'outputs of sublayers, of scores and of logits; 4 query heads share keys and values, FFN '
        '4 · n_embd wide, tied head'
    ),
    'cohere2': (
        'Command R7B (Cohere 2024): attention and FFN in parallel after one LayerNorm without '
        'bias; a window of half the context with RoPE in three of four layers, no positions in '
        'the fourth; heads and FFN as in `llama3`, a multiplier of the logits, tied head'
    ),
    'pythia': (
        'Pythia 160M (Biderman et al. 2023; GPT-NeoX: Black et al. 2022): attention and FFN '
        'in parallel, RoPE on a quarter of each head, biases'
    ),
    **MIXTURE_DESCRIPTIONS,
    'qwen3_next': (
        "Qwen3-Next (Qwen Team 2025) with the 80B-A3B model's ratios: Gated DeltaNet in three of "
        'four layers; gated attention with RoPE on a quarter of each head, where 8 query heads '
        'share keys and values; 10 of 64 small experts (512 in the original) and a gated shared '
        'one per token'
    ),
    'kimi_linear': (
        "Kimi Linear (Kimi Team 2025) with the 48B-A3B model's ratios: Kimi Delta Attention in "
        'three of four layers, latent attention without positions in the fourth; after a dense '
        'first layer, 8 of 32 experts (256 in the original) and a shared one per token'
    ),
    'lfm2': (
        "LFM2 (Liquid AI 2025) with the 1.2B model's ratios: gated short convolutions, and "
        'attention in 6 of 16 layers, with QK norm per head, 4 query heads that share keys and '
        'values, FFN 4 · n_embd wide, tied head'
    ),
    'mamba': (
        'Mamba (Gu & Dao 2023): layers of one sublayer, a selective state space, tied head. Two of '
        'its layers are as large as one of a transformer'
    ),
    'mamba2': (
        'Mamba-2 (Dao & Gu 2024): layers of one sublayer, a state space with one decay per head, '
        'tied head. Two of its layers are as large as one of a transformer'
    ),
    'granite4': (
        "Granite 4.0 (IBM 2025) with the H-Tiny model's ratios: Mamba-2 in nine of ten layers, "
        'attention without positions in the sixth of ten, where 3 query heads share keys and '
        'values; 6 of 32 experts (64 in the original) and 2 shared ones per token; multipliers of '
        'embeddings, of the outputs of sublayers, of scores and of logits'
    ),
    'falcon_h1': (
        "Falcon-H1 (Zuo et al. 2025) with the 1.5B model's ratios: attention and Mamba-2 in "
        'parallel in each layer, 0.5 and 1.5 times as wide as the model, 4 query heads that share '
        'keys and values, FFN 2.25 · n_embd wide; without its multipliers, which were tuned '
        'together with learning rates of each matrix'
    ),
    'jamba': (
        "Jamba (Lieber et al. 2024) with the v0.1 model's ratios: Mamba with norms of dt, B and C, "
        'attention without positions in one layer of eight, 2 of 16 experts in every second layer, '
        'FFN and experts 3.5 · n_embd wide'
    ),
    'speedrun': (
        'In the style of modded-nanogpt (Jordan et al. 2024): squared ReLU, QK norm, capped logits'
    ),
    'custom': "All options at their defaults, to start a mix of one's own",
}
