"""Models whose layers have different mixers: properties of random ones."""

import itertools
import json
import os
import random

import pytest
import torch
from helpers.architectures import (
    OWN_MIXERS,
    any_sublayers,
    gradients,
    hybrid_values,
    hybrids,
    legal_config,
    perturbed_model,
    random_tokens,
    tiny,
)
from helpers.bit_equality import bit_differences
from helpers.in_process import train_here
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import export_checkpoint
from common.errors import UserError, run_script
from components.checks import FLOPS_TOLERANCE, flops_disagreements
from components.layer_inputs import run_block
from components.weight_initialization import initial_values
from configurator import read_command_line
from inference.generate import generate
from model_builder import (
    build_model,
    count_parameters,
    flops_by_part,
    parameter_groups,
    recompute,
)
from model_components import SharedInputs, locate_documents
from model_config import ModelArchitectureConfig
from planning.plan import plan_run
from training_config import load_settings, schema

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]


def at_random(share: float = 1.0):
    """The same hybrids in every run; HYBRIDS=500 tries more of them."""
    return settings(
        max_examples=max(2, round(share * int(os.environ.get('HYBRIDS', '8')))),
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


UNCHANGED = {'init_std': 0.02, 'logit_softcap': None}  # larger weights, or a cap, hide differences
NOTHING_SHARED = {'value_residual': 'none'}  # the first layer's weights would differ
WITHOUT_DROPOUT = {'dropout': 0.0, 'attention_dropout': None, 'residual_dropout': None}


@at_random(4)
@given(hybrids())
def test_hybrid_round_trip(config):
    again = ModelArchitectureConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.layers == config.layers
    assert (again.hash, again.name) == (config.hash, config.name)
    assert again.to_dict() == config.to_dict()


@at_random(4)
@given(st.data())
def test_other_sublayers_have_another_name_and_hash(data):
    def pick(values):
        return data.draw(st.sampled_from(values))

    one, other = any_sublayers(pick), any_sublayers(pick)
    configs = [
        legal_config({'layer_pattern': 'UA', 'layer_kinds': {'A': sublayers}})
        for sublayers in (one, other)
    ]
    assert len({config.name for config in configs}) == 1 + (one != other)
    assert len({config.hash for config in configs}) == 1 + (one != other)


@at_random()
@given(hybrids(**NOTHING_SHARED))
def test_parameters_and_flops_are_those_of_the_layers(config):
    """FLOPs equal torch's counter, and parts sum over the layers of uniform models."""
    model = build_model(config.with_backend('manual')).eval()
    tokens = torch.empty((3, config.block_size), dtype=torch.long, device='meta')
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens)
    declared = sum(flops_by_part(model, False).values()) / 3 * tokens.numel()
    assert declared == pytest.approx(counter.get_total_flops(), rel=FLOPS_TOLERANCE)
    assert flops_disagreements(model) == []

    info = count_parameters(model)
    uniform = {letter: build_model(kind) for letter, kind in config.kinds.items()}

    def mean_of_layers(count) -> float:
        by_kind = {letter: count(one) for letter, one in uniform.items()}
        return sum(by_kind[letter] for letter in config.layer_letters) / config.n_layer

    for part in ('attention', 'mixer', 'ffn'):
        assert info['components'].get(part, 0) == mean_of_layers(
            lambda one, part=part: count_parameters(one)['components'].get(part, 0)
        )
    for causal in (False, True):
        for part, flops in flops_by_part(model, causal).items():
            expected = mean_of_layers(
                lambda one, part=part, causal=causal: flops_by_part(one, causal).get(part, 0)
            )
            assert flops == pytest.approx(expected), part

    parameters = dict(model.named_parameters())
    assert set(initial_values(model)) == {*parameters, *dict(model.named_buffers())}
    grouped = [id(p) for group in parameter_groups(model) for p in group.parameters]
    assert sorted(grouped) == sorted(id(p) for p in parameters.values())
    assert 'other' not in info['components']


