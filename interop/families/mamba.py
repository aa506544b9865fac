"""Mamba, FalconMamba, and Jamba, which has attention in some layers and experts in others."""

from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    LAYER,
    projections,
)
from interop.fields import Fields
from interop.layer_kinds import LayerKind, LayerNames, layer_kinds_field, named_by_position
from interop.layers import options_with
from interop.mapping import (
    Family,
    FieldMap,
    check_heads_divide_width,
    constant_option,
    export_only,
    field,
    head_size_field,
    kv_heads_field,
    required_field,
)
from interop.tensors import CONVOLUTION, TensorMap, resize_vocabulary, tensor, with_biases
from model_config import ModelArchitectureConfig


def _dt_rank_field(name: str) -> FieldMap:
    """The rank of the steps; 'auto' or missing: width / 16, rounded up, as our default."""

    def read(fields: Fields) -> dict:
        rank = None if fields.value(name, 'auto') == 'auto' else fields.take(name, int)
        return {'mamba_dt_rank': rank}

    def write(config: ModelArchitectureConfig) -> dict:
        options = options_with(config, 'mamba_dt_rank')
        return {name: options['mamba_dt_rank']} if 'mamba_dt_rank' in options else {}

    return FieldMap(read, write)


def mixer_weights(theirs: str) -> dict[str, TensorMap]:
    """The weights of Mamba. theirs: the prefix of their names."""
    ours = 'blocks.{layer}.mixers.mamba.'
    layers = {
        f'{ours}{name}.weight': tensor(f'{theirs}{name}.weight')
        for name in ('in_proj', 'x_proj', 'dt_proj', 'out_proj')
    }
    return {
        **with_biases(layers),
        ours + 'conv.weight': tensor(theirs + 'conv1d.weight', layout=CONVOLUTION),
        ours + 'conv.bias': tensor(theirs + 'conv1d.bias'),
        ours + 'A_log': tensor(theirs + 'A_log'),
        ours + 'D': tensor(theirs + 'D'),
    }


# --- Mamba and FalconMamba ------------------------------------------------------------------------


