"""components/canon.py: Canon layers against a plain block, with documents, in pieces, refused."""

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import perturbed_model, random_tokens, tiny

from common.errors import UserError
from model_components import NORM_POSITION_REGISTRY, Block
from model_config import ModelArchitectureConfig

pytestmark = pytest.mark.usefixtures('one_thread')

LAYOUTS = [name for name, layout in NORM_POSITION_REGISTRY.registered()]
FFNS = ['standard', 'swiglu']


def canon_model(**values):
    config = tiny(**{'canon': 'ABCD', 'block_size': 12, 'n_layer': 1, **values})
    return perturbed_model(config, factor=3.0).eval()


def plain_canon(module, x: torch.Tensor) -> torch.Tensor:
    """x (T, channels) + the convolution, one token after the other."""
    weight = module.convolution.weight
    width = weight.size(1)
    rows = []
    for t in range(len(x)):
        row = x[t]
        for lag in range(min(width, t + 1)):
            row = row + weight[:, width - 1 - lag] * x[t - lag]
        rows.append(row)
    return torch.stack(rows)


def plain_block(block, x: torch.Tensor, heads: int) -> torch.Tensor:
    """A pre-norm block of LayerNorm, attention and FFN for one document (T, C)."""
    h = F.layer_norm(x, x.shape[-1:], block.attention_norm.weight, block.attention_norm.bias, 1e-5)
    h = plain_canon(block.canon_a, h)
    qkv = plain_canon(block.attention.canon, block.attention.qkv(h))
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in qkv.chunk(3, dim=-1))
    scores = q @ k.mT / q.size(-1) ** 0.5
    hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    y = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v
    x = x + block.attention.output(y.transpose(0, 1).flatten(1))
    h = F.layer_norm(x, x.shape[-1:], block.ffn_norm.weight, block.ffn_norm.bias, 1e-5)
    h = plain_canon(block.canon_c, h)
    if hasattr(block.ffn, 'up'):
        return x + block.ffn.down(F.gelu(plain_canon(block.ffn.canon, block.ffn.up(h))))
    gate, up = plain_canon(block.ffn.canon, block.ffn.gate_up(h)).chunk(2, dim=-1)
    return x + block.ffn.down(F.silu(gate) * up)


@pytest.mark.parametrize('ffn', FFNS)
def test_equals_a_plain_block(ffn):
    """Values and gradients, with two documents; their end is token 3."""
    document = {'document_mask': True, 'end_of_text': 3, 'position_encoding': 'none'}
    model = canon_model(ffn_type=ffn, **document)
    tokens = torch.tensor([[1, 2, 0, 4, 3, 5, 6, 7, 8, 9]])
    logits = model(tokens)
    rows = [
        plain_block(model.blocks[0], model.token_embedding(part), heads=4)
        for part in (tokens[0, :5], tokens[0, 5:])
    ]
    expected = model.output_head(model.final_norm(torch.cat(rows)))
    assert torch.allclose(logits[0], expected, rtol=1e-4, atol=1e-4)
    parameters = list(model.parameters())
    for actual, correct in zip(
        torch.autograd.grad(logits.logsumexp(-1).sum(), parameters),
        torch.autograd.grad(expected.logsumexp(-1).sum(), parameters),
    ):
        assert torch.allclose(actual, correct, rtol=1e-3, atol=1e-3 * correct.abs().max())


@pytest.mark.parametrize('layout', LAYOUTS)
def test_pieces_equal_the_whole_in_each_layout(layout):
    model = canon_model(norm_position=layout, document_mask=True, end_of_text=3, n_layer=2)
    tokens = random_tokens(model.config, batch=3)
    with torch.no_grad():
        whole, cache = model(tokens), model.empty_cache(12)
        pieces = [model(part, cache=cache) for part in tokens.split((1, 1, 5, 2, 3), dim=1)]
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-5 * whole.abs().max())
    assert model.uncacheable == []
    states = cache.layers[0]['canon'].tensors
    n_embd, hidden = model.config.n_embd, model.config.d_ff
    widths = {'A': n_embd, 'B': 3 * n_embd, 'C': n_embd, 'D': hidden}
    assert {name: tensor.size(2) for name, tensor in states.items()} == widths


