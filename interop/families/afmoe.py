"""Arcee's Trinity (AFMoE): gated attention, windows with RoPE, sandwich norms, balanced experts."""

from interop.families.deepseek import SHARED_EXPERTS
from interop.families.llama import (
    EMBEDDING_AND_HEAD,
    EXPERTS,
    GATED_FFN,
    LAYER,
    QK_NORMS,
    llama_fields,
    projections,
    query_key_value_gate_rows,
)
from interop.fields import Fields
from interop.layer_kinds import (
    DENSE,
    SPARSE,
    dense_and_sparse,
    layer_kinds_field,
    named_by_number,
)
from interop.mapping import (
    WINDOW,
    Family,
    all_but_every_nth,
    constant_option,
    field,
    kv_heads_field,
    read_layer_types,
    required_field,
    windows_field,
)
from interop.rope import rope_fields, rope_in_some_layers
from interop.routing import BALANCED_ROUTER, selection_bias
from interop.tensors import TensorMap, tensor

_has_window = all_but_every_nth('global_attn_every_n_layers', 4)


def _read_rotated(fields: Fields) -> list[bool]:
    return [kind == WINDOW for kind in read_layer_types(fields, _has_window)]


AFMOE = Family(
    name='afmoe',
    architecture='AfmoeForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=16384, norm_eps=1e-5),
        field('head_dim', 'head_dim', 128),
        field('scale_embeddings', 'mup_enabled', False),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(norm_position='sandwich', attention_gate='elementwise'),
        constant_option(qk_norm='rmsnorm', qk_norm_scope='head'),
        constant_option(attention_bias=False, ffn_bias=False),
        required_field(hidden_act='silu', attention_bias=False),
        # In released files; transformers has no others.
        required_field(score_func='sigmoid', route_norm=True, n_group=1, topk_group=1),
        required_field(num_expert_groups=1, num_limited_groups=1),
        kv_heads_field(),
        windows_field(1024, _has_window),
        rope_in_some_layers(rope_fields(), _read_rotated),
        layer_kinds_field(
            named_by_number('num_dense_layers', 1, DENSE, SPARSE),
            kinds=dense_and_sparse(
                field('d_ff', 'intermediate_size', 6144),
                field('num_experts', 'num_experts', 64),
                field('experts_per_token', 'num_experts_per_tok', 6),
                field('expert_d_ff', 'moe_intermediate_size', 1408),
                field('shared_experts', 'num_shared_experts', 2),
                field('router_scale', 'route_scale', 1.0),
                BALANCED_ROUTER,
            ),
        ),
    ),
    # Superseded by layer_types; kernels and training.
    irrelevant_fields=frozenset(
        {'global_attn_every_n_layers', 'use_grouped_mm', 'load_balance_coeff'}
    ),
    weights=EMBEDDING_AND_HEAD
    | QK_NORMS
    | GATED_FFN
    | EXPERTS
    | SHARED_EXPERTS
    | selection_bias(LAYER + 'mlp.expert_bias')
    | {
        'blocks.{layer}.attention_norm.weight': tensor(LAYER + 'input_layernorm.weight'),
        'blocks.{layer}.attention_output_norm.weight': tensor(
            LAYER + 'post_attention_layernorm.weight'
        ),
        'blocks.{layer}.ffn_norm.weight': tensor(LAYER + 'pre_mlp_layernorm.weight'),
        'blocks.{layer}.ffn_output_norm.weight': tensor(LAYER + 'post_mlp_layernorm.weight'),
        'blocks.{layer}.attention.qkv.weight': TensorMap(
            projections('self_attn', 'q', 'k', 'v', 'gate'), rows=query_key_value_gate_rows
        ),
        'blocks.{layer}.attention.output.weight': TensorMap(projections('self_attn', 'o')),
        'blocks.{layer}.ffn.router.weight': tensor(LAYER + 'mlp.router.gate.weight'),
    },
)