@at_random()
@given(hybrids(**UNCHANGED))
@torch.no_grad()
def test_hybrid_is_causal_and_continues_from_its_cache(config):
    model = perturbed_model(config, factor=3.0).eval()
    length = config.block_size
    tokens = random_tokens(config, batch=1).expand(length, length)
    changed = tokens.clone()  # row t: token t is changed
    changed.diagonal().add_(1).remainder_(config.vocab_size)
    logits = model(tokens)
    difference = (logits - model(changed)).abs().amax(dim=-1)
    # Documents are counted from the beginning of each, and a changed token may end one.
    assert logits.isfinite().all() and difference.tril(-1).max() < 1e-4
    assert difference.diagonal().min() > 1e-4

    tokens = random_tokens(config, batch=3)
    expected = model(tokens)
    for sizes in ([1] * length, [3, *[1] * (length - 3)], [length - 1, 1]):
        cache = model.empty_cache(length)
        pieces = [model(piece, cache=cache) for piece in tokens.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-4)

    copy = build_model(ModelArchitectureConfig.from_dict(config.to_dict()), 'cpu', seed=7).eval()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy(tokens), expected)


@at_random()
@given(hybrids(**UNCHANGED))
def test_text_is_equal_with_and_without_cache(config):
    """Also beyond the context."""
    model = perturbed_model(config, factor=3.0).eval()
    results = []
    for cached in (True, False):
        logits = []

        def choose(each, logits=logits):
            logits.append(each)
            return (each.argmax(dim=-1) + len(logits)) % config.vocab_size

        prompt = random_tokens(config, batch=2)[:, :2]
        text = list(generate(model, prompt, 8, choose=choose, cache=cached))
        results.append((torch.stack(logits), torch.stack(text)))
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)


@at_random()
@given(hybrids(**UNCHANGED, **WITHOUT_DROPOUT, **NOTHING_SHARED))
@torch.no_grad()
def test_block_equals_that_of_a_uniform_model(config):
    """The same initial weights, except for the scale of those into the residual stream, and the
    same output."""
    model = build_model(config, 'cpu', seed=1)
    uniform = {letter: build_model(kind, 'cpu', seed=1) for letter, kind in config.kinds.items()}
    written = {id(w) for m in model.modules() for w in getattr(m, 'residual_weights', list)()}
    x = torch.randn(2, config.block_size, config.n_embd)
    tokens = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1]])
    documents = locate_documents(tokens, 0) if config.get('document_mask') else None
    positions = documents.positions if documents else torch.arange(config.block_size)
    shared = SharedInputs(tokens, torch.randn_like(x), positions)
    inputs = model.attention_inputs(torch.arange(config.block_size), documents)
    for number, letter in enumerate(config.layer_letters):
        one, block = uniform[letter], model.blocks[number]
        expected_weights = one.blocks[number].state_dict()
        assert block.state_dict().keys() == expected_weights.keys()
        for name, weight in block.named_parameters():
            if id(weight) not in written:
                assert torch.equal(weight, expected_weights[name]), name
        one.blocks[number].load_state_dict(block.state_dict())
        if model.encoding_numbers[number] is not None:
            encoding = model.position_encodings[model.encoding_numbers[number]]
            one.position_encoding.load_state_dict(encoding.state_dict())
        expected_inputs = one.attention_inputs(torch.arange(config.block_size), documents)
        y, aux, _ = run_block(block, x, inputs[number], shared)
        expected, expected_aux, _ = run_block(
            one.blocks[number], x, expected_inputs[number], shared
        )
        assert torch.equal(y, expected) and float(aux.loss) == float(expected_aux.loss)


@at_random()
@given(hybrids(**UNCHANGED))
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
        assert gradient is None or gradient.isfinite().all(), name
        assert gradient is None or torch.equal(gradient, results[1][name]), name


def legal_hybrids(count: int) -> list[ModelArchitectureConfig]:
    """Random ones, the same in every run."""
    choose = random.Random(0).choice
    drawn = (legal_config(hybrid_values(choose, **UNCHANGED)) for _ in range(10 * count))
    return list(itertools.islice(filter(None, drawn), count))


# --- Runs -----------------------------------------------------------------------------------------


def as_options(config: ModelArchitectureConfig) -> dict:
    """The options of `train.py` for the architecture, without those of the data."""
    values = {'arch_preset': 'custom', **config.to_dict()}
    for key in ('vocab_size', 'end_of_text'):
        values.pop(key, None)
    kinds = values.pop('layer_kinds', {})
    return values | {
        f'layer_kinds.{letter}.{key}': value
        for letter in config.layer_letters
        for key, value in (kinds.get(letter) or {'bias': config.bias}).items()
    }


