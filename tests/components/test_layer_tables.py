"""Models whose layers differ: properties of random layer tables."""

import json
import os

import pytest
import torch
import torch.nn as nn
from helpers.architectures import (
    gradients,
    layer_tables,
    perturbed_model,
    random_tokens,
    tiny,
)
from helpers.bit_equality import bit_differences
from hypothesis import HealthCheck, given, settings
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.utils.flop_counter import FlopCounterMode

from common.architecture_options import layer_options, shared_options
from common.errors import UserError
from components.base import saved_tensors
from components.weight_initialization import initial_values
from model_builder import (
    build_model,
    count_parameters,
    flops_by_part,
    parameter_groups,
    recompute,
)
from model_components import (
    AttentionInputs,
    AuxOutput,
    Block,
    PositionEncoding,
    locate_documents,
)
from model_config import (
    NORM_POSITION_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    PRESETS,
    ModelArchitectureConfig,
    architecture_options,
)
from parallel import strategies
from training.record_header import layer_choices

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

# The same tables in every run; LAYER_TABLES=500 tries more of them.
at_random = settings(
    max_examples=int(os.environ.get('LAYER_TABLES', '5')),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
UNCHANGED = {'init_std': 0.02, 'logit_softcap': None}  # larger weights, or a cap, hide differences
# By layers, of a pass.
NOTHING_SHARED = {'residual': 'addition', 'value_residual': 'none', 'query_scale_growth': None}
WITHOUT_DROPOUT = {'dropout': 0.0, 'attention_dropout': None, 'residual_dropout': None}


def idle_parameters(model) -> int:
    info = count_parameters(model)
    return info['total_params'] - info['active_params']


@at_random
@given(layer_tables())
def test_table_round_trip(config):
    again = ModelArchitectureConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.layers == config.layers
    assert (again.hash, again.name) == (config.hash, config.name)
    assert again.to_dict() == config.to_dict()


@at_random
@given(layer_tables(**NOTHING_SHARED))
def test_parameters_and_flops_are_those_of_the_layers(config):
    """FLOPs equal torch's counter, and attention and FFN sum over the layers of uniform models."""
    model = build_model(config.replace(attention_backend='manual'))
    tokens = torch.empty((3, config.block_size), dtype=torch.long, device='meta')
    with FlopCounterMode(display=False) as counter:
        loss, _, auxiliary = model(tokens, tokens)
        (loss + auxiliary.loss).backward()
    info = count_parameters(model)
    assert sum(flops_by_part(model, False).values()) == counter.get_total_flops() / tokens.numel()

    uniform = {letter: build_model(kind) for letter, kind in config.kinds.items()}

    def mean_of_layers(count) -> float:
        by_kind = {letter: count(one) for letter, one in uniform.items()}
        return sum(by_kind[letter] for letter in config.layer_letters) / config.n_layer

    for part in ('attention', 'ffn'):
        expected = mean_of_layers(lambda one, part=part: count_parameters(one)['components'][part])
        assert info['components'][part] == expected
    assert idle_parameters(model) == mean_of_layers(idle_parameters)
    for causal in (False, True):
        for part, flops in flops_by_part(model, causal).items():
            expected = mean_of_layers(
                lambda one, part=part, causal=causal: flops_by_part(one, causal)[part]
            )
            assert flops == pytest.approx(expected), part

    parameters = dict(model.named_parameters())
    assert set(initial_values(model)) == set(saved_tensors(model))  # with biases of routers
    grouped = [id(p) for group in parameter_groups(model) for p in group.parameters]
    assert sorted(grouped) == sorted(id(p) for p in parameters.values())
    assert 'other' not in info['components']


@at_random
@given(layer_tables(**UNCHANGED))
@torch.no_grad()
def test_mixed_model_is_causal_and_continues_from_its_cache(config):
    model = perturbed_model(config, factor=3.0).eval()
    length = config.block_size
    tokens = random_tokens(config, batch=1).expand(length, length)
    changed = tokens.clone()  # row t: token t is changed
    changed.diagonal().add_(1).remainder_(config.vocab_size)
    logits = model(tokens)
    different = (logits != model(changed)).any(dim=-1)
    assert logits.isfinite().all() and not different.tril(-1).any()
    assert different.diagonal().all()

    tokens = random_tokens(config, batch=3)
    expected = model(tokens)
    for sizes in ([1] * length, [3, *[1] * (length - 3)], [length - 1, 1]):
        cache = model.empty_cache(length)
        pieces = [model(piece, cache=cache) for piece in tokens.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-4)

    copy = build_model(ModelArchitectureConfig.from_dict(config.to_dict()), 'cpu', seed=7).eval()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy(tokens), expected)


