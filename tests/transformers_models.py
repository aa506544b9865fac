"""Transformers' GPT-2 and Llama, and where their tensors stand in our models.

A map says for each of our parameters which of theirs it is made of, one below the other;
`{}` stands for the number of the layer.
"""

import torch

GPT2 = {
    'token_embedding.weight': ['transformer.wte.weight'],
    'position_encoding.table.weight': ['transformer.wpe.weight'],
    'blocks.{}.attention_norm.weight': ['transformer.h.{}.ln_1.weight'],
    'blocks.{}.attention_norm.bias': ['transformer.h.{}.ln_1.bias'],
    'blocks.{}.attention.qkv.weight': ['transformer.h.{}.attn.c_attn.weight'],
    'blocks.{}.attention.qkv.bias': ['transformer.h.{}.attn.c_attn.bias'],
    'blocks.{}.attention.output.weight': ['transformer.h.{}.attn.c_proj.weight'],
    'blocks.{}.attention.output.bias': ['transformer.h.{}.attn.c_proj.bias'],
    'blocks.{}.ffn_norm.weight': ['transformer.h.{}.ln_2.weight'],
    'blocks.{}.ffn_norm.bias': ['transformer.h.{}.ln_2.bias'],
    'blocks.{}.ffn.up.weight': ['transformer.h.{}.mlp.c_fc.weight'],
    'blocks.{}.ffn.up.bias': ['transformer.h.{}.mlp.c_fc.bias'],
    'blocks.{}.ffn.down.weight': ['transformer.h.{}.mlp.c_proj.weight'],
    'blocks.{}.ffn.down.bias': ['transformer.h.{}.mlp.c_proj.bias'],
    'final_norm.weight': ['transformer.ln_f.weight'],
    'final_norm.bias': ['transformer.ln_f.bias'],
}
# Written (in, out), the other way round than a linear layer.
GPT2_CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')

LLAMA = {
    'token_embedding.weight': ['model.embed_tokens.weight'],
    'blocks.{}.attention_norm.weight': ['model.layers.{}.input_layernorm.weight'],
    'blocks.{}.attention.qkv.weight': [
        'model.layers.{}.self_attn.q_proj.weight',
        'model.layers.{}.self_attn.k_proj.weight',
        'model.layers.{}.self_attn.v_proj.weight',
    ],
    'blocks.{}.attention.output.weight': ['model.layers.{}.self_attn.o_proj.weight'],
    'blocks.{}.ffn_norm.weight': ['model.layers.{}.post_attention_layernorm.weight'],
    'blocks.{}.ffn.gate_up.weight': [
        'model.layers.{}.mlp.gate_proj.weight',
        'model.layers.{}.mlp.up_proj.weight',
    ],
    'blocks.{}.ffn.down.weight': ['model.layers.{}.mlp.down_proj.weight'],
    'final_norm.weight': ['model.norm.weight'],
    'output_head.projection.weight': ['lm_head.weight'],
}


def as_ours(theirs: dict, weight_map: dict, n_layer: int) -> dict[str, torch.Tensor]:
    """Their tensors by name (weights, or gradients) under our names, in our layout."""

    def ours(name: str) -> torch.Tensor:
        tensor = theirs[name]
        return tensor.T if name.endswith(GPT2_CONV1D) else tensor

    return {
        our_name.format(layer): torch.cat([ours(name.format(layer)) for name in names])
        for our_name, names in weight_map.items()
        for layer in range(n_layer if '{}' in our_name else 1)
    }


def gpt2(config, device: str = 'cpu'):
    """GPT2LMHeadModel of the sizes in `config`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device(device):
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.block_size,
                n_embd=config.n_embd,
                n_layer=config.n_layer,
                n_head=config.n_head,
                activation_function='gelu',
                layer_norm_epsilon=config.norm_eps,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                attn_implementation='eager',
            )
        )


def llama(config, device: str = 'cpu'):
    """LlamaForCausalLM of the sizes in `config`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(device):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                max_position_embeddings=config.block_size,
                hidden_size=config.n_embd,
                intermediate_size=config.d_ff,
                num_hidden_layers=config.n_layer,
                num_attention_heads=config.n_head,
                num_key_value_heads=config.num_kv_heads if config.use_gqa else config.n_head,
                rms_norm_eps=config.norm_eps,
                rope_parameters={'rope_type': 'default', 'rope_theta': config.rope_theta},
                tie_word_embeddings=False,
                attn_implementation='eager',
            )
        )
