"""model_components.py: each component against a reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import gradients, perturbed_model, random_tokens, tiny

from common.errors import UserError
from model_builder import build_model
from model_components import (
    AttentionInputs,
    AttentionSpec,
    PositionEncoding,
)
from model_config import (
    ACTIVATION_REGISTRY,
    ATTENTION_BACKEND_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    ModelArchitectureConfig,
)

pytestmark = pytest.mark.usefixtures('one_thread')


class LearnedAlibi(PositionEncoding):
    """Scores decrease with distance by a slope per head (Press et al. 2022), here learned."""

    tag = 'ALiBi'
    has_bias = True

    def __init__(self, config):
        super().__init__(config)
        self.slopes = torch.nn.Parameter(torch.empty(config.n_head))

    def initial_values(self):
        return {'slopes': lambda tensor, generator: tensor.copy_(2.0 ** -torch.arange(len(tensor)))}

    def prepare(self, q_positions, k_positions):
        distance = k_positions - q_positions[:, None]  # (T, T), negative in the past
        return AttentionInputs(bias=self.slopes[:, None, None] * distance)


@pytest.fixture
def alibi(register):
    register(POSITION_ENCODING_REGISTRY, 'learned_alibi', LearnedAlibi)
    return 'learned_alibi'


def loss_and_backward(model, tokens):
    loss, count, _ = model(tokens, tokens.roll(-1, dims=1))
    (loss / count).backward()
    return loss / count


@pytest.mark.parametrize(
    ('preset', 'name'),
    [
        ('gpt2', '12L-12H-768D-AbsPos-LN-NB-GELU-PostNorm'),
        ('llama', '12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm'),
        ('hybrid', '12L-12H-768D-RoPE-LN-NB-GELU-PreNorm'),
    ],
)
def test_name_tags_of_presets(preset, name):
    assert ModelArchitectureConfig(arch_preset=preset).name == name


# --- Attention and positions ----------------------------------------------------------------------


def attention_written_as_a_loop(q, k, v, bias):
    """Reference: causal attention of (B, H, T, D), one query at a time, in double precision."""
    out = torch.empty_like(q, dtype=torch.double)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        group = h // (q.size(1) // k.size(1))
        keys, values = k[b, group, : t + 1].double(), v[b, group, : t + 1].double()
        scores = keys @ q[b, h, t].double() / math.sqrt(q.size(-1))
        if bias is not None:
            scores += bias[h % bias.size(0), t, : t + 1].double()
        out[b, h, t] = scores.exp() @ values / scores.exp().sum()
    return out


@pytest.mark.slow
@pytest.mark.parametrize('bias_heads', [None, 1, 4])
@pytest.mark.parametrize('kv_heads', [4, 2, 1])
@pytest.mark.parametrize('backend', list(ATTENTION_BACKEND_REGISTRY))
def test_backend_matches_paper_formula(backend, kv_heads, bias_heads):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 5, 8, generator=generator) for h in (4, kv_heads, kv_heads))
    bias = torch.randn(bias_heads, 5, 5, generator=generator) if bias_heads else None
    spec, positions = AttentionSpec(8**-0.5, bias=bias is not None), torch.arange(5)
    backend = ATTENTION_BACKEND_REGISTRY[backend]
    y = backend.attend(q, k, v, backend.mask(spec, bias, positions, positions), spec, 0.0)
    torch.testing.assert_close(y, attention_written_as_a_loop(q, k, v, bias).float())


@pytest.mark.parametrize('kv_heads', [4, 2])
def test_position_encoding_with_bias(alibi, kv_heads):
    """It changes the scores equally in every backend, stays causal, and its parameters learn."""
    values = {'position_encoding': alibi, 'use_gqa': True, 'num_kv_heads': kv_heads}
    models = {b: perturbed_model(tiny(**values, attention_backend=b)) for b in ('sdpa', 'manual')}
    tokens = random_tokens(models['manual'].config, batch=2)
    losses = {backend: loss_and_backward(model, tokens) for backend, model in models.items()}
    for backend, model in models.items():
        torch.testing.assert_close(losses[backend], losses['manual'])
        torch.testing.assert_close(
            gradients(model), gradients(models['manual']), rtol=1e-4, atol=1e-5
        )
        assert model.position_encoding.slopes.grad.abs().min() > 0
        cut = model.eval()(tokens[:, :3])
        torch.testing.assert_close(cut, model(tokens)[:, :3], rtol=1e-5, atol=1e-5)
    assert 'ALiBi' in models['manual'].config.name


@pytest.mark.parametrize(
    ('feature', 'values'),
    [('bias', {'position_encoding': 'learned_alibi'}), ('dropout', {'attention_dropout': 0.1})],
)
def test_backend_without_needed_feature_is_rejected(register, alibi, feature, values):
    class CausalOnly(ATTENTION_BACKEND_REGISTRY['manual']):
        supports = frozenset()

    register(ATTENTION_BACKEND_REGISTRY, 'causal_only', CausalOnly)
    assert tiny(attention_backend='causal_only').attention_backend == 'causal_only'
    with pytest.raises(UserError, match=f"'causal_only' does not support {feature}"):
        tiny(attention_backend='causal_only', **values)


def test_rope_scores_depend_on_distance_only():
    encoding = build_model(tiny(position_encoding='rope', rope_theta=50.0)).position_encoding
    q, k = torch.randn(2, 1, 1, 1, 4, generator=torch.Generator().manual_seed(0))

    def score(at_q, at_k):
        rotations = [
            encoding.prepare(torch.tensor([at]), torch.tensor([at])).rotation for at in (at_q, at_k)
        ]
        return (encoding.rotate(q, rotations[0]) * encoding.rotate(k, rotations[1])).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


# --- Norms, activations, widths -------------------------------------------------------------------


@pytest.mark.parametrize('eps', [1e-5, 0.5])
@pytest.mark.parametrize('name', ['layernorm', 'layernorm_nobias', 'rmsnorm'])
def test_norm_formulas_in_fp32(name, eps):
    norm = NORM_REGISTRY[name](tiny(normalization=name, norm_eps=eps), 16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(generator=generator)
    # An offset with a spread that fp32 resolves and half precision does not.
    x = torch.randn(3, 16, generator=generator).bfloat16() + 8
    exact = x.double()
    if name != 'rmsnorm':
        exact = exact - exact.mean(-1, keepdim=True)
    exact = exact / (exact.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    if name == 'layernorm':
        exact = exact + norm.bias
    assert (norm.bias is not None) == (name == 'layernorm')
    torch.testing.assert_close(norm(x), exact.float(), rtol=1e-5, atol=1e-5)


def test_dynamic_tanh_formula_and_initial_slope():
    config = tiny(normalization='dyt', dyt_alpha=0.7)
    norm = build_model(config, device='cpu', seed=1).blocks[0].attention_norm
    x = torch.linspace(-3, 3, 16).bfloat16()[None]
    torch.testing.assert_close(norm(x), torch.tanh(0.7 * x.double()).float())
    norm = perturbed_model(config).blocks[0].attention_norm
    alpha, weight, bias = (p.double() for p in (norm.alpha, norm.weight, norm.bias))
    exact = weight * torch.tanh(alpha * x.double()) + bias  # Zhu et al. 2025, algorithm 1
    torch.testing.assert_close(norm(x), exact.float())
    assert norm(x).dtype == torch.float32 and alpha != 0.7


def test_no_norm_is_identity():
    norm = NORM_REGISTRY['none'](tiny(normalization='none'), 16)
    x = torch.randn(3, 16)
    assert torch.equal(norm(x), x) and not list(norm.parameters())


@pytest.mark.parametrize(
    ('name', 'formula'),
    [
        ('gelu', lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
        (
            'gelu_tanh',
            lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        ),
        ('silu', lambda x: x / (1 + math.exp(-x))),
        ('relu', lambda x: max(x, 0.0)),
        ('relu2', lambda x: max(x, 0.0) ** 2),
        ('leaky_relu', lambda x: x if x > 0 else 0.01 * x),
    ],
)
def test_activations(name, formula):
    x = torch.linspace(-4, 4, 17)
    exact = torch.tensor([formula(value) for value in x.tolist()])
    torch.testing.assert_close(ACTIVATION_REGISTRY[name](None)(x), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ('values', 'gate'),
    [
        ({'ffn_type': 'swiglu'}, lambda x: x * torch.sigmoid(x)),
        ({'ffn_type': 'geglu'}, lambda x: x * torch.special.ndtr(x)),
        ({'ffn_type': 'geglu', 'geglu_tanh': True}, ACTIVATION_REGISTRY['gelu_tanh'](None)),
        ({'ffn_type': 'reglu'}, lambda x: x.clamp(min=0)),
        ({'ffn_type': 'glu'}, torch.sigmoid),
        ({'ffn_type': 'bilinear'}, lambda x: x),
        (
            {'ffn_type': 'clamped_swiglu', 'swiglu_limit': 1e4, 'swiglu_alpha': 1.0},
            lambda x: x * torch.sigmoid(x),
        ),
    ],
    ids=lambda value: '-'.join(map(str, value.values())) if isinstance(value, dict) else '',
)
def test_gated_unit_formulas(values, gate):
    """Shazeer 2020, equations 5 and 6, with V and W stacked in one projection."""
    ffn = perturbed_model(tiny(**values, ffn_bias=True)).blocks[0].ffn
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    w, v = ffn.gate_up.weight.chunk(2)
    b, c = ffn.gate_up.bias.chunk(2)
    up = x @ v.T + c + (values['ffn_type'] == 'clamped_swiglu')
    exact = (gate(x @ w.T + b) * up) @ ffn.down.weight.T + ffn.down.bias
    y, auxiliary = ffn(x)
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)
    assert auxiliary == (0.0, {}, ())


def test_clamped_gated_unit():
    """gpt-oss: the gate from above, the other factor from both sides."""
    ffn = build_model(tiny(ffn_type='clamped_swiglu', swiglu_limit=2.0), 'cpu').blocks[0].ffn
    for gate, up in ((3.0, 1.5), (-9.0, 5.0), (1.0, -7.0), (0.5, 0.25)):
        g, u = min(gate, 2.0), max(-2.0, min(up, 2.0))
        expected = g / (1 + math.exp(-1.702 * g)) * (u + 1)
        assert ffn.nonlinearity(torch.tensor([gate, up])).item() == pytest.approx(expected)
    assert '-SwiGLUc2-' in tiny(ffn_type='clamped_swiglu', swiglu_limit=2.0).name


@pytest.mark.parametrize('ffn_type', ['standard', 'swiglu'])
@pytest.mark.parametrize(('bias', 'ffn_bias'), [(True, False), (False, True), (True, None)])
def test_ffn_bias_is_separate(ffn_type, bias, ffn_bias):
    config = tiny(ffn_type=ffn_type, bias=bias, ffn_bias=ffn_bias)
    assert config.ffn_bias == (bias if ffn_bias is None else ffn_bias)
    block = build_model(config).blocks[0]
    linear = [module for module in block.ffn.modules() if isinstance(module, torch.nn.Linear)]
    assert {layer.bias is not None for layer in linear} == {config.ffn_bias}
    assert (block.attention.output.bias is not None) == bias


@pytest.mark.parametrize(
    ('values', 'd_ff'),
    [
        ({'ffn_type': 'standard', 'n_embd': 768}, 3072),
        ({'ffn_type': 'swiglu', 'n_embd': 768}, 2048),
        ({'ffn_type': 'bilinear', 'n_embd': 768}, 2048),
        ({'ffn_type': 'swiglu', 'n_embd': 64}, 168),  # 170.67: nearest multiple of 8
        ({'ffn_type': 'swiglu', 'n_embd': 64, 'multiple_of': 64}, 192),
        ({'ffn_type': 'swiglu', 'n_embd': 64, 'd_ff': 7}, 7),
    ],
)
def test_default_d_ff(values, d_ff):
    config = tiny(**values)
    assert config.d_ff == d_ff
    assert build_model(config).blocks[0].ffn.down.in_features == d_ff


# --- Both ends ------------------------------------------------------------------------------------


def test_scale_embeddings():
    config = tiny(position_encoding='none')
    tokens = random_tokens(config, batch=2)
    plain, scaled = (
        perturbed_model(config.replace(scale_embeddings=value)).token_embedding(tokens)
        for value in (False, True)
    )
    torch.testing.assert_close(scaled, 4.0 * plain)  # n_embd is 16


def test_multipliers_of_embeddings_and_logits():
    plain = perturbed_model(tiny(scale_embeddings=True, position_encoding='none'))
    tokens = random_tokens(plain.config, batch=2)
    config = plain.config.replace(embedding_multiplier=3.0, logit_multiplier=0.25)
    assert config.name == f'{plain.config.name}-EmbMul3-LogitMul0.25'
    scaled = perturbed_model(config)
    embedded, hidden = plain.token_embedding(tokens), torch.ones(2, 3, 16)
    torch.testing.assert_close(scaled.token_embedding(tokens), 3.0 * embedded)
    logits = 0.25 * plain.output_head(hidden)
    torch.testing.assert_close(scaled.output_head(hidden), logits)
    capped = perturbed_model(config.replace(logit_softcap=2.0)).output_head(hidden)
    torch.testing.assert_close(capped, 2.0 * torch.tanh(logits / 2.0))
    expected = F.cross_entropy(scaled(tokens).flatten(0, 1), tokens.flatten(), reduction='sum')
    torch.testing.assert_close(scaled(tokens, tokens)[0], expected)


@pytest.mark.parametrize('cap', [0.5, 30.0])
def test_logit_softcap_in_loss_and_generation(cap):
    plain, capped = perturbed_model(tiny()), perturbed_model(tiny(logit_softcap=cap))
    tokens = random_tokens(plain.config, batch=2)
    expected = cap * torch.tanh(plain(tokens).double() / cap)
    torch.testing.assert_close(capped(tokens).double(), expected, rtol=1e-5, atol=1e-5)
    loss_sum, _, _ = capped(tokens, tokens)
    exact = F.cross_entropy(expected.flatten(0, 1), tokens.flatten(), reduction='sum')
    torch.testing.assert_close(loss_sum.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('cap', [None, 2.0])
def test_z_loss_formula(cap):
    plain = perturbed_model(tiny(logit_softcap=cap))
    model = perturbed_model(tiny(logit_softcap=cap, z_loss=0.25))
    tokens = random_tokens(plain.config, batch=2)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -100
    loss_sum, count, auxiliary = model(tokens, targets)
    same, same_count, nothing = plain(tokens, targets)
    torch.testing.assert_close(loss_sum, same)
    assert count == same_count and nothing.loss == 0
    log_z = model(tokens).double().exp().sum(-1).log()[targets != -100]
    exact = 0.25 * log_z.square().mean()  # Chowdhery et al. 2022, section 5
    torch.testing.assert_close(auxiliary.loss.double(), exact, rtol=1e-5, atol=1e-6)
    none = torch.full_like(targets, -100)
    assert model(tokens, none) == (0, 0, (0, {'z_loss': torch.zeros(1)}, ()))


# --- Dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize('backend', ['sdpa', 'manual'])
@pytest.mark.parametrize('key', ['dropout', 'attention_dropout', 'residual_dropout'])
def test_dropout_acts_in_training_only(key, backend):
    rates = {'dropout': 0.0, 'attention_dropout': 0.0, 'residual_dropout': 0.0}
    values = {'attention_backend': backend, 'ffn_type': 'swiglu'}
    plain = perturbed_model(tiny(**values, **rates))
    model = perturbed_model(tiny(**values, **{**rates, key: 0.5}))
    tokens = random_tokens(model.config, batch=1)
    torch.testing.assert_close(model.eval()(tokens), plain(tokens), rtol=0, atol=0)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = model(tokens), model(tokens)
        torch.manual_seed(0)
        again = model(tokens)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    torch.testing.assert_close(plain.train()(tokens), plain(tokens), rtol=0, atol=0)


@pytest.mark.parametrize('norm_position', list(NORM_POSITION_REGISTRY))
@pytest.mark.parametrize('silent', ['attention.output', 'ffn.down'])
def test_residual_dropout_reaches_each_sublayer(silent, norm_position):
    """With one sublayer at zero, dropout affects the other."""
    model = perturbed_model(tiny(n_layer=1, norm_position=norm_position, residual_dropout=0.5))
    with torch.no_grad():
        for parameter in model.blocks[0].get_submodule(silent).parameters():
            parameter.zero_()
    tokens = random_tokens(model.config, batch=1)
    assert not torch.equal(model(tokens), model(tokens))
