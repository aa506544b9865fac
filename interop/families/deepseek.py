"""DeepSeek-V2 and V3, and Youtu, which has their attention and a dense FFN."""

import itertools
from typing import Any

import torch

from interop.families.llama import (
    EMBEDDING_AND_HEAD,
    EXPERTS,
    GATED_FFN,
    LAYER,
    PRE_NORMS,
    ROTARY_BUFFERS,
    llama_fields,
    projections,
    swiglu_field,
)
from interop.fields import Fields
from interop.layers import options_with
from interop.mapping import (
    REQUIRED,
    Family,
    FieldMap,
    check_heads_divide_width,
    constant_option,
    field,
    required_field,
)
from interop.rope import deepseek_rope_fields
from interop.rotary_rows import rows_of_interleaved_head
from interop.routing import biased_router_fields, router_groups_field, selection_bias
from interop.tensors import TensorMap, tensor, with_biases
from model_config import ModelArchitectureConfig


def _rope_rows(config: ModelArchitectureConfig) -> torch.Tensor:
    """The order of the rotated rows of a head."""
    return rows_of_interleaved_head(config.qk_rope_head_dim, config.qk_rope_head_dim)


def _query_rows(config: ModelArchitectureConfig) -> torch.Tensor:
    nope = torch.arange(config.qk_nope_head_dim)
    head = torch.cat((nope, len(nope) + _rope_rows(config)))
    return (torch.arange(config.n_head)[:, None] * len(head) + head).flatten()


def _latent_rows(config: ModelArchitectureConfig) -> torch.Tensor:
    latent = torch.arange(config.kv_lora_rank)
    return torch.cat((latent, len(latent) + _rope_rows(config)))


def _query_name(config: ModelArchitectureConfig) -> tuple[str, ...]:
    return projections('self_attn', 'q' if config.q_lora_rank is None else 'q_b')


_GROUPS = router_groups_field(None, None, 'max')


def _read_choice(fields: Fields) -> dict:
    """The choice of experts of DeepSeek-V2: from all, or from groups."""
    method = fields.value('topk_method', 'greedy')
    if method == 'group_limited_greedy':
        return _GROUPS.read(fields)
    if method != 'greedy':
        fields.refuse('topk_method', "supported: 'greedy', 'group_limited_greedy'")
    fields.unread.difference_update({'n_group', 'topk_group'})
    return {'router_groups': 1}


def _write_choice(config: ModelArchitectureConfig) -> dict:
    if options_with(config, 'router_groups').get('router_groups', 1) == 1:
        return {'topk_method': 'greedy'}
    return {'topk_method': 'group_limited_greedy', **_GROUPS.write(config)}


def _read_latent_kv_heads(fields: Fields) -> dict:
    heads = fields.take('num_attention_heads', int)
    if fields.take('num_key_value_heads', int, optional=True) not in (None, heads):
        fields.refuse('num_key_value_heads', f'latent attention requires {heads}, as many as heads')
    return {}


latent_kv_heads_field = FieldMap(
    _read_latent_kv_heads, lambda config: {'num_key_value_heads': config.layers[0].n_head}
)


def latent_norm_field(default: float) -> FieldMap:
    """The norms of latents, whose epsilon is 1e-6 whatever the field is. default: of the field."""

    def read(fields: Fields) -> dict:
        other = fields.take('rms_norm_eps', float, default) != 1e-6
        return {'latent_norm_eps': 1e-6 if other else None}

    return FieldMap(read, lambda config: {})


def _read_head_dim(fields: Fields) -> dict:
    """The rotated size of a head, which must equal qk_rope_head_dim."""
    rope_head_dim = fields.take('qk_rope_head_dim', int, 64)
    if fields.take('head_dim', int, optional=True) not in (None, rope_head_dim):
        fields.refuse('head_dim', f'must be qk_rope_head_dim={rope_head_dim}')
    return {}


def dense_layers_field(default: int) -> FieldMap:
    """The number of first layers without a mixture of experts."""

    def write(config: ModelArchitectureConfig) -> dict:
        dense = itertools.takewhile(lambda layer: layer.ffn_type != 'moe', config.layers)
        return {'first_k_dense_replace': len(list(dense))}

    return FieldMap(field('dense_layers', 'first_k_dense_replace', default).read, write)


def latent_attention_fields(
    q_rank: int | None, nope: int = 128, values: int = 128
) -> tuple[FieldMap, ...]:
    """The fields of latent attention, with defaults for the rank of queries and the head sizes."""
    return (
        field('q_lora_rank', 'q_lora_rank', q_rank),
        field('kv_lora_rank', 'kv_lora_rank', 512),
        field('qk_nope_head_dim', 'qk_nope_head_dim', nope),
        field('qk_rope_head_dim', 'qk_rope_head_dim', 64),
        field('v_head_dim', 'v_head_dim', values),
        field('attention_bias', 'attention_bias', False),
        constant_option(attention_type='mla'),
        latent_kv_heads_field,
    )


