"""Qwen3-Next: Gated DeltaNet and gated attention, with mixtures of experts."""

import torch

from interop.families.llama import (
    EMBEDDING_AND_HEAD,
    EXPERTS,
    GATED_FFN,
    LAYER,
    PRE_NORMS,
    QK_NORMS,
    llama_fields,
    projections,
)
from interop.fields import Fields
from interop.layer_kinds import (
    DENSE,
    SPARSE,
    LayerKind,
    LayerNames,
    dense_and_sparse,
    layer_kinds_field,
    named_by_list,
    named_by_position,
)
from interop.layers import num_kv_heads_of
from interop.mapping import (
    FULL,
    LINEAR,
    Family,
    FieldMap,
    constant_option,
    field,
    kv_heads_field,
    required_field,
    shared_experts_field,
)
from interop.rope import rope_fields
from interop.tensors import CONVOLUTION, TensorMap, tensor, with_biases
from model_config import ModelArchitectureConfig

# --- Kinds of mixers ------------------------------------------------------------------------------


def delta_net_kind(key_heads: int, value_heads: int) -> LayerKind:
    """Layers with Gated DeltaNet, by the numbers of heads if the fields are missing."""
    return LayerKind(
        {'mixer': 'gated_deltanet'},
        (
            field('gdn_heads', 'linear_num_key_heads', key_heads),
            field('gdn_value_heads', 'linear_num_value_heads', value_heads),
            field('gdn_head_dim', 'linear_key_head_dim', 128),
            field('gdn_v_head_dim', 'linear_value_head_dim', 128),
            field('gdn_conv_size', 'linear_conv_kernel_dim', 4),
            field('gdn_norm_eps', 'rms_norm_eps', 1e-6),
            constant_option(gdn_negative_eigenvalues=False, gdn_gate=True),
        ),
    )


def qwen_mixers(kv_heads: int, rope: FieldMap) -> FieldMap:
    """Gated DeltaNet and gated attention. kv_heads: the default of that field."""
    return layer_kinds_field(
        named_by_list('layer_types'),
        named_by_position('full_attention_interval', 4, FULL, LINEAR),
        kinds={
            LINEAR: delta_net_kind(16, 32),
            FULL: LayerKind(
                {'mixer': 'attention'},
                (
                    field('head_dim', 'head_dim', 256),
                    field('attention_bias', 'attention_bias', False),
                    kv_heads_field(kv_heads),
                    rope,
                    constant_option(
                        attention_gate='elementwise', qk_norm='rmsnorm', qk_norm_scope='head'
                    ),
                ),
            ),
        },
    )


# --- Kinds of FFNs --------------------------------------------------------------------------------


def sparse_steps(dense: tuple[int, ...] = ()) -> LayerNames:
    """Every n-th layer is sparse, except those in a list. dense: that list if it is missing."""

    def read(fields: Fields, layers: int | None) -> list[str]:
        step = fields.take('decoder_sparse_step', int, 1)
        if step < 1:
            fields.refuse('decoder_sparse_step', 'must be at least 1')
        listed = fields.take('mlp_only_layers', list[int], optional=True)
        excluded = dense if listed is None else listed
        return [
            SPARSE if layer not in excluded and (layer + 1) % max(step, 1) == 0 else DENSE
            for layer in range(layers or 0)
        ]

    def write(names: list[str]) -> dict:
        return {'mlp_only_layers': [layer for layer, name in enumerate(names) if name == DENSE]}

    return LayerNames(('decoder_sparse_step', 'mlp_only_layers'), read, write)


SPARSE_STEPS = sparse_steps()
_FFNS = layer_kinds_field(
    SPARSE_STEPS,
    kinds=dense_and_sparse(
        field('d_ff', 'intermediate_size', 5632),
        field('num_experts', 'num_experts', 512),
        field('experts_per_token', 'num_experts_per_tok', 10),
        field('expert_d_ff', 'moe_intermediate_size', 512),
        field('router_normalize', 'norm_topk_prob', True),
        shared_experts_field('shared_expert_intermediate_size', 512),
        constant_option(router_score='softmax', shared_gate=True),
    ),
)

# --- Weights --------------------------------------------------------------------------------------


def _gated_query_rows(config: ModelArchitectureConfig) -> tuple[int, ...]:
    heads = 2 * config.n_head, *[num_kv_heads_of(config)] * 2
    return tuple(number * config.head_dim for number in heads)


