"""BLOOM and Falcon."""

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
from interop.rope import rope_fields
from interop.rotary_rows import rows_grouped_by_kv_head
from interop.tensors import TensorMap, resize_vocabulary, tensor, with_biases
from model_config import ModelArchitectureConfig

_LAYER = 'transformer.h.{layer}.'
_WEIGHTS = {
    'token_embedding.weight': tensor(
        'transformer.word_embeddings.weight', resize=resize_vocabulary
    ),
    'output_head.projection.weight': tensor('lm_head.weight', resize=resize_vocabulary),
    **with_biases(
        {
            'final_norm.weight': tensor('transformer.ln_f.weight'),
            'blocks.{layer}.attention.qkv.weight': tensor(
                _LAYER + 'self_attention.query_key_value.weight',
                row_order=rows_grouped_by_kv_head,
            ),
            'blocks.{layer}.attention.output.weight': tensor(
                _LAYER + 'self_attention.dense.weight'
            ),
            'blocks.{layer}.ffn.up.weight': tensor(_LAYER + 'mlp.dense_h_to_4h.weight'),
            'blocks.{layer}.ffn.down.weight': tensor(_LAYER + 'mlp.dense_4h_to_h.weight'),
        }
    ),
}

# --- BLOOM ----------------------------------------------------------------------------------------

BLOOM = Family(
    name='bloom',
    architecture='BloomForCausalLM',
    prefix='transformer.',
    field_maps=(
        field('n_layer', 'n_layer', 2),
        field('n_head', 'n_head', 8),
        field('n_embd', 'hidden_size', 64),
        FieldMap(lambda fields: {'d_ff': 4 * fields.take('hidden_size', int, 64)}, lambda c: {}),
        # Of the training; transformers has no such field, as ALiBi works at any length.
        field('block_size', 'seq_length', 2048),
        field('vocab_size', 'vocab_size'),
        field('norm_eps', 'layer_norm_epsilon', 1e-5),
        field('weight_tying', 'tie_word_embeddings', True),
        field(
            'norm_position',
            'apply_residual_connection_post_layernorm',
            False,
            {False: 'pre', True: 'entrance'},
        ),
        constant_option(
            normalization='layernorm',
            embedding_norm='layernorm',
            position_encoding='alibi',
            activation='gelu_tanh',
            bias=True,
        ),
        required_field(slow_but_exact=False),  # else the output's bias is left out
        export_only(attention_dropout='attention_dropout', hidden_dropout='residual_dropout'),
    ),
    aliases={
        'num_hidden_layers': 'n_layer',
        'num_attention_heads': 'n_head',
        'n_embed': 'hidden_size',
    },
    # In released files, of the library that trained it.
    irrelevant_fields=frozenset(
        {
            *('attention_softmax_in_fp32', 'bias_dropout_fusion', 'masked_softmax_fusion'),
            *('offset_alibi', 'skip_bias_add', 'skip_bias_add_qkv', 'unk_token_id'),
        }
    ),
    weights=_WEIGHTS
    | with_biases(
        {
            'embedding_norm.weight': tensor('transformer.word_embeddings_layernorm.weight'),
            'blocks.{layer}.attention_norm.weight': tensor(_LAYER + 'input_layernorm.weight'),
            'blocks.{layer}.ffn_norm.weight': tensor(_LAYER + 'post_attention_layernorm.weight'),
        }
    ),
)

# --- Falcon ---------------------------------------------------------------------------------------


