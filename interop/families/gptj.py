"""Families whose output head has a bias, in parallel blocks with one norm: GPT-J, CodeGen, Phi."""

import math

import torch

from interop.families.llama import LAYER, projections, query_key_value_rows
from interop.fields import Fields
from interop.layers import options_with
from interop.mapping import (
    ACTIVATIONS,
    Family,
    FieldMap,
    constant_option,
    export_only,
    field,
    head_size_field,
    kv_heads_field,
)
from interop.rope import rope_fields
from interop.rotary_rows import interleaved_rows
from interop.tensors import TensorMap, resize_vocabulary, tensor, with_biases
from model_config import ModelArchitectureConfig

_HEAD = {
    'output_head.projection.weight': tensor('lm_head.weight', resize=resize_vocabulary),
    'output_head.projection.bias': tensor('lm_head.bias', resize=resize_vocabulary),
}
_BLOCK = constant_option(
    normalization='layernorm', norm_position='parallel', parallel_shared_norm=True, head_bias=True
)

# --- GPT-J and CodeGen ----------------------------------------------------------------------------


def _read_rotary_dim(fields: Fields) -> dict:
    """The fraction of a head that is rotated, from the number of its dimensions."""
    width, heads = fields.take('n_embd', int, 4096), fields.take('n_head', int, 16)
    rotated = fields.take('rotary_dim', int, 64)
    if heads < 1 or not 0 < rotated <= width // heads:
        fields.refuse('rotary_dim', f'must be from 1 to the size of a head, {width}/{heads}')
        return {}
    fraction = rotated / (width // heads)
    if int(width // heads * fraction) < rotated:  # rounding
        fraction = math.nextafter(fraction, 2)
    return {'position_encoding': 'rope', 'rope_fraction': fraction}


def _write_rotary_dim(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'rope_fraction')
    if 'rope_fraction' not in options or 'head_dim' not in options:
        return {}
    return {'rotary_dim': int(options['head_dim'] * options['rope_fraction'])}


_GPTJ_FIELDS = (
    field('n_layer', 'n_layer', 28),
    field('n_head', 'n_head', 16),
    field('n_embd', 'n_embd', 4096),
    field('d_ff', 'n_inner', None),
    field('block_size', 'n_positions', 2048),
    field('vocab_size', 'vocab_size'),
    field('norm_eps', 'layer_norm_epsilon', 1e-5),
    field('activation', 'activation_function', 'gelu_new', ACTIVATIONS),
    field('weight_tying', 'tie_word_embeddings', False),
    _BLOCK,
    constant_option(bias=True, attention_bias=False, attention_output_bias=False, ffn_bias=True),
    FieldMap(_read_rotary_dim, _write_rotary_dim),
    export_only(
        embd_pdrop='dropout', attn_pdrop='attention_dropout', resid_pdrop='residual_dropout'
    ),
)
_GPTJ_ALIASES = {
    'hidden_size': 'n_embd',
    'max_position_embeddings': 'n_positions',
    'num_attention_heads': 'n_head',
    'num_hidden_layers': 'n_layer',
}
_UNUSED_FIELDS = frozenset(
    {
        # transformers reads neither: queries and keys are always rotated, scores always scaled
        *('rotary', 'scale_attn_weights', 'n_ctx', 'gradient_checkpointing'),
        *(f'summary_{what}' for what in ('type', 'use_proj', 'activation', 'proj_to_labels')),
        'summary_first_dropout',
    }
)
_GPTJ_LAYER = 'transformer.h.{layer}.'
_GPTJ_WEIGHTS = {
    'token_embedding.weight': tensor('transformer.wte.weight', resize=resize_vocabulary),
    **_HEAD,
    **with_biases(
        {
            'final_norm.weight': tensor('transformer.ln_f.weight'),
            'blocks.{layer}.attention_norm.weight': tensor(_GPTJ_LAYER + 'ln_1.weight'),
            'blocks.{layer}.ffn.up.weight': tensor(_GPTJ_LAYER + 'mlp.fc_in.weight'),
            'blocks.{layer}.ffn.down.weight': tensor(_GPTJ_LAYER + 'mlp.fc_out.weight'),
        }
    ),
    'blocks.{layer}.attention.output.weight': tensor(_GPTJ_LAYER + 'attn.out_proj.weight'),
}
_MASKS = r'\.attn\.(causal_mask|(masked_)?bias|embed_positions)$'

GPTJ = Family(
    name='gptj',
    architecture='GPTJForCausalLM',
    prefix='transformer.',
    field_maps=_GPTJ_FIELDS,
    aliases=_GPTJ_ALIASES,
    irrelevant_fields=_UNUSED_FIELDS,
    weights={
        **_GPTJ_WEIGHTS,
        'blocks.{layer}.attention.qkv.weight': TensorMap(
            tuple(f'{_GPTJ_LAYER}attn.{name}_proj.weight' for name in 'qkv'),
            rows=query_key_value_rows,
            row_order=interleaved_rows,
        ),
    },
    ignored_tensors=_MASKS,
)

_CODEGEN_PARTS = 4  # devices that CodeGen was trained on, by which its rows are grouped


def _codegen_rows(config: ModelArchitectureConfig) -> torch.Tensor:
    """The order of rows. CodeGen: queries, values and keys of a quarter of the heads in turn, and
    a rotation of neighboring dimensions."""
    rows = torch.arange(3 * config.n_head * config.head_dim).view(_CODEGEN_PARTS, 3, -1)
    query, value, key = (rows[:, part].flatten() for part in range(3))
    return torch.cat((query, key, value))[interleaved_rows(config)]


def _check_codegen(fields: dict) -> str | None:
    width = fields['n_embd']
    return f'n_embd={width} must be a multiple of 4' if width % _CODEGEN_PARTS else None


def _read_quarters(fields: Fields) -> dict:
    width = fields.take('n_embd', int, 4096)
    if width % _CODEGEN_PARTS:
        fields.refuse('n_embd', 'must be a multiple of 4')
    return {}


CODEGEN = Family(
    name='codegen',
    architecture='CodeGenForCausalLM',
    prefix='transformer.',
    field_maps=(*_GPTJ_FIELDS, FieldMap(_read_quarters, lambda config: {})),
    aliases=_GPTJ_ALIASES,
    irrelevant_fields=_UNUSED_FIELDS,
    weights={
        **_GPTJ_WEIGHTS,
        'blocks.{layer}.attention.qkv.weight': tensor(
            _GPTJ_LAYER + 'attn.qkv_proj.weight', row_order=_codegen_rows
        ),
    },
    ignored_tensors=_MASKS,
    check_loadable=_check_codegen,
)

# --- Phi 1, 1.5 and 2 -----------------------------------------------------------------------------

PHI = Family(
    name='phi',
    architecture='PhiForCausalLM',
    prefix='model.',
    field_maps=(
        field('n_layer', 'num_hidden_layers'),
        field('n_head', 'num_attention_heads'),
        field('n_embd', 'hidden_size'),
        field('d_ff', 'intermediate_size', 8192),
        field('block_size', 'max_position_embeddings', 2048),
        field('vocab_size', 'vocab_size'),
        field('norm_eps', 'layer_norm_eps', 1e-5),
        field('activation', 'hidden_act', 'gelu_new', ACTIVATIONS),
        field('weight_tying', 'tie_word_embeddings', False),
        field('qk_norm', 'qk_layernorm', False, {False: 'none', True: 'layernorm'}),
        _BLOCK,
        constant_option(bias=True),
        head_size_field(),
        kv_heads_field(),
        rope_fields(fraction='partial_rotary_factor', default_fraction=0.5),
        export_only(
            attention_dropout='attention_dropout',
            embd_pdrop='dropout',
            resid_pdrop='residual_dropout',
        ),
    ),
    weights={
        'token_embedding.weight': tensor('model.embed_tokens.weight', resize=resize_vocabulary),
        **_HEAD,
        **with_biases(
            {
                'final_norm.weight': tensor('model.final_layernorm.weight'),
                'blocks.{layer}.attention_norm.weight': tensor(LAYER + 'input_layernorm.weight'),
                'blocks.{layer}.attention.qkv.weight': TensorMap(
                    projections('self_attn', 'q', 'k', 'v'), rows=query_key_value_rows
                ),
                'blocks.{layer}.attention.output.weight': tensor(LAYER + 'self_attn.dense.weight'),
                'blocks.{layer}.attention.q_norm.weight': tensor(
                    LAYER + 'self_attn.q_layernorm.weight'
                ),
                'blocks.{layer}.attention.k_norm.weight': tensor(
                    LAYER + 'self_attn.k_layernorm.weight'
                ),
                'blocks.{layer}.ffn.up.weight': tensor(LAYER + 'mlp.fc1.weight'),
                'blocks.{layer}.ffn.down.weight': tensor(LAYER + 'mlp.fc2.weight'),
            }
        ),
    },
)
