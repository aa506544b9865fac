"""GPT-2 in transformers' format and in nanoGPT's."""

from interop.mapping import ACTIVATIONS, Family, constant_option, export_only, field, required_field
from interop.tensors import TensorMap, crop_positions, resize_vocabulary, tensor, with_biases


def gpt2_weights(transposed: bool) -> dict[str, TensorMap]:
    """Tensor maps of GPT-2. transposed: matrices are (in, out), as in OpenAI's code; nanoGPT's are
    (out, in) under the same names."""
    block = 'transformer.h.{layer}.'
    norms = {
        'blocks.{layer}.attention_norm.weight': tensor(block + 'ln_1.weight'),
        'blocks.{layer}.ffn_norm.weight': tensor(block + 'ln_2.weight'),
        'final_norm.weight': tensor('transformer.ln_f.weight'),
    }
    matrices = {
        'blocks.{layer}.attention.qkv.weight': 'attn.c_attn.weight',
        'blocks.{layer}.attention.output.weight': 'attn.c_proj.weight',
        'blocks.{layer}.ffn.up.weight': 'mlp.c_fc.weight',
        'blocks.{layer}.ffn.down.weight': 'mlp.c_proj.weight',
    }
    linear = {ours: tensor(block + name, transposed=transposed) for ours, name in matrices.items()}
    return {
        'token_embedding.weight': tensor('transformer.wte.weight', resize=resize_vocabulary),
        'position_encoding.table.weight': tensor('transformer.wpe.weight', resize=crop_positions),
        'output_head.projection.weight': tensor('lm_head.weight', resize=resize_vocabulary),
        **with_biases(norms | linear),
    }


DROPOUTS = export_only(
    embd_pdrop='dropout', attn_pdrop='attention_dropout', resid_pdrop='residual_dropout'
)
GPT2 = Family(
    name='gpt2',
    architecture='GPT2LMHeadModel',
    prefix='transformer.',
    field_maps=(
        field('n_layer', 'n_layer'),
        field('n_head', 'n_head'),
        field('n_embd', 'n_embd'),
        field('d_ff', 'n_inner', None),
        field('block_size', 'n_positions', 1024),
        field('vocab_size', 'vocab_size'),
        field('norm_eps', 'layer_norm_epsilon', 1e-5),
        field('activation', 'activation_function', 'gelu_new', ACTIVATIONS),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(normalization='layernorm', position_encoding='learned_absolute', bias=True),
        required_field(
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
        ),
        DROPOUTS,
    ),
    aliases={
        'hidden_size': 'n_embd',
        'max_position_embeddings': 'n_positions',
        'num_attention_heads': 'n_head',
        'num_hidden_layers': 'n_layer',
    },
    irrelevant_fields=frozenset(
        {
            'n_ctx',  # of versions before 4.7; n_positions is read instead
            'reorder_and_upcast_attn',  # the same function in another order and precision
            *('n_special', 'predict_special_tokens'),
            *(f'summary_{what}' for what in ('type', 'use_proj', 'activation', 'proj_to_labels')),
            'summary_first_dropout',
        }
    ),
    weights=gpt2_weights(transposed=True),
    ignored_tensors=r'\.attn\.(masked_)?bias$',
)

# nanoGPT's format: the `model_args` of its ckpt.pt.
NANOGPT = Family(
    name='nanogpt',
    architecture='GPT',
    prefix='transformer.',
    field_maps=(
        field('n_layer', 'n_layer'),
        field('n_head', 'n_head'),
        field('n_embd', 'n_embd'),
        field('block_size', 'block_size'),
        field('vocab_size', 'vocab_size'),
        field('bias', 'bias', True),
        field('normalization', 'bias', True, {True: 'layernorm', False: 'layernorm_nobias'}),
        constant_option(arch_preset='legacy', weight_tying=True),
    ),
    weights=gpt2_weights(transposed=False),
    ignored_tensors=r'\.attn\.bias$',  # the mask
    ties_always=True,
)
