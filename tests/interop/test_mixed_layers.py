"""Families of transformers whose layers differ: import, export, generation, refused fields."""

import re

import pytest
from helpers import transformers_models as reference
from helpers.architectures import tiny

import interop
from common.errors import UserError
from model_config import ModelArchitectureConfig

pytestmark = [pytest.mark.optional, pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

SIZES = {
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'hidden_size': 32,
    'intermediate_size': 48,
    'max_position_embeddings': 16,
}
WINDOW, FULL = 'sliding_attention', 'full_attention'
DEFAULT = {'rope_type': 'default', 'rope_theta': 50.0}
YARN = {
    'rope_type': 'yarn',
    'rope_theta': 50.0,
    'factor': 4.0,
    'original_max_position_embeddings': 32,
}
GEMMA3 = {
    'model_type': 'gemma3_text',
    **SIZES,
    'head_dim': 12,
    'query_pre_attn_scalar': 20,
    'sliding_window': 5,
}
LINEAR = {'rope_type': 'linear', 'rope_theta': 90.0, 'factor': 3.0}
SMOLLM3 = {'model_type': 'smollm3', **SIZES}
OLMO3 = {'model_type': 'olmo3', **SIZES, 'sliding_window': 5}
EXAONE4 = {'model_type': 'exaone4', **SIZES, 'sliding_window': 5}
MELLUM = {
    'model_type': 'mellum',
    **SIZES,
    'head_dim': 12,
    'sliding_window': 5,
    'layer_types': [WINDOW, FULL, WINDOW, WINDOW],
    'num_experts': 4,
    'num_experts_per_tok': 2,
    'moe_intermediate_size': 16,
}
# The config of transformers, and the letter of each layer that it is read as.
CASES = {
    'gemma3': (
        {
            **GEMMA3,
            'layer_types': [WINDOW, FULL, FULL, WINDOW],
            'rope_parameters': {WINDOW: DEFAULT, FULL: LINEAR},
        },
        'LGGL',
    ),
    'gemma3-interval': (
        {
            **GEMMA3,
            'sliding_window_pattern': 3,
            'attention_bias': True,
            'final_logit_softcapping': 2.0,
            'tie_word_embeddings': False,
        },
        'LLGL',
    ),
    'smollm3': (SMOLLM3, 'RRRN'),
    'smollm3-flags': (
        {
            **SMOLLM3,
            'no_rope_layers': [0, 0, 1, 0],
            'attention_bias': True,
            'mlp_bias': True,
            'head_dim': 12,
            'rope_parameters': YARN,
            'tie_word_embeddings': False,
        },
        'NNRN',
    ),
    'smollm3-windows': (
        {
            **SMOLLM3,
            'no_rope_layer_interval': 2,
            'use_sliding_window': True,
            'sliding_window': 5,
        },
        'GLGL',
    ),
    'olmo3': ({**OLMO3, 'rope_parameters': {WINDOW: DEFAULT, FULL: YARN}}, 'LLLG'),
    'olmo3-types': ({**OLMO3, 'layer_types': [FULL, WINDOW] * 2, 'attention_bias': True}, 'GLGL'),
    'exaone4': ({**EXAONE4, 'rope_parameters': DEFAULT}, 'LLLG'),
    'exaone4-global': (
        {**EXAONE4, 'sliding_window': None, 'layer_types': [FULL] * 4, 'rope_parameters': YARN},
        '',
    ),
    'mellum': ({**MELLUM, 'mlp_layer_types': ['dense', *['sparse'] * 3]}, 'ABCC'),
    'mellum-sparse': ({**MELLUM, 'rope_parameters': {WINDOW: DEFAULT, FULL: YARN}}, 'LGLL'),
}


@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path)


def test_layers_that_no_family_can_express_are_named():
    config = tiny(arch_preset='smollm3', layer_kinds={'N': {'position_encoding': 'alibi'}})
    with pytest.raises(UserError, match=r"architecture: position_encoding='alibi' in layers N, "):
        interop.convert_config(config.replace(n_layer=4))


