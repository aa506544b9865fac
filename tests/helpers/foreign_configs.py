"""Every field of a config.json set to other legal values, checked against transformers.

`Flips` builds tiny models of every supported family: the model of transformers for a config.json,
saved, and ours loaded from that folder. Both must have equal logits, or ours must refuse the field
by name. Values that transformers itself refuses are ignored.
"""

import dataclasses
import json
import shutil
import types
import typing
from pathlib import Path

import torch

import interop
from common.errors import UserError
from helpers import transformers_models as reference
from interop.exporter import silent_transformers
from interop.fields import IRRELEVANT_FIELDS
from model_builder import build_model

SIZES = {
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'hidden_size': 32,
    'intermediate_size': 48,
    'max_position_embeddings': 16,
}
_GROUPED = {**SIZES, 'num_key_value_heads': 2, 'head_dim': 12}
_DEEPSEEK = {
    **SIZES,
    'num_key_value_heads': 4,
    'q_lora_rank': 12,
    'kv_lora_rank': 10,
    'qk_nope_head_dim': 6,
    'qk_rope_head_dim': 4,
    'v_head_dim': 5,
    'n_routed_experts': 4,
    'num_experts_per_tok': 2,
    'moe_intermediate_size': 16,
    'n_shared_experts': 1,
    'first_k_dense_replace': 1,
}
_DELTA_NET = {
    'layer_types': ['linear_attention', 'full_attention'],
    'linear_num_key_heads': 2,
    'linear_num_value_heads': 4,
    'linear_key_head_dim': 8,
    'linear_value_head_dim': 6,
}
_EXPERTS = {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 16}
_MIXED_WINDOWS = {'sliding_window': 5, 'layer_types': ['sliding_attention', 'full_attention']}
_MAMBA = {'num_hidden_layers': 2, 'hidden_size': 32, 'state_size': 4, 'time_step_rank': 4}
_MAMBA2 = {'mamba_n_heads': 8, 'mamba_d_state': 4, 'mamba_n_groups': 2}
_MULTIPLIERS = {
    'embedding_multiplier': 2.0,
    'residual_multiplier': 0.4,
    'logits_scaling': 8.0,
}
_CONVOLUTIONS = {**SIZES, 'num_key_value_heads': 2, 'layer_types': ['conv', 'full_attention']}
# Tiny models; all other fields have transformers' defaults.
BASES = {
    'gpt2': {'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'n_positions': 16},
    'llama': {**_GROUPED, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 50.0}},
    'mistral': {**_GROUPED, 'sliding_window': 5},
    'qwen3': {**_GROUPED, 'use_sliding_window': True, 'sliding_window': 5, 'max_window_layers': 1},
    'olmo2': {**SIZES, 'num_key_value_heads': 2},
    'gemma2': {**_GROUPED, 'sliding_window': 5, 'query_pre_attn_scalar': 20},
    'gemma3_text': {**_GROUPED, **_MIXED_WINDOWS, 'query_pre_attn_scalar': 20},
    'gpt_neox': {**SIZES, 'rotary_pct': 0.5, 'rotary_emb_base': 50.0},
    'opt': {
        **{key: SIZES[key] for key in SIZES if key != 'intermediate_size'},
        'ffn_dim': 48,
    },
    'mixtral': {**_GROUPED, 'num_local_experts': 4},
    'deepseek_v2': _DEEPSEEK,
    'deepseek_v3': {**_DEEPSEEK, 'n_group': 2, 'topk_group': 1},
    'glm4_moe': {
        **_GROUPED,
        **{key: _DEEPSEEK[key] for key in _DEEPSEEK if 'expert' in key or 'replace' in key},
        'moe_intermediate_size': 16,
        'use_qk_norm': True,
        'attention_bias': True,
    },
    'glm4_moe_lite': {
        **{key: value for key, value in _DEEPSEEK.items() if 'replace' not in key},
        'mlp_layer_types': ['dense', 'sparse'],
    },
    'dots1': {
        **_GROUPED,
        **{key: _DEEPSEEK[key] for key in _DEEPSEEK if 'expert' in key or 'replace' in key},
        'moe_intermediate_size': 16,
        'sliding_window': 5,
        'max_window_layers': 1,
    },
    'gpt_oss': {
        **_GROUPED,
        'sliding_window': 5,
        'num_local_experts': 4,
        'num_experts_per_tok': 2,
        'rope_parameters': {'rope_type': 'default', 'rope_theta': 50.0},
    },
    'qwen2_moe': {
        **_GROUPED,
        'mlp_only_layers': [0],
        'num_experts': 4,
        'num_experts_per_tok': 2,
        'moe_intermediate_size': 16,
        'shared_expert_intermediate_size': 32,
        'use_sliding_window': True,
        'sliding_window': 5,
    },
    'ernie4_5_moe': {
        **_GROUPED,
        'moe_num_experts': 4,
        'moe_k': 2,
        'moe_intermediate_size': 16,
        'moe_num_shared_experts': 1,
    },
    'solar_open': {
        **{key: value for key, value in _GROUPED.items() if key != 'intermediate_size'},
        'n_routed_experts': 4,
        'num_experts_per_tok': 2,
        'moe_intermediate_size': 16,
        'attention_bias': True,
    },
    'hy_v3': {
        **_GROUPED,
        'num_experts': 4,
        'num_experts_per_tok': 2,
        'moe_intermediate_size': 16,
    },
    'exaone_moe': {
        **_GROUPED,
        **_MIXED_WINDOWS,
        'num_experts': 4,
        'num_experts_per_tok': 2,
        'moe_intermediate_size': 16,
    },
    'afmoe': {
        **_GROUPED,
        **_MIXED_WINDOWS,
        'num_experts': 4,
        'num_experts_per_tok': 2,
        'moe_intermediate_size': 16,
        'mup_enabled': True,
    },
    'minimax_m2': {**_GROUPED, 'num_local_experts': 4, 'num_experts_per_tok': 2},
    'qwen3_next': {
        **_GROUPED,
        **_DELTA_NET,
        'head_dim': 16,
        **_EXPERTS,
        'mlp_only_layers': [0],
        'shared_expert_intermediate_size': 32,
    },
    'qwen3_5_text': {**_GROUPED, **_DELTA_NET, 'head_dim': 16},
    'olmo_hybrid': {**SIZES, **_DELTA_NET, 'num_key_value_heads': 2},
    'kimi_linear': {
        **SIZES,
        'num_key_value_heads': 4,
        'layer_types': ['linear_attention', 'full_attention'],
        'mlp_layer_types': ['dense', 'sparse'],
        **{key: _DEEPSEEK[key] for key in _DEEPSEEK if 'dim' in key or 'rank' in key},
        'linear_num_heads': 2,
        'linear_head_dim': 8,
        'num_local_experts': 4,
        'num_experts_per_tok': 2,
        'moe_intermediate_size': 16,
    },
    'smollm3': {**_GROUPED, 'no_rope_layers': [1, 0]},
    'olmo3': {**_GROUPED, **_MIXED_WINDOWS},
    'exaone4': {**_GROUPED, **_MIXED_WINDOWS},
    'mellum': {
        **_GROUPED,
        **_MIXED_WINDOWS,
        **_EXPERTS,
        'mlp_layer_types': ['dense', 'sparse'],
    },
    'minimax': {**_GROUPED, 'num_local_experts': 4},
    'nemotron_h': {
        **{key: SIZES[key] for key in SIZES if key != 'num_hidden_layers'},
        'layers_block_type': ['linear_attention', 'full_attention', 'moe', 'mlp'],
        'mamba_num_heads': 6,
        'mamba_head_dim': 4,
        'n_groups': 2,
        'ssm_state_size': 4,
        'num_key_value_heads': 2,
        'head_dim': 12,
        'n_routed_experts': 4,
        'moe_intermediate_size': 16,
        'moe_shared_expert_intermediate_size': 32,
    },
    'mamba': _MAMBA,
    'falcon_mamba': _MAMBA,
    'jamba': {
        **SIZES,
        'num_key_value_heads': 2,
        'num_experts': 4,
        'mamba_dt_rank': 4,
        'attn_layer_period': 2,
        'attn_layer_offset': 1,
    },
    'mamba2': {
        **{'num_hidden_layers': 2, 'hidden_size': 32, 'state_size': 4},
        **{'num_heads': 8, 'head_dim': 8, 'n_groups': 2},
    },
    'bamba': {**SIZES, 'num_key_value_heads': 2, 'attn_layer_indices': [1], **_MAMBA2},
    'cohere': {**SIZES, 'num_key_value_heads': 2},
    'cohere2': {**SIZES, **_MIXED_WINDOWS, 'num_key_value_heads': 2},
    'minicpm3': {
        **SIZES,
        **{key: _DEEPSEEK[key] for key in _DEEPSEEK if 'dim' in key or 'rank' in key},
        'num_key_value_heads': 4,
        'dim_model_base': 16,
    },
    'granite': {**_GROUPED, **_MULTIPLIERS, 'attention_multiplier': 0.3},
    'hyperclovax': {**_GROUPED, **_MULTIPLIERS},
    'granitemoe': {**_GROUPED, **_MULTIPLIERS, 'num_local_experts': 4},
    'granitemoeshared': {
        **_GROUPED,
        **_MULTIPLIERS,
        'num_local_experts': 4,
        'shared_intermediate_size': 96,
    },
    'granitemoehybrid': {
        **_GROUPED,
        **_MULTIPLIERS,
        **_MAMBA2,
        'layer_types': ['linear_attention', 'full_attention'],
        'num_local_experts': 4,
        'shared_intermediate_size': 96,
    },
    'falcon_h1': {
        **_GROUPED,
        **_MAMBA2,
        'mamba_d_ssm': 48,
        'mamba_rms_norm': True,
        'embedding_multiplier': 2.0,
        'lm_head_multiplier': 0.5,
        'mlp_multipliers': [0.8, 0.6],
        'ssm_multipliers': [0.4, 0.3, 0.9, 1.2, 0.5],
    },
    'recurrent_gemma': {
        **{key: SIZES[key] for key in SIZES if key != 'max_position_embeddings'},
        'hidden_size': 64,
        'num_key_value_heads': 2,
        'attention_window_size': 5,
        'block_types': ['recurrent', 'attention'],
    },
    'qwen2': {**_GROUPED, 'use_sliding_window': True, 'sliding_window': 5, 'max_window_layers': 1},
    'seed_oss': _GROUPED,
    'glm': _GROUPED,
    'glm4': _GROUPED,
    'gptj': {'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'n_positions': 16, 'rotary_dim': 4},
    'codegen': {'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'n_positions': 16, 'rotary_dim': 4},
    'phi': SIZES,
    'phi3': {**SIZES, 'num_key_value_heads': 2},
    'ministral3': {
        **_GROUPED,
        'rope_parameters': {
            'rope_type': 'yarn',
            'rope_theta': 50.0,
            'factor': 4.0,
            'original_max_position_embeddings': 8,
            'llama_4_scaling_beta': 0.5,
        },
    },
    'apertus': {**SIZES, 'num_key_value_heads': 2, 'dtype': 'float32'},
    'olmo': {**SIZES, 'num_key_value_heads': 2},
    'nanochat': {**SIZES, 'num_key_value_heads': 2},
    'hunyuan_v1_dense': _GROUPED,
    'hunyuan_v1_moe': {**_GROUPED, 'num_experts': 4, 'moe_topk': 2},
    'stablelm': {**SIZES, 'num_key_value_heads': 2, 'partial_rotary_factor': 0.5},
    'bloom': {'n_layer': 2, 'n_head': 4, 'hidden_size': 32},
    'falcon': {
        **{key: SIZES[key] for key in SIZES if key != 'intermediate_size'},
        **{'num_kv_heads': 2, 'new_decoder_architecture': True, 'ffn_hidden_size': 48},
    },
    'gpt_neo': {
        **{'num_layers': 2, 'num_heads': 4, 'hidden_size': 32, 'max_position_embeddings': 16},
        **{'window_size': 5, 'attention_types': [[['global', 'local'], 1]]},
    },
    'qwen3_moe': {**_GROUPED, **_EXPERTS, 'mlp_only_layers': [0], 'max_window_layers': 1},
    'gemma': {**_GROUPED, 'head_dim': 16},
    'olmoe': {**SIZES, 'num_key_value_heads': 2, 'num_experts': 4, 'num_experts_per_tok': 2},
    'starcoder2': {**SIZES, 'num_key_value_heads': 2, 'sliding_window': 5},
    'nemotron': {**_GROUPED, 'head_dim': 16},
    'ernie4_5': _GROUPED,
    'arcee': _GROUPED,
    'helium': {**_GROUPED, 'head_dim': 8},
    'mpt': {'n_layers': 2, 'n_heads': 4, 'd_model': 32, 'max_seq_len': 16},
    'flex_olmo': {**SIZES, 'num_key_value_heads': 2, 'num_experts': 4, 'num_experts_per_tok': 2},
    'cwm': {**_GROUPED, **_MIXED_WINDOWS, 'bos_token_id': 0},  # not optional
    'ministral': {**_GROUPED, **_MIXED_WINDOWS},
    'vaultgemma': {**_GROUPED, 'sliding_window': 5, 'query_pre_attn_scalar': 20},
    'jais2': {**SIZES, 'num_key_value_heads': 2},
    'persimmon': SIZES,
    'biogpt': SIZES,
    'openai-gpt': {'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'n_positions': 16},
    'youtu': {
        **SIZES,
        'num_key_value_heads': 4,
        **{key: _DEEPSEEK[key] for key in _DEEPSEEK if 'dim' in key or 'rank' in key},
    },
    'exaone': _GROUPED,
    'internlm3': _GROUPED,
    'iquestcoder': _GROUPED,
    'gpt_bigcode': {'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'n_positions': 16},
    'lfm2': {**_CONVOLUTIONS, 'block_multiple_of': 8},
    'lfm2_moe': {
        **_CONVOLUTIONS,
        **_EXPERTS,
        'num_dense_layers': 1,
    },
}
LLAMA3 = {
    'rope_type': 'llama3',
    'rope_theta': 50.0,
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 12,
}
YARN = {
    'type': 'yarn',
    'factor': 4.0,
    'rope_theta': 50.0,
    'original_max_position_embeddings': 8,
}
_TEXTS = {
    'hidden_act': ('relu', 'gelu', 'gelu_pytorch_tanh', 'silu'),
    'topk_method': ('group_limited_greedy', 'greedy', 'noaux_tc'),
    'scoring_func': ('sigmoid', 'softmax'),
    'summary_type': ('last', 'mean'),
    'dtype': ('bfloat16',),
    'torch_dtype': ('float16',),
}
_TEXTS['activation_function'] = _TEXTS['hidden_activation'] = _TEXTS['hidden_act']
# Fields that a config.json may have besides those of its class.
BESIDE = {
    'is_causal': (False, None, True),
    'rope_scaling': (LLAMA3, YARN, {'type': 'linear', 'factor': 4.0}, None),
    'rope_parameters': (
        LLAMA3,
        YARN,
        {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 9.0},
        {'sliding_attention': {'rope_type': 'default', 'rope_theta': 9.0}, 'full_attention': YARN},
    ),
    'rope_theta': (7.0,),
    'rope_local_base_freq': (7.0,),
    'rotary_emb_base': (7.0,),
    'rotary_pct': (0.25,),
    'partial_rotary_factor': (0.5, 1.0),
    'original_max_position_embeddings': (4,),
    'layer_types': (['full_attention'] * 2, ['sliding_attention', 'full_attention']),
    'sliding_window': (3, None),
    'sliding_window_pattern': (1, 3, 'LG'),
    'no_rope_layers': ([0, 0], [1, 1, 0], None),
    'no_rope_layer_interval': (1, 2),
    'mlp_layer_types': (['sparse', 'dense'], ['sparse'] * 2, ['dense'] * 2),
    'use_sliding_window': (True, False),
    'head_dim': (8, 16),
    'qk_head_dim': (8,),
    'attention_chunk_size': (4,),
    'use_bidirectional_attention': (True,),
    'is_decoder': (True,),
    'is_encoder_decoder': (True,),
    'add_cross_attention': (True,),
    'per_layer_config': ({'0': {'attention_bias': True}},),
    'tie_word_embeddings': (True, False),
    'attention_bias': (True,),
    'mlp_bias': (True,),
    'scoring_func': ('softmax',),
    'moe_layer_freq': (2,),
    'pretraining_tp': (2,),
    'n_ctx': (8,),
    'chunk_size_feed_forward': (4,),
    'tie_last_hidden_states': (False,),
    'kv_sharing_modes': (['a'],),
    'torch_dtype': ('float16',),
    'rope_interleaved': (True,),
    'temperature': (0.5,),
    'architectures': (['GPT2Model'],),
    'foo': (1,),
}


def config_class(family: str):
    from transformers import AutoConfig

    return type(AutoConfig.for_model(family))


def other_values(field: dataclasses.Field, base) -> list:
    """Other values that the type of a field allows."""
    if field.name in _TEXTS:
        return [text for text in _TEXTS[field.name] if text != base]
    kinds = typing.get_args(field.type) or (field.type,)
    values: list = [None] if types.NoneType in kinds and base is not None else []
    if bool in kinds:
        values.append(not base)
    elif int in kinds or float in kinds:
        number = 1 if base is None else base
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            return values
        values += [2 * number or 1] if int in kinds and float not in kinds else [number / 2 or 0.1]
        values += [number + 1] if int in kinds else [number * 1.5 + 0.1]
    return values


LEFT_OUT = ...  # value of a missing field


def flips(family: str, each: int | None = None, irrelevant: bool = True) -> list[dict]:
    """Changes of one field each. each: maximum number of values per field.

    irrelevant: also change fields that affect no logits in any family.
    """
    cls = config_class(family)
    default, base = cls(), BASES[family]
    pairs = []
    for field in dataclasses.fields(cls):
        if field.name in ('transformers_version', 'id2label', 'label2id', 'problem_type'):
            continue  # for other heads, and listed as harmless
        value = base.get(field.name, getattr(default, field.name, None))
        pairs += [(field.name, other) for other in other_values(field, value)[:each]]
    pairs += [(name, value) for name, values in BESIDE.items() for value in values]
    changes = [{name: value} for name, value in pairs]
    for alias, name in cls.attribute_map.items():
        value = base.get(name, getattr(default, name, None))
        if value is not None:
            changes += [{alias: 2 * value}, {alias: value}, {alias: value, name: LEFT_OUT}]
    return [
        change
        for n, change in enumerate(changes)
        if change not in changes[:n] and (irrelevant or not change.keys() <= IRRELEVANT_FIELDS)
    ]


class Flips:
    """Compares models of changed config.json files, in a folder that is overwritten."""

    def __init__(self, folder: Path):
        self.folder = folder

    def outcome(self, family: str, changes: dict) -> str:
        """'equal', 'refused', 'illegal' (for transformers), or the difference."""
        fields = {
            'model_type': family,
            'vocab_size': 40,
            **reference.NO_SPECIAL_TOKENS,
            **BASES[family],
            **changes,
        }
        fields = {name: value for name, value in fields.items() if value is not LEFT_OUT}
        problems: list[str] = []
        interop.TRANSFORMERS[family].read(fields, problems)
        if problems:
            return 'refused'
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        try:
            with silent_transformers():
                theirs, expected, tokens = self._theirs(fields)
        except Exception:
            return 'illegal'
        try:
            source = interop.open_checkpoint(f'hf:{self.folder}')
            ours = build_model(source.config, 'cpu').eval()
            ours.load_state_dict(dict(source.weights(source.config)), strict=False)
        except UserError:
            return 'refused'
        with torch.no_grad():
            logits = ours(tokens)
        off = (logits - expected).norm() / expected.norm()
        return 'equal' if off < 1e-4 else f'DIFFERENT by {off:.2g}: {type(theirs).__name__}'

    def _theirs(self, fields: dict):
        """The model of transformers, its logits, and the tokens; saved in the folder."""
        from transformers import AutoConfig, AutoModelForCausalLM

        file = self.folder / 'config.json'
        file.write_text(json.dumps(fields))
        config = AutoConfig.from_pretrained(self.folder)
        model = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=reference.attention_of(config.model_type),
            dtype=torch.float32,
        )
        reference.randomize(model.eval())
        tokens = torch.arange(24).view(2, 12) * 7 % 40
        with torch.no_grad():
            expected = model(tokens, return_dict=True).logits
        model.save_pretrained(self.folder)
        file.write_text(json.dumps(fields))
        return model, expected, tokens
