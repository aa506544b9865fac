"""Families like GPT-2 with other norms, positions or heads: GPT-1, GPT-BigCode, MPT, BioGPT."""

from dataclasses import replace

import torch

from interop.families.gpt2 import DROPOUTS, GPT2, gpt2_weights
from interop.families.gpt_neox import query_key_value_of_each_head
from interop.families.opt import OPT
from interop.fields import Fields
from interop.layers import options_with
from interop.mapping import (
    ACTIVATIONS,
    Family,
    FieldMap,
    constant_option,
    export_only,
    field,
    required_field,
)
from interop.tensors import crop_positions, resize_vocabulary, tensor, with_biases
from model_config import ModelArchitectureConfig

# --- GPT-1 ----------------------------------------------------------------------------------------

_GPT1_WEIGHTS = gpt2_weights(transposed=True) | {
    'token_embedding.weight': tensor('transformer.tokens_embed.weight', resize=resize_vocabulary),
    'position_encoding.table.weight': tensor(
        'transformer.positions_embed.weight', resize=crop_positions
    ),
}
OPENAI_GPT = Family(
    name='openai-gpt',
    architecture='OpenAIGPTLMHeadModel',
    prefix='transformer.',
    field_maps=(
        field('n_layer', 'n_layer'),
        field('n_head', 'n_head'),
        field('n_embd', 'n_embd'),
        field('block_size', 'n_positions', 512),
        field('vocab_size', 'vocab_size'),
        field('norm_eps', 'layer_norm_epsilon', 1e-5),
        # Its `gelu` is the approximation.
        field('activation', 'afn', 'gelu', {'gelu': 'gelu_tanh', 'relu': 'relu', 'silu': 'silu'}),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(normalization='layernorm', position_encoding='learned_absolute', bias=True),
        constant_option(norm_position='post'),
        DROPOUTS,
    ),
    aliases=GPT2.aliases,
    irrelevant_fields=GPT2.irrelevant_fields,
    weights={name: own for name, own in _GPT1_WEIGHTS.items() if 'final_norm' not in name},
    ignored_tensors=r'\.attn\.bias$|position_ids$',
)

# --- GPT-BigCode ----------------------------------------------------------------------------------


def _read_multi_query(fields: Fields) -> dict:
    shared = fields.take('multi_query', bool, True) and fields.take('n_head', int, 1) > 1
    return {'use_gqa': True, 'num_kv_heads': 1} if shared else {'use_gqa': False}


def _write_multi_query(config: ModelArchitectureConfig) -> dict:
    return {'multi_query': options_with(config, 'num_kv_heads').get('num_kv_heads') == 1}


def _query_key_value_rows(config: ModelArchitectureConfig) -> torch.Tensor:
    """The order of rows: that of GPT-NeoX, unless all heads share their keys and values."""
    if config.get('use_gqa'):
        return torch.arange((config.n_head + 2) * config.head_dim)
    return query_key_value_of_each_head(config)


_QKV = 'transformer.h.{layer}.attn.c_attn.weight'
GPT_BIGCODE = Family(
    name='gpt_bigcode',
    architecture='GPTBigCodeForCausalLM',
    prefix='transformer.',
    field_maps=(
        field('n_layer', 'n_layer'),
        field('n_head', 'n_head'),
        field('n_embd', 'n_embd'),
        field('d_ff', 'n_inner', None),
        field('block_size', 'n_positions', 1024),
        field('vocab_size', 'vocab_size'),
        field('norm_eps', 'layer_norm_epsilon', 1e-5),
        field('activation', 'activation_function', 'gelu_pytorch_tanh', ACTIVATIONS),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(normalization='layernorm', position_encoding='learned_absolute', bias=True),
        required_field(scale_attn_weights=True, add_cross_attention=False),
        FieldMap(_read_multi_query, _write_multi_query),
        DROPOUTS,
    ),
    aliases=GPT2.aliases,
    irrelevant_fields=GPT2.irrelevant_fields
    | {
        'num_key_value_heads',  # follows from multi_query
        # The same function in another precision, and implementations of it.
        *('attention_softmax_in_fp32', 'scale_attention_softmax_in_fp32'),
        *('inference_runner', 'max_batch_size', 'max_sequence_length', 'pad_key_length'),
        *('pre_allocate_kv_cache', 'validate_runner_input'),
    },
    weights=gpt2_weights(transposed=False)
    | with_biases(
        {'blocks.{layer}.attention.qkv.weight': tensor(_QKV, row_order=_query_key_value_rows)}
    ),
    ignored_tensors=GPT2.ignored_tensors,
)

