"""Nemotron-H: layers of one sublayer each, Mamba-2, attention, an FFN or a mixture of experts."""

from interop.families.llama import query_key_value_rows
from interop.families.mamba import BACKBONE
from interop.families.mamba2 import mixer_weights
from interop.fields import Fields
from interop.layer_kinds import LayerKind, layer_kinds_field, named_by_letters, named_by_list
from interop.layers import options_with
from interop.mapping import (
    ACTIVATIONS,
    Family,
    FieldMap,
    constant_option,
    export_only,
    field,
    kv_heads_field,
    required_field,
    shared_experts_field,
)
from interop.routing import router_groups_field, selection_bias
from interop.tensors import TensorMap, tensor, with_biases
from model_config import ModelArchitectureConfig

ATTENTION, FFN, EXPERTS, MAMBA = 'full_attention', 'mlp', 'moe', 'linear_attention'


def _read_heads(fields: Fields) -> dict:
    heads, dims = fields.take('mamba_num_heads', int, 128), fields.take('mamba_head_dim', int, 64)
    return {'mamba2_width': heads * dims, 'mamba2_head_dim': dims}


def _write_heads(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'mamba2_width')
    if 'mamba2_width' not in options:
        return {}
    width, dims = options['mamba2_width'], options['mamba2_head_dim']
    return {'mamba_num_heads': width // dims, 'mamba_head_dim': dims}


_activation = field('activation', 'mlp_hidden_act', 'relu2', ACTIVATIONS)
_KINDS = {
    MAMBA: LayerKind(
        {'mixer': 'mamba2', 'ffn_type': 'none'},
        (
            FieldMap(_read_heads, _write_heads),
            field('mamba2_state_size', 'ssm_state_size', 128),
            field('mamba2_groups', 'n_groups', 8),
            field('mamba2_conv_size', 'conv_kernel', 4),
            field('mamba2_conv_bias', 'use_conv_bias', True),
            field('mamba2_norm_eps', 'layer_norm_epsilon', 1e-5),
            field('mamba2_dt_min', 'time_step_min', 0.001),
            field('mamba2_proj_bias', 'use_bias', False),
            required_field(mamba_hidden_act='silu'),
        ),
    ),
    ATTENTION: LayerKind(
        {'mixer': 'attention', 'ffn_type': 'none'},
        (
            field('head_dim', 'head_dim', 128),
            kv_heads_field(8),
            constant_option(position_encoding='none', attention_bias=False),
            required_field(attention_bias=False, sliding_window=None),
            export_only(attention_dropout='attention_dropout'),
        ),
    ),
    FFN: LayerKind(
        {'mixer': 'none', 'ffn_type': 'standard'},
        (
            field('d_ff', 'intermediate_size', 21504),
            field('ffn_bias', 'mlp_bias', False),
            _activation,
        ),
    ),
    EXPERTS: LayerKind(
        {'mixer': 'none', 'ffn_type': 'moe'},
        (
            _activation,
            field('num_experts', 'n_routed_experts', 8),
            field('experts_per_token', 'num_experts_per_tok', 2),
            field('expert_d_ff', 'moe_intermediate_size', 7688),
            field('router_normalize', 'norm_topk_prob', True),
            field('router_scale', 'routed_scaling_factor', 1.0),
            shared_experts_field('moe_shared_expert_intermediate_size', 7688),
            constant_option(expert_ffn='standard', router_score='sigmoid', ffn_bias=False),
            constant_option(router_selection_bias=True),
            router_groups_field(1, 1, 'top2'),
            required_field(mlp_bias=False, moe_latent_size=None),
        ),
    ),
}

_LAYER = 'backbone.layers.{layer}.'
_MIXER = _LAYER + 'mixer.'
_FFN_WEIGHTS = {
    'blocks.{layer}.ffn.up.weight': tensor(_MIXER + 'up_proj.weight'),
    'blocks.{layer}.ffn.down.weight': tensor(_MIXER + 'down_proj.weight'),
}
_EXPERT_WEIGHTS = {
    'blocks.{layer}.ffn.router.weight': tensor(_MIXER + 'gate.weight'),
    **selection_bias(_MIXER + 'gate.e_score_correction_bias'),
    'blocks.{layer}.ffn.experts.up.weight': tensor(_MIXER + 'experts.{expert}.up_proj.weight'),
    'blocks.{layer}.ffn.experts.down.weight': tensor(_MIXER + 'experts.{expert}.down_proj.weight'),
    'blocks.{layer}.ffn.shared.up.weight': tensor(_MIXER + 'shared_experts.up_proj.weight'),
    'blocks.{layer}.ffn.shared.down.weight': tensor(_MIXER + 'shared_experts.down_proj.weight'),
}

NEMOTRON_H = Family(
    name='nemotron_h',
    architecture='NemotronHForCausalLM',
    prefix='backbone.',
    field_maps=(
        field('n_head', 'num_attention_heads', 32),
        field('n_embd', 'hidden_size'),
        field('block_size', 'max_position_embeddings', 4096),
        field('vocab_size', 'vocab_size'),
        field('norm_eps', 'layer_norm_epsilon', 1e-5),
        constant_option(normalization='rmsnorm', bias=False, weight_tying=False),
        required_field(tie_word_embeddings=False),
        layer_kinds_field(
            named_by_list('layers_block_type', {'attention': ATTENTION, 'mamba': MAMBA}),
            named_by_letters(
                'hybrid_override_pattern', {'M': MAMBA, 'E': EXPERTS, '*': ATTENTION, '-': FFN}
            ),
            kinds=_KINDS,
            depth_follows=True,
        ),
    ),
    # Older names.
    aliases={
        'mamba_n_groups': 'n_groups',
        'mamba_d_conv': 'conv_kernel',
        'mamba_conv_bias': 'use_conv_bias',
        'mamba_dt_min': 'time_step_min',
    },
    # Those of training, implementation, and multi-token prediction, whose tensors are refused.
    irrelevant_fields=frozenset(
        {
            *('time_step_max', 'time_step_floor', 'rescale_prenorm_residual'),
            *('residual_in_fp32', 'use_mamba_kernels', 'mamba_ssm_cache_dtype', 'chunk_size'),
            *('num_logits_to_keep', 'moe_shared_expert_overlap', 'n_shared_experts'),
            *('num_nextn_predict_layers', 'mtp_layers_block_type', 'mtp_hybrid_override_pattern'),
            # Of Mamba-2, which transformers does not read either.
            *('expand', 'mamba_proj_bias', 'time_step_limit'),
        }
    ),
    weights={
        **BACKBONE,
        # Each layer has one sublayer, and so one of these norms.
        'blocks.{layer}.ffn_norm.weight': tensor(_LAYER + 'norm.weight'),
        'blocks.{layer}.attention.qkv.weight': TensorMap(
            tuple(f'{_MIXER}{name}_proj.weight' for name in 'qkv'), rows=query_key_value_rows
        ),
        'blocks.{layer}.attention.output.weight': tensor(_MIXER + 'o_proj.weight'),
        **with_biases(_FFN_WEIGHTS),
        **_EXPERT_WEIGHTS,
        **mixer_weights(_MIXER),
    },
)
