"""Mixtures of experts: Qwen2-MoE, Ernie 4.5, Hunyuan V3, K-EXAONE."""

import torch

from interop.families.deepseek import SHARED_EXPERTS
from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    EXPERTS,
    GATED_FFN,
    LAYER,
    PAIRED_ATTENTION,
    PRE_NORMS,
    QK_NORMS,
    llama_fields,
    projections,
)
from interop.families.mixed_layers import EXAONE4_LAYERS
from interop.families.qwen3_next import SHARED_EXPERT, SPARSE_STEPS
from interop.fields import Fields
from interop.layer_kinds import (
    DENSE,
    SPARSE,
    LayerNames,
    dense_and_sparse,
    first_is_dense,
    layer_kinds_field,
    named_by_default,
    named_by_list,
    named_by_number,
)
from interop.mapping import (
    Family,
    constant_option,
    field,
    kv_heads_field,
    required_field,
    shared_experts_field,
    windows_field,
)
from interop.rope import rope_fields
from interop.routing import BALANCED_ROUTER, biased_router_fields, selection_bias
from interop.tensors import Layout, TensorMap, tensor, with_biases

# --- Qwen2-MoE ------------------------------------------------------------------------------------

QWEN2_MOE = Family(
    name='qwen2_moe',
    architecture='Qwen2MoeForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=32768),
        field('head_dim', 'head_dim', None),
        field('attention_bias', 'qkv_bias', True),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(attention_output_bias=False, ffn_bias=False),
        required_field(hidden_act='silu'),
        windows_field(
            4096,
            lambda layer, fields: (
                layer % 2 == 0 and layer < fields.take('max_window_layers', int, 28)
            ),
            switch='use_sliding_window',
        ),
        kv_heads_field(16),
        rope_fields(),
        layer_kinds_field(
            SPARSE_STEPS,
            kinds=dense_and_sparse(
                field('d_ff', 'intermediate_size', 5632),
                field('num_experts', 'num_experts', 60),
                field('experts_per_token', 'num_experts_per_tok', 4),
                field('expert_d_ff', 'moe_intermediate_size', 1408),
                field('router_normalize', 'norm_topk_prob', False),
                shared_experts_field('shared_expert_intermediate_size', 5632, each=1408),
                constant_option(router_score='softmax', shared_gate=True),
            ),
        ),
    ),
    aliases={'num_local_experts': 'num_experts'},
    irrelevant_fields=frozenset({'max_window_layers'}),  # superseded by layer_types
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | GATED_FFN
    | EXPERTS
    | SHARED_EXPERT
    | with_biases(ATTENTION),
)

# --- Ernie 4.5 ------------------------------------------------------------------------------------


def _read_interval(fields: Fields, layers: int | None) -> list[str]:
    """Every n-th layer between two of them is sparse."""
    last = (layers or 0) - 1
    step = fields.take('moe_layer_interval', int, 1)
    first, end = (
        fields.take(f'moe_layer_{name}_index', int, default)
        for name, default in (('start', 1), ('end', -1))
    )
    if step < 1:
        fields.refuse('moe_layer_interval', 'must be at least 1')
    end = last if end == -1 else end
    return [
        SPARSE if (layer + 1) % max(step, 1) == 0 and first <= layer <= end else DENSE
        for layer in range(last + 1)
    ]


def _write_interval(names: list[str]) -> dict:
    sparse = [layer for layer, name in enumerate(names) if name == SPARSE] or [len(names)]
    return {
        'moe_layer_interval': sparse[1] - sparse[0] if len(sparse) > 1 else 1,
        'moe_layer_start_index': sparse[0],
        'moe_layer_end_index': sparse[-1],
    }


_INTERVAL = ('moe_layer_interval', 'moe_layer_start_index', 'moe_layer_end_index')

