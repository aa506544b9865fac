"""Families with LayerNorm, RoPE and FFNs without a gate: StarCoder2, Nemotron."""

from dataclasses import replace

from interop.families.llama import ATTENTION, EMBEDDING_AND_HEAD, LAYER, PRE_NORMS
from interop.families.llama_relatives import UNGATED_FFN
from interop.mapping import (
    ACTIVATIONS,
    Family,
    constant_option,
    export_only,
    field,
    head_size_field,
    kv_heads_field,
)
from interop.rope import rope_fields
from interop.tensors import tensor, with_biases

_SIZES = (
    field('n_layer', 'num_hidden_layers'),
    field('n_head', 'num_attention_heads'),
    field('n_embd', 'hidden_size'),
    field('block_size', 'max_position_embeddings', 4096),
    field('vocab_size', 'vocab_size'),
    constant_option(normalization='layernorm'),
)
_NORMS = {**PRE_NORMS, 'final_norm.weight': EMBEDDING_AND_HEAD['final_norm.weight']}

STARCODER2 = Family(
    name='starcoder2',
    architecture='Starcoder2ForCausalLM',
    prefix='model.',
    field_maps=(
        *_SIZES,
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
        *_SIZES,
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
