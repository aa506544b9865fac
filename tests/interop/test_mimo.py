"""MiMo-V2-Flash: the same as transformers, and as published."""

import pytest
from helpers import transformers_models as reference
from helpers.foreign_configs import BASES

import interop
from model_builder import build_model, count_parameters

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]

TINY = {
    'model_type': 'mimo_v2_flash',
    **BASES['mimo_v2_flash'],
    'max_position_embeddings': 32,
    'vocab_size': 40,
}
ROPE = {
    'full_attention': {
        **{'rope_type': 'yarn', 'rope_theta': 50.0, 'factor': 4.0},
        **{'original_max_position_embeddings': 8, 'partial_rotary_factor': 0.5},
    },
    'sliding_attention': {'rope_type': 'default', 'rope_theta': 9.0},
}
CASES = {
    'two layers': (TINY, 'GL'),
    'as released': (
        {**TINY, 'num_hidden_layers': 7, 'layer_types': None, 'n_group': 2, 'topk_group': 1},
        'ABBBBCB',
    ),
    'biases': (
        {
            **{**TINY, 'attention_bias': True, 'attention_value_scale': None},
            **{'v_head_dim': 16, 'rope_parameters': ROPE, 'routed_scaling_factor': 2.5},
        },
        'GL',
    ),
    'all heads have keys in windows': ({**TINY, 'num_key_value_heads': 2}, 'GL'),
}


@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path, new_tokens=20)


# Fields of the released config.json that transformers does not read, for the tiny model.
COPIES = {
    'hybrid_layer_pattern': [0, 1],
    'moe_layer_freq': [0, 1],
    'swa_num_attention_heads': 4,
    'swa_num_key_value_heads': 2,
    'swa_head_dim': 12,
    'swa_v_head_dim': 8,
    'layernorm_epsilon': 1e-5,
    'rope_theta': 5e6,
    'swa_rope_theta': 1e4,
    'partial_rotary_factor': 0.334,
    'add_full_attention_sink_bias': False,
    'add_swa_attention_sink_bias': True,
    'attention_chunk_size': 4,
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'n_shared_experts': None,
    'routed_scaling_factor': None,
}


def problems_of(**fields) -> list[str]:
    problems: list[str] = []
    interop.TRANSFORMERS['mimo_v2_flash'].read({**TINY, **fields}, problems)
    return problems


def test_fields_of_released_files_are_read():
    assert problems_of(**COPIES) == []
    config = reference.architecture({**TINY, **COPIES})
    assert config.to_dict() == reference.architecture(TINY).to_dict()
    assert [layer.get('sliding_window') for layer in config.layers] == [None, 5]
    # The tokens before a token's own, which transformers prefers to the window.
    released = reference.architecture({**TINY, 'sliding_window_size': 5})
    assert released.layers[1].sliding_window == 6


REFUSED = {
    'hybrid_layer_pattern': [1, 1],
    'moe_layer_freq': [1, 1],
    'swa_num_key_value_heads': 4,
    'swa_v_head_dim': 12,
    'layernorm_epsilon': 1e-6,
    'rope_theta': 1e4,
    'add_full_attention_sink_bias': True,
    'n_shared_experts': 1,
}


@pytest.mark.parametrize('name', REFUSED)
def test_other_values_of_fields_that_transformers_ignores_are_refused(name):
    (problem,) = problems_of(**{name: REFUSED[name]})
    assert problem.startswith(f'{name}=') and 'does not read it' in problem


def test_published_model_has_its_size():
    """309 billion parameters, of which 15 are active (Xiaomi 2026, MiMo-V2-Flash Technical Report),
    without multi-token prediction."""
    config = reference.architecture(
        {
            'model_type': 'mimo_v2_flash',
            **{'num_hidden_layers': 48, 'hidden_size': 4096, 'num_attention_heads': 64},
            'vocab_size': 152_576,
        }
    )
    counted = count_parameters(build_model(config))
    assert round(counted['total_params'] / 1e9) == 309
    assert round(counted['active_params'] / 1e9) == 15
    theirs = reference.from_fields({'model_type': 'mimo_v2_flash'}, device='meta')
    assert counted['total_params'] == theirs.num_parameters()
