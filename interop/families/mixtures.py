"""Llamas with mixtures of experts: Qwen3-MoE, OLMoE, FlexOlmo."""

from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    EXPERTS,
    GATED_FFN,
    PRE_NORMS,
    QK_NORMS,
    REORDERED_NORMS,
    llama_fields,
)
from interop.families.qwen3_next import SPARSE_STEPS
from interop.fields import Fields
from interop.layer_kinds import (
    dense_and_sparse,
    layer_kinds_field,
)
from interop.layers import options_with
from interop.mapping import (
    Family,
    FieldMap,
    constant_option,
    field,
    head_size_field,
    kv_heads_field,
    required_field,
)
from interop.rope import rope_fields
from interop.tensors import with_biases
from model_config import ModelArchitectureConfig

# --- Qwen3-MoE ------------------------------------------------------------------------------------

_WINDOW = 4096  # if the field is missing


def _read_window(fields: Fields) -> dict:
    """One window for all layers, if it is enabled."""
    window = fields.take('sliding_window', int, _WINDOW, optional=True)
    return {'sliding_window': window if fields.take('use_sliding_window', bool, False) else None}


def _write_window(config: ModelArchitectureConfig) -> dict:
    window = options_with(config, 'sliding_window').get('sliding_window')
    return {'use_sliding_window': window is not None, 'sliding_window': window}


_QWEN3_FFNS = layer_kinds_field(
    SPARSE_STEPS,
    kinds=dense_and_sparse(
        field('d_ff', 'intermediate_size', 6144),
        field('num_experts', 'num_local_experts', 128),
        field('experts_per_token', 'num_experts_per_tok', 8),
        field('expert_d_ff', 'moe_intermediate_size', 768),
        field('router_normalize', 'norm_topk_prob', False),
        constant_option(router_score='softmax'),
    ),
)

QWEN3_MOE = Family(
    name='qwen3_moe',
    architecture='Qwen3MoeForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=32768),
        field('head_dim', 'head_dim', None),
        field('attention_bias', 'attention_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(qk_norm='rmsnorm', qk_norm_scope='head', ffn_bias=False),
        FieldMap(_read_window, _write_window),
        required_field(hidden_act='silu'),
        kv_heads_field(4),
        rope_fields(),
        _QWEN3_FFNS,
    ),
    aliases={'num_experts': 'num_local_experts'},
    irrelevant_fields=frozenset({'max_window_layers'}),  # in published files
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | QK_NORMS
    | GATED_FFN
    | EXPERTS
    | with_biases(ATTENTION),
)

# --- OLMoE and FlexOlmo ---------------------------------------------------------------------------


def _olmo_fields(experts: int, experts_per_token: int, theta: float) -> tuple[FieldMap, ...]:
    """What both have, with defaults that differ."""
    return (
        field('expert_d_ff', 'intermediate_size', 2048),
        field('attention_bias', 'attention_bias', False),
        field('num_experts', 'num_experts', experts),
        field('experts_per_token', 'num_experts_per_tok', experts_per_token),
        field('router_normalize', 'norm_topk_prob', False),
        field('expert_ffn', 'hidden_act', 'silu', {'silu': 'swiglu'}),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(ffn_type='moe', router_score='softmax', ffn_bias=False),
        constant_option(qk_norm='rmsnorm', qk_norm_scope='projection'),
        kv_heads_field(),
        rope_fields(default_theta=theta),
    )


_OLMO_WEIGHTS = EMBEDDING_AND_HEAD | QK_NORMS | EXPERTS | with_biases(ATTENTION)

OLMOE = Family(
    name='olmoe',
    architecture='OlmoeForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=4096, norm_eps=1e-5),
        *_olmo_fields(experts=64, experts_per_token=8, theta=1e4),
        required_field(clip_qkv=None),
        head_size_field(),
    ),
    aliases={'num_local_experts': 'num_experts'},
    weights=_OLMO_WEIGHTS | PRE_NORMS,
)

FLEX_OLMO = Family(
    name='flex_olmo',
    architecture='FlexOlmoForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=4096),
        *_olmo_fields(experts=7, experts_per_token=5, theta=5e5),
        field('head_dim', 'head_dim', None),
        constant_option(norm_position='reordered'),
    ),
    aliases={'num_local_experts': 'num_experts'},
    weights=_OLMO_WEIGHTS | REORDERED_NORMS,
)
