"""Families with multipliers: imports and exports compute what transformers computes."""

import re

import pytest
import torch
from helpers import transformers_models as reference

import interop

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]

SIZES = {
    'num_hidden_layers': 2,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 25,
}
MULTIPLIERS = {
    'embedding_multiplier': 2.0,
    'residual_multiplier': 0.4,
    'attention_multiplier': 0.3,
    'logits_scaling': 8.0,
}
MIXER = {
    'mamba_n_heads': 8,
    'mamba_d_state': 5,
    'mamba_n_groups': 2,
    'mamba_d_conv': 3,
}
EXPERTS = {'num_local_experts': 4, 'shared_intermediate_size': 48}
GRANITE = {'model_type': 'granite', **SIZES, **MULTIPLIERS}
HYPERCLOVAX = {'model_type': 'hyperclovax', **SIZES, **MULTIPLIERS}
GRANITE4 = {
    'model_type': 'granitemoehybrid',
    **SIZES,
    **MULTIPLIERS,
    **MIXER,
    'num_hidden_layers': 3,
    'layer_types': ['mamba', 'attention', 'mamba'],
    'num_local_experts': 0,
}
# Of a layer; each is a factor in one parameter, mlp_multipliers in two.
CONSTANTS = {
    'key_multiplier': 0.4,
    'attention_in_multiplier': 1.5,
    'attention_out_multiplier': 0.9,
    'ssm_in_multiplier': 1.25,
    'ssm_out_multiplier': 0.25,
    'ssm_multipliers': [0.35, 0.25, 0.9, 1.2, 0.5],
    'mlp_multipliers': [0.8, 0.6],
}
FALCON_H1 = {
    'model_type': 'falcon_h1',
    **SIZES,
    **MIXER,
    'mamba_d_ssm': 24,
    'head_dim': 6,
    'embedding_multiplier': 5.6,
    'lm_head_multiplier': 0.04,
    **CONSTANTS,
}
COHERE = {'model_type': 'cohere', **SIZES, 'logit_scale': 0.25}
COHERE2 = {
    **COHERE,
    'model_type': 'cohere2',
    'layer_types': ['sliding_attention', 'full_attention'],
    'sliding_window': 5,
}
MINICPM3 = {
    'model_type': 'minicpm3',
    **SIZES,
    'num_key_value_heads': 4,
    'q_lora_rank': 12,
    'kv_lora_rank': 10,
    'qk_nope_head_dim': 6,
    'qk_rope_head_dim': 4,
    'v_head_dim': 5,
    'scale_emb': 3,
    'dim_model_base': 4,
}
CASES = {
    'cohere': (COHERE, ''),
    'cohere-options': (
        {
            **COHERE,
            'num_key_value_heads': None,
            'attention_bias': True,
            'tie_word_embeddings': False,
            'layer_norm_eps': 1e-3,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': 50.0},
        },
        '',
    ),
    'cohere-qk-norm': ({**COHERE, 'use_qk_norm': True}, ''),
    'cohere2': (COHERE2, 'LG'),
    'minicpm3': (MINICPM3, ''),
    # As released: the original context is the whole one.
    'minicpm3-longrope': (
        {
            **MINICPM3,
            'rope_parameters': {
                'rope_type': 'longrope',
                'rope_theta': 50.0,
                'original_max_position_embeddings': 25,
                'short_factor': [1.1, 1.4],
                'long_factor': [1.5, 2.5],
            },
        },
        '',
    ),
    'minicpm3-options': (
        {
            **MINICPM3,
            'q_lora_rank': None,
            'scale_depth': None,
            'dim_model_base': None,
            'attention_bias': True,
            'mlp_bias': True,
            'tie_word_embeddings': False,
        },
        '',
    ),
    'granite': (GRANITE, ''),
    'granite-options': (
        {
            **GRANITE,
            'residual_multiplier': 1.0,
            'attention_bias': True,
            'mlp_bias': True,
            'tie_word_embeddings': True,
            'rms_norm_eps': 1e-3,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': 50.0},
        },
        '',
    ),
    'hyperclovax': (HYPERCLOVAX, ''),
    'hyperclovax-options': ({**HYPERCLOVAX, 'attention_multiplier': None, 'head_dim': 6}, ''),
    'granitemoe': ({**GRANITE, 'model_type': 'granitemoe', 'num_local_experts': 4}, ''),
    'granitemoeshared': ({**GRANITE, 'model_type': 'granitemoeshared', **EXPERTS}, ''),
    'granite4-dense': (GRANITE4, 'MAM'),
    'granite4-experts': (
        {**GRANITE4, **EXPERTS, 'num_experts_per_tok': 3, 'tie_word_embeddings': True},
        'MAM',
    ),
    'granite4-options': (
        {
            **GRANITE4,
            'mamba_d_head': 2,
            'mamba_expand': 1,
            'mamba_proj_bias': True,
            'mamba_conv_bias': False,
            'attention_bias': True,
            'position_embedding_type': 'rope',
            'rope_parameters': {'rope_type': 'default', 'rope_theta': 50.0},
        },
        'MAM',
    ),
    'falcon_h1': (FALCON_H1, ''),
    'falcon_h1-options': (
        {
            **FALCON_H1,
            'mamba_d_ssm': None,
            'mamba_rms_norm': True,
            'mamba_norm_before_gate': False,
            'mamba_proj_bias': True,
            'projectors_bias': True,
            'attention_bias': True,
            'mlp_bias': True,
            'tie_word_embeddings': True,
        },
        '',
    ),
    'falcon_h1-norm-first': ({**FALCON_H1, 'mamba_rms_norm': True, 'mamba_conv_bias': False}, ''),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path, new_tokens=20)


