"""Families whose attention, norms, head or embedding differ from Llama's by small options."""

import pytest
from helpers import transformers_models as reference

pytestmark = [pytest.mark.optional, pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

SIZES = {
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'hidden_size': 32,
    'intermediate_size': 48,
    'max_position_embeddings': 32,
}
HEADS = {**SIZES, 'head_dim': 12}
DEFAULT = {'rope_type': 'default', 'rope_theta': 50.0}
YARN = {
    'rope_type': 'yarn',
    'rope_theta': 50.0,
    'factor': 4.0,
    'original_max_position_embeddings': 8,
}
GPTJ = {'model_type': 'gptj', 'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'n_positions': 32}
FALCON = {
    'model_type': 'falcon',
    **{key: SIZES[key] for key in SIZES if key not in ('intermediate_size', 'num_key_value_heads')},
}
GPT_NEO = {
    'model_type': 'gpt_neo',
    'num_layers': 4,
    'num_heads': 4,
    'hidden_size': 32,
    'max_position_embeddings': 32,
    'window_size': 5,
    'attention_types': [[['global', 'local'], 2]],
}
# The config of transformers, and the letter of each layer that it is read as.
CASES = {
    'qwen2': ({'model_type': 'qwen2', **SIZES, 'rope_parameters': YARN}, ''),
    'qwen2-windows': (
        {
            'model_type': 'qwen2',
            **HEADS,
            'use_sliding_window': True,
            'sliding_window': 5,
            'max_window_layers': 1,
            'tie_word_embeddings': True,
        },
        'GL',
    ),
    'seed_oss': ({'model_type': 'seed_oss', **HEADS}, ''),
    'seed_oss-biases': (
        {'model_type': 'seed_oss', **HEADS, 'attention_out_bias': True, 'mlp_bias': True},
        '',
    ),
    'seed_oss-output': (
        {'model_type': 'seed_oss', **HEADS, 'attention_bias': False, 'attention_out_bias': True},
        '',
    ),
    'glm': ({'model_type': 'glm', **HEADS, 'rope_theta': 50.0}, ''),
    'glm-all': (
        {
            'model_type': 'glm',
            **HEADS,
            'rope_parameters': {**DEFAULT, 'partial_rotary_factor': 1.0},
        },
        '',
    ),
    'glm4': ({'model_type': 'glm4', **HEADS, 'rope_theta': 50.0, 'attention_bias': False}, ''),
    'gptj': ({**GPTJ, 'rotary_dim': 6}, ''),
    'gptj-tied': ({**GPTJ, 'rotary_dim': 8, 'n_inner': 48, 'tie_word_embeddings': True}, ''),
    'codegen': ({**GPTJ, 'model_type': 'codegen', 'rotary_dim': 4}, ''),
    'phi': ({'model_type': 'phi', **SIZES}, ''),
    'phi-norms': (
        {
            'model_type': 'phi',
            **SIZES,
            'qk_layernorm': True,
            'rope_parameters': {**YARN, 'partial_rotary_factor': 0.75},
            'tie_word_embeddings': True,
        },
        '',
    ),
    'gpt_neo': (GPT_NEO, 'GLGL'),
    'gpt_neo-global': (
        {**GPT_NEO, 'attention_types': [[['global'], 4]], 'intermediate_size': 40},
        '',
    ),
    'olmo': ({'model_type': 'olmo', **SIZES, 'clip_qkv': 0.5}, ''),
    'olmo-biases': ({'model_type': 'olmo', **SIZES, 'attention_bias': True}, ''),
    'nanochat': ({'model_type': 'nanochat', **SIZES, 'rope_parameters': YARN}, ''),
    'nanochat-biases': (
        {
            'model_type': 'nanochat',
            **HEADS,
            'attention_bias': True,
            'hidden_act': 'gelu',
            'final_logit_softcapping': None,
            'tie_word_embeddings': True,
        },
        '',
    ),
    'hunyuan': ({'model_type': 'hunyuan_v1_dense', **HEADS, 'rope_parameters': YARN}, ''),
    'hunyuan-alpha': (
        {
            'model_type': 'hunyuan_v1_dense',
            **HEADS,
            'attention_bias': True,
            'rope_theta': 50.0,
            'rope_scaling': {'type': 'dynamic', 'alpha': 20.0, 'factor': 1.0, 'mscale': 1.0},
        },
        '',
    ),
    'hunyuan-experts': (
        {
            'model_type': 'hunyuan_v1_moe',
            **HEADS,
            **{'num_experts': 4, 'moe_topk': [2, 2]},
            'rope_parameters': DEFAULT,
        },
        '',
    ),
    'stablelm': ({'model_type': 'stablelm', **SIZES, 'partial_rotary_factor': 0.5}, ''),
    'stablelm-norms': (
        {
            'model_type': 'stablelm',
            **SIZES,
            'partial_rotary_factor': 0.25,
            'qk_layernorm': True,
            'use_parallel_residual': True,
            'use_qkv_bias': True,
            'tie_word_embeddings': True,
        },
        '',
    ),
    'phi3': ({'model_type': 'phi3', **SIZES, 'sliding_window': 5}, ''),
    'phi3-long': (
        {
            'model_type': 'phi3',
            **SIZES,
            'original_max_position_embeddings': 4,
            'partial_rotary_factor': 0.75,
            'rope_scaling': {
                'type': 'longrope',
                'long_factor': [1.5, 2.0, 9.0],
                'short_factor': [1.0, 1.1, 1.2],
            },
        },
        '',
    ),
    'phi3-short': (
        {
            'model_type': 'phi3',
            **SIZES,
            'original_max_position_embeddings': 32,
            'rope_scaling': {
                'type': 'longrope',
                'long_factor': [1.5, 2.0, 9.0, 10.0],
                'short_factor': [1.0, 1.1, 1.2, 2.0],
            },
        },
        '',
    ),
    'ministral3': (
        {
            'model_type': 'ministral3',
            **HEADS,
            'rope_parameters': {
                **YARN,
                'original_max_position_embeddings': 8,
                'mscale': 1.0,
                'mscale_all_dim': 1.0,
                'llama_4_scaling_beta': 0.7,
            },
        },
        '',
    ),
    'apertus': ({'model_type': 'apertus', **HEADS, 'dtype': 'float32'}, ''),
    'apertus-biases': (
        {
            'model_type': 'apertus',
            **HEADS,
            **{'dtype': 'float32', 'attention_bias': True, 'hidden_act': 'relu2'},
            'rope_parameters': DEFAULT,
            'tie_word_embeddings': True,
        },
        '',
    ),
    'bloom': ({'model_type': 'bloom', 'n_layer': 2, 'n_head': 4, 'hidden_size': 32}, ''),
    'bloom-entrance': (
        {
            'model_type': 'bloom',
            **{'n_layer': 2, 'n_head': 3, 'hidden_size': 24},
            'apply_residual_connection_post_layernorm': True,
            'tie_word_embeddings': False,
        },
        '',
    ),
    'falcon-7b': (FALCON, ''),
    'falcon-40b': (
        {**FALCON, 'new_decoder_architecture': True, 'num_kv_heads': 2, 'ffn_hidden_size': 40},
        '',
    ),
    'falcon-11b': (
        {
            **FALCON,
            **{'new_decoder_architecture': True, 'num_kv_heads': 2},
            **{'num_ln_in_parallel_attn': 1, 'tie_word_embeddings': False},
        },
        '',
    ),
    'falcon-rw': (
        {
            **FALCON,
            **{'alibi': True, 'bias': True, 'multi_query': False, 'parallel_attn': False},
            'num_kv_heads': 4,
        },
        '',
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path, new_tokens=20)


# config.json of published models, on the Hugging Face Hub.
PUBLISHED = {
    'Qwen/Qwen2-0.5B': {
        'model_type': 'qwen2',
        'hidden_size': 896,
        'intermediate_size': 4864,
        'max_position_embeddings': 131072,
        'max_window_layers': 24,
        'num_attention_heads': 14,
        'num_hidden_layers': 24,
        'num_key_value_heads': 2,
        'rms_norm_eps': 1e-06,
        'rope_theta': 1000000.0,
        'sliding_window': 131072,
        'tie_word_embeddings': True,
        'use_sliding_window': False,
        'vocab_size': 151936,
    },
    'Qwen/Qwen2.5-7B': {
        'model_type': 'qwen2',
        'hidden_size': 3584,
        'intermediate_size': 18944,
        'max_position_embeddings': 131072,
        'max_window_layers': 28,
        'num_attention_heads': 28,
        'num_hidden_layers': 28,
        'num_key_value_heads': 4,
        'rms_norm_eps': 1e-06,
        'rope_theta': 1000000.0,
        'sliding_window': 131072,
        'tie_word_embeddings': False,
        'use_mrope': False,
        'use_sliding_window': False,
        'vocab_size': 152064,
    },
    'ByteDance-Seed/Seed-OSS-36B-Base': {
        'model_type': 'seed_oss',
        'attention_bias': True,
        'attention_dropout': 0.1,
        'attention_out_bias': False,
        'head_dim': 128,
        'hidden_act': 'silu',
        'hidden_size': 5120,
        'intermediate_size': 27648,
        'max_position_embeddings': 524288,
        'mlp_bias': False,
        'num_attention_heads': 80,
        'num_hidden_layers': 64,
        'num_key_value_heads': 8,
        'residual_dropout': 0.1,
        'rms_norm_eps': 1e-06,
        'rope_scaling': {'rope_type': 'default'},
        'rope_theta': 10000000.0,
        'tie_word_embeddings': False,
        'vocab_size': 155136,
    },
    'zai-org/glm-4-9b-chat-hf': {
        'model_type': 'glm',
        'attention_bias': True,
        'head_dim': 128,
        'hidden_size': 4096,
        'intermediate_size': 13696,
        'max_position_embeddings': 131072,
        'num_attention_heads': 32,
        'num_hidden_layers': 40,
        'num_key_value_heads': 2,
        'partial_rotary_factor': 0.5,
        'rms_norm_eps': 1.5625e-07,
        'rope_theta': 10000.0,
        'tie_word_embeddings': False,
        'vocab_size': 151552,
    },
    'zai-org/GLM-4-9B-0414': {
        'model_type': 'glm4',
        'attention_bias': True,
        'head_dim': 128,
        'hidden_size': 4096,
        'intermediate_size': 13696,
        'max_position_embeddings': 32768,
        'num_attention_heads': 32,
        'num_hidden_layers': 40,
        'num_key_value_heads': 2,
        'partial_rotary_factor': 0.5,
        'rms_norm_eps': 1e-05,
        'rope_theta': 10000.0,
        'tie_word_embeddings': False,
        'vocab_size': 151552,
    },
    'EleutherAI/gpt-j-6b': {
        'model_type': 'gptj',
        'activation_function': 'gelu_new',
        'gradient_checkpointing': False,
        'n_embd': 4096,
        'n_head': 16,
        'n_inner': None,
        'n_layer': 28,
        'n_positions': 2048,
        'rotary': True,
        'rotary_dim': 64,
        'scale_attn_weights': True,
        'summary_type': 'cls_index',
        'tie_word_embeddings': False,
        'vocab_size': 50400,
    },
    'microsoft/phi-1_5': {
        'model_type': 'phi',
        'hidden_act': 'gelu_new',
        'hidden_size': 2048,
        'intermediate_size': 8192,
        'max_position_embeddings': 2048,
        'num_attention_heads': 32,
        'num_hidden_layers': 24,
        'num_key_value_heads': None,
        'partial_rotary_factor': 0.5,
        'qk_layernorm': False,
        'rope_scaling': None,
        'vocab_size': 51200,
    },
    'microsoft/phi-2': {
        'model_type': 'phi',
        'hidden_act': 'gelu_new',
        'hidden_size': 2560,
        'intermediate_size': 10240,
        'max_position_embeddings': 2048,
        'num_attention_heads': 32,
        'num_hidden_layers': 32,
        'num_key_value_heads': 32,
        'partial_rotary_factor': 0.4,
        'qk_layernorm': False,
        'rope_scaling': None,
        'vocab_size': 51200,
    },
    'EleutherAI/gpt-neo-125m': {
        'model_type': 'gpt_neo',
        'activation_function': 'gelu_new',
        'attention_layers': ['global', 'local'] * 6,
        'attention_types': [[['global', 'local'], 6]],
        'hidden_size': 768,
        'intermediate_size': None,
        'max_position_embeddings': 2048,
        'num_heads': 12,
        'num_layers': 12,
        'summary_type': 'cls_index',
        'vocab_size': 50257,
        'window_size': 256,
    },
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_config_is_read(name):
    reference.architecture(PUBLISHED[name])
