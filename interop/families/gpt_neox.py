"""GPT-NeoX, the architecture of Pythia, and GPT-NeoX-Japanese."""

from dataclasses import replace

import torch

from interop.fields import Fields
from interop.layers import PerLayer
from interop.mapping import (
    ACTIVATIONS,
    MAX_LAYERS,
    Family,
    FieldMap,
    constant_option,
    export_only,
    field,
    head_size_field,
    size_fields,
)
from interop.rope import rope_fields
from interop.tensors import resize_vocabulary, tensor, with_biases
from model_config import ModelArchitectureConfig


def query_key_value_of_each_head(config: ModelArchitectureConfig) -> torch.Tensor:
    """The order of rows. GPT-NeoX: query, key and value of each head in turn; ours: all queries,
    all keys, all values."""
    rows = torch.arange(3 * config.n_head * config.head_dim)
    return rows.view(config.n_head, 3, config.head_dim).transpose(0, 1).flatten()


_NEOX_LAYER = 'gpt_neox.layers.{layer}.'
GPT_NEOX = Family(
    name='gpt_neox',
    architecture='GPTNeoXForCausalLM',
    prefix='gpt_neox.',
    field_maps=(
        *size_fields(block_size=2048),
        field('d_ff', 'intermediate_size'),
        field('norm_eps', 'layer_norm_eps', 1e-5),
        field('activation', 'hidden_act', 'gelu', ACTIVATIONS),
        field('attention_bias', 'attention_bias', True),
        field('weight_tying', 'tie_word_embeddings', False),
        field('norm_position', 'use_parallel_residual', True, {True: 'parallel', False: 'pre'}),
        constant_option(normalization='layernorm', ffn_bias=True, bias=True),
        head_size_field(),
        rope_fields(theta='rotary_emb_base', fraction='rotary_pct'),
        export_only(attention_dropout='attention_dropout', hidden_dropout='residual_dropout'),
    ),
    weights={
        'token_embedding.weight': tensor('gpt_neox.embed_in.weight', resize=resize_vocabulary),
        'output_head.projection.weight': tensor('embed_out.weight', resize=resize_vocabulary),
        **with_biases(
            {
                'final_norm.weight': tensor('gpt_neox.final_layer_norm.weight'),
                'blocks.{layer}.attention_norm.weight': tensor(
                    _NEOX_LAYER + 'input_layernorm.weight'
                ),
                'blocks.{layer}.ffn_norm.weight': tensor(
                    _NEOX_LAYER + 'post_attention_layernorm.weight'
                ),
                'blocks.{layer}.attention.qkv.weight': tensor(
                    _NEOX_LAYER + 'attention.query_key_value.weight',
                    row_order=query_key_value_of_each_head,
                ),
                'blocks.{layer}.attention.output.weight': tensor(
                    _NEOX_LAYER + 'attention.dense.weight'
                ),
                'blocks.{layer}.ffn.up.weight': tensor(_NEOX_LAYER + 'mlp.dense_h_to_4h.weight'),
                'blocks.{layer}.ffn.down.weight': tensor(_NEOX_LAYER + 'mlp.dense_4h_to_h.weight'),
            }
        ),
    },
    ignored_tensors=r'\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$',
)

# --- GPT-NeoX-Japanese ----------------------------------------------------------------------------


def _read_width(fields: Fields) -> dict:
    multiple = fields.take('intermediate_multiple_size', int, 4)
    return {'d_ff': fields.take('hidden_size', int, 0) * multiple}


def _write_width(config: ModelArchitectureConfig) -> dict:
    return {'intermediate_multiple_size': (config.layers[0].get('d_ff') or 0) // config.n_embd}


def _read_output_biases(fields: Fields) -> dict:
    """The last layer's attention alone has a bias, of its output."""
    layers = min(fields.take('num_hidden_layers', int, 0), MAX_LAYERS)
    return {'attention_output_bias': PerLayer(layer == layers - 1 for layer in range(layers))}


_JAPANESE = 'gpt_neox_japanese.'
GPT_NEOX_JAPANESE = Family(
    name='gpt_neox_japanese',
    architecture='GPTNeoXJapaneseForCausalLM',
    prefix=_JAPANESE,
    field_maps=(
        *size_fields(block_size=2048),
        FieldMap(_read_width, _write_width),
        field('norm_eps', 'layer_norm_eps', 1e-5),
        field('activation', 'hidden_act', 'gelu', ACTIVATIONS),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(normalization='layernorm', ffn_bias=False, bias=False),
        constant_option(attention_bias=False),
        FieldMap(_read_output_biases, lambda config: {}),
        head_size_field(),
        rope_fields(theta='rotary_emb_base', fraction='rotary_pct', default_fraction=1.0),
        export_only(attention_dropout='attention_dropout', hidden_dropout='residual_dropout'),
    ),
    weights={
        ours: replace(
            own, templates=tuple(name.replace('gpt_neox.', _JAPANESE) for name in own.templates)
        )
        for ours, own in GPT_NEOX.weights.items()
    }
    | {
        'blocks.{layer}.attention.output.bias': tensor(
            _JAPANESE + 'layers.{layer}.attention.dense_bias'
        )
    },
)
