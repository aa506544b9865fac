"""model_components.py: every combination of the options, and each component against an oracle."""

import math

import pytest
import torch
from architectures import (
    combinations,
    covering,
    gradients,
    label,
    lively,
    some_tokens,
    tiny,
)
from torch.utils.flop_counter import FlopCounterMode

from errors import UserError
from model_builder import build_model, initial_values, parameter_groups, training_flops
from model_components import (
    AttentionBackend,
    AttentionNeeds,
    PositionEncoding,
    Positions,
    module_flops,
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


@pytest.fixture
def register(monkeypatch):
    """`register(registry, name, component)`, undone after the test."""

    def add(registry, name, component):
        monkeypatch.setattr(registry, '_components', {key: registry[key] for key in registry})
        registry.register(name)(component)

    return add


class LearnedAlibi(PositionEncoding):
    """Scores fall with distance, by a slope of each head (Press et al. 2022), here trained."""

    tag = 'ALiBi'
    has_bias = True

    def __init__(self, config):
        super().__init__(config)
        self.slopes = torch.nn.Parameter(torch.empty(config.n_head))

    def initial_values(self):
        return {'slopes': lambda tensor, generator: tensor.copy_(2.0 ** -torch.arange(len(tensor)))}

    def prepare(self, q_positions, k_positions):
        distance = k_positions - q_positions[:, None]  # (T, T), negative in the past
        return Positions(bias=self.slopes[:, None, None] * distance)


@pytest.fixture
def alibi(register):
    register(POSITION_ENCODING_REGISTRY, 'learned_alibi', LearnedAlibi)
    return 'learned_alibi'


def loss_and_backward(model, tokens):
    loss, count, _ = model(tokens, tokens.roll(-1, dims=1))
    (loss / count).backward()
    return loss / count


# --- Every combination of the nine options --------------------------------------------------------


@pytest.mark.parametrize(
    'chosen', combinations('normalization', 'position_encoding', 'ffn'), ids=label
)
def test_every_combination(chosen):
    """FLOPs equal the counter; loss and gradients are finite and the same whatever the backend;
    every parameter has one beginning and one optimizer group."""
    for rest in combinations('norm_position', 'bias', 'weight_tying', 'dropout', 'heads'):
        values = {**chosen, **rest, 'n_layer': 1}
        written_out = tiny(**values, attention_backend='manual')
        tokens = some_tokens(written_out, batch=1)
        model = lively(written_out)
        with FlopCounterMode(display=False) as counter:
            loss = loss_and_backward(model, tokens)
        names = {name for name, _ in model.named_parameters()}
        assert torch.isfinite(loss), values
        assert all(torch.isfinite(grad).all() for grad in gradients(model).values()), values
        assert set(initial_values(model)) == names, values
        grouped = [id(p) for group in parameter_groups(model) for p in group.parameters]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters()), values

        for backend in ATTENTION_BACKEND_REGISTRY:
            other = lively(tiny(**values, attention_backend=backend))
            flops = module_flops(other, tokens.numel(), False, 'other')
            assert 3 * sum(flops.values()) == counter.get_total_flops(), (values, backend)
            if backend == 'manual':
                continue
            other_loss = loss_and_backward(other, tokens)
            assert torch.isfinite(other_loss), (values, backend)
            if rest['dropout'] == 0:
                torch.testing.assert_close(other_loss, loss)
                torch.testing.assert_close(gradients(other), gradients(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('chosen', covering(), ids=label)
def test_flops_of_a_step_equal_the_counter_on_the_meta_device(chosen):
    config = tiny(**chosen)
    tokens = torch.empty((3, config.block_size), dtype=torch.long, device='meta')
    with FlopCounterMode(display=False) as counter:
        loss, _, _ = build_model(config.replace(attention_backend='manual'))(tokens, tokens)
        loss.backward()
    flops = training_flops(build_model(config))
    assert flops['per_token'] == counter.get_total_flops() / tokens.numel()
    assert flops['per_token'] == sum(flops['breakdown'].values())


@pytest.mark.parametrize('chosen', covering(), ids=label)
def test_a_token_changes_its_own_and_every_later_logit_and_no_earlier_one(chosen):
    config = tiny(**chosen)
    model = lively(config).eval()
    length = config.block_size
    tokens = some_tokens(config, batch=1).expand(length, length)
    changed = tokens.clone()  # row t: token t is another one
    changed.diagonal().add_(1).remainder_(config.vocab_size)
    different = (model(tokens) != model(changed)).any(dim=-1)
    assert torch.equal(different, torch.ones(length, length, dtype=torch.bool).triu())


def test_names_follow_exactly_the_choices_that_have_a_tag_and_hashes_all_of_them():
    silent = ('attention_backend', 'bias', 'weight_tying', 'dropout')
    everything = combinations()
    configs = [tiny(**chosen) for chosen in everything]
    told = {
        (config.name, label({k: v for k, v in chosen.items() if k not in silent}))
        for config, chosen in zip(configs, everything)
    }
    assert len(told) == len({name for name, _ in told}) == len({choice for _, choice in told})
    assert len({config.hash for config in configs}) == len(everything)


@pytest.mark.parametrize(
    ('preset', 'name'),
    [
        ('gpt2', '12L-12H-768D-AbsPos-LN-NB-GELU-PostNorm'),
        ('llama', '12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm'),
        ('hybrid', '12L-12H-768D-RoPE-LN-NB-GELU-PreNorm'),
    ],
)
def test_names_of_presets(preset, name):
    assert ModelArchitectureConfig(arch_preset=preset).name == name


# --- Attention and positions ----------------------------------------------------------------------


def attention_written_as_a_loop(q, k, v, bias):
    """Causal attention of (B, H, T, D) one query at a time, in double precision."""
    out = torch.empty_like(q, dtype=torch.double)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        group = h // (q.size(1) // k.size(1))
        keys, values = k[b, group, : t + 1].double(), v[b, group, : t + 1].double()
        scores = keys @ q[b, h, t].double() / math.sqrt(q.size(-1))
        if bias is not None:
            scores += bias[h % bias.size(0), t, : t + 1].double()
        out[b, h, t] = scores.exp() @ values / scores.exp().sum()
    return out


@pytest.mark.parametrize('bias_heads', [None, 1, 4])
@pytest.mark.parametrize('kv_heads', [4, 2, 1])
@pytest.mark.parametrize('backend', list(ATTENTION_BACKEND_REGISTRY))
def test_a_backend_is_attention_as_written_in_the_paper(backend, kv_heads, bias_heads):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 5, 8, generator=generator) for h in (4, kv_heads, kv_heads))
    bias = torch.randn(bias_heads, 5, 5, generator=generator) if bias_heads else None
    needs, positions = AttentionNeeds(8**-0.5, bias=bias is not None), torch.arange(5)
    backend = ATTENTION_BACKEND_REGISTRY[backend]
    y = backend.attend(q, k, v, backend.mask(needs, bias, positions, positions), needs, 0.0)
    torch.testing.assert_close(y, attention_written_as_a_loop(q, k, v, bias).float())


