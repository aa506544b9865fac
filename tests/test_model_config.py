"""model_config.py: presets, overrides, options in use, derived values, name, hash."""

import functools
import re

import pytest
import torch
from helpers.project import PROJECT

import model_components  # noqa: F401  fills the registries for the parameters below
from common.errors import UserError
from common.registry import Registry
from components.faults import is_foreign
from configurator import Layer, flatten
from model_builder import build_model, training_flops
from model_config import (
    PRESETS,
    REGISTRIES,
    ModelArchitectureConfig,
    architecture_options,
)
from training_config import schema as training_schema

SMALL = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 16, 'vocab_size': 50}


def small(preset, **values):
    return ModelArchitectureConfig(arch_preset=preset, **{**SMALL, **values})


def resolve(*layers):
    """The config from {key: value} layers, lowest precedence first, and its problems."""
    problems = []
    named = [Layer(f'level {number}', values) for number, values in enumerate(layers, start=1)]
    return ModelArchitectureConfig.resolve(named, problems), problems


def test_repr_of_config_rebuilds_it():
    config = small('llama', d_ff=64)
    assert repr(config).startswith('ModelArchitectureConfig(\n    n_layer=2,\n    n_head=2,\n')
    assert eval(repr(config)) == config != small('llama')


def test_dir_of_config_lists_options_in_use():
    config = small('llama')
    assert {'d_ff', 'rope_theta', 'hash', 'replace'} <= set(dir(config))
    assert 'activation' not in dir(config)  # not used by SwiGLU


# --------------------------------------------------------------------------------------------------
# from_dict


@pytest.mark.parametrize('preset', PRESETS)
def test_from_dict_restores_config(preset):
    config = small(preset, vocab_size=64)
    again = ModelArchitectureConfig.from_dict(config.to_dict())
    assert again == config and hash(again) == hash(config) and again.hash == config.hash
    with_preset = {'arch_preset': preset, **config.to_dict()}  # as in a record
    assert ModelArchitectureConfig.from_dict(with_preset) == config


def test_from_dict_ignores_defaults_of_the_preset():
    assert ModelArchitectureConfig.from_dict(small('gpt2').to_dict()).norm_position == 'post'


def test_from_dict_fills_options_that_an_older_version_did_not_have():
    values = small('llama', z_loss=0.5).to_dict()
    del values['z_loss'], values['rope_fraction']
    config = ModelArchitectureConfig.from_dict(values)
    assert (config.z_loss, config.rope_fraction) == (0.0, 1.0)


@pytest.mark.parametrize(
    ('change', 'problem'),
    [
        ({'n_layers': 3}, "from_dict(): unknown option 'n_layers'. Did you mean n_layer?"),
        ({'n_layer': '3'}, "n_layer='3': str given, but n_layer takes int, at least 1"),
        ({'bias': 1}, 'bias=1: int given, but bias takes bool.'),
        ({'d_ff': 2.5}, 'd_ff=2.5: float given, but d_ff takes int or None, at least 1.'),
        ({'normalization': 'rmsnrm'}, 'Did you mean rmsnorm?'),
        ({'rope_fraction': 0.01}, 'Choose a fraction that gives an even number'),
        ({'activation': 'gelu'}, 'activation'),
        ({'n_embd': None, 'vocab_size': None}, 'n_embd=None'),
    ],
)
def test_from_dict_explains_wrong_values(change, problem):
    with pytest.raises(UserError) as raised:
        ModelArchitectureConfig.from_dict({**small('llama').to_dict(), **change})
    assert len(raised.value.problems) == 1 and problem in raised.value.problems[0]


def test_from_dict_names_missing_sizes_and_all_other_problems():
    with pytest.raises(UserError) as raised:
        ModelArchitectureConfig.from_dict({'n_layer': 2, 'n_head': 'x', 'depth': 1})
    unknown, missing = sorted(p for p in raised.value.problems if 'n_head=' not in p)[::-1]
    assert 'n_embd, block_size, vocab_size missing' in missing
    assert "unknown option 'depth'" in unknown and len(raised.value.problems) == 3


