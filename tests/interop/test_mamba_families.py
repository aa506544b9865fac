"""Mamba, FalconMamba, Jamba, RecurrentGemma: imports and exports compute what transformers does."""

import pytest
from helpers import transformers_models as reference
from helpers.architectures import tiny

import interop
from common.errors import UserError
from common.published_designs import PUBLISHED_DESIGNS
from interop.families import TRANSFORMERS
from model_builder import build_model, count_parameters
from model_config import ModelArchitectureConfig

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]

MAMBA = {
    'model_type': 'mamba',
    'hidden_size': 16,
    'num_hidden_layers': 2,
    'state_size': 4,
    'conv_kernel': 3,
    'time_step_rank': 3,
}
FALCON_MAMBA = {**MAMBA, 'model_type': 'falcon_mamba', 'mixer_rms_eps': 1e-3}
JAMBA = {
    'model_type': 'jamba',
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'attn_layer_period': 3,
    'attn_layer_offset': 1,
    'num_experts': 4,
    'mamba_d_state': 4,
    'mamba_dt_rank': 3,
    'max_position_embeddings': 16,
}
RECURRENT_GEMMA = {
    'model_type': 'recurrent_gemma',
    'hidden_size': 16,
    'intermediate_size': 48,
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'num_key_value_heads': 1,
    'attention_window_size': 5,
}
CASES = {
    'mamba': (MAMBA, ''),
    'mamba-options': (
        {
            **MAMBA,
            'expand': 16,  # superseded, as in FalconMamba's published files
            'intermediate_size': 48,
            'time_step_rank': 'auto',
            'use_bias': True,
            'use_conv_bias': False,
            'tie_word_embeddings': False,
        },
        '',
    ),
    'falcon_mamba': (FALCON_MAMBA, ''),
    # A: Mamba, B: attention with experts, C: Mamba with experts.
    'jamba': (JAMBA, 'ABAC'),
    'recurrent_gemma': (RECURRENT_GEMMA, 'RRAR'),
    'recurrent_gemma-options': (
        {
            **RECURRENT_GEMMA,
            'attention_bias': True,
            'block_types': ['attention', 'recurrent'],
            'conv1d_width': 3,
            'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 1.0},
        },
        'ARAR',
    ),
    'jamba-dense': ({**JAMBA, 'num_experts': 1, 'mamba_proj_bias': True}, 'MAMM'),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path, new_tokens=20 if 'mamba' in name else 11)


def test_recurrentgemma_2b_is_refused_for_its_width_alone():
    """transformers rounds √2560 = 50.6 to 50.5; the number of parameters is the published one."""
    problems: list[str] = []
    sizes = {'hidden_size': 2560, 'num_attention_heads': 10, 'intermediate_size': 15360}
    fields = {**sizes, 'num_hidden_layers': 26, 'num_key_value_heads': 1, 'vocab_size': 256_000}
    options = TRANSFORMERS['recurrent_gemma'].read(fields, problems)
    assert len(problems) == 1 and problems[0].startswith('hidden_size=2560: transformers scales')
    config = ModelArchitectureConfig(**{'arch_preset': 'custom', **options})
    assert count_parameters(build_model(config))['total_params'] == 2_682_862_080


def test_layers_of_jamba():
    """Attention in one layer of eight, experts in every second (Lieber et al. 2024, figure 2)."""
    config = reference.architecture({'model_type': 'jamba', **PUBLISHED_DESIGNS['jamba'].config})
    layers = config.layers
    assert [n for n, layer in enumerate(layers) if layer.mixer == 'attention'] == [4, 12, 20, 28]
    assert [n for n, layer in enumerate(layers) if layer.ffn_type == 'moe'] == list(range(1, 32, 2))


@pytest.mark.parametrize(
    'fields, problem',
    [
        ({**MAMBA, 'intermediate_size': 40}, 'intermediate_size=40: must be a multiple of'),
        ({**MAMBA, 'hidden_act': 'gelu'}, "hidden_act='gelu' is not supported"),
        ({**MAMBA, 'time_step_rank': 2.5}, 'time_step_rank=2.5: must be'),
        ({**JAMBA, 'attn_layer_offset': 3}, 'attn_layer_offset=3: must be from 0 to 2'),
        ({**JAMBA, 'mamba_inner_layernorms': False}, 'mamba_inner_layernorms=False'),
        ({**JAMBA, 'sliding_window': 8}, 'sliding_window=8 is not supported'),
    ],
)
def test_other_architectures_are_refused(fields, problem):
    problems: list[str] = []
    TRANSFORMERS[fields['model_type']].read({'vocab_size': 40, **fields}, problems)
    assert any(each.startswith(problem) for each in problems), problems


def test_export_refuses_what_transformers_cannot_express():
    norm = {'mamba_norm': 'weighted', 'mamba_dt_rank': 4}
    for values in ({'ffn_type': 'swiglu'}, norm, {'attention_output_bias': True}):
        mixer = 'attention' if 'attention_output_bias' in values else 'mamba'
        config = tiny(**{'mixer': mixer, 'normalization': 'rmsnorm', 'bias': False, **values})
        with pytest.raises(UserError, match='transformers'):
            interop.convert_config(config)
