"""Granite, its mixtures of experts, Granite 4 (Mamba-2 and attention), and HyperCLOVA X.

All have multipliers: of the embeddings, of the outputs of sublayers, and of the logits.
"""

from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    LAYER,
    PRE_NORMS,
    llama_fields,
    swiglu_field,
)
from interop.families.mamba2 import IRRELEVANT, MIXER_FIELDS, heads_field, mixer_weights
from interop.fields import Fields
from interop.layer_kinds import LayerKind, layer_kinds_field, named_by_list
from interop.layers import options_with
from interop.mapping import (
    FULL,
    LINEAR,
    Family,
    FieldMap,
    check_heads_divide_width,
    constant_option,
    export_only,
    field,
    kv_heads_field,
    required_field,
)
from interop.rope import rope_fields
from interop.tensors import tensor, with_biases
from model_config import ModelArchitectureConfig

# --- Multipliers ----------------------------------------------------------------------------------


def _read_residual(fields: Fields) -> dict:
    factor = fields.take('residual_multiplier', float, 1.0)
    if factor == 1:
        return {'residual': 'addition'}
    return {'residual': 'multiplier', 'residual_multiplier': factor}


def _write_residual(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'residual_multiplier')
    return {'residual_multiplier': options.get('residual_multiplier', 1.0)}


def _read_divisor(fields: Fields) -> dict:
    scaling = fields.take('logits_scaling', float, 1.0)
    if scaling <= 0:
        fields.refuse('logits_scaling', 'must be above 0')
        return {}
    return {'logit_multiplier': 1 / scaling}


_DIVISOR = FieldMap(_read_divisor, lambda config: {'logits_scaling': 1 / config.logit_multiplier})
_MULTIPLIERS = (
    field('embedding_multiplier', 'embedding_multiplier', 1.0),
    FieldMap(_read_residual, _write_residual),
)
_SCORES = field('attention_scale', 'attention_multiplier', 1.0)

# --- Mixtures of experts --------------------------------------------------------------------------


