"""LFM2: gated short convolutions with a few layers of attention, and its mixtures of experts."""

from interop.families.llama import LAYER, query_key_value_rows
from interop.fields import Fields
from interop.layer_kinds import (
    DENSE,
    SPARSE,
    LayerKind,
    dense_and_sparse,
    layer_kinds_field,
    named_by_default,
    named_by_index,
    named_by_list,
    named_by_number,
)
from interop.layers import options_with
from interop.mapping import (
    Family,
    FieldMap,
    constant_option,
    export_only,
    field,
    kv_heads_field,
)
from interop.rope import rope_fields
from interop.routing import selection_bias
from interop.tensors import CONVOLUTION, TensorMap, resize_vocabulary, tensor
from model_config import ModelArchitectureConfig

CONV, FULL = 'conv', 'full_attention'


def _read_width(fields: Fields) -> dict:
    """The width of the FFN: two thirds of the field, rounded up to a multiple, unless it is not to
    be adjusted."""
    width = fields.take('intermediate_size', int, 12288)
    multiple = fields.take('block_multiple_of', int, 256)
    factor = fields.take('block_ffn_dim_multiplier', float, 1.0)
    if not fields.take('block_auto_adjust_ff_dim', bool, True):
        return {'d_ff': width}
    if multiple < 1:
        fields.refuse('block_multiple_of', 'must be at least 1')
        return {}
    return {'d_ff': -(-int(factor * int(2 * width / 3)) // multiple) * multiple}


def _write_width(config: ModelArchitectureConfig) -> dict:
    width = options_with(config, 'd_ff').get('d_ff')
    return {'intermediate_size': width, 'block_auto_adjust_ff_dim': False} if width else {}


_ATTENTION = LayerKind(
    {'mixer': 'attention'},
    (
        field('head_dim', 'head_dim', None),
        kv_heads_field(8),
        rope_fields(default_theta=1e6),
        constant_option(attention_bias=False, qk_norm='rmsnorm', qk_norm_scope='head'),
        export_only(attention_dropout='attention_dropout'),
    ),
)
_CONVOLUTION = LayerKind(
    {'mixer': 'short_conv'},
    (field('short_conv_size', 'conv_L_cache', 3), field('short_conv_bias', 'conv_bias', False)),
)
_KINDS = {CONV: _CONVOLUTION, FULL: _ATTENTION}
_FIELDS = (
    field('n_layer', 'num_hidden_layers', 32),
    field('n_head', 'num_attention_heads', 32),
    field('block_size', 'max_position_embeddings', 128_000),
    field('vocab_size', 'vocab_size', 65536),
    field('norm_eps', 'norm_eps', 1e-5),
    field('weight_tying', 'tie_word_embeddings', True),
    constant_option(normalization='rmsnorm', bias=False, ffn_bias=False),
)

_MIXER = 'blocks.{layer}.mixers.short_conv.'
_CONV = LAYER + 'conv.'
_FFN = LAYER + 'feed_forward.'
WEIGHTS = {
    'token_embedding.weight': tensor('model.embed_tokens.weight', resize=resize_vocabulary),
    'final_norm.weight': tensor('model.embedding_norm.weight'),
    'output_head.projection.weight': tensor('lm_head.weight', resize=resize_vocabulary),
    'blocks.{layer}.attention_norm.weight': tensor(LAYER + 'operator_norm.weight'),
    'blocks.{layer}.ffn_norm.weight': tensor(LAYER + 'ffn_norm.weight'),
    'blocks.{layer}.attention.qkv.weight': TensorMap(
        tuple(f'{LAYER}self_attn.{name}_proj.weight' for name in 'qkv'), rows=query_key_value_rows
    ),
    'blocks.{layer}.attention.output.weight': tensor(LAYER + 'self_attn.out_proj.weight'),
    'blocks.{layer}.attention.q_norm.weight': tensor(LAYER + 'self_attn.q_layernorm.weight'),
    'blocks.{layer}.attention.k_norm.weight': tensor(LAYER + 'self_attn.k_layernorm.weight'),
    _MIXER + 'input.weight': tensor(_CONV + 'in_proj.weight'),
    _MIXER + 'input.bias': tensor(_CONV + 'in_proj.bias'),
    _MIXER + 'convolution.weight': tensor(_CONV + 'conv.weight', layout=CONVOLUTION),
    _MIXER + 'convolution.bias': tensor(_CONV + 'conv.bias'),
    _MIXER + 'output.weight': tensor(_CONV + 'out_proj.weight'),
    _MIXER + 'output.bias': tensor(_CONV + 'out_proj.bias'),
    'blocks.{layer}.ffn.gate_up.weight': TensorMap((_FFN + 'w1.weight', _FFN + 'w3.weight')),
    'blocks.{layer}.ffn.down.weight': tensor(_FFN + 'w2.weight'),
}

LFM2 = Family(
    name='lfm2',
    architecture='Lfm2ForCausalLM',
    prefix='model.',
    field_maps=(
        *_FIELDS,
        field('n_embd', 'hidden_size', 2560),
        constant_option(ffn_type='swiglu'),
        FieldMap(_read_width, _write_width),
        layer_kinds_field(
            named_by_list('layer_types'),
            named_by_index('full_attn_idxs', FULL, CONV),
            named_by_default(lambda layers: [FULL] * layers),
            kinds=_KINDS,
        ),
    ),
    aliases={'tie_embedding': 'tie_word_embeddings', 'block_ff_dim': 'intermediate_size'},
    # Of Liquid AI's files; transformers does not read them.
    irrelevant_fields=frozenset(
        {
            *('block_dim', 'block_norm_eps', 'block_use_swiglu', 'block_use_xavier_init'),
            *('block_mlp_init_scale', 'block_out_init_scale', 'conv_use_xavier_init'),
            *('conv_dim', 'conv_dim_out', 'num_heads', 'use_pos_enc'),
        }
    ),
    weights=WEIGHTS,
)

LFM2_MOE = Family(
    name='lfm2_moe',
    architecture='Lfm2MoeForCausalLM',
    prefix='model.',
    field_maps=(
        *_FIELDS,
        field('n_embd', 'hidden_size', 2048),
        layer_kinds_field(named_by_list('layer_types'), kinds=_KINDS),
        layer_kinds_field(
            named_by_number('num_dense_layers', 2, DENSE, SPARSE),
            kinds=dense_and_sparse(
                field('d_ff', 'intermediate_size', 7168),
                field('num_experts', 'num_experts', 32),
                field('experts_per_token', 'num_experts_per_tok', 4),
                field('expert_d_ff', 'moe_intermediate_size', 1792),
                field('router_normalize', 'norm_topk_prob', True),
                field('router_scale', 'routed_scaling_factor', 1.0),
                field('router_selection_bias', 'use_expert_bias', True),
                constant_option(router_score='sigmoid', shared_experts=0),
            ),
        ),
    ),
    aliases={'tie_embedding': 'tie_word_embeddings'},
    weights=WEIGHTS
    | {
        'blocks.{layer}.ffn.router.weight': tensor(_FFN + 'gate.weight'),
        **selection_bias(_FFN + 'expert_bias'),
        'blocks.{layer}.ffn.experts.gate_up.weight': TensorMap(
            tuple(f'{_FFN}experts.{{expert}}.{name}.weight' for name in ('w1', 'w3'))
        ),
        'blocks.{layer}.ffn.experts.down.weight': tensor(_FFN + 'experts.{expert}.w2.weight'),
    },
)
