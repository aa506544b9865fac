"""Families that differ from others in few parts: parity with transformers, refused fields."""

import re

import pytest
from helpers import transformers_models as reference

import interop

pytestmark = [pytest.mark.optional, pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

SIZES = {
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'hidden_size': 32,
    'intermediate_size': 48,
    'max_position_embeddings': 32,
}
GROUPED = {**SIZES, 'head_dim': 12}
YARN = {
    'rope_parameters': {
        'rope_type': 'yarn',
        'rope_theta': 50.0,
        'factor': 4.0,
        'original_max_position_embeddings': 32,
    }
}
QWEN3_MOE = {
    'model_type': 'qwen3_moe',
    **GROUPED,
    'num_hidden_layers': 4,
    'num_experts': 4,
    'num_experts_per_tok': 2,
    'moe_intermediate_size': 16,
}
OLMOE = {'model_type': 'olmoe', **SIZES, 'num_experts': 4, 'num_experts_per_tok': 2}
MPT = {'model_type': 'mpt', 'n_layers': 2, 'n_heads': 4, 'd_model': 32, 'max_seq_len': 32}
GPT_BIGCODE = {
    'model_type': 'gpt_bigcode',
    'n_layer': 2,
    'n_head': 4,
    'n_embd': 32,
    'n_positions': 32,
}
WINDOW, FULL = 'sliding_attention', 'full_attention'
MINISTRAL = {'model_type': 'ministral', **GROUPED, 'num_hidden_layers': 4, 'sliding_window': 5}
CWM = {
    'model_type': 'cwm',
    **GROUPED,
    'num_hidden_layers': 4,
    'sliding_window': 5,
    'bos_token_id': 0,
}
WITHOUT_GROUPS = {key: size for key, size in SIZES.items() if key != 'num_key_value_heads'}
PERSIMMON = {'model_type': 'persimmon', **WITHOUT_GROUPS}
BIOGPT = {'model_type': 'biogpt', **WITHOUT_GROUPS}
GPT1 = {**GPT_BIGCODE, 'model_type': 'openai-gpt'}
YOUTU = {
    'model_type': 'youtu',
    **SIZES,
    'num_key_value_heads': 4,
    'q_lora_rank': 12,
    'kv_lora_rank': 10,
    'qk_nope_head_dim': 6,
    'qk_rope_head_dim': 4,
    'v_head_dim': 5,
}
# The config of transformers, and the letter of each layer that it is read as.
CASES = {
    'qwen3_moe': (QWEN3_MOE, ''),
    'qwen3_moe-dense': (
        {
            **QWEN3_MOE,
            **YARN,
            'mlp_only_layers': [1],
            'norm_topk_prob': True,
            'attention_bias': True,
            'use_sliding_window': True,
            'sliding_window': 5,
        },
        'ABAA',
    ),
    'gemma': ({'model_type': 'gemma', **GROUPED}, ''),
    'gemma-biases': (
        {
            'model_type': 'gemma',
            **GROUPED,
            'attention_bias': True,
            'hidden_act': 'gelu',
            'tie_word_embeddings': False,
        },
        '',
    ),
    'olmoe': (OLMOE, ''),
    'olmoe-normalized': ({**OLMOE, 'norm_topk_prob': True, 'attention_bias': True, **YARN}, ''),
    'starcoder2': ({'model_type': 'starcoder2', **SIZES, 'sliding_window': 5}, ''),
    'starcoder2-no-biases': (
        {
            'model_type': 'starcoder2',
            **SIZES,
            'use_bias': False,
            'hidden_act': 'relu',
            'tie_word_embeddings': False,
        },
        '',
    ),
    'nemotron': ({'model_type': 'nemotron', **GROUPED}, ''),
    'nemotron-biases': (
        {
            'model_type': 'nemotron',
            **SIZES,
            'attention_bias': True,
            'mlp_bias': True,
            'partial_rotary_factor': 1.0,
            'tie_word_embeddings': True,
        },
        '',
    ),
    'ernie4_5': ({'model_type': 'ernie4_5', **GROUPED}, ''),
    'ernie4_5-biases': ({'model_type': 'ernie4_5', **GROUPED, **YARN, 'use_bias': True}, ''),
    'arcee': ({'model_type': 'arcee', **GROUPED}, ''),
    'arcee-biases': (
        {
            'model_type': 'arcee',
            **SIZES,
            **YARN,
            'attention_bias': True,
            'mlp_bias': True,
            'hidden_act': 'gelu',
        },
        '',
    ),
    'helium': ({'model_type': 'helium', **SIZES, 'head_dim': 8}, ''),
    'helium-biases': (
        {
            'model_type': 'helium',
            **SIZES,
            'head_dim': 8,
            'attention_bias': True,
            'mlp_bias': True,
            'tie_word_embeddings': True,
        },
        '',
    ),
    'mpt': (MPT, ''),
    'mpt-clip': ({**MPT, 'attn_config': {'clip_qkv': 0.5}}, ''),
    'mpt-6-heads': (
        {
            **MPT,
            'n_heads': 6,
            'd_model': 36,
            'attn_config': {'softmax_scale': 0.3, 'clip_qkv': 1.5},
            'tie_word_embeddings': False,
        },
        '',
    ),
    'flex_olmo': ({**OLMOE, 'model_type': 'flex_olmo'}, ''),
    'flex_olmo-biases': (
        {
            **OLMOE,
            **YARN,
            'model_type': 'flex_olmo',
            'head_dim': 12,
            'norm_topk_prob': True,
            'attention_bias': True,
        },
        '',
    ),
    'ministral': ({**MINISTRAL, 'layer_types': [WINDOW, FULL] * 2}, 'LGLG'),
    'ministral-windows': ({**MINISTRAL, 'num_key_value_heads': 4, **YARN}, ''),
    'cwm': (CWM, 'GLLL'),
    'cwm-biases': (
        {
            **CWM,
            'mlp_bias': True,
            'tie_word_embeddings': True,
            'layer_types': [FULL] * 4,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': 50.0},
        },
        '',
    ),
    'vaultgemma': (
        {
            'model_type': 'vaultgemma',
            **GROUPED,
            'query_pre_attn_scalar': 20,
            'sliding_window': 5,
            'attn_logit_softcapping': 2.0,
        },
        'LG',
    ),
    'jais2': ({'model_type': 'jais2', **GROUPED}, ''),
    'jais2-no-biases': (
        {
            'model_type': 'jais2',
            **SIZES,
            **YARN,
            'attention_bias': False,
            'mlp_bias': False,
            'hidden_act': 'gelu',
        },
        '',
    ),
    'persimmon': (PERSIMMON, ''),
    'persimmon-no-norms': (
        {**PERSIMMON, 'qk_layernorm': False, 'partial_rotary_factor': 1.0, 'hidden_act': 'gelu'},
        '',
    ),
    'biogpt': (BIOGPT, ''),
    'biogpt-untied': (
        {**BIOGPT, 'scale_embedding': False, 'tie_word_embeddings': False, 'hidden_act': 'relu'},
        '',
    ),
    'openai-gpt': (GPT1, ''),
    'openai-gpt-untied': ({**GPT1, 'afn': 'silu', 'tie_word_embeddings': False}, ''),
    'youtu': (YOUTU, ''),
    'youtu-biases': (
        {
            **YOUTU,
            **YARN,
            'q_lora_rank': None,
            'attention_bias': True,
            'tie_word_embeddings': False,
            'rms_norm_eps': 1e-3,
        },
        '',
    ),
    'exaone': ({'model_type': 'exaone', **GROUPED, **YARN}, ''),
    'internlm3': ({'model_type': 'internlm3', **GROUPED, 'qkv_bias': True, 'bias': True}, ''),
    'iquestcoder': ({'model_type': 'iquestcoder', **GROUPED, 'attention_bias': True}, ''),
    'gpt_bigcode': (GPT_BIGCODE, ''),
    'gpt_bigcode-heads': ({**GPT_BIGCODE, 'multi_query': False, 'n_inner': 40}, ''),
}


@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path, new_tokens=20)


# Fields that people, other programs and other versions write into a config.json.
REFUSED = {
    'clip_qkv=8.0 is not supported; supported: None': (OLMOE, {'clip_qkv': 8.0}),
    'head_dim=16: contradicts 4 heads in a width of 32': (OLMOE, {'head_dim': 16}),
    'attn_config: qk_ln=True is not supported': (MPT, {'attn_config': {'qk_ln': True}}),
    'attn_config: alibi=False is not supported': (MPT, {'attn_config': {'alibi': False}}),
    'attn_config: foo=1: an unknown field': (MPT, {'attn_config': {'foo': 1}}),
    'logit_scale=0.5 is not supported': (MPT, {'logit_scale': 0.5}),
    'decoder_sparse_step=0: must be at least 1': (QWEN3_MOE, {'decoder_sparse_step': 0}),
}


def problems_of(fields: dict) -> list[str]:
    problems: list[str] = []
    interop.TRANSFORMERS[fields['model_type']].read({'vocab_size': 40, **fields}, problems)
    return problems


@pytest.mark.parametrize('message', REFUSED)
def test_refused_fields_are_named(message):
    fields, change = REFUSED[message]
    assert problems_of(fields) == []
    assert re.search(message, ' '.join(problems_of({**fields, **change})))
