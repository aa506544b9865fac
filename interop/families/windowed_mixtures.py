"""Mixtures of experts with windows: Flint, Kolibri."""

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
)
from interop.families.qwen3_next import DENSE, SHARED_EXPERT, SPARSE, sparse_steps
from interop.fields import Fields
from interop.layer_kinds import LayerKind, layer_kinds_field
from interop.mapping import (
    WINDOW,
    Family,
    constant_option,
    field,
    kv_heads_field,
    read_layer_types,
    required_field,
    shared_experts_field,
    windows_field,
)
from interop.rope import rope_fields, rope_in_some_layers
from interop.routing import selection_bias
from interop.tensors import tensor, with_biases

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
            kinds={
                DENSE: LayerKind(
                    {'ffn_type': 'swiglu'}, (field('d_ff', 'intermediate_size', 6144),)
                ),
                SPARSE: LayerKind(
                    {'ffn_type': 'moe'},
                    (
                        field('num_experts', 'num_experts', 256),
                        field('experts_per_token', 'num_experts_per_tok', 6),
                        field('expert_d_ff', 'moe_intermediate_size', 512),
                        field('router_normalize', 'norm_topk_prob', True),
                        shared_experts_field('shared_expert_intermediate_size', 1024, each=512),
                        constant_option(expert_ffn='swiglu', router_score='sigmoid'),
                    ),
                ),
            },
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