@at_random
@given(layer_tables(**UNCHANGED, **WITHOUT_DROPOUT, **NOTHING_SHARED))
@torch.no_grad()
def test_block_equals_that_of_a_uniform_model(config):
    """The same initial weights, whatever the other layers, and the same output."""
    model = build_model(config, 'cpu', seed=1)
    uniform = {letter: build_model(kind, 'cpu', seed=1) for letter, kind in config.kinds.items()}
    x = torch.randn(2, config.block_size, config.n_embd)
    tokens = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1]])
    documents = locate_documents(tokens, 0) if config.document_mask else None
    inputs = model.attention_inputs(torch.arange(config.block_size), documents)
    for number, letter in enumerate(config.layer_letters):
        one = uniform[letter]
        weights = model.blocks[number].state_dict()
        expected_weights = one.blocks[number].state_dict()
        assert weights.keys() == expected_weights.keys()
        assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
        encoding = model.position_encodings[model.encoding_numbers[number]]
        one.position_encoding.load_state_dict(encoding.state_dict())
        expected_inputs = one.attention_inputs(torch.arange(config.block_size), documents)
        y, aux = model.blocks[number](x, inputs[number])
        expected, expected_aux = one.blocks[number](x, expected_inputs[number])
        assert torch.equal(y, expected) and float(aux.loss) == float(expected_aux.loss)


@at_random
@given(layer_tables(**UNCHANGED))
def test_recomputation_changes_no_gradient(config):
    """Dropout included."""
    results, tokens = [], random_tokens(config, batch=2)
    for recomputed in ([], range(config.n_layer)):
        model = build_model(config, 'cpu', seed=1)
        for number in recomputed:
            recompute(model.blocks[number])
        torch.manual_seed(3)
        loss, count, auxiliary = model(tokens, tokens.roll(-1, dims=1))
        (loss / count + auxiliary.loss).backward()
        results.append(gradients(model))
    for name, gradient in results[0].items():
        assert (gradient is None) == (results[1][name] is None)
        assert gradient is None or torch.equal(gradient, results[1][name]), name


# --- Presets as patterns --------------------------------------------------------------------------


def as_pattern(config) -> ModelArchitectureConfig:
    """The same architecture with its options of layers in the kinds of a layer pattern."""
    options, of_layers = architecture_options(), layer_options()
    of_model = shared_options(config.to_dict())
    encoding = config.get('position_encoding')
    if encoding and POSITION_ENCODING_REGISTRY[encoding].refused_in_kind(''):
        of_layers.pop('position_encoding')
        of_model.add('position_encoding')
    own = {
        key: value
        for key, value in config.to_dict().items()
        if options[key].scope == 'model' or key in of_model
    }
    kinds = {
        letter or 'A': {key: value for key, value in kind.to_dict().items() if key in of_layers}
        for letter, kind in config.kinds.items()
    }
    letters = ''.join(letter or 'A' for letter in config.layer_letters)
    table = {'arch_preset': 'custom', 'layer_pattern': letters, 'layer_kinds': kinds}
    return ModelArchitectureConfig(**{**own, **table})