@pytest.mark.parametrize('kv_heads', [4, 2])
def test_a_position_encoding_that_biases_scores(alibi, kv_heads):
    """It reaches the scores in every backend alike, keeps causality, and its parameters learn."""
    values = {'position_encoding': alibi, 'use_gqa': True, 'num_kv_heads': kv_heads}
    models = {b: lively(tiny(**values, attention_backend=b)) for b in ATTENTION_BACKEND_REGISTRY}
    tokens = some_tokens(models['manual'].config, batch=2)
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
def test_a_backend_that_lacks_what_the_scores_need_is_refused(register, alibi, feature, values):
    class CausalOnly(AttentionBackend):
        supports = frozenset()

    register(ATTENTION_BACKEND_REGISTRY, 'causal_only', CausalOnly)
    assert tiny(attention_backend='causal_only').attention_backend == 'causal_only'
    with pytest.raises(UserError, match=f"'causal_only' does not do {feature}"):
        tiny(attention_backend='causal_only', **values)


def test_rope_scores_depend_on_the_distance_alone():
    encoding = build_model(tiny(position_encoding='rope', rope_theta=50.0)).position_encoding
    q, k = torch.randn(2, 1, 1, 1, 4, generator=torch.Generator().manual_seed(0))

    def score(at_q, at_k):
        rotations = [
            encoding.prepare(torch.tensor([at]), torch.tensor([at])).rotation for at in (at_q, at_k)
        ]
        return (encoding.rotate(q, rotations[0]) * encoding.rotate(k, rotations[1])).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_rope_refuses_an_odd_head():
    with pytest.raises(UserError, match='head of 5'):
        tiny(position_encoding='rope', n_embd=20)


