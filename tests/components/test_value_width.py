"""value_head_dim: values narrower or wider than keys, against plain PyTorch."""

import pytest
import torch
from helpers.architectures import perturbed_model, random_tokens, tiny

from components.checks import flops_disagreements
from inference.generate import generate
from model_builder import build_model, count_parameters

pytestmark = pytest.mark.usefixtures('one_thread')
HEADS = {'use_gqa': True, 'num_kv_heads': 2, 'head_dim': 6, 'position_encoding': 'none'}
CASES = {
    'narrower': {},
    'wider': {'value_head_dim': 10},
    'biases': {'attention_bias': True},
    'gates of dimensions': {'attention_gate': 'elementwise'},
    'gates of heads': {'attention_gate': 'head'},
}


def plain(attention, config, x):
    """The output of the attention for x (B, T, C), head by head."""
    width, value_width = config.head_dim, config.value_head_dim
    sizes = [4 * width, 2 * width, 2 * value_width]
    gates = {'elementwise': 4 * value_width, 'head': 4}.get(config.attention_gate)
    y = torch.nn.functional.linear(x, attention.qkv.weight, attention.qkv.bias)
    q, k, v, *gate = y.split([*sizes, gates] if gates else sizes, dim=-1)
    hidden = torch.ones(x.size(1), x.size(1)).triu(1).bool()
    heads = []
    for head in range(4):
        query = q[..., head * width :][..., :width]
        key = k[..., head // 2 * width :][..., :width]
        value = v[..., head // 2 * value_width :][..., :value_width]
        scores = (query @ key.mT / width**0.5).masked_fill(hidden, -torch.inf)
        heads.append(scores.softmax(-1) @ value)
        if gates:
            each = gates // 4
            heads[-1] = heads[-1] * gate[0][..., head * each :][..., :each].sigmoid()
    return attention.output(torch.cat(heads, dim=-1))


@pytest.mark.parametrize('backend', ['sdpa', 'manual'])
@pytest.mark.parametrize('case', CASES)
def test_attention_equals_plain_pytorch(case, backend):
    config = tiny(**{**HEADS, 'value_head_dim': 5, **CASES[case]}, attention_backend=backend)
    model = perturbed_model(config)
    attention = model.blocks[0].attention
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = attention(x, model.attention_inputs(torch.arange(6))[0])
    expected = plain(attention, config, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    inputs = (x, *attention.parameters())
    ours = torch.autograd.grad((y * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures('flex_of_few_queries')
def test_flex_equals_manual():
    torch._dynamo.reset()
    config = tiny(**HEADS, value_head_dim=5, attention_sinks=True)
    tokens = random_tokens(config, batch=2)
    logits = [
        perturbed_model(config.replace(attention_backend=backend))(tokens)
        for backend in ('flex', 'manual')
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('values', [{}, {'value_residual': 'learned'}, {'canon': 'B'}])
def test_generation_with_a_cache(values):
    """The cache has keys of 6 and values of 5 dimensions for each key head."""
    config = tiny(**HEADS, value_head_dim=5, **values)
    model = perturbed_model(config).eval()
    prompt = random_tokens(config, batch=2)[:, :2]
    texts = [
        torch.stack(list(generate(model, prompt, 4, choose=lambda x: x.argmax(-1), cache=cache)))
        for cache in (True, False)
    ]
    assert torch.equal(*texts)
    cache = model.empty_cache(6)
    model(prompt, cache=cache)
    sizes = [each.nbytes for states in cache.layers for each in [states['attention']]]
    assert sizes == [2 * 6 * 2 * (6 + 5) * 4] * 2


def test_flops_and_parameters():
    config = tiny(**HEADS, value_head_dim=5, attention_backend='manual')
    model = build_model(config)
    assert flops_disagreements(model) == []
    projections = 16 * (4 * 6 + 2 * 6 + 2 * 5) + 4 * 5 * 16  # q, k, v and the output
    biases = 4 * 6 + 2 * 6 + 2 * 5 + 16
    assert count_parameters(model)['components']['attention'] == 2 * (projections + biases)


def test_name_and_identity():
    config = tiny(**HEADS, value_head_dim=5)
    assert '-HD6-VD5-GQA2-' in config.name
    same = tiny(**HEADS, value_head_dim=6)
    assert same.hash == tiny(**HEADS).hash != config.hash and 'VD' not in same.name
    assert same.value_head_dim == tiny(**HEADS).value_head_dim == 6
    assert tiny(**HEADS).replace(head_dim=8).value_head_dim == 8