HEAD_DIM = FieldMap(_read_head_dim, lambda config: {})
_DEEPSEEK = (
    latent_norm_field(1e-6),
    field('d_ff', 'intermediate_size'),
    field('expert_ffn', 'hidden_act', 'silu', {'silu': 'swiglu'}),
    field('weight_tying', 'tie_word_embeddings', False),
    constant_option(ffn_type='moe', ffn_bias=False),
    required_field(moe_layer_freq=1),
    deepseek_rope_fields(),
)
# Multi-token prediction has layers of its own, whose tensors are refused.
_IRRELEVANT_FIELDS = frozenset({'qk_head_dim', 'num_nextn_predict_layers', 'num_mtp_layers'})
LATENT_ATTENTION = {
    'blocks.{layer}.attention.q_norm.weight': tensor(LAYER + 'self_attn.q_a_layernorm.weight'),
    'blocks.{layer}.attention.kv_norm.weight': tensor(LAYER + 'self_attn.kv_a_layernorm.weight'),
    'blocks.{layer}.attention.q.weight': TensorMap(
        projections('self_attn', 'q_b'), choose_templates=_query_name, row_order=_query_rows
    ),
    'blocks.{layer}.attention.kv.weight': TensorMap(projections('self_attn', 'kv_b')),
    **with_biases(
        {
            'blocks.{layer}.attention.q_down.weight': TensorMap(projections('self_attn', 'q_a')),
            'blocks.{layer}.attention.kv_down.weight': tensor(
                LAYER + 'self_attn.kv_a_proj_with_mqa.weight', row_order=_latent_rows
            ),
            'blocks.{layer}.attention.output.weight': TensorMap(projections('self_attn', 'o')),
        }
    ),
}
SHARED_EXPERTS = {
    'blocks.{layer}.ffn.shared.gate_up.weight': TensorMap(
        projections('mlp.shared_experts', 'gate', 'up')
    ),
    'blocks.{layer}.ffn.shared.down.weight': TensorMap(projections('mlp.shared_experts', 'down')),
}
DEEPSEEK_WEIGHTS = (
    EMBEDDING_AND_HEAD | PRE_NORMS | GATED_FFN | EXPERTS | LATENT_ATTENTION | SHARED_EXPERTS
)
DEEPSEEK_BIAS = selection_bias(LAYER + 'mlp.gate.e_score_correction_bias')


def expert_fields(
    width: int, experts: Any = REQUIRED, chosen: Any = REQUIRED, shared: Any = REQUIRED
) -> tuple[FieldMap, ...]:
    """Routed and shared experts, by the values of missing fields.

    width: of an expert. experts: their number. chosen: the number of a token's.
    """
    return (
        field('num_experts', 'n_routed_experts', experts),
        field('experts_per_token', 'num_experts_per_tok', chosen),
        field('expert_d_ff', 'moe_intermediate_size', width),
        field('shared_experts', 'n_shared_experts', shared),
    )


DEEPSEEK_V2 = Family(
    name='deepseek_v2',
    architecture='DeepseekV2ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=2048),
        *_DEEPSEEK,
        *latent_attention_fields(1536),
        HEAD_DIM,
        *expert_fields(1407, experts=64, shared=2),
        dense_layers_field(0),
        field('router_scale', 'routed_scaling_factor', 1.0),
        constant_option(router_score='softmax', router_normalize=False),
        FieldMap(_read_choice, _write_choice),
        required_field(norm_topk_prob=False, mlp_bias=False),
        required_field(scoring_func='softmax'),
    ),
    aliases={'num_experts': 'n_routed_experts'},
    irrelevant_fields=_IRRELEVANT_FIELDS,
    check_loadable=check_heads_divide_width,
    weights=DEEPSEEK_WEIGHTS,
    ignored_tensors=ROTARY_BUFFERS,
)


def deepseek_v3_fields(
    q_rank: int | None, experts: int, dense: int, groups: int, per_token: int
) -> tuple[FieldMap, ...]:
    """DeepSeek-V3 by the values of missing fields. dense: number of layers without experts.
    per_token: groups of experts of a token."""
    return (
        *llama_fields(block_size=4096),
        *_DEEPSEEK,
        *latent_attention_fields(q_rank),
        *expert_fields(2048, experts=experts, chosen=8, shared=1),
        dense_layers_field(dense),
        *biased_router_fields(True, 2.5, groups, per_token),
        required_field(rope_interleave=True, scoring_func='sigmoid', topk_method='noaux_tc'),
    )


DEEPSEEK_V3 = Family(
    name='deepseek_v3',
    architecture='DeepseekV3ForCausalLM',
    prefix='model.',
    field_maps=(*deepseek_v3_fields(1536, 256, 3, 8, 4), HEAD_DIM),
    aliases={'num_local_experts': 'n_routed_experts'},
    irrelevant_fields=_IRRELEVANT_FIELDS,
    weights=DEEPSEEK_WEIGHTS | DEEPSEEK_BIAS,
    ignored_tensors=ROTARY_BUFFERS,
)

YOUTU = Family(
    name='youtu',
    architecture='YoutuForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=131_072),
        latent_norm_field(1e-6),
        *latent_attention_fields(1536),
        HEAD_DIM,
        field('d_ff', 'intermediate_size'),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(ffn_bias=False),
        required_field(rope_interleave=True),
        swiglu_field(),
        deepseek_rope_fields(),
    ),
    # The first is computed, the other is of initial weights.
    irrelevant_fields=frozenset({'qk_head_dim', 'embedding_initializer_range'}),
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | GATED_FFN | LATENT_ATTENTION,
)
