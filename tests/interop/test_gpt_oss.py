"""gpt-oss: the same as transformers, and as published."""

import pytest
from helpers import transformers_models as reference
from helpers.foreign_configs import BASES

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
