"""Gemma 1, 2 and 3, VaultGemma."""

from dataclasses import replace
from functools import partial

from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    LAYER,
    PRE_NORMS,
    QK_NORMS,
    llama_fields,
)
from interop.fields import Fields
from interop.layers import options_with
from interop.mapping import (
    FULL,
    WINDOW,
    Family,
    FieldMap,
    all_but_every_nth,
    check_heads_divide_width,
    constant_option,
    field,
    kv_heads_field,
    read_layer_types,
    required_field,
    windows_field,
)
from interop.rope import rope_by_layer_type_fields, rope_fields
from interop.tensors import tensor, with_biases
from model_config import ModelArchitectureConfig


def _read_scale(fields: Fields) -> dict:
    scalar = fields.take('query_pre_attn_scalar', float, 256)
    if scalar <= 0:
        fields.refuse('query_pre_attn_scalar', 'must be above 0')
        return {}
    return {'attention_scale': scalar**-0.5}


def _write_scale(config: ModelArchitectureConfig) -> dict:
    scale = options_with(config, 'attention_scale').get('attention_scale')
    return {'query_pre_attn_scalar': round(scale**-2)} if scale else {}


def _shared_fields(block_size: int, kv_heads: int) -> tuple[FieldMap, ...]:
    """Of all versions. kv_heads: the default of that field."""
    return (
        *llama_fields(block_size),
        field('d_ff', 'intermediate_size'),
        field('head_dim', 'head_dim', 256),
        field('attention_bias', 'attention_bias', False),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(ffn_type='geglu', ffn_bias=False, scale_embeddings=True),
        required_field(use_bidirectional_attention=None),
        kv_heads_field(kv_heads),
    )


def _gemma_fields(block_size: int, norm_position: str = 'sandwich') -> tuple[FieldMap, ...]:
    """Of all but the first version."""
    return (
        *_shared_fields(block_size, kv_heads=4),
        constant_option(norm_position=norm_position),
        field(
            'geglu_tanh',
            'hidden_activation',
            'gelu_pytorch_tanh',
            {'gelu_pytorch_tanh': True, 'gelu_new': True, 'gelu': False},
        ),
        FieldMap(_read_scale, _write_scale),
    )


# The norms compute x · (1 + weight).
_FINAL_NORM = {'final_norm.weight': tensor('model.norm.weight', offset=1.0)}
_NORMS = {
    **_FINAL_NORM,
    **{
        f'blocks.{{layer}}.{ours}.weight': tensor(f'{LAYER}{theirs}_layernorm.weight', offset=1.0)
        for ours, theirs in {
            'attention_norm': 'input',
            'attention_output_norm': 'post_attention',
            'ffn_norm': 'pre_feedforward',
            'ffn_output_norm': 'post_feedforward',
        }.items()
    },
}
_WEIGHTS = EMBEDDING_AND_HEAD | GATED_FFN | with_biases(ATTENTION) | _NORMS

GEMMA = Family(
    name='gemma',
    architecture='GemmaForCausalLM',
    prefix='model.',
    field_maps=(
        *_shared_fields(block_size=8192, kv_heads=16),
        # `gelu` in the files of the first releases means the approximation too.
        field(
            'geglu_tanh',
            'hidden_act',
            'gelu_pytorch_tanh',
            {'gelu_pytorch_tanh': True, 'gelu_new': True, 'gelu': True},
        ),
        rope_fields(),
    ),
    irrelevant_fields=frozenset({'hidden_activation'}),  # in old files, not read
    weights=EMBEDDING_AND_HEAD
    | GATED_FFN
    | with_biases(ATTENTION)
    | _FINAL_NORM
    | {name: replace(norm, offset=1.0) for name, norm in PRE_NORMS.items()},
)

_SOFTCAPS_AND_WINDOWS = (
    field('attention_softcap', 'attn_logit_softcapping', 50.0),
    field('logit_softcap', 'final_logit_softcapping', 30.0),
    windows_field(4096, lambda layer, fields: layer % 2 == 0),
    rope_fields(),
)
GEMMA2 = Family(
    name='gemma2',
    architecture='Gemma2ForCausalLM',
    prefix='model.',
    irrelevant_fields=frozenset(
        {'hidden_act', 'sliding_window_size'}
    ),  # in old files; transformers does not read it
    check_loadable=check_heads_divide_width,
    field_maps=(
        *_gemma_fields(block_size=8192),
        *_SOFTCAPS_AND_WINDOWS,
    ),
    weights=_WEIGHTS,
)

_is_local = all_but_every_nth('sliding_window_pattern', 6)  # in files without `layer_types`
GEMMA3 = Family(
    name='gemma3_text',
    architecture='Gemma3ForCausalLM',
    prefix='model.',
    # superseded by layer_types
    irrelevant_fields=frozenset({'sliding_window_pattern', '_sliding_window_pattern'}),
    check_loadable=check_heads_divide_width,
    field_maps=(
        *_gemma_fields(block_size=131_072),
        constant_option(qk_norm='rmsnorm', qk_norm_scope='head'),
        required_field(attn_logit_softcapping=None),
        field('logit_softcap', 'final_logit_softcapping', None),
        windows_field(4096, _is_local),
        rope_by_layer_type_fields(
            partial(read_layer_types, has_window=_is_local),
            default_theta={WINDOW: 1e4, FULL: 1e6},
            local_theta='rope_local_base_freq',
        ),
    ),
    weights=_WEIGHTS | {name: replace(norm, offset=1.0) for name, norm in QK_NORMS.items()},
)

VAULTGEMMA = Family(
    name='vaultgemma',
    architecture='VaultGemmaForCausalLM',
    prefix='model.',
    field_maps=(*_gemma_fields(8192, norm_position='pre'), *_SOFTCAPS_AND_WINDOWS),
    check_loadable=check_heads_divide_width,
    weights=_WEIGHTS,
)
