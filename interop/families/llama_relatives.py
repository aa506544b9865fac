"""Families that differ from Llama in few parts: Arcee, Helium, Ernie 4.5."""

from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    LLAMA,
    PAIRED_ATTENTION,
    PRE_NORMS,
    llama_fields,
    projections,
    swiglu_field,
)
from interop.mapping import (
    ACTIVATIONS,
    Family,
    check_heads_divide_width,
    constant_option,
    field,
    head_size_field,
    kv_heads_field,
)
from interop.rope import rope_fields
from interop.tensors import TensorMap, with_biases

UNGATED_FFN = {
    'blocks.{layer}.ffn.up.weight': TensorMap(projections('mlp', 'up')),
    'blocks.{layer}.ffn.down.weight': TensorMap(projections('mlp', 'down')),
}

ARCEE = Family(
    name='arcee',
    architecture='ArceeForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=4096, norm_eps=1e-5),
        field('d_ff', 'intermediate_size'),
        field('head_dim', 'head_dim', None),
        field('activation', 'hidden_act', 'relu2', ACTIVATIONS),
        field('attention_bias', 'attention_bias', False),
        field('ffn_bias', 'mlp_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        kv_heads_field(),
        rope_fields(),
    ),
    check_loadable=check_heads_divide_width,
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | with_biases(ATTENTION | UNGATED_FFN),
)

HELIUM = Family(
    name='helium',
    architecture='HeliumForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=4096, norm_eps=1e-8),
        field('d_ff', 'intermediate_size', 7040),
        field('attention_bias', 'attention_bias', False),
        field('ffn_bias', 'mlp_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(attention_output_bias=False),
        head_size_field(128),
        kv_heads_field(20),
        rope_fields(default_theta=1e5),
        swiglu_field(),
    ),
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | with_biases(PAIRED_ATTENTION | GATED_FFN),
)

ERNIE4_5 = Family(
    name='ernie4_5',
    architecture='Ernie4_5ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=131_072, norm_eps=1e-5),
        field('d_ff', 'intermediate_size', 3072),
        field('head_dim', 'head_dim', 128),
        field('attention_bias', 'use_bias', False),
        field('ffn_bias', 'use_bias', False),
        field('weight_tying', 'tie_word_embeddings', True),
        kv_heads_field(2),
        rope_fields(default_theta=5e5),
        swiglu_field(),
    ),
    weights=LLAMA.weights | with_biases(PAIRED_ATTENTION),
)
