"""Families that have Llama's model, and fields with other names or defaults."""

from dataclasses import replace

from interop.families.llama import LLAMA, llama_model_fields
from interop.mapping import FieldMap, required_field

EXAONE = replace(
    LLAMA,
    name='exaone',
    alias_of='llama',
    field_maps=llama_model_fields(4096, norm_eps=1e-5, kv_heads=8, theta=5e5),
    aliases={
        'activation_function': 'hidden_act',
        'layer_norm_epsilon': 'rms_norm_eps',
        'num_layers': 'num_hidden_layers',
    },
    # The names in published files.
    renamed_tensors={
        r'^transformer\.wte\.': 'model.embed_tokens.',
        r'^transformer\.h\.': 'model.layers.',
        r'^transformer\.ln_f\.': 'model.norm.',
        r'\.attn\.attention\.out_proj\.': '.self_attn.o_proj.',
        r'\.attn\.attention\.': '.self_attn.',
        r'\.ln_1\.': '.input_layernorm.',
        r'\.ln_2\.': '.post_attention_layernorm.',
        r'\.mlp\.c_fc_0\.': '.mlp.gate_proj.',
        r'\.mlp\.c_fc_1\.': '.mlp.up_proj.',
        r'\.mlp\.c_proj\.': '.mlp.down_proj.',
    },
)


def _check_biases(fields: dict) -> str | None:
    """The checks of InternLM3's config class."""
    if fields['attention_bias'] != fields['mlp_bias']:
        return 'InternLM3 requires attention_bias and ffn_bias to be equal in transformers'
    return LLAMA.check_loadable(fields)


INTERNLM3 = replace(
    LLAMA,
    name='internlm3',
    alias_of='llama',
    field_maps=llama_model_fields(32768, norm_eps=1e-5, kv_heads=2, head_dim=128),
    aliases={'qkv_bias': 'attention_bias', 'bias': 'mlp_bias'},
    check_loadable=_check_biases,
)

IQUESTCODER = replace(
    LLAMA,
    name='iquestcoder',
    alias_of='llama',
    field_maps=(
        *llama_model_fields(131_072, norm_eps=1e-5, kv_heads=8, head_dim=128),
        FieldMap(required_field(clip_qkv=None).read, lambda config: {}),
    ),
)