@at_random(0.5)
@given(hybrids())
def test_hybrid_is_planned(config):
    """For every strategy, as the model that is built."""
    options = {'plan': True, 'dataset': 'missing', 'device': 'cpu', 'world_size': 4}
    options |= {'gradient_accumulation_steps': 4, **as_options(config)}
    arguments = [f'--{key}={value}' for key, value in options.items()]
    plan = plan_run(load_settings(read_command_line(arguments, schema)))
    built = build_model(config.replace(vocab_size=50304))
    assert plan['model']['components'] == count_parameters(built)['components']
    assert plan['flops']['per_token'] == sum(flops_by_part(built, False).values())
    assert {*plan['memory']} >= {'ddp', 'zero1', 'fsdp', 'fsdp*'}
    assert all(memory['total_gb'] > 0 for memory in plan['memory'].values())


@pytest.mark.parametrize('number', range(3))
def test_run_of_a_hybrid_resumes_exactly_and_is_exported(number, tiny_dataset, tmp_path):
    config, folder = legal_hybrids(number + 1)[number], tmp_path
    options = {**as_options(config), 'vocab_size': 256, 'eval_interval': 2, 'max_iters': 4}
    options['lr_decay_iters'] = 4
    if config.get('document_mask'):
        options['end_of_text'] = 32
    whole = train_here(tiny_dataset, folder / 'whole', **options)
    half = train_here(tiny_dataset, folder / 'half', **{**options, 'max_iters': 2})
    resumed = train_here(
        tiny_dataset, folder / 'half', **{**options, 'init_from': 'resume', 'max_iters': 4}
    )
    assert whole.code == half.code == resumed.code == 0
    assert resumed.losses == whole.losses and None not in whole.losses
    assert not bit_differences(resumed.weights(), whole.weights())

    arguments = [f'--out_dir={folder / "whole"}', f'--output={folder / "model.pt"}']
    with pytest.raises(SystemExit) as exit:
        run_script(export_checkpoint.main, arguments)
    assert exit.value.code == 0
    exported = torch.load(folder / 'model.pt', weights_only=True)
    again = build_model(
        ModelArchitectureConfig.from_dict(exported['config']['architecture']), 'cpu'
    ).eval()
    again.load_state_dict(exported['model'])
    tokens = random_tokens(config, batch=2)
    with torch.no_grad():
        assert torch.equal(again(tokens), whole.session.raw_model.eval()(tokens))


# --- Refused --------------------------------------------------------------------------------------

REFUSED = {
    'no sublayer in a kind': (
        {'layer_pattern': 'AB', 'layer_kinds': {'B': {'mixer': 'none', 'ffn_type': 'none'}}},
        ["layers B: mixer='none' with ffn_type='none'", 'Choose a mixer or an FFN'],
    ),
    'nothing joined': (
        {'mixer': 'attention+none'},
        ["mixer='attention+none'", "several other than 'none', each once, joined by '+'"],
    ),
    'twice': ({'mixer': 'attention+attention'}, ["each once, joined by '+'"]),
    'head dimension': ({'mixer': 'mamba2', 'mamba2_head_dim': 9}, ['does, such as 8.']),
    'groups': (
        {'mixer': 'mamba2', 'mamba2_head_dim': 4, 'mamba2_groups': 5},
        ['--mamba2_groups=4.'],
    ),
    'unknown': ({'mixer': 'atention'}, ['Did you mean attention?']),
    'encoding without attention': (
        {'mixer': 'none', 'position_encoding': 'rope'},
        ["position_encoding='rope'", 'has no effect', "mixer='attention'"],
    ),
    'window without attention': (
        {
            'layer_pattern': 'AB',
            'layer_kinds': {'B': {'mixer': 'none', 'sliding_window': 2}},
        },
        ['layer_kinds.B.sliding_window=2', 'has no effect', "sets mixer='none'"],
    ),
    'width without an FFN': (
        {'ffn_type': 'none', 'd_ff': 8},
        ['d_ff=8', 'has no effect', "ffn_type other than 'none'"],
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused_combination_gives_one_sentence(case):
    values, parts = REFUSED[case]
    with pytest.raises(UserError) as error:
        tiny(**values)
    assert len(error.value.problems) == 1
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_order_of_joined_mixers_has_no_meaning():
    """Neither in the identity nor in the name."""
    names = ['attention', *OWN_MIXERS][:2]
    if len(names) < 2:
        pytest.skip('attention is the only mixer that joins')
    one, other = (legal_config({'mixer': '+'.join(order)}) for order in (names, names[::-1]))
    assert (one.hash, one.name) == (other.hash, other.name)
