"""OPT."""

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
from interop.tensors import TensorMap, crop_positions, resize_vocabulary, tensor, with_biases


def _read_embedding_width(fields: Fields) -> dict:
    width = fields.take('hidden_size', int)
    if fields.take('word_embed_proj_dim', int, optional=True) not in (None, width):
        fields.refuse('word_embed_proj_dim', f'only embeddings of width {width} are supported')
    return {}


def opt_weights(decoder: str, final_norm: str) -> dict[str, TensorMap]:
    """The tensors of norms and blocks, with their biases. decoder: the prefix of their names."""
    layer = decoder + 'layers.{layer}.'
    return with_biases(
        {
            'final_norm.weight': tensor(f'{decoder}{final_norm}.weight'),
            'blocks.{layer}.attention_norm.weight': tensor(layer + 'self_attn_layer_norm.weight'),
            'blocks.{layer}.ffn_norm.weight': tensor(layer + 'final_layer_norm.weight'),
            'blocks.{layer}.attention.qkv.weight': TensorMap(
                tuple(f'{layer}self_attn.{name}_proj.weight' for name in 'qkv')
            ),
            'blocks.{layer}.attention.output.weight': tensor(layer + 'self_attn.out_proj.weight'),
            'blocks.{layer}.ffn.up.weight': tensor(layer + 'fc1.weight'),
            'blocks.{layer}.ffn.down.weight': tensor(layer + 'fc2.weight'),
        }
    )


_OPT = 'model.decoder.'
OPT = Family(
    name='opt',
    architecture='OPTForCausalLM',
    prefix='model.',
    field_maps=(
        field('n_layer', 'num_hidden_layers'),
        field('n_head', 'num_attention_heads'),
        field('n_embd', 'hidden_size'),
        field('d_ff', 'ffn_dim', 3072),
        field('block_size', 'max_position_embeddings', 2048),
        field('vocab_size', 'vocab_size'),
        field('activation', 'activation_function', 'relu', ACTIVATIONS),
        field('weight_tying', 'tie_word_embeddings', True),
        field('norm_position', 'do_layer_norm_before', True, {True: 'pre', False: 'post'}),
        field('attention_bias', 'enable_bias', True),
        field('ffn_bias', 'enable_bias', True),
        constant_option(normalization='layernorm', position_encoding='learned_absolute'),
        required_field(_remove_final_layer_norm=False, layer_norm_elementwise_affine=True),
        FieldMap(_read_embedding_width, lambda config: {'word_embed_proj_dim': config.n_embd}),
        export_only(dropout='residual_dropout', attention_dropout='attention_dropout'),
    ),
    weights={
        'token_embedding.weight': tensor(_OPT + 'embed_tokens.weight', resize=resize_vocabulary),
        'position_encoding.table.weight': tensor(
            _OPT + 'embed_positions.weight', resize=crop_positions, unused_rows=2
        ),
        'output_head.projection.weight': tensor('lm_head.weight', resize=resize_vocabulary),
        **opt_weights(_OPT, 'final_layer_norm'),
    },
)
