"""Mixtures of experts with windows: Flint, Kolibri, Laguna."""

from functools import partial

from interop.families.deepseek import SHARED_EXPERTS
from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    EXPERTS,
    GATED_FFN,
    LAYER,
    PRE_NORMS,
    QK_NORMS,
    llama_fields,
    projections,
    query_key_value_gate_rows,
)
from interop.families.qwen3_next import SHARED_EXPERT, sparse_steps
from interop.fields import Fields
from interop.layer_kinds import (
    dense_and_sparse,
    first_is_dense,
    layer_kinds_field,
    named_by_default,
    named_by_list,
)
from interop.layers import ABSENT, PerLayer, num_kv_heads_of
from interop.mapping import (
    FULL,
    MAX_LAYERS,
    WINDOW,
    Family,
    FieldMap,
    constant_option,
    field,
    kv_heads_field,
    read_layer_types,
    required_field,
    shared_experts_field,
    windows_field,
)
from interop.rope import rope_by_layer_type_fields, rope_fields, rope_in_some_layers
from interop.routing import BALANCED_ROUTER, selection_bias
from interop.tensors import TensorMap, tensor, with_biases
from model_config import ModelArchitectureConfig

# --- Flint ----------------------------------------------------------------------------------------


def _has_flint_window(layer: int, fields: Fields) -> bool:
    last = fields.take('num_hidden_layers', int, 0) - 1
    return layer >= 2 and layer % 4 != 1 and layer != last


def _read_flint_rotated(fields: Fields) -> list[bool]:
    return [kind == WINDOW for kind in read_layer_types(fields, _has_flint_window)]


FLINT = Family(
    name='flint',
    architecture='FlintForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=262_144),
        field('head_dim', 'head_dim', 128),
        field('attention_bias', 'attention_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(qk_norm='rmsnorm', qk_norm_scope='head', attention_sinks=True),
        constant_option(ffn_bias=False),
        required_field(hidden_act='silu'),
        kv_heads_field(4),
        windows_field(513, _has_flint_window),
        rope_in_some_layers(rope_fields(), _read_flint_rotated),
        layer_kinds_field(
            sparse_steps((0, 1)),
            kinds=dense_and_sparse(
                field('d_ff', 'intermediate_size', 6144),
                field('num_experts', 'num_experts', 256),
                field('experts_per_token', 'num_experts_per_tok', 6),
                field('expert_d_ff', 'moe_intermediate_size', 512),
                field('router_normalize', 'norm_topk_prob', True),
                shared_experts_field('shared_expert_intermediate_size', 1024, each=512),
                constant_option(router_score='sigmoid'),
            ),
        ),
    ),
    aliases={'num_local_experts': 'num_experts'},
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | QK_NORMS
    | with_biases(ATTENTION)
    | GATED_FFN
    | EXPERTS
    | SHARED_EXPERT
    | {'blocks.{layer}.attention.sinks': tensor(LAYER + 'self_attn.softmax_offset')},
)

# --- Kolibri --------------------------------------------------------------------------------------


def _has_kolibri_window(layer: int, fields: Fields) -> bool:
    return (layer + 1) % 5 != 0


def _read_kolibri_rotated(fields: Fields) -> list[bool]:
    """Layers without a window have no positions, unless there is no window."""
    whole = fields.take('sliding_window', int, 513, optional=True) is None
    return [whole or kind == WINDOW for kind in read_layer_types(fields, _has_kolibri_window)]


KOLIBRI1 = Family(
    name='kolibri1',
    architecture='Kolibri1ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=262_144),
        field('head_dim', 'head_dim', 128),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(norm_position='sandwich', qk_norm='rmsnorm', qk_norm_scope='head'),
        constant_option(attention_bias=False, ffn_bias=False, ffn_type='moe'),
        kv_heads_field(4),
        field('num_experts', 'num_experts', 384),
        field('experts_per_token', 'num_experts_per_tok', 6),
        field('expert_d_ff', 'moe_intermediate_size', 512),
        field('expert_ffn', 'hidden_act', 'silu', {'silu': 'swiglu'}),
        shared_experts_field('shared_expert_intermediate_size', 512),
        field('router_normalize', 'norm_topk_prob', False),
        constant_option(router_score='sigmoid', router_groups=1),
        constant_option(router_selection_bias=True, router_selection_bias_target='logits'),
        windows_field(513, _has_kolibri_window),
        rope_in_some_layers(rope_fields(), _read_kolibri_rotated),
    ),
    aliases={'num_local_experts': 'num_experts'},
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | QK_NORMS
    | ATTENTION
    | EXPERTS
    | SHARED_EXPERTS
    | selection_bias(LAYER + 'moe.router.expert_bias')
    | {
        'blocks.{layer}.attention_output_norm.weight': tensor(LAYER + 'post_attn_norm.weight'),
        'blocks.{layer}.ffn_output_norm.weight': tensor(LAYER + 'post_ffn_norm.weight'),
    },
)