@pytest.mark.parametrize('values', [None, 3, 'n_layer=2', [('n_layer', 2)], {1: 2}])
def test_from_dict_takes_only_dicts_of_options(values):
    with pytest.raises(UserError, match=r'from_dict\(\) takes a dict, option -> value'):
        ModelArchitectureConfig.from_dict(values)


@pytest.mark.parametrize(
    ('values', 'problem'),
    [
        ({'n_layers': 3}, "unknown option 'n_layers'. Did you mean n_layer?"),
        ({'n_layer': '3'}, "n_layer='3': str given, but n_layer takes int, at least 1"),
        ({'arch_preset': 'lama'}, 'Did you mean llama?'),
    ],
)
def test_wrong_argument_of_config_is_explained(values, problem):
    with pytest.raises(UserError) as raised:
        ModelArchitectureConfig(**values)
    (message,) = raised.value.problems
    assert message.startswith('ModelArchitectureConfig(): ') and problem in message


# --------------------------------------------------------------------------------------------------
# Presets


@pytest.mark.parametrize(
    ('preset', 'name'),
    [
        # These names are in older records and must not change.
        ('gpt2', '12L-12H-768D-AbsPos-LN-NB-GELU-PostNorm'),
        ('llama', '12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm'),
        ('team', '12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm'),
        ('hybrid', '12L-12H-768D-RoPE-LN-NB-GELU-PreNorm'),
        ('legacy', '12L-12H-768D-AbsPos-LN-GELU-PreNorm'),
    ],
)
def test_names_of_the_presets(preset, name):
    assert ModelArchitectureConfig(arch_preset=preset).name == name


@pytest.mark.parametrize(
    ('preset', 'choices'),
    [
        ('gpt2', {'bias': False, 'weight_tying': True, 'd_ff': 3072}),
        ('llama', {'bias': False, 'weight_tying': False, 'd_ff': 2048}),
        ('team', {'bias': False, 'weight_tying': False, 'd_ff': 2048}),
        ('hybrid', {'bias': False, 'weight_tying': True, 'd_ff': 3072}),
        ('legacy', {'bias': True, 'weight_tying': True, 'd_ff': 3072}),
    ],
)
def test_defaults_of_presets(preset, choices):
    config = ModelArchitectureConfig(arch_preset=preset)
    assert {key: config.to_dict()[key] for key in choices} == choices
    sizes = (config.n_layer, config.n_head, config.n_embd, config.block_size, config.dropout)
    assert sizes == (12, 12, 768, 1024, 0.0)


@pytest.mark.parametrize('bias', [True, False])
def test_legacy_norm_bias_follows_bias(bias):
    names = build_model(small('legacy', bias=bias)).state_dict()
    assert any(name.endswith('norm.bias') for name in names) == bias
    assert any(name.endswith('.bias') for name in names) == bias


def test_explicit_norm_overrides_preset_rule():
    config = small('legacy', bias=False, normalization='layernorm')
    assert config.normalization == 'layernorm'


# --------------------------------------------------------------------------------------------------
# Every option of every preset changes the config, the hash and the model

