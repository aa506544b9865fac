"""CTRL and XGLM, whose positions are sinusoids."""

from interop.families.opt import opt_weights
from interop.fields import Fields
from interop.mapping import (
    ACTIVATIONS,
    Family,
    FieldMap,
    constant_option,
    export_only,
    field,
    required_field,
)
from interop.tensors import TensorMap, resize_vocabulary, tensor, with_biases

# --- CTRL -----------------------------------------------------------------------------------------

_CTRL = 'transformer.h.{layer}.'
CTRL = Family(
    name='ctrl',
    architecture='CTRLLMHeadModel',
    prefix='transformer.',
    field_maps=(
        field('n_layer', 'n_layer', 48),
        field('n_head', 'n_head', 16),
        field('n_embd', 'n_embd', 1280),
        field('d_ff', 'dff', 8192),
        field('block_size', 'n_positions', 256),
        field('vocab_size', 'vocab_size', 246_534),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(position_encoding='sinusoidal', sinusoid_layout='halves'),
        constant_option(normalization='layernorm', norm_eps=1e-6, bias=True, head_bias=True),
        constant_option(activation='relu', scale_embeddings=True),
        required_field(layer_norm_epsilon=1e-6),  # other norms have 1e-6 whatever it is
        export_only(resid_pdrop='residual_dropout', embd_pdrop='dropout'),
    ),
    aliases={
        'max_position_embeddings': 'n_positions',
        'hidden_size': 'n_embd',
        'num_attention_heads': 'n_head',
        'num_hidden_layers': 'n_layer',
    },
    weights={
        'token_embedding.weight': tensor('transformer.w.weight', resize=resize_vocabulary),
        'output_head.projection.weight': tensor('lm_head.weight', resize=resize_vocabulary),
        'output_head.projection.bias': tensor('lm_head.bias', resize=resize_vocabulary),
        **with_biases(
            {
                'final_norm.weight': tensor('transformer.layernorm.weight'),
                'blocks.{layer}.attention_norm.weight': tensor(_CTRL + 'layernorm1.weight'),
                'blocks.{layer}.ffn_norm.weight': tensor(_CTRL + 'layernorm2.weight'),
                'blocks.{layer}.attention.qkv.weight': TensorMap(
                    tuple(f'{_CTRL}multi_head_attention.W{name}.weight' for name in 'qkv')
                ),
                'blocks.{layer}.attention.output.weight': tensor(
                    _CTRL + 'multi_head_attention.dense.weight'
                ),
                'blocks.{layer}.ffn.up.weight': tensor(_CTRL + 'ffn.0.weight'),
                'blocks.{layer}.ffn.down.weight': tensor(_CTRL + 'ffn.2.weight'),
            }
        ),
    },
    ignored_tensors=r'pos_encoding$',
)

# --- XGLM -----------------------------------------------------------------------------------------


def _check_padding(fields: Fields) -> dict:
    """The vector of a position, counted from 2, with the number of the padding token is zero."""
    if (fields.take('pad_token_id', int, 1, optional=True) or 0) > 1:
        fields.refuse('pad_token_id', 'in XGLM, it must be below 2, the first position')
    return {}


XGLM = Family(
    name='xglm',
    architecture='XGLMForCausalLM',
    prefix='model.',
    field_maps=(
        field('n_layer', 'num_layers', 24),
        field('n_head', 'attention_heads', 16),
        field('n_embd', 'd_model', 1024),
        field('d_ff', 'ffn_dim', 4096),
        field('block_size', 'max_position_embeddings', 2048),
        field('vocab_size', 'vocab_size', 256_008),
        field('activation', 'activation_function', 'gelu', ACTIVATIONS),
        field('scale_embeddings', 'scale_embedding', True),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(position_encoding='sinusoidal', sinusoid_layout='fairseq'),
        constant_option(normalization='layernorm', norm_eps=1e-5, bias=True),
        FieldMap(_check_padding, lambda config: {}),
        export_only(dropout='residual_dropout', attention_dropout='attention_dropout'),
    ),
    aliases={
        'hidden_size': 'd_model',
        'num_attention_heads': 'attention_heads',
        'num_hidden_layers': 'num_layers',
    },
    weights={
        'token_embedding.weight': tensor('model.embed_tokens.weight', resize=resize_vocabulary),
        'output_head.projection.weight': tensor('lm_head.weight', resize=resize_vocabulary),
        **opt_weights('model.', 'layer_norm'),
    },
    ignored_tensors=r'embed_positions\.weights$',
)
