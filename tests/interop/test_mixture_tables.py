"""Relatives of other families, most with mixtures of experts: parity, refused fields."""

import pytest
from helpers import transformers_models as reference
from helpers.foreign_configs import BASES

import interop

pytestmark = [pytest.mark.optional, pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

LENGTH = {'max_position_embeddings': 32}
YARN = {
    'rope_type': 'yarn',
    'rope_theta': 50.0,
    'factor': 4.0,
    'original_max_position_embeddings': 32,
}


def changed(family: str, **fields) -> dict:
    return {'model_type': family, **BASES[family], **LENGTH, **fields}


DBRX = {**BASES['dbrx'], 'model_type': 'dbrx', 'max_seq_len': 32}
# The config of transformers, and the letter of each layer that it is read as.
CASES = {
    'dbrx': (DBRX, ''),
    'dbrx-other-weights': (
        {
            **DBRX,
            'rope_theta': 50.0,
            'attn_config': {'kv_n_heads': 4, 'clip_qkv': 2.0, 'rope_theta': 50.0},
            'ffn_config': {
                **{'ffn_hidden_size': 24, 'moe_num_experts': 3, 'moe_top_k': 1},
                'moe_normalize_expert_weights': None,
            },
        },
        '',
    ),
    'sarvam_moe': (changed('sarvam_moe'), 'DM'),
    'sarvam_moe-biases': (
        changed('sarvam_moe', attention_bias=True, use_qk_norm=False, norm_topk_prob=False),
        'DM',
    ),
    'sarvam_mla': (changed('sarvam_mla'), 'DM'),
    'sarvam_mla-latent-queries': (
        changed('sarvam_mla', q_lora_rank=12, n_group=2, topk_group=1, rope_parameters=YARN),
        'DM',
    ),
    'granite_swa': (changed('granite_swa'), 'LG'),
    'granite_swa-no-positions': (
        changed('granite_swa', layer_rope_theta=[0, 0], attention_bias=True, mlp_bias=True),
        'LG',
    ),
    'granite_swa-defaults': (
        changed('granite_swa', layer_rope_theta=None, layer_types=None, num_hidden_layers=5),
        'GLLLG',
    ),
    'granitemoe_swa': (changed('granitemoe_swa', tie_word_embeddings=True), 'LG'),
    'granitemoe_swa-no-shared': (
        changed('granitemoe_swa', shared_intermediate_size=0, layer_rope_theta=[50.0, 7.0]),
        'LG',
    ),
    'flint': (changed('flint'), 'LG'),
    'flint-defaults': (
        changed(
            'flint',
            **{'layer_types': None, 'mlp_only_layers': None, 'num_hidden_layers': 5},
            **{'norm_topk_prob': False, 'attention_bias': True},
        ),
        'AABBC',
    ),
    'kolibri1': (changed('kolibri1'), 'LG'),
    'kolibri1-defaults': (
        changed('kolibri1', layer_types=None, num_hidden_layers=5, norm_topk_prob=True),
        'LLLLG',
    ),
    'laguna': (changed('laguna'), 'LG'),
    'laguna-defaults': (
        changed(
            'laguna',
            **{'layer_types': None, 'num_attention_heads_per_layer': None, 'num_hidden_layers': 3},
            **{'gating': 'per-element', 'moe_routed_scaling_factor': 2.5},
        ),
        'ABB',
    ),
    'laguna-equal-heads': (
        changed(
            'laguna',
            num_attention_heads_per_layer=[2, 2],
            rope_parameters={
                'full_attention': {**YARN, 'partial_rotary_factor': 0.5},
                'sliding_attention': {'rope_type': 'default', 'rope_theta': 50.0},
            },
        ),
        'LG',
    ),
    'lara_mini': (changed('lara_mini'), 'ABC'),
    'lara_mini-defaults': (
        changed(
            'lara_mini',
            **{'layer_types': None, 'num_hidden_layers': 5, 'norm_topk_prob': False},
            **{'attention_bias': True, 'tie_word_embeddings': False},
        ),
        'ABACB',
    ),
    'gpt_neox_japanese': (changed('gpt_neox_japanese'), 'AB'),
    'gpt_neox_japanese-untied': (
        changed(
            'gpt_neox_japanese',
            **{'num_hidden_layers': 3, 'hidden_act': 'relu', 'tie_word_embeddings': False},
            **{'rotary_pct': 1.0, 'rotary_emb_base': 9.0, 'intermediate_multiple_size': 3},
        ),
        'AAB',
    ),
    'lfm3': (changed('lfm3'), 'ABC'),
    'lfm3-without-gates': (
        changed(
            'lfm3',
            **{'layer_types': None, 'num_hidden_layers': 5, 'tie_word_embeddings': False},
            **{'use_attention_gate': False, 'use_sandwich_norm': False, 'conv_bias': True},
            rope_parameters={
                'sliding_attention': {'rope_type': 'default', 'rope_theta': 50.0},
                'full_attention': {
                    'rope_type': 'proportional',
                    'rope_theta': 700.0,
                    'partial_rotary_factor': 0.34,
                },
            },
            head_dim=100,
        ),
        'AABAC',
    ),
    'ctrl': ({'model_type': 'ctrl', **BASES['ctrl'], 'n_positions': 32}, ''),
    'ctrl-untied': (
        {
            **{'model_type': 'ctrl', **BASES['ctrl'], 'n_positions': 32},
            'tie_word_embeddings': False,
        },
        '',
    ),
    'xglm': (changed('xglm'), ''),
    'xglm-unscaled': (
        changed('xglm', scale_embedding=False, activation_function='relu', num_layers=1),
        '',
    ),
    'axk1': (changed('axk1'), 'AB'),
    'axk1-legacy': (
        changed('axk1', mlp_layer_types=None, n_group=1, topk_group=1, rope_parameters=YARN),
        'AB',
    ),
    'cohere2_moe': (changed('cohere2_moe'), 'LG'),
    'cohere2_moe-sum': (
        changed(
            'cohere2_moe',
            **{'shared_expert_combination_strategy': 'sum', 'expert_selection_fn': 'sigmoid'},
            **{'rms_norm_eps': 1e-6, 'tie_word_embeddings': False, 'rope_parameters': YARN},
            prefix_dense_sliding_window_pattern=2,
        ),
        'LG',
    ),
    'cohere2_moe-prefix': (
        changed(
            'cohere2_moe',
            **{'first_k_dense_replace': 1, 'layer_types': None, 'mlp_layer_types': None},
            **{'num_hidden_layers': 5, 'num_shared_experts': 0, 'norm_topk_prob': False},
        ),
        'ABBBC',
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_parity(case, tmp_path):
    reference.assert_parity(*CASES[case], tmp_path, new_tokens=20)


REFUSED = {
    'rope_theta=10000.0, which is outside attn_config': {
        **DBRX,
        'attn_config': {'kv_n_heads': 2, 'rope_theta': 5e5},
    },
    'moe_normalize_expert_weights=2.0 is not supported': {
        **DBRX,
        'ffn_config': {'moe_top_k': 2, 'moe_normalize_expert_weights': 2.0},
    },
    'ffn_act_fn=.* is not supported': {
        **DBRX,
        'ffn_config': {'moe_top_k': 2, 'ffn_act_fn': {'name': 'gelu'}},
    },
    'layer_rope_theta=.* has 1 entries for 2 layers': changed(
        'granite_swa', layer_rope_theta=[1.0]
    ),
    'partial_rotary_factor=0.3 must give an even number': changed(
        'lfm3',
        rope_parameters={
            'full_attention': {'rope_type': 'proportional', 'partial_rotary_factor': 0.3}
        },
    ),
    'pad_token_id=3': changed('xglm', pad_token_id=3),
    'attn_config: foo=1': {**DBRX, 'attn_config': {'rope_theta': 10000.0, 'foo': 1}},
}


@pytest.mark.parametrize('message', REFUSED)
def test_refused_fields_are_named(message):
    problems: list[str] = []
    fields = {'vocab_size': 40, **REFUSED[message]}
    interop.TRANSFORMERS[fields['model_type']].read(fields, problems)
    with pytest.raises(AssertionError, match=message):
        assert problems == []


def test_yarn_has_another_name_in_published_files():
    scaling = {key: value for key, value in YARN.items() if key != 'rope_type'}
    named = changed('sarvam_mla', rope_scaling={**scaling, 'type': 'deepseek_yarn'}, head_dim=14)
    usual = changed('sarvam_mla', rope_parameters=YARN)
    first, second = (reference.architecture({'vocab_size': 40, **f}) for f in (named, usual))
    assert first.to_dict() == second.to_dict()


def test_published_files_lack_biases_of_the_router(tmp_path):
    """A.X K1: without them, its experts are chosen by their scores."""
    model = reference.randomized_model(changed('axk1'))
    state = {k: v for k, v in model.state_dict().items() if 'correction_bias' not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    source = interop.open_checkpoint(f'hf:{tmp_path}')
    assert not source.tensors.keys() & {'model.layers.1.mlp.gate.e_score_correction_bias'}
    weights = dict(source.weights(source.config))
    assert weights['blocks.1.ffn.router.selection_bias'].tolist() == [0, 0, 0, 0]
