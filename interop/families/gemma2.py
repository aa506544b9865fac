"""Gemma 2."""

from interop.families.llama import ATTENTION, ENDS, GATED, LAYER, llama_like
from interop.fields import Fields
from interop.mapping import (
    Entry,
    Family,
    heads_must_divide_the_width,
    kv_heads,
    ours_is,
    same,
    theirs_is,
    windows,
)
from interop.rope import rope
from interop.tensors import one, with_biases
from model_config import ModelArchitectureConfig


def _read_scale(fields: Fields) -> dict:
    scalar = fields.take('query_pre_attn_scalar', float, 256)
    if scalar <= 0:
        fields.refuse('query_pre_attn_scalar', 'its root is divided by, so it must be above 0')
        return {}
    return {'attention_scale': scalar**-0.5}


def _write_scale(config: ModelArchitectureConfig) -> dict:
    scale = config.to_dict().get('attention_scale')
    return {'query_pre_attn_scalar': round(scale**-2)} if scale else {}


def _read_backend(fields: Fields) -> dict:
    """The fused one knows no softcap."""
    capped = fields.value('attn_logit_softcapping', 50.0) is not None
    return {'attention_backend': 'manual' if capped else 'sdpa'}


GEMMA2 = Family(
    name='gemma2',
    architecture='Gemma2ForCausalLM',
    prefix='model.',
    harmless=frozenset({'hidden_act', 'sliding_window_size'}),  # of old files; not read there
    unloadable=heads_must_divide_the_width,
    entries=(
        *llama_like(block_size=8192),
        same('d_ff', 'intermediate_size'),
        same('head_dim', 'head_dim', 256),
        same('attention_bias', 'attention_bias', False),
        same('attention_softcap', 'attn_logit_softcapping', 50.0),
        same('logit_softcap', 'final_logit_softcapping', 30.0),
        same('weight_tying', 'tie_word_embeddings', True),
        ours_is(norm_position='sandwich', ffn_type='geglu', ffn_bias=False, scale_embeddings=True),
        theirs_is(use_bidirectional_attention=None),
        same(
            'geglu_tanh',
            'hidden_activation',
            'gelu_pytorch_tanh',
            {'gelu_pytorch_tanh': True, 'gelu_new': True, 'gelu': False},
        ),
        Entry(_read_scale, _write_scale),
        Entry(_read_backend, lambda config: {}),
        windows(4096, lambda layer, fields: layer % 2 == 0),
        kv_heads(4),
        rope(),
    ),
    weights=GATED
    | with_biases(ATTENTION)
    | {
        'token_embedding.weight': ENDS['token_embedding.weight'],
        'output_head.projection.weight': ENDS['output_head.projection.weight'],
        # x · (1 + weight)
        'final_norm.weight': one('model.norm.weight', plus=1.0),
        **{
            f'blocks.{{layer}}.{ours}.weight': one(f'{LAYER}{theirs}_layernorm.weight', plus=1.0)
            for ours, theirs in {
                'attention_norm': 'input',
                'attention_output_norm': 'post_attention',
                'ffn_norm': 'pre_feedforward',
                'ffn_output_norm': 'post_feedforward',
            }.items()
        },
    },
)
