"""OPT."""

from interop.fields import Fields
from interop.mapping import ACTIVATIONS, Entry, Family, ours_is, same, theirs_is, written_only
from interop.tensors import Weight, fit_positions, fit_vocabulary, one, with_biases


def _read_embedding_width(fields: Fields) -> dict:
    width = fields.take('hidden_size', int)
    if fields.take('word_embed_proj_dim', int, optional=True) not in (None, width):
        fields.refuse('word_embed_proj_dim', f'tables of another width than {width} are unknown')
    return {}


_OPT = 'model.decoder.'
_OPT_LAYER = _OPT + 'layers.{layer}.'
OPT = Family(
    name='opt',
    architecture='OPTForCausalLM',
    prefix='model.',
    entries=(
        same('n_layer', 'num_hidden_layers'),
        same('n_head', 'num_attention_heads'),
        same('n_embd', 'hidden_size'),
        same('d_ff', 'ffn_dim', 3072),
        same('block_size', 'max_position_embeddings', 2048),
        same('vocab_size', 'vocab_size'),
        same('activation', 'activation_function', 'relu', ACTIVATIONS),
        same('weight_tying', 'tie_word_embeddings', True),
        same('norm_position', 'do_layer_norm_before', True, {True: 'pre', False: 'post'}),
        same('attention_bias', 'enable_bias', True),
        same('ffn_bias', 'enable_bias', True),
        ours_is(normalization='layernorm', position_encoding='learned_absolute'),
        theirs_is(_remove_final_layer_norm=False, layer_norm_elementwise_affine=True),
        Entry(_read_embedding_width, lambda config: {'word_embed_proj_dim': config.n_embd}),
        written_only(dropout='residual_dropout', attention_dropout='attention_dropout'),
    ),
    weights={
        'token_embedding.weight': one(_OPT + 'embed_tokens.weight', fit=fit_vocabulary),
        'position_encoding.table.weight': one(
            _OPT + 'embed_positions.weight', fit=fit_positions, unused=2
        ),
        'output_head.projection.weight': one('lm_head.weight', fit=fit_vocabulary),
        **with_biases(
            {
                'final_norm.weight': one(_OPT + 'final_layer_norm.weight'),
                'blocks.{layer}.attention_norm.weight': one(
                    _OPT_LAYER + 'self_attn_layer_norm.weight'
                ),
                'blocks.{layer}.ffn_norm.weight': one(_OPT_LAYER + 'final_layer_norm.weight'),
                'blocks.{layer}.attention.qkv.weight': Weight(
                    tuple(f'{_OPT_LAYER}self_attn.{name}_proj.weight' for name in 'qkv')
                ),
                'blocks.{layer}.attention.output.weight': one(
                    _OPT_LAYER + 'self_attn.out_proj.weight'
                ),
                'blocks.{layer}.ffn.up.weight': one(_OPT_LAYER + 'fc1.weight'),
                'blocks.{layer}.ffn.down.weight': one(_OPT_LAYER + 'fc2.weight'),
            }
        ),
    },
)
