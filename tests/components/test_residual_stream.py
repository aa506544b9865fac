"""How sublayers join the residual stream; what layers share: x0, values of the first layer."""

import functools

import pytest
import torch
from helpers.architectures import perturbed_model, random_tokens, tiny

from common.architecture_identity import NEUTRAL, hash_of_values
from common.errors import UserError
from components.element_counter import ElementCounter
from components.layer_inputs import run_block, shared_inputs
from model_builder import build_model, check_calls, parameter_groups, recompute
from model_components import Block, Mixer, MultiHeadAttention, SharedInputs
from model_config import (
    ATTENTION_REGISTRY,
    MIXER_REGISTRY,
    NORM_POSITION_REGISTRY,
    RESIDUAL_REGISTRY,
)

pytestmark = pytest.mark.usefixtures('one_thread')

LEARNED = {'layer_scale', 'rezero', 'x0_lambdas'}
SHARED = {'residual': 'x0_lambdas', 'value_residual': 'learned', 'position_encoding': 'rope'}


def with_gradients(run, inputs, parameters):
    """run(inputs), and the gradients of all parameters for a weighted sum of it."""
    outputs = run(inputs)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5))
    return [outputs, *torch.autograd.grad((outputs * weights).sum(), list(parameters))]


# --- Sublayers join the stream --------------------------------------------------------------------


def join(block, residual, x, y, sublayer):
    if residual == 'addition':
        return x + y
    if residual == 'multiplier':
        return x + 0.22 * y
    if residual == 'x0_lambdas':
        return x + y
    if residual == 'deepnorm':
        return 6**0.25 * x + y
    return x + dict(block.residual.named_parameters())[f'scales.{sublayer}'] * y


def run_layout(block, layout, x, attn_inputs, residual):
    """A block, from its mixers, FFN and norms."""
    add = functools.partial(join, block, residual)
    mix, ffn, norm = block.mix, lambda x: block.ffn(x)[0], block.attention_norm
    if layout == 'pre':
        x = add(x, mix(norm(x), attn_inputs), 'mixer')
        return add(x, ffn(block.ffn_norm(x)), 'ffn')
    if layout == 'post':
        x = norm(add(x, mix(x, attn_inputs), 'mixer'))
        return block.ffn_norm(add(x, ffn(x), 'ffn'))
    if layout == 'entrance':
        x = norm(x)
        x = block.ffn_norm(add(x, mix(x, attn_inputs), 'mixer'))
        return add(x, ffn(x), 'ffn')
    if layout == 'sandwich':
        x = add(x, block.attention_output_norm(mix(norm(x), attn_inputs)), 'mixer')
        return add(x, block.ffn_output_norm(ffn(block.ffn_norm(x))), 'ffn')
    if layout == 'ffn_sandwich':
        x = add(x, mix(norm(x), attn_inputs), 'mixer')
        return add(x, block.ffn_output_norm(ffn(block.ffn_norm(x))), 'ffn')
    if layout == 'reordered':
        x = add(x, norm(mix(x, attn_inputs)), 'mixer')
        return add(x, block.ffn_norm(ffn(x)), 'ffn')
    mixed, y = mix(norm(x), attn_inputs), ffn(block.ffn_norm(x))
    return add(add(x, mixed, 'mixer'), y, 'ffn')


def run_model(model, tokens):
    """A model without dropout, from its layouts."""
    config, pos = model.config, torch.arange(tokens.size(1))
    x = x0 = model.position_encoding.embed(model.token_embedding(tokens), pos)
    for block, attn_inputs in zip(model.blocks, model.attention_inputs(pos)):
        if config.residual == 'x0_lambdas':
            x = block.residual.lambdas[0] * x + block.residual.lambdas[1] * x0
        x = run_layout(block, config.norm_position, x, attn_inputs, config.residual)
    return model.output_head(model.final_norm(x))


@pytest.mark.parametrize('layout', list(NORM_POSITION_REGISTRY))
@pytest.mark.parametrize('residual', list(RESIDUAL_REGISTRY))
def test_layouts_join_sublayers_by_the_component(residual, layout):
    """Logits and all gradients; by addition, equal to the bit and in the number of operations."""
    config = tiny(residual=residual, norm_position=layout, n_layer=3)
    exact = residual == 'addition'
    model = perturbed_model(config)
    tokens = random_tokens(config, batch=2)
    runs = model, functools.partial(run_model, model)
    results = [with_gradients(run, tokens, model.parameters()) for run in runs]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **({'rtol': 0, 'atol': 0} if exact else {}))
    counts = []
    for run in runs:
        with ElementCounter() as counter, torch.no_grad():
            run(tokens)
        counts.append(counter.elements)
    assert counts[0] == counts[1] or not exact


