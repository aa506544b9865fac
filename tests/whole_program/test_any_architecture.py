"""Properties of every architecture: on random legal ones, and on a pairwise covering set."""

import json
import os

import pytest
import torch
from helpers.architectures import (
    architectures,
    gradients,
    label,
    legal_config,
    pairwise_architectures,
    perturbed_model,
    random_architectures,
    random_tokens,
    tiny,
    values_of,
    with_backend,
)
from hypothesis import given, settings
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.utils.flop_counter import FlopCounterMode

from components.weight_initialization import initial_values
from model_builder import (
    build_model,
    count_parameters,
    parameter_groups,
    recompute,
    training_flops,
)
from model_config import (
    ATTENTION_BACKEND_REGISTRY,
    CORE_OPTIONS,
    REGISTRIES,
    ModelArchitectureConfig,
    architecture_options,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

# The same cases in every run; ARCHITECTURES=2000 tries more of them.
CASES = int(os.environ.get('ARCHITECTURES', '40'))
at_random = settings(max_examples=CASES, deadline=None, derandomize=True, database=None)


def loss_and_gradients(config, tokens):
    model = perturbed_model(config)
    torch.manual_seed(3)
    loss, count, auxiliary = model(tokens, tokens.roll(-1, dims=1))
    (loss / count + auxiliary.loss).backward()
    return (loss / count).detach(), gradients(model)


@at_random
@given(architectures())
def test_every_parameter_has_initialization_group_and_part(config):
    model = build_model(config)
    parameters = dict(model.named_parameters())
    assert set(initial_values(model)) == set(parameters)
    grouped = [id(p) for group in parameter_groups(model) for p in group.parameters]
    assert sorted(grouped) == sorted(id(p) for p in parameters.values())
    assert 'other' not in count_parameters(model)['components']


@at_random
@given(
    # Larger initial weights make some architectures so sensitive that rounding dominates.
    architectures(dropout=0.0, attention_dropout=None, residual_dropout=None, init_std=0.02)
)
def test_backends_agree_on_loss_and_gradients(config):
    tokens = random_tokens(config, batch=2)
    results = {}
    for backend in ATTENTION_BACKEND_REGISTRY:
        if same := with_backend(config, backend):
            if ATTENTION_BACKEND_REGISTRY[backend].training_problems(same, 'cpu'):
                with torch.no_grad():
                    loss, count, _ = perturbed_model(same)(tokens, tokens.roll(-1, dims=1))
                results[backend] = loss / count, {}
            else:
                results[backend] = loss_and_gradients(same, tokens)
    for backend, (loss, grads) in results.items():
        assert torch.isfinite(loss), backend
        assert all(torch.isfinite(grad).all() for grad in grads.values()), backend
        expected_loss, expected = results['manual']
        torch.testing.assert_close(loss, expected_loss)
        for name, grad in grads.items():
            error = torch.linalg.norm(grad - expected[name])
            # Without norms in the layers, rounding alone makes 2e-4.
            assert error <= 5e-4 * torch.linalg.norm(expected[name]) + 1e-6, (backend, name)


@at_random
@given(architectures(logit_softcap=None))  # a cap may round large logits to the same value
def test_model_is_causal(config):
    model = perturbed_model(config).eval()
    length = config.block_size
    tokens = random_tokens(config, batch=1).expand(length, length)
    changed = tokens.clone()  # row t: token t is changed
    changed.diagonal().add_(1).remainder_(config.vocab_size)
    with torch.no_grad():
        different = (model(tokens) != model(changed)).any(dim=-1)
    assert not different.tril(-1).any()
    assert different.diagonal().all()


@pytest.mark.parametrize('chosen', pairwise_architectures(), ids=label)
def test_flops_equal_torch_flop_counter(chosen):
    config = tiny(**chosen)
    tokens = torch.empty((3, config.block_size), dtype=torch.long, device='meta')
    with FlopCounterMode(display=False) as counter:
        loss, _, auxiliary = build_model(config.replace(attention_backend='manual'))(tokens, tokens)
        (loss + auxiliary.loss).backward()
    flops = training_flops(build_model(config))
    assert flops['per_token'] == counter.get_total_flops() / tokens.numel()
    assert flops['per_token'] == sum(flops['breakdown'].values())


def test_hash_is_unique_per_config():
    configs = [tiny(**values) for values in random_architectures(400)]
    described = {json.dumps(config.to_dict(), sort_keys=True) for config in configs}
    assert len({config.hash for config in configs}) == len(described) > 390


def test_config_round_trip_by_dict_and_file(tmp_path):
    for values in pairwise_architectures():
        config = tiny(**values)
        again = ModelArchitectureConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        config.save(tmp_path / 'architecture.json')
        loaded = ModelArchitectureConfig.load(tmp_path / 'architecture.json')
        for copy in (again, loaded):
            assert copy.hash == config.hash and copy.to_dict() == config.to_dict()
            assert copy.name == config.name


@pytest.mark.parametrize('registry', [r for r in REGISTRIES if r.option in CORE_OPTIONS])
def test_name_depends_on_tagged_choices_only(registry):
    """Several combinations, each with every choice of one registry."""
    option = architecture_options()[registry.option]
    for values in pairwise_architectures()[::8]:
        names = {}
        for name in values_of(registry.option, option):
            core = {key: values[key] for key in values if key in CORE_OPTIONS}
            if config := legal_config({**core, registry.option: name}):
                names[name] = config.name
        tagged = registry is not ATTENTION_BACKEND_REGISTRY
        assert len(set(names.values())) == (len(names) if tagged else 1), names


@torch.no_grad()  # flex has no backward pass on a CPU
@pytest.mark.usefixtures('flex_of_few_queries')
@pytest.mark.parametrize('chosen', pairwise_architectures()[::16], ids=label)
def test_compiled_blocks_share_graphs_and_match_eager(chosen):
    """No graph breaks, and identical layers share one graph."""
    config = tiny(**chosen).replace(n_layer=4, init_std=0.02)
    model, tokens = perturbed_model(config).eval(), random_tokens(config, batch=2)
    expected = model(tokens)
    recorder = EagerAndRecordGraphs()
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=recorder)
    torch.testing.assert_close(model(tokens), expected)
    kinds = {(type(block.ffn), block.attention.spec) for block in model.blocks}
    # The first layer has a graph of its own if others get its values, or if x is x0 there.
    is_special = config.get('value_residual') not in (None, 'none')
    is_special |= config.residual == 'x0_lambdas'
    assert len(recorder.graphs) <= len(kinds) + is_special
    torch.compiler.reset()


def test_checkpointed_block_is_compiled():
    """The recomputation is inside one graph that identical blocks share."""
    config = tiny(n_layer=3, dropout=0.0)
    plain, model = perturbed_model(config), perturbed_model(config)
    tokens, recorder = random_tokens(config, batch=2), EagerAndRecordGraphs()

    torch.compiler.reset()
    for block in model.blocks:
        recompute(block)
        block.compile(fullgraph=True, backend=recorder)
    for one in (plain, model):
        one(tokens).square().mean().backward()
    assert len(recorder.graphs) == 1
    expected = gradients(plain)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])
    torch.compiler.reset()
