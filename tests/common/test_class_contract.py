"""What a registry takes: one sentence names the class, the method or attribute, what is expected.

And the tags of custom components in the name of an architecture.
"""

import re
from typing import ClassVar

import pytest
import torch
import torch.nn as nn
from helpers.architectures import tiny

from common.errors import UserError
from common.registry import Option, at_least
from model_components import (
    Activation,
    Attention,
    Block,
    Component,
    FeedForward,
    Mixer,
    MultiHeadAttention,
    Norm,
    PositionEncoding,
)
from model_config import (
    ACTIVATION_REGISTRY,
    ATTENTION_BACKEND_REGISTRY,
    ATTENTION_REGISTRY,
    FFN_REGISTRY,
    INITIALIZATION_REGISTRY,
    MIXER_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    REGISTRIES,
    ROPE_SCALING_REGISTRY,
)
from optim import optimizers
from optim.schedules import Schedule
from training_config import OPTIMIZER_REGISTRY, SCHEDULE_REGISTRY

ALL = (*REGISTRIES, OPTIMIZER_REGISTRY, SCHEDULE_REGISTRY)


def activation(**attributes) -> type:
    """An activation called Own."""
    return type('Own', (Activation,), {'forward': lambda self, x: x, **attributes})


def test_mixer_whose_name_would_join_two_is_refused(register):
    mixer = type('Own', (Mixer,), {'forward': lambda self, x, attn_inputs: x})
    with pytest.raises(UserError, match=r"mixer='a[+]b': the name .* cannot contain '[+]'.*'a_b'"):
        register(MIXER_REGISTRY, 'a+b', mixer)


def test_each_problem_is_said_once(register):
    with pytest.raises(UserError) as refused:
        register(MIXER_REGISTRY, 'own', type('Own', (Mixer,), {'forward': lambda self, x: x}))
    assert str(refused.value).count('Own.forward must be') == 1


# --- The class ------------------------------------------------------------------------------------