def weights_and_losses(config) -> tuple[dict, dict, list]:
    """The weights before and after ten updates, and the losses."""
    model = build_model(config, 'cpu', seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = [
        {'params': group.parameters, 'weight_decay': 0.1 * group.decayed}
        for group in parameter_groups(model)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=True)
    losses = []
    for step in range(10):
        tokens = random_tokens(config, batch=2, seed=step)
        loss, count, auxiliary = model(tokens, tokens.roll(-1, dims=1))
        (loss / count + auxiliary.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.detach(), auxiliary.loss]
    return before, model.state_dict(), losses


SMALL = {'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'block_size': 8, 'vocab_size': 11}


@pytest.mark.parametrize('preset', PRESETS)
def test_preset_written_as_pattern_is_the_same_model(preset):
    """Identity, initial weights, and ten updates bit for bit."""
    layers = {'jamba': 5, 'granite4': 6}.get(preset, 4)  # so that all kinds are used
    config = ModelArchitectureConfig(arch_preset=preset, **{**SMALL, 'n_layer': layers})
    pattern = as_pattern(config)
    assert pattern.hash == config.hash and pattern.layer_pattern is not None
    torch.manual_seed(0)
    expected = weights_and_losses(config)
    torch.manual_seed(0)
    assert not bit_differences(list(weights_and_losses(pattern)), list(expected))


def test_short_forms_equal_their_patterns():
    def hash_of(preset, **values):
        sizes = {**SMALL, 'n_layer': 3}
        return ModelArchitectureConfig(arch_preset=preset, **sizes, **values).hash

    windows = {'layer_pattern': 'LG', 'layer_kinds': {'G': {'sliding_window': None}}}
    assert hash_of('gemma2', **windows) == hash_of('gemma2')
    dense = {'layer_pattern': 'D M*', 'layer_kinds': {'D': {'ffn_type': 'swiglu'}}}
    assert hash_of('deepseek', **dense) == hash_of('deepseek')
    assert hash_of('gemma2', **{**windows, 'layer_pattern': 'LGG'}) != hash_of('gemma2')
    assert hash_of('mistral', layer_pattern='A') == hash_of('mistral')


# --- What layers share ----------------------------------------------------------------------------

ROPE = {'position_encoding': 'rope', 'attention_backend': 'manual'}


def inputs_by_letter(config) -> dict[str, list]:
    model = build_model(config, 'cpu')
    inputs: dict[str, list] = {}
    for letter, one in zip(config.layer_letters, model.attention_inputs(torch.arange(6))):
        inputs.setdefault(letter, []).append(one)
    return inputs


def test_layers_share_masks_and_rotations():
    """Equal layers both; others rotations that differ in the window, and masks that do not depend
    on positions."""
    kinds = {
        'L': {'sliding_window': 2},
        'N': {'position_encoding': 'none'},
        'T': {'rope_theta': 50.0},
        'F': {'ffn_type': 'swiglu', 'n_head': 4, 'head_dim': 8},
        'H': {'head_dim': 4},
    }
    config = tiny(n_layer=12, n_head=2, **ROPE, layer_pattern='GLNTFH', layer_kinds=kinds)
    inputs = inputs_by_letter(config)
    for first, second in inputs.values():
        assert first.mask is second.mask and first.rotation is second.rotation
    one = {letter: layers[0] for letter, layers in inputs.items()}
    assert one['L'].rotation is one['G'].rotation and one['L'].mask is not one['G'].mask
    assert one['N'].mask is one['G'].mask is one['T'].mask is one['F'].mask
    assert one['N'].rotation == () and one['T'].rotation is not one['G'].rotation
    assert one['F'].rotation is one['G'].rotation  # as many dimensions of a head
    assert one['H'].rotation is not one['G'].rotation


def test_biases_are_those_of_each_number_of_heads():
    kinds = {
        'A': {'n_head': 2},
        'B': {'position_encoding': 't5_relative'},
        'C': {'n_head': 2, 'position_encoding': 't5_relative'},
    }
    config = tiny(n_layer=8, position_encoding='alibi', layer_pattern='UABC', layer_kinds=kinds)
    heads = {
        letter: {one.mask.size(1) for one in of} for letter, of in inputs_by_letter(config).items()
    }
    assert heads == {'U': {4}, 'A': {2}, 'B': {4}, 'C': {2}}
    masks = {id(one.mask) for of in inputs_by_letter(config).values() for one in of[:1]}
    assert len(masks) == 4
    names = [name for name, _ in build_model(config).named_parameters() if 'position' in name]
    assert names == ['position_encoding.table.weight', 'more_position_encodings.0.table.weight']


def test_positions_that_are_embedded_are_embedded_once():
    """Also if layers have different heads."""
    config = tiny(
        position_encoding='learned_absolute', layer_pattern='UA', layer_kinds={'A': {'n_head': 2}}
    )
    assert len(build_model(config).position_encodings) == 1


class WindowedSlopes(PositionEncoding):
    """Depends on an option of other components, and supports eight tokens."""

    max_length = 8
    has_bias = True

    def __init__(self, config):
        super().__init__(config)
        self.slope = 1 / config.sliding_window

    @classmethod
    def depends_on(cls, config):
        return (config.sliding_window,)

    def prepare(self, q_positions, k_positions):
        return AttentionInputs(bias=self.slope * (k_positions - q_positions[:, None])[None].float())


def test_own_encoding_says_on_what_it_depends(register):
    register(POSITION_ENCODING_REGISTRY, 'windowed', WindowedSlopes)
    windows = {
        letter: {'position_encoding': 'windowed', 'sliding_window': size}
        for letter, size in (('A', 2), ('B', 4))
    }
    config = tiny(n_layer=6, position_encoding='none', layer_pattern='UAB', layer_kinds=windows)
    model = build_model(config, 'cpu', seed=1)
    assert [getattr(e, 'slope', 0) for e in model.position_encodings] == [0, 1 / 2, 1 / 4]
    assert model.encoding_numbers == [0, 1, 2, 0, 1, 2]
    with pytest.raises(UserError, match=r"length 9 exceeds block_size=8.*'windowed'"):
        model(torch.zeros(1, 9, dtype=torch.long))


# --- Initialization -------------------------------------------------------------------------------


class AttentionOnlyBlock(Block):
    """Has no feed-forward network; its attention is in a container."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.ffn = None
        self.sublayers = nn.ModuleList([self.attention])

    @classmethod
    def norms(cls, config):
        return ('attention_norm',)

    def forward(self, x, attn_inputs):
        return x + self.attention(self.attention_norm(x), attn_inputs), AuxOutput(0.0, {})


def test_depth_scaled_initialization_counts_sublayers_that_write(register):
    """Six of them instead of eight, although experts and shared experts return weights too."""
    register(NORM_POSITION_REGISTRY, 'attention_only', AttentionOnlyBlock)
    experts = {'ffn_type': 'moe', 'experts_per_token': 2, 'shared_experts': 1}
    config = tiny(
        n_layer=4,
        layer_pattern='AM',
        layer_kinds={'A': {'norm_position': 'attention_only'}, 'M': experts},
    )
    name = 'blocks.2.attention.output.weight'
    mixed = build_model(config, 'cpu', seed=1).get_parameter(name)
    uniform = build_model(tiny(n_layer=4), 'cpu', seed=1).get_parameter(name)
    torch.testing.assert_close(mixed * 6**0.5, uniform * 8**0.5)


def test_pattern_of_one_kind_is_that_kind():
    """The layers differ from the model's own options."""
    kinds = {'A': {'attention_softcap': 2.0}}
    config = tiny(layer_pattern='A', layer_kinds=kinds)
    assert config.hash == tiny(attention_softcap=2.0).hash
    assert config.attention_backend == 'manual'  # which alone supports a cap on a CPU
    assert layer_choices(config)['kinds']['A']['attention_softcap'] == 2.0
    assert layer_choices(tiny()) is None
    assert config.kinds['A'].replace(d_ff=24).layers[0].attention_softcap == 2.0


# --- Compilation ----------------------------------------------------------------------------------


def test_compiled_kinds_have_a_graph_each_and_match_eager(monkeypatch):
    """Equal layers share a graph, and the recompilation limit grows with the number of kinds."""
    kinds = {
        'A': {'n_head': 2, 'position_encoding': 'none', 'sliding_window': 3},
        'B': {'attention_type': 'mla', 'd_ff': 24},
        'C': {'ffn_type': 'moe', 'num_experts': 4},
    }
    table = {'layer_pattern': 'UABC', 'layer_kinds': kinds, 'position_encoding': 'rope'}
    config = tiny(n_layer=6, attention_backend='manual', **table)
    plain, model = perturbed_model(config, 3.0), perturbed_model(config, 3.0)
    recorder, compile_module = EagerAndRecordGraphs(), nn.Module.compile

    def compile_whole(self, **options):
        compile_module(self, **options, backend=recorder, fullgraph=True)

    monkeypatch.setattr(nn.Module, 'compile', compile_whole)
    monkeypatch.setattr(strategies, 'RECOMPILE_LIMIT', 1)
    monkeypatch.setattr(strategies, 'RECOMPILE_LIMIT_OF_KIND', 1)
    torch.compiler.reset()
    tokens = random_tokens(config, batch=2)
    with torch._dynamo.config.patch(optimize_ddp=True):
        strategies.prepare_blocks(model, [], compiled=True)
        for one in (plain, model):
            one(tokens).square().mean().backward()
    assert len(recorder.graphs) == 4
    expected = gradients(plain)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])
    torch.compiler.reset()
