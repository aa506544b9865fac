"""GPT-NeoX, of which Pythia is."""

import torch

from interop.mapping import (
    ACTIVATIONS,
    Family,
    heads_split_the_width,
    ours_is,
    same,
    written_only,
)
from interop.rope import rope
from interop.tensors import fit_vocabulary, one, with_biases
from model_config import ModelArchitectureConfig


def _query_key_value_of_each_head(config: ModelArchitectureConfig) -> torch.Tensor:
    """GPT-NeoX: head after head its query, key and value; ours: all queries, all keys, ..."""
    rows = torch.arange(3 * config.n_head * config.head_dim)
    return rows.view(config.n_head, 3, config.head_dim).transpose(0, 1).flatten()


_NEOX_LAYER = 'gpt_neox.layers.{layer}.'
GPT_NEOX = Family(
    name='gpt_neox',
    architecture='GPTNeoXForCausalLM',
    prefix='gpt_neox.',
    entries=(
        same('n_layer', 'num_hidden_layers'),
        same('n_head', 'num_attention_heads'),
        same('n_embd', 'hidden_size'),
        same('d_ff', 'intermediate_size'),
        same('block_size', 'max_position_embeddings', 2048),
        same('vocab_size', 'vocab_size'),
        same('norm_eps', 'layer_norm_eps', 1e-5),
        same('activation', 'hidden_act', 'gelu', ACTIVATIONS),
        same('attention_bias', 'attention_bias', True),
        same('weight_tying', 'tie_word_embeddings', False),
        same('norm_position', 'use_parallel_residual', True, {True: 'parallel', False: 'pre'}),
        ours_is(normalization='layernorm', ffn_bias=True, bias=True),
        heads_split_the_width(),
        rope(theta='rotary_emb_base', fraction='rotary_pct'),
        written_only(attention_dropout='attention_dropout', hidden_dropout='residual_dropout'),
    ),
    weights={
        'token_embedding.weight': one('gpt_neox.embed_in.weight', fit=fit_vocabulary),
        'output_head.projection.weight': one('embed_out.weight', fit=fit_vocabulary),
        **with_biases(
            {
                'final_norm.weight': one('gpt_neox.final_layer_norm.weight'),
                'blocks.{layer}.attention_norm.weight': one(_NEOX_LAYER + 'input_layernorm.weight'),
                'blocks.{layer}.ffn_norm.weight': one(
                    _NEOX_LAYER + 'post_attention_layernorm.weight'
                ),
                'blocks.{layer}.attention.qkv.weight': one(
                    _NEOX_LAYER + 'attention.query_key_value.weight',
                    order=_query_key_value_of_each_head,
                ),
                'blocks.{layer}.attention.output.weight': one(
                    _NEOX_LAYER + 'attention.dense.weight'
                ),
                'blocks.{layer}.ffn.up.weight': one(_NEOX_LAYER + 'mlp.dense_h_to_4h.weight'),
                'blocks.{layer}.ffn.down.weight': one(_NEOX_LAYER + 'mlp.dense_4h_to_h.weight'),
            }
        ),
    },
    ignored=r'\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$',
)
