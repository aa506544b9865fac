"""RecurrentGemma: RG-LRU, and in every third layer attention with a window."""

import math

import torch

from interop.families.llama import LAYER, query_key_value_rows
from interop.fields import Fields
from interop.layer_kinds import LayerKind, LayerNames, layer_kinds_field
from interop.layers import options_with
from interop.mapping import (
    Family,
    FieldMap,
    constant_option,
    export_only,
    field,
    head_size_field,
    kv_heads_field,
    required_field,
)
from interop.rope import rope_fields
from interop.tensors import CONVOLUTION, TensorMap, resize_vocabulary, tensor, with_biases
from model_config import ModelArchitectureConfig

_RECURRENT, _ATTENTION = 'recurrent', 'attention'


def _read_pattern(fields: Fields, layers: int | None) -> list[str]:
    """`block_types`, repeated up to the depth."""
    default = [_RECURRENT, _RECURRENT, _ATTENTION]
    pattern = fields.take('block_types', list, optional=True) or default
    return [pattern[layer % len(pattern)] for layer in range(layers or 0)]


_PATTERN = LayerNames(('block_types',), _read_pattern, lambda names: {'block_types': names})


def _read_biases(fields: Fields) -> dict:
    """Of attention: the output projection always has one."""
    has_biases = fields.take('attention_bias', bool, False)
    return {'attention_bias': has_biases, 'attention_output_bias': None if has_biases else True}


def _write_biases(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'attention_bias')
    return {key: options[key] for key in ('attention_bias',) if key in options}


def _read_ffn_width(fields: Fields) -> dict:
    """The width of gate and up projection together."""
    return {'d_ff': fields.take('intermediate_size', int, 7680) // 2}


def _write_ffn_width(config: ModelArchitectureConfig) -> dict:
    width = options_with(config, 'd_ff').get('d_ff')
    return {'intermediate_size': 2 * width} if width else {}


def _check_embedding_scale(fields: Fields) -> dict:
    """Refuse widths whose root transformers rounds when it scales embeddings by it."""
    root = math.sqrt(max(fields.take('hidden_size', int, 0), 0))
    if torch.tensor(root, dtype=torch.bfloat16).item() != root:
        fields.refuse('hidden_size', 'transformers scales embeddings by its root in bfloat16')
    return {}


_KINDS = {
    _RECURRENT: LayerKind(
        {'mixer': 'rg_lru'},
        (
            field('rg_lru_width', 'lru_width', None),
            field('rg_lru_conv_size', 'conv1d_width', 4),
            constant_option(rg_lru_bias=True),
        ),
    ),
    _ATTENTION: LayerKind(
        {'mixer': 'attention'},
        (
            field('sliding_window', 'attention_window_size', 2048),
            kv_heads_field(),
            head_size_field(),
            FieldMap(_read_biases, _write_biases),
            rope_fields(fraction='partial_rotary_factor', default_fraction=0.5),
            export_only(attention_dropout='attention_dropout'),
        ),
    ),
}
_MIXER = 'blocks.{layer}.mixers.rg_lru.'
_THEIRS = LAYER + 'temporal_block.'
_LINEAR = {
    **{
        f'{_MIXER}{name}.weight': tensor(f'{_THEIRS}{name}.weight')
        for name in ('linear_y', 'linear_x', 'linear_out')
    },
    'blocks.{layer}.attention.qkv.weight': TensorMap(
        tuple(f'{_THEIRS}{name}_proj.weight' for name in 'qkv'), rows=query_key_value_rows
    ),
    'blocks.{layer}.attention.output.weight': tensor(_THEIRS + 'o_proj.weight'),
    'blocks.{layer}.ffn.gate_up.weight': TensorMap(
        tuple(f'{LAYER}mlp_block.{name}_proj.weight' for name in ('gate', 'up'))
    ),
    'blocks.{layer}.ffn.down.weight': tensor(LAYER + 'mlp_block.down_proj.weight'),
}

RECURRENT_GEMMA = Family(
    name='recurrent_gemma',
    architecture='RecurrentGemmaForCausalLM',
    prefix='model.',
    field_maps=(
        field('n_layer', 'num_hidden_layers'),
        field('n_head', 'num_attention_heads'),
        field('n_embd', 'hidden_size'),
        field('vocab_size', 'vocab_size'),
        field('norm_eps', 'rms_norm_eps', 1e-6),
        field('weight_tying', 'tie_word_embeddings', True),
        field('logit_softcap', 'logits_soft_cap', 30.0),
        FieldMap(_read_ffn_width, _write_ffn_width),
        FieldMap(_check_embedding_scale, lambda config: {}),
        required_field(hidden_activation='gelu_pytorch_tanh'),
        # No field has the length of the training's sequences; the models were published with 8192.
        constant_option(
            block_size=8192,
            normalization='rmsnorm',
            ffn_type='geglu',
            geglu_tanh=True,
            ffn_bias=True,
            bias=False,
            scale_embeddings=True,
        ),
        layer_kinds_field(_PATTERN, kinds=_KINDS),
    ),
    aliases={'sliding_window': 'attention_window_size'},
    # Of initialization.
    irrelevant_fields=frozenset({'w_init_variance_scale', 'final_w_init_variance_scale'}),
    weights={
        'token_embedding.weight': tensor('model.embed_tokens.weight', resize=resize_vocabulary),
        'output_head.projection.weight': tensor('lm_head.weight', resize=resize_vocabulary),
        # The norms compute x · (1 + weight).
        'final_norm.weight': tensor('model.final_norm.weight', offset=1.0),
        'blocks.{layer}.attention_norm.weight': tensor(
            LAYER + 'temporal_pre_norm.weight', offset=1.0
        ),
        'blocks.{layer}.ffn_norm.weight': tensor(LAYER + 'channel_pre_norm.weight', offset=1.0),
        **with_biases(_LINEAR),
        _MIXER + 'conv.weight': tensor(_THEIRS + 'conv_1d.weight', layout=CONVOLUTION),
        _MIXER + 'conv.bias': tensor(_THEIRS + 'conv_1d.bias'),
        **{
            f'{_MIXER}{name}': tensor(f'{_THEIRS}rg_lru.{name}')
            for name in (
                'recurrent_param',
                *('input_gate_weight', 'input_gate_bias'),
                *('recurrent_gate_weight', 'recurrent_gate_bias'),
            )
        },
    },
)
