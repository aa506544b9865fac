"""Mixtures with the router of DeepSeek-V3: GLM-4.5 and 4.7, Solar Open, dots.llm1, MiniMax-M2."""

from interop.families.deepseek import (
    DEEPSEEK_BIAS,
    DEEPSEEK_WEIGHTS,
    HEAD_DIM,
    SHARED_EXPERTS,
    dense_layers_field,
    expert_fields,
    latent_attention_fields,
    latent_norm_field,
)
from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    EXPERTS,
    GATED_FFN,
    LAYER,
    MIXTRAL_EXPERTS,
    PRE_NORMS,
    QK_NORMS,
    llama_fields,
)
from interop.fields import Fields
from interop.layer_kinds import (
    dense_and_sparse,
    first_is_dense,
    layer_kinds_field,
    named_by_default,
    named_by_list,
)
from interop.layers import options_with
from interop.mapping import (
    Family,
    FieldMap,
    constant_option,
    field,
    kv_heads_field,
    required_field,
    windows_field,
)
from interop.rope import deepseek_rope_fields, rope_fields
from interop.routing import biased_router_fields, selection_bias
from interop.tensors import with_biases
from model_config import ModelArchitectureConfig

# Multi-token prediction has layers of its own, whose tensors are refused.
_OF_LATER_TOKENS = frozenset({'num_nextn_predict_layers', 'num_mtp_layers'})

# --- GLM-4.5 --------------------------------------------------------------------------------------


def _qk_norm_field(default: bool) -> FieldMap:
    def read(fields: Fields) -> dict:
        if fields.take('use_qk_norm', bool, default):
            return {'qk_norm': 'rmsnorm', 'qk_norm_scope': 'head'}
        return {'qk_norm': 'none'}

    def write(config: ModelArchitectureConfig) -> dict:
        return {'use_qk_norm': options_with(config, 'qk_norm').get('qk_norm', 'none') != 'none'}

    return FieldMap(read, write)


def glm4_moe_fields(
    norm_eps: float,
    d_ff: int,
    head_dim: int | None,
    qk_norm: bool,
    experts: tuple[FieldMap, ...],
    scale: float,
    kv_heads: int,
    rope: FieldMap,
) -> tuple[FieldMap, ...]:
    """GLM-4.5 and its aliases, by the values of missing fields. scale: of the router."""
    return (
        *llama_fields(block_size=131072, norm_eps=norm_eps),
        field('d_ff', 'intermediate_size', d_ff),
        field('head_dim', 'head_dim', head_dim),
        # Of queries, keys and values.
        field('attention_bias', 'attention_bias', False),
        constant_option(attention_output_bias=False, ffn_type='moe', ffn_bias=False),
        _qk_norm_field(qk_norm),
        field('weight_tying', 'tie_word_embeddings', False),
        field('expert_ffn', 'hidden_act', 'silu', {'silu': 'swiglu'}),
        *experts,
        dense_layers_field(1),
        *biased_router_fields(True, scale),
        kv_heads_field(kv_heads),
        rope,
    )


GLM4_MOE = Family(
    name='glm4_moe',
    architecture='Glm4MoeForCausalLM',
    prefix='model.',
    field_maps=glm4_moe_fields(
        norm_eps=1e-5,
        d_ff=10944,
        head_dim=None,
        qk_norm=False,
        experts=expert_fields(1408, experts=128, chosen=8, shared=1),
        scale=1.0,
        kv_heads=8,
        rope=rope_fields(fraction='partial_rotary_factor', default_fraction=0.5),
    ),
    aliases={'num_local_experts': 'n_routed_experts'},
    irrelevant_fields=_OF_LATER_TOKENS,
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | QK_NORMS
    | with_biases(ATTENTION)
    | GATED_FFN
    | EXPERTS
    | SHARED_EXPERTS
    | DEEPSEEK_BIAS,
)


GLM4_MOE_LITE = Family(
    name='glm4_moe_lite',
    architecture='Glm4MoeLiteForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=202752, norm_eps=1e-5),
        latent_norm_field(1e-5),
        *latent_attention_fields(768, 192, 256),
        HEAD_DIM,
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(ffn_bias=False),
        required_field(hidden_act='silu', rope_interleave=True),
        layer_kinds_field(
            named_by_list('mlp_layer_types'),
            named_by_default(first_is_dense),
            kinds=dense_and_sparse(
                field('d_ff', 'intermediate_size', 10240),
                *expert_fields(1536, experts=64, chosen=4, shared=1),
                *biased_router_fields(True, 1.8),
            ),
        ),
        deepseek_rope_fields(192),
    ),
    aliases={'num_local_experts': 'n_routed_experts'},
    irrelevant_fields=_OF_LATER_TOKENS | {'qk_head_dim'},
    weights=DEEPSEEK_WEIGHTS | DEEPSEEK_BIAS,
)

