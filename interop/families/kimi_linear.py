"""Kimi Linear: Kimi Delta Attention and latent attention without positions, with experts."""

from dataclasses import replace

import torch

from interop.families.deepseek import LATENT_ATTENTION, latent_kv_heads_field, latent_norm_field
from interop.families.llama import (
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    LAYER,
    MIXTRAL_EXPERTS,
    PRE_NORMS,
    llama_fields,
    projections,
)
from interop.layer_kinds import (
    DENSE,
    SPARSE,
    LayerKind,
    dense_and_sparse,
    layer_kinds_field,
    named_by_default,
    named_by_index,
    named_by_list,
    named_by_number,
)
from interop.mapping import FULL, LINEAR, Family, constant_option, field, required_field
from interop.routing import selection_bias
from interop.tensors import CONVOLUTION, Layout, TensorMap, tensor
from model_config import ModelArchitectureConfig


def _default_mixers(layers: int) -> list[str]:
    return [FULL if layer and layer % 4 == 0 else LINEAR for layer in range(layers)]


_MIXERS = layer_kinds_field(
    named_by_list('layer_types'),
    named_by_index('full_attn_layers', FULL, LINEAR, first=1),
    named_by_index('kda_layers', LINEAR, FULL, first=1),
    named_by_default(_default_mixers),
    kinds={
        LINEAR: LayerKind(
            {'mixer': 'kda'},
            (
                field('gdn_heads', 'linear_num_heads', 32),
                field('gdn_value_heads', 'linear_num_heads', 32),
                field('gdn_head_dim', 'linear_head_dim', 128),
                field('gdn_v_head_dim', 'linear_head_dim', 128),
                field('gdn_conv_size', 'linear_conv_kernel_dim', 4),
                field('gdn_norm_eps', 'rms_norm_eps', 1e-5),
                constant_option(gdn_negative_eigenvalues=False, gdn_gate=True),
            ),
        ),
        FULL: LayerKind(
            {'mixer': 'attention', 'attention_type': 'mla'},
            (
                field('q_lora_rank', 'q_lora_rank', None),
                field('kv_lora_rank', 'kv_lora_rank', 512),
                field('qk_nope_head_dim', 'qk_nope_head_dim', 128),
                field('qk_rope_head_dim', 'qk_rope_head_dim', 64),
                field('v_head_dim', 'v_head_dim', 128),
                field('attention_bias', 'attention_bias', False),
                latent_norm_field(1e-5),
                latent_kv_heads_field,
                constant_option(position_encoding='none'),
            ),
        ),
    },
)
_FFNS = layer_kinds_field(
    named_by_list('mlp_layer_types'),
    named_by_number('first_k_dense_replace', 1, DENSE, SPARSE),
    kinds=dense_and_sparse(
        field('d_ff', 'intermediate_size', 9216),
        field('num_experts', 'num_local_experts', 256),
        field('experts_per_token', 'num_experts_per_tok', 8),
        field('expert_d_ff', 'moe_intermediate_size', 1024),
        field('shared_experts', 'n_shared_experts', 1),
        field('router_normalize', 'norm_topk_prob', True),
        field('router_scale', 'routed_scaling_factor', 2.446),
        constant_option(router_score='sigmoid', router_selection_bias=True),
        required_field(n_group=1, topk_group=1, moe_layer_freq=1),
        required_field(moe_router_activation_func='sigmoid'),
    ),
)


def _projection_rows(config: ModelArchitectureConfig) -> tuple[int, ...]:
    """Of queries, keys and values; β; and the low ranks of decays and gates."""
    width, rank = config.gdn_heads * config.gdn_head_dim, config.gdn_v_head_dim
    return width, width, width, config.gdn_heads, rank, rank


_OURS, _THEIRS = 'blocks.{layer}.mixers.kda.', LAYER + 'self_attn.'
_DELTA_ATTENTION = {
    _OURS + 'input.weight': TensorMap(
        projections('self_attn', 'q', 'k', 'v', 'b', 'f_a', 'g_a'), rows=_projection_rows
    ),
    _OURS + 'convolution.weight': TensorMap(
        tuple(f'{_THEIRS}{name}_conv1d.weight' for name in 'qkv'), layout=CONVOLUTION
    ),
    _OURS + 'A_log': tensor(
        _THEIRS + 'A_log', layout=Layout(torch.flatten, lambda ours: ours.view(1, 1, -1, 1))
    ),
    _OURS + 'dt_bias': tensor(_THEIRS + 'dt_bias'),
    _OURS + 'decay_output.weight': TensorMap(projections('self_attn', 'f_b')),
    _OURS + 'gate_output.weight': TensorMap(projections('self_attn', 'g_b')),
    _OURS + 'norm.weight': tensor(_THEIRS + 'o_norm.weight'),
    _OURS + 'output.weight': TensorMap(projections('self_attn', 'o')),
}
_MIXTURE = 'block_sparse_moe.'
_EXPERTS = {
    **MIXTRAL_EXPERTS,
    **selection_bias(f'{LAYER}{_MIXTURE}gate.e_score_correction_bias'),
    'blocks.{layer}.ffn.shared.gate_up.weight': TensorMap(
        projections(_MIXTURE + 'shared_experts', 'gate', 'up')
    ),
    'blocks.{layer}.ffn.shared.down.weight': TensorMap(
        projections(_MIXTURE + 'shared_experts', 'down')
    ),
}

KIMI_LINEAR = Family(
    name='kimi_linear',
    architecture='KimiLinearForCausalLM',
    prefix='model.',
    aliases={
        'model_max_length': 'max_position_embeddings',
        'moe_renormalize': 'norm_topk_prob',
        'num_expert_group': 'n_group',
        'num_experts': 'num_local_experts',
        'num_experts_per_token': 'num_experts_per_tok',
        'num_shared_experts': 'n_shared_experts',
        'linear_attn_config.full_attn_layers': 'full_attn_layers',
        'linear_attn_config.kda_layers': 'kda_layers',
        'linear_attn_config.head_dim': 'linear_head_dim',
        'linear_attn_config.num_heads': 'linear_num_heads',
        'linear_attn_config.short_conv_kernel_size': 'linear_conv_kernel_dim',
    },
    field_maps=(
        *llama_fields(block_size=2**20, norm_eps=1e-5),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(ffn_bias=False),
        required_field(hidden_act='silu', mla_use_nope=True),
        _MIXERS,
        _FFNS,
    ),
    # Without positions, those of RoPE have no effect.
    irrelevant_fields=frozenset(
        {
            *('rope_theta', 'rope_scaling', 'rope_parameters', 'head_dim', 'qk_head_dim'),
            *('use_grouped_topk', 'num_nextn_predict_layers'),
        }
    ),
    # transformers saves dense layers as a mixture; the published files do not.
    renamed_tensors={r'\.block_sparse_moe\.(?=(gate|up|down)_proj\.)': '.mlp.'},
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | _DELTA_ATTENTION
    | {name: replace(own, row_order=None) for name, own in LATENT_ATTENTION.items()}
    | GATED_FFN
    | _EXPERTS,
)
