"""common/architecture_identity.py: one identity for equal layers, also of records of version 1."""

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from common.architecture_identity import (
    HASH_VERSION,
    hash_of_values,
    identity_of_record,
    layers_of_short_forms,
)
from comparison.record_fields import MalformedRecord
from comparison.runs import _identity
from components.moe import MixtureOfExperts
from model_config import PRESETS, ModelArchitectureConfig

SIZES = {'n_layer': 6, 'n_head': 4, 'n_embd': 64, 'block_size': 32, 'vocab_size': 64}
WINDOWS = {'sliding_window': 8, 'attention_pattern': 'LLG'}
# The hashes of version 1, made with the last release that wrote it: without and with WINDOWS.
VERSION_1 = {
    'gpt2': ('967721aa6a15', '4a4b0e586609'),
    'llama': ('71daaa6c9ce6', '8d6b854daba0'),
    'team': ('71daaa6c9ce6', '8d6b854daba0'),
    'hybrid': ('be5028177d65', 'dff71c5be0c9'),
    'legacy': ('a6eeb63fd499', '7886a352679e'),
    'llama3': ('440b086c39dd', '589213dfc829'),
    'qwen3': ('10cd65024c2c', 'fabeae84449a'),
    'gemma2': ('1286ffc3aae9', 'f0dcf0cc97a4'),
    'olmo2': ('83a0cd99e85f', 'a38fca1bfd9a'),
    'mistral': ('314527ab27c1', 'a8fbdbed0c85'),
    'pythia': ('b90c46864d11', 'c6367e4e619e'),
    'mixtral': ('ea3882fb4b6d', '2003951bd05b'),
    'deepseek': ('85c4671bca99', '3e84d8cc54bc'),
    'speedrun': ('4b30bac361a8', 'a7d7276111ca'),
    'custom': ('a6eeb63fd499', '7886a352679e'),
}


def choices_of_version_1(config, **changes):
    """The choices in a record of version 1, as JSON has them."""
    choices = {key: value for key, value in config.to_dict().items() if key != 'layer_pattern'}
    return {**choices, **changes}


def as_pattern(config):
    """The same architecture with `layer_pattern` instead of the short forms."""
    values = config.to_dict()
    for key in ('attention_pattern', 'dense_layers', 'layer_pattern'):
        values.pop(key, None)
    letters = dict(zip(config.kinds, 'XYZW'))
    kinds = {}
    for letter, kind in config.kinds.items():
        own = {'sliding_window': kind.sliding_window, 'ffn_type': kind.ffn_type}
        kinds[letters[letter]] = {k: v for k, v in own.items() if kind.get(k) != config.get(k)}
    pattern = ''.join(letters[letter] for letter in config.layer_letters)
    return ModelArchitectureConfig.from_dict(
        {**values, 'layer_pattern': pattern, 'layer_kinds': kinds}
    )


@pytest.mark.parametrize('preset', VERSION_1)
@pytest.mark.parametrize('number', [0, 1], ids=['plain', 'windows'])
def test_hash_of_version_1_is_converted(preset, number):
    config = ModelArchitectureConfig(arch_preset=preset, **SIZES, **(WINDOWS if number else {}))
    stored, choices = VERSION_1[preset][number], choices_of_version_1(config)
    assert hash_of_values(choices) == stored  # the options are those of that release
    for backend in ('sdpa', 'flex'):  # whatever device the run was on
        record = {**choices, 'attention_backend': backend}
        assert identity_of_record(stored, 1, record) == config.hash
    if not config.is_uniform:
        assert as_pattern(config).hash == config.hash
    assert (config.hash == stored) == config.is_uniform
    # Equal hashes of different versions never match.
    assert identity_of_record(config.hash, HASH_VERSION, {}) == config.hash
    assert identity_of_record(config.hash, HASH_VERSION + 1, choices) != config.hash
    assert identity_of_record(config.hash, 1, {**choices, 'n_embd': 32}) != config.hash


def test_set_backend_is_part_of_the_identity():
    config = ModelArchitectureConfig(arch_preset='gemma2', **SIZES, attention_backend='flex')
    choices = choices_of_version_1(config)
    assert identity_of_record(hash_of_values(choices), 1, choices) == config.hash
    derived = ModelArchitectureConfig(arch_preset='gemma2', **SIZES)
    assert config.hash != derived.hash == derived.for_device('cuda').hash


def test_patterns_without_a_global_layer_have_one_identity():
    configs = [
        ModelArchitectureConfig(
            arch_preset='llama', **SIZES, sliding_window=8, attention_pattern=pattern
        )
        for pattern in ('L', 'LL', 'LLLLLLG')
    ]
    assert len({config.hash for config in configs}) == 1
    for config in configs:
        choices = choices_of_version_1(config)
        assert identity_of_record(hash_of_values(choices), 1, choices) == config.hash


