"""Llama 4: the same as transformers, and as published."""

import pytest
import torch
from helpers import transformers_models as reference
from helpers.foreign_configs import BASES

import interop
from model_builder import build_model, count_parameters
from model_config import ModelArchitectureConfig

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]

# Chunks of 5 tokens, of which the texts have up to 6.
TINY = {'model_type': 'llama4_text', **BASES['llama4_text'], 'max_position_embeddings': 32}
FOUR = {**TINY, 'num_hidden_layers': 4, 'no_rope_layers': None, 'moe_layers': None}
CASES = {
    'two layers': (TINY, 'RN'),
    'as Scout': ({**FOUR, 'num_experts_per_tok': 1}, 'RRRN'),
    'as Maverick': (
        {
            **{**FOUR, 'interleave_moe_layer_step': 2, 'use_qk_norm': False},
            **{'attention_bias': True, 'tie_word_embeddings': True},
        },
        'ABAC',
    ),
    'other types of layers': (
        {
            **{**FOUR, 'no_rope_layers': [1, 0, 1, 1], 'attn_temperature_tuning': False},
            'layer_types': ['full_attention', *['chunked_attention'] * 2, 'full_attention'],
        },
        'ABCA',
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path, new_tokens=20)


REFUSED = {
    'layer_types: .*sliding_attention': {'layer_types': ['sliding_attention', 'full_attention']},
    'layer_types=.* 1 entries for 2 layers': {'layer_types': ['full_attention']},
    'attention_chunk_size is null': {
        'attention_chunk_size': None,
        'layer_types': ['chunked_attention', 'full_attention'],
    },
    'moe_layers=.*: must be layers from 0 to 1': {'moe_layers': [2]},
    'interleave_moe_layer_step=0: must be at least 1': {
        'moe_layers': None,
        'interleave_moe_layer_step': 0,
    },
}


@pytest.mark.parametrize('message', REFUSED)
def test_refused_fields_are_named(message):
    problems: list[str] = []
    interop.TRANSFORMERS['llama4_text'].read(
        {**TINY, 'vocab_size': 40, **REFUSED[message]}, problems
    )
    with pytest.raises(AssertionError, match=message):
        assert problems == []


def test_an_empty_list_of_layers_counts_as_none():
    """As in files of the first release."""
    given, without = (
        reference.architecture({'vocab_size': 40, **FOUR, 'no_rope_layers': flags})
        for flags in ([], None)
    )
    assert given.to_dict() == without.to_dict()


def test_preset_has_the_design_of_the_family():
    """Other ratios of heads apart."""
    sizes = {'n_layer': 12, 'n_embd': 640, 'n_head': 10, 'block_size': 1024, 'vocab_size': 99}
    preset = ModelArchitectureConfig(arch_preset='llama4', **sizes)
    family = ModelArchitectureConfig(like='llama4_text', **sizes)
    differing = {
        key
        for ours, theirs in zip(preset.layers, family.layers)
        for key in {**ours.to_dict(), **theirs.to_dict()}
        if ours.get(key) != theirs.get(key)
    }
    assert differing <= {'load_balance_weight', 'layer_kinds', 'd_ff', 'attention_dropout'}
    assert preset.num_kv_heads == 2 and preset.layers[0].attention_chunk == 32


# config.json of both published models, and the billions of parameters in Meta's model card (2025).
SCOUT = {
    'num_hidden_layers': 48,
    'hidden_size': 5120,
    'num_attention_heads': 40,
    'num_key_value_heads': 8,
    'intermediate_size': 8192,
    'intermediate_size_mlp': 16384,
    'vocab_size': 202048,
    'num_local_experts': 16,
    'interleave_moe_layer_step': 1,
}
ENCODER = {
    **{'hidden_size': 1408, 'vision_output_dim': 4096, 'image_size': 336},
    **{'projector_input_dim': 4096, 'projector_output_dim': 4096},
}
PUBLISHED = {
    'Scout': (SCOUT, 107_769_861_120, 109),
    'Maverick': (
        {**SCOUT, 'num_local_experts': 128, 'interleave_moe_layer_step': 2, 'use_qk_norm': False},
        400_711_848_960,
        400,
    ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_models_have_their_sizes(name):
    """The totals include the encoder of images, which is built with transformers: 108,641,793,536
    parameters of Scout."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    fields, text, published = PUBLISHED[name]
    model = build_model(reference.architecture({'model_type': 'llama4_text', **fields}))
    counted = count_parameters(model)
    assert counted['total_params'] == text
    assert round(counted['active_params'] / 1e9) == 17
    with torch.device('meta'):
        config = Llama4Config(text_config=fields, vision_config=ENCODER)
        whole = Llama4ForConditionalGeneration(config)
    assert whole.language_model.num_parameters() == text
    assert whole.num_parameters() / 1e9 == pytest.approx(published, rel=0.005)