# Fields that people, other programs and other versions write into a config.json.
REFUSED = {
    'attn_logit_softcapping=5.0 is not supported': (GEMMA3, {'attn_logit_softcapping': 5.0}),
    'use_bidirectional_attention=True is not supported': (
        GEMMA3,
        {'use_bidirectional_attention': True},
    ),
    'sliding_window_pattern=-1: must be at least 1': (GEMMA3, {'sliding_window_pattern': -1}),
    'query_pre_attn_scalar=0: must be above 0': (GEMMA3, {'query_pre_attn_scalar': 0}),
    'original_max_position_embeddings=8: must be in the rope_parameters': (
        GEMMA3,
        {'original_max_position_embeddings': 8},
    ),
    'rope_local_base_freq=7.0, but rope_theta is 50.0|=50.0 and rope_local_base_freq=7.0': (
        GEMMA3,
        {'rope_local_base_freq': 7.0, 'rope_parameters': {WINDOW: DEFAULT}},
    ),
    'rope_parameters: full_attention: truncate=False: not supported': (
        GEMMA3,
        {'rope_parameters': {FULL: {**LINEAR, 'truncate': False}}},
    ),
    'no_rope_layers=.*: has 2 entries for 4 layers': (SMOLLM3, {'no_rope_layers': [1, 0]}),
    'no_rope_layers=.*: must be a list of numbers': (SMOLLM3, {'no_rope_layers': ['1'] * 4}),
    'no_rope_layers=3: must be a list': (SMOLLM3, {'no_rope_layers': 3}),
    'no_rope_layer_interval=0: must be at least 1': (SMOLLM3, {'no_rope_layer_interval': 0}),
    'layer_types=.*: has windows, but use_sliding_window is not true': (
        SMOLLM3,
        {'layer_types': [WINDOW] * 4, 'sliding_window': 5},
    ),
    'layer_types=.*: has 2 entries for 4 layers': (OLMO3, {'layer_types': [WINDOW, FULL]}),
    "layer_types: 'linear_attention' is not supported": (
        OLMO3,
        {'layer_types': ['linear_attention'] * 4},
    ),
    'rope_theta=7.0, but rope_theta is .*. Delete the wrong one': (MELLUM, {'rope_theta': 7.0}),
    'rope_parameters: rope_type=.*: not supported': (OLMO3, {'rope_parameters': DEFAULT}),
    "rope_type='dynamic' is not supported": (
        OLMO3,
        {'rope_parameters': {FULL: {**DEFAULT, 'rope_type': 'dynamic'}}},
    ),
    'rope_scaling=.*: rope_parameters exists too': (
        OLMO3,
        {'rope_scaling': YARN, 'rope_parameters': {FULL: DEFAULT}},
    ),
    "sliding_window_pattern='LLLG': must be a whole number": (
        EXAONE4,
        {'sliding_window_pattern': 'LLLG'},
    ),
    'sliding_window_pattern=0: must be at least 1': (EXAONE4, {'sliding_window_pattern': 0}),
    'rope_parameters: full_attention=.*: not supported': (
        EXAONE4,
        {'rope_parameters': {FULL: DEFAULT}},
    ),
    'mlp_layer_types=.*: has 3 entries for 4 layers': (
        MELLUM,
        {'mlp_layer_types': ['sparse'] * 3},
    ),
    "mlp_layer_types: 'dens' is not supported; supported: 'dense', 'sparse'": (
        MELLUM,
        {'mlp_layer_types': ['dens'] * 4},
    ),
    'rope_scaling=.*: must be in the rope_parameters of the layers': (
        MELLUM,
        {'rope_scaling': YARN},
    ),
    'partial_rotary_factor=0.5 is not supported': (
        MELLUM,
        {'rope_parameters': {WINDOW: {**DEFAULT, 'partial_rotary_factor': 0.5}, FULL: DEFAULT}},
    ),
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


# The fields of published checkpoints, without the sizes.
PUBLISHED = {
    'gemma-3-1b': (
        {
            'model_type': 'gemma3_text',
            'attn_logit_softcapping': None,
            'cache_implementation': 'hybrid',
            'final_logit_softcapping': None,
            'rope_local_base_freq': 10000,
            'rope_scaling': None,
            'rope_theta': 1000000,
            'sliding_window': 512,
            'sliding_window_pattern': 3,
        },
        'LLGL',
    ),
    'gemma-3-270m': (
        {
            'model_type': 'gemma3_text',
            '_sliding_window_pattern': 6,
            'layer_types': [WINDOW, WINDOW, WINDOW, FULL],
            'rope_local_base_freq': 10000.0,
            'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
            'rope_theta': 1000000.0,
            'use_bidirectional_attention': False,
        },
        'LLLG',
    ),
    'SmolLM3-3B': (
        {
            'model_type': 'smollm3',
            'max_window_layers': 28,
            'no_rope_layer_interval': 4,
            'no_rope_layers': [1, 1, 1, 0],
            'layer_types': [FULL] * 4,
            'pretraining_tp': 2,
            'rope_scaling': None,
            'rope_theta': 5000000.0,
            'sliding_window': None,
            'use_sliding_window': False,
        },
        'RRRN',
    ),
    'Olmo-3-7B': (
        {
            'model_type': 'olmo3',
            'attention_bias': False,
            'layer_types': [WINDOW] * 3 + [FULL],
            'rms_norm_eps': 1e-06,
            'rope_scaling': {
                'attention_factor': 1.2079441541679836,
                'beta_fast': 32.0,
                'beta_slow': 1.0,
                'factor': 8.0,
                'original_max_position_embeddings': 8192,
                'rope_type': 'yarn',
            },
            'rope_theta': 500000,
            'sliding_window': 4096,
        },
        'LLLG',
    ),
    'EXAONE-4.0-32B': (
        {
            'model_type': 'exaone4',
            'layer_types': [WINDOW] * 3 + [FULL],
            'rope_scaling': {
                'factor': 16.0,
                'high_freq_factor': 4.0,
                'low_freq_factor': 1.0,
                'original_max_position_embeddings': 8192,
                'rope_type': 'llama3',
            },
            'rope_theta': 1000000,
            'sliding_window': 4096,
            'sliding_window_pattern': 'LLLG',
        },
        'LLLG',
    ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_config_is_read(name):
    fields, letters = PUBLISHED[name]
    problems: list[str] = []
    options = interop.TRANSFORMERS[fields['model_type']].read(
        {'vocab_size': 40, **SIZES, **fields}, problems
    )
    config = ModelArchitectureConfig(**{'arch_preset': 'custom', **options})
    assert problems == [] and ''.join(config.layer_letters) == letters
