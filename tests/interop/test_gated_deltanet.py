"""Qwen3.5 (its text model) and OLMo Hybrid: import, export, generation."""

import re

import pytest
import torch
from helpers import transformers_models as reference
from safetensors.torch import load_file, save_file

import interop
from common.errors import UserError
from model_config import ModelArchitectureConfig

pytestmark = [pytest.mark.optional, pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

LINEAR, FULL = 'linear_attention', 'full_attention'
SIZES = {
    'num_attention_heads': 4,
    'hidden_size': 32,
    'intermediate_size': 48,
    'max_position_embeddings': 32,
}
DELTA_SIZES = {
    'linear_num_key_heads': 2,
    'linear_num_value_heads': 4,
    'linear_key_head_dim': 8,
    'linear_value_head_dim': 6,
}
QWEN3_5 = {
    'model_type': 'qwen3_5_text',
    **SIZES,
    **DELTA_SIZES,
    'num_hidden_layers': 4,
    'num_key_value_heads': 2,
    'head_dim': 8,
}
OLMO_HYBRID = {'model_type': 'olmo_hybrid', **SIZES, 'num_hidden_layers': 4}
CASES = {
    'qwen3_5': ({**QWEN3_5, 'full_attention_interval': 2}, 'GAGA'),
    'qwen3_5-tied': (
        {
            **QWEN3_5,
            'layer_types': [FULL, LINEAR, LINEAR],
            'num_hidden_layers': 3,
            'attention_bias': True,
            'tie_word_embeddings': True,
            'rope_parameters': {
                'rope_type': 'default',
                'rope_theta': 50.0,
                'partial_rotary_factor': 0.5,
                'mrope_section': [1, 1, 0],
                'mrope_interleaved': True,
            },
        },
        'AGG',
    ),
    'olmo_hybrid': (OLMO_HYBRID, 'GGGA'),
    'olmo_hybrid-without-positions': (
        {
            **OLMO_HYBRID,
            **DELTA_SIZES,
            'layer_types': [FULL, LINEAR, FULL],
            'num_hidden_layers': 3,
            'num_key_value_heads': 2,
            'attention_bias': True,
            'linear_allow_neg_eigval': False,
            'linear_conv_kernel_dim': 3,
            'rms_norm_eps': 1e-2,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': None},
        },
        'AGA',
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path, new_tokens=20)


@pytest.mark.parametrize('name', ['qwen3_5', 'olmo_hybrid'])
def test_published_names_and_divisions_of_tensors(name, tmp_path):
    """Names in published files, tensors of other parts, convolutions of q, k and v."""
    theirs = reference.randomized_model(CASES[name][0])
    expected = dict(reference.saved(theirs, tmp_path).weights(interop_config(tmp_path)))
    tensors = load_file(tmp_path / 'model.safetensors')
    if name == 'qwen3_5':
        tensors = {
            key.replace('model.', 'model.language_model.', 1): t for key, t in tensors.items()
        }
        tensors['mtp.layers.0.input_layernorm.weight'] = torch.ones(32)
        tensors['model.visual.pos_embed.weight'] = torch.ones(32)
    else:
        rows = 24, 24, 48
        for first in [key for key in tensors if 'q_conv1d' in key]:
            names = [first.replace('q_conv', f'{letter}_conv') for letter in 'qkv']
            whole = torch.cat([tensors[key] for key in names])
            tensors |= {key: t.clone() for key, t in zip(names, whole.split(rows))}
    save_file(tensors, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    actual = dict(interop.open_checkpoint(f'hf:{tmp_path}').weights(interop_config(tmp_path)))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def interop_config(folder) -> ModelArchitectureConfig:
    return interop.open_checkpoint(f'hf:{folder}').config


def test_a_convolution_of_too_few_channels_is_refused(tmp_path):
    reference.saved(reference.randomized_model(OLMO_HYBRID), tmp_path)
    tensors = load_file(tmp_path / 'model.safetensors')
    key = next(key for key in tensors if 'v_conv1d' in key)
    save_file({**tensors, key: tensors[key][1:]}, tmp_path / 'model.safetensors')
    source = interop.open_checkpoint(f'hf:{tmp_path}')
    with pytest.raises(UserError, match=re.escape(f'{key} give a tensor of shape (95, 4)')):
        dict(source.weights(source.config))


def test_olmo_hybrid_without_attention_is_not_exported():
    config = ModelArchitectureConfig(
        arch_preset='custom',
        mixer='gated_deltanet',
        normalization='rmsnorm',
        ffn_type='swiglu',
        bias=False,
        gdn_negative_eigenvalues=True,
        vocab_size=40,
    )
    with pytest.raises(UserError, match='layers with attention'):
        interop.convert_config(config)
