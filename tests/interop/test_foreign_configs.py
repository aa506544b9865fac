"""Every field of a config.json gives the logits of transformers or an error that names it."""

import math

import pytest
from helpers.field_changes import LLAMA3, Flips, field_changes
from helpers.foreign_configs import BASES

import interop

pytestmark = [pytest.mark.optional, pytest.mark.slow, pytest.mark.usefixtures('one_thread')]


# Every field of families unlike each other; tests/stress/field_pairs.py does the same for all.
WHOLE = ('gpt2', 'llama', 'deepseek_v3')
SAMPLE = 8  # changes of each other family


@pytest.mark.parametrize('family', BASES)
def test_fields_are_read_as_transformers_reads_them(family, tmp_path):
    flips = Flips(tmp_path / 'model')
    assert flips.outcome(family, {}) == 'equal'
    changes = field_changes(family, 1, irrelevant=family in WHOLE)
    if family not in WHOLE:
        changes = changes[:: max(1, len(changes) // SAMPLE)]
    outcomes = {str(change): flips.outcome(family, change) for change in changes}
    differing = {k: v for k, v in outcomes.items() if v not in ('equal', 'refused', 'illegal')}
    assert differing == {}
    counts = {kind: list(outcomes.values()).count(kind) for kind in ('equal', 'refused')}
    equal, refused = (20, 15) if family in WHOLE else (0, 0)
    assert counts['equal'] > equal and counts['refused'] > refused, counts


def test_all_families_are_covered():
    assert BASES.keys() == interop.TRANSFORMERS.keys()


def problems_of(model_type: str, **fields) -> list[str]:
    problems: list[str] = []
    interop.TRANSFORMERS[model_type].read(
        {'model_type': model_type, 'vocab_size': 40, **BASES[model_type], **fields}, problems
    )
    return problems


# Fields that people, other programs and other versions write into a config.json.
CONTRADICTIONS = {
    'is_causal=False': ('llama', {'is_causal': False}),
    'is_causal=None': ('opt', {'is_causal': None}),
    'rope_scaling=': ('llama', {'rope_scaling': LLAMA3}),
    'original_max_position_embeddings=8 contradicts': (
        'qwen3',
        {'original_max_position_embeddings': 8, 'rope_parameters': LLAMA3},
    ),
    "layer_types=None: .*'ministral'": ('mistral', {'layer_types': None}),
    'head_dim=16': ('gpt_neox', {'head_dim': 16}),
    'num_attention_heads=8 and n_head=4 contradict': ('gpt2', {'num_attention_heads': 8}),
    'num_experts=8 and n_routed_experts=4': ('deepseek_v2', {'num_experts': 8}),
    'partial_rotary_factor=0.5': (
        'deepseek_v3',
        {'partial_rotary_factor': 0.5, 'rope_scaling': {'type': 'linear', 'factor': 2.0}},
    ),
    'rope_theta=7.0, but rope_theta is 50.0': ('gpt_neox', {'rope_theta': 7.0}),
    'rope_theta=50.0 and rope_theta=7.0': ('llama', {'rope_theta': 7.0}),
    'foo=1: .*delete it from config.json': ('olmo2', {'foo': 1}),
    'rope_parameters: rope_theta=nan: must be a finite number': (
        'olmo2',
        {'rope_parameters': {'rope_type': 'default', 'rope_theta': math.nan}},
    ),
    'attention_bias=1: must be true or false': ('qwen3', {'attention_bias': 1}),
    'mamba_d_head=None: must be': ('falcon_h1', {'mamba_d_head': None}),
    'time_step_limit=True: must be two numbers': ('falcon_h1', {'time_step_limit': True}),
    r'num_experts=\[\[4\]\]: must be a whole number': ('hunyuan_v1_moe', {'num_experts': [[4]]}),
    r'moe_topk=\{\}: must be a whole number': ('hunyuan_v1_moe', {'moe_topk': {}}),
    'full_attention': ('mimo_v2_flash', {'rope_parameters': {'full_attention': 'x'}}),
    'n_layer=1000000 exceeds the maximum of 5,000': ('gpt2', {'n_layer': 10**6}),
}


@pytest.mark.parametrize('message', CONTRADICTIONS)
def test_refused_fields_are_named(message):
    family, fields = CONTRADICTIONS[message]
    with pytest.raises(AssertionError, match=message):
        assert problems_of(family, **fields) == []


# The fields of published checkpoints from all versions of transformers, without the sizes.
PUBLISHED = {
    'trinity-nano': (
        'afmoe',
        {
            'global_attn_every_n_layers': 4,
            'mup_enabled': True,
            'n_group': 1,
            'num_expert_groups': 1,
            'num_limited_groups': 1,
            'rope_scaling': None,
            'rope_theta': 10000,
            'route_norm': True,
            'route_scale': 2.826,
            'score_func': 'sigmoid',
            'topk_group': 1,
            'use_grouped_mm': True,
        },
    ),
    'k-exaone': (
        'exaone_moe',
        {
            'first_last_k_dense_replace': 1,
            'layer_types': ['sliding_attention', 'full_attention'],
            'n_group': 1,
            'norm_topk_prob': True,
            'rope_scaling': None,
            'rope_theta': 1000000,
            'routed_scaling_factor': 2.5,
            'scoring_func': 'sigmoid',
            'sliding_window_pattern': 'LLLG',
            'topk_group': 1,
            'topk_method': 'noaux_tc',
        },
    ),
    'gpt2': (
        'gpt2',
        {
            'n_ctx': 1024,
            'summary_type': 'cls_index',
            'summary_first_dropout': 0.1,
            'n_special': 0,
            'predict_special_tokens': True,
            'output_past': True,
            'task_specific_params': {'text-generation': {'do_sample': True, 'max_length': 50}},
        },
    ),
    'llama-2': (
        'llama',
        {
            '_name_or_path': 'meta-llama/Llama-2-7b-hf',
            'architectures': ['LlamaForCausalLM'],
            'pretraining_tp': 1,
            'rope_scaling': None,
            'torch_dtype': 'float16',
            'use_cache': True,
            'max_length': 4096,
            'pad_token_id': 0,
        },
    ),
    'smollm2': (
        'llama',
        {
            'is_llama_config': True,
            'rope_interleaved': False,
            'transformers.js_config': {'kv_cache_dtype': {'fp16': 'float16'}},
        },
    ),
    'gemma-2': (
        'gemma2',
        {'hidden_act': 'gelu_pytorch_tanh', 'cache_implementation': 'hybrid'},
    ),
    'pythia': ('gpt_neox', {'tie_word_embeddings': False, 'classifier_dropout': 0.1}),
    'opt-125m': (
        'opt',
        {'activation_dropout': 0.0, 'prefix': '</s>', 'layerdrop': 0.0, 'init_std': 0.02},
    ),
    'deepseek-v2-lite': (
        'deepseek_v2',
        {
            'auto_map': {'AutoConfig': 'configuration_deepseek.DeepseekV2Config'},
            'aux_loss_alpha': 0.001,
            'seq_aux': True,
            'ep_size': 1,
            'moe_layer_freq': 1,
            'n_group': 1,
            'topk_group': 1,
            'topk_method': 'greedy',
            'scoring_func': 'softmax',
            'norm_topk_prob': False,
            'q_lora_rank': None,
            'rope_theta': 10000,
            'rope_scaling': {
                'beta_fast': 32,
                'beta_slow': 1,
                'factor': 40,
                'mscale': 0.707,
                'mscale_all_dim': 0.707,
                'original_max_position_embeddings': 4096,
                'type': 'yarn',
            },
        },
    ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_config_is_read(name):
    family, fields = PUBLISHED[name]
    assert problems_of(family, **fields) == []