@pytest.mark.parametrize('residual', list(RESIDUAL_REGISTRY))
def test_residual_parameters_begin_neutral_and_are_not_decayed(residual):
    config = tiny(residual=residual, n_layer=3)
    model = build_model(config, 'cpu', seed=1)
    learned = {n: p for n, p in model.named_parameters() if '.residual.' in n}
    assert bool(learned) == (residual in LEARNED)
    vectors = next(group for group in parameter_groups(model) if group.name == 'gains and biases')
    assert {id(p) for p in learned.values()} <= {id(p) for p in vectors.parameters}
    if residual == 'x0_lambdas':  # at first, all is as without it
        plain = build_model(tiny(n_layer=3), 'cpu', seed=1)
        tokens = random_tokens(config, batch=1)
        torch.testing.assert_close(model(tokens), plain(tokens), rtol=0, atol=0)
    if residual == 'rezero':
        assert all(parameter.item() == 0 for parameter in learned.values())
    if residual == 'layer_scale':
        assert all((parameter == 0.1).all() for parameter in learned.values())


@pytest.mark.parametrize(('n_layer', 'value'), [(18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6)])
def test_layer_scale_begins_smaller_in_deep_models(n_layer, value):
    assert tiny(residual='layer_scale', n_layer=n_layer).layer_scale_init == value


def test_missing_sublayers_have_no_scales():
    config = tiny(
        residual='layer_scale',
        layer_pattern='AF',
        layer_kinds={'A': {'ffn_type': 'none'}, 'F': {'mixer': 'none'}},
    )
    names = [name for name, _ in build_model(config).named_parameters() if 'scales' in name]
    assert names == ['blocks.0.residual.scales.mixer', 'blocks.1.residual.scales.ffn']


def test_neutral_values_are_not_in_the_identity():
    values = tiny().to_dict()
    new = {'residual', 'value_residual', 'attention_gate'}
    assert all(values[key] == NEUTRAL[key] for key in new)
    old = {key: value for key, value in values.items() if key not in new}
    assert tiny().hash == hash_of_values(old)
    for key, value in {'residual': 'rezero', 'value_residual': 'fixed'}.items():
        assert tiny(**{key: value}).hash != tiny().hash
    assert 'ResMul0.3' in tiny(residual='multiplier', residual_multiplier=0.3).name


# --- Values of the first layer --------------------------------------------------------------------