def _read_blocks(fields: Fields) -> dict:
    """The layout of a block, and the number of key/value heads."""
    heads = fields.take('num_attention_heads', int, 71)
    kv_heads = fields.take('num_kv_heads', int, heads, optional=True)
    kv_heads = heads if kv_heads is None else kv_heads
    is_new = fields.take('new_decoder_architecture', bool, False)
    is_multi_query = fields.take('multi_query', bool, True)
    is_parallel = fields.take('parallel_attn', bool, True)
    norms = fields.take('num_ln_in_parallel_attn', int, optional=True)
    norms = (2 if is_new else 1) if norms is None else norms
    if is_new and not is_parallel:
        fields.refuse('parallel_attn', 'must be true with new_decoder_architecture')
    if is_parallel and norms not in ((1, 2) if is_new else (1,)):
        fields.refuse('num_ln_in_parallel_attn', 'must be 1, or 2 with new_decoder_architecture')
    if not is_new and not is_multi_query and kv_heads != heads:
        fields.refuse('num_kv_heads', f'must be {heads}, as many as heads')
    kv_heads = 1 if is_multi_query and not is_new else kv_heads
    shared = {'use_gqa': kv_heads != heads}
    shared |= {'num_kv_heads': kv_heads} if kv_heads != heads else {}
    if not is_parallel:
        return {'norm_position': 'pre', **shared}
    return {'norm_position': 'parallel', 'parallel_shared_norm': norms == 1, **shared}


def _write_blocks(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'num_kv_heads')
    heads, kv_heads = options['n_head'], options.get('num_kv_heads', options['n_head'])
    is_parallel = options['norm_position'] == 'parallel'
    norms = 1 if not is_parallel or options['parallel_shared_norm'] else 2
    is_new = is_parallel and (norms == 2 or kv_heads not in (1, heads))
    return {
        'new_decoder_architecture': is_new,
        'multi_query': kv_heads == 1 and not is_new,
        'parallel_attn': is_parallel,
        'num_ln_in_parallel_attn': norms if is_new else None,
        'num_kv_heads': kv_heads,
    }


def _read_positions(fields: Fields) -> dict:
    rotary = _ROPE.read(fields)
    if fields.take('alibi', bool, False):
        return {'position_encoding': 'alibi', 'alibi_scaled': True}
    return rotary


def _write_positions(config: ModelArchitectureConfig) -> dict:
    is_alibi = config.layers[0].get('position_encoding') == 'alibi'
    return {'alibi': is_alibi, **_ROPE.write(config)}


_ROPE = rope_fields()


def _norm(name: str, parallel: str, other: str) -> TensorMap:
    """A norm of a block. parallel: its name if a parallel block has two; other: else."""

    def names(config: ModelArchitectureConfig) -> tuple[str, ...]:
        has_two = config.norm_position == 'parallel' and not config.parallel_shared_norm
        return (f'{_LAYER}{parallel if has_two else other}.{name}',)

    return TensorMap((f'{_LAYER}{other}.{name}',), choose_templates=names)


FALCON = Family(
    name='falcon',
    architecture='FalconForCausalLM',
    prefix='transformer.',
    field_maps=(
        field('n_layer', 'num_hidden_layers', 32),
        field('n_head', 'num_attention_heads', 71),
        field('n_embd', 'hidden_size', 4544),
        FieldMap(
            lambda fields: {
                'd_ff': fields.take('ffn_hidden_size', int, optional=True)
                or 4 * fields.take('hidden_size', int, 4544)
            },
            lambda config: {'ffn_hidden_size': options_with(config, 'd_ff').get('d_ff')},
        ),
        field('block_size', 'max_position_embeddings', 2048),
        field('vocab_size', 'vocab_size'),
        field('norm_eps', 'layer_norm_epsilon', 1e-5),
        field('activation', 'activation', 'gelu', ACTIVATIONS),
        field('bias', 'bias', False),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(normalization='layernorm'),
        FieldMap(_read_blocks, _write_blocks),
        FieldMap(_read_positions, _write_positions),
        export_only(attention_dropout='attention_dropout', hidden_dropout='residual_dropout'),
    ),
    aliases={'n_embed': 'hidden_size'},
    weights=_WEIGHTS
    | {
        f'blocks.{{layer}}.{ours}.{name}': _norm(name, parallel, other)
        for name in ('weight', 'bias')
        for ours, parallel, other in (
            ('attention_norm', 'ln_attn', 'input_layernorm'),
            ('ffn_norm', 'ln_mlp', 'post_attention_layernorm'),
        )
    },
)
