"""MiMo-V2-Flash: windows with sinks and more key heads, narrow values, balanced experts."""

from functools import partial

import torch

from interop.families.deepseek import DEEPSEEK_BIAS
from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    EXPERTS,
    GATED_FFN,
    LAYER,
    PRE_NORMS,
    llama_fields,
    query_key_value_rows,
)
from interop.fields import Fields, same_value
from interop.layer_kinds import (
    SPARSE,
    LayerKind,
    dense_and_sparse,
    first_is_dense,
    layer_kinds_field,
    named_by_default,
    named_by_list,
)
from interop.layers import num_kv_heads_of
from interop.mapping import (
    FULL,
    WINDOW,
    Family,
    FieldMap,
    constant_option,
    field,
    kv_head_options,
    read_layer_types,
    required_field,
)
from interop.rope import rope_by_layer_type_fields
from interop.routing import biased_router_fields
from interop.tensors import tensor, with_biases
from model_config import ModelArchitectureConfig

# --- Kinds of layers ------------------------------------------------------------------------------


def _has_window(layer: int, fields: Fields | None = None) -> bool:
    """Whether a layer has a window in files without `layer_types`."""
    return layer > 0 and (layer + 1) % 6 != 0


def _default_types(layers: int) -> list[str]:
    return [WINDOW if _has_window(layer) else FULL for layer in range(layers)]


def _kv_heads_field(factor: int) -> FieldMap:
    """Key/value heads, so many times those in the field."""

    def read(fields: Fields) -> dict:
        heads = fields.take('num_attention_heads', int)
        return kv_head_options(heads, factor * fields.take('num_key_value_heads', int, 4))

    def write(layer: ModelArchitectureConfig) -> dict:
        return {'num_key_value_heads': num_kv_heads_of(layer) // factor}

    return FieldMap(read, write)


def _read_window(fields: Fields) -> dict:
    """The window; in released files the number of tokens before a token's own."""
    window = fields.take('sliding_window', int, 129)
    before = fields.take('sliding_window_size', int, optional=True)
    return {'sliding_window': window if before is None else before + 1}


_WINDOW = FieldMap(_read_window, lambda layer: {'sliding_window': layer.sliding_window})
_ATTENTION = layer_kinds_field(
    named_by_list('layer_types'),
    named_by_default(_default_types),
    kinds={
        WINDOW: LayerKind({'attention_sinks': True}, (_WINDOW, _kv_heads_field(2))),
        FULL: LayerKind(
            {'attention_sinks': False}, (constant_option(sliding_window=None), _kv_heads_field(1))
        ),
    },
)
_FFNS = layer_kinds_field(
    named_by_list('mlp_layer_types'),
    named_by_default(first_is_dense),
    kinds=dense_and_sparse(
        field('d_ff', 'intermediate_size', 16384),
        field('num_experts', 'n_routed_experts', 256),
        field('experts_per_token', 'num_experts_per_tok', 8),
        field('expert_d_ff', 'moe_intermediate_size', 2048),
        constant_option(shared_experts=0),
        *biased_router_fields(True, 1.0),
    ),
)
_THETA = {WINDOW: 1e4, FULL: 5e6}
_ROPE = rope_by_layer_type_fields(
    partial(read_layer_types, has_window=_has_window),
    default_theta=_THETA,
    version_4=False,
    partial=True,
    default_fraction=0.334,
)

# --- Fields of released files that transformers does not read -------------------------------------


def _read_copies(fields: Fields) -> dict:
    """Refuse fields that say something else than those that transformers reads."""
    layers = fields.take('num_hidden_layers', int, 0)
    sizes = {
        name: fields.take(name, int, default)
        for name, default in (('head_dim', 192), ('v_head_dim', 128), ('num_attention_heads', 64))
    }
    rope = fields.values.get('rope_parameters')
    thetas: dict[str, float | None] = {**_THETA}
    if isinstance(rope, dict):
        tables = {kind: rope.get(kind) for kind in thetas}
        thetas = {
            kind: table.get('rope_theta') if isinstance(table, dict) else None
            for kind, table in tables.items()
        }
    types = read_layer_types(fields, _has_window)
    ffns = fields.take('mlp_layer_types', list, optional=True) or first_is_dense(layers)
    copies = {
        'hybrid_layer_pattern': [int(kind == WINDOW) for kind in types],
        'moe_layer_freq': [int(kind == SPARSE) for kind in ffns],
        'swa_num_key_value_heads': 2 * fields.take('num_key_value_heads', int, 4),
        **{f'swa_{name}': value for name, value in sizes.items()},
        'layernorm_epsilon': fields.take('rms_norm_eps', float, 1e-5),
        'rope_theta': thetas[FULL],
        'swa_rope_theta': thetas[WINDOW],
        'add_full_attention_sink_bias': False,
        'add_swa_attention_sink_bias': True,
        'scoring_func': 'sigmoid',
        'topk_method': 'noaux_tc',
        'n_shared_experts': 0,
    }
    for name, value in copies.items():
        copy = fields.value(name)
        if copy is not None and not same_value(copy, value):
            fields.refuse(name, f'transformers does not read it and computes with {value!r}')
    fields.values.pop('rope_theta', None)
    return {}


# --- The scale of values --------------------------------------------------------------------------


def _read_value_scale(fields: Fields) -> float:
    scale = fields.take('attention_value_scale', float, 0.707, optional=True)
    return 1.0 if scale is None else scale


def _row_factors(fields: Fields, name: str, layer: ModelArchitectureConfig) -> torch.Tensor | float:
    """The scale of values is a factor of their rows and biases."""
    scale = _read_value_scale(fields)
    if '.attention.qkv.' not in name or scale == 1:
        return 1.0
    rows = torch.tensor(query_key_value_rows(layer))
    return torch.tensor((1.0, 1.0, scale)).repeat_interleave(rows)


def _read_scale(fields: Fields) -> dict:
    _read_value_scale(fields)
    return {}


def _read_router_scale(fields: Fields) -> dict:
    """A missing factor of the router is null in released files."""
    if fields.values.get('routed_scaling_factor', 0) is None:
        fields.values['routed_scaling_factor'] = 1.0
    return {}


MIMO_V2_FLASH = Family(
    name='mimo_v2_flash',
    architecture='MiMoV2FlashForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=131_072, norm_eps=1e-5),
        FieldMap(_read_copies, lambda config: {}),
        FieldMap(_read_router_scale, lambda config: {}),
        field('head_dim', 'head_dim', 192),
        field('value_head_dim', 'v_head_dim', 128),
        # Of queries, keys and values.
        field('attention_bias', 'attention_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(attention_output_bias=False, ffn_bias=False),
        required_field(hidden_act='silu'),
        _ATTENTION,
        _ROPE,
        _FFNS,
        FieldMap(_read_scale, lambda config: {'attention_value_scale': 1.0}),
    ),
    aliases={'num_local_experts': 'n_routed_experts'},
    irrelevant_fields=frozenset({'attention_chunk_size', 'hybrid_block_size'}),
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | GATED_FFN
    | EXPERTS
    | with_biases(ATTENTION)
    | DEEPSEEK_BIAS
    | {'blocks.{layer}.attention.sinks': tensor(LAYER + 'self_attn.attention_sink_bias')},
    # Multi-token prediction, which transformers ignores too.
    ignored_tensors=r'^model\.mtp\.',
    row_factors=_row_factors,
)
