"""Families with LayerNorm, RoPE and a plain FFN: StarCoder2, Nemotron, Jais 2, Persimmon."""

from dataclasses import replace

from interop.families.gpt_neox import query_key_value_of_each_head
from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    LAYER,
    PRE_NORMS,
    ROTARY_BUFFERS,
)
from interop.families.llama_relatives import UNGATED_FFN
from interop.fields import Fields
from interop.layers import options_with
from interop.mapping import (
    ACTIVATIONS,
    Family,
    FieldMap,
    check_heads_divide_width,
    constant_option,
    export_only,
    field,
    head_size_field,
    kv_heads_field,
    size_fields,
)
from interop.rope import rope_fields
from interop.tensors import tensor, with_biases
from model_config import ModelArchitectureConfig


def _sizes(block_size: int) -> tuple[FieldMap, ...]:
    return (
        *size_fields(block_size),
        constant_option(normalization='layernorm'),
    )


_NORMS = {**PRE_NORMS, 'final_norm.weight': EMBEDDING_AND_HEAD['final_norm.weight']}

STARCODER2 = Family(
    name='starcoder2',
    architecture='Starcoder2ForCausalLM',
    prefix='model.',
    field_maps=(
        *_sizes(4096),
        field('d_ff', 'intermediate_size', 12288),
        field('norm_eps', 'norm_epsilon', 1e-5),
        field('activation', 'hidden_act', 'gelu_pytorch_tanh', ACTIVATIONS),
        field('attention_bias', 'use_bias', True),
        field('ffn_bias', 'use_bias', True),
        field('sliding_window', 'sliding_window', None),
        field('weight_tying', 'tie_word_embeddings', True),
        head_size_field(),
        kv_heads_field(2),
        rope_fields(),
        export_only(
            attention_dropout='attention_dropout',
            residual_dropout='residual_dropout',
            embedding_dropout='dropout',
        ),
    ),
    # In published files; transformers does not read them.
    irrelevant_fields=frozenset(
        {
            *('mlp_type', 'norm_type', 'activation_function', 'scale_attn_weights'),
            *('attention_softmax_in_fp32', 'scale_attention_softmax_in_fp32'),
        }
    ),
    weights=EMBEDDING_AND_HEAD
    | with_biases(
        _NORMS
        | ATTENTION
        | {
            'blocks.{layer}.ffn.up.weight': tensor(LAYER + 'mlp.c_fc.weight'),
            'blocks.{layer}.ffn.down.weight': tensor(LAYER + 'mlp.c_proj.weight'),
        }
    ),
)

NEMOTRON = Family(
    name='nemotron',
    architecture='NemotronForCausalLM',
    prefix='model.',
    field_maps=(
        *_sizes(4096),
        field('d_ff', 'intermediate_size'),
        field('head_dim', 'head_dim', None),
        field('norm_eps', 'norm_eps', 1e-5),
        field('activation', 'hidden_act', 'relu2', ACTIVATIONS),
        field('attention_bias', 'attention_bias', False),
        field('ffn_bias', 'mlp_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        kv_heads_field(),
        rope_fields(fraction='partial_rotary_factor', default_fraction=0.5),
        export_only(attention_dropout='attention_dropout'),
    ),
    # The norms compute a LayerNorm with the gain 1 + weight.
    weights=EMBEDDING_AND_HEAD
    | with_biases({name: replace(norm, offset=1.0) for name, norm in _NORMS.items()})
    | with_biases(ATTENTION | UNGATED_FFN),
)

JAIS2 = Family(
    name='jais2',
    architecture='Jais2ForCausalLM',
    prefix='model.',
    field_maps=(
        *_sizes(8192),
        field('d_ff', 'intermediate_size'),
        field('head_dim', 'head_dim', None),
        field('norm_eps', 'layer_norm_eps', 1e-5),
        field('activation', 'hidden_act', 'relu2', ACTIVATIONS),
        field('attention_bias', 'attention_bias', True),
        field('ffn_bias', 'mlp_bias', True),
        field('weight_tying', 'tie_word_embeddings', False),
        kv_heads_field(),
        rope_fields(),
        export_only(attention_dropout='attention_dropout'),
    ),
    check_loadable=check_heads_divide_width,
    weights=EMBEDDING_AND_HEAD | with_biases(_NORMS | ATTENTION | UNGATED_FFN),
)


def _read_qk_norm(fields: Fields) -> dict:
    normalized = fields.take('qk_layernorm', bool, True)
    return {'qk_norm': 'layernorm', 'qk_norm_scope': 'head'} if normalized else {'qk_norm': 'none'}


def _write_qk_norm(config: ModelArchitectureConfig) -> dict:
    return {'qk_layernorm': options_with(config, 'qk_norm').get('qk_norm') == 'layernorm'}


_FUSED = LAYER + 'self_attn.'
PERSIMMON = Family(
    name='persimmon',
    architecture='PersimmonForCausalLM',
    prefix='model.',
    field_maps=(
        *_sizes(16384),
        field('d_ff', 'intermediate_size'),
        field('norm_eps', 'layer_norm_eps', 1e-5),
        field('activation', 'hidden_act', 'relu2', ACTIVATIONS),
        FieldMap(_read_qk_norm, _write_qk_norm),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(attention_bias=True, ffn_bias=True),
        head_size_field(),
        rope_fields(fraction='partial_rotary_factor', default_fraction=0.5),
        export_only(attention_dropout='attention_dropout', hidden_dropout='residual_dropout'),
    ),
    weights=EMBEDDING_AND_HEAD
    | with_biases(
        {
            **PRE_NORMS,
            'final_norm.weight': tensor('model.final_layernorm.weight'),
            'blocks.{layer}.attention.qkv.weight': tensor(
                _FUSED + 'query_key_value.weight',
                row_order=query_key_value_of_each_head,
            ),
            'blocks.{layer}.attention.output.weight': tensor(_FUSED + 'dense.weight'),
            'blocks.{layer}.attention.q_norm.weight': tensor(_FUSED + 'q_layernorm.weight'),
            'blocks.{layer}.attention.k_norm.weight': tensor(_FUSED + 'k_layernorm.weight'),
            'blocks.{layer}.ffn.up.weight': tensor(LAYER + 'mlp.dense_h_to_4h.weight'),
            'blocks.{layer}.ffn.down.weight': tensor(LAYER + 'mlp.dense_4h_to_h.weight'),
        }
    ),
    ignored_tensors=ROTARY_BUFFERS,
)