@pytest.mark.parametrize('gate', ['head', 'elementwise'])
def test_gate_of_attention_passes_no_canon_layer(gate):
    """Queries, keys and values do."""
    model = canon_model(canon='B', attention_gate=gate)
    attention = model.blocks[0].attention
    assert attention.canon.convolution.weight.size(0) == 3 * model.config.n_embd
    x = torch.randn(1, 5, model.config.n_embd, generator=torch.Generator().manual_seed(0))
    inputs = model.attention_inputs(torch.arange(5))[0]
    with torch.no_grad():
        qkv, gates = attention.qkv(x).split((3 * model.config.n_embd, attention.rows[3]), dim=-1)
        q, k, v = plain_canon(attention.canon, qkv[0]).chunk(3, dim=-1)
        q, k, v = (attention.split_heads(part[None]) for part in (q, k, v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        factor = gates.sigmoid().unflatten(-1, (4, -1)).transpose(1, 2)
        expected = attention.output((heads * factor).transpose(1, 2).flatten(2))
        assert torch.allclose(attention(x, inputs), expected, atol=1e-5)


@pytest.mark.parametrize('letters', ['A', 'B', 'C', 'D', 'AC'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_each_letter_has_its_own_layers_and_all_learn(layout, letters):
    values = {'norm_position': layout, 'ffn_type': 'swiglu', 'canon': letters}
    model = canon_model(canon_width=2, **values)
    model(random_tokens(model.config, batch=2)).logsumexp(-1).sum().backward()
    canon = {n: p for n, p in model.named_parameters() if 'convolution' in n}
    paths = {'A': 'canon_a', 'B': 'attention.canon', 'C': 'canon_c', 'D': 'ffn.canon'}
    assert set(canon) == {f'blocks.0.{paths[each]}.convolution.weight' for each in letters}
    assert all(parameter.grad.abs().max() > 0 for parameter in canon.values())
    assert model.config.name.endswith(f'-Canon{letters}2')


def test_compiles_without_breaks():
    torch._dynamo.reset()
    model = canon_model(ffn_type='swiglu')
    tokens = random_tokens(model.config, batch=2)
    expected = model(tokens)
    for block in model.blocks:
        block.compile(fullgraph=True, backend='aot_eager')
    assert torch.allclose(model(tokens), expected, atol=1e-5)


def test_hybrid_without_attention_in_some_layers():
    """A layer without mixers keeps documents apart too, and letters may differ by layer."""
    model = canon_model(
        n_layer=2,
        layer_pattern='NU',
        layer_kinds={'N': {'mixer': 'none', 'canon': 'CD'}},
        document_mask=True,
        end_of_text=3,
        position_encoding='none',
    )
    tokens = torch.tensor([[1, 2, 3, 5, 6]])
    changed = torch.tensor([[4, 7, 3, 5, 6]])
    with torch.no_grad():
        assert torch.equal(model(tokens)[:, 3:], model(changed)[:, 3:])


# --- Options --------------------------------------------------------------------------------------


class OwnLayout(Block):
    """A layout that calls its FFN itself, without Canon layers before it."""

    def forward(self, x, attn_inputs):
        x = x + self.mix(self.attention_norm(x), attn_inputs)
        y, aux = self.ffn(self.ffn_norm(x))
        return x + y, aux


@pytest.mark.parametrize(
    'values, place, hint',
    [
        ({'canon': 'BC', 'attention_type': 'mla'}, "attention_type='mla'", '--canon=C'),
        ({'canon': 'ABC', 'mixer': 'none'}, "mixer='none'", '--canon=C'),
        ({'canon': 'ACD', 'ffn_type': 'none'}, "ffn_type='none'", '--canon=A'),
        ({'canon': 'D', 'ffn_type': 'moe', 'experts_per_token': 2}, "ffn_type='moe'", '=None'),
        ({'canon': 'BC', 'norm_position': 'own'}, "norm_position='own'", '--canon=B'),
    ],
)
def test_letter_without_a_place_is_refused(values, place, hint, monkeypatch):
    own = {**NORM_POSITION_REGISTRY._components, 'own': OwnLayout}
    monkeypatch.setattr(NORM_POSITION_REGISTRY, '_components', own)
    with pytest.raises(UserError) as error:
        tiny(**values)
    assert place in str(error.value) and hint in str(error.value)


@pytest.mark.parametrize('letters', ['', 'CA', 'AA', 'E', 'a'])
def test_other_letters_are_refused(letters):
    with pytest.raises(UserError, match='ABCD'):
        tiny(canon=letters)


def test_no_canon_layers_is_the_same_architecture_as_before():
    with_option, without = tiny(canon=None), tiny().to_dict()
    assert without.pop('canon') is None
    assert ModelArchitectureConfig.from_dict(without).hash == with_option.hash
    assert tiny(canon='A').hash != with_option.hash