ERNIE4_5_MOE = Family(
    name='ernie4_5_moe',
    architecture='Ernie4_5_MoeForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=131_072, norm_eps=1e-5),
        field('head_dim', 'head_dim', None),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(attention_bias=False, ffn_bias=False),
        # The weights of the chosen experts are never as small as moe_norm_min.
        required_field(hidden_act='silu', use_bias=False, moe_norm_min=1e-12),
        kv_heads_field(4),
        rope_fields(default_theta=5e5),
        layer_kinds_field(
            LayerNames(_INTERVAL, _read_interval, _write_interval),
            kinds=dense_and_sparse(
                field('d_ff', 'intermediate_size', 12288),
                field('num_experts', 'moe_num_experts', 64),
                field('experts_per_token', 'moe_k', 6),
                field('expert_d_ff', 'moe_intermediate_size', 1536),
                field('shared_experts', 'moe_num_shared_experts', 2),
                constant_option(router_score='softmax'),
                constant_option(router_normalize=True, router_selection_bias=True),
                constant_option(router_scale=1.0, router_groups=1),
            ),
        ),
    ),
    aliases={'num_experts': 'moe_num_experts', 'num_experts_per_tok': 'moe_k'},
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | GATED_FFN
    | EXPERTS
    | SHARED_EXPERTS
    | PAIRED_ATTENTION
    | {
        'blocks.{layer}.ffn.router.selection_bias': tensor(
            LAYER + 'mlp.moe_statics.e_score_correction_bias',
            layout=Layout(torch.flatten, lambda ours: ours[None]),
        )
    },
)

# --- Hunyuan V3 -----------------------------------------------------------------------------------


HY_V3 = Family(
    name='hy_v3',
    architecture='HYV3ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=131_072, norm_eps=1e-5),
        field('head_dim', 'head_dim', 128),
        field('attention_bias', 'attention_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(qk_norm='rmsnorm', qk_norm_scope='head', ffn_bias=False),
        required_field(hidden_act='silu', mlp_bias=False),
        kv_heads_field(8),
        rope_fields(default_theta=11_158_840.0),
        layer_kinds_field(
            named_by_list('mlp_layer_types'),
            named_by_default(first_is_dense),
            kinds=dense_and_sparse(
                field('d_ff', 'intermediate_size', 13312),
                field('num_experts', 'num_experts', 192),
                field('experts_per_token', 'num_experts_per_tok', 8),
                field('expert_d_ff', 'moe_intermediate_size', 1536),
                field('shared_experts', 'num_shared_experts', 1),
                field('router_scale', 'router_scaling_factor', 2.826),
                BALANCED_ROUTER,
            ),
        ),
    ),
    aliases={'num_local_experts': 'num_experts'},
    irrelevant_fields=frozenset({'enable_moe_fp32_combine'}),  # of rounding
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | QK_NORMS
    | GATED_FFN
    | EXPERTS
    | with_biases(ATTENTION)
    | selection_bias(LAYER + 'mlp.expert_bias')
    | {
        'blocks.{layer}.ffn.router.weight': tensor(LAYER + 'mlp.router.gate.weight'),
        'blocks.{layer}.ffn.shared.gate_up.weight': TensorMap(
            projections('mlp.shared_mlp', 'gate', 'up')
        ),
        'blocks.{layer}.ffn.shared.down.weight': TensorMap(projections('mlp.shared_mlp', 'down')),
    },
)

# --- K-EXAONE -------------------------------------------------------------------------------------

EXAONE_MOE = Family(
    name='exaone_moe',
    architecture='ExaoneMoeForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=2048, norm_eps=1e-5),
        field('head_dim', 'head_dim', None),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(qk_norm='rmsnorm', qk_norm_scope='head'),
        constant_option(attention_bias=False, ffn_bias=False),
        required_field(hidden_act='silu'),
        required_field(scoring_func='sigmoid', topk_method='noaux_tc'),  # in released files
        kv_heads_field(32),
        *EXAONE4_LAYERS,
        layer_kinds_field(
            named_by_list('mlp_layer_types'),
            named_by_number('first_k_dense_replace', 1, DENSE, SPARSE),
            kinds=dense_and_sparse(
                field('d_ff', 'intermediate_size', 16384),
                field('num_experts', 'num_experts', 64),
                field('experts_per_token', 'num_experts_per_tok', 8),
                field('expert_d_ff', 'moe_intermediate_size', 1024),
                field('shared_experts', 'num_shared_experts', 1),
                *biased_router_fields(True, 2.5),
            ),
        ),
    ),
    # Superseded by layer_types and mlp_layer_types; multi-token prediction.
    irrelevant_fields=frozenset(
        {
            *('sliding_window_pattern', 'first_last_k_dense_replace', 'is_moe_layer'),
            'num_nextn_predict_layers',
        }
    ),
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | QK_NORMS
    | GATED_FFN
    | EXPERTS
    | SHARED_EXPERTS
    | ATTENTION
    | selection_bias(LAYER + 'mlp.e_score_correction_bias'),
)
