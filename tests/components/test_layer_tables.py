"""Models whose layers differ: properties of random layer tables."""

import json
import os

import pytest
import torch
from helpers.architectures import (
    gradients,
    layer_tables,
    perturbed_model,
    random_tokens,
)
from hypothesis import HealthCheck, given, settings
from torch.utils.flop_counter import FlopCounterMode

from components.weight_initialization import initial_values
from model_builder import (
    build_model,
    count_parameters,
    parameter_groups,
    recompute,
    training_flops,
)
from model_config import ModelArchitectureConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

# The same tables in every run; LAYER_TABLES=500 tries more of them.
at_random = settings(
    max_examples=int(os.environ.get('LAYER_TABLES', '6')),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
UNCHANGED = {'init_std': 0.02, 'logit_softcap': None}  # larger weights, or a cap, hide differences
WITHOUT_DROPOUT = {'dropout': 0.0, 'attention_dropout': None, 'residual_dropout': None}


def uniform_model(config, letter, seed=1):
    """The model whose layers are all of one kind."""
    return build_model(config.kinds[letter], 'cpu', seed)


@at_random
@given(layer_tables())
def test_table_round_trip(config):
    again = ModelArchitectureConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.layers == config.layers
    assert (again.hash, again.name) == (config.hash, config.name)
    assert again.to_dict() == config.to_dict()


@at_random
@given(layer_tables())
def test_parameters_and_flops_are_those_of_the_layers(config):
    """FLOPs equal torch's counter, and attention and FFN sum over the layers of uniform models."""
    model = build_model(config.replace(attention_backend='manual'))
    tokens = torch.empty((3, config.block_size), dtype=torch.long, device='meta')
    with FlopCounterMode(display=False) as counter:
        loss, _, auxiliary = model(tokens, tokens)
        (loss + auxiliary.loss).backward()
    flops, info = training_flops(model), count_parameters(model)
    assert flops['per_token'] == counter.get_total_flops() / tokens.numel()

    uniform = {letter: build_model(kind) for letter, kind in config.kinds.items()}
    counts = {letter: count_parameters(one) for letter, one in uniform.items()}
    costs = {letter: training_flops(one) for letter, one in uniform.items()}
    for part in ('attention', 'ffn'):
        parts = [counts[letter]['components'][part] for letter in config.layer_letters]
        assert info['components'][part] == sum(parts) / config.n_layer
    idle = [counts[letter]['total_params'] - counts[letter]['active_params'] for letter in config.layer_letters]
    assert info['total_params'] - info['active_params'] == sum(idle) / config.n_layer
    for breakdown in ('breakdown', 'breakdown_causal'):
        for part in ('attention_projections', 'attention_scores', 'ffn'):
            parts = [costs[letter][breakdown][part] for letter in config.layer_letters]
            assert flops[breakdown][part] == pytest.approx(sum(parts) / config.n_layer)

    parameters = dict(model.named_parameters())
    assert set(initial_values(model)) == set(parameters)
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
@given(layer_tables(**UNCHANGED, **WITHOUT_DROPOUT))
@torch.no_grad()
def test_block_equals_that_of_a_uniform_model(config):
    """The same initial weights, whatever the other layers, and the same output."""
    model = build_model(config, 'cpu', seed=1)
    uniform = {letter: uniform_model(config, letter) for letter in config.kinds}
    x = torch.randn(2, config.block_size, config.n_embd)
    documents = torch.tensor([[1, 1, 2, 2, 2, 3], [1, 2, 2, 2, 2, 2]])
    doc_ids = documents if config.get('document_mask') else None
    inputs = model.attention_inputs(torch.arange(config.block_size), doc_ids)
    for number, letter in enumerate(config.layer_letters):
        one = uniform[letter]
        weights = model.blocks[number].state_dict()
        expected_weights = one.blocks[number].state_dict()
        assert weights.keys() == expected_weights.keys()
        assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
        encoding = model.position_encodings[model.encoding_numbers[number]]
        one.position_encoding.load_state_dict(encoding.state_dict())
        expected_inputs = one.attention_inputs(torch.arange(config.block_size), doc_ids)
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
