"""Gemma 2."""

from interop.families.llama import ATTENTION, EMBEDDING_AND_HEAD, GATED_FFN, LAYER, llama_fields
from interop.fields import Fields
from interop.layers import options_with
from interop.mapping import (
    Family,
    FieldMap,
    check_heads_divide_width,
    constant_option,
    field,
    kv_heads_field,
    required_field,
    windows_field,
)
from interop.rope import rope_fields
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


GEMMA2 = Family(
    name='gemma2',
    architecture='Gemma2ForCausalLM',
    prefix='model.',
    irrelevant_fields=frozenset(
        {'hidden_act', 'sliding_window_size'}
    ),  # in old files; transformers does not read it
    check_loadable=check_heads_divide_width,
    field_maps=(
        *llama_fields(block_size=8192),
        field('d_ff', 'intermediate_size'),
        field('head_dim', 'head_dim', 256),
        field('attention_bias', 'attention_bias', False),
        field('attention_softcap', 'attn_logit_softcapping', 50.0),
        field('logit_softcap', 'final_logit_softcapping', 30.0),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(
            norm_position='sandwich', ffn_type='geglu', ffn_bias=False, scale_embeddings=True
        ),
        required_field(use_bidirectional_attention=None),
        field(
            'geglu_tanh',
            'hidden_activation',
            'gelu_pytorch_tanh',
            {'gelu_pytorch_tanh': True, 'gelu_new': True, 'gelu': False},
        ),
        FieldMap(_read_scale, _write_scale),
        windows_field(4096, lambda layer, fields: layer % 2 == 0),
        kv_heads_field(4),
        rope_fields(),
    ),
    weights=GATED_FFN
    | with_biases(ATTENTION)
    | {
        'token_embedding.weight': EMBEDDING_AND_HEAD['token_embedding.weight'],
        'output_head.projection.weight': EMBEDDING_AND_HEAD['output_head.projection.weight'],
        # x · (1 + weight)
        'final_norm.weight': tensor('model.norm.weight', offset=1.0),
        **{
            f'blocks.{{layer}}.{ours}.weight': tensor(
                f'{LAYER}{theirs}_layernorm.weight', offset=1.0
            )
            for ours, theirs in {
                'attention_norm': 'input',
                'attention_output_norm': 'post_attention',
                'ffn_norm': 'pre_feedforward',
                'ffn_output_norm': 'post_feedforward',
            }.items()
        },
    },
)