def plain_attention(attention, x, first):
    """(output, values) of grouped attention with rows (16, 8, 8); values (B, T, 8) to mix in."""
    q, k, own = (x @ attention.qkv.weight.T + attention.qkv.bias).split((16, 8, 8), dim=-1)
    v = own
    if first is not None:
        of_first, of_own = (
            (0.3, 0.7) if attention.value_lambdas is None else attention.value_lambdas
        )
        v = of_first * first + of_own * own
    q, k, v = (part.unflatten(-1, (-1, 4)) for part in (q, k, v))
    k, v = (part.repeat_interleave(2, dim=2) for part in (k, v))
    scores = torch.einsum('bthd,bshd->bhts', q, k) / 2
    hidden = torch.ones(x.size(1), x.size(1)).triu(1).bool()
    y = torch.einsum('bhts,bshd->bthd', scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    return y.flatten(2) @ attention.output.weight.T + attention.output.bias, own


GROUPED = {'use_gqa': True, 'num_kv_heads': 2, 'position_encoding': 'none', 'n_layer': 4}
EXACT = {'normalization': 'none'}  # norms are in fp32


@pytest.mark.parametrize('kind', ['fixed', 'learned'])
@pytest.mark.parametrize('mixing', ['LLLL', 'NLNL', 'FLNL'])  # of values: L; without attention: F
def test_value_residual_equals_formula(kind, mixing):
    """Values and all gradients, in double, with layers that mix no values or have no attention."""
    kinds = {
        'L': {'value_residual': kind, 'value_residual_weight': 0.3},
        'N': {'value_residual': 'none'},
        'F': {'mixer': 'none'},
    }
    used = {letter: kinds[letter] for letter in kinds if letter in mixing}
    config = tiny(**GROUPED, **EXACT, layer_pattern=mixing, layer_kinds=used)
    model = perturbed_model(config).double()

    def run_blocks(x):
        shared = SharedInputs(x0=x)
        for block, attn_inputs in zip(model.blocks, model.attention_inputs(torch.arange(6))):
            x, _, shared = run_block(block, x, attn_inputs, shared)
        return x

    def written_out(x):
        first = None
        for letter, block in zip(mixing, model.blocks):
            if letter != 'F':
                mixed_in = first if letter == 'L' else None
                y, own = plain_attention(block.attention, block.attention_norm(x), mixed_in)
                x, first = x + y, own if first is None else first
            x = x + block.ffn(block.ffn_norm(x))[0]
        return x

    x = torch.randn(2, 6, 16, dtype=torch.double)
    results = [
        with_gradients(run, x, model.blocks.parameters()) for run in (run_blocks, written_out)
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    lambdas = [n for n, _ in model.named_parameters() if 'lambdas' in n]
    number = {'LLLL': 3, 'NLNL': 2, 'FLNL': 1}[mixing]
    assert len(lambdas) == (number if kind == 'learned' else 0)
    assert 'blocks.0.attention.value_lambdas' not in lambdas


def test_value_lambdas_begin_as_given():
    config = tiny(value_residual='learned', value_residual_weight=0.2)
    values = dict(build_model(config, 'cpu').named_parameters())['blocks.1.attention.value_lambdas']
    torch.testing.assert_close(values, torch.tensor([0.2, 0.8]), check_dtype=False)
    assert '-VResL0.2-' in config.name and '-VRes-' in tiny(value_residual='fixed').name


def test_layers_get_what_they_ask_for():
    """And nothing is kept for layers that do not ask."""
    kinds = {'X': {'residual': 'x0_lambdas'}, 'V': {'value_residual': 'fixed'}}
    config = tiny(n_layer=4, layer_pattern='AXVA', layer_kinds=kinds)
    model, given = build_model(config, 'cpu'), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1].shared))
    model(random_tokens(config, batch=1))
    filled = [{k for k, v in shared._asdict().items() if v is not None} for shared in given]
    assert filled == [set(), {'x0'}, {'first_values'}, set()]
    plain = build_model(tiny())
    assert shared_inputs(plain.blocks, tokens=torch.ones(1), x0=torch.ones(1)) == SharedInputs()


@pytest.mark.parametrize('norm', ['none', 'rmsnorm'])
def test_shared_inputs_in_autocast(norm):
    """The stream keeps its dtype, and values that of the matrix products."""
    model = perturbed_model(tiny(**SHARED, qk_norm=norm))
    tokens = random_tokens(model.config, batch=2)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outputs = []
        model.blocks[1].register_forward_hook(lambda *args: outputs.append(args[2][0]))
        half = model(tokens)
    assert outputs[0].dtype == torch.float32
    torch.testing.assert_close(half.float(), model(tokens), rtol=0.1, atol=0.1)


@pytest.mark.parametrize('documents', [False, True])
def test_generation_in_parts_equals_whole(documents):
    """With a cache of keys and mixed values, and in documents kept apart."""
    options = {'document_mask': True, 'end_of_text': 3} if documents else {}
    config = tiny(**{**GROUPED, **SHARED, **options}, sliding_window=4)
    model = perturbed_model(config).eval()
    tokens = random_tokens(config, batch=2)
    tokens[0, 2] = 3
    cache = model.empty_cache(6)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split((2, 1, 3), dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-4)
        if documents:  # what is before the document in the first row changes nothing
            other = tokens.clone()
            other[0, :2] = 7
            torch.testing.assert_close(model(other)[0, 3:], model(tokens)[0, 3:])
    plain = perturbed_model(config.replace(value_residual='none')).eval()
    cache_of_plain = plain.empty_cache(6)
    plain(tokens, cache=cache_of_plain)
    assert cache.nbytes == cache_of_plain.nbytes


@pytest.mark.parametrize('compiled', [False, True])
def test_recomputed_and_compiled_blocks_share_values(compiled):
    """Equal gradients, one graph for each kind of block, and no breaks."""
    config = tiny(**SHARED, n_layer=4)
    plain, other = (perturbed_model(config) for _ in range(2))
    tokens = random_tokens(config, batch=2)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for block in other.blocks:
        recompute(block)
        if compiled:
            block.compile(dynamic=False, backend='aot_eager')
    results = [with_gradients(model, tokens, model.parameters()) for model in (plain, other)]
    for one, its in zip(*results, strict=True):
        torch.testing.assert_close(one, its, rtol=1e-5, atol=1e-5)
    assert not counters['graph_break']
    # The first block, whose input is x0, and the others.
    assert counters['stats']['unique_graphs'] == (2 if compiled else 0)