# --- MPT ------------------------------------------------------------------------------------------


def _read_attention(fields: Fields) -> dict:
    """The attention's own object. transformers ignores most of it, but not the authors' code."""
    attention = fields.subobject('attn_config')
    for name, constant in {
        'alibi': True,
        'alibi_bias_max': 8,
        'attn_type': 'multihead_attention',
        'prefix_lm': False,
        'qk_ln': False,
    }.items():
        attention.require(name, constant)
    scale = attention.take('softmax_scale', float, optional=True)
    clip = attention.take('clip_qkv', float, optional=True)
    attention.refuse_unread(frozenset({'attn_impl', 'attn_uses_sequence_id'}))
    return {'attention_scale': scale, 'qkv_clip': clip or None}  # 0 is off


def _write_attention(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'attention_scale')
    scale = options.get('attention_scale')
    own = options.get('head_dim') and scale != options['head_dim'] ** -0.5
    return {
        'attn_config': {
            'softmax_scale': scale if own else None,
            'clip_qkv': options.get('qkv_clip'),
        }
    }


_BLOCK = 'transformer.blocks.{layer}.'
MPT = Family(
    name='mpt',
    architecture='MptForCausalLM',
    prefix='transformer.',
    field_maps=(
        field('n_layer', 'n_layers'),
        field('n_head', 'n_heads'),
        field('n_embd', 'd_model'),
        field('block_size', 'max_seq_len', 2048),
        field('vocab_size', 'vocab_size'),
        field('norm_eps', 'layer_norm_epsilon', 1e-5),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(normalization='layernorm_nobias', position_encoding='alibi', bias=False),
        required_field(expansion_ratio=4, no_bias=True, logit_scale=None),
        FieldMap(_read_attention, _write_attention),
    ),
    aliases={
        'hidden_size': 'd_model',
        'num_attention_heads': 'n_heads',
        'num_hidden_layers': 'n_layers',
    },
    irrelevant_fields=frozenset(
        {
            # Training, and implementation.
            *('emb_pdrop', 'embedding_fraction', 'init_config', 'init_device', 'norm_type'),
            *('tokenizer_name', 'verbose'),
            'learned_pos_emb',  # there are none besides ALiBi
        }
    ),
    weights={
        'token_embedding.weight': tensor('transformer.wte.weight', resize=resize_vocabulary),
        'output_head.projection.weight': tensor('lm_head.weight', resize=resize_vocabulary),
        'final_norm.weight': tensor('transformer.norm_f.weight'),
        'blocks.{layer}.attention_norm.weight': tensor(_BLOCK + 'norm_1.weight'),
        'blocks.{layer}.ffn_norm.weight': tensor(_BLOCK + 'norm_2.weight'),
        'blocks.{layer}.attention.qkv.weight': tensor(_BLOCK + 'attn.Wqkv.weight'),
        'blocks.{layer}.attention.output.weight': tensor(_BLOCK + 'attn.out_proj.weight'),
        'blocks.{layer}.ffn.up.weight': tensor(_BLOCK + 'ffn.up_proj.weight'),
        'blocks.{layer}.ffn.down.weight': tensor(_BLOCK + 'ffn.down_proj.weight'),
    },
)

# --- BioGPT ---------------------------------------------------------------------------------------


def _biogpt_name(name: str) -> str:
    """The name of a tensor of OPT in BioGPT."""
    if name == 'lm_head.weight':
        return 'output_projection.weight'
    return name.replace('model.decoder.', 'biogpt.').replace('biogpt.final_layer', 'biogpt.layer')


BIOGPT = Family(
    name='biogpt',
    architecture='BioGptForCausalLM',
    prefix='biogpt.',
    field_maps=(
        field('n_layer', 'num_hidden_layers'),
        field('n_head', 'num_attention_heads'),
        field('n_embd', 'hidden_size'),
        field('d_ff', 'intermediate_size'),
        field('block_size', 'max_position_embeddings', 1024),
        field('vocab_size', 'vocab_size'),
        field('activation', 'hidden_act', 'gelu', ACTIVATIONS),
        field('scale_embeddings', 'scale_embedding', True),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(normalization='layernorm', position_encoding='learned_absolute', bias=True),
        export_only(
            hidden_dropout_prob='residual_dropout', attention_probs_dropout_prob='attention_dropout'
        ),
    ),
    irrelevant_fields=frozenset({'layer_norm_eps'}),  # the norms have 1e-5 whatever it is
    weights={
        ours: replace(own, templates=tuple(map(_biogpt_name, own.templates)))
        for ours, own in OPT.weights.items()
    },
)
