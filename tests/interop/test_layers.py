"""Models whose layers differ: read and written layer by layer, by the tables of all families."""

import re

import pytest
import torch
from helpers.architectures import perturbed_model, random_tokens, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import interop
from common.errors import UserError
from configurator import read_command_line
from interop.layers import ABSENT, PerLayer, with_layer_pattern
from model_builder import build_model
from model_config import ModelArchitectureConfig
from training_config import load_settings, schema

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]

# --- Values of each layer -------------------------------------------------------------------------


def pattern_of(**options) -> dict:
    return with_layer_pattern({key: PerLayer(values) for key, values in options.items()})


def test_pattern_and_kinds_of_values_per_layer():
    assert pattern_of(sliding_window=[5, 5], rope_theta=[9.0] * 2) == {
        'sliding_window': 5,
        'rope_theta': 9.0,
    }
    assert pattern_of(sliding_window=[None, 5, None], rope_theta=[9.0] * 3) == {
        'sliding_window': 5,
        'rope_theta': 9.0,
        'attention_pattern': 'GL',
    }
    assert pattern_of(sliding_window=[5, 5, None], rope_theta=[1.0, 1.0, 9.0]) == {
        'sliding_window': 5,
        'rope_theta': 1.0,
        'layer_pattern': 'LLG',
        'layer_kinds': {'G': {'sliding_window': None, 'rope_theta': 9.0}},
    }
    assert pattern_of(
        position_encoding=['none', 'rope', 'rope', 'none'], rope_theta=[ABSENT, 9.0, 9.0, ABSENT]
    ) == {
        'position_encoding': 'none',
        'layer_pattern': 'NRR',
        'layer_kinds': {'R': {'position_encoding': 'rope', 'rope_theta': 9.0}},
    }
    assert pattern_of(sliding_window=[5, 7, None, 5]) == {
        'sliding_window': 5,
        'layer_pattern': 'ABC',
        'layer_kinds': {'B': {'sliding_window': 7}, 'C': {'sliding_window': None}},
    }


ROWS = st.tuples(
    st.sampled_from([None, 2, 3]), st.sampled_from(['rope', 'none']), st.sampled_from([10.0, 50.0])
)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=7))
def test_layers_have_the_values_that_were_read(rows):
    windows, encodings, thetas = zip(*rows)
    options = pattern_of(
        sliding_window=windows,
        position_encoding=encodings,
        rope_theta=[t if e == 'rope' else ABSENT for e, t in zip(encodings, thetas)],
    )
    config = tiny(arch_preset='custom', n_layer=len(rows), **options)
    for layer, (window, encoding, theta) in zip(config.layers, rows, strict=True):
        assert (layer.sliding_window, layer.position_encoding) == (window, encoding)
        assert layer.get('rope_theta') == (theta if encoding == 'rope' else None)


# --- Export ---------------------------------------------------------------------------------------

WINDOW, DENSE, SIZES = (
    {'sliding_window': 5},
    {'ffn_type': 'swiglu'},
    {'n_layer': 4, 'vocab_size': 40},
)
# An architecture in its short form, and the same one as a layer pattern.
WRITINGS = {
    'gemma2': (
        WINDOW,
        {'layer_pattern': 'LB', 'layer_kinds': {'B': {'sliding_window': None}}, **WINDOW},
    ),
    'qwen3': (
        {'attention_pattern': 'LLG', **WINDOW},
        {'layer_pattern': 'XX Y X', 'layer_kinds': {'X': WINDOW}},
    ),
    'deepseek': (
        {'dense_layers': 2},
        {'layer_pattern': 'DD M*', 'layer_kinds': {'D': DENSE}},
    ),
    'llama': (
        {},
        {'layer_pattern': 'AB', 'layer_kinds': {'A': {'use_gqa': True, 'num_kv_heads': 12}}},
    ),
    'gpt2': ({}, {'layer_pattern': 'AB', 'layer_kinds': {'A': {'attention_bias': True}}}),
}


@pytest.mark.parametrize('preset', WRITINGS)
def test_writings_of_one_architecture_export_alike(preset):
    exported = [
        interop.convert_config(ModelArchitectureConfig(arch_preset=preset, **SIZES, **values))
        for values in WRITINGS[preset]
    ]
    assert exported[0].family is exported[1].family
    assert exported[0].fields == exported[1].fields


LLAMA = {'arch_preset': 'llama', 'layer_pattern': 'LG'}
INEXPRESSIBLE = {
    r'architecture: sliding_window=7 in layers C\. The closest family, Gemma': {
        'arch_preset': 'gemma2',
        'layer_pattern': 'ABC',
        'layer_kinds': {'A': WINDOW, 'B': {'sliding_window': None}, 'C': {'sliding_window': 7}},
    },
    "ffn_type='swiglu' in layers D, .*Deepseek": {
        'arch_preset': 'deepseek',
        'layer_pattern': 'MD',
        'layer_kinds': {'D': DENSE},
    },
    r"architecture: norm_position='post' in layers G\. The closest": {
        **LLAMA,
        'layer_kinds': {'G': {'norm_position': 'post'}},
    },
    'n_head=2 in layers G, .*num_kv_heads=2 in layers G': {
        **LLAMA,
        'layer_kinds': {'G': {'n_head': 2}},
    },
    r"architecture: normalization='layernorm' outside the layers\. The closest": {
        **LLAMA,
        'normalization': 'layernorm',
        'layer_kinds': {letter: {'normalization': 'rmsnorm'} for letter in 'LG'},
    },
    'rope_theta=7.0 in layers M': {
        'arch_preset': 'gemma3',
        'layer_pattern': 'LMG',
        'layer_kinds': {'M': {'sliding_window': 5, 'rope_theta': 7.0}},
    },
}