NUMBERS = {
    'n_layer': 3,
    'n_head': 8,
    'n_embd': 64,
    'block_size': 24,
    'vocab_size': 60,
    'd_ff': 40,
    'dropout': 0.3,
    'attention_dropout': 0.3,
    'residual_dropout': 0.3,
    'norm_eps': 0.5,
    'rope_theta': 50.0,
    'rope_fraction': 0.5,
    'multiple_of': 64,
    'num_kv_heads': 1,
    'qkv_clip': 0.05,
    'logit_softcap': 0.1,
    'embedding_multiplier': 3.0,
    'logit_multiplier': 0.25,
    'z_loss': 0.1,
    'init_std': 0.1,
    'head_dim': 4,
    'value_head_dim': 5,
    'q_lora_rank': 5,
    'kv_lora_rank': 7,
    'qk_nope_head_dim': 3,
    'qk_rope_head_dim': 4,
    'v_head_dim': 5,
    'latent_norm_eps': 0.5,
    'query_scale_growth': 0.5,
    'qk_norm_scope': 'projection',
    'qk_norm_position': 'after_rotation',
    'attention_gate': 'head',
    'attention_gate_function': 'softplus',
    'value_residual': 'fixed',
    'attention_scale': 3.0,
    'attention_softcap': 0.001,
    'sliding_window': 3,
    'attention_chunk': 3,
    'attention_pattern': 'LG',
    'end_of_text': 7,
    'num_experts': 4,
    'experts_per_token': 3,
    'shared_experts': 2,
    'expert_d_ff': 24,
    'dense_layers': 0,
    'router_score': 'sigmoid',
    'router_scale': 2.0,
    'router_groups': 4,
    'expert_weights_at': 'input',
    'capacity_factor': 0.5,
    'load_balance_weight': 0.5,
    'router_z_loss': 0.5,
    'layer_pattern': 'AB',
    'canon': 'A',
}
# Options that must be set together with a value.
COMPANIONS = {
    ('use_gqa', True): {'num_kv_heads': 1},
    ('query_scale_growth', 0.5): {'query_scale_length': 2},
    # It commutes with a rotation if its weights are 1.
    ('qk_norm_position', 'after_rotation'): {'qk_norm': 'layernorm'},
    ('attention_backend', 'flex'): {'attention_dropout': 0.0},
    ('document_mask', True): {'end_of_text': 3},
    ('layer_pattern', 'AB'): {'layer_kinds': {'A': {'attention_scale': 2.0}}},
    ('attention_softcap', NUMBERS['attention_softcap']): {'attention_backend': 'manual'},
}
BASES = {
    **{preset: {} for preset in ('gpt2', 'llama', 'hybrid', 'legacy', 'custom')},
    'llama, grouped': {'n_head': 4, 'use_gqa': True, 'num_kv_heads': 2},
    'legacy, dropout': {'dropout': 0.2},
    'hybrid, windowed': {'sliding_window': 4, 'attention_backend': 'manual'},
    'llama, latent': {'attention_type': 'mla'},
    'llama, normed queries': {'qk_norm': 'rmsnorm'},
    'llama, moe': {'ffn_type': 'moe', 'shared_experts': 1, 'dense_layers': 1},
}


@functools.cache
def base_config(base):
    return small(base.partition(',')[0], **BASES[base])


def overrides():
    """(base, {key: value}) for every option of each base and every other value of a choice."""
    for base in BASES:
        values = base_config(base).to_dict()
        for key, option in architecture_options().items():
            if key not in values:
                continue
            if isinstance(option.choices, Registry):
                others = [name for name in option.choices if name != values[key]]
            elif option.base_type is bool:
                # None: as the model's `bias`.
                others = [not (values['bias'] if values[key] is None else values[key])]
            else:
                others = [NUMBERS[key]]
            for other in others:
                yield base, {key: other, **COMPANIONS.get((key, other), {})}


