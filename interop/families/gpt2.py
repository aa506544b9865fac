"""GPT-2 as transformers has it, and nanoGPT's own checkpoints."""

from interop.mapping import ACTIVATIONS, Family, ours_is, same, theirs_is, written_only
from interop.tensors import Weight, fit_positions, fit_vocabulary, one, with_biases


def _gpt2_weights(transposed: bool) -> dict[str, Weight]:
    """OpenAI's code multiplies by (in, out) matrices; nanoGPT, of the same names, by (out, in)."""
    block = 'transformer.h.{layer}.'
    norms = {
        'blocks.{layer}.attention_norm.weight': one(block + 'ln_1.weight'),
        'blocks.{layer}.ffn_norm.weight': one(block + 'ln_2.weight'),
        'final_norm.weight': one('transformer.ln_f.weight'),
    }
    matrices = {
        'blocks.{layer}.attention.qkv.weight': 'attn.c_attn.weight',
        'blocks.{layer}.attention.output.weight': 'attn.c_proj.weight',
        'blocks.{layer}.ffn.up.weight': 'mlp.c_fc.weight',
        'blocks.{layer}.ffn.down.weight': 'mlp.c_proj.weight',
    }
    linear = {ours: one(block + name, transposed=transposed) for ours, name in matrices.items()}
    return {
        'token_embedding.weight': one('transformer.wte.weight', fit=fit_vocabulary),
        'position_encoding.table.weight': one('transformer.wpe.weight', fit=fit_positions),
        'output_head.projection.weight': one('lm_head.weight', fit=fit_vocabulary),
        **with_biases(norms | linear),
    }


GPT2 = Family(
    name='gpt2',
    architecture='GPT2LMHeadModel',
    prefix='transformer.',
    entries=(
        same('n_layer', 'n_layer'),
        same('n_head', 'n_head'),
        same('n_embd', 'n_embd'),
        same('d_ff', 'n_inner', None),
        same('block_size', 'n_positions', 1024),
        same('vocab_size', 'vocab_size'),
        same('norm_eps', 'layer_norm_epsilon', 1e-5),
        same('activation', 'activation_function', 'gelu_new', ACTIVATIONS),
        same('weight_tying', 'tie_word_embeddings', True),
        ours_is(normalization='layernorm', position_encoding='learned_absolute', bias=True),
        theirs_is(
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
        ),
        written_only(
            embd_pdrop='dropout', attn_pdrop='attention_dropout', resid_pdrop='residual_dropout'
        ),
    ),
    aliases={
        'hidden_size': 'n_embd',
        'max_position_embeddings': 'n_positions',
        'num_attention_heads': 'n_head',
        'num_hidden_layers': 'n_layer',
    },
    harmless=frozenset(
        {
            'n_ctx',  # before version 4.7; n_positions is what is read
            'reorder_and_upcast_attn',  # the same in another order and precision
            *('n_special', 'predict_special_tokens'),
            *(f'summary_{what}' for what in ('type', 'use_proj', 'activation', 'proj_to_labels')),
            'summary_first_dropout',
        }
    ),
    weights=_gpt2_weights(transposed=True),
    ignored=r'\.attn\.(masked_)?bias$',
)

# Not transformers': the `model_args` of nanoGPT's ckpt.pt.
NANOGPT = Family(
    name='nanogpt',
    architecture='GPT',
    prefix='transformer.',
    entries=(
        same('n_layer', 'n_layer'),
        same('n_head', 'n_head'),
        same('n_embd', 'n_embd'),
        same('block_size', 'block_size'),
        same('vocab_size', 'vocab_size'),
        same('bias', 'bias', True),
        same('normalization', 'bias', True, {True: 'layernorm', False: 'layernorm_nobias'}),
        ours_is(arch_preset='legacy', weight_tying=True),
    ),
    weights=_gpt2_weights(transposed=False),
    ignored=r'\.attn\.bias$',  # the mask
    ties_always=True,
)
