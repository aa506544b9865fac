"""gpt-oss: the same as transformers, and as published."""

import pytest
from helpers import transformers_models as reference
from helpers.foreign_configs import BASES

from model_builder import build_model, count_parameters

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]

TINY = {'model_type': 'gpt_oss', **BASES['gpt_oss']}
YARN = {
    'rope_type': 'yarn',
    'rope_theta': 50.0,
    'factor': 4.0,
    'original_max_position_embeddings': 8,
    'truncate': False,
}
CASES = {
    'windows': (TINY, 'LG'),
    'clamped': (
        {**TINY, 'swiglu_limit': 0.4, 'swiglu_alpha': 1.1, 'rope_parameters': YARN},
        'LG',
    ),
    'without biases': (
        {**TINY, 'attention_bias': False, 'layer_types': ['full_attention'] * 2},
        '',
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path)


# config.json of both published models; the rest are the defaults of transformers.
PUBLISHED = {
    'gpt-oss-20b': ({'num_hidden_layers': 24, 'num_local_experts': 32}, 20_914_757_184),
    'gpt-oss-120b': ({'num_hidden_layers': 36, 'num_local_experts': 128}, 116_829_156_672),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_models_have_their_sizes(name):
    """The numbers of parameters in the model card (OpenAI 2025, table 1), in billions 20.91 and
    116.83, of which 3.61 and 5.13 are active, without the embedding."""
    fields, total = PUBLISHED[name]
    config = reference.architecture(
        {
            'model_type': 'gpt_oss',
            **{'vocab_size': 201088, 'hidden_size': 2880, 'num_attention_heads': 64},
            **fields,
        }
    )
    counted = count_parameters(build_model(config))
    assert counted['total_params'] == total
    active = counted['active_params'] - 201088 * 2880
    assert round(active / 1e9, 2) == (3.61 if total < 1e11 else 5.13)
