"""MiniMax-01: lightning attention in some layers, softmax attention in others, experts in all."""

import torch

from interop.families.llama import ATTENTION, EMBEDDING_AND_HEAD, LAYER, MIXTRAL, PRE_NORMS
from interop.fields import Fields
from interop.layer_kinds import LayerKind, layer_kinds_field, named_by_default, named_by_list
from interop.mapping import (
    FULL,
    Family,
    FieldMap,
    constant_option,
    export_only,
    field,
    kv_heads_field,
)
from interop.rope import rope_fields
from interop.tensors import TensorMap, tensor
from model_config import ModelArchitectureConfig

LIGHTNING = 'linear_attention'


def _read_lightning_dims(fields: Fields) -> dict:
    dims = fields.take('head_dim', int, None, optional=True)
    return {'lightning_key_dim': dims, 'lightning_value_dim': dims}


def _lightning_rows(config: ModelArchitectureConfig) -> tuple[int, int]:
    """Of the queries, keys and values together, and of the gate."""
    rows = config.lightning_heads * config.lightning_key_dim
    return 3 * rows, rows


def _lightning_row_order(config: ModelArchitectureConfig) -> torch.Tensor:
    """Theirs are grouped by head, ours are all queries, all keys and all values; then the gate."""
    mixed, gate = _lightning_rows(config)
    order = torch.arange(mixed).view(config.lightning_heads, 3, config.lightning_key_dim)
    return torch.cat((order.transpose(0, 1).flatten(), torch.arange(mixed, mixed + gate)))


_KINDS = {
    FULL: LayerKind(
        {'mixer': 'attention'},
        (
            field('head_dim', 'head_dim', None),
            field('sliding_window', 'sliding_window', None),
            field('deepnorm_mixer_alpha', 'full_attn_alpha_factor', 1),
            field('deepnorm_mixer_beta', 'full_attn_beta_factor', 1),
            constant_option(attention_bias=False),
            export_only(attention_dropout='attention_dropout'),
            kv_heads_field(8),
            rope_fields(default_theta=1e6),
        ),
    ),
    LIGHTNING: LayerKind(
        {'mixer': 'lightning_attention'},
        (
            FieldMap(_read_lightning_dims, lambda config: {'head_dim': config.lightning_key_dim}),
            field('deepnorm_mixer_alpha', 'linear_attn_alpha_factor', 1),
            field('deepnorm_mixer_beta', 'linear_attn_beta_factor', 1),
            constant_option(lightning_norm_eps=1e-6),
        ),
    ),
}
_MIXER, _ATTENTION = 'blocks.{layer}.mixers.lightning_attention.', LAYER + 'self_attn.'

MINIMAX = Family(
    name='minimax',
    architecture='MiniMaxForCausalLM',
    prefix='model.',
    field_maps=(
        field('n_layer', 'num_hidden_layers', 32),
        field('n_head', 'num_attention_heads', 32),
        field('n_embd', 'hidden_size', 4096),
        field('block_size', 'max_position_embeddings', 4096 * 32),
        field('vocab_size', 'vocab_size', 32000),
        field('norm_eps', 'rms_norm_eps', 1e-5),
        field('expert_d_ff', 'intermediate_size', 14336),
        field('num_experts', 'num_local_experts', 8),
        field('experts_per_token', 'num_experts_per_tok', 2),
        field('expert_ffn', 'hidden_act', 'silu', {'silu': 'swiglu'}),
        field('weight_tying', 'tie_word_embeddings', False),
        field('deepnorm_ffn_alpha', 'mlp_alpha_factor', 1),
        field('deepnorm_ffn_beta', 'mlp_beta_factor', 1),
        constant_option(
            normalization='rmsnorm',
            norm_position='entrance',
            residual='deepnorm',
            ffn_type='moe',
            router_score='softmax',
            router_normalize=True,
            bias=False,
        ),
        layer_kinds_field(
            named_by_list('layer_types'),
            named_by_default(lambda layers: [(FULL, LIGHTNING)[n % 2] for n in range(layers)]),
            kinds=_KINDS,
        ),
    ),
    aliases={'num_experts': 'num_local_experts'},
    irrelevant_fields=frozenset({'block_size'}),  # their chunk of lightning attention
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | ATTENTION
    | {ours: theirs for ours, theirs in MIXTRAL.weights.items() if '.ffn.' in ours}
    | {
        _MIXER + 'input.weight': TensorMap(
            (_ATTENTION + 'qkv_proj.weight', _ATTENTION + 'output_gate.weight'),
            rows=_lightning_rows,
            row_order=_lightning_row_order,
        ),
        _MIXER + 'norm_weight': tensor(_ATTENTION + 'norm.weight'),
        _MIXER + 'output.weight': tensor(_ATTENTION + 'out_proj.weight'),
    },
    # Computed from the number of the layer.
    ignored_tensors=r'self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$',
)
