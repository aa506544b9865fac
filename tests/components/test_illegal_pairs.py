"""Every known illegal combination is rejected with one sentence before any allocation."""

import pytest

from common.registry import Configurable, Registry
from configurator import Layer
from model_config import ModelArchitectureConfig, architecture_options

MLA = {'attention_type': 'mla'}
ROPE = {'position_encoding': 'rope'}
MOE = {'ffn_type': 'moe'}
# Options, and words that the sentence must contain: keys, values, what is allowed, what to type.
# The sizes are the defaults, 12 heads and n_embd 768, unless given.
ILLEGAL = [
    ({'n_embd': 100}, ['n_head=12', 'n_embd=100', '--n_head=10', 'head_dim']),
    ({'use_gqa': True}, ['num_kv_heads=None', '1, 2, 3, 4, 6, 12']),
    ({'use_gqa': True, 'num_kv_heads': 5}, ['num_kv_heads=5', '1, 2, 3, 4, 6, 12']),
    ({'use_gqa': True, 'num_kv_heads': 24}, ['num_kv_heads=24', 'n_head=12']),
    (
        {'attention_softcap': 50.0, 'attention_backend': 'sdpa'},
        ["attention_backend='sdpa'", 'softcap', 'manual, flex'],
    ),
    ({'attention_backend': 'flex', 'attention_dropout': 0.1}, ['dropout', 'sdpa, manual']),
    ({'attention_pattern': 'LG'}, ['attention_pattern', 'sliding_window']),
    ({'qk_norm_scope': 'projection'}, ['qk_norm_scope', "qk_norm other than 'none'"]),
    (MLA | {'n_embd': 100}, ['n_head=12', 'n_embd=100', '--n_head=10', 'qk_nope_head_dim']),
    (MLA | {'use_gqa': True}, ['use_gqa', "attention_type='standard'"]),
    (MLA | {'qk_norm': 'rmsnorm'}, ['qk_norm', "attention_type='standard'"]),
    (MLA | ROPE | {'qk_rope_head_dim': 5}, ['rope', 'head dimension 5']),
    ({'kv_lora_rank': 4}, ['kv_lora_rank', "attention_type='mla'"]),
    ({'position_encoding': 'sinusoidal', 'n_embd': 5, 'n_head': 1}, ['n_embd=5', 'odd']),
    ({**ROPE, 'n_embd': 36}, ['rope', 'head dimension 3']),
    # Rounded up: 0.181818 · 22 is less than 4.
    ({**ROPE, 'rope_fraction': 0.25, 'head_dim': 22}, ['rope_fraction=0.25', 'such as 0.181819']),
    ({**ROPE, 'rope_fraction': 0.3}, ['rope_fraction=0.3', 'head of 64', 'such as 0.28125']),
    (
        {**ROPE, 'rope_fraction': 0.75, 'n_embd': 48},
        ['rope_fraction=0.75', 'head of 4', 'such as 0.5'],
    ),
    (
        {**ROPE, 'rope_scaling': 'llama3', 'rope_low_freq_factor': 4.0},
        ['rope_low_freq_factor=4', 'below rope_high_freq_factor=4'],
    ),
    (
        {**ROPE, 'rope_scaling': 'yarn', 'rope_beta_slow': 33.0},
        ['rope_beta_slow=33', 'below rope_beta_fast=32'],
    ),
    ({**ROPE, 'rope_scaling': 'yarn', 'rope_theta': 1.0}, ['rope_theta=1', 'above 1']),
    (
        {**ROPE, 'rope_scaling': 'longrope', 'rope_long_factors': '1,2,3'},
        ['rope_long_factors has 3 numbers', '32 pairs'],
    ),
    (
        {'mixer': 'deltanet', 'mixer_backend': 'mamba_ssm'},
        ["mixer_backend='mamba_ssm'", "mixer='deltanet'", '--mixer_backend=torch or fla'],
    ),
    (
        {'position_encoding': 't5_relative', 't5_buckets': 64, 't5_max_distance': 32},
        ['t5_max_distance=32', 't5_buckets=64', '--t5_max_distance=256'],
    ),
    ({'mixer': 'none', 'ffn_type': 'none'}, ['Choose a mixer', 'FFN']),
    (
        {'mixer': 'gated_deltanet', 'gdn_heads': 4, 'gdn_value_heads': 6},
        ['gdn_value_heads=6', 'gdn_heads=4', '--gdn_value_heads=8'],
    ),
    (
        {'mixer': 'mamba2', 'mamba2_width': 96, 'mamba2_head_dim': 36},
        ['mamba2_head_dim=36', 'mamba2_width=96', 'such as 32'],
    ),
    (
        {'mixer': 'mamba', 'mamba_norm': 'weighted', 'mamba_dt_rank': 1},
        ["mamba_norm='weighted'", 'mamba_dt_rank=1', '--mamba_dt_rank=2'],
    ),
    (
        {'mixer': 'rg_lru', 'rg_lru_width': 96, 'rg_lru_heads': 7},
        ['rg_lru_heads=7', 'rg_lru_width=96', '--rg_lru_heads=6'],
    ),
    (
        {'mixer': 'linear_attention', 'linear_feature_map': 'silu'},
        ["linear_feature_map='silu'", '--linear_feature_map=elu'],
    ),
    ({'mixer': 'retnet', 'retnet_key_dim': 3}, ['retnet_key_dim=3', '--retnet_rotation=False']),
    ({**MOE, 'experts_per_token': 9}, ['num_experts=8', '--experts_per_token=8']),
    ({**MOE, 'experts_per_token': 1}, ['router_normalize=True', '--router_normalize=False']),
    ({**MOE, 'dense_layers': 12}, ['dense_layers=12', 'n_layer=12', "ffn_type='swiglu'"]),
    ({**MOE, 'n_embd': 12, 'd_ff': 32}, ['n_embd=12', 'multiple of 8', '--n_embd=16']),
    ({**MOE, 'expert_d_ff': 20}, ['expert_d_ff=20', 'multiple of 8', '--expert_d_ff=24']),
    (MLA | {'canon': 'ABC'}, ["canon='ABC'", "attention_type='mla'", '--canon=AC']),
    ({'activation': 'geglu', 'ffn_type': 'swiglu'}, ["ffn_type='geglu'", "ffn_type='swiglu'"]),
]


def resolve(values):
    problems = []
    layer = Layer('argument', {'arch_preset': 'custom', **values})
    return ModelArchitectureConfig.resolve([layer], problems), problems


@pytest.mark.parametrize(('values', 'words'), ILLEGAL, ids=lambda value: str(value)[:60])
def test_illegal_combination_gives_one_sentence(values, words):
    _, problems = resolve(values)
    (problem,) = problems
    assert all(word in problem for word in words), problem


def test_every_component_rule_is_in_table():
    """Each `problems` method of the project rejects one of the combinations above."""

    def rule(component):
        return component.problems.__func__

    rules = {
        rule(option.choices[name])
        for option in architecture_options().values()
        if isinstance(option.choices, Registry)
        for name in option.choices
        if option.choices[name].__module__.startswith('components.')
    }
    broken = set()
    for values, _ in ILLEGAL:
        config, _ = resolve(values)
        broken |= {rule(c) for _, c in config.components() if c.problems(config)}
    assert rules - broken == {Configurable.problems.__func__}