# --- Laguna ---------------------------------------------------------------------------------------

_LAGUNA_ROPE = {
    FULL: {'rope_type': 'default', 'rope_theta': 5e5, 'partial_rotary_factor': 0.5},
    WINDOW: {'rope_type': 'default', 'rope_theta': 1e4},
}
_rope = rope_by_layer_type_fields(
    partial(read_layer_types, has_window=lambda layer, fields: False),
    default_theta={WINDOW: 1e4, FULL: 1e4},
    version_4=False,
    partial=True,
)


def _read_laguna_rope(fields: Fields) -> dict:
    if fields.value('rope_parameters') is None:
        fields.values['rope_parameters'] = _LAGUNA_ROPE
    return _rope.read(fields)


def _read_heads(fields: Fields) -> dict:
    """Layers may have different numbers of heads, for the same number of keys and values."""
    layers, heads = (
        fields.take('num_hidden_layers', int, 0),
        fields.take('num_attention_heads', int),
    )
    shared = fields.take('num_key_value_heads', int, 8)
    each = fields.take('num_attention_heads_per_layer', list[int], optional=True)
    if each is None:
        each = [heads] * min(layers, MAX_LAYERS)
    else:
        fields.require_length('num_attention_heads_per_layer', each, layers)
    return {
        'n_head': PerLayer(each),
        'use_gqa': PerLayer(number != shared for number in each),
        'num_kv_heads': PerLayer(ABSENT if number == shared else shared for number in each),
    }


def _write_heads(config: ModelArchitectureConfig) -> dict:
    heads = [layer.n_head for layer in config.layers]
    return {
        'num_attention_heads': heads[0],
        'num_attention_heads_per_layer': heads,
        'num_key_value_heads': num_kv_heads_of(config.layers[0]),
    }


LAGUNA = Family(
    name='laguna',
    architecture='LagunaForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=131_072),
        field('head_dim', 'head_dim', 128),
        field('weight_tying', 'tie_word_embeddings', False),
        field(
            *('attention_gate', 'gating', True),
            {True: 'head', 'per-head': 'head', 'per-element': 'elementwise'},
        ),
        constant_option(attention_gate_function='softplus', ffn_bias=False),
        constant_option(qk_norm='rmsnorm', qk_norm_scope='head', attention_bias=False),
        # With biases, the gates have none.
        required_field(hidden_act='silu', attention_bias=False),
        FieldMap(_read_heads, _write_heads),
        windows_field(512, lambda layer, fields: False),
        FieldMap(_read_laguna_rope, _rope.write),
        layer_kinds_field(
            named_by_list('mlp_layer_types'),
            named_by_default(first_is_dense),
            kinds=dense_and_sparse(
                field('d_ff', 'intermediate_size', 8192),
                field('num_experts', 'num_experts', 256),
                field('experts_per_token', 'num_experts_per_tok', 8),
                field('expert_d_ff', 'moe_intermediate_size', 512),
                field('router_scale', 'moe_routed_scaling_factor', 1.0),
                shared_experts_field('shared_expert_intermediate_size', 512),
                BALANCED_ROUTER,
                required_field(
                    moe_router_logit_softcapping=0.0,
                    moe_apply_router_weight_on_input=False,
                ),
            ),
        ),
    ),
    aliases={'num_local_experts': 'num_experts'},
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | QK_NORMS
    | GATED_FFN
    | EXPERTS
    | SHARED_EXPERT
    | selection_bias(LAYER + 'mlp.experts.e_score_correction_bias')
    | {
        'blocks.{layer}.attention.qkv.weight': TensorMap(
            projections('self_attn', 'q', 'k', 'v', 'g'), rows=query_key_value_gate_rows
        ),
        'blocks.{layer}.attention.output.weight': TensorMap(projections('self_attn', 'o')),
    },
)