def test_options_of_experts_are_those_of_the_component():
    config = ModelArchitectureConfig(arch_preset='deepseek', **SIZES)
    dense, *_ = layers_of_short_forms(choices_of_version_1(config))
    assert MixtureOfExperts.options.keys() - dense.keys() == (
        MixtureOfExperts.options.keys() - config.kinds['D'].to_dict().keys()
    )


@pytest.mark.parametrize(
    ('values', 'problem'),
    [
        ({'n_layer': 10**12}, 'n_layer is 1000000000000'),
        ({'n_layer': -1}, 'n_layer is -1'),
        ({'n_layer': 2.0}, 'n_layer is 2.0'),
        ({'n_layer': None}, 'n_layer is None'),
        ({'n_layer': [6]}, 'n_layer is'),
        ({'attention_pattern': ''}, "attention_pattern is ''"),
        ({'attention_pattern': 'LX' * 10**5}, 'attention_pattern is'),
        ({'attention_pattern': ['L']}, 'attention_pattern is'),
        ({'dense_layers': -1}, 'dense_layers is -1'),
        ({'dense_layers': '1'}, "dense_layers is '1'"),
        ({'dense_layers': 1, 'expert_ffn': None}, 'dense_layers is 1 with expert_ffn None'),
    ],
)
def test_malformed_choices_are_refused_with_their_key(values, problem):
    config = ModelArchitectureConfig(arch_preset='gemma2', **SIZES)
    choices = choices_of_version_1(config, **values)
    with pytest.raises(MalformedRecord) as raised:
        _identity({'hash': hash_of_values(choices), 'choices': choices})
    assert str(raised.value).startswith(problem) and len(str(raised.value)) < 120


def test_dense_layers_beyond_the_depth_are_all_layers():
    config = ModelArchitectureConfig(arch_preset='deepseek', **SIZES)
    layers = layers_of_short_forms(choices_of_version_1(config, dense_layers=10**12))
    assert [layer['ffn_type'] for layer in layers] == ['swiglu'] * 6


# --- Two ways of writing -------------------------------------------------------------------------

# Kinds of layers over a base, pairwise different.
KINDS = [
    {},
    {'sliding_window': 4},
    {'position_encoding': 'none'},
    {'n_head': 2},
    {'qk_norm': 'rmsnorm'},
    {'d_ff': 48},
    {'normalization': 'layernorm'},
    {'ffn_type': 'moe', 'num_experts': 4},
    {'ffn_type': 'moe', 'num_experts': 4, 'expert_d_ff': 24},
]
TABLES = st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=4)
TINY = {'arch_preset': 'llama', 'n_head': 4, 'n_embd': 32, 'block_size': 8, 'vocab_size': 16}


def written_out(table):
    """Every layer's letter, and every kind."""
    letters = 'ABCDEFGHI'
    kinds = {letters[kind]: KINDS[kind] for kind in table}
    pattern = ''.join(letters[kind] for kind in table)
    return {'n_layer': len(table), 'layer_pattern': pattern, 'layer_kinds': kinds}


def written_briefly(table):
    """Terms of one letter each, other letters, values that only repeat the model's, and the model's
    own options for the plain kind."""
    letters = 'zyxwvutsr'
    terms = ' '.join(f'{letters[kind]}*1' for kind in table[:-1])
    kinds = {letters[kind]: {'bias': False, **KINDS[kind]} for kind in table if kind}
    pattern = f'{terms} {letters[table[-1]]}*'.strip()
    return {'n_layer': len(table), 'layer_pattern': pattern, 'layer_kinds': kinds}


@settings(max_examples=5, derandomize=True, deadline=None, phases=[Phase.generate])
@given(TABLES, TABLES)
def test_hash_is_equal_exactly_if_layers_are(table, other):
    first = ModelArchitectureConfig(**TINY, **written_out(table))
    again = ModelArchitectureConfig(**TINY, **written_briefly(table))
    different = ModelArchitectureConfig(**TINY, **written_out(other))
    assert first.hash == again.hash == first.for_device('cuda').hash
    assert (first.hash == different.hash) == (table == other)
    assert ModelArchitectureConfig.from_dict(first.to_dict()).hash == first.hash
    if set(table) == {0}:
        assert first.hash == ModelArchitectureConfig(**TINY, n_layer=len(table)).hash


def test_order_of_layers_and_the_output_count():
    tables = [[0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 1], [0, 1], [1, 1], [0, 0]]
    configs = [ModelArchitectureConfig(**TINY, **written_out(table)) for table in tables]
    # The norm before the output head is the model's own.
    configs += [
        ModelArchitectureConfig(
            **TINY,
            n_layer=2,
            normalization=norm,
            layer_pattern='AB',
            layer_kinds={'A': {'normalization': 'rmsnorm'}, 'B': {'normalization': 'layernorm'}},
        )
        for norm in ('rmsnorm', 'layernorm')
    ]
    assert len({config.hash for config in configs}) == len(configs)


def test_presets_of_version_1_are_covered():
    assert VERSION_1.keys() <= PRESETS.keys()
