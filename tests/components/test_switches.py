"""Small options of attention, norms, head and embedding, computed again in another way."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import perturbed_model, random_tokens, tiny

from common.architecture_identity import hash_of_values, with_neutral_values
from common.errors import UserError
from components.attention_inputs import AttentionInputs
from components.positions import RotaryPositionEncoding
from model_builder import build_model, count_parameters, parameter_groups
from model_config import ACTIVATION_REGISTRY, NORM_REGISTRY, ROPE_SCALING_REGISTRY

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
    assert 'attention_output_bias' not in with_neutral_values({'mixer': 'mamba2'})


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


# --- Norms without weights, norm of the embeddings ------------------------------------------------


@pytest.mark.parametrize('name', ['layernorm_nogain', 'rmsnorm_nogain'])
def test_norm_without_weights(name):
    norm = NORM_REGISTRY[name](tiny(normalization=name, norm_eps=0.1), 8)
    assert list(norm.parameters()) == []
    x = torch.randn(3, 8)
    centered = x - x.mean(-1, keepdim=True) if name == 'layernorm_nogain' else x
    expected = centered / (centered.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_model_whose_norms_have_no_weights():
    config = tiny(normalization='rmsnorm_nogain', qk_norm='rmsnorm_nogain', bias=False)
    model = build_model(config, 'cpu', 1)
    assert all(parameter.dim() == 2 for parameter in model.parameters())
    assert {group.name for group in parameter_groups(model)} == {'matrices', 'tables'}


@pytest.mark.parametrize('position_encoding', ['rope', 'learned_absolute'])
def test_norm_of_the_embeddings(position_encoding):
    config = tiny(
        embedding_norm='layernorm',
        normalization='rmsnorm',
        position_encoding=position_encoding,
        scale_embeddings=True,
        norm_eps=0.1,
    )
    model = perturbed_model(config)
    tokens = random_tokens(config, batch=2)
    entered = {}
    model.blocks[0].register_forward_pre_hook(lambda _, given: entered.update(x=given[0].detach()))
    model(tokens)
    norm = model.embedding_norm
    embedded = model.token_embedding.weight[tokens] * config.n_embd**0.5
    expected = F.layer_norm(embedded, (config.n_embd,), norm.weight, norm.bias, 0.1)
    if position_encoding == 'learned_absolute':
        expected = expected + model.position_encoding.table.weight[: tokens.size(1)]
    torch.testing.assert_close(entered['x'], expected)
    counts = [
        count_parameters(build_model(config.replace(embedding_norm=name)))['components']
        for name in ('layernorm', 'none')
    ]
    assert counts[0]['normalization'] - counts[1]['normalization'] == 2 * config.n_embd
    assert 'EmbLN' in config.name.split('-')


# --- Queries, keys and values ---------------------------------------------------------------------


def heads_of(config, x, attention):
    """Queries, keys and values (B, heads, T, D) of an attention that attends to nothing."""
    taken = {}

    def attend(q, k, v, *rest):
        taken.update(q=q, k=k, v=v)
        return v.repeat_interleave(q.size(1) // v.size(1), dim=1)

    attention.attend = attend
    positions = torch.arange(x.size(1))
    rotation = RotaryPositionEncoding(config).prepare(positions, positions).rotation
    attention(x, AttentionInputs(rotation=rotation))
    return taken


def rotated(x, theta=10000.0):
    """(B, heads, T, D), each pair (i, i + D/2) turned as a complex number."""
    half = x.size(-1) // 2
    turns = torch.arange(x.size(-2))[:, None] * theta ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(()), turns)
    return torch.cat((turned.real, turned.imag), dim=-1)


HEADS = {'use_gqa': True, 'num_kv_heads': 2, 'head_dim': 6, 'position_encoding': 'rope'}


@pytest.mark.parametrize('position', ['before_rotation', 'after_rotation'])
@pytest.mark.parametrize('scope', ['head', 'each_head', 'projection'])
@pytest.mark.parametrize('norm', ['layernorm', 'rmsnorm'])
def test_scope_and_position_of_qk_norm(scope, position, norm):
    config = tiny(**HEADS, qk_norm=norm, qk_norm_scope=scope, qk_norm_position=position)
    attention = perturbed_model(config).blocks[0].attention
    x = torch.randn(2, 5, config.n_embd)
    taken = heads_of(config, x, attention)
    q, k, _ = attention.qkv(x).split((24, 12, 12), dim=-1)
    for name, projected, own in (('q', q, attention.q_norm), ('k', k, attention.k_norm)):
        heads = projected.unflatten(-1, (-1, 6)).transpose(1, 2)  # (B, H, T, D)
        if position == 'after_rotation':
            heads = rotated(heads)
        wide = heads.transpose(1, 2).flatten(2)
        together = wide if scope == 'projection' else wide.unflatten(-1, (-1, 6))
        if norm == 'layernorm':
            together = together - together.mean(-1, keepdim=True)
        together = together / (together.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        repeats = heads.size(1) if scope == 'head' else 1
        normed = together.reshape(wide.shape) * own.weight.repeat(repeats)
        normed = normed + (own.bias.repeat(repeats) if norm == 'layernorm' else 0)
        expected = normed.unflatten(-1, (-1, 6)).transpose(1, 2)
        if position == 'before_rotation':
            expected = rotated(expected)
        torch.testing.assert_close(taken[name], expected)


@pytest.mark.parametrize(
    ('values', 'tag'),
    [
        ({'qk_norm_scope': 'each_head'}, 'QKRMSeach'),
        ({'qk_norm_position': 'after_rotation'}, 'QKRMSrot'),
        ({'qkv_clip': 8.0}, 'QKRMS-QKVClip8'),
        ({}, 'QKRMS'),
    ],
)
def test_options_of_queries_and_keys_are_in_the_name_and_the_identity(values, tag):
    config = tiny(position_encoding='rope', qk_norm='rmsnorm', **values)
    assert config.name.startswith(f'2L-4H-16D-{tag}-RoPE-')
    old = {
        key: value
        for key, value in config.to_dict().items()
        if key not in ('qkv_clip', 'qk_norm_position', 'embedding_norm', 'head_bias')
    }
    changes_identity = not values.keys() <= {'qk_norm_scope'}  # older values have no other name
    assert (config.hash != hash_of_values(old)) == changes_identity


def test_queries_keys_and_values_are_clipped_before_their_norm():
    config = tiny(**HEADS, qkv_clip=0.5, qk_norm='rmsnorm', attention_gate='head')
    attention = perturbed_model(config).blocks[0].attention
    attention.project_output = lambda y: y
    x = torch.randn(2, 5, config.n_embd)
    taken = heads_of(config, x, attention)
    q, k, v, _ = attention.qkv(x).split((24, 12, 12, 4), dim=-1)
    assert q.abs().max() > 0.5 and v.abs().max() > 0.5
    for name, part in (('q', q), ('k', k), ('v', v)):
        expected = part.clamp(-0.5, 0.5).unflatten(-1, (-1, 6)).transpose(1, 2)
        if name != 'v':
            mean = expected.square().mean(-1, keepdim=True) + config.norm_eps
            gain = getattr(attention, f'{name}_norm').weight
            expected = rotated(expected / mean.sqrt() * gain)
        torch.testing.assert_close(taken[name], expected)


def test_useless_options_of_qk_norm_are_refused():
    with pytest.raises(UserError, match=r'qk_norm=.dyt.*layernorm, layernorm_nobias, rmsnorm, or'):
        tiny(qk_norm='dyt', qk_norm_scope='each_head')
    with pytest.raises(UserError, match=r"qk_norm_position='after_rotation' has no effect"):
        tiny(qk_norm='rmsnorm', qk_norm_position='after_rotation', position_encoding='none')
    with pytest.raises(UserError, match=r'qkv_clip=8.0 .*has no effect'):
        tiny(attention_type='mla', qkv_clip=8.0)


# --- Queries that grow with their position --------------------------------------------------------

GROWTH = {'query_scale_growth': 0.7, 'query_scale_length': 3, 'query_scale_offset': 1}


@pytest.mark.parametrize('document_mask', [False, True])
def test_queries_grow_with_their_position(document_mask):
    documents = {'document_mask': True, 'end_of_text': 3} if document_mask else {}
    config = tiny(**HEADS, **GROWTH, **documents, block_size=9)
    model = perturbed_model(config).eval()
    tokens = torch.tensor([[5, 1, 3, 7, 8, 1, 2, 3, 4]])
    places = [0, 1, 2, 0, 1, 2, 3, 4, 0] if document_mask else list(range(9))
    factors = torch.tensor([1 + 0.7 * math.log(1 + (place + 1) // 3) for place in places])
    taken = []
    attention = model.blocks[0].attention
    attend = attention.attend

    def record(q, *rest):
        taken.append(q)
        return attend(q, *rest)

    attention.attend = record
    model(tokens)
    attention.query_scale = None
    model(tokens)
    torch.testing.assert_close(taken[0], taken[1] * factors[:, None])
    assert factors.unique().numel() > 1


def test_growth_of_queries_continues_from_the_cache():
    config = tiny(**HEADS, **GROWTH, block_size=9)
    model = perturbed_model(config).eval()
    tokens = random_tokens(config, batch=2)
    with torch.no_grad():
        expected, cache = model(tokens), model.empty_cache(9)
        pieces = [model(piece, cache=cache) for piece in tokens.split([4, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected)
    assert 'QGrow0.7' in config.name.split('-')
    plain = tiny(**HEADS, block_size=9)
    old = {k: v for k, v in plain.to_dict().items() if k not in NEWER}
    assert plain.hash == hash_of_values(old) != config.hash


NEWER = ('query_scale_growth', 'qkv_clip', 'embedding_norm', 'head_bias')

# --- Positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize('block_size', [16, 8])
def test_longrope_divides_each_frequency(block_size):
    config = tiny(
        position_encoding='rope',
        head_dim=6,
        block_size=block_size,
        rope_scaling='longrope',
        rope_scaling_factor=4.0,
        rope_original_block_size=8,
        rope_long_factors='2,3,50.5',
        rope_short_factors='1.5',
    )
    scaling = ROPE_SCALING_REGISTRY['longrope']
    factors = torch.tensor([2, 3, 50.5] if block_size == 16 else [1.5] * 3)
    frequencies = torch.tensor([1.0, 0.1, 0.01])
    torch.testing.assert_close(scaling.scaled(frequencies, config), frequencies / factors)
    expected = math.sqrt(1 + math.log(4) / math.log(8))
    assert scaling.attention_factor(config) == pytest.approx(expected)
    assert 'RoPE-LongRoPE' in config.name


def test_longrope_needs_a_factor_for_each_pair():
    values = {'position_encoding': 'rope', 'head_dim': 6, 'rope_scaling': 'longrope'}
    with pytest.raises(UserError, match='rope_long_factors has 2 numbers, but RoPE rotates 3'):
        tiny(**values, rope_long_factors='2,3')
    with pytest.raises(UserError, match=r"rope_short_factors='2,x': .*takes numbers above 0"):
        tiny(**values, rope_short_factors='2,x')


def test_alibi_is_scaled_with_the_scores():
    values = {'position_encoding': 'alibi', 'attention_scale': 0.3}
    models = [build_model(tiny(**values, alibi_scaled=scaled)) for scaled in (True, False)]
    positions = torch.arange(5)
    scaled, plain = (m.position_encoding.prepare(positions, positions).bias for m in models)
    torch.testing.assert_close(scaled, 0.3 * plain)
    assert 'ALiBiscaled' in models[0].config.name and plain.any()


# --- xIELU ----------------------------------------------------------------------------------------


def test_xielu_in_double_precision():
    activation = ACTIVATION_REGISTRY['xielu'](tiny()).double()
    positive, negative = activation.alpha_positive, activation.alpha_negative
    fills = activation.initial_values()
    for name, parameter in activation.named_parameters():
        fills[name](parameter.data, None)
    assert F.softplus(positive).item() == pytest.approx(0.8)
    assert 0.5 + F.softplus(negative).item() == pytest.approx(0.8)
    positive.data.fill_(0.4)
    negative.data.fill_(-0.7)
    above, below = math.log1p(math.exp(0.4)), 0.5 + math.log1p(math.exp(-0.7))
    x = torch.tensor([-800.0, -2.0, -0.1, 0.0, 0.1, 2.0], dtype=torch.float64, requires_grad=True)
    expected = [
        above * v * v + v / 2 if v > 0 else below * (math.expm1(min(v, -1e-6)) - v) + v / 2
        for v in x.tolist()
    ]
    torch.testing.assert_close(activation(x), torch.tensor(expected, dtype=torch.float64))
    activation(x).sum().backward()
    slopes = [2 * above * 0.1 + 0.5, 2 * above * 2 + 0.5]
    torch.testing.assert_close(x.grad[-2:], torch.tensor(slopes, dtype=torch.float64))
    assert x.grad.isfinite().all() and activation(x.bfloat16()).dtype == torch.bfloat16


def test_xielu_in_a_model_has_two_vectors_in_each_layer():
    config = tiny(activation='xielu', ffn_type='standard')
    model = build_model(config, 'cpu', 1)
    own = [name for name, _ in model.named_parameters() if 'activation' in name]
    assert len(own) == 2 * config.n_layer and 'xIELU' in config.name
