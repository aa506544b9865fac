"""Attention sinks: against a loop, in every backend that supports them, with a cache."""

import pytest
import torch
from helpers.architectures import perturbed_model, random_tokens, tiny

from common.errors import UserError
from components.attention_backends import AttentionSpec, FlexAttention, ManualAttention
from inference.generate import generate
from model_builder import build_model

SINKS = {'attention_sinks': True, 'attention_backend': 'manual'}


def heads(queries: int, keys: int, seed: int = 0):
    """q of 4 heads, k and v of 2, and a sink for each head."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16), (4,)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def by_loop(q, k, v, sinks, spec, queries, keys):
    """The outputs, one query at a time, in double precision."""
    rows = []
    for batch in range(len(q)):
        for head in range(q.size(1)):
            for query in range(queries):
                at = keys - queries + query
                first = 0 if spec.window is None else max(0, at - spec.window + 1)
                visible = slice(first, at + 1)
                scores = (
                    spec.scale
                    * k[batch, head // 2, visible].double()
                    @ q[batch, head, query].double()
                )
                if spec.softcap:
                    scores = spec.softcap * (scores / spec.softcap).tanh()
                weights = scores.exp() / (scores.exp().sum() + sinks[head].double().exp())
                rows.append(weights @ v[batch, head // 2, visible].double())
    return torch.stack(rows).view(*q.shape)


CASES = {
    'all': (AttentionSpec(0.5, sinks=True), 7, 7),
    'window and cap': (AttentionSpec(0.5, sinks=True, window=3, softcap=1.5), 7, 7),
    'a chunk': (AttentionSpec(0.5, sinks=True), 3, 9),
    'a token': (AttentionSpec(0.5, sinks=True), 1, 9),
}


@pytest.mark.parametrize('name', CASES)
def test_manual_sinks_equal_loop(name):
    spec, queries, keys = CASES[name]
    q, k, v, sinks = heads(queries, keys)
    pos = torch.arange(keys)
    mask = ManualAttention.mask(spec, None, pos[keys - queries :], pos)
    y = ManualAttention.attend(q, k, v, mask, spec, 0.0, sinks)
    expected = by_loop(q, k, v, sinks, spec, queries, keys)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    inputs = (q, k, v, sinks)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((y * weights).sum(), inputs)
    loops = torch.autograd.grad((expected * weights).sum(), inputs)
    for mine, theirs in zip(ours, loops):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('window', [None, 40])
@torch.no_grad()
def test_flex_sinks_equal_manual(window):
    spec = AttentionSpec(0.25, sinks=True, window=window)
    q, k, v, sinks = (tensor.detach() for tensor in heads(150, 150))
    pos = torch.arange(150)
    outputs = [
        backend.attend(q, k, v, backend.mask(spec, None, pos, pos), spec, 0.0, sinks)
        for backend in (ManualAttention, FlexAttention)
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    without = FlexAttention.attend(q, k, v, FlexAttention.mask(spec, None, pos, pos), spec, 0.0)
    assert (without - outputs[1]).abs().max() > 0.1


@pytest.mark.parametrize('attention', ['standard', 'mla'])
def test_generation_with_sinks_and_a_cache(attention):
    values = {'attention_type': attention, 'position_encoding': 'rope', **SINKS}
    config = tiny(**values, qk_rope_head_dim=4) if attention == 'mla' else tiny(**values)
    model = perturbed_model(config).eval()
    assert model.blocks[0].attention.sinks.abs().min() > 0
    prompt = random_tokens(config, batch=2)[:, :2]
    texts = [
        torch.stack(list(generate(model, prompt, 4, choose=lambda x: x.argmax(-1), cache=cache)))
        for cache in (True, False)
    ]
    assert torch.equal(*texts)


def test_sinks_begin_at_zero_and_have_gradients():
    config = tiny(**SINKS)
    model = build_model(config, 'cpu', seed=1)
    sinks = [block.attention.sinks for block in model.blocks]
    assert all(s.shape == (4,) and not s.any() for s in sinks)
    tokens = random_tokens(config, batch=2)
    model(tokens, tokens)[0].backward()
    assert all(s.grad.abs().min() > 0 for s in sinks)


def test_backends_without_sinks_are_refused():
    with pytest.raises(UserError, match="attention_backend='sdpa' does not support sinks"):
        tiny(attention_sinks=True, attention_backend='sdpa')
    config = tiny(attention_sinks=True)
    assert config.for_device('cpu', compiles=True).attention_backend == 'manual'
    wide = tiny(attention_sinks=True, n_embd=64)  # flex needs heads of 16
    assert wide.for_device('cuda', compiles=True).attention_backend == 'flex'
    plain = tiny()
    assert config.hash != plain.hash and '-Sinks-' in config.name
    assert tiny(attention_sinks=False).hash == plain.hash