# --- Refusals -------------------------------------------------------------------------------------


def test_values_of_other_sizes_are_refused():
    with pytest.raises(UserError) as refused:
        tiny(
            value_residual='fixed',
            layer_pattern='AAB',
            n_layer=3,
            layer_kinds={'B': {'n_head': 2}},
        )
    (problem,) = refused.value.problems
    assert '(layers B): their 2 key/value heads of 8 dimensions differ from the 4 of 4' in problem
    assert '--layer_kinds.B.value_residual=none' in problem


def test_value_residual_without_later_layers_is_refused():
    with pytest.raises(UserError, match='has no effect: no layer after the first'):
        tiny(value_residual='fixed', n_layer=1)
    with pytest.raises(UserError, match=r"needs attention_type='standard'"):
        tiny(value_residual='fixed', attention_type='mla', position_encoding='rope')


@pytest.fixture
def own(monkeypatch):
    """Registers a component as 'own' until the test ends."""
    for registry in (NORM_POSITION_REGISTRY, MIXER_REGISTRY, ATTENTION_REGISTRY):
        monkeypatch.setattr(registry, '_components', dict(registry.registered()))

    def register(registry, base, **attributes):
        registry.register('own')(type('Own', (base,), attributes))

    return register


def attention_alone(self, x, attn_inputs):
    x = x + self.dropout(self.attention(self.attention_norm(x), attn_inputs))
    y, aux = self.ffn(self.ffn_norm(x))
    return x + self.dropout(y), aux


def test_layout_without_new_methods_still_works(own):
    """It equals the built-in layout, and publishes values like it."""
    own(NORM_POSITION_REGISTRY, Block, forward=attention_alone)
    for values in ({}, {'value_residual': 'fixed'}):
        config = tiny(norm_position='own', **values)
        check_calls(config)
        ours, theirs = (
            build_model(each, 'cpu', seed=2)
            for each in (config, tiny(norm_position='pre', **values))
        )
        tokens = random_tokens(config, batch=2)
        torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=0, atol=0)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'mixer': 'own'}, "must call self.mix(x, attn_inputs), which runs all of mixer='own'"),
        ({'mixer': 'attention+own'}, "which runs all of mixer='attention+own', in place of"),
        (
            {'mixer': 'none'},
            "does not support mixer='none': leave out the mixers unless",
        ),
        ({'ffn_type': 'none'}, "does not support ffn_type='none': leave out the FFN if self.ffn"),
        ({'residual': 'x0_lambdas'}, "ignores residual='x0_lambdas'. Begin with x = self.enter("),
        ({'residual': 'rezero'}, "replace x + self.dropout(y) by self.add(x, y, 'mixer') and"),
    ],
)
def test_layout_that_leaves_out_components_is_refused(own, options, expected):
    own(NORM_POSITION_REGISTRY, Block, forward=attention_alone)
    own(MIXER_REGISTRY, Mixer, forward=lambda self, x, attn_inputs: x)
    with pytest.raises(UserError) as refused:
        check_calls(tiny(norm_position='own', **options))
    (problem,) = refused.value.problems
    assert problem.startswith("norm_position='own': Own.forward ") and expected in problem


def test_layout_with_mix_and_add_is_accepted(own):
    own(NORM_POSITION_REGISTRY, NORM_POSITION_REGISTRY['pre'])
    own(MIXER_REGISTRY, Mixer, forward=lambda self, x, attn_inputs: x)
    for mixer in ('own', 'attention+own', 'none'):
        check_calls(tiny(norm_position='own', mixer=mixer, residual='layer_scale'))


def test_attention_that_shares_no_values_is_named(own):
    def forward(self, x, attn_inputs):
        q, k, v = self.qkv(x).split(self.rows, dim=-1)
        return self.attend_and_project(*map(self.split_heads, (q, k, v)), attn_inputs)

    own(ATTENTION_REGISTRY, MultiHeadAttention, forward=forward)
    kinds = {'B': {'attention_type': 'own', 'value_residual': 'fixed'}}
    with pytest.raises(UserError, match=r"Own\.forward ignores value_residual='fixed'"):
        check_calls(tiny(layer_pattern='AB', layer_kinds=kinds))
    with pytest.raises(UserError, match=r'Own\.forward does not publish the values'):
        check_calls(tiny(attention_type='own', value_residual='learned'))
