"""Families with biases of queries, keys and values alone: Qwen2 (and Qwen2.5), Seed-OSS, GLM."""

from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    LAYER,
    PRE_NORMS,
    ROTARY_BUFFERS,
    llama_fields,
    projections,
    query_key_value_rows,
    swiglu_field,
)
from interop.layers import options_with
from interop.mapping import (
    Family,
    FieldMap,
    constant_option,
    field,
    kv_heads_field,
    required_field,
    windows_field,
)
from interop.rope import rope_fields
from interop.rotary_rows import interleaved_rows
from interop.tensors import TensorMap, tensor, with_biases
from model_config import ModelArchitectureConfig

QWEN2 = Family(
    name='qwen2',
    architecture='Qwen2ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=32768),
        field('d_ff', 'intermediate_size', 22016),
        field('head_dim', 'head_dim', None),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(attention_bias=True, attention_output_bias=False, ffn_bias=False),
        windows_field(
            4096,
            lambda layer, fields: layer >= fields.take('max_window_layers', int, 28),
            switch='use_sliding_window',
        ),
        required_field(use_mrope=False),  # of models with images
        kv_heads_field(32),
        rope_fields(),
        swiglu_field(),
    ),
    irrelevant_fields=frozenset({'max_window_layers'}),  # superseded by layer_types
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | GATED_FFN | with_biases(ATTENTION),
    ignored_tensors=ROTARY_BUFFERS,
)


def _write_output_bias(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'attention_bias')
    bias = options.get('attention_output_bias')  # None: as attention_bias
    return {'attention_out_bias': options.get('attention_bias') if bias is None else bias}


SEED_OSS = Family(
    name='seed_oss',
    architecture='SeedOssForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=524_288),
        field('d_ff', 'intermediate_size', 27648),
        field('head_dim', 'head_dim', 128),
        field('attention_bias', 'attention_bias', True),
        FieldMap(
            field('attention_output_bias', 'attention_out_bias', False).read, _write_output_bias
        ),
        field('ffn_bias', 'mlp_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        kv_heads_field(8),
        rope_fields(),
        swiglu_field(),
    ),
    irrelevant_fields=frozenset({'residual_dropout'}),
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | with_biases(ATTENTION | GATED_FFN),
)

# --- GLM-4, whose rotation pairs neighboring dimensions -------------------------------------------

_GLM_FIELDS = (
    *llama_fields(block_size=131_072, norm_eps=1.5625e-7),
    field('d_ff', 'intermediate_size', 13696),
    field('head_dim', 'head_dim', 128),
    field('attention_bias', 'attention_bias', True),
    field('weight_tying', 'tie_word_embeddings', False),
    constant_option(attention_output_bias=False, ffn_bias=False),
    kv_heads_field(2),
    rope_fields(fraction='partial_rotary_factor', default_fraction=0.5),
    swiglu_field(),
)
_GLM_WEIGHTS = EMBEDDING_AND_HEAD | {
    **with_biases(
        {
            'blocks.{layer}.attention.qkv.weight': TensorMap(
                projections('self_attn', 'q', 'k', 'v'),
                rows=query_key_value_rows,
                row_order=interleaved_rows,
            )
        }
    ),
    'blocks.{layer}.attention.output.weight': TensorMap(projections('self_attn', 'o')),
    'blocks.{layer}.ffn.gate_up.weight': TensorMap(projections('mlp', 'gate_up')),
    'blocks.{layer}.ffn.down.weight': TensorMap(projections('mlp', 'down')),
}
GLM = Family(
    name='glm',
    architecture='GlmForCausalLM',
    prefix='model.',
    field_maps=_GLM_FIELDS,
    weights=_GLM_WEIGHTS | PRE_NORMS,
    ignored_tensors=ROTARY_BUFFERS,
)
GLM4 = Family(
    name='glm4',
    architecture='Glm4ForCausalLM',
    prefix='model.',
    field_maps=(*_GLM_FIELDS, constant_option(norm_position='sandwich')),
    weights=_GLM_WEIGHTS
    | {
        f'blocks.{{layer}}.{ours}.weight': tensor(f'{LAYER}{theirs}_layernorm.weight')
        for ours, theirs in {
            'attention_norm': 'input',
            'attention_output_norm': 'post_self_attn',
            'ffn_norm': 'post_attention',
            'ffn_output_norm': 'post_mlp',
        }.items()
    },
    ignored_tensors=ROTARY_BUFFERS,
)