def _read_expand(fields: Fields) -> dict:
    """Channels per width. `intermediate_size`, the number of channels, comes before `expand`."""
    width = fields.take('hidden_size', int)
    expand = fields.take('expand', int, 2)
    channels = fields.take('intermediate_size', int, optional=True)
    if channels is None or not width:
        return {'mamba_expand': expand}
    if channels % width:
        fields.refuse('intermediate_size', f'must be a multiple of hidden_size={width}')
    return {'mamba_expand': max(channels // width, 1)}


def _write_expand(config: ModelArchitectureConfig) -> dict:
    expand = options_with(config, 'mamba_expand').get('mamba_expand')
    # Both, since files have both, and transformers would derive one only if it is missing.
    return {'expand': expand, 'intermediate_size': expand * config.n_embd} if expand else {}


_FIELDS = (
    field('n_layer', 'num_hidden_layers'),
    field('n_embd', 'hidden_size'),
    field('vocab_size', 'vocab_size'),
    field('norm_eps', 'layer_norm_epsilon', 1e-5),
    field('weight_tying', 'tie_word_embeddings', True),
    FieldMap(_read_expand, _write_expand),
    field('mamba_state_size', 'state_size', 16),
    field('mamba_conv_size', 'conv_kernel', 4),
    _dt_rank_field('time_step_rank'),
    field('mamba_conv_bias', 'use_conv_bias', True),
    field('mamba_proj_bias', 'use_bias', False),
    required_field(hidden_act='silu'),
    # No field has the length of the training's sequences; the models were published with 2048.
    constant_option(
        mixer='mamba', ffn_type='none', normalization='rmsnorm', bias=False, block_size=2048
    ),
)
# Of initialization, implementation and precision, and names from before transformers.
_IRRELEVANT = frozenset(
    {
        *('time_step_min', 'time_step_max', 'time_step_floor', 'time_step_scale'),
        *('time_step_init_scheme', 'rescale_prenorm_residual', 'residual_in_fp32'),
        *('use_mambapy', 'use_falcon_mambapy', 'use_associative_scan', 'fused_add_norm'),
        *('rms_norm', 'd_model', 'd_inner', 'n_layer', 'ssm_cfg', 'pad_vocab_size_multiple'),
    }
)
# Outside the sublayers, and their norm.
BACKBONE = {
    'token_embedding.weight': tensor('backbone.embeddings.weight', resize=resize_vocabulary),
    'final_norm.weight': tensor('backbone.norm_f.weight'),
    'output_head.projection.weight': tensor('lm_head.weight', resize=resize_vocabulary),
    'blocks.{layer}.attention_norm.weight': tensor('backbone.layers.{layer}.norm.weight'),
}
_WEIGHTS = {
    **BACKBONE,
    **mixer_weights('backbone.layers.{layer}.mixer.'),
}

MAMBA = Family(
    name='mamba',
    architecture='MambaForCausalLM',
    prefix='backbone.',
    field_maps=(*_FIELDS, constant_option(mamba_norm='none')),
    irrelevant_fields=_IRRELEVANT,
    weights=_WEIGHTS,
)

FALCON_MAMBA = Family(
    name='falcon_mamba',
    architecture='FalconMambaForCausalLM',
    prefix='backbone.',
    field_maps=(
        *_FIELDS,
        constant_option(mamba_norm='unweighted'),
        field('mamba_norm_eps', 'mixer_rms_eps', 1e-6),
    ),
    irrelevant_fields=_IRRELEVANT,
    weights=_WEIGHTS,
)

# --- Jamba ----------------------------------------------------------------------------------------

_ATTENTION, _MAMBA = 'attention', 'mamba'
_DENSE, _EXPERTS = 'dense', 'experts'
_EXPERT_PLACES = named_by_position(
    'expert_layer_period', 2, _EXPERTS, _DENSE, offset='expert_layer_offset', start=1
)


def _read_ffns(fields: Fields, layers: int | None) -> list[str]:
    """The kind of each layer's FFN; with one expert, all are dense."""
    names = _EXPERT_PLACES.read(fields, layers)
    return names if fields.take('num_experts', int, 16) > 1 else [_DENSE] * len(names)


def _write_ffns(names: list[str]) -> dict:
    return {**_EXPERT_PLACES.write(names), **({} if _EXPERTS in names else {'num_experts': 1})}


_MIXERS = layer_kinds_field(
    named_by_position(
        'attn_layer_period', 8, _ATTENTION, _MAMBA, offset='attn_layer_offset', start=4
    ),
    kinds={
        _ATTENTION: LayerKind(
            {'mixer': 'attention'},
            (
                kv_heads_field(8),
                head_size_field(),
                constant_option(position_encoding='none', attention_bias=False),
                required_field(sliding_window=None),
                export_only(attention_dropout='attention_dropout'),
            ),
        ),
        _MAMBA: LayerKind(
            {'mixer': 'mamba'},
            (
                field('mamba_expand', 'mamba_expand', 2),
                field('mamba_state_size', 'mamba_d_state', 16),
                field('mamba_conv_size', 'mamba_d_conv', 4),
                _dt_rank_field('mamba_dt_rank'),
                field('mamba_conv_bias', 'mamba_conv_bias', True),
                field('mamba_proj_bias', 'mamba_proj_bias', False),
                field('mamba_norm_eps', 'rms_norm_eps', 1e-6),
                constant_option(mamba_norm='weighted'),
                required_field(mamba_inner_layernorms=True),
            ),
        ),
    },
)
_FFNS = layer_kinds_field(
    LayerNames((*_EXPERT_PLACES.fields, 'num_experts'), _read_ffns, _write_ffns),
    kinds={
        _DENSE: LayerKind(
            {'ffn_type': 'swiglu'},
            (field('d_ff', 'intermediate_size', 14336), constant_option(ffn_bias=False)),
        ),
        _EXPERTS: LayerKind(
            {'ffn_type': 'moe'},
            (
                field('expert_d_ff', 'intermediate_size', 14336),
                field('num_experts', 'num_experts', 16),
                field('experts_per_token', 'num_experts_per_tok', 2),
                constant_option(
                    expert_ffn='swiglu',
                    router_score='softmax',
                    router_normalize=False,
                    ffn_bias=False,
                ),
            ),
        ),
    },
)
_FFN = LAYER + 'feed_forward.'

JAMBA = Family(
    name='jamba',
    architecture='JambaForCausalLM',
    prefix='model.',
    field_maps=(
        field('n_layer', 'num_hidden_layers'),
        field('n_head', 'num_attention_heads'),
        field('n_embd', 'hidden_size'),
        field('block_size', 'max_position_embeddings', 262_144),
        field('vocab_size', 'vocab_size'),
        field('norm_eps', 'rms_norm_eps', 1e-6),
        field('weight_tying', 'tie_word_embeddings', False),
        required_field(hidden_act='silu'),
        constant_option(normalization='rmsnorm', bias=False),
        _MIXERS,
        _FFNS,
    ),
    aliases={'num_local_experts': 'num_experts'},
    check_loadable=check_heads_divide_width,
    irrelevant_fields=frozenset(
        {
            *('use_mamba_kernels', 'use_mambapy', 'use_associative_scan', 'n_ctx'),
            *('calc_logits_for_entire_prompt', 'num_logits_to_keep'),
        }
    ),
    weights={
        **EMBEDDING_AND_HEAD,
        'final_norm.weight': tensor('model.final_layernorm.weight'),
        'blocks.{layer}.attention_norm.weight': tensor(LAYER + 'input_layernorm.weight'),
        'blocks.{layer}.ffn_norm.weight': tensor(LAYER + 'pre_ff_layernorm.weight'),
        **ATTENTION,
        **mixer_weights(LAYER + 'mamba.'),
        **{
            f'blocks.{{layer}}.mixers.mamba.norms.{number}.weight': tensor(
                f'{LAYER}mamba.{name}_layernorm.weight'
            )
            for number, name in enumerate(('dt', 'b', 'c'))
        },
        'blocks.{layer}.ffn.gate_up.weight': TensorMap(projections('feed_forward', 'gate', 'up')),
        'blocks.{layer}.ffn.down.weight': tensor(_FFN + 'down_proj.weight'),
        'blocks.{layer}.ffn.router.weight': tensor(_FFN + 'router.weight'),
        'blocks.{layer}.ffn.experts.gate_up.weight': TensorMap(
            projections('feed_forward.experts.{expert}', 'gate', 'up')
        ),
        'blocks.{layer}.ffn.experts.down.weight': tensor(
            _FFN + 'experts.{expert}.down_proj.weight'
        ),
    },
)
