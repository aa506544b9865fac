"""A.X K1: DeepSeek-V3 with a norm of each mixture's output."""

from dataclasses import replace

from interop.families.deepseek import (
    DEEPSEEK_V3,
    HEAD_DIM,
    expert_fields,
    latent_attention_fields,
    latent_norm_field,
)
from interop.families.llama import LAYER, llama_fields
from interop.layer_kinds import (
    DENSE,
    SPARSE,
    LayerKind,
    first_is_dense,
    layer_kinds_field,
    named_by_default,
    named_by_list,
    named_by_number,
)
from interop.mapping import constant_option, field, required_field
from interop.rope import deepseek_rope_fields
from interop.routing import biased_router_fields
from interop.tensors import tensor


def _check_queries(fields: dict) -> str | None:
    """transformers always has a latent of queries."""
    return None if fields.get('q_lora_rank') else 'A.X K1 needs a q_lora_rank in transformers'


AXK1 = replace(
    DEEPSEEK_V3,
    name='axk1',
    architecture='AXK1ForCausalLM',
    field_maps=(
        *llama_fields(block_size=32768),
        latent_norm_field(1e-6),
        *latent_attention_fields(1536),
        HEAD_DIM,
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(ffn_bias=False),
        required_field(rope_interleave=True, moe_layer_freq=1, hidden_act='silu'),
        required_field(scoring_func='sigmoid', topk_method='noaux_tc'),
        deepseek_rope_fields(),
        layer_kinds_field(
            named_by_list('mlp_layer_types'),
            named_by_number('first_k_dense_replace', 1, DENSE, SPARSE),
            named_by_default(first_is_dense),
            kinds={
                DENSE: LayerKind(
                    {'ffn_type': 'swiglu', 'norm_position': 'pre'},
                    (field('d_ff', 'intermediate_size', 18432),),
                ),
                SPARSE: LayerKind(
                    {'ffn_type': 'moe', 'norm_position': 'ffn_sandwich'},
                    (
                        *expert_fields(2048, experts=192, chosen=8, shared=1),
                        constant_option(expert_ffn='swiglu'),
                        *biased_router_fields(True, 2.5, 8, 4),
                    ),
                ),
            },
        ),
    ),
    check_loadable=_check_queries,
    weights=DEEPSEEK_V3.weights
    | {'blocks.{layer}.ffn_output_norm.weight': tensor(LAYER + 'post_mlp_layernorm.weight')},
    # Published files have unused norms in dense layers, and no biases of the router.
    ignored_tensors=rf'{DEEPSEEK_V3.ignored_tensors}|\.post_mlp_layernorm\.weight$',
    zero_tensors=r'e_score_correction_bias$',
)
