"""Command R and Command R7B of Cohere, and MiniCPM3."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from interop.families.deepseek import LATENT_ATTENTION, latent_kv_heads_field, latent_norm_field
from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    LAYER,
    PRE_NORMS,
    llama_fields,
    projections,
    query_key_value_rows,
    swiglu_field,
)
from interop.fields import Fields
from interop.layers import num_kv_heads_of, options_with
from interop.mapping import (
    WINDOW,
    Family,
    FieldMap,
    all_but_every_nth,
    check_heads_divide_width,
    constant_option,
    export_only,
    field,
    kv_heads_field,
    read_layer_types,
    windows_field,
)
from interop.rope import deepseek_rope_fields, rope_fields, rope_in_some_layers
from interop.rotary_rows import interleaved_rows, rows_of_interleaved_head
from interop.tensors import Layout, TensorMap, tensor, with_biases
from model_config import ModelArchitectureConfig

# --- Cohere ---------------------------------------------------------------------------------------

COHERE_FIELDS = (
    field('n_layer', 'num_hidden_layers', 40),
    field('n_head', 'num_attention_heads', 64),
    field('n_embd', 'hidden_size', 8192),
    field('block_size', 'max_position_embeddings', 8192),
    field('vocab_size', 'vocab_size', 256_000),
    field('attention_bias', 'attention_bias', False),
    field('weight_tying', 'tie_word_embeddings', True),
    field('logit_multiplier', 'logit_scale', 0.0625),
    constant_option(norm_position='parallel', parallel_shared_norm=True),
    constant_option(bias=False, ffn_bias=False),
    export_only(attention_dropout='attention_dropout'),
    kv_heads_field(),
)
_FIELDS = (
    *COHERE_FIELDS,
    field('d_ff', 'intermediate_size', 22528),
    field('norm_eps', 'layer_norm_eps', 1e-5),
    field('head_dim', 'head_dim', None),
    constant_option(normalization='layernorm_nobias'),
    swiglu_field(),
)
COHERE_WEIGHTS = {
    **EMBEDDING_AND_HEAD,
    'blocks.{layer}.attention_norm.weight': tensor(LAYER + 'input_layernorm.weight'),
    **GATED_FFN,
    **with_biases(
        {
            **ATTENTION,
            'blocks.{layer}.attention.qkv.weight': TensorMap(
                projections('self_attn', 'q', 'k', 'v'),
                rows=query_key_value_rows,
                row_order=interleaved_rows,
            ),
        }
    ),
}


def _gains_of_each_head(name: str, heads: Callable[[ModelArchitectureConfig], int]) -> TensorMap:
    """The weight of a QK norm, (heads, dimensions) in theirs. heads: their number."""

    def layout(config: ModelArchitectureConfig) -> Layout:
        return Layout(torch.Tensor.flatten, lambda ours: ours.view(heads(config), -1))

    def row_order(config: ModelArchitectureConfig) -> torch.Tensor:
        rows = torch.arange(heads(config) * config.head_dim).view(-1, config.head_dim)
        return rows[:, rows_of_interleaved_head(config.head_dim, config.head_dim)].flatten()

    return tensor(f'{LAYER}self_attn.{name}_norm.weight', layout=layout, row_order=row_order)


def _read_qk_norm(fields: Fields) -> dict:
    if fields.take('use_qk_norm', bool, False):
        return {'qk_norm': 'layernorm_nobias', 'qk_norm_scope': 'each_head'}
    return {'qk_norm': 'none'}


def _write_qk_norm(config: ModelArchitectureConfig) -> dict:
    return {'use_qk_norm': options_with(config, 'qk_norm').get('qk_norm', 'none') != 'none'}


COHERE = Family(
    name='cohere',
    architecture='CohereForCausalLM',
    prefix='model.',
    field_maps=(
        *_FIELDS,
        rope_fields(default_theta=5e5),
        FieldMap(_read_qk_norm, _write_qk_norm),
    ),
    weights=COHERE_WEIGHTS
    | {
        'blocks.{layer}.attention.q_norm.weight': _gains_of_each_head('q', lambda c: c.n_head),
        'blocks.{layer}.attention.k_norm.weight': _gains_of_each_head('k', num_kv_heads_of),
    },
)

_has_window = all_but_every_nth('sliding_window_pattern', 4)


def _read_rotated(fields: Fields) -> list[bool]:
    """The layers with a window have positions."""
    return [kind == WINDOW for kind in read_layer_types(fields, _has_window)]


COHERE2 = Family(
    name='cohere2',
    architecture='Cohere2ForCausalLM',
    prefix='model.',
    field_maps=(
        *_FIELDS,
        windows_field(4096, _has_window),
        rope_in_some_layers(rope_fields(), _read_rotated),
    ),
    irrelevant_fields=frozenset({'sliding_window_pattern'}),  # superseded by layer_types
    weights=COHERE_WEIGHTS,
)

# --- MiniCPM3 -------------------------------------------------------------------------------------


def _read_multipliers(fields: Fields) -> dict:
    layers, width = fields.take('num_hidden_layers', int, 1), fields.take('hidden_size', int, 1)
    depth = fields.take('scale_depth', float, 1.4, optional=True)
    base = fields.take('dim_model_base', int, 256, optional=True)
    if layers < 1 or width < 1 or depth == 0:
        fields.refuse('scale_depth', 'must not be 0')
        return {}
    factor = 1.0 if depth is None else depth / math.sqrt(layers)
    residual: dict = {'residual': 'addition'}
    if factor != 1:
        residual = {'residual': 'multiplier', 'residual_multiplier': factor}
    return {**residual, 'logit_multiplier': 1.0 if base is None else base / width}


def _write_multipliers(config: ModelArchitectureConfig) -> dict:
    factor = options_with(config, 'residual_multiplier').get('residual_multiplier', 1.0)
    return {
        'scale_depth': factor * math.sqrt(config.n_layer),
        'dim_model_base': round(config.logit_multiplier * config.n_embd),
    }


def _read_value_dims(fields: Fields) -> dict:
    """The size of a head of values; without the field, all heads together have the width."""
    width, heads = fields.take('hidden_size', int, 1), fields.take('num_attention_heads', int, 1)
    dims = fields.take('v_head_dim', int, optional=True)
    return {'v_head_dim': width // max(heads, 1) if dims is None else dims}


def _write_value_dims(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'v_head_dim')
    return {'v_head_dim': options['v_head_dim']} if 'v_head_dim' in options else {}


MINICPM3 = Family(
    name='minicpm3',
    architecture='MiniCPM3ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=32768, norm_eps=1e-5),
        latent_norm_field(1e-5),
        field('q_lora_rank', 'q_lora_rank', 768),
        field('kv_lora_rank', 'kv_lora_rank', 256),
        field('qk_nope_head_dim', 'qk_nope_head_dim', 64),
        field('qk_rope_head_dim', 'qk_rope_head_dim', 32),
        FieldMap(_read_value_dims, _write_value_dims),
        latent_kv_heads_field,
        field('attention_bias', 'attention_bias', False),
        field('d_ff', 'intermediate_size', 6400),
        field('ffn_bias', 'mlp_bias', False),
        field('weight_tying', 'tie_word_embeddings', True),
        field('embedding_multiplier', 'scale_emb', 12.0),
        FieldMap(_read_multipliers, _write_multipliers),
        constant_option(attention_type='mla'),
        deepseek_rope_fields(),
        swiglu_field(),
    ),
    irrelevant_fields=frozenset({'head_dim', 'qk_head_dim'}),  # that of RoPE, whatever they are
    check_loadable=check_heads_divide_width,
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | with_biases(GATED_FFN)
    | {name: replace(own, row_order=None) for name, own in LATENT_ATTENTION.items()},
)