@pytest.mark.slow
@pytest.mark.parametrize('name', CONSTANTS)
def test_each_constant_of_falcon_h1_is_part_of_the_weights(name, tmp_path):
    """An export has none of them, and their factors in its weights."""
    fields = {key: value for key, value in FALCON_H1.items() if key not in CONSTANTS}
    _, ours, _, pairs = reference.compared({**fields, name: CONSTANTS[name]}, tmp_path)
    assert reference.largest_difference(*pairs['logits']) < 1e-5
    assert reference.largest_difference(*pairs['gradients']) < 1e-4
    plain = reference.saved(reference.randomized_model(fields), tmp_path / 'plain')
    without = dict(plain.weights(plain.config))
    differing = [
        key for key, tensor in ours.named_parameters() if not torch.equal(tensor, without[key])
    ]
    parameters = 2 if name == 'mlp_multipliers' else 1
    assert len(differing) == fields['num_hidden_layers'] * parameters


REFUSED = {
    'scale_depth=0: must not be 0': (MINICPM3, {'scale_depth': 0}),
    'must equal mamba_proj_bias': (FALCON_H1, {'projectors_bias': True}),
    'ssm_multipliers.*must be 5 numbers': (FALCON_H1, {'ssm_multipliers': [1.0, 2.0]}),
    'mlp_multipliers.*must be a list of finite numbers': (FALCON_H1, {'mlp_multipliers': 'a'}),
    'mamba_n_heads=8: with heads of 5, does not fill a width of 24': (
        FALCON_H1,
        {'mamba_d_head': 5},
    ),
    'logits_scaling=0: must be above 0': (GRANITE, {'logits_scaling': 0}),
    'shared_intermediate_size=50: must be a multiple of intermediate_size=24': (
        GRANITE4,
        {'num_local_experts': 4, 'shared_intermediate_size': 50},
    ),
    "position_embedding_type='alibi': must be": (GRANITE4, {'position_embedding_type': 'alibi'}),
}


@pytest.mark.parametrize('message', REFUSED)
def test_refused_fields_are_named(message):
    fields, changes = REFUSED[message]
    problems: list[str] = []
    interop.TRANSFORMERS[fields['model_type']].read(
        {'vocab_size': 40, **fields, **changes}, problems
    )
    assert any(re.search(message, problem) for problem in problems), problems
