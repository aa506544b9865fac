"""Mamba-2, and Bamba, which has attention in some layers."""

import math

from interop.families.llama import ATTENTION, EMBEDDING_AND_HEAD, LAYER, projections, swiglu_field
from interop.families.mamba import BACKBONE
from interop.fields import Fields
from interop.layer_kinds import LayerKind, layer_kinds_field, named_by_index
from interop.layers import options_with
from interop.mapping import (
    FULL,
    LINEAR,
    Family,
    FieldMap,
    constant_option,
    export_only,
    field,
    kv_heads_field,
    required_field,
)
from interop.rope import partial_rope_fields
from interop.tensors import CONVOLUTION, TensorMap, tensor, with_biases
from model_config import ModelArchitectureConfig

# --- Fields of the mixer --------------------------------------------------------------------------

# transformers' own form of infinity in a config.json; Python's reader gives a number for another.
_INFINITY = {'__float__': 'Infinity'}


def step_limits_field() -> FieldMap:
    """The limits of the step sizes; without the field, there are none."""
    name = 'time_step_limit'

    def read(fields: Fields) -> dict:
        if name not in fields:
            return {}
        limits = fields.value(name)
        limits = limits if isinstance(limits, (list, tuple)) else ()
        limits = [math.inf if limit == _INFINITY else limit for limit in limits]
        numbers = [limit for limit in limits if type(limit) in (int, float)]
        if len(limits) != 2 or len(numbers) != 2 or not 0 <= limits[0] <= limits[1]:
            fields.refuse(name, 'must be two numbers of at least 0 in rising order')
            return {}
        low, high = map(float, limits)
        return {'mamba2_dt_min': low, 'mamba2_dt_max': None if high == math.inf else high}

    def write(config: ModelArchitectureConfig) -> dict:
        options = options_with(config, 'mamba2_dt_min')
        low, high = options.get('mamba2_dt_min', 0.0), options.get('mamba2_dt_max')
        if (low, high) == (0.0, None):
            return {}
        return {name: [low, _INFINITY if high is None else high]}

    return FieldMap(read, write)