# --- Norms, activations, widths -------------------------------------------------------------------


@pytest.mark.parametrize('eps', [1e-5, 0.5])
@pytest.mark.parametrize('name', ['layernorm', 'layernorm_nobias', 'rmsnorm'])
def test_norms_compute_their_formula_in_single_precision(name, eps):
    norm = NORM_REGISTRY[name](tiny(normalization=name, norm_eps=eps), 16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(generator=generator)
    # An offset that single precision can tell from the spread, and half precision could not.
    x = torch.randn(3, 16, generator=generator).bfloat16() + 8
    exact = x.double()
    if name != 'rmsnorm':
        exact = exact - exact.mean(-1, keepdim=True)
    exact = exact / (exact.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    if name == 'layernorm':
        exact = exact + norm.bias
    assert (norm.bias is not None) == (name == 'layernorm')
    torch.testing.assert_close(norm(x), exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('name', 'formula'),
    [
        ('gelu', lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
        ('silu', lambda x: x / (1 + math.exp(-x))),
        ('relu', lambda x: max(x, 0.0)),
        ('leaky_relu', lambda x: x if x > 0 else 0.01 * x),
    ],
)
def test_activations(name, formula):
    x = torch.linspace(-4, 4, 17)
    exact = torch.tensor([formula(value) for value in x.tolist()])
    torch.testing.assert_close(ACTIVATION_REGISTRY[name](None)(x), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ('values', 'd_ff'),
    [
        ({'ffn_type': 'standard', 'n_embd': 768}, 3072),
        ({'ffn_type': 'swiglu', 'n_embd': 768}, 2048),
        ({'ffn_type': 'swiglu', 'n_embd': 64}, 168),  # 170.67: nearest multiple of 8
        ({'ffn_type': 'swiglu', 'n_embd': 64, 'multiple_of': 64}, 192),
        ({'ffn_type': 'swiglu', 'n_embd': 64, 'd_ff': 7}, 7),
    ],
)
def test_hidden_width_of_the_feed_forward_network(values, d_ff):
    config = tiny(**values)
    assert config.d_ff == d_ff
    assert build_model(config).blocks[0].ffn.down.in_features == d_ff


# --- Dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize('backend', list(ATTENTION_BACKEND_REGISTRY))
@pytest.mark.parametrize('key', ['dropout', 'attention_dropout', 'residual_dropout'])
def test_each_dropout_acts_in_training_only(key, backend):
    rates = {'dropout': 0.0, 'attention_dropout': 0.0, 'residual_dropout': 0.0}
    values = {'attention_backend': backend, 'ffn_type': 'swiglu'}
    plain = lively(tiny(**values, **rates))
    model = lively(tiny(**values, **{**rates, key: 0.5}))
    tokens = some_tokens(model.config, batch=1)
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
def test_residual_dropout_reaches_each_branch(silent, norm_position):
    """With one branch adding nothing, what is dropped is of the other."""
    model = lively(tiny(n_layer=1, norm_position=norm_position, residual_dropout=0.5))
    with torch.no_grad():
        for parameter in model.blocks[0].get_submodule(silent).parameters():
            parameter.zero_()
    tokens = some_tokens(model.config, batch=1)
    assert not torch.equal(model(tokens), model(tokens))