@pytest.mark.parametrize('registry', ALL, ids=lambda registry: registry.option)
def test_registries_reject_non_components(register, registry):
    class Plain(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(UserError, match=f"{registry.option}='mine': Plain must be a subclass of"):
        register(registry, 'mine', Plain)
    with pytest.raises(UserError, match='must be a subclass of'):
        register(registry, 'mine', lambda config: None)


@pytest.mark.parametrize('registry', ALL, ids=lambda registry: registry.option)
def test_project_components_meet_their_contracts(register, registry):
    for name in list(registry):
        if registry[name].__module__.startswith('components.'):
            register(registry, name, registry[name])


@pytest.mark.parametrize(
    ('attributes', 'expected'),
    [
        ({'tag': 3}, 'Own.tag must be str, but is 3'),
        ({'tag': None}, 'Own.tag must be str, but is None'),
        ({'part': 1.5}, 'Own.part must be str or None, but is 1.5'),
        ({'cacheable': 'yes'}, "Own.cacheable must be bool, but is 'yes'"),
        ({'options': ['slope']}, "Own.options must be dict, but is ['slope']"),
        ({'options': {'slope': 1.0}}, "Own.options: 'slope' must be an Option"),
        ({'options': {'a b': Option(int, 1, '')}}, "Own.options: 'a b' must be a name"),
        ({'options': {'n': Option(list, [], '')}}, "the type of 'n' must be int, float"),
        ({'options': {'n': Option(int, None, '')}}, 'its default is not allowed: n=None'),
        ({'options': {'n': Option(int, 0, '', check=at_least(1))}}, 'at least 1'),
        (
            {'options': {'n': Option(int, 1, '', check='positive')}},
            "the check or the choices of 'n'",
        ),
        ({'forward': None}, 'Own must define forward(x)'),
        ({'forward': lambda self: None}, 'Own.forward must be forward(self, x): too many'),
        ({'__init__': lambda self: None}, 'Own.__init__ must be __init__(self, config): too many'),
        ({'name_tag': lambda self, config: 'x'}, 'must be name_tag(config) (classmethod): missing'),
        ({'problems': []}, 'Own.problems must be problems(config) (classmethod), but is []'),
        ({'flops': lambda self: {}}, 'Own.flops must be flops(self, seq_len, causal): too many'),
        ({'initial_values': {}}, 'Own.initial_values must be initial_values(self), but is {}'),
    ],
)
def test_faulty_class_is_rejected_at_registration(register, attributes, expected):
    with pytest.raises(UserError) as refused:
        register(ACTIVATION_REGISTRY, 'mine', activation(**attributes))
    assert "activation='mine': " in str(refused.value) and expected in str(refused.value)


@pytest.mark.parametrize(
    ('registry', 'base', 'expected'),
    [
        (ACTIVATION_REGISTRY, Activation, 'Own must define forward(x)'),
        (NORM_REGISTRY, Norm, 'Own must define forward(x)'),
        (ATTENTION_REGISTRY, Attention, 'Own must define head_dims(config)'),
        (ATTENTION_REGISTRY, Attention, 'Own must define forward(x, attn_inputs)'),
        (FFN_REGISTRY, FeedForward, 'Own must define forward(x)'),
        (NORM_POSITION_REGISTRY, Block, 'Own must define forward(x, attn_inputs)'),
        (SCHEDULE_REGISTRY, Schedule, 'Own must define learning_rate(iteration, run)'),
    ],
)
def test_class_without_required_method_is_rejected(register, registry, base, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        register(registry, 'mine', type('Own', (base,), {}))


@pytest.mark.parametrize(
    ('registry', 'base', 'attributes', 'expected'),
    [
        (
            ATTENTION_BACKEND_REGISTRY,
            'manual',
            {'supports': ['bias']},
            'Own.supports must be frozenset',
        ),
        (POSITION_ENCODING_REGISTRY, 'rope', {'has_bias': 1}, 'Own.has_bias must be bool'),
        (
            POSITION_ENCODING_REGISTRY,
            'rope',
            {'rotate': lambda self, x, rotation: x},
            'Own.rotate must be rotate(x, rotation) (staticmethod)',
        ),
        (INITIALIZATION_REGISTRY, 'gpt2', {'std': 0.02}, 'Own.std must be std(config, hidden'),
        (ROPE_SCALING_REGISTRY, 'linear', {'scaled': lambda: 1}, 'Own.scaled must be scaled('),
        (NORM_POSITION_REGISTRY, 'pre', {'norms': ('a',)}, 'Own.norms must be norms(config)'),
        (OPTIMIZER_REGISTRY, 'lion', {'state_keys': ()}, 'Own.state_keys must be state_keys('),
        (SCHEDULE_REGISTRY, 'cosine', {'learning_rate': 1e-3}, 'Own.learning_rate must be'),
    ],
)
def test_registries_check_methods_and_attributes(register, registry, base, attributes, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        register(registry, 'mine', type('Own', (registry[base],), attributes))


def test_component_may_have_fewer_bases(register):
    class Identity(Component, nn.Module):
        def __init__(self, config, width):
            super().__init__()

        def forward(self, x):
            return x

    class Sgd(optimizers.OptimizerComponent, torch.optim.SGD):
        options: ClassVar = {}

        def __init__(self, groups, run, parallel):
            super().__init__(optimizers.torch_groups(groups, run, parallel, 'SGD'), lr=0.0)

        def state_keys(self, parameter):
            return frozenset()

    register(NORM_REGISTRY, 'identity', Identity)
    register(OPTIMIZER_REGISTRY, 'sgd', Sgd)
    assert NORM_REGISTRY['identity'] is Identity and OPTIMIZER_REGISTRY['sgd'] is Sgd


# --- What it returns to the configuration ---------------------------------------------------------


@pytest.mark.parametrize(
    ('method', 'returned', 'expected'),
    [
        ('problems', 'none of them', 'Own.problems must return a list of strings'),
        ('problems', None, 'Own.problems must return a list of strings'),
        ('derived_values', {'d_ff': 8}, 'Own.derived_values(config) must return a dict'),
        ('derived_values', None, 'Own.derived_values(config) must return a dict'),
        ('name_tag', None, 'Own.name_tag(config) must return a string'),
    ],
)
def test_wrong_configuration_answer_names_class_and_method(register, method, returned, expected):
    own = activation(**{method: classmethod(lambda cls, config: returned)})
    register(ACTIVATION_REGISTRY, 'mine', own)
    with pytest.raises(UserError, match=re.escape(expected)):
        assert tiny(activation='mine').name


# --- Names ----------------------------------------------------------------------------------------


def name_with(register, registry, base: type, **attributes) -> str:
    own = type('Own', (base,), attributes)
    register(registry, 'mine', own)
    return tiny(**{registry.option: 'mine'}).name


BASES = {
    ATTENTION_REGISTRY: MultiHeadAttention,
    ATTENTION_BACKEND_REGISTRY: 'manual',
    POSITION_ENCODING_REGISTRY: PositionEncoding,
    NORM_REGISTRY: 'rmsnorm',
    FFN_REGISTRY: 'standard',
    NORM_POSITION_REGISTRY: 'pre',
    INITIALIZATION_REGISTRY: 'gpt2',
    ACTIVATION_REGISTRY: 'gelu',
}


@pytest.mark.parametrize('registry', BASES, ids=lambda registry: registry.option)
def test_name_uses_tag_or_registered_name(register, registry):
    base = BASES[registry]
    base = registry[base] if isinstance(base, str) else base
    assert 'Mine' in name_with(register, registry, base, tag='Mine').split('-')
    assert 'mine' in name_with(register, registry, base).split('-')
    # What is derived from one that stands in the name is not taken for it.
    assert not base.tag or base.tag not in name_with(register, registry, base).split('-')


def test_attention_tag_precedes_details(register):
    register(ATTENTION_REGISTRY, 'mine', type('Own', (MultiHeadAttention,), {'tag': 'Mine'}))
    name = tiny(attention_type='mine', use_gqa=True, num_kv_heads=2, sliding_window=3).name
    assert '-Mine-GQA2-SW3-' in name


def test_empty_tag_is_allowed(register):
    same = name_with(register, ATTENTION_REGISTRY, MultiHeadAttention, tag='')
    assert same == tiny().name


def test_preset_names_match_old_records():
    expected = {
        'gpt2': '2L-4H-16D-AbsPos-LN-NB-GELU-PostNorm',
        'llama': '2L-4H-16D-RoPE-RMS-SwiGLU-PreNorm',
        'qwen3': '2L-4H-16D-HD128-GQA2-QKRMS-RoPE-RMS-SwiGLU-PreNorm',
        'deepseek': '2L-4H-16D-MLA4-4x2x4-RoPE-RMS-MoE6of32+2-SwiGLU-PreNorm',
        'pythia': '2L-4H-16D-RoPE0.25-LN-GELU-Parallel',
    }
    sizes = {'n_layer': 2, 'n_head': 4, 'n_embd': 16}
    fits = {'pythia': {'rope_fraction': 0.5}}
    for preset, name in expected.items():
        config = tiny(arch_preset=preset, **sizes, **fits.get(preset, {}))
        assert config.name == name.replace('RoPE0.25', 'RoPE0.5'), preset