def heads_field(heads: str, head_dim: str, default_dim: int | None, expand: str) -> FieldMap:
    """The heads, which must fill `expand` times the width of the model.

    default_dim: of a head without the field; None: it may also be 'auto', which fills the width.
    """

    def read(fields: Fields) -> dict:
        width = fields.take(expand, int, 2) * fields.take('hidden_size', int, 4096)
        number = fields.take(heads, int, 128)
        if number < 1 or width < 1:
            fields.refuse(heads if number < 1 else expand, 'must be at least 1')
            return {}
        if default_dim is None and fields.value(head_dim, 'auto') == 'auto':
            dims = width // number
        else:
            dims = fields.take(head_dim, int, default_dim)
        if dims is not None and dims * number != width:
            fields.refuse(heads, f'with heads of {dims}, does not fill a width of {width}')
        return {'mamba2_width': width, 'mamba2_head_dim': dims}

    def write(config: ModelArchitectureConfig) -> dict:
        options = options_with(config, 'mamba2_width')
        if 'mamba2_width' not in options:
            return {}
        width, dims = options['mamba2_width'], options['mamba2_head_dim']
        return {heads: width // dims, head_dim: dims, expand: width // config.n_embd}

    return FieldMap(read, write)


# As Bamba, Granite and Falcon-H1 call them; the default of the state size differs from ours.
MIXER_FIELDS = (
    field('mamba2_state_size', 'mamba_d_state', 256),
    field('mamba2_groups', 'mamba_n_groups', 1),
    field('mamba2_conv_size', 'mamba_d_conv', 4),
    field('mamba2_conv_bias', 'mamba_conv_bias', True),
    field('mamba2_proj_bias', 'mamba_proj_bias', False),
    step_limits_field(),
)
# Of implementation, initialization and generation.
IRRELEVANT = frozenset({'mamba_chunk_size', 'num_logits_to_keep'})


def mixer_weights(theirs: str) -> dict[str, TensorMap]:
    """The weights of the mixer. theirs: the prefix of their names."""
    ours = 'blocks.{layer}.mixers.mamba2.'
    layers = {
        f'{ours}{name}.weight': tensor(f'{theirs}{name}.weight') for name in ('in_proj', 'out_proj')
    }
    return {
        **with_biases(layers),
        ours + 'conv.weight': tensor(theirs + 'conv1d.weight', layout=CONVOLUTION),
        ours + 'conv.bias': tensor(theirs + 'conv1d.bias'),
        **{ours + name: tensor(theirs + name) for name in ('dt_bias', 'A_log', 'D')},
        ours + 'norm.weight': tensor(theirs + 'norm.weight'),
    }


# --- Mamba-2 --------------------------------------------------------------------------------------

MAMBA2 = Family(
    name='mamba2',
    architecture='Mamba2ForCausalLM',
    prefix='backbone.',
    field_maps=(
        field('n_layer', 'num_hidden_layers'),
        field('n_embd', 'hidden_size'),
        field('vocab_size', 'vocab_size'),
        field('norm_eps', 'layer_norm_epsilon', 1e-5),
        field('mamba2_norm_eps', 'layer_norm_epsilon', 1e-5),
        field('weight_tying', 'tie_word_embeddings', False),
        heads_field('num_heads', 'head_dim', 64, 'expand'),
        field('mamba2_state_size', 'state_size', 128),
        field('mamba2_groups', 'n_groups', 8),
        field('mamba2_conv_size', 'conv_kernel', 4),
        field('mamba2_conv_bias', 'use_conv_bias', True),
        field('mamba2_proj_bias', 'use_bias', False),
        step_limits_field(),
        required_field(hidden_act='silu'),
        # No field has the length of the training's sequences; the models were published with 2048.
        constant_option(
            mixer='mamba2', ffn_type='none', normalization='rmsnorm', bias=False, block_size=2048
        ),
    ),
    irrelevant_fields=frozenset(
        {
            *('time_step_min', 'time_step_max', 'time_step_floor', 'time_step_rank'),
            *('rescale_prenorm_residual', 'residual_in_fp32', 'chunk_size', 'rms_norm'),
        }
    ),
    weights={
        **BACKBONE,
        **mixer_weights('backbone.layers.{layer}.mixer.'),
    },
    # Of the authors' own files.
    renamed_tensors={r'^backbone\.embedding\.': 'backbone.embeddings.'},
)

# --- Bamba ----------------------------------------------------------------------------------------

# Norms and FFN of Bamba and Falcon-H1, in layers with any mixer.
BLOCK_WEIGHTS = {
    **EMBEDDING_AND_HEAD,
    'final_norm.weight': tensor('model.final_layernorm.weight'),
    'blocks.{layer}.attention_norm.weight': tensor(LAYER + 'input_layernorm.weight'),
    'blocks.{layer}.ffn_norm.weight': tensor(LAYER + 'pre_ff_layernorm.weight'),
    **with_biases(
        {
            'blocks.{layer}.ffn.gate_up.weight': TensorMap(
                projections('feed_forward', 'gate', 'up')
            ),
            'blocks.{layer}.ffn.down.weight': TensorMap(projections('feed_forward', 'down')),
            **ATTENTION,
        }
    ),
    **mixer_weights(LAYER + 'mamba.'),
}
# Their sizes, norms and FFN.
BLOCK_FIELDS = (
    field('n_layer', 'num_hidden_layers', 32),
    field('n_head', 'num_attention_heads', 32),
    field('n_embd', 'hidden_size', 4096),
    field('vocab_size', 'vocab_size', 128_000),
    field('d_ff', 'intermediate_size', 14336),
    field('ffn_bias', 'mlp_bias', False),
    field('norm_eps', 'rms_norm_eps', 1e-5),
    field('weight_tying', 'tie_word_embeddings', False),
    constant_option(normalization='rmsnorm', bias=False),
    export_only(attention_dropout='attention_dropout'),
    swiglu_field(),  # also the activation of the convolutions
)

BAMBA = Family(
    name='bamba',
    architecture='BambaForCausalLM',
    prefix='model.',
    field_maps=(
        *BLOCK_FIELDS,
        field('block_size', 'max_position_embeddings', 262_144),
        layer_kinds_field(
            named_by_index('attn_layer_indices', FULL, LINEAR),
            kinds={
                LINEAR: LayerKind(
                    {'mixer': 'mamba2'},
                    (
                        heads_field('mamba_n_heads', 'mamba_d_head', None, 'mamba_expand'),
                        *MIXER_FIELDS,
                        field('mamba2_norm_eps', 'rms_norm_eps', 1e-5),
                    ),
                ),
                FULL: LayerKind(
                    {'mixer': 'attention'},
                    (
                        kv_heads_field(8),
                        field('head_dim', 'head_dim', None),
                        field('attention_bias', 'attention_bias', False),
                        partial_rope_fields(0.5),
                    ),
                ),
            },
        ),
    ),
    irrelevant_fields=IRRELEVANT | {'z_loss_coefficient'},
    weights=BLOCK_WEIGHTS,
)
