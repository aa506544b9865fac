"""Phi-3 and Phi-4, Ministral 3, Apertus: LongRoPE, queries that grow with their position, xIELU."""

from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    LAYER,
    PRE_NORMS,
    QK_NORMS,
    ROTARY_BUFFERS,
    llama_fields,
    projections,
    swiglu_field,
)
from interop.fields import Fields
from interop.layers import options_with
from interop.mapping import (
    ACTIVATIONS,
    Family,
    FieldMap,
    check_heads_divide_width,
    constant_option,
    export_only,
    field,
    kv_heads_field,
    required_field,
)
from interop.rope import rope_fields
from interop.tensors import TensorMap, tensor, with_biases
from model_config import ModelArchitectureConfig

_LENGTH = 'original_max_position_embeddings'

# --- Phi-3 ----------------------------------------------------------------------------------------

_ROPE = rope_fields(fraction='partial_rotary_factor', default_fraction=1.0)


def _read_phi3_rope(fields: Fields) -> dict:
    """Rotary positions, plain or LongRoPE, which older files call `su` or `yarn`."""
    fields.values.setdefault(_LENGTH, 4096)
    for name in ('rope_scaling', 'rope_parameters'):
        scaling = fields.values.get(name)
        if isinstance(scaling, dict):
            renamed = {
                key: 'longrope' if key in ('type', 'rope_type') and kind in ('su', 'yarn') else kind
                for key, kind in scaling.items()
            }
            fields.values[name] = renamed
    options = _ROPE.read(fields)
    if options.get('rope_scaling', 'none') not in ('none', 'longrope'):
        fields.problems.append(
            f"rope_type={options['rope_scaling']!r} is not supported; supported: 'longrope'."
        )
    return options


def _write_phi3_rope(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'rope_original_block_size')
    length = options.get('rope_original_block_size', 4096)
    return {**_ROPE.write(config), _LENGTH: length}


PHI3 = Family(
    name='phi3',
    architecture='Phi3ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=4096, norm_eps=1e-5),
        field('d_ff', 'intermediate_size', 8192),
        field('head_dim', 'head_dim', None),
        field('sliding_window', 'sliding_window', None),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(ffn_bias=False),
        kv_heads_field(),
        FieldMap(_read_phi3_rope, _write_phi3_rope),
        swiglu_field(),
        export_only(embd_pdrop='dropout', resid_pdrop='residual_dropout'),
    ),
    check_loadable=check_heads_divide_width,
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | {
        'blocks.{layer}.attention.qkv.weight': TensorMap(projections('self_attn', 'qkv')),
        'blocks.{layer}.attention.output.weight': TensorMap(projections('self_attn', 'o')),
        'blocks.{layer}.ffn.gate_up.weight': TensorMap(projections('mlp', 'gate_up')),
        'blocks.{layer}.ffn.down.weight': TensorMap(projections('mlp', 'down')),
    },
    ignored_tensors=ROTARY_BUFFERS,
)

# --- Ministral 3 ----------------------------------------------------------------------------------


def _with_default_scaling(rope: FieldMap, default: dict) -> FieldMap:
    """Rotary positions whose object, if it is missing, is not that of plain RoPE."""

    def read(fields: Fields) -> dict:
        if not fields.values.get('rope_scaling') and fields.values.get('rope_parameters') is None:
            fields.values['rope_parameters'] = default
        return rope.read(fields)

    def write(config: ModelArchitectureConfig) -> dict:
        written = rope.write(config)
        if 'rope_scaling' in written or 'rope_theta' not in written:
            return written
        return {'rope_parameters': {'rope_type': 'default', **written}}

    return FieldMap(read, write)


_PLAIN_ROPE = rope_fields()


