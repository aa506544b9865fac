"""Lara: Gated DeltaNet, attention with windows, and without positions; mixtures of experts."""

import itertools

import torch

from interop.families.gated_deltanet import projection_rows
from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    LAYER,
    PRE_NORMS,
    QK_NORMS,
    llama_fields,
)
from interop.families.qwen3_next import DELTA_NET, SHARED_EXPERT, delta_net_kind
from interop.layer_kinds import LayerKind, layer_kinds_field, named_by_default, named_by_list
from interop.mapping import (
    FULL,
    LINEAR,
    WINDOW,
    Family,
    constant_option,
    field,
    kv_heads_field,
    required_field,
    shared_experts_field,
)
from interop.rope import rope_fields
from interop.tensors import tensor, with_biases
from model_config import ModelArchitectureConfig

_PERIOD = (LINEAR, WINDOW, LINEAR, FULL, WINDOW)
_ATTENTION = (
    field('head_dim', 'head_dim', 128),
    field('attention_bias', 'attention_bias', False),
    kv_heads_field(4),
    constant_option(qk_norm='rmsnorm', qk_norm_scope='head'),
)


def _default_kinds(layers: int) -> list[str]:
    return list(itertools.islice(itertools.cycle(_PERIOD), layers))


def _check_window(fields: dict) -> str | None:
    """transformers gives all layers with positions a window."""
    if fields.get('sliding_window', 1) is None:
        return 'in layers with RoPE, Lara needs a sliding_window'
    return None


def _fused_order(config: ModelArchitectureConfig) -> torch.Tensor:
    """Ours: queries, keys, values, β, decays, gates. Theirs: the gates after the values."""
    keys, values, heads = (projection_rows(config)[part] for part in (0, 2, 3))
    rows = torch.arange(2 * keys + 2 * values + 2 * heads)
    mixed, gates, scalars = rows.split((2 * keys + values, values, 2 * heads))
    return torch.cat((mixed, scalars, gates))


_OURS, _EXPERTS = 'blocks.{layer}.mixers.gated_deltanet.', 'blocks.{layer}.ffn.experts.'

LARA_MINI = Family(
    name='lara_mini',
    architecture='LaraMiniForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=131_072),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(ffn_type='moe', ffn_bias=False),
        required_field(hidden_act='silu'),  # of FFNs, and of the convolutions
        field('num_experts', 'num_experts', 128),
        field('experts_per_token', 'num_experts_per_tok', 4),
        field('expert_d_ff', 'moe_intermediate_size', 512),
        field('router_normalize', 'norm_topk_prob', True),
        shared_experts_field('shared_expert_intermediate_size', 512),
        constant_option(expert_ffn='swiglu', router_score='softmax'),
        layer_kinds_field(
            named_by_list('layer_types'),
            named_by_default(_default_kinds),
            kinds={
                LINEAR: delta_net_kind(8, 16),
                WINDOW: LayerKind(
                    {'mixer': 'attention', 'position_encoding': 'rope'},
                    (*_ATTENTION, rope_fields(), field('sliding_window', 'sliding_window', 512)),
                ),
                FULL: LayerKind(
                    {'mixer': 'attention', 'position_encoding': 'none', 'sliding_window': None},
                    _ATTENTION,
                ),
            },
        ),
    ),
    aliases={'num_local_experts': 'num_experts'},
    check_loadable=_check_window,
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | QK_NORMS
    | with_biases(ATTENTION)
    | DELTA_NET
    | SHARED_EXPERT
    | {
        _OURS + 'input.weight': tensor(
            LAYER + 'linear_attn.in_proj.weight', row_order=_fused_order
        ),
        _OURS + 'norm.weight': tensor(LAYER + 'linear_attn.out_norm.weight'),
        'blocks.{layer}.ffn.router.weight': tensor(LAYER + 'mlp.gate.weight'),
        _EXPERTS + 'gate_up.weight': tensor(LAYER + 'mlp.experts.gate_up_proj'),
        _EXPERTS + 'down.weight': tensor(LAYER + 'mlp.experts.down_proj'),
    },
)