def _gated_query_order(config: ModelArchitectureConfig) -> torch.Tensor:
    """Ours: queries, keys, values, gates. Theirs: for each head its query and its gate; keys;
    values."""
    rows = torch.arange(sum(_gated_query_rows(config)))
    queries, rest = rows.tensor_split([2 * config.n_head * config.head_dim])
    query, gate = queries.view(config.n_head, 2, -1).unbind(1)
    return torch.cat((query.flatten(), rest, gate.flatten()))


def _delta_rows(config: ModelArchitectureConfig) -> tuple[int, int]:
    keys = config.gdn_heads * config.gdn_head_dim
    values = config.gdn_value_heads * config.gdn_v_head_dim
    return 2 * (keys + values), 2 * config.gdn_value_heads


def _delta_order(config: ModelArchitectureConfig) -> torch.Tensor:
    """Ours: queries, keys, values, β, decays, gates. Theirs: for each head of keys its query, key,
    values and gates; then for each its β and decays."""
    rows = torch.arange(sum(_delta_rows(config)))
    mixed, scalars = rows.split(_delta_rows(config))
    values = config.gdn_value_heads // config.gdn_heads
    width = values * config.gdn_v_head_dim
    of_head = [config.gdn_head_dim, config.gdn_head_dim, width, width]
    query, key, value, gate = mixed.view(config.gdn_heads, -1).split(of_head, dim=1)
    beta, decay = scalars.view(config.gdn_heads, -1).split(values, dim=1)
    return torch.cat([part.flatten() for part in (query, key, value, beta, decay, gate)])


GATED_ATTENTION = {
    'blocks.{layer}.attention.qkv.weight': TensorMap(
        projections('self_attn', 'q', 'k', 'v'),
        rows=_gated_query_rows,
        row_order=_gated_query_order,
    ),
    'blocks.{layer}.attention.output.weight': TensorMap(projections('self_attn', 'o')),
}
_OURS, _THEIRS = 'blocks.{layer}.mixers.gated_deltanet.', LAYER + 'linear_attn.'
# Without the projection of the input, whose rows differ between families.
DELTA_NET = {
    _OURS + 'convolution.weight': tensor(_THEIRS + 'conv1d.weight', layout=CONVOLUTION),
    _OURS + 'A_log': tensor(_THEIRS + 'A_log'),
    _OURS + 'dt_bias': tensor(_THEIRS + 'dt_bias'),
    _OURS + 'norm.weight': tensor(_THEIRS + 'norm.weight'),
    _OURS + 'output.weight': tensor(_THEIRS + 'out_proj.weight'),
}
# These norms compute x · (1 + weight).
OFFSET_NORMS = {
    name: tensor(norm.templates[0], offset=1.0)
    for name, norm in {
        **PRE_NORMS,
        **QK_NORMS,
        'final_norm.weight': EMBEDDING_AND_HEAD['final_norm.weight'],
    }.items()
}
SHARED_EXPERT = {
    'blocks.{layer}.ffn.shared.gate_up.weight': TensorMap(
        projections('mlp.shared_expert', 'gate', 'up')
    ),
    'blocks.{layer}.ffn.shared.down.weight': TensorMap(projections('mlp.shared_expert', 'down')),
    'blocks.{layer}.ffn.shared_gate.weight': tensor(LAYER + 'mlp.shared_expert_gate.weight'),
}

QWEN3_NEXT = Family(
    name='qwen3_next',
    architecture='Qwen3NextForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=32768),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(ffn_bias=False),
        required_field(hidden_act='silu'),  # of FFNs, and of the convolutions
        qwen_mixers(2, rope_fields(fraction='partial_rotary_factor')),
        _FFNS,
    ),
    weights=EMBEDDING_AND_HEAD
    | OFFSET_NORMS
    | with_biases(GATED_ATTENTION)
    | DELTA_NET
    | {
        _OURS + 'input.weight': TensorMap(
            (_THEIRS + 'in_proj_qkvz.weight', _THEIRS + 'in_proj_ba.weight'),
            rows=_delta_rows,
            row_order=_delta_order,
        )
    }
    | GATED_FFN
    | EXPERTS
    | SHARED_EXPERT,
    # Multi-token prediction, which transformers ignores too.
    ignored_tensors=r'^mtp\.',
)
