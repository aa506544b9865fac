"""Small options of attention, norms, head and embedding, computed again in another way."""

import pytest
from helpers.architectures import tiny

from common.architecture_identity import hash_of_values, with_neutral_values
from model_builder import build_model

# --- Bias of the attention's output projection ----------------------------------------------------


@pytest.mark.parametrize('attention_type', ['standard', 'mla'])
@pytest.mark.parametrize(('inner', 'output'), [(True, False), (False, True)])
def test_output_bias_apart_from_the_others(attention_type, inner, output):
    config = tiny(attention_type=attention_type, attention_bias=inner, attention_output_bias=output)
    names = {name for name, _ in build_model(config).named_parameters()}
    attention = {name for name in names if '.attention.' in name and name.endswith('.bias')}
    expected = {'standard': ['qkv.bias'], 'mla': ['kv_down.bias']}[attention_type] * inner
    expected += ['output.bias'] * output
    assert attention - {n for n in attention if 'norm' in n} == {
        f'blocks.{layer}.attention.{name}' for layer in (0, 1) for name in expected
    }
    assert ('QKVBias' if inner else 'OBias') in config.name


@pytest.mark.parametrize('bias', [True, False])
def test_output_bias_follows_the_others_and_is_then_not_in_the_identity(bias):
    config = tiny(attention_bias=bias)
    assert config.attention_output_bias == bias
    assert config.origins['attention_output_bias'] == 'derived: attention_bias'
    old = {k: v for k, v in config.to_dict().items() if k != 'attention_output_bias'}
    assert (
        config.hash == hash_of_values(old) == hash_of_values({**old, 'attention_output_bias': None})
    )
    assert config.hash == tiny(attention_bias=bias, attention_output_bias=bias).hash
    assert config.hash != tiny(attention_bias=bias, attention_output_bias=not bias).hash
    assert with_neutral_values(old)['attention_output_bias'] == bias
