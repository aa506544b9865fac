"""Families whose layers are of several kinds: how a config.json names them."""

import contextlib
import re

import pytest
import torch
from helpers import transformers_models as reference
from helpers.architectures import perturbed_model, random_tokens, tiny

import interop
from common.errors import UserError
from configurator import read_command_line
from interop.fields import Fields
from interop.layer_kinds import (
    LayerKind,
    layer_kinds_field,
    named_by_default,
    named_by_index,
    named_by_letters,
    named_by_list,
    named_by_position,
)
from interop.layers import ABSENT
from interop.mapping import field
from interop.tensors import CONVOLUTION, tensor
from model_builder import build_model
from model_config import MIXER_REGISTRY, architecture_options
from training_config import load_settings, schema

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]

ATTENTION, FFN, EXPERTS = 'full_attention', 'mlp', 'moe'
NEMOTRON_H = {
    'model_type': 'nemotron_h',
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 12,
    'hidden_size': 32,
    'intermediate_size': 48,
    'max_position_embeddings': 16,
    'n_routed_experts': 4,
    'moe_intermediate_size': 16,
    'moe_shared_expert_intermediate_size': 32,
}
CASES = {
    'nemotron_h': (
        {**NEMOTRON_H, 'layers_block_type': [ATTENTION, FFN, EXPERTS, ATTENTION]},
        'AFEA',
    ),
    'nemotron_h-biases': (
        {**NEMOTRON_H, 'layers_block_type': [FFN, ATTENTION, FFN], 'mlp_bias': True},
        'FAF',
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_logits_gradients_and_texts_are_those_of_transformers(name, tmp_path):
    reference.assert_parity(*CASES[name], tmp_path)


# --- Names of the layers --------------------------------------------------------------------------

KINDS = {
    'rec': LayerKind({'mixer': 'none'}, (field('d_ff', 'width', 5),)),
    'attn': LayerKind({'mixer': 'attention'}, (field('head_dim', 'head_dim', 8),)),
}
FORMS = {
    'list': named_by_list('types', {'attention': 'attn'}),
    'letters': named_by_letters('pattern', {'r': 'rec', '*': 'attn'}),
    'index': named_by_index('attn_layers', 'attn', 'rec', first=1),
    'position': named_by_position('period', 3, 'attn', 'rec', offset='offset', start=1),
    'last': named_by_position('interval', 2, 'attn', 'rec'),
}


def read(forms, values: dict, **details) -> tuple[dict, list[str]]:
    problems: list[str] = []
    field_map = layer_kinds_field(*forms, kinds=KINDS, **details)
    fields = Fields(values, problems, architecture_options())
    options = field_map.read(fields)
    assert fields.unread <= {'num_hidden_layers'}
    return options, problems


@pytest.mark.parametrize(
    'form, values, expected',
    [
        ('list', {'types': ['rec', 'attn', 'attention', 'rec']}, 'raar'),
        ('letters', {'pattern': 'r**r'}, 'raar'),
        ('index', {'attn_layers': [2, 4]}, 'rara'),
        ('index', {}, 'rrrr'),
        ('position', {}, 'rarr'),
        ('position', {'period': 2, 'offset': 0}, 'arar'),
        ('last', {}, 'rara'),
        ('last', {'interval': 4}, 'rrra'),
    ],
)
def test_kinds_are_read_and_written_in_each_form(form, values, expected):
    options, problems = read([FORMS[form]], {'num_hidden_layers': 4, **values})
    assert problems == []
    assert [m[:1] for m in options['mixer']] == ['n' if kind == 'r' else 'a' for kind in expected]
    names = ['rec' if kind == 'r' else 'attn' for kind in expected]
    again = FORMS[form].write(names)
    assert read([FORMS[form]], {'num_hidden_layers': 4, **again})[0] == options


def test_options_of_a_kind_are_read_into_its_layers_alone():
    values = {'num_hidden_layers': 3, 'types': ['rec', 'attn', 'rec'], 'width': 7}
    options, _ = read([FORMS['list']], values)
    assert options['d_ff'] == (7, ABSENT, 7) and options['head_dim'] == (ABSENT, 8, ABSENT)
    # Fields of a kind that no layer has are neither used nor refused.
    options, problems = read([FORMS['list']], {'types': ['rec'] * 3, 'head_dim': 'auto'})
    assert problems == ["types=['rec', 'rec', 'rec']: has 3 entries for 0 layers."]
    assert 'head_dim' not in options


def test_names_may_give_the_number_of_layers():
    forms = [FORMS['list'], FORMS['letters']]
    assert read(forms, {'pattern': 'r*r'}, depth_follows=True)[0]['n_layer'] == 3
    _, problems = read(forms, {'pattern': 'r*r', 'num_hidden_layers': 4}, depth_follows=True)
    assert problems == ["pattern='r*r': has 3 letters for 4 layers."]


@pytest.mark.parametrize(
    'values, message',
    [
        (
            {'types': ['rec', 'attn'], 'interval': 1},
            'types and interval contradict each other: delete one of them.',
        ),
        ({'types': ['rec', 'rnn']}, "types: 'rnn' is not supported; supported: 'rec', 'attn'."),
        ({'types': ['rec']}, "types=['rec']: has 1 entries for 2 layers."),
        ({'types': 'ra'}, "types='ra': must be a list of texts or null."),
        ({'interval': 0}, 'interval=0: must be at least 1.'),
    ],
)
def test_refused_names(values, message):
    _, problems = read([FORMS['list'], FORMS['last']], {'num_hidden_layers': 2, **values})
    assert problems[0] == message


def test_refused_places():
    read_index = read([FORMS['index']], {'num_hidden_layers': 2, 'attn_layers': [0]})[1]
    assert read_index == ['attn_layers=[0]: must be layers from 1 to 2.']
    read_place = read([FORMS['position']], {'num_hidden_layers': 2, 'offset': 3})[1]
    assert read_place == ['offset=3: must be from 0 to 2, below period.']
    default = [FORMS['list'], named_by_default(lambda layers: ['rec'] * layers)]
    assert read(default, {'num_hidden_layers': 2})[0]['mixer'] == ('none', 'none')


# --- Tensors --------------------------------------------------------------------------------------


def test_layout_of_a_convolution():
    convolution = tensor('conv.weight', layout=CONVOLUTION)
    theirs = torch.arange(6.0).view(3, 1, 2)
    ours = convolution.read([theirs], None)
    assert torch.equal(ours, theirs[:, 0])
    (part,) = convolution.write(ours, None)
    assert torch.equal(part, theirs)


# --- Refused --------------------------------------------------------------------------------------

HYBRIDS = {
    "mixer='none' in layers F": {
        'n_layer': 2,
        'layer_pattern': 'FA',
        'layer_kinds': {'F': {'mixer': 'none'}},
    },
    "ffn_type='none'": {'ffn_type': 'none', 'norm_position': 'post'},
}


@pytest.mark.parametrize('message', HYBRIDS)
def test_hybrids_that_no_family_can_express_are_named(message):
    with pytest.raises(UserError, match=message):
        interop.convert_config(tiny(arch_preset='llama', **HYBRIDS[message]))


@pytest.mark.parametrize(
    ('preset', 'change'),
    [
        ('qwen3_next', {'attention_gate': 'none'}),
        ('qwen3_next', {'shared_gate': False}),
        ('kimi_linear', {'latent_norm_eps': None}),
        ('lfm2', {'canon': 'A'}),
    ],
)
def test_options_that_a_family_fixes_are_compared(preset, change):
    """Also those whose value is the one of runs from before the option."""
    interop.convert_config(tiny(arch_preset=preset, n_layer=4))
    ((key, value),) = change.items()
    with pytest.raises(UserError, match=re.escape(f'{key}={value!r}')):
        interop.convert_config(tiny(arch_preset=preset, n_layer=4, **change))


def test_every_mixer_is_exported_or_refused():
    alone = [name for name in MIXER_REGISTRY if name != 'none']
    joined = [f'attention+{name}' for name in alone if f'attention+{name}' in MIXER_REGISTRY]
    for number, mixer in enumerate([*alone, *joined]):
        config = tiny(
            arch_preset='llama',
            mixer=mixer,
            ffn_type=('swiglu', 'moe', 'none')[number % 3],
            norm_position=('pre', 'reordered')[number % 2],
        )
        with contextlib.suppress(UserError):  # other errors are mistakes of a family
            interop.convert_config(config)


# --- Training from pretrained weights -------------------------------------------------------------


def start(folder, *flags: str):
    """The source and the architecture of a run with these weights, checked."""
    arguments = read_command_line([f'--init_from=hf:{folder}', '--device=cpu', *flags], schema)
    source = interop.find_pretrained(arguments)
    settings = load_settings(arguments)
    source.check(settings)
    return source, settings.architecture


@pytest.fixture(scope='module', params=['qwen3_next', 'kimi_linear', 'lfm2'])
def hybrid(request, tmp_path_factory):
    """A hybrid of ours, and the folder of its export."""
    folder = tmp_path_factory.mktemp('hybrid') / 'model'
    sizes = {'n_layer': 4, 'block_size': 32, 'vocab_size': 256}
    model = perturbed_model(tiny(arch_preset=request.param, **sizes)).eval()
    interop.export(model.config, dict(model.named_parameters()), folder)
    return model, folder


def test_run_has_the_mixers_of_the_weights(hybrid):
    model, folder = hybrid
    source, config = start(folder, '--document_mask', '--end_of_text=0', '--dropout=0.1')
    assert [layer.mixer for layer in config.layers] == [x.mixer for x in model.config.layers]
    assert all(layer.document_mask for layer in config.layers)
    loaded = build_model(config, 'cpu').eval()
    loaded.load_state_dict(dict(source.checkpoint.weights(config)), strict=False)
    tokens = random_tokens(model.config, batch=2).clamp(min=1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens), model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('flag', ['mixer', 'layer_kinds.{}.mixer'])
def test_another_mixer_contradicts_the_weights(hybrid, flag):
    letter = interop.open_checkpoint(f'hf:{hybrid[1]}').config.layer_letters[1]
    with pytest.raises(UserError) as refusal:
        start(hybrid[1], f'--{flag.format(letter)}=rg_lru')
    (problem,) = refusal.value.problems
    assert re.search(r"mixer='rg_lru' \(command line\) contradicts init_from=hf:.*, which", problem)