@pytest.mark.parametrize('message', INEXPRESSIBLE)
def test_inexpressible_layers_are_named(message):
    with pytest.raises(UserError, match=message):
        interop.convert_config(tiny(n_layer=3, **INEXPRESSIBLE[message]))


def test_tensors_have_the_sizes_of_their_layer():
    """Llama has equal layers, but its table splits the matrices of any."""
    config = tiny(
        **LLAMA, layer_kinds={'L': {'n_head': 2, 'head_dim': 6, 'use_gqa': True, 'num_kv_heads': 1}}
    )
    family = interop.TRANSFORMERS['llama']
    rows = {}
    for name, parameter in build_model(config, 'cpu').named_parameters():
        tensor_map, names = interop.tensor_map_of(family, name, config)
        layer = interop.layer_config(config, name)
        parts = tensor_map.write(parameter, layer)
        assert torch.equal(tensor_map.read(parts, layer), parameter)
        rows |= {key.removeprefix('model.layers.'): len(part) for key, part in zip(names, parts)}
    for layer, sizes in ((0, (12, 6, 6)), (1, (16, 16, 16))):
        assert tuple(rows[f'{layer}.self_attn.{x}_proj.weight'] for x in 'qkv') == sizes


# --- Training from pretrained weights -------------------------------------------------------------


@pytest.fixture(scope='module')
def gemma3(tmp_path_factory):
    """A Gemma 3 of ours with 2 local layers and a global one, and the folder of its export."""
    folder = tmp_path_factory.mktemp('gemma3') / 'model'
    sizes = {'n_layer': 3, 'layer_pattern': 'LLG', 'block_size': 32, 'vocab_size': 256}
    model = perturbed_model(tiny(arch_preset='gemma3', **sizes)).eval()
    interop.export(model.config, dict(model.named_parameters()), folder)
    return model, folder


def start(folder, *flags: str):
    """The source and the settings of a run with these weights, checked."""
    arguments = read_command_line([f'--init_from=hf:{folder}', '--device=cpu', *flags], schema)
    source = interop.find_pretrained(arguments)
    settings = load_settings(arguments)
    source.check(settings)
    return source, settings


def test_run_has_the_layers_of_the_weights(gemma3):
    model, folder = gemma3
    source, settings = start(folder, '--dropout=0.1', '--layer_kinds.G.attention_dropout=0.2')
    config = settings.architecture
    assert [layer.attention_dropout for layer in config.layers] == [0.1, 0.1, 0.2]
    windows = [layer.sliding_window for layer in config.layers]
    assert windows == [layer.sliding_window for layer in model.config.layers] == [1, 1, None]
    assert [layer.rope_theta for layer in config.layers] == [1e4, 1e4, 1e6]
    loaded = build_model(config, 'cpu').eval()
    loaded.load_state_dict(dict(source.checkpoint.weights(config)), strict=False)
    tokens = random_tokens(model.config, batch=2)
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize(
    ('flags', 'messages'),
    [
        (
            ['--layer_kinds.G.rope_theta=7'],
            [r'^in layers G: rope_theta=7.0 \(.*\) contradicts init_from=hf:.*, which has 1000000'],
        ),
        (['--norm_position=pre'], ["^norm_position='pre' .* contradicts .*, which has 'sandwich'"]),
        (
            ['--layer_pattern=LG'],
            ["^layer_pattern='LG' .* contradicts init_from=.*, which has 'LLG'. Remove layer_pat"],
        ),
        (['--layer_kinds.G.rope_scaling=yarn'], ["^rope_scaling='yarn' extends the context"]),
    ],
)
def test_layers_that_contradict_the_weights_are_refused(gemma3, flags, messages):
    with pytest.raises(UserError) as refusal:
        start(gemma3[1], *flags)
    problems = refusal.value.problems
    assert len(problems) == len(messages), problems
    for problem, message in zip(problems, messages):
        assert re.search(message, problem)


WINDOWS = {'sliding_window': 3, 'attention_pattern': 'LG'}


@pytest.mark.parametrize(
    ('flag', 'windows'),
    [
        ('sliding_window=5', {}),
        ('ffn_type=moe', {}),
        ('attention_pattern=LLG', WINDOWS),
        ('sliding_window=None', WINDOWS),
    ],
)
def test_only_what_was_set_is_named(flag, windows, tmp_path):
    """Not the defaults of the components that were chosen."""
    model = perturbed_model(tiny(arch_preset='qwen3', n_layer=4, **windows))
    interop.export(model.config, dict(model.named_parameters()), tmp_path / 'model')
    with pytest.raises(UserError) as refusal:
        start(tmp_path / 'model', f'--{flag}', '--vocab_size=256')
    (problem,) = refusal.value.problems
    assert problem.replace("'", '').startswith(f'{flag} (command line) contradicts init_from=hf:')


@pytest.mark.parametrize(('scaling', 'original'), [('yarn', 32), ('linear', None)])
def test_context_of_some_layers_is_extended(gemma3, scaling, original):
    flags = (f'--layer_kinds.G.rope_scaling={scaling}', '--block_size=64')
    _, settings = start(gemma3[1], *flags)
    local, _, wide = settings.architecture.layers
    assert local.rope_scaling == 'none'
    assert (wide.rope_scaling, wide.rope_scaling_factor) == (scaling, 2.0)
    assert wide.get('rope_original_block_size') == original