def _shared_experts(fields: Fields, width: int, default: int) -> dict:
    """The number of shared experts, from the width of the network that has them all."""
    shared = fields.take('shared_intermediate_size', int, default)
    if width > 0 and shared >= 0 and shared % width == 0:
        return {'shared_experts': shared // width}
    fields.refuse('shared_intermediate_size', f'must be a multiple of intermediate_size={width}')
    return {}


def _read_experts(fields: Fields) -> dict:
    width = fields.take('intermediate_size', int, 11008)
    return {
        'ffn_type': 'moe',
        'expert_ffn': 'swiglu',
        'num_experts': fields.take('num_local_experts', int, 8),
        'experts_per_token': fields.take('num_experts_per_tok', int, 2),
        'expert_d_ff': width,
        'router_score': 'softmax',
        'router_normalize': True,
    }


def _write_experts(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'num_experts')
    if 'num_experts' not in options:
        return {}
    return {
        'num_local_experts': options['num_experts'],
        'num_experts_per_tok': options['experts_per_token'],
        'intermediate_size': options['expert_d_ff'],
    }


def _write_shared(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'num_experts')
    if 'num_experts' not in options:
        return {}
    return {'shared_intermediate_size': options['shared_experts'] * options['expert_d_ff']}


def _read_ffn(fields: Fields) -> dict:
    """Without experts, the network shared by all tokens is the FFN."""
    experts = _read_experts(fields)
    if experts['num_experts'] == 0:
        return {'ffn_type': 'swiglu', 'd_ff': fields.take('shared_intermediate_size', int, 1024)}
    return {**experts, **_shared_experts(fields, experts['expert_d_ff'], 1024)}


def _write_ffn(config: ModelArchitectureConfig) -> dict:
    if written := {**_write_experts(config), **_write_shared(config)}:
        return written
    width = options_with(config, 'd_ff').get('d_ff')
    return {'num_local_experts': 0, **dict.fromkeys(_WIDTHS, width)}


_WIDTHS = ('shared_intermediate_size', 'intermediate_size')
_SPARSE, _SHARED = LAYER + 'block_sparse_moe.', LAYER + 'shared_mlp.'
_EXPERTS = {
    'blocks.{layer}.ffn.router.weight': tensor(_SPARSE + 'router.layer.weight'),
    'blocks.{layer}.ffn.experts.gate_up.weight': tensor(_SPARSE + 'input_linear.weight'),
    'blocks.{layer}.ffn.experts.down.weight': tensor(_SPARSE + 'output_linear.weight'),
    'blocks.{layer}.ffn.shared.gate_up.weight': tensor(_SHARED + 'input_linear.weight'),
    'blocks.{layer}.ffn.shared.down.weight': tensor(_SHARED + 'output_linear.weight'),
}

# --- Transformers ---------------------------------------------------------------------------------

_ATTENTION_FIELDS = (
    field('head_dim', 'head_dim', None),
    field('attention_bias', 'attention_bias', False),
    field('weight_tying', 'tie_word_embeddings', False),
    kv_heads_field(),
    rope_fields(),
)
_DENSE_FIELDS = (
    *llama_fields(block_size=2048),
    *_ATTENTION_FIELDS,
    *_MULTIPLIERS,
    field('d_ff', 'intermediate_size', 11008),
    field('ffn_bias', 'mlp_bias', False),
    swiglu_field(),
)

GRANITE = Family(
    name='granite',
    architecture='GraniteForCausalLM',
    prefix='model.',
    field_maps=(*_DENSE_FIELDS, _SCORES, _DIVISOR),
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | with_biases(ATTENTION | GATED_FFN),
)

HYPERCLOVAX = Family(
    name='hyperclovax',
    architecture='HyperCLOVAXForCausalLM',
    prefix='model.',
    field_maps=(
        *_DENSE_FIELDS,
        field('attention_scale', 'attention_multiplier', None),
        field('logit_multiplier', 'logits_scaling', 1.0),
        field('norm_position', 'use_post_norm', True, {True: 'sandwich', False: 'pre'}),
    ),
    check_loadable=check_heads_divide_width,
    weights=GRANITE.weights
    | {
        'blocks.{layer}.attention_output_norm.weight': tensor(LAYER + 'post_norm1.weight'),
        'blocks.{layer}.ffn_output_norm.weight': tensor(LAYER + 'post_norm2.weight'),
    },
)

_MIXTURE_FIELDS = (
    *llama_fields(block_size=2048),
    *_ATTENTION_FIELDS,
    *_MULTIPLIERS,
    _SCORES,
    _DIVISOR,
    FieldMap(_read_experts, _write_experts),
    required_field(hidden_act='silu'),
    constant_option(ffn_bias=False),
)

GRANITE_MOE = Family(
    name='granitemoe',
    architecture='GraniteMoeForCausalLM',
    prefix='model.',
    field_maps=_MIXTURE_FIELDS,
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | with_biases(ATTENTION) | _EXPERTS,
)

GRANITE_MOE_SHARED = Family(
    name='granitemoeshared',
    architecture='GraniteMoeSharedForCausalLM',
    prefix='model.',
    field_maps=(
        *_MIXTURE_FIELDS,
        FieldMap(
            lambda fields: _shared_experts(fields, fields.take('intermediate_size', int, 11008), 0),
            _write_shared,
        ),
    ),
    weights=GRANITE_MOE.weights,
)

# --- Granite 4 ------------------------------------------------------------------------------------

_ROPE = rope_fields()


def _read_positions(fields: Fields) -> dict:
    kind = fields.value('position_embedding_type')
    if kind == 'rope':
        return _ROPE.read(fields)
    if kind not in (None, 'nope'):
        fields.refuse('position_embedding_type', "must be 'rope', 'nope' or null")
    # Without positions, transformers ignores these.
    fields.unread.difference_update({'rope_parameters', 'rope_scaling', 'rope_theta'})
    return {'position_encoding': 'none'}


def _write_positions(config: ModelArchitectureConfig) -> dict:
    if options_with(config, 'position_encoding').get('position_encoding') == 'rope':
        return {'position_embedding_type': 'rope', **_ROPE.write(config)}
    return {'position_embedding_type': 'nope'}


_MIXERS = layer_kinds_field(
    named_by_list('layer_types', {'mamba': LINEAR, 'attention': FULL}, default=LINEAR),
    kinds={
        LINEAR: LayerKind(
            {'mixer': 'mamba2'},
            (
                heads_field('mamba_n_heads', 'mamba_d_head', None, 'mamba_expand'),
                *MIXER_FIELDS,
                field('mamba2_norm_eps', 'rms_norm_eps', 1e-6),
            ),
        ),
        FULL: LayerKind(
            {'mixer': 'attention'},
            (
                kv_heads_field(),
                field('head_dim', 'head_dim', None),
                field('attention_bias', 'attention_bias', False),
                _SCORES,
                export_only(attention_dropout='attention_dropout'),
                FieldMap(_read_positions, _write_positions),
            ),
        ),
    },
)

GRANITE4 = Family(
    name='granitemoehybrid',
    architecture='GraniteMoeHybridForCausalLM',
    prefix='model.',
    field_maps=(
        field('n_layer', 'num_hidden_layers', 32),
        field('n_head', 'num_attention_heads', 32),
        field('n_embd', 'hidden_size', 4096),
        field('block_size', 'max_position_embeddings', 2048),
        field('vocab_size', 'vocab_size', 32000),
        field('norm_eps', 'rms_norm_eps', 1e-6),
        field('weight_tying', 'tie_word_embeddings', False),
        *_MULTIPLIERS,
        _DIVISOR,
        FieldMap(_read_ffn, _write_ffn),
        required_field(hidden_act='silu'),  # of FFNs, and of the convolutions
        constant_option(normalization='rmsnorm', bias=False, ffn_bias=False),
        _MIXERS,
    ),
    aliases={'layers_block_type': 'layer_types'},
    irrelevant_fields=IRRELEVANT | {'normalization_function', 'init_method'},
    weights={
        **EMBEDDING_AND_HEAD,
        **PRE_NORMS,
        **with_biases(ATTENTION),
        **mixer_weights(LAYER + 'mamba.'),
        'blocks.{layer}.ffn.gate_up.weight': tensor(_SHARED + 'input_linear.weight'),
        'blocks.{layer}.ffn.down.weight': tensor(_SHARED + 'output_linear.weight'),
        **_EXPERTS,
    },
)