def _read_growth(fields: Fields) -> dict:
    """YaRN, and the growth of queries, which is in the same object."""
    name = 'rope_scaling' if fields.values.get('rope_scaling') else 'rope_parameters'
    own = fields.subobject(name)
    growth = own.take('llama_4_scaling_beta', float, 0.0)
    mscale = [own.take(key, float, optional=True) for key in ('mscale', 'mscale_all_dim')]
    left_out = ('llama_4_scaling_beta', 'mscale', 'mscale_all_dim', 'max_position_embeddings')
    scaling = {key: value for key, value in own.values.items() if key not in left_out}
    fields.values[name] = scaling
    options = _PLAIN_ROPE.read(fields)
    if options.get('rope_scaling', 'none') not in ('yarn', 'llama3') or growth < 0:
        fields.problems.append(
            f'{name} is not supported; supported: rope_type yarn or llama3, and a '
            f'llama_4_scaling_beta of at least 0.'
        )
        return {}
    if any(mscale) and len(set(mscale)) > 1:
        fields.problems.append(f'{name}: mscale and mscale_all_dim differ, which is not supported.')
    if all(mscale) and options.get('rope_attention_factor', 0) is None:
        options['rope_attention_factor'] = 1.0
    if growth == 0:
        return options
    length = options.get('rope_original_block_size')
    return {**options, 'query_scale_growth': growth, 'query_scale_length': length}


def _write_growth(config: ModelArchitectureConfig) -> dict:
    written = _PLAIN_ROPE.write(config)
    growth = options_with(config, 'query_scale_growth').get('query_scale_growth')
    return {
        **written,
        'rope_scaling': {
            **written.get('rope_scaling', {}),
            'llama_4_scaling_beta': growth or 0.0,
        },
    }


MINISTRAL3 = Family(
    name='ministral3',
    architecture='Ministral3ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=262_144, norm_eps=1e-5),
        field('d_ff', 'intermediate_size', 14336),
        field('head_dim', 'head_dim', 128),
        field('sliding_window', 'sliding_window', None),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(ffn_bias=False),
        kv_heads_field(8),
        _with_default_scaling(
            FieldMap(_read_growth, _write_growth),
            {
                'type': 'yarn',
                'rope_theta': 1e6,
                'factor': 16.0,
                _LENGTH: 16384,
                'mscale_all_dim': 1.0,
                'mscale': 1.0,
                'llama_4_scaling_beta': 0.1,
            },
        ),
        swiglu_field(),
    ),
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | ATTENTION | GATED_FFN,
    ignored_tensors=ROTARY_BUFFERS,
)

# --- Apertus --------------------------------------------------------------------------------------

_XIELU_CONSTANTS = ((LAYER + 'mlp.act_fn.beta', 0.5), (LAYER + 'mlp.act_fn.eps', -1e-6))
APERTUS = Family(
    name='apertus',
    architecture='ApertusForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=65536, norm_eps=1e-5),
        field('d_ff', 'intermediate_size', 14336),
        field('head_dim', 'head_dim', None),
        field('activation', 'hidden_act', 'xielu', {'xielu': 'xielu', **ACTIVATIONS}),
        field('attention_bias', 'attention_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(
            qk_norm='rmsnorm', qk_norm_scope='head', ffn_type='standard', ffn_bias=False
        ),
        required_field(qk_norm=True, post_norm=False, mlp_bias=False),  # in released files
        kv_heads_field(),
        _with_default_scaling(
            rope_fields(default_theta=12e6),
            {
                'rope_type': 'llama3',
                'rope_theta': 12e6,
                'factor': 8.0,
                _LENGTH: 8192,
                'low_freq_factor': 1.0,
                'high_freq_factor': 4.0,
            },
        ),
    ),
    check_loadable=check_heads_divide_width,
    weights=EMBEDDING_AND_HEAD
    | QK_NORMS
    | with_biases(ATTENTION)
    | {
        'blocks.{layer}.attention_norm.weight': tensor(LAYER + 'attention_layernorm.weight'),
        'blocks.{layer}.ffn_norm.weight': tensor(LAYER + 'feedforward_layernorm.weight'),
        'blocks.{layer}.ffn.up.weight': TensorMap(projections('mlp', 'up')),
        'blocks.{layer}.ffn.down.weight': TensorMap(projections('mlp', 'down')),
        'blocks.{layer}.ffn.activation.alpha_positive': tensor(
            LAYER + 'mlp.act_fn.alpha_p',
            constants=_XIELU_CONSTANTS,
        ),
        'blocks.{layer}.ffn.activation.alpha_negative': tensor(LAYER + 'mlp.act_fn.alpha_n'),
    },
    ignored_tensors=ROTARY_BUFFERS + r'|\.mlp\.act_fn\.(beta|eps)$',  # the same in all models
)
