"""LFM2 and its mixtures of experts: import, export, generation, published sizes."""

import pytest
from helpers import transformers_models as reference

import interop
from model_config import ModelArchitectureConfig

pytestmark = [pytest.mark.optional, pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

CONV, FULL = 'conv', 'full_attention'
SIZES = {
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'hidden_size': 32,
    'intermediate_size': 48,
    'max_position_embeddings': 32,
}
LFM2 = {'model_type': 'lfm2', **SIZES, 'layer_types': [CONV, CONV, FULL, CONV]}
MOE = {
    'model_type': 'lfm2_moe',
    **SIZES,
    'layer_types': [CONV, FULL, CONV, FULL],
    'num_dense_layers': 1,
    'num_experts': 4,
    'num_experts_per_tok': 2,
    'moe_intermediate_size': 16,
}
CASES = {
    'lfm2': ({**LFM2, 'block_multiple_of': 8}, 'SSAS'),
    'lfm2-biases': (
        {
            **LFM2,
            'block_auto_adjust_ff_dim': False,
            'conv_bias': True,
            'conv_L_cache': 4,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': 50.0},
            'tie_word_embeddings': False,
        },
        'SSAS',
    ),
    'lfm2-indices': (
        {
            **LFM2,
            'layer_types': None,
            'full_attn_idxs': [1, 3],
            'block_multiple_of': 32,
            'block_ffn_dim_multiplier': 1.5,
        },
        'SASA',
    ),
    'lfm2_moe': (MOE, 'ABCB'),
    'lfm2_moe-scaled': (
        {
            **MOE,
            'num_dense_layers': 0,
            'norm_topk_prob': False,
            'routed_scaling_factor': 2.5,
            'use_expert_bias': False,
        },
        'SASA',
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path, new_tokens=20)


def problems_of(fields: dict) -> list[str]:
    problems: list[str] = []
    interop.TRANSFORMERS[fields['model_type']].read({'vocab_size': 40, **fields}, problems)
    return problems


REFUSED = {
    'layer_types and full_attn_idxs contradict each other': (LFM2, {'full_attn_idxs': [1]}),
    "layer_types: 'mamba' is not supported": (LFM2, {'layer_types': [CONV] * 3 + ['mamba']}),
    'block_multiple_of=0: must be at least 1': (LFM2, {'block_multiple_of': 0}),
    'block_ff_dim=96 and intermediate_size=48 contradict': (LFM2, {'block_ff_dim': 96}),
    'layer_types is missing': (MOE, {'layer_types': None}),
    'moe_layer_freq=1': (MOE, {'moe_layer_freq': 1}),
}


def test_without_names_all_layers_are_attention():
    """Then transformers has an equal model of another family, which an export writes."""
    config = reference.architecture({'vocab_size': 40, **LFM2, 'layer_types': None})
    assert config.mixer == 'attention' and config.layer_pattern is None
    assert interop.convert_config(config).fields['model_type'] == 'qwen3'


@pytest.mark.parametrize('message', REFUSED)
def test_refused_fields_are_named(message):
    fields, change = REFUSED[message]
    assert problems_of(fields) == []
    assert message in ' '.join(problems_of({**fields, **change}))


# --- Published models -----------------------------------------------------------------------------

# config.json of LFM2-1.2B, without fields that change no logits in any family.
LFM2_1_2B = {
    'model_type': 'lfm2',
    'block_auto_adjust_ff_dim': True,
    'block_dim': 2048,
    'block_ff_dim': 12288,
    'block_ffn_dim_multiplier': 1.0,
    'block_mlp_init_scale': 1.0,
    'block_multiple_of': 256,
    'block_norm_eps': 1e-05,
    'block_out_init_scale': 1.0,
    'block_use_swiglu': True,
    'block_use_xavier_init': True,
    'conv_L_cache': 3,
    'conv_bias': False,
    'conv_dim': 2048,
    'conv_dim_out': 2048,
    'conv_use_xavier_init': True,
    'full_attn_idxs': [2, 5, 8, 10, 12, 14],
    'hidden_size': 2048,
    'max_position_embeddings': 128000,
    'norm_eps': 1e-05,
    'num_attention_heads': 32,
    'num_heads': 32,
    'num_hidden_layers': 16,
    'num_key_value_heads': 8,
    'rope_theta': 1000000.0,
    'use_pos_enc': True,
    'vocab_size': 65536,
}


def test_preset_is_the_published_model():
    """At its size, the preset is LFM2-1.2B."""
    preset = ModelArchitectureConfig(
        arch_preset='lfm2', n_layer=16, n_head=32, n_embd=2048, block_size=128000, vocab_size=65536
    )
    assert preset.hash == reference.architecture(LFM2_1_2B).hash
