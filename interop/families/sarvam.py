"""Sarvam: the models of GLM-4.5 and DeepSeek-V3, with other defaults and names."""

from dataclasses import replace

from interop.families.deepseek import (
    DEEPSEEK_V3,
    deepseek_v3_fields,
    expert_fields,
)
from interop.families.glm_moe import GLM4_MOE, glm4_moe_fields
from interop.families.llama import LAYER
from interop.fields import Fields
from interop.mapping import FieldMap
from interop.rope import rope_fields
from interop.tensors import tensor, with_biases

_ALIASES = {
    'num_experts': 'n_routed_experts',
    'num_local_experts': 'n_routed_experts',
    'num_shared_experts': 'n_shared_experts',
}
# Names in published files, which transformers writes too.
_THEIRS = LAYER + 'attention.'

SARVAM_MOE = replace(
    GLM4_MOE,
    name='sarvam_moe',
    alias_of='glm4_moe',
    field_maps=glm4_moe_fields(
        norm_eps=1e-6,
        d_ff=8192,
        head_dim=64,
        qk_norm=True,
        experts=expert_fields(1024, experts=128, chosen=6, shared=1),
        scale=2.5,
        kv_heads=4,
        rope=rope_fields(default_theta=8e6, fraction='partial_rotary_factor', default_fraction=1.0),
    ),
    aliases={**_ALIASES, 'use_qkv_bias': 'attention_bias'},
    weights=GLM4_MOE.weights
    | with_biases(
        {
            'blocks.{layer}.attention.qkv.weight': tensor(_THEIRS + 'query_key_value.weight'),
            'blocks.{layer}.attention.output.weight': tensor(_THEIRS + 'dense.weight'),
        }
    )
    | {
        'token_embedding.weight': replace(
            GLM4_MOE.weights['token_embedding.weight'],
            templates=('model.word_embeddings.weight',),
        ),
        'blocks.{layer}.attention.q_norm.weight': tensor(_THEIRS + 'query_layernorm.weight'),
        'blocks.{layer}.attention.k_norm.weight': tensor(_THEIRS + 'key_layernorm.weight'),
        'blocks.{layer}.ffn.router.selection_bias': tensor(LAYER + 'mlp.gate.expert_bias'),
    },
)


def _rename_yarn(fields: Fields) -> dict:
    """The name of DeepSeek's YaRN in published files."""
    scaling = fields.values.get('rope_scaling')
    if isinstance(scaling, dict) and 'deepseek_yarn' in (
        scaling.get('type'),
        scaling.get('rope_type'),
    ):
        others = {key: value for key, value in scaling.items() if key != 'type'}
        fields.values['rope_scaling'] = {**others, 'rope_type': 'yarn'}
    return {}


SARVAM_MLA = replace(
    DEEPSEEK_V3,
    name='sarvam_mla',
    alias_of='deepseek_v3',
    field_maps=(
        FieldMap(_rename_yarn, lambda config: {}),
        *deepseek_v3_fields(None, 128, 1, 1, 1),
    ),
    aliases=_ALIASES,
    # Both are derived, whatever published files say.
    irrelevant_fields=DEEPSEEK_V3.irrelevant_fields | {'head_dim', 'q_head_dim'},
)
