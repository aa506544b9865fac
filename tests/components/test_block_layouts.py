"""components/blocks.py: the layouts against transformers' layers, with our sublayers."""

import pytest
import torch
import torch.nn as nn
from helpers.architectures import gradients, perturbed_model, random_tokens, tiny

from model_builder import build_model
from model_config import NORM_POSITION_REGISTRY

pytestmark = pytest.mark.usefixtures('one_thread')

SIZES = {'hidden_size': 16, 'intermediate_size': 40, 'num_attention_heads': 4}


class Attention(nn.Module):
    """Our attention with the interface of transformers'."""

    def __init__(self, block, attn_inputs):
        super().__init__()
        self.ours, self.attn_inputs = block.attention, attn_inputs

    def forward(self, hidden_states, **_):
        return self.ours(hidden_states, self.attn_inputs), None


class FeedForward(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.ours = block.ffn

    def forward(self, x):
        return self.ours(x)[0]


def gemma2():
    from transformers.models.gemma2 import modeling_gemma2 as gemma2

    layer = gemma2.Gemma2DecoderLayer(gemma2.Gemma2Config(**SIZES, head_dim=4), 0)
    norms = {
        'attention_norm': layer.input_layernorm,
        'attention_output_norm': layer.post_attention_layernorm,
        'ffn_norm': layer.pre_feedforward_layernorm,
        'ffn_output_norm': layer.post_feedforward_layernorm,
    }
    return layer, 'self_attn', norms, 1.0  # its weights are offsets from one


def olmo2():
    from transformers.models.olmo2 import modeling_olmo2 as olmo2

    layer = olmo2.Olmo2DecoderLayer(olmo2.Olmo2Config(**SIZES), 0)
    norms = {
        'attention_norm': layer.post_attention_layernorm,
        'ffn_norm': layer.post_feedforward_layernorm,
    }
    return layer, 'self_attn', norms, 0.0


def gpt_neox():
    from transformers.models.gpt_neox import modeling_gpt_neox as neox

    config = neox.GPTNeoXConfig(**SIZES, use_parallel_residual=True, hidden_dropout=0.0)
    layer = neox.GPTNeoXLayer(config, 0)
    norms = {
        'attention_norm': layer.input_layernorm,
        'ffn_norm': layer.post_attention_layernorm,
    }
    return layer, 'attention', norms, 0.0


@pytest.mark.parametrize(
    ('norm_position', 'make', 'normalization'),
    [
        ('sandwich', gemma2, 'rmsnorm'),
        ('reordered', olmo2, 'rmsnorm'),
        ('parallel', gpt_neox, 'layernorm'),
    ],
)
def test_block_layout_matches_transformers(norm_position, make, normalization):
    """Compare output and gradients of every parameter, with the same sublayers in both."""
    theirs, attention, norms, offset = make()
    config = tiny(
        norm_position=norm_position, normalization=normalization, position_encoding='rope'
    )
    model = perturbed_model(config)
    block = model.blocks[0]
    positions = torch.arange(config.block_size)
    attn_inputs = model.position_encoding.prepare(positions, positions)
    setattr(theirs, attention, Attention(block, attn_inputs))
    theirs.mlp = FeedForward(block)
    assert set(norms) == set(block.norms(config))
    with torch.no_grad():
        for name, norm in norms.items():
            ours = getattr(block, name)
            norm.weight.copy_(ours.weight - offset)
            for key in ('eps', 'variance_epsilon'):
                if hasattr(norm, key):
                    setattr(norm, key, ours.eps)
            if normalization == 'layernorm':
                norm.bias.copy_(ours.bias)
    x = torch.randn(2, config.block_size, 16, generator=torch.Generator().manual_seed(1))

    y, _ = block(x, attn_inputs)
    y.square().sum().backward()
    mine = {name: grad.clone() for name, grad in gradients(block).items()}
    block.zero_grad()
    out = theirs(x, position_embeddings=None, attention_mask=None)
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()

    torch.testing.assert_close(y, out, rtol=1e-5, atol=1e-5)
    for name, norm in norms.items():
        expected = {f'{name}.{kind}': p.grad for kind, p in norm.named_parameters()}
        for full_name, grad in expected.items():
            torch.testing.assert_close(mine[full_name], grad, rtol=1e-4, atol=1e-4)
    for branch in ('attention.', 'ffn.'):
        for full_name, grad in gradients(block).items():
            if full_name.startswith(branch):
                torch.testing.assert_close(mine[full_name], grad, rtol=1e-4, atol=1e-4)


def test_parallel_block_with_shared_norm():
    """GPT-J: x + attention(norm(x)) + FFN(norm(x)); two norms with equal weights are the same."""
    two = perturbed_model(tiny(norm_position='parallel', n_layer=1))
    one = perturbed_model(tiny(norm_position='parallel', parallel_shared_norm=True, n_layer=1))
    with torch.no_grad():
        for ours, theirs in ((one, two),):
            weights = {k: v for k, v in theirs.state_dict().items() if '.ffn_norm.' not in k}
            ours.load_state_dict(weights)
        two.blocks[0].ffn_norm.load_state_dict(two.blocks[0].attention_norm.state_dict())
    tokens = random_tokens(one.config, batch=2)
    torch.testing.assert_close(one(tokens), two(tokens))
    assert 'Parallel1Norm' in one.config.name and one.config.name != two.config.name


@pytest.mark.parametrize('norm_position', list(NORM_POSITION_REGISTRY))
def test_final_norm_where_residual_stream_is_not_normalized(norm_position):
    model = build_model(tiny(norm_position=norm_position, normalization='rmsnorm'))
    final = [name for name, _ in model.named_parameters() if name.startswith('final_norm')]
    assert final == ([] if norm_position == 'post' else ['final_norm.weight'])