def model_and_outputs(config):
    """Properties of the built model that do not come from its config."""
    model = build_model(config, device='cpu', seed=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parameters = {name for name, _ in model.named_parameters()}  # tied parameters once
    tokens = torch.arange(24).reshape(2, 12) % 50
    torch.manual_seed(2)
    with torch.no_grad():
        logits = model.train()(tokens)
        _, _, auxiliary = model(tokens, tokens)
    attend = getattr(model.blocks[0].attention, 'attend', None)
    outputs = logits.tolist(), float(auxiliary.loss)
    return shapes, parameters, attend, outputs, training_flops(model)['per_token']


@functools.cache
def base_outputs(base):
    return model_and_outputs(base_config(base))


def test_equal_configs_build_equal_models():
    assert model_and_outputs(base_config('llama')) == base_outputs('llama')


@pytest.mark.slow
@pytest.mark.parametrize(
    ('base', 'values'), list(overrides()), ids=lambda value: str(value).replace("'", '')
)
def test_override_changes_config_hash_and_model(base, values):
    before = base_config(base)
    after, problems = resolve({'arch_preset': before.preset, **SMALL, **BASES[base]}, values)
    assert problems == [] and {key: after.to_dict()[key] for key in values} == values
    assert after.hash != before.hash
    assert model_and_outputs(after) != base_outputs(base)
    # `replace` gives the same, including derived values.
    assert before.replace(**values).to_dict() == after.to_dict()


# --------------------------------------------------------------------------------------------------
# The hash and the name


def test_hash_is_independent_of_spelling():
    configs = [
        small('llama', rope_theta=10000, dropout=0),
        small('llama', rope_theta=10000.0),
        small('llama', d_ff=88),  # the derived value
        small('team'),
        small('custom', **PRESETS['llama']),
    ]
    assert len({config.hash for config in configs}) == 1
    assert all(type(config.rope_theta) is float for config in configs)


def test_presets_have_distinct_names_and_hashes():
    configs = [small(preset) for preset in ('gpt2', 'llama', 'hybrid', 'legacy')]
    assert len({config.name for config in configs}) == 4
    assert len({config.hash for config in configs}) == 4


def test_name_shows_gqa_and_sizes():
    config = small('llama', use_gqa=True, num_kv_heads=1)
    assert config.name == '2L-2H-32D-MQA-RoPE-RMS-SwiGLU-PreNorm'


# --------------------------------------------------------------------------------------------------
# Merge and origins


def test_preset_is_below_every_layer():
    config, problems = resolve({'normalization': 'rmsnorm'}, {'arch_preset': 'gpt2'})
    assert problems == [] and config.preset == 'gpt2' and config.normalization == 'rmsnorm'
    config, problems = resolve({'arch_preset': 'gpt2', 'n_layer': 3}, {'arch_preset': 'llama'})
    assert problems == [] and (config.preset, config.ffn_type, config.n_layer) == (
        'llama',
        'swiglu',
        3,
    )


def test_origins_of_values():
    config, problems = resolve(
        {'arch_preset': 'llama', 'n_layer': 4, 'n_embd': 96},
        {'n_layer': 6, 'normalization': 'rmsnorm'},
    )
    assert problems == [] and config.origins.keys() == {'arch_preset', 'like', *config.to_dict()}
    expected = {
        'arch_preset': 'level 1',
        'n_layer': 'level 2',
        'n_embd': 'level 1',
        'normalization': 'level 2',  # the value of the preset
        'position_encoding': 'preset llama',
        'rope_theta': 'default',
        'd_ff': 'derived: default of swiglu',
    }
    assert {key: config.origins[key] for key in expected} == expected


def test_all_problems_are_reported():
    with pytest.raises(UserError) as refused:
        ModelArchitectureConfig(n_layers=2, n_layer=0, dropout=1.0, normalization='rms')
    problems = refused.value.problems
    assert len(problems) == 4
    for words in ('n_layers', 'n_layer=0', 'dropout=1.0', "normalization='rms'"):
        assert any(words in problem for problem in problems)


def test_all_illegal_combinations_are_reported():
    with pytest.raises(UserError) as refused:
        ModelArchitectureConfig(
            arch_preset='llama',
            n_embd=60,
            n_head=12,
            use_gqa=True,
            num_kv_heads=5,
            activation='gelu',
        )
    first, second, third = sorted(refused.value.problems)
    assert 'activation' in first and 'num_kv_heads=5' in second and 'odd' in third


# --------------------------------------------------------------------------------------------------
# Options that no chosen component uses


@pytest.mark.parametrize(
    ('levels', 'key', 'belongs_to'),
    [
        # The option is set without its choice, in the same layer as another choice, or above it.
        ([{'rope_theta': 5.0}], 'rope_theta', "position_encoding='rope'"),
        (
            [{'normalization': 'rmsnorm', 'rope_theta': 5.0}],
            'rope_theta',
            "position_encoding='rope'",
        ),
        ([{'arch_preset': 'gpt2', 'rope_theta': 5.0}], 'rope_theta', "position_encoding='rope'"),
        ([{'arch_preset': 'gpt2'}, {'rope_theta': 5.0}], 'rope_theta', "position_encoding='rope'"),
        ([{'arch_preset': 'llama'}, {'activation': 'relu'}], 'activation', "ffn_type='standard'"),
        ([{'ffn_type': 'swiglu', 'activation': 'relu'}], 'activation', "ffn_type='standard'"),
        ([{'ffn_type': 'swiglu'}, {'activation': 'relu'}], 'activation', "ffn_type='standard'"),
        ([{'num_kv_heads': 4}], 'num_kv_heads', 'use_gqa=True'),
        ([{'use_gqa': False, 'num_kv_heads': 4}], 'num_kv_heads', 'use_gqa=True'),
        ([{'multiple_of': 16}], 'multiple_of', "ffn_type='swiglu'"),
    ],
)
def test_unused_option_is_rejected_at_same_or_higher_layer(levels, key, belongs_to):
    config, problems = resolve(*levels)
    (problem,) = problems
    assert problem.startswith(f'{key}=') and 'no effect' in problem and belongs_to in problem
    assert f'level {len(levels)}' in problem  # where it was set
    assert key not in config


@pytest.mark.parametrize(
    ('levels', 'key'),
    [
        ([{'arch_preset': 'gpt2'}, {'ffn_type': 'swiglu'}], 'activation'),
        ([{'arch_preset': 'gpt2', 'ffn_type': 'swiglu'}], 'activation'),
        ([{'ffn_type': 'standard', 'activation': 'relu'}, {'ffn_type': 'swiglu'}], 'activation'),
        (
            [{'arch_preset': 'llama', 'rope_theta': 5.0}, {'position_encoding': 'none'}],
            'rope_theta',
        ),
        ([{'use_gqa': True, 'num_kv_heads': 4}, {'use_gqa': False}], 'num_kv_heads'),
        ([{'arch_preset': 'llama', 'rope_theta': 5.0}, {'arch_preset': 'gpt2'}], 'rope_theta'),
    ],
)
def test_override_drops_unused_option_with_note(levels, key):
    config, problems = resolve(*levels)
    assert problems == [] and key not in config
    (note,) = config.dropped
    assert 'dropped' in note and f'{key}=' in note


@pytest.mark.parametrize('gated', ['swiglu', 'geglu', 'reglu', 'glu', 'bilinear'])
def test_gated_activation_is_alias_of_ffn_type(gated):
    config, problems = resolve({'arch_preset': 'gpt2'}, {'activation': gated})
    assert problems == [] and config.ffn_type == gated and 'activation' not in config
    assert config.origins['ffn_type'] == f'level 2: activation={gated!r}'
    (note,) = config.dropped
    assert "activation='gelu' (preset gpt2)" in note
    assert config.hash == ModelArchitectureConfig(arch_preset='gpt2', ffn_type=gated).hash
    assert config.hash == ModelArchitectureConfig(arch_preset='gpt2', activation=gated).hash
    back, problems = resolve({'activation': gated}, {'ffn_type': 'standard'})
    assert problems == [] and (back.ffn_type, back.activation) == ('standard', 'gelu')


def test_contradicting_activation_and_ffn_type_are_rejected():
    _, problems = resolve({'activation': 'geglu', 'ffn_type': 'swiglu'})
    (problem,) = problems
    assert "activation='geglu' (level 1) means ffn_type='geglu'" in problem
    assert "contradicts ffn_type='swiglu'. Remove one of them." in problem
    _, problems = resolve({'activation': 'geglu', 'ffn_type': 'geglu'})
    assert problems == []


def test_restored_choice_keeps_its_options():
    levels = [{'arch_preset': 'llama', 'rope_theta': 5.0}, {'position_encoding': 'none'}]
    config, problems = resolve(*levels, {'position_encoding': 'rope'})
    assert problems == [] and config.dropped == [] and config.rope_theta == 5.0


# --------------------------------------------------------------------------------------------------
# Derived values


def nearest_multiple(number, multiple):
    return min(range(multiple, int(number) + 2 * multiple, multiple), key=lambda m: abs(m - number))


@pytest.mark.parametrize(('n_embd', 'd_ff'), [(768, 2048), (64, 168), (1536, 4096), (2, 8)])
def test_swiglu_default_width(n_embd, d_ff):
    assert (
        small('llama', n_embd=n_embd, n_head=1).d_ff == d_ff == nearest_multiple(8 * n_embd / 3, 8)
    )


@pytest.mark.parametrize('multiple', [1, 8, 64, 256])
@pytest.mark.parametrize('n_embd', [32, 100, 768, 1000])
def test_multiple_of_rounds_derived_width(n_embd, multiple):
    config = small('llama', n_embd=n_embd, multiple_of=multiple)
    assert config.d_ff == nearest_multiple(8 * n_embd / 3, multiple)
    assert small('llama', n_embd=n_embd, multiple_of=multiple, d_ff=77).d_ff == 77


def test_derived_values_follow_merged_values():
    config, problems = resolve(
        {'arch_preset': 'llama', 'dropout': 0.1},
        {'n_embd': 384, 'ffn_type': 'standard', 'dropout': 0.2, 'residual_dropout': 0.3},
    )
    assert problems == [] and config.d_ff == 4 * 384
    assert (config.attention_dropout, config.residual_dropout) == (0.2, 0.3)


# --------------------------------------------------------------------------------------------------
# replace


def test_replace_derives_again():
    config = ModelArchitectureConfig(arch_preset='llama', dropout=0.1)
    before = config.to_dict()
    wider = config.replace(n_embd=384, dropout=0.2)
    assert (wider.d_ff, wider.attention_dropout, wider.residual_dropout) == (1024, 0.2, 0.2)
    assert (wider.preset, wider.dropout, wider.ffn_type) == ('llama', 0.2, 'swiglu')
    assert config.to_dict() == before
    assert config.replace(d_ff=500).replace(n_embd=384).d_ff == 500  # set explicitly, so it stays
    assert wider.origins['n_embd'] == 'replace()' and wider.origins['d_ff'].startswith('derived: ')


def test_replace_follows_preset_rules():
    assert small('legacy').replace(bias=False).normalization == 'layernorm_nobias'
    assert (
        small('legacy', n_layer=1).replace(arch_preset='llama').hash
        == small('llama', n_layer=1).hash
    )


def test_replace_drops_unused_options():
    changed = small('llama', rope_theta=5.0).replace(position_encoding='learned_absolute')
    assert 'rope_theta' not in changed
    (note,) = changed.dropped
    assert changed.replace(n_layer=1).dropped == [note]  # the note is kept


@pytest.mark.parametrize(
    'values',
    [{'n_layers': 3}, {'n_layer': '3'}, {'n_layer': 0}, {'n_head': 3}, {'activation': 'gelu'}],
)
def test_replace_checks_values(values):
    with pytest.raises(UserError):
        small('llama').replace(**values)
    with pytest.raises(UserError):
        small('llama', **values)


def test_config_is_frozen():
    config = small('llama')
    for key in ('n_layer', 'new', 'preset'):
        with pytest.raises(AttributeError, match='frozen'):
            setattr(config, key, 1)
    config.to_dict()['n_layer'] = 99
    assert config.n_layer == 2


# --------------------------------------------------------------------------------------------------
# config/arch_custom.py


def test_custom_config_file_lists_all_choices():
    text = (PROJECT / 'config/arch_custom.py').read_text(encoding='utf-8')
    options = flatten(training_schema())
    listed, right = {}, {}
    for comment, key in re.findall(r'((?:^# .*\n)+)(\w+) = ', text, re.MULTILINE):
        if isinstance(options[key].choices, Registry):
            registry = options[key].choices
            listed[key] = comment.rstrip().replace('\n#', '')
            names = [name for name in registry if not is_foreign(registry[name])]
            right[key] = f'# {", ".join(names)}'
    assert listed.keys() >= {r.option for r in REGISTRIES} - {'rope_scaling', 'mixer_backend'}
    assert listed == right, 'config/arch_custom.py needs these comments:\n' + '\n'.join(
        f'{comment}\n{key} = …' for key, comment in right.items()
    )
