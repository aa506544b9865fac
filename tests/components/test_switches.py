"""Small options of attention, norms, head and embedding, computed again in another way."""

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import perturbed_model, random_tokens, tiny

from common.architecture_identity import hash_of_values, with_neutral_values
from model_builder import build_model, count_parameters, parameter_groups

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


# --- Bias of the output head ----------------------------------------------------------------------


@pytest.mark.parametrize('values', [{}, {'logit_softcap': 2.0}, {'z_loss': 0.1}])
@pytest.mark.parametrize('weight_tying', [True, False])
def test_head_bias_is_added_to_the_logits(weight_tying, values):
    config = tiny(head_bias=True, weight_tying=weight_tying, **values)
    model = perturbed_model(config)
    tokens = random_tokens(config, batch=2)
    hidden = {}
    model.output_head.register_forward_pre_hook(lambda _, given: hidden.update(x=given[0].detach()))
    loss, _, _ = model(tokens, tokens)
    table, bias = model.output_head.projection.weight, model.output_head.projection.bias
    logits = hidden['x'] @ table.T + bias
    cap = config.logit_softcap
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    torch.testing.assert_close(model(tokens), logits)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction='sum')
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, bias)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, bias)[0])


def test_head_bias_is_counted_with_the_head_and_not_decayed():
    config, without = tiny(head_bias=True), tiny()
    model = build_model(config, 'cpu', 1)
    assert model.output_head.projection.weight is model.token_embedding.weight
    assert count_parameters(model)['components']['output_head'] == config.vocab_size
    (group,) = (g for g in parameter_groups(model) if g.name == 'gains and biases')
    assert any(p is model.output_head.projection.bias for p in group.parameters)
    assert not group.decayed and not model.output_head.projection.bias.any()
    assert config.hash != without.hash and config.name == f'{without.name}-HeadBias'
    old = {key: value for key, value in without.to_dict().items() if key != 'head_bias'}
    assert without.hash == hash_of_values(old)