# --- Solar Open -----------------------------------------------------------------------------------

SOLAR_OPEN = Family(
    name='solar_open',
    architecture='SolarOpenForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=131_072, norm_eps=1e-5),
        field('head_dim', 'head_dim', 128),
        field('attention_bias', 'attention_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(attention_output_bias=False, ffn_type='moe', ffn_bias=False),
        field('expert_ffn', 'hidden_act', 'silu', {'silu': 'swiglu'}),
        *expert_fields(1280, experts=128, chosen=8, shared=1),
        *biased_router_fields(True, 1.0),
        kv_heads_field(8),
        rope_fields(default_theta=1e6, fraction='partial_rotary_factor', default_fraction=1.0),
    ),
    aliases={'num_local_experts': 'n_routed_experts'},
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | with_biases(ATTENTION)
    | EXPERTS
    | SHARED_EXPERTS
    | DEEPSEEK_BIAS,
)

# --- dots.llm1 ------------------------------------------------------------------------------------

DOTS1 = Family(
    name='dots1',
    architecture='Dots1ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=2048),
        field('d_ff', 'intermediate_size', 10944),
        field('head_dim', 'head_dim', None),
        field('attention_bias', 'attention_bias', False),
        constant_option(qk_norm='rmsnorm', qk_norm_scope='head', ffn_type='moe', ffn_bias=False),
        field('weight_tying', 'tie_word_embeddings', False),
        field('expert_ffn', 'hidden_act', 'silu', {'silu': 'swiglu'}),
        *expert_fields(1408),
        dense_layers_field(0),
        *biased_router_fields(False, 1.0),
        windows_field(
            4096, lambda layer, fields: layer >= fields.take('max_window_layers', int, 62)
        ),
        kv_heads_field(32),
        rope_fields(),
    ),
    aliases={'num_local_experts': 'n_routed_experts'},
    irrelevant_fields=frozenset({'max_window_layers'}),  # superseded by layer_types
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | QK_NORMS
    | with_biases(ATTENTION)
    | GATED_FFN
    | EXPERTS
    | SHARED_EXPERTS
    | DEEPSEEK_BIAS,
)

# --- MiniMax-M2 -----------------------------------------------------------------------------------

_PARTIAL = rope_fields(default_theta=5e6, fraction='partial_rotary_factor', default_fraction=1.0)


def _read_partial_rope(fields: Fields) -> dict:
    """Rotary positions, of `rotary_dim` dimensions in released files."""
    rotated = fields.take('rotary_dim', int, optional=True)
    if rotated is not None:
        fraction = rotated / max(fields.take('head_dim', int, 128), 1)
        fields.values.setdefault('partial_rotary_factor', fraction)
    return _PARTIAL.read(fields)


MINIMAX_M2 = Family(
    name='minimax_m2',
    architecture='MiniMaxM2ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=196608),
        field('expert_d_ff', 'intermediate_size', 1536),
        field('head_dim', 'head_dim', 128),
        constant_option(qk_norm='rmsnorm', qk_norm_scope='projection', attention_bias=False),
        constant_option(ffn_type='moe', ffn_bias=False, shared_experts=0),
        constant_option(router_score='sigmoid', router_selection_bias=True),
        constant_option(router_normalize=True, router_scale=1.0),
        field('weight_tying', 'tie_word_embeddings', False),
        field('expert_ffn', 'hidden_act', 'silu', {'silu': 'swiglu'}),
        field('num_experts', 'num_local_experts', 256),
        field('experts_per_token', 'num_experts_per_tok', 8),
        kv_heads_field(8),
        FieldMap(_read_partial_rope, _PARTIAL.write),
    ),
    aliases={'num_experts': 'num_local_experts'},
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | QK_NORMS
    | ATTENTION
    | MIXTRAL_EXPERTS
    | selection_bias(LAYER + 'block_sparse_moe.e_score_correction_bias'),
)
